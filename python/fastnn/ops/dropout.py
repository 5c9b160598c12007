"""Dropout (Srivastava et al., JMLR 15, 2014), with a mask that is computed twice instead of being kept.

Formula: out[e] = input[e] / (1 - p) where element e is kept, else 0 · input[e], which keeps NaN and makes it of an
infinity, as torch's product with a mask does. Element e, the index in row-major order, is kept where word e % 4 of
Philox4x32-10 (Salmon et al., SC 2011) with the counter e / 4 and the key ``seed`` is at least round(p · 2³²). The seed is
drawn from torch's default generator, once a call, so that torch.manual_seed and torch.utils.checkpoint repeat the mask;
where torch draws nothing (p is 0 or 1, or there is no element) neither is a seed. The mask depends on nothing else: not on
threads, instruction sets or strides. The numbers are not those that torch would draw.

input in float32, float64, bfloat16 or float16, of any shape and strides; the result has its shape and dtype, and the
strides of torch.empty_like. It is computed in float32 (float64 for float64) and rounded once. Other dtypes go to torch.
ValueError for a p outside of 0 to 1; RuntimeError for NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version

from ..backends import Kernels, cpu
from ..backends.reference import dropout as formulas
from ._op import Op
from ._out import has_internal_overlap
from ._random import draw_seed, no_seed, seed_for
from ._route import EAGER, LIBRARY, Unsupported, fall_back, is_dynamo_compiling, route, wants_grad

_torch_dropout = torch.nn.functional.dropout
_tensor_dropout = cpu.tensor_dropout
_empty = cpu.empty_like
_kernels = Kernels("dropout")


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """As :func:`torch.nn.functional.dropout`. See this module for the formula, shapes, dtypes and errors."""
    if training is True and not inplace and type(p) is float and 0 < p <= 1 and not is_dynamo_compiling():
        found = _tensor_dropout(_empty, input, draw_seed if p < 1 else no_seed, p)
        if type(found) is tuple:
            return _apply_dropout(input, p, found)
        if found is not None:
            return found
    try:
        _check(input, p, training)
        if not training or p == 0:
            return input
        where = route("dropout", input)
        # In a traced graph sizes may be symbols.
        if where != LIBRARY and input.numel() == 0:
            return input
        if inplace:
            return _in_place(input, float(p), where)
        return DROPOUT(input, seed_for(input, p), float(p), where=where)
    except Unsupported as reason:
        return fall_back("dropout", reason.args[0], _torch_dropout, input, p, training, inplace)


def _check(input: Any, p: Any, training: Any) -> None:
    if not isinstance(input, Tensor):
        raise Unsupported(f"input: expected a Tensor, got {type(input).__name__}")
    if input.is_nested:
        raise Unsupported("input: a nested tensor")
    if not isinstance(training, bool):
        raise Unsupported(f"training: expected a bool, got {type(training).__name__}")
    if not isinstance(p, (int, float)) or not 0 <= p <= 1:
        raise Unsupported(f"p: expected a number from 0 to 1, got {p!r}")


def _in_place(input: Tensor, p: float, where: str) -> Tensor:
    if where != EAGER:
        return input.copy_(DROPOUT(input, seed_for(input, p), p, where=where))
    if has_internal_overlap(input):
        raise Unsupported("input: more than one of its elements refers to one memory location")
    if input.is_inference() and not torch.is_inference_mode_enabled():
        raise Unsupported("input: an inference tensor, changed in place outside of inference mode")
    differentiates = wants_grad(input)
    if differentiates and input.is_leaf:
        raise Unsupported("input: a leaf that requires grad, changed in place")
    seed = seed_for(input, p)
    if input.is_neg():
        return input.copy_(DROPOUT(input, seed, p, where=where))
    if differentiates:
        return _InPlaceDropout.apply(input, seed, p)
    _kernels.dropout(input, seed, p, input)
    if not input.is_inference():
        increment_version(input)
    return input


# ---- derivatives: dropout is linear, and its own transpose -------------------------------------------------------


def masked(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Dropout of x with a mask that was drawn before: of a gradient or a tangent."""
    if not is_dynamo_compiling():
        found = _tensor_dropout(_empty, x, seed, p)
        if type(found) is tuple:
            return _apply_dropout(x, p, found)
        if found is not None:
            return found
    try:
        return DROPOUT(x, seed, p)
    except Unsupported as reason:
        return fall_back("dropout_backward", reason.args[0], formulas.dropout, x, seed, p)


class _Dropout(Function):
    """What the short way has computed, the result and the seed in ``found``, made part of the graph."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, p: float, found: tuple[Tensor, Tensor]) -> Tensor:
        # Nobody else holds the seed: it needs no protection from changes.
        result, ctx.seed = found
        ctx.p = p
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return masked(grad, ctx.seed, ctx.p), None, None


# Function.apply asks for transforms, of which the short way knows that there are none.
_apply_dropout = super(Function, _Dropout).apply


class _InPlaceDropout(Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, seed: Tensor, p: float) -> Tensor:
        ctx.p = p
        _kernels.dropout(input, seed, p, input)
        ctx.mark_dirty(input)
        ctx.save_for_backward(seed)
        return input

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (seed,) = ctx.saved_tensors
        return masked(grad, seed, ctx.p), None, None


def _save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> tuple[Tensor, ...]:
    _, seed, ctx.p = args
    return (seed,)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (seed,) = ctx.saved_tensors
    return masked(grad, seed, ctx.p), None, None


def _jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    (seed,) = ctx.saved_tensors
    return masked(tangent, seed, ctx.p)


def _vmap(info: Any, in_dims: tuple[Any, ...], input: Tensor, seed: Tensor, p: float) -> tuple[Tensor, int]:
    """One sample at a time: each has indices of its own, and a mask of its own where torch.vmap's randomness is
    "different", which makes one seed a sample."""
    inputs = [input] * info.batch_size if in_dims[0] is None else input.unbind(in_dims[0])
    seeds = [seed] * info.batch_size if in_dims[1] is None else seed.unbind(in_dims[1])
    return torch.stack([masked(x, s, p) for x, s in zip(inputs, seeds, strict=True)]), 0


#: input / (1 - p), or 0, by the mask that belongs to an int64 seed.
DROPOUT = Op(
    "dropout(Tensor input, Tensor seed, float p) -> Tensor",
    kernel=_kernels.dropout,
    reference=formulas.dropout,
    fake=lambda input, seed, p: torch.empty_like(input),
    save=_save,
    backward=_backward,
    vmap=_vmap,
    jvp=_jvp,
)
