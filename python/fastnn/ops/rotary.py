"""Rotary position embedding (RoFormer, Su et al., arXiv:2104.09864, equation 34).

Formula: out = x · cos + turn(x) · sin over the last dimension, of even size D. turn takes each pair (a, b) to (-b, a): the
pairs are x[i] and x[i + D/2] as in Hugging Face's ``rotate_half`` (Llama, GPT-NeoX), or with ``interleaved`` x[2i] and
x[2i + 1] as in GPT-J and the paper.

x (..., L, D) in float32, float64, bfloat16 or float16, any strides. cos and sin, of one shape, have a number for each
element, (..., D), or for each pair, (..., D/2); in front of it they are
* (L, ·), the same for all of x's other dimensions;
* (B, L, ·) beside x (B, H, L, D), the same for all heads, as Hugging Face has them;
* of as many dimensions as x, and broadcast.
They may be of x's dtype or float32; another floating-point dtype is converted. The result has x's shape and dtype, and
its strides where its last dimension is dense, computed in float32 (float64 for float64) and rounded once. All three
have gradients: that of x is the turn back, by the kernel; those of cos and sin are composed of torch's elementwise
operations.

Raises TypeError for what is no tensor, ValueError for shapes that do not fit, RuntimeError for dtypes and devices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ..backends import cpu
from ..backends.cpu import embedding as kernels
from ..backends.reference import embedding as formulas
from ._op import Op
from ._route import Unsupported, describe, fall_back, functorch_active, is_dynamo_compiling, route

_tensor_rotary = cpu.tensor_rotary
_empty = cpu.empty_like


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """x with the pairs of its last dimension turned by position. See this module for formula, shapes and errors."""
    if not is_dynamo_compiling():
        found = _tensor_rotary(_empty, x, cos, sin, interleaved, False)
        if type(found) is tuple:
            return _apply_rotary(x, cos, sin, interleaved, False, found)
        if found is not None:
            return found
    _check(x, cos, sin, interleaved)
    if cos.dtype not in (x.dtype, torch.float32) or sin.dtype is not cos.dtype or x.dtype is torch.float64:
        dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        cos, sin = cos.to(dtype), sin.to(dtype)
    cos, sin = (_beside(table, x.dim()) for table in (cos, sin))
    try:
        return ROTARY(x, cos, sin, interleaved, False, where=route("rotary", x, cos, sin))
    except Unsupported as reason:
        return fall_back("rotary_embedding", reason.args[0], _in_torch, x, cos, sin, interleaved, False)


def _in_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool) -> Tensor:
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    return formulas.rotary(x, cos, sin, interleaved, transposed, dtype=dtype)


def _check(x: Any, cos: Any, sin: Any, interleaved: Any) -> None:
    op = "fastnn.rotary_embedding"
    for name, value in (("x", x), ("cos", cos), ("sin", sin)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name}: expected a Tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise RuntimeError(f"{op}: {name}: expected a floating-point dtype, got {describe(name, value)}")
        if value.device != x.device:
            raise RuntimeError(f"{op}: {name}: expected the device of x, {x.device}, got {value.device}")
    if not isinstance(interleaved, bool):
        raise TypeError(f"{op}: interleaved: expected a bool, got {type(interleaved).__name__}")
    if x.dim() < 2 or x.shape[-1] % 2:
        raise ValueError(f"{op}: x: expected (..., L, D) with an even D, got {describe('x', x)}")
    if cos.shape != sin.shape:
        raise ValueError(f"{op}: sin: expected the shape of cos, got {describe('sin', sin)} and {describe('cos', cos)}")
    size, fits = x.shape[-1], cos.dim() >= 2 and cos.shape[-1] in (x.shape[-1], x.shape[-1] // 2)
    if fits and cos.dim() == 3 and x.dim() == 4:
        fits = cos.shape[0] in (1, x.shape[0]) and cos.shape[1] in (1, x.shape[2])
    elif fits and cos.dim() == 2:
        fits = cos.shape[0] in (1, x.shape[-2])
    elif fits:
        fits = cos.dim() == x.dim() and all(a in (1, b) for a, b in zip(cos.shape[:-1], x.shape[:-1], strict=True))
    if not fits:
        raise ValueError(
            f"{op}: cos, sin: expected (L, {size}) or (L, {size // 2}), (B, L, ...) beside (B, H, L, D), or what "
            f"broadcasts to x, got {describe('cos', cos)} for {describe('x', x)}"
        )


def _beside(table: Tensor, dims: int) -> Tensor:
    """cos or sin with as many dimensions as x."""
    if table.dim() == 3 and dims == 4:
        return table.unsqueeze(1)
    return table[(None,) * (dims - table.dim())]


# ---- derivatives: linear in x, and in cos and sin together -------------------------------------------------------


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool) -> Tensor:
    args = (x, cos, sin, interleaved, transposed)
    if not is_dynamo_compiling():
        found = _tensor_rotary(_empty, *args)
        if type(found) is tuple:
            return _apply_rotary(*args, found)
        if found is not None:
            return found
    args = (x, _beside(cos, x.dim()), _beside(sin, x.dim()), interleaved, transposed)
    try:
        return ROTARY(*args)
    except Unsupported as reason:
        return fall_back("rotary_embedding_backward", reason.args[0], _in_torch, *args)


class _Rotary(Function):
    """What the short way has computed, ``found``, made part of the graph; cos and sin have no gradient there."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool, found: tuple[Tensor]
    ) -> Tensor:
        ctx.interleaved, ctx.transposed = interleaved, transposed
        ctx.save_for_backward(cos, sin)
        return found[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, ctx.interleaved, not ctx.transposed), None, None, None, None, None


