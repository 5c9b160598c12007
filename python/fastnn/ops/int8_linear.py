"""int8_linear: a linear layer whose product is one of integers, with everything around it in one pass.

Formula (Jacob et al., CVPR 2018): with q = clamp(round(input / input_scale) + input_zero_point, 0, 255),

    y = activation(input_scale[m] · weight_scale[n] · (Σₖ q[m, k] weight[n, k] - input_zero_point[m] Σₖ weight[n, k]) +
    bias[n]).

Without ``input_scale`` the quantization is dynamic: each row of the input has a scale and a zero point of its own,
chosen from its finite values and 0, as ``quantize_dynamic(input, dtype=torch.uint8, axis=<all but the last>,
symmetric=False)`` does. With it, it is static: one scale and zero point for all. Sums are exact in int32, the rest is
float32 in the order of the formula, rounded once to the input's dtype, and a division by the scale is a product with
its float32 inverse. So the result does not depend on the instruction set (but for the last bits of gelu, silu, sigmoid
and tanh), on threads, or on what other rows there are. Those four are computed
in float32: gelu(x) with an error of 3e-7 |x|, the others with a relative one of 2^-20. Infinities saturate; NaN counts as 0.

Shapes: input (..., K) in float32, bfloat16 or float16; weight (N, K) int8, K at most 65793; weight_scale (N) or one
element; bias (N) in any of those dtypes; result (..., N), contiguous, of the input's dtype. Any strides.

Gradients: straight-through, as if nothing were rounded. The input's is grad @ (weight_scale · weight), 0 where a static scheme
saturates; the bias has its own; weight_scale and input_scale have none.

TypeError for what is no tensor or of another dtype; ValueError for shapes that do not go together, for an unknown
activation, for
scales that are not positive, normal and finite, and for a zero point outside of 0 to 255: in tensors on a GPU, whose values
nobody waits for, results are unspecified instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..backends import Kernels, cpu
from ..backends.cpu import int8_linear as on_cpu
from ..backends.reference import int8_linear as formulas
from ..backends.reference.quantize import RANGE
from ._library import define
from ._op import Op, sample_by_sample
from ._route import Unsupported, describe, fall_back, is_dynamo_compiling
from ._scheme import SCALES, check_number, check_numbers, parameter
from .activation import activation_backward, check_kind

kernels = Kernels("int8_linear")
_tensor_int8_linear = cpu.tensor_int8_linear
_make = on_cpu.make
_code = cpu.ACTIVATION.get

_INPUTS = (torch.float32, torch.bfloat16, torch.float16)


def int8_linear(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor | float | None = None,
    input_zero_point: Tensor | int | None = None,
    activation: str = "none",
    packed: Tensor | None = None,
) -> Tensor:
    """activation(input @ (weight_scale · weight)ᵀ + bias) by way of integers. See this module for the formula and shapes.

    ``input_scale`` without ``input_zero_point`` is symmetric: a zero point of 128. ``packed``, from :func:`pack_int8_weight`
    of this very weight, is read in its stead, and saves laying it out at each call.
    """
    if not is_dynamo_compiling():
        code = _code(activation, -1) if isinstance(activation, str) else -1
        output = _tensor_int8_linear(
            _make, input, weight, weight_scale, bias, input_scale, input_zero_point, code, packed
        )
        if output is not None:
            return output
    check_kind("int8_linear", activation)
    weight_scale, input_scale, input_zero_point = _check(
        input, weight, weight_scale, bias, input_scale, input_zero_point, packed
    )
    args = (input, weight, weight_scale, bias, input_scale, input_zero_point, activation, packed)
    try:
        return INT8_LINEAR(*args)
    except Unsupported as reason:
        return fall_back("int8_linear", reason.args[0], _Formula.apply, *args)


def pack_int8_weight(weight: Tensor) -> Tensor:
    """A weight (N, K) of :func:`int8_linear`, int8, as the kernel reads it, with the sums of its rows: 1-d, uint8.

    It does not follow later changes of the weight, and belongs to the instruction set that it was made on: where another
    one runs, the call packs the weight again.
    """
    _check_weight("pack_int8_weight", weight)
    return torch.ops.fastnn.pack_int8_weight(weight)


def _check_weight(op: str, weight: Any) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"fastnn.{op}: weight: expected a Tensor, got {type(weight).__name__}")
    if weight.dtype is not torch.int8 or weight.is_nested or weight.layout is not torch.strided:
        raise TypeError(f"fastnn.{op}: expected weight to be dense, of int8, got {describe('weight', weight)}")
    if weight.dim() != 2:
        raise ValueError(f"fastnn.{op}: expected weight (N, K), got {describe('weight', weight)}")


def _check(
    input: Any,
    weight: Any,
    weight_scale: Any,
    bias: Any,
    input_scale: Any,
    input_zero_point: Any,
    packed: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The scales and the zero point, as tensors."""
    op = "int8_linear"
    check_numbers(op, "input", input)
    if input.dtype not in _INPUTS:
        raise TypeError(f"fastnn.{op}: expected input of float32, bfloat16 or float16, got {describe('input', input)}")
    _check_weight(op, weight)
    if input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"fastnn.{op}: expected input (..., K) and weight (N, K), got {describe('input', input)}, "
            f"{describe('weight', weight)}"
        )
    n = weight.shape[0]
    one = isinstance(weight_scale, Tensor) and weight_scale.numel() == 1 and weight_scale.dim() < 2
    weight_scale = parameter(op, "weight_scale", weight_scale, () if one else (n,), input.device)
    if bias is not None:
        check_numbers(op, "bias", bias)
        if bias.dtype not in _INPUTS:
            raise TypeError(f"fastnn.{op}: expected bias of float32, bfloat16 or float16, got {describe('bias', bias)}")
        if bias.dim() != 1 or bias.shape[0] != n:
            raise ValueError(
                f"fastnn.{op}: expected bias (N), got {describe('bias', bias)} for {describe('weight', weight)}"
            )
    if input_scale is not None:
        check_number(op, "input_scale", input_scale, *SCALES)
        input_scale = parameter(op, "input_scale", input_scale, (), input.device)
        if input_zero_point is not None:
            check_number(op, "input_zero_point", input_zero_point, *RANGE["uint8"], "0 to 255")
            input_zero_point = parameter(op, "input_zero_point", input_zero_point, (), input.device, integer=True)
    elif input_zero_point is not None:
        raise ValueError(f"fastnn.{op}: input_zero_point: expected None without an input_scale, got {input_zero_point}")
    if packed is not None and (not isinstance(packed, Tensor) or packed.dtype is not torch.uint8 or packed.dim() != 1):
        raise TypeError(f"fastnn.{op}: packed: expected what pack_int8_weight gave, got {describe('packed', packed)}")
    for name, value in (("weight", weight), ("bias", bias), ("packed", packed)):
        if value is not None and value.device != input.device:
            raise ValueError(f"fastnn.{op}: {name}: expected the device of input, {input.device}, got {value.device}")
    return weight_scale, input_scale, input_zero_point


