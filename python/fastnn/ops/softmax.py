"""softmax and log_softmax along one dimension.

Formulas, with m = max x and s = Σ exp(x - m) along ``dim``: softmax(x) = exp(x - m) / s, log_softmax(x) = x - m - log s;
their gradients y (g - Σ g y) and g - exp(y) Σ g (Goodfellow, Bengio and Courville, Deep Learning, 2016, 6.2.2.3).

The input is float32, float64, bfloat16 or float16 of any shape and strides; the result is contiguous, as torch's. exp is
computed in float32 to 0.9 ulp (in float64 for float64); sums are made in blocks, which are summed in float64, in an order
that depends on the size of ``dim`` alone; 16-bit results are rounded once. A row with a NaN or +∞, or with -∞ alone, is NaN.
Other dtypes go to torch, as do 0-dimensional inputs. Bad input raises what torch raises: IndexError for a dimension that
does not exist, RuntimeError for dtypes, TypeError for what is no tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ..backends import Kernels, cpu
from ..backends.reference import softmax as formulas
from ._op import Op
from ._out import write_out
from ._route import (
    Unsupported,
    ask_torch,
    fall_back,
    is_dynamo_compiling,
    resolve,
    route,
)

F = torch.nn.functional

_kernels = Kernels("softmax")

_tensor_softmax = cpu.tensor_softmax
_tensor_softmax_backward = cpu.tensor_softmax_backward


# ---- the public functions ----------------------------------------------------------------------------------------


def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """As :func:`torch.nn.functional.softmax`, and as :func:`torch.softmax` with ``out``.

    Without ``dim`` it is the dimension that torch takes, with torch's warning. ``dtype``: what the input is cast to first.
    """
    return _apply("softmax", torch.softmax, input, dim, _stacklevel, dtype, out, False)


def log_softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """As :func:`torch.nn.functional.log_softmax`, and as :func:`torch.log_softmax` with ``out``; see softmax."""
    return _apply("log_softmax", torch.log_softmax, input, dim, _stacklevel, dtype, out, True)


def softmin(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """softmax(-input), as :func:`torch.nn.functional.softmin`."""
    if not isinstance(input, Tensor):
        raise TypeError(f"fastnn.softmin: input: expected a Tensor, got {type(input).__name__}")
    if dim is None:
        dim = F._get_softmax_dim("softmin", input.dim(), _stacklevel)
    return softmax(-input, dim, dtype=dtype)


def _apply(
    op: str,
    torch_function: Callable[..., Tensor],
    input: Tensor,
    dim: int | None,
    stacklevel: int,
    dtype: torch.dtype | None,
    out: Tensor | None,
    log: bool,
) -> Tensor:
    if dtype is None and out is None and not is_dynamo_compiling():
        found = _tensor_softmax(input, dim, log)
        if type(found) is tuple:
            return _apply_softmax(input, found, dim, log)
        if found is not None:
            return found
    if dim is None and isinstance(input, Tensor):
        dim = F._get_softmax_dim(op, input.dim(), stacklevel + 1)
    try:
        x = _cast(input, dtype)
        d = _check_dim(x, dim)
        if x.numel() == 0 or x.dim() == 0:
            reason = "an input without elements" if x.dim() else "an input without dimensions"
            return ask_torch(op, reason, _call, torch_function, input, dim, dtype, out)
        where = route("softmax", x)
        if out is None:
            return SOFTMAX(x, d, log, where=where)
        return write_out(
            out,
            where,
            x.shape,
            x.dtype,
            (x,),
            lambda to: _kernels.softmax(resolve(x), d, log, to),
            lambda: SOFTMAX(x, d, log, where=where),
            in_place_of=x,
        )
    except Unsupported as reason:
        return fall_back(op, reason.args[0], _call, torch_function, input, dim, dtype, out)


def _call(torch_function: Callable[..., Tensor], input: Any, dim: Any, dtype: Any, out: Any) -> Tensor:
    if out is None:
        return torch_function(input, dim, dtype=dtype)
    return torch_function(input, dim, dtype=dtype, out=out)


def _cast(input: Any, dtype: Any) -> Tensor:
    if not isinstance(input, Tensor):
        raise Unsupported(f"input: expected a Tensor, got {type(input).__name__}")
    if input.is_nested or input.layout is not torch.strided:
        raise Unsupported("input: expected a dense tensor")
    if dtype is None or input.dtype is dtype:
        return input
    if not isinstance(dtype, torch.dtype) or dtype not in cpu.FLOAT:
        raise Unsupported(f"dtype: expected a floating-point type, got {dtype}")
    return input.to(dtype)


def _check_dim(x: Tensor, dim: Any) -> int:
    """Counted from 0."""
    if isinstance(dim, bool) or not isinstance(dim, (int, torch.SymInt)):
        raise Unsupported(f"dim: expected an integer, got {type(dim).__name__}")
    dims = max(x.dim(), 1)
    if not -dims <= dim < dims:
        raise Unsupported(f"dim: expected one of {x.dim()} dimensions, got {dim}")
    return dim % dims


# ---- derivatives -------------------------------------------------------------------------------------------------


class _Softmax(Function):
    """What the short way has computed, ``found``, made part of the graph."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, found: tuple[Tensor], dim: int, log: bool) -> Tensor:
        (out,) = found
        ctx.dim, ctx.log = dim % input.dim(), log
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return *_backward(ctx, grad), None


