"""Layer normalization (Ba, Kiros and Hinton, arXiv:1607.06450) and rms normalization (Zhang and Sennrich,
arXiv:1910.07467).

Formulas, over the dimensions of normalized_shape, which are the last of input: (input - mean) / sqrt(var + eps) * weight +
bias with the mean and the biased variance of each row; and input / sqrt(mean(input²) + eps) * weight. Shapes: input
(..., *normalized_shape); weight and bias (*normalized_shape).

input in float32, float64, bfloat16 or float16, any strides; weight and bias in its dtype, or all in float32 beside a 16-bit
input (rms norm of these is torch's before torch 2.8, which made float32 of them). The result is contiguous, as torch's; but
that of rms norm is channels-last where its input is, and laid out as its input up to torch 2.8. A row's sums are in
float32, in short chains that are added up in float64 (float64 for float64), of deviations from its mean; the gradients of
weight and bias are sums over blocks of rows in float32, combined in float64 in an order that depends on the shape alone.
torch.autocast changes nothing here, as in torch on a CPU. Other dtypes and layouts go to torch. Bad input raises what torch
raises: RuntimeError for wrong sizes, dtypes and devices; TypeError for what is no tensor or number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ..backends import Kernels, cpu
from ..backends.cpu import layer_norm as kernels
from ..backends.reference import layer_norm as formulas
from ._op import Op
from ._route import Unsupported, ask_torch, describe, fall_back, is_dynamo_compiling, route

_torch_layer_norm = torch.nn.functional.layer_norm
_torch_rms_norm = torch.nn.functional.rms_norm
_tensor_row_norm = cpu.tensor_row_norm
_tensor_row_norm_backward = cpu.tensor_row_norm_backward
_empty = kernels.empty_contiguous
_kernels = Kernels("layer_norm")


def _default_eps(dtype: torch.dtype) -> float:
    """rms norm's where none is given: that of dtype, or of float32 where this torch computes 16 bits in it."""
    eps = torch.finfo(dtype).eps
    hidden = dtype in cpu.HALF and _torch_rms_norm(torch.ones(1, dtype=dtype, device="cpu"), (1,)).item() == 1
    return torch.finfo(torch.float32).eps if hidden else eps


def _promotes() -> bool:
    """Whether rms norm of 16 bits with a weight in float32 gives float32, as where it is a chain of operations."""
    ones = torch.ones(1, device="cpu")
    return kernels.RMS_NORM_IS_A_CHAIN and _torch_rms_norm(ones.bfloat16(), (1,), ones).dtype is torch.float32


_PROMOTES = _promotes()
_EPS = {dtype: _default_eps(dtype) for dtype in cpu.FLOAT}
_EPS_BY_CODE = tuple(_EPS.values())


# ---- the public functions ----------------------------------------------------------------------------------------


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """As :func:`torch.nn.functional.layer_norm`. See this module for shapes, dtypes and errors."""
    if not is_dynamo_compiling():
        found = _tensor_row_norm(_empty, input, normalized_shape, weight, bias, eps, True)
        if type(found) is tuple:
            return _apply_row_norm(input, weight, bias, found, len(normalized_shape), eps, True)
        if found is not None:
            return found
    return _run("layer_norm", input, normalized_shape, weight, bias, eps, True)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """As :func:`torch.nn.functional.rms_norm`; without ``eps`` that of the dtype which is computed in.

    See this module for shapes, dtypes and errors.
    """
    if not is_dynamo_compiling():
        given = _EPS_BY_CODE if eps is None else eps
        found = _tensor_row_norm(_empty, input, normalized_shape, weight, None, given, False)
        if type(found) is tuple:
            eps = _EPS[input.dtype] if eps is None else eps
            return _apply_row_norm(input, weight, None, found, len(normalized_shape), eps, False)
        if found is not None:
            return found
    return _run("rms_norm", input, normalized_shape, weight, None, eps, False)


def _run(
    op: str,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    centered: bool,
) -> Tensor:
    everything = (input, normalized_shape, weight, bias, eps, centered)
    try:
        _check(*everything)
        if input.numel() == 0:
            return ask_torch(op, "an input without elements", _in_torch, *everything)
        where = route(op, input, weight, bias)
        eps = _EPS[input.dtype] if eps is None else float(eps)
        return ROW_NORM(input, len(normalized_shape), weight, bias, eps, centered, where=where)
    except Unsupported as reason:
        return fall_back(op, reason.args[0], _in_torch, *everything)


def _in_torch(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    centered: bool,
) -> Tensor:
    if centered:
        return _torch_layer_norm(input, normalized_shape, weight, bias, eps)
    return _torch_rms_norm(input, normalized_shape, weight, eps)


