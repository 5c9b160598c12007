"""weight_only_linear: a linear layer whose weight alone is quantized, to int8, int4, uint4 or float8.

Formula: activation(input @ Wᵀ + bias), where W[n, k] = (q[n, k] - zero_point[n, g]) · scale[n, g] and g = k // group_size (one
scale a row without groups).

Shapes: input (..., K) in float32, bfloat16 or float16; weight (N, K) in int8, float8_e4m3fn or float8_e5m2, or (N, K /
2) in uint8 where ``from_dtype`` is int4 or uint4 (element 2 i in the low half of byte i); scale and zero_point (N) or
(N, K / group_size); bias (N) in any of input's dtypes; result (..., N), contiguous, of the input's dtype. Any strides.

Sums are float32, rounded once. No weight is rounded before it is multiplied where the product is one of bfloat16: q -
zero_point is exact there, and a scale multiplies the sum of its group. Elsewhere W is rounded to float32. So the error
is within γ(K) · Σ |input| (|q| + |zero_point|) scale of float32, which holds for few rows too, where the zero points'
part is taken from the sums of each group of the input. float32 obeys ``torch.get_float32_matmul_precision()`` where
there are many rows; with few it is multiplied as it is. Denormal bfloat16 numbers may count as 0.

The weight is frozen: input and bias have gradients, which are the product with W in the input's dtype, and weight,
scale and zero_point have none.

TypeError for what is no tensor or of another dtype; ValueError for shapes that do not go together and for an unknown
activation. Scales and zero points of rows must be those that :func:`fastnn.quantize` takes, too: positive, normal,
finite, and in the scheme's range. Those of groups, of which there are up to a quarter as many bytes as of the weight,
are not looked at: a product with few rows would take that much longer. :func:`fastnn.quantize` checks them, and so does
a layer of :mod:`fastnn.quant` when it is made or loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import Kernels, cpu
from ..backends.cpu.weight_only import INTEGERS
from ..backends.reference import weight_only as formulas
from ..backends.reference.quantize import FLOAT8, PACKED
from ._op import Op, sample_by_sample
from ._route import Unsupported, describe, fall_back, is_dynamo_compiling
from ._scheme import check_numbers, granularity, parameters, scale_shape, scheme
from .activation import activation_backward, check_kind
from .gemm import kernel_product
from .quantize import dequantize

_OP = "weight_only_linear"
kernels = Kernels("weight_only")
_tensor_weight_only = cpu.tensor_weight_only
_INPUTS = (torch.float32, torch.bfloat16, torch.float16)


def weight_only_linear(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int | None = None,
    from_dtype: torch.dtype | str | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(input @ ((weight - zero_point) · scale)ᵀ + bias). See this module for the formula, shapes and errors.

    ``from_dtype``, int4 or uint4, says what a packed weight holds; else it is the weight's own dtype.
    """
    if not is_dynamo_compiling():
        output = _tensor_weight_only(
            input, weight, scale, zero_point, bias, group_size, _format(from_dtype), _activation(activation)
        )
        if output is not None:
            return output
    check_kind(_OP, activation)
    scale, zero_point, group, name = _check(input, weight, scale, zero_point, bias, group_size, from_dtype)
    if name in FLOAT8:  # as bytes: a float8 tensor is no number to autograd and its like
        weight = weight.view(torch.uint8)
    args = (input, weight, scale, zero_point, bias, group, name, activation)
    try:
        return WEIGHT_ONLY_LINEAR(*args)
    except Unsupported as reason:
        return fall_back(_OP, reason.args[0], formulas.weight_only_linear, *args)


def _format(from_dtype: Any) -> int:
    """The kernels' code of int8 or four bits; -1, which they do not take, of anything else."""
    return INTEGERS.get(from_dtype, -1) if isinstance(from_dtype, (torch.dtype, str, type(None))) else -1


def _activation(activation: Any) -> int:
    return cpu.ACTIVATION.get(activation, -1) if isinstance(activation, str) else -1