# ---- derivatives -------------------------------------------------------------------------------------------------


def _save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, ctx.activation, packed = args
    return (*tensors, packed, result)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, weight_scale, bias, input_scale, input_zero_point, packed, output = ctx.saved_tensors
    if ctx.activation != "none":
        if ctx.activation not in cpu.SAVES_OUTPUT:
            output = INT8_LINEAR(input, weight, weight_scale, bias, input_scale, input_zero_point, "none", packed)
        grad = activation_backward(ctx.activation, grad, output)
    by_input = by_bias = None
    if ctx.needs_input_grad[0]:
        dequantized = weight.to(torch.float32) * weight_scale.to(torch.float32).reshape(-1, 1)
        by_input = (grad.to(torch.float32) @ dequantized).to(input.dtype)
        if input_scale is not None:
            by_input = by_input.masked_fill(formulas.saturates(input, input_scale, input_zero_point), 0)
    if bias is not None and ctx.needs_input_grad[3]:
        by_bias = grad.to(torch.float32).flatten(0, -2).sum(0) if grad.dim() > 1 else grad
        by_bias = by_bias.to(bias.dtype)
    return by_input, None, None, by_bias, None, None, None, None


class _Formula(Function):
    """The reference, with the gradient that its rounding has not."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        result = formulas.int8_linear(*args)
        ctx.save_for_backward(*_save(ctx, args, result))
        return result

    backward = staticmethod(_backward)


def _fake(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    activation: str,
    packed: Tensor | None,
) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    if all(d is None for d in in_dims[1:]):
        return INT8_LINEAR(args[0].movedim(in_dims[0], 0), *args[1:]), 0
    return sample_by_sample(INT8_LINEAR, info, in_dims, args)


#: The layer, its weight packed or not.
INT8_LINEAR = Op(
    "int8_linear(Tensor input, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? input_scale, "
    "Tensor? input_zero_point, str activation, Tensor? packed) -> Tensor",
    kernel=kernels.int8_linear,
    reference=_Formula.apply,
    fake=_fake,
    save=_save,
    backward=_backward,
    vmap=_vmap,
)


def _no_gradient(ctx: Any, *_: Any) -> None:
    return None


define(
    "pack_int8_weight(Tensor weight) -> Tensor",
    impl=kernels.pack,
    fake=lambda weight: weight.new_empty((kernels.packed_size(weight),), dtype=torch.uint8),
    setup_context=_no_gradient,
    backward=_no_gradient,
    vmap=lambda info, in_dims, weight: (
        torch.stack([kernels.pack(w) for w in weight.unbind(in_dims[0])]),
        0,
    ),
    autocast=False,
)
