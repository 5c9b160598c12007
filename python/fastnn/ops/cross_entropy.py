"""Cross entropy of logits with class indices or probabilities, in one pass over the logits.

Formula: with lse = log Σ exp(x) over the classes, q_c = w_c ((1 - ε) t_c + ε / C) for the weights w, the label smoothing ε
(Szegedy et al., arXiv:1512.00567) and the target t, probabilities or 1 at an index, the loss of a position is
Σ q_c (lse - x_c); its gradient by x is (Σ q) softmax(x) - q. ``reduction="mean"`` divides the sum of the losses by the sum of
the targets' weights, or by the number of positions where targets are probabilities.

Shapes: input (C), (N, C) or (N, C, d1, ...), any strides; target the same without C, int64 or uint8, or with it, in the
input's dtype; weight (C). float32, float64, bfloat16 and float16; computed in float32 (float64 for float64), sums in blocks
and over positions in float64; the result is rounded once. The log-softmax is not kept: the backward makes it again from the
logits. Under autocast it is computed in float32, as torch's. Other dtypes, and weights that require a gradient, go to torch.

Raises what torch raises: IndexError "Target ... is out of bounds." (on a GPU an assertion of the device, as torch's),
ValueError for sizes that differ and for an unknown reduction, RuntimeError for dtypes, for a label smoothing beyond 0
to 1 and for an ``ignore_index`` beside probabilities.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn import _reduction

from ..backends import Kernels, cpu
from ..backends._cross_entropy import REDUCTION, result_shape, wide
from ..backends.reference import cross_entropy as formulas
from ._op import Op
from ._route import (
    Unsupported,
    ask_torch,
    autocast_device,
    describe,
    fall_back,
    is_autocast_enabled,
    is_dynamo_compiling,
    route,
)

F = torch.nn.functional

_torch_cross_entropy = F.cross_entropy
_tensor_cross_entropy = cpu.tensor_cross_entropy
_tensor_cross_entropy_backward = cpu.tensor_cross_entropy_backward
kernels = Kernels("cross_entropy")


# ---- the public function -----------------------------------------------------------------------------------------


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """As :func:`torch.nn.functional.cross_entropy`. See this module for shapes, dtypes and errors."""
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if not is_dynamo_compiling():
        found = _tensor_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
        if type(found) is tuple:
            options = (ignore_index, reduction, label_smoothing)
            return _apply_cross_entropy(input, target, weight, found, options)
        if found is not None:
            return found
    options = dict(ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
    try:
        check_options(target, **options)
        # Under autocast what is computed is float32, whatever each of the three was.
        x, target_, weight_ = (_widened(t) if isinstance(t, Tensor) else t for t in (input, target, weight))
        _check(x, target_, weight_)
        if input.numel() == 0:
            return ask_torch(
                "cross_entropy", "an input without elements", _torch_cross_entropy, input, target, weight, **options
            )
        where = route("cross_entropy", x, weight_, target_ if target_.is_floating_point() else None)
        alone = input.dim() == 1
        if alone:
            x, target_ = x.unsqueeze(0), target_.unsqueeze(0)
        loss, _ = CROSS_ENTROPY(x, target_, weight_, ignore_index, reduction, float(label_smoothing), where=where)
    except Unsupported as reason:
        return fall_back("cross_entropy", reason.args[0], _torch_cross_entropy, input, target, weight, **options)
    return loss.squeeze(0) if alone and reduction == "none" else loss


def check_options(target: Any, ignore_index: Any, reduction: Any, label_smoothing: Any) -> None:
    if not isinstance(target, Tensor):
        raise Unsupported(f"target: expected a Tensor, got {type(target).__name__}")
    if not isinstance(reduction, str) or reduction not in REDUCTION:
        raise Unsupported(f"reduction: expected none, mean or sum, got {reduction!r}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise Unsupported(f"{describe('ignore_index', ignore_index)}: expected an integer")
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
        raise Unsupported(f"{describe('label_smoothing', label_smoothing)}: expected a float")
    if not 0 <= label_smoothing <= 1:
        raise Unsupported(f"label_smoothing: expected 0 to 1, got {label_smoothing}")
    if target.is_floating_point() and ignore_index >= 0:
        raise Unsupported("ignore_index: is not for targets that are probabilities")


def check_weight(input: Tensor, classes: Any, weight: Any, dtype: torch.dtype | None = None) -> None:
    """``dtype``: that of the weight, the input's by default."""
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise Unsupported(f"weight: expected a Tensor, got {type(weight).__name__}")
    if weight.dim() != 1 or weight.shape[0] != classes:
        raise Unsupported(f"weight: expected one number a class, got {describe('weight', weight)}")
    if weight.dtype is not (dtype or input.dtype) or weight.device != input.device:
        raise Unsupported(f"weight: expected dtype and device of the input, got {weight.dtype} on {weight.device}")
    if weight.requires_grad:
        raise Unsupported("weight: requires a gradient")