def _check(input: Any, normalized_shape: Any, weight: Any, bias: Any, eps: Any, centered: bool) -> None:
    for name, value in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor) and (value is not None or name == "input"):
            raise Unsupported(f"{name}: expected a Tensor, got {type(value).__name__}")
        if value is not None and value.is_nested:
            raise Unsupported(f"{name}: a nested tensor")
    if not isinstance(normalized_shape, (tuple, list)):
        raise Unsupported(f"normalized_shape: expected sizes, got {type(normalized_shape).__name__}")
    if (isinstance(eps, bool) or not isinstance(eps, (int, float))) and (centered or eps is not None):
        raise Unsupported(f"eps: expected a float, got {type(eps).__name__}")
    shape = tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise Unsupported(f"normalized_shape: expected the last sizes of {describe('input', input)}, got {shape}")
    if input.dtype not in cpu.FLOAT:
        raise Unsupported(f"input: dtype {str(input.dtype).removeprefix('torch.')}")
    dtype = input.dtype
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if tuple(value.shape) != shape:
            raise Unsupported(f"{name}: expected normalized_shape, {shape}, got {describe(name, value)}")
        if value.device != input.device:
            raise Unsupported(f"{name}: expected the device of input, {input.device}, got {value.device}")
        if value.dtype is not dtype:
            first = name == "weight" or weight is None
            if not first or value.dtype is not torch.float32 or input.dtype not in cpu.HALF:
                raise Unsupported(f"{name}: expected dtype {dtype}, got {value.dtype} for {describe('input', input)}")
            if _PROMOTES and not centered:
                raise Unsupported(f"{name}: {value.dtype} beside {input.dtype}, of which this torch makes float32")
            dtype = torch.float32


# ---- derivatives -------------------------------------------------------------------------------------------------


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What derivatives in plain torch are computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _rows(ctx: Any, input: Tensor) -> formulas.NormalizedRows:
    return formulas.NormalizedRows(input, ctx.dims, ctx.eps, ctx.centered, _wide(input.dtype))


def _save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> tuple[Tensor | None, ...]:
    input, ctx.dims, weight, bias, ctx.eps, ctx.centered = args
    ctx.bias_dtype = None if bias is None else bias.dtype
    return input, weight