def _check(
    input: Any, weight: Any, scale: Any, zero_point: Any, bias: Any, group_size: Any, from_dtype: Any
) -> tuple[Tensor, Tensor | None, int, str]:
    """The scale, the zero point, the size of a group or 0, and the name of the scheme."""
    check_numbers(_OP, "input", input)
    if input.dtype not in _INPUTS:
        raise TypeError(f"fastnn.{_OP}: expected input of float32, bfloat16 or float16, got {describe('input', input)}")
    if not isinstance(weight, Tensor):
        raise TypeError(f"fastnn.{_OP}: weight: expected a Tensor, got {type(weight).__name__}")
    name = scheme(
        _OP, weight.dtype if from_dtype is None else from_dtype, "weight" if from_dtype is None else "from_dtype"
    )
    if from_dtype is not None and name not in PACKED:
        raise ValueError(f"fastnn.{_OP}: from_dtype: expected int4, uint4 or None, got {name}")
    if from_dtype is None and name == "uint8":
        raise ValueError(f"fastnn.{_OP}: from_dtype: expected int4 or uint4 for a weight of uint8, got None")
    if from_dtype is not None and weight.dtype is not torch.uint8:
        raise TypeError(
            f"fastnn.{_OP}: expected weight of uint8, as from_dtype is {name}, got {describe('weight', weight)}"
        )
    if weight.is_nested or weight.layout is not torch.strided or weight.dim() != 2:
        raise ValueError(f"fastnn.{_OP}: expected weight (N, K), dense, got {describe('weight', weight)}")
    n, k = weight.shape[0], weight.shape[1] * (2 if name in PACKED else 1)
    if input.dim() < 1 or input.shape[-1] != k:
        raise ValueError(
            f"fastnn.{_OP}: expected input (..., K) and weight (N, K{' / 2' if name in PACKED else ''}), got "
            f"{describe('input', input)}, {describe('weight', weight)}"
        )
    axis, group = granularity(_OP, (n, k), None if group_size is not None else 0, group_size)
    scale, zero_point = parameters(_OP, scale, zero_point, name, scale_shape((n, k), axis, group), input.device)
    if bias is not None:
        check_numbers(_OP, "bias", bias)
        if bias.dtype not in _INPUTS:
            raise TypeError(
                f"fastnn.{_OP}: expected bias of float32, bfloat16 or float16, got {describe('bias', bias)}"
            )
        if bias.dim() != 1 or bias.shape[0] != n:
            raise ValueError(f"fastnn.{_OP}: expected bias (N), got {describe('bias', bias)} for N = {n}")
    for what, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.device != input.device:
            raise ValueError(f"fastnn.{_OP}: {what}: expected the device of input, {input.device}, got {value.device}")
    return scale, zero_point, group, name


# ---- derivatives -------------------------------------------------------------------------------------------------


def _save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> tuple[Tensor | None, ...]:
    input, *tensors, ctx.group, ctx.name, ctx.activation = args
    ctx.dtypes = input.dtype, None if tensors[-1] is None else tensors[-1].dtype
    # The input only where the derivative of its activation asks for what went into that.
    again = ctx.activation != "none" and ctx.activation not in cpu.SAVES_OUTPUT
    return (input if again else None, *tensors, None if again or ctx.activation == "none" else result)


def _numbers(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, group: int, name: str, dtype: torch.dtype
) -> Tensor:
    packed = name in PACKED
    weight = weight.view(getattr(torch, name)) if name in FLOAT8 else weight
    shared = {"group_size": group} if group else {"axis": 0}
    return dequantize(weight, scale, zero_point, dtype=dtype, from_dtype=name if packed else None, **shared)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, scale, zero_point, bias, saved = ctx.saved_tensors
    if ctx.activation != "none":
        if saved is None:
            saved = WEIGHT_ONLY_LINEAR(input, weight, scale, zero_point, bias, ctx.group, ctx.name, "none")
        grad = activation_backward(ctx.activation, grad, saved)
    by_input = by_bias = None
    if ctx.needs_input_grad[0]:
        numbers = _numbers(weight, scale, zero_point, ctx.group, ctx.name, grad.dtype)
        vector = grad.dim() == 1
        by_input = kernel_product(grad.unsqueeze(0) if vector else grad, numbers)
        by_input = by_input.squeeze(0) if vector else by_input
    if ctx.dtypes[1] is not None and ctx.needs_input_grad[4]:
        by_bias = grad.to(torch.float32).reshape(-1, grad.shape[-1]).sum(0).to(ctx.dtypes[1])
    return by_input, None, None, None, by_bias, None, None, None


def _fake(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    from_dtype: str,
    activation: str,
) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    if all(d is None for d in in_dims[1:]):
        return WEIGHT_ONLY_LINEAR(args[0].movedim(in_dims[0], 0), *args[1:]), 0
    return sample_by_sample(WEIGHT_ONLY_LINEAR, info, in_dims, args)


#: float8 weights are given as their bytes; ``group_size`` is 0 where a row has one scale.
WEIGHT_ONLY_LINEAR = Op(
    "weight_only_linear(Tensor input, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, int group_size, "
    "str from_dtype, str activation) -> Tensor",
    kernel=kernels.weight_only_linear,
    reference=formulas.weight_only_linear,
    fake=_fake,
    save=_save,
    backward=_backward,
    vmap=_vmap,
)