def _check(input: Any, target: Tensor, weight: Any) -> None:
    if not isinstance(input, Tensor):
        raise Unsupported(f"input: expected a Tensor, got {type(input).__name__}")
    for name, tensor in (("input", input), ("target", target)):
        if tensor.is_nested or tensor.layout is not torch.strided:
            raise Unsupported(f"{name}: expected a dense tensor")
    if input.dim() < 1:
        raise Unsupported(f"input: expected (C), (N, C) or (N, C, ...), got {describe('input', input)}")
    if input.dim() > cpu.MAX_DIMS:
        raise Unsupported(f"input: more than {cpu.MAX_DIMS} dimensions")
    axis = 0 if input.dim() == 1 else 1
    if target.is_floating_point():
        if target.shape != input.shape or target.dtype is not input.dtype:
            raise Unsupported(
                f"target: expected probabilities as {describe('input', input)}, got {describe('target', target)}"
            )
    else:
        check_indices(input, target)
        if target.shape != (*input.shape[:axis], *input.shape[axis + 1 :]):
            raise Unsupported(
                f"target: expected the shape of {describe('input', input)} without the classes, got "
                f"{describe('target', target)}"
            )
    if target.device != input.device:
        raise Unsupported(f"target: expected the device of input, {input.device}, got {target.device}")
    check_weight(input, input.shape[axis], weight)


def check_indices(input: Tensor, target: Tensor) -> None:
    if target.dtype not in (torch.int64, torch.uint8):
        raise Unsupported(f"target: expected int64, uint8 or probabilities, got {target.dtype}")


def _widened(x: Tensor | None) -> Tensor | None:
    """For what torch.autocast computes in float32."""
    if x is not None and x.dtype in cpu.HALF and is_autocast_enabled(autocast_device(x)):
        return x.float()
    return x


# ---- derivatives -------------------------------------------------------------------------------------------------


def _weighted(input: Tensor, target: Tensor, weight: Tensor | None, options: tuple[Any, ...]) -> formulas.Weighted:
    return formulas.Weighted(input, target, weight, *options, wide(input.dtype))


