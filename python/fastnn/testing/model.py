"""Compares a converted model with the original: outputs and gradients of both against the same model in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import looks_like, relative_error, roundoff

__all__ = ["Compared", "ModelReport", "verify_model"]

#: A gradient passes when its error is at most this many times torch's, …
_FACTOR = 3.0
#: … or at most this many roundoffs of its dtype: torch's error is sometimes zero by luck.
_ROUNDOFFS = 4.0


@dataclass(frozen=True)
class Compared:
    """One output or gradient: relative errors ‖x − x₆₄‖ / ‖x₆₄‖ of the converted model and of torch's."""

    name: str
    error: float
    torch_error: float
    roundoff: float

    @property
    def passed(self) -> bool:
        return self.error <= max(_FACTOR * self.torch_error, _ROUNDOFFS * self.roundoff)

    @property
    def ratio(self) -> float:
        """Error over torch's: below 1 is nearer to float64 than torch."""
        if self.torch_error == 0:
            return 1.0 if self.error == 0 else math.inf
        return self.error / self.torch_error


@dataclass
class ModelReport:
    """The outcome of `verify_model`. True when every output and gradient is as near to float64 as torch's own."""

    dtype: str
    compared: list[Compared] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return bool(self.compared) and all(each.passed for each in self.compared)

    def __bool__(self) -> bool:
        return self.passed

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.passed:
            worst = max(self.compared, key=lambda each: each.ratio)
            return (
                f"the same: {len(self.compared)} outputs and gradients are as near to float64 as torch's own "
                f"(largest error {worst.ratio:.2f} times torch's, {worst.name})"
            )
        if not self.compared:
            return "nothing was compared: the model has no floating-point output"
        failed = [each for each in self.compared if not each.passed]
        worst = max(failed, key=lambda each: each.ratio)
        return (
            f"different: {len(failed)} of {len(self.compared)}; worst is {worst.name}, {worst.ratio:.3g} times torch's "
            f"error, like a computation in {looks_like(worst.error)}"
        )

    def __str__(self) -> str:
        width = max((len(each.name) for each in self.compared), default=0)
        lines = [
            f"{each.name:<{width}}  {each.error:.2e}  torch {each.torch_error:.2e}  {'ok' if each.passed else 'WRONG'}"
            for each in self.compared
        ]
        return "\n".join([*lines, self.verdict])

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON's types; an error that is not finite is null."""

        def number(value: float) -> float | None:
            return value if math.isfinite(value) else None

        return {
            "dtype": self.dtype,
            "passed": self.passed,
            "verdict": self.verdict,
            "compared": [
                {
                    "name": c.name,
                    "error": number(c.error),
                    "torch_error": number(c.torch_error),
                    "passed": c.passed,
                }
                for c in self.compared
            ],
        }


def verify_model(
    model: torch.nn.Module,
    converted: torch.nn.Module,
    inputs: torch.Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    loss: Callable[[Any], torch.Tensor] | None = None,
) -> ModelReport:
    """Runs both models and a float64 copy of `model` forward and backward, and compares outputs and gradients.

    Neither model is changed: all three are deep copies, so running statistics and gradients stay as they are. Each
    module keeps its train or eval mode, but for dropout, which is off: its masks would differ from copy to copy.

    Args:
        model: the original, in any floating dtype.
        converted: what is judged; its parameters must have the names and values of `model`'s.
        inputs: a tensor, a sequence of positional arguments or a mapping of keyword arguments. A floating tensor of
            it that requires a gradient has its gradient compared as well.
        loss: from the model's output to a scalar; by default every floating tensor of the output times fixed random
            integers from -8 to 8, summed.

    Returns:
        a `ModelReport`, which prints as a table and is true when it passed.

    Raises:
        ValueError: if the parameters of the two have different names or values.
    """
    _check_same_parameters(model, converted)
    exact = _quiet(copy.deepcopy(model)).double()
    ours = _run(_quiet(copy.deepcopy(converted)), inputs, loss, wide=False)
    theirs = _run(_quiet(copy.deepcopy(model)), inputs, loss, wide=False)
    reference = _run(exact, inputs, loss, wide=True)
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    report = ModelReport(", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes)) or "float32")
    for name, value in reference.items():
        if name not in ours or name not in theirs:
            raise ValueError(f"{name} exists in one of the models only")
        u = roundoff(theirs[name].dtype)
        report.compared.append(
            Compared(name, relative_error(ours[name], value), relative_error(theirs[name], value), u)
        )
    return report


def _check_same_parameters(model: torch.nn.Module, converted: torch.nn.Module) -> None:
    mine, theirs = dict(model.named_parameters()), dict(converted.named_parameters())
    if mine.keys() != theirs.keys():
        raise ValueError(f"parameters differ: {sorted(mine.keys() ^ theirs.keys())} are in one model only")
    for name, parameter in mine.items():
        if not torch.equal(parameter, theirs[name]):
            raise ValueError(f"parameter {name} has different values in the two models; copy one from the other first")


def _quiet(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.eval()
    return model


def _run(
    model: torch.nn.Module, inputs: Any, loss: Callable[[Any], torch.Tensor] | None, *, wide: bool
) -> dict[str, torch.Tensor]:
    """Every floating output and gradient by name."""
    leaves: list[torch.Tensor] = []

    def copied(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            made = value.detach().clone()
            if wide and made.is_floating_point():
                made = made.double()
            if value.requires_grad:
                leaves.append(made.requires_grad_())
            return made
        if isinstance(value, Mapping):
            return {k: copied(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(copied(v) for v in value)
        return value

    fresh = copied(inputs)
    model.zero_grad(set_to_none=True)
    if isinstance(fresh, torch.Tensor):
        output = model(fresh)
    elif isinstance(fresh, Mapping):
        output = model(**fresh)
    else:
        output = model(*fresh)
    outputs = [t for t in _tensors(output) if t.is_floating_point()]
    found = {("output" if len(outputs) == 1 else f"output {i}"): t.detach() for i, t in enumerate(outputs)}
    if loss is not None:
        total: torch.Tensor | None = loss(output)
    else:
        total = None
        generator = torch.Generator().manual_seed(0)
        for tensor in outputs:
            # Small integers, because they are the same numbers in every dtype.
            weights = torch.randint(-8, 9, tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
            term = (tensor * weights).sum()
            total = term if total is None else total + term
    if total is not None and total.requires_grad:
        total.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[f"gradient of {name}"] = parameter.grad
        for number, leaf in enumerate(leaves):
            if leaf.grad is not None:
                found[f"gradient of input {number}"] = leaf.grad
    return found


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors(v)]
    return []
