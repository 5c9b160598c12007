"""Cross entropy of a linear layer's result, whose logits are never held whole (Hsu et al., Liger Kernel, arXiv:2410.10989).

Formula: cross_entropy(input @ linear_weight.T + linear_bias, target): see cross_entropy.py. Shapes: input (N, K) or (K),
linear_weight (C, K), linear_bias (C), target (N) or () of class indices, weight (C).

Rows go through in chunks of about 48 MB of logits, on a GPU of 256 MB. Where a gradient is wanted and the losses are
reduced, the forward makes the gradients, chunk by chunk, for the gradient 1 of the loss, and the backward multiplies
them; where they were used up by an earlier backward, and for ``reduction="none"``, the backward computes the logits
again. Gradients of gradients are computed by the formula in plain torch, which holds the logits. The weight's gradient
is summed in float32 (float64).

Probabilities as targets, and weights (C, d1, ..., K) for losses (N, d1, ...), are computed as the two ops one after the
other, which holds the logits. What neither takes goes to torch: to its own function of this name where it has one (2.13),
else to its linear and cross_entropy. Bad input raises what these raise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ..backends._cross_entropy import wide as wide_dtype
from ..backends.cpu import HALF
from ..backends.reference import cross_entropy as formulas
from ._op import Op
from ._route import (
    EAGER,
    Unsupported,
    ask_torch,
    autocast,
    autocast_device,
    describe,
    fall_back,
    is_autocast_enabled,
    is_straight,
    resolve,
    route,
    wants_grad,
)
from .cross_entropy import check_indices, check_options, check_weight, cross_entropy, each_sample, kernels
from .linear import linear

F = torch.nn.functional


# ---- the public function -----------------------------------------------------------------------------------------


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """As ``torch.nn.functional.linear_cross_entropy`` of torch 2.13. ``options`` says how torch chunks; it is ignored."""
    ignored = -100 if ignore_index is None else ignore_index
    choices = dict(ignore_index=ignored, reduction=reduction, label_smoothing=label_smoothing)
    everything = (input, linear_weight, linear_bias, target, weight)
    try:
        check_options(target, **choices)
        if _is_of_two(input, linear_weight, linear_bias, target, ignore_index):
            logits = linear(input, linear_weight.flatten(0, -2), None if linear_bias is None else linear_bias.flatten())
            logits = logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
            return cross_entropy(logits, target, weight, **choices)
        x, w, b = input, linear_weight, linear_bias
        if all(isinstance(t, Tensor) for t in (x, w)) and (b is None or isinstance(b, Tensor)):
            x, w, b = autocast(x, w, b)
        # Under autocast torch's linear gives 16 bits, of which its cross entropy makes float32.
        wide = isinstance(x, Tensor) and x.dtype in HALF and is_autocast_enabled(autocast_device(x))
        if wide and isinstance(weight, Tensor) and weight.dtype in HALF:
            weight = weight.float()
        _check(x, w, b, target, weight, torch.float32 if wide else None)
        if input.numel() == 0 or linear_weight.numel() == 0:
            return ask_torch("linear_cross_entropy", "an input without elements", _in_torch, *everything, **choices)
        where = route("linear_cross_entropy", input, linear_weight, linear_bias, weight)
        alone = input.dim() == 1
        if alone:
            x, target = x.unsqueeze(0), target.unsqueeze(0)
        args = (x, w, b, target, weight, ignored, reduction, float(label_smoothing), wide)
        if where == EAGER and reduction != "none" and wants_grad(x, w, b):
            loss = _LinearCrossEntropy.apply(*(resolve(a) if isinstance(a, Tensor) else a for a in args))
        else:
            loss = LINEAR_CROSS_ENTROPY(*args, where=where)
    except Unsupported as reason:
        return fall_back("linear_cross_entropy", reason.args[0], _in_torch, *everything, **choices)
    return loss.squeeze(0) if alone and reduction == "none" else loss


def _is_of_two(input: Any, linear_weight: Any, linear_bias: Any, target: Tensor, ignore_index: Any) -> bool:
    """Whether the call is well formed, and one whose logits are held."""
    if not (isinstance(input, Tensor) and isinstance(linear_weight, Tensor)) or linear_weight.dim() < 2:
        return False
    if input.dim() not in (1, 2) or input.shape[-1] != linear_weight.shape[-1]:
        return False
    if linear_bias is not None and (
        not isinstance(linear_bias, Tensor) or linear_bias.shape != linear_weight.shape[:-1]
    ):
        return False
    if linear_weight.dim() > 2:
        return input.dim() == 2
    return target.is_floating_point() and ignore_index is None


def _in_torch(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    **choices: Any,
) -> Tensor:
    own = getattr(F, "linear_cross_entropy", None)
    if own is not None:
        return own(input, linear_weight, target, linear_bias=linear_bias, weight=weight, **choices)
    return F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, weight, **choices)


def _check(
    input: Any, linear_weight: Any, linear_bias: Any, target: Tensor, weight: Any, dtype: torch.dtype | None
) -> None:
    for name, value in (("input", input), ("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if not isinstance(value, Tensor) and (value is not None or name != "linear_bias"):
            raise Unsupported(f"{name}: expected a Tensor, got {type(value).__name__}")
        if value is not None and (value.is_nested or value.layout is not torch.strided):
            raise Unsupported(f"{name}: expected a dense tensor")
        if value is not None and (value.dtype is not input.dtype or value.device != input.device):
            raise Unsupported(f"{name}: expected dtype and device of input, got {value.dtype} on {value.device}")
    if input.dim() not in (1, 2) or linear_weight.dim() != 2 or input.shape[-1] != linear_weight.shape[1]:
        raise Unsupported(
            f"linear_weight: expected (C, K) for input (N, K), got {describe('linear_weight', linear_weight)} for "
            f"{describe('input', input)}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise Unsupported(f"linear_bias: expected (C), got {describe('linear_bias', linear_bias)}")
    check_indices(input, target)
    if target.shape != input.shape[:-1] or target.device != input.device:
        raise Unsupported(f"target: expected (N), got {describe('target', target)} for {describe('input', input)}")
    check_weight(input, linear_weight.shape[0], weight, dtype)


# ---- derivatives -------------------------------------------------------------------------------------------------


def _formula(
    grad: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by input, linear_weight and bias in plain torch; an empty one where there is no bias."""
    x, w = input.to(dtype), linear_weight.to(dtype)
    logits = F.linear(x, w, None if bias is None else bias.to(dtype))
    args = (logits, target, weight, None, ignore_index, reduction, smoothing)
    by_logits = formulas.cross_entropy_backward(grad, *args, dtype=dtype)
    by_bias = input.new_empty(0) if bias is None else by_logits.sum(0).to(input.dtype)
    return (by_logits @ w).to(input.dtype), (by_logits.t() @ x).to(input.dtype), by_bias


