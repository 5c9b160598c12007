"""The declaration of one op for the equivalence suite: what it computes, on which inputs, and how exact it must be."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from .inputs import Maker

__all__ = ["FLOATS", "Case", "Sample", "case", "cases", "register"]

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sample:
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        named = [("", value) for value in self.args]
        named += [(f"{name}=", value) for name, value in self.kwargs.items()]
        return ", ".join(name + _describe(value) for name, value in named)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Sample:
        """The same call with every tensor replaced by `change(tensor)`."""

        def replace(value: Any) -> Any:
            return change(value) if isinstance(value, torch.Tensor) else value

        return Sample(
            tuple(map(replace, self.args)),
            {name: replace(value) for name, value in self.kwargs.items()},
        )

    def wide(self) -> Sample:
        """The same call in float64, or int64 where the tensor holds integers."""
        return self.map(lambda t: t.detach().to(torch.float64 if t.is_floating_point() else torch.int64))

    def tensors(self) -> list[torch.Tensor]:
        values = (*self.args, *self.kwargs.values())
        return [value for value in values if isinstance(value, torch.Tensor)]

    def call(self, function: Callable[..., torch.Tensor], **more: Any) -> torch.Tensor:
        return function(*self.args, **self.kwargs, **more)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "×".join(map(str, value.shape)) or "scalar"
    return repr(value)


@dataclass(frozen=True)
class Case:
    """One op. Everything that the suite needs to judge any function that claims to compute it.

    A result passes where |result − reference| ≤ γ_depth·magnitude + u·|reference|, with γ_n = n·u/(1 − n·u) for the
    precision that the op computes in and u the roundoff of the result; or where torch is no nearer. Where the op rounds to
    integers on its way, or at its end, |result − reference| may be larger by what `ties` says: one step of a number so near
    to the middle between two integers that the roundings before it decide which one is nearest.

    Attributes:
        name: what `python -m fastnn verify NAME` calls it.
        peer: torch's op. Run on float64 inputs it is also the reference.
        samples: given a `Maker`, yields the calls to try; shapes from primes and from tile sizes ±1.
        magnitude: given the reference result and the float64 arguments, the size of what is rounded on the way: for a
            product |A|·|B|. Must have the result's shape.
        depth: given the arguments, how many roundings in a row: for a product K.
        function: where fastnn's own is, as "module:name".
        dtypes: what it is verified in.
        out: whether it takes `out=`.
        differentiable: whether its gradients are verified.
        exact: whether small integers must give the exact result, rounded once.
        product: whether `torch.get_float32_matmul_precision()` applies.
        reference: replaces `peer` as the float64 reference, for an op that torch does not have.
        ties: given what `magnitude` is given, how far off a result may be because an integer within it came to lie on the
            other side of a tie; 0 where there is none.
    """

    name: str
    peer: Callable[..., torch.Tensor]
    samples: Callable[[Maker], Iterable[Sample]]
    magnitude: Callable[..., torch.Tensor]
    depth: Callable[..., int]
    function: str = ""
    dtypes: tuple[torch.dtype, ...] = FLOATS
    out: bool = False
    differentiable: bool = True
    exact: bool = True
    product: bool = True
    reference: Callable[..., torch.Tensor] | None = None
    ties: Callable[..., torch.Tensor] | None = None

    def resolve(self) -> Callable[..., torch.Tensor]:
        """fastnn's own function for this op."""
        if not self.function:
            raise ValueError(f"case {self.name!r} names no function of fastnn; pass one to verify()")
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)

    def exactly(self, sample: Sample) -> torch.Tensor:
        """The reference result in float64 (int64 for integers)."""
        return sample.wide().call(self.reference or self.peer)


_CASES: dict[str, Case] = {}


def register(new: Case) -> Case:
    """Adds a case to what `python -m fastnn verify` runs. ValueError if the name is taken."""
    if new.name in _CASES:
        raise ValueError(f"a case named {new.name!r} exists already")
    _CASES[new.name] = new
    return new


def cases() -> dict[str, Case]:
    """Every registered case by name."""
    return dict(_CASES)


def case(name: str) -> Case:
    """The case of that name. KeyError, listing the names, if there is none."""
    try:
        return _CASES[name]
    except KeyError:
        raise KeyError(f"no case named {name!r}; there are {', '.join(sorted(_CASES))}") from None