class _RowNorm(Function):
    """What the short way has computed, ``found``, made part of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        found: tuple[Tensor],
        dims: int,
        eps: float,
        centered: bool,
    ) -> Tensor:
        ctx.dims, ctx.eps, ctx.centered = dims, eps, centered
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(input, weight)
        return found[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        by_input, _, by_weight, by_bias, _, _ = _backward(ctx, grad)
        return by_input, by_weight, by_bias, None, None, None, None


# Function.apply asks for transforms, of which the short way knows that there are none.
_apply_row_norm = super(Function, _RowNorm).apply


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, weight = ctx.saved_tensors
    bias = ctx.bias_dtype is not None
    if not is_dynamo_compiling():
        found = _tensor_row_norm_backward(_empty, grad, input, ctx.dims, weight, ctx.eps, ctx.centered, bias)
        if found is not None:
            by_input, by_weight, by_bias = found
            return by_input, None, by_weight, by_bias, None, None
    args = (grad, input, ctx.dims, weight, ctx.eps, ctx.centered, bias)
    if forward_ad._current_level >= 0:
        # Forward mode over reverse mode: torch knows how to differentiate the formula.
        found = formulas.row_norm_backward(*args, dtype=_wide(input.dtype))
    else:
        try:
            found = ROW_NORM_BACKWARD(*args)
        except Unsupported as reason:
            found = fall_back(
                "row_norm_backward",
                reason.args[0],
                lambda: formulas.row_norm_backward(*args, dtype=_wide(input.dtype)),
            )
    by_input, by_weight, by_bias = found
    return (
        by_input,
        None,
        None if weight is None else by_weight.to(weight.dtype),
        by_bias.to(ctx.bias_dtype) if bias else None,
        None,
        None,
    )


def _jvp(ctx: Any, *tangents: Any) -> Tensor:
    by_input, _, by_weight, by_bias, *_ = tangents
    input, weight = ctx.saved_tensors
    rows = _rows(ctx, input)
    result = torch.zeros_like(rows.value)
    if by_input is not None:
        along = rows.derivative(by_input.to(rows.dtype))
        result = result + (along if weight is None else along * weight.to(rows.dtype))
    if by_weight is not None:
        result = result + rows.value * by_weight.to(rows.dtype)
    if by_bias is not None:
        result = result + by_bias.to(rows.dtype)
    return result.to(input.dtype)


def _save_backward(ctx: Any, args: tuple[Any, ...], result: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    grad, input, ctx.dims, weight, ctx.eps, ctx.centered, ctx.bias = args
    return grad, input, weight


def _backward_twice(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """The gradients by grad, input and weight of a sum of all gradients, each times one of ``grads``.

    With D = the derivative of x^ (symmetric): grad_input = D (weight * grad), grad_weight = sum(grad x^), grad_bias =
    sum(grad), the sums over all rows.
    """
    grad, input, weight = ctx.saved_tensors
    rows = _rows(ctx, input)
    of_input, of_weight, of_bias = grads
    g = grad.to(rows.dtype)
    by_grad, by_input, by_weight = torch.zeros_like(g), torch.zeros_like(g), None
    if of_input is not None:
        a = of_input.to(rows.dtype)
        scale = 1.0 if weight is None else weight.to(rows.dtype)
        forth = rows.derivative(a)
        by_grad = by_grad + scale * forth
        by_input = by_input + rows.second_derivative(a, scale * g)
        by_weight = rows.over_rows(g * forth)
    if of_weight is not None and weight is not None:
        p = of_weight.to(rows.dtype)
        by_grad = by_grad + p * rows.value
        by_input = by_input + rows.derivative(p * g)
    if of_bias is not None and ctx.bias:
        by_grad = by_grad + of_bias.to(rows.dtype)
    return (
        by_grad.to(grad.dtype),
        by_input.to(input.dtype),
        None,
        None if weight is None or by_weight is None else by_weight.to(weight.dtype),
        *[None] * 3,
    )


# ---- vmap ----------------------------------------------------------------------------------------------------------


def _front(x: Tensor | None, dim: int | None) -> Tensor | None:
    return x if x is None or dim is None else x.movedim(dim, 0)


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """What is mapped over becomes more rows; a weight that is mapped over itself goes behind the kernel."""
    input, dims, weight, bias, eps, centered = args
    input = _front(input, in_dims[0])
    if in_dims[2] is None and in_dims[3] is None:
        return ROW_NORM(input, dims, weight, bias, eps, centered), 0
    if in_dims[0] is None:
        input = input.expand(info.batch_size, *input.shape)
    wide = _wide(input.dtype)

    def mapped(x: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return x.to(wide)
        x = x.movedim(dim, 0).to(wide)
        return x.reshape(x.shape[0], *[1] * (input.dim() - 1 - dims), *x.shape[1:])

    result = ROW_NORM(input.to(wide), dims, None, None, eps, centered)
    if weight is not None:
        result = result * mapped(weight, in_dims[2])
    if bias is not None:
        result = result + mapped(bias, in_dims[3])
    return result.to(input.dtype), 0


def _vmap_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """One call an item: each has sums of its own."""
    grad, input, dims, weight, *rest = args
    items = zip(
        *(
            [x if dim is None else x.select(dim, i) for i in range(info.batch_size)]
            for x, dim in ((grad, in_dims[0]), (input, in_dims[1]), (weight, in_dims[3]))
        ),
        strict=True,
    )
    found = [ROW_NORM_BACKWARD(g, x, dims, w, *rest) for g, x, w in items]
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True)), (0, 0, 0)


# ---- the ops -----------------------------------------------------------------------------------------------------


def _empty_result(input: Tensor, centered: bool) -> Tensor:
    if kernels.is_contiguous_result(input, centered):
        return torch.empty_like(input, memory_format=torch.contiguous_format)
    return torch.empty_like(input)


def _fake(input: Tensor, dims: int, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool) -> Tensor:
    return _empty_result(input, centered)


def _fake_backward(
    grad: Tensor, input: Tensor, dims: int, weight: Tensor | None, eps: float, centered: bool, bias: bool
) -> tuple[Tensor, ...]:
    shape = input.shape[input.dim() - dims :]
    by_weight = input.new_empty(shape if weight is not None else (0,), dtype=torch.float64)
    by_bias = input.new_empty(shape if bias else (0,), dtype=torch.float64)
    return _empty_result(input, centered), by_weight, by_bias


ROW_NORM = Op(
    "row_norm(Tensor input, int dims, Tensor? weight, Tensor? bias, float eps, bool centered) -> Tensor",
    kernel=_kernels.row_norm,
    reference=formulas.row_norm,
    fake=_fake,
    save=_save,
    backward=_backward,
    vmap=_vmap,
    jvp=_jvp,
)

#: The gradients of input, and of weight and bias in float64; these are empty where there is none.
ROW_NORM_BACKWARD = Op(
    "row_norm_backward(Tensor grad, Tensor input, int dims, Tensor? weight, float eps, bool centered, bool bias) "
    "-> (Tensor, Tensor, Tensor)",
    kernel=_kernels.row_norm_backward,
    reference=formulas.row_norm_backward,
    fake=_fake_backward,
    save=_save_backward,
    backward=_backward_twice,
    vmap=_vmap_backward,
    differentiable=3,
)