def _reference(
    input: Tensor,
    linear_weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    wide: bool,
) -> Tensor:
    tensors = (None if t is None else t.double() for t in (input, linear_weight, bias))
    args = (target, weight, ignore_index, reduction, smoothing)
    return formulas.cross_entropy(F.linear(*tensors), *args)[0].to(torch.float32 if wide else input.dtype)


def _by_everything(ctx: Any, grad: Tensor, saved: tuple[Any, ...] | None = None) -> tuple[Any, ...]:
    """Computes the logits again."""
    input, linear_weight, bias, target, weight = saved or ctx.saved_tensors
    args = (grad, input, linear_weight, bias, target, weight, *ctx.options)
    if forward_ad._current_level >= 0:
        # Forward mode over reverse mode: torch knows how to differentiate the formula.
        found = _formula(*args, dtype=wide_dtype(input.dtype))
    else:
        try:
            found = LINEAR_CROSS_ENTROPY_BACKWARD(*args)
        except Unsupported as reason:
            dtype = wide_dtype(input.dtype)
            found = fall_back("linear_cross_entropy_backward", reason.args[0], _formula, *args, dtype=dtype)
    by_input, by_weight, by_bias = found
    return by_input, by_weight, None if bias is None else by_bias, *(None,) * 6


class _LinearCrossEntropy(Function):
    """The forward makes the gradients too."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.options = args[5:8]
        one = torch.ones((), dtype=torch.float64, device=args[0].device)
        loss, ctx.found = kernels.linear_cross_entropy(*args, grad=one, wanted=tuple(ctx.needs_input_grad[:3]))
        ctx.save_for_backward(*args[:5])
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # asks whether a graph that was freed is gone through again
        # Those that the forward made can be used once, and know nothing of their own derivatives.
        if ctx.found is None or not is_straight("linear_cross_entropy", grad):
            return _by_everything(ctx, grad, saved)
        found, ctx.found = ctx.found, None
        if grad.is_cuda or grad.item() != 1:  # of a GPU one would have to wait for it
            for gradient in found:
                if gradient is not None:
                    gradient.mul_(grad)
        return *found, *(None,) * 6


def _save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> tuple[Tensor | None, ...]:
    ctx.options, ctx.wide = tuple(args[5:8]), args[8]
    return tuple(args[:5])


def _jvp(ctx: Any, by_input: Any, by_linear_weight: Any, by_bias: Any, *_: Any) -> Tensor:
    input, linear_weight, bias, target, weight = ctx.saved_tensors
    logits = F.linear(input, linear_weight, bias)
    along = torch.zeros_like(logits)
    if by_input is not None:
        along = along + F.linear(by_input, linear_weight)
    if by_linear_weight is not None:
        along = along + F.linear(input, by_linear_weight)
    if by_bias is not None:
        along = along + by_bias
    of = formulas.Weighted(logits, target, weight, *ctx.options, wide_dtype(input.dtype))
    found = of.reduced(((of.mass * of.x.softmax(1) - of.q) * along).sum(1))
    return found.to(torch.float32 if ctx.wide else input.dtype)


def _save_backward(ctx: Any, args: tuple[Any, ...], result: Any) -> tuple[Tensor | None, ...]:
    ctx.options = tuple(args[6:])
    return tuple(args[:6])


def _backward_twice(ctx: Any, *directions: Tensor | None) -> tuple[Any, ...]:
    grad, input, linear_weight, bias, target, weight = ctx.saved_tensors
    dtype = wide_dtype(input.dtype)

    def formula(*tensors: Tensor) -> tuple[Tensor, ...]:
        full = tensors if bias is not None else (*tensors, None)
        return _formula(*full, target, weight, *ctx.options, dtype=dtype)

    tensors = (grad, input, linear_weight) if bias is None else (grad, input, linear_weight, bias)
    results, pull_back = torch.func.vjp(formula, *tensors)
    given = zip(directions, results, strict=True)
    found = pull_back(tuple(torch.zeros_like(r) if d is None else d.to(r.dtype) for d, r in given))
    return *found, *(None,) * (9 - len(found))


def _kernel_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    input, bias = args[0], args[2]
    _, found = kernels.linear_cross_entropy(*args, grad=grad, wanted=(True, True, bias is not None))
    return found[0], found[1], input.new_empty(0) if found[2] is None else found[2]


def _fake(input: Tensor, *args: Any) -> Tensor:
    *_, reduction, _, wide = args
    dtype = torch.float32 if wide else input.dtype
    return input.new_empty((input.shape[0],) if reduction == "none" else (), dtype=dtype)


def _fake_backward(grad: Tensor, input: Tensor, linear_weight: Tensor, bias: Tensor | None, *_: Any) -> Any:
    by_bias = input.new_empty(0 if bias is None else bias.shape[0])
    return input.new_empty(input.shape), input.new_empty(linear_weight.shape), by_bias


# ---- the ops -----------------------------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor input, Tensor linear_weight, Tensor? bias, Tensor target, Tensor? weight, int ignore_index, str reduction, "
    "float smoothing"
)

#: The losses, in float32 where ``wide``.
LINEAR_CROSS_ENTROPY = Op(
    f"linear_cross_entropy({_ARGUMENTS}, bool wide) -> Tensor",
    kernel=lambda *args: kernels.linear_cross_entropy(*args)[0],
    reference=_reference,
    fake=_fake,
    save=_save,
    backward=_by_everything,
    jvp=_jvp,
    vmap=lambda info, in_dims, *args: each_sample(LINEAR_CROSS_ENTROPY, info, in_dims, args),
)

#: The gradients by input, linear_weight and bias; the last is empty where there is none.
LINEAR_CROSS_ENTROPY_BACKWARD = Op(
    f"linear_cross_entropy_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    kernel=_kernel_backward,
    reference=_formula,
    fake=_fake_backward,
    save=_save_backward,
    backward=_backward_twice,
    vmap=lambda info, in_dims, *args: each_sample(LINEAR_CROSS_ENTROPY_BACKWARD, info, in_dims, args),
    differentiable=3,
)