# Function.apply asks for transforms, of which the short way knows that there are none.
_apply_softmax = super(Function, _Softmax).apply


def _save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> tuple[Tensor, ...]:
    _, ctx.dim, ctx.log = args
    return (result,)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (out,) = ctx.saved_tensors
    return _by_input(grad, out, ctx.dim, ctx.log), None, None


def _by_input(grad: Tensor, out: Tensor, dim: int, log: bool) -> Tensor:
    if not is_dynamo_compiling():
        found = _tensor_softmax_backward(grad, out, dim, log)
        if found is not None:
            return found
    if forward_ad._current_level >= 0:
        # Forward mode over reverse mode: torch knows how to differentiate the formula.
        return formulas.softmax_backward(grad, out, dim, log, dtype=out.dtype)
    try:
        return SOFTMAX_BACKWARD(grad, out, dim, log)
    except Unsupported as reason:
        formula = formulas.softmax_backward
        return fall_back("softmax_backward", reason.args[0], formula, grad, out, dim, log, dtype=out.dtype)


def _along(out: Tensor, tangent: Tensor, dim: int, log: bool) -> Tensor:
    """The derivative in the direction ``tangent``, from the result ``out``."""
    if log:
        return tangent - (out.exp() * tangent).sum(dim, keepdim=True)
    return out * (tangent - (out * tangent).sum(dim, keepdim=True))


def _jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    (out,) = ctx.saved_tensors
    return _along(out, tangent, ctx.dim, ctx.log)


def _save_backward(ctx: Any, args: tuple[Any, ...], result: Tensor) -> tuple[Tensor, ...]:
    grad, saved, ctx.dim, ctx.log = args
    return grad, saved


def _backward_twice(ctx: Any, direction: Tensor) -> tuple[Any, ...]:
    """By grad, the transposed derivative of softmax: y (v - Σ y v), of its logarithm v - Σ exp(y) v. By the saved y:
    v (g - Σ g y) - g Σ v y, and -v exp(y) Σ g."""
    grad, saved = ctx.saved_tensors
    by_grad = _along(saved, direction, ctx.dim, ctx.log)
    if ctx.log:
        by_saved = -direction * saved.exp() * grad.sum(ctx.dim, keepdim=True)
    else:
        sums = (grad * saved).sum(ctx.dim, keepdim=True)
        by_saved = direction * (grad - sums) - grad * (direction * saved).sum(ctx.dim, keepdim=True)
    return by_grad, by_saved, None, None


# ---- vmap: one dimension more ------------------------------------------------------------------------------------


def _vmap(info: Any, in_dims: tuple[Any, ...], input: Tensor, dim: int, log: bool) -> tuple[Tensor, int]:
    return SOFTMAX(input.movedim(in_dims[0], 0), dim + 1, log), 0


def _vmap_backward(
    info: Any, in_dims: tuple[Any, ...], grad: Tensor, saved: Tensor, dim: int, log: bool
) -> tuple[Tensor, int]:
    sides = []
    for tensor, at in zip((grad, saved), in_dims, strict=False):
        sides.append(tensor.expand(info.batch_size, *tensor.shape) if at is None else tensor.movedim(at, 0))
    return SOFTMAX_BACKWARD(*sides, dim + 1, log), 0


# ---- the ops -----------------------------------------------------------------------------------------------------

SOFTMAX = Op(
    "softmax(Tensor input, int dim, bool log) -> Tensor",
    kernel=_kernels.softmax,
    reference=formulas.softmax,
    fake=lambda input, dim, log: input.new_empty(input.shape),
    save=_save,
    backward=_backward,
    jvp=_jvp,
    vmap=_vmap,
)

SOFTMAX_BACKWARD = Op(
    "softmax_backward(Tensor grad, Tensor saved, int dim, bool log) -> Tensor",
    kernel=_kernels.softmax_backward,
    reference=formulas.softmax_backward,
    fake=lambda grad, saved, dim, log: saved.new_empty(saved.shape),
    save=_save_backward,
    backward=_backward_twice,
    vmap=_vmap_backward,
)