class _CrossEntropy(Function):
    """What the short way has computed, ``found``, made part of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        found: tuple[Tensor, Tensor],
        options: tuple[int, str, float],
    ) -> Tensor:
        loss, statistics = found
        ctx.options = options
        ctx.save_for_backward(input, target, weight, statistics)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _backward(ctx, grad)[:5]


# Function.apply asks for transforms, of which the short way knows that there are none.
_apply_cross_entropy = super(Function, _CrossEntropy).apply


def _save(ctx: Any, args: tuple[Any, ...], result: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    input, target, weight, *options = args
    ctx.options = tuple(options)
    return input, target, weight, result[1]


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    input, target, weight, statistics = ctx.saved_tensors
    args = (grad, input, target, weight, statistics, *ctx.options)
    if not is_dynamo_compiling():
        found = _tensor_cross_entropy_backward(grad, statistics, input, target, weight, *ctx.options)
        if found is not None:
            return found, *(None,) * 5
    by_input = by_target = None
    if ctx.needs_input_grad[0]:
        if forward_ad._current_level >= 0:
            # Forward mode over reverse mode: torch knows how to differentiate the formula.
            by_input = formulas.cross_entropy_backward(*args, dtype=wide(input.dtype))
        else:
            try:
                by_input = CROSS_ENTROPY_BACKWARD(*args)
            except Unsupported as reason:
                formula = formulas.cross_entropy_backward
                by_input = fall_back("cross_entropy_backward", reason.args[0], formula, *args, dtype=wide(input.dtype))
    if ctx.needs_input_grad[1]:
        by_target = formulas.by_probabilities(grad, input, target, weight, *ctx.options, wide(input.dtype))
    return by_input, by_target, None, None, None, None


def _jvp(ctx: Any, by_input: Tensor | None, by_target: Tensor | None, *_: Any) -> tuple[Tensor, None]:
    input, target, weight, _ = ctx.saved_tensors
    of = _weighted(input, target, weight, ctx.options)
    along = torch.zeros_like(of.x)
    if by_input is not None:
        along = along + (of.mass * of.x.softmax(1) - of.q) * by_input
    if by_target is not None:
        along = along + of.hard * (of.lse() - of.x) * by_target
    return of.reduced(along.sum(1)).to(input.dtype), None


def _save_backward(ctx: Any, args: tuple[Any, ...], result: Tensor) -> tuple[Tensor | None, ...]:
    grad, input, target, weight, _, *options = args
    ctx.options = tuple(options)
    return grad, input, target, weight


def _backward_twice(ctx: Any, direction: Tensor) -> tuple[Any, ...]:
    """Of v · r (m s - q), with s = softmax(x), m = Σ q and r the gradient by the losses: by r it is v · (m s - q), by x
    r m s (v - Σ s v), by the probabilities r (1 - ε) w (Σ s v - v)."""
    grad, input, target, weight = ctx.saved_tensors
    of = _weighted(input, target, weight, ctx.options)
    s, v, r = of.x.softmax(1), direction.to(of.x.dtype), of.per_position(grad)
    mean = (s * v).sum(1, keepdim=True)
    by_grad = of.reduced((v * (of.mass * s - of.q)).sum(1)).to(grad.dtype)
    by_input = (r * of.mass * s * (v - mean)).to(input.dtype)
    by_target = (r * of.hard * (mean - v)).to(target.dtype) if ctx.needs_input_grad[2] else None
    return by_grad, by_input, by_target, *(None,) * 5


# ---- vmap: one call a sample -------------------------------------------------------------------------------------


def each_sample(op: Op, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """A reduction is over one sample's positions alone."""
    results = [
        op(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(each) for each in zip(*results, strict=True)), (0,) * len(results[0])


# ---- the ops -----------------------------------------------------------------------------------------------------


def _fake(input: Tensor, target: Tensor, weight: Tensor | None, ignore: int, reduction: str, _: float) -> Any:
    positions = input.numel() // input.shape[1]
    out = input.new_empty(result_shape(input, reduction))
    return out, input.new_empty(2 * positions + 1, dtype=torch.float64)


#: The losses, and what the backward needs: see kernels.cross_entropy.
CROSS_ENTROPY = Op(
    "cross_entropy(Tensor input, Tensor target, Tensor? weight, int ignore_index, str reduction, float smoothing) "
    "-> (Tensor, Tensor)",
    kernel=kernels.cross_entropy,
    reference=formulas.cross_entropy,
    fake=_fake,
    save=_save,
    backward=_backward,
    jvp=_jvp,
    vmap=lambda info, in_dims, *args: each_sample(CROSS_ENTROPY, info, in_dims, args),
)

#: The gradient by the input.
CROSS_ENTROPY_BACKWARD = Op(
    "cross_entropy_backward(Tensor grad, Tensor input, Tensor target, Tensor? weight, Tensor statistics, "
    "int ignore_index, str reduction, float smoothing) -> Tensor",
    kernel=kernels.cross_entropy_backward,
    reference=formulas.cross_entropy_backward,
    fake=lambda grad, input, *_: input.new_empty(input.shape),
    save=_save_backward,
    backward=_backward_twice,
    vmap=lambda info, in_dims, *args: each_sample(CROSS_ENTROPY_BACKWARD, info, in_dims, args),
)