# Function.apply asks for transforms, of which the short way knows that there are none.
_apply_rotary = super(Function, _Rotary).apply


def _to_table(grad: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    """The sum of a gradient for each element over all that one number of cos or sin was used for."""
    if grad.shape[-1] != table.shape[-1]:
        pairs = grad.unflatten(-1, (-1, 2) if interleaved else (2, -1))
        grad = pairs.sum(-1 if interleaved else -2)
    return grad.sum_to_size(table.shape).to(table.dtype)


def _save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> tuple[Tensor, ...]:
    x, cos, sin, ctx.interleaved, ctx.transposed = args
    # Without derivatives by cos and sin nobody needs x.
    transformed = functorch_active() or forward_ad._current_level >= 0
    return (x if transformed or cos.requires_grad or sin.requires_grad else None), cos, sin


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, cos, sin = ctx.saved_tensors
    by_x = by_cos = by_sin = None
    if ctx.needs_input_grad[0]:
        by_x = _turn(grad, cos, sin, ctx.interleaved, not ctx.transposed)
    if x is not None:
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        g, v = grad.to(wide), x.to(wide)
        if ctx.needs_input_grad[1]:
            by_cos = _to_table(g * v, cos, ctx.interleaved)
        if ctx.needs_input_grad[2]:
            product = (
                formulas.turned(g, ctx.interleaved) * v if ctx.transposed else g * formulas.turned(v, ctx.interleaved)
            )
            by_sin = _to_table(product, sin, ctx.interleaved)
    return by_x, by_cos, by_sin, None, None


def _jvp(ctx: Any, by_x: Tensor | None, by_cos: Tensor | None, by_sin: Tensor | None, *_: Any) -> Tensor:
    x, cos, sin = ctx.saved_tensors
    result = None if by_x is None else _turn(by_x, cos, sin, ctx.interleaved, ctx.transposed)
    if by_cos is not None or by_sin is not None:
        c = torch.zeros_like(cos) if by_cos is None else by_cos
        s = torch.zeros_like(sin) if by_sin is None else by_sin
        more = _turn(x, c, s, ctx.interleaved, ctx.transposed)
        result = more if result is None else result + more
    return result


def _vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    transposed: bool,
) -> tuple[Tensor, int]:
    def first(t: Tensor, dim: int | None) -> Tensor:
        return t.unsqueeze(0) if dim is None else t.movedim(dim, 0)

    x, cos, sin = (first(t, dim) for t, dim in zip((x, cos, sin), in_dims, strict=False))
    if x.shape[0] != info.batch_size:
        x = x.expand(info.batch_size, *x.shape[1:])
    if cos.shape != sin.shape:
        cos, sin = (t.expand(info.batch_size, *t.shape[1:]) for t in (cos, sin))
    return ROTARY(x, cos, sin, interleaved, transposed), 0


def _fake(x: Tensor, *_: Any) -> Tensor:
    out = torch.empty_like(x)
    return out if x.shape[-1] == 1 or out.stride(-1) == 1 else x.new_empty(x.shape)


#: x turned by cos and sin of as many dimensions; transposed: the transpose of that matrix.
ROTARY = Op(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool transposed) -> Tensor",
    kernel=kernels.rotary,
    reference=formulas.rotary,
    fake=_fake,
    save=_save,
    backward=_backward,
    vmap=_vmap,
    jvp=_jvp,
)
