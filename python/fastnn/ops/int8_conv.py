"""Convolution of quantized images with quantized filters, in one pass with what follows it.

Formula (Jacob et al., CVPR 2018, section 2.2, with an addition of residuals), of an input q_x with one scale s_x and zero
point z_x, filters q_w with a scale each (or one for all), s_w, and no zero point::

    sum[n, m, o] = Σ_{c,t} q_w[m, c, t] · (q_x[n, c, o·stride − padding + t·dilation] − z_x)      exact, in int32
    v = float32(sum) · (s_x · s_w[m] · r) + bias[m] · r + float32(q_r − z_r) · (s_r · r),          r = 1 / s_y

in float32, each step rounded, with q_x = z_x beyond the bounds of the input, whose zeros the padding are ("same" has
one more at the end where their number is odd, as in torch). relu keeps v at
0 or above, relu6 below 6 · r as well. The result is v, rounded to its dtype, where that is float32 or bfloat16 (s_y is 1);
or, in uint8 or int8, clamp(round half to even(v) + z_y), a NaN (of a bias) becoming z_y. Sums of more than 65793 products
might not fit: ValueError.

The same bits on every instruction set, for any number of threads and any strides. The result is laid out with the channels
as neighbours; inputs that are laid out so, with a multiple of four channels (64 where there is AMX), are read where
they lie. No
gradients: see :func:`fastnn.fake_quantize` for training.

Raises TypeError for what is no tensor or of another dtype, ValueError for shapes, numbers, scales and zero points; of a GPU's
tensors the values of scales and zero points are not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import Kernels
from ..backends._tensors import channels_last_strides
from ..backends.reference import int8_conv as formulas
from ._op import Op, sample_by_sample
from ._route import Unsupported, describe, fall_back
from ._scheme import check_numbers, parameters, scheme

kernels = Kernels("int8_conv")

_Numbers = int | Sequence[int]

_ACTIVATIONS = ("none", "relu", "relu6")
_RESULTS = (torch.float32, torch.bfloat16, torch.uint8, torch.int8)


def int8_conv2d(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor | float,
    bias: Tensor | None = None,
    stride: _Numbers = 1,
    padding: _Numbers | str = 0,
    dilation: _Numbers = 1,
    groups: int = 1,
    *,
    input_scale: Tensor | float,
    input_zero_point: Tensor | int = 0,
    output_scale: Tensor | float | None = None,
    output_zero_point: Tensor | int = 0,
    dtype: torch.dtype | str = torch.float32,
    activation: str = "none",
    residual: Tensor | None = None,
    residual_scale: Tensor | float | None = None,
    residual_zero_point: Tensor | int = 0,
) -> Tensor:
    """activation(conv2d(input, weight) + bias + residual) of quantized tensors; see this module for the formula.

    Args:
        input: (N, C, H, W) of uint8 or int8.
        weight: (M, C / groups, Kh, Kw) of int8, symmetric.
        weight_scale: (M) or one number.
        bias: (M), of a floating-point dtype.
        stride, padding, dilation, groups: as :func:`torch.nn.functional.conv2d` has them; "same" is for a stride of 1.
        input_scale, input_zero_point: one number each.
        output_scale, output_zero_point: one number each, where ``dtype`` is uint8 or int8; else they must be left out.
        dtype: of the result (N, M, Ho, Wo): float32, bfloat16, uint8 or int8.
        activation: "none", "relu" or "relu6".
        residual: (N, M, Ho, Wo) of uint8 or int8, with one ``residual_scale`` and ``residual_zero_point``.
    """
    return _conv(
        *("int8_conv2d", 2, input, weight, weight_scale, bias, stride, padding, dilation, groups),
        *(input_scale, input_zero_point, output_scale, output_zero_point, dtype, activation),
        *(residual, residual_scale, residual_zero_point),
    )


def int8_conv1d(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor | float,
    bias: Tensor | None = None,
    stride: _Numbers = 1,
    padding: _Numbers | str = 0,
    dilation: _Numbers = 1,
    groups: int = 1,
    *,
    input_scale: Tensor | float,
    input_zero_point: Tensor | int = 0,
    output_scale: Tensor | float | None = None,
    output_zero_point: Tensor | int = 0,
    dtype: torch.dtype | str = torch.float32,
    activation: str = "none",
    residual: Tensor | None = None,
    residual_scale: Tensor | float | None = None,
    residual_zero_point: Tensor | int = 0,
) -> Tensor:
    """As :func:`int8_conv2d`, in one dimension: input (N, C, L), weight (M, C / groups, K), result (N, M, Lo)."""
    return _conv(
        *("int8_conv1d", 1, input, weight, weight_scale, bias, stride, padding, dilation, groups),
        *(input_scale, input_zero_point, output_scale, output_zero_point, dtype, activation),
        *(residual, residual_scale, residual_zero_point),
    )


def int8_conv3d(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor | float,
    bias: Tensor | None = None,
    stride: _Numbers = 1,
    padding: _Numbers | str = 0,
    dilation: _Numbers = 1,
    groups: int = 1,
    *,
    input_scale: Tensor | float,
    input_zero_point: Tensor | int = 0,
    output_scale: Tensor | float | None = None,
    output_zero_point: Tensor | int = 0,
    dtype: torch.dtype | str = torch.float32,
    activation: str = "none",
    residual: Tensor | None = None,
    residual_scale: Tensor | float | None = None,
    residual_zero_point: Tensor | int = 0,
) -> Tensor:
    """As :func:`int8_conv2d`, in three dimensions: input (N, C, D, H, W), weight (M, C / groups, Kd, Kh, Kw), result
    (N, M, Do, Ho, Wo)."""
    return _conv(
        *("int8_conv3d", 3, input, weight, weight_scale, bias, stride, padding, dilation, groups),
        *(input_scale, input_zero_point, output_scale, output_zero_point, dtype, activation),
        *(residual, residual_scale, residual_zero_point),
    )


def _conv(
    op: str,
    rank: int,
    input: Any,
    weight: Any,
    weight_scale: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    input_scale: Any,
    input_zero_point: Any,
    output_scale: Any,
    output_zero_point: Any,
    dtype: Any,
    activation: Any,
    residual: Any,
    residual_scale: Any,
    residual_zero_point: Any,
) -> Tensor:
    _check_images(op, "input", input, (torch.uint8, torch.int8), rank)
    _check_images(op, "weight", weight, (torch.int8,), rank)
    device = input.device
    stride, dilation = (
        _numbers(op, name, value, rank, 1) for name, value in (("stride", stride), ("dilation", dilation))
    )
    if isinstance(padding, str):
        padding = named_padding(op, padding, weight.shape[2:], stride, dilation)
    else:
        padding = _numbers(op, "padding", padding, rank, 0)
    options = [stride, padding, dilation]
    size = _check_sizes(op, input, weight, *options, groups)
    filters = weight.shape[0]
    one = not isinstance(weight_scale, Tensor) or weight_scale.numel() == 1
    weight_scale, _ = _named(op, "weight", weight_scale, None, "int8", () if one else (filters,), device)
    input_scale, input_zero_point = _named(
        op, "input", input_scale, input_zero_point, scheme(op, input.dtype), (), device
    )
    if bias is not None:
        check_numbers(op, "bias", bias)
        if bias.shape != (filters,) or bias.device != device:
            raise ValueError(f"fastnn.{op}: bias: expected ({filters},) on {device}, got {describe('bias', bias)}")
        bias = bias.detach().to(torch.float32)
    result = dtype if isinstance(dtype, torch.dtype) else getattr(torch, scheme(op, dtype))
    output_scale, output_zero_point = _check_output(op, dtype, result, output_scale, output_zero_point, device)
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise ValueError(f"fastnn.{op}: activation: expected one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    if residual is None:
        residual_scale = residual_zero_point = None
    else:
        shape = (input.shape[0], filters, *size)
        residual_scale, residual_zero_point = _check_residual(
            op, residual, residual_scale, residual_zero_point, shape, device
        )
    arguments = (
        *(input, weight, weight_scale, bias, input_scale, input_zero_point, output_scale, output_zero_point),
        *(residual, residual_scale, residual_zero_point, *options, groups, activation, result),
    )
    try:
        return INT8_CONV(*arguments)
    except Unsupported as reason:
        return fall_back(op, reason.args[0], formulas.int8_conv, *arguments)


# ---- checks ------------------------------------------------------------------------------------------------------


def _check_images(op: str, name: str, value: Any, dtypes: tuple[torch.dtype, ...], rank: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"fastnn.{op}: {name}: expected a Tensor, got {type(value).__name__}")
    if value.is_nested or value.layout is not torch.strided or value.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"fastnn.{op}: expected {name} to be dense, of {names}, got {describe(name, value)}")
    if value.dim() != rank + 2:
        raise ValueError(f"fastnn.{op}: expected {name} of {rank + 2} dimensions, got {describe(name, value)}")


def _numbers(op: str, name: str, value: Any, rank: int, least: int) -> list[int]:
    """One number for all spatial dimensions, or one for each."""
    values = list(value) if isinstance(value, (tuple, list, torch.Size)) else [value]
    if len(values) == 1:
        values *= rank
    if len(values) != rank or any(isinstance(v, bool) or not isinstance(v, (int, torch.SymInt)) for v in values):
        raise ValueError(f"fastnn.{op}: {name}: expected an integer or {rank} of them, got {value!r}")
    if any(v < least for v in values):
        raise ValueError(f"fastnn.{op}: {name}: expected numbers of at least {least}, got {value!r}")
    return values


def named_padding(
    op: str, padding: str, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """The numbers that "same" or "valid" stands for: one for each dimension, or those of the beginnings and then of the
    ends."""
    if padding not in ("same", "valid") or (padding == "same" and any(s != 1 for s in stride)):
        raise ValueError(
            f"fastnn.{op}: padding: expected numbers, 'valid', or 'same' with a stride of 1, got {padding!r} with a stride of"
            f" {tuple(stride)}"
        )
    total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    begin, end = [n // 2 for n in total], [n - n // 2 for n in total]
    return begin if begin == end else begin + end


def _check_sizes(
    op: str, input: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: Any
) -> list[int]:
    """The sizes of the result."""
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"fastnn.{op}: groups: expected a divisor of {weight.shape[0]} filters, got {groups!r}")
    if input.shape[1] != weight.shape[1] * groups or 0 in weight.shape:
        raise ValueError(
            f"fastnn.{op}: weight: expected filters for {input.shape[1]} channels in {groups} groups, got "
            f"{describe('weight', weight)}"
        )
    if input.device != weight.device:
        raise ValueError(f"fastnn.{op}: weight: expected the device {input.device}, got {weight.device}")
    depth = weight[0].numel()
    if depth > 2**31 // (255 * 128):
        raise ValueError(f"fastnn.{op}: weight: expected at most 65793 elements a filter, got {depth}")
    size = formulas.output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    if any(n < 1 for n in size):
        raise ValueError(
            f"fastnn.{op}: input: expected the padded input to be no smaller than the filter, got "
            f"{describe('input', input)} for {describe('weight', weight)}"
        )
    return size


def _check_output(
    op: str, dtype: Any, result: torch.dtype, scale: Any, zero_point: Any, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """The scale and the zero point of a result in integers, none of one in floats."""
    if result not in _RESULTS:
        raise ValueError(f"fastnn.{op}: dtype: expected float32, bfloat16, uint8 or int8, got {dtype}")
    if result.is_floating_point:
        if scale is not None:
            raise ValueError(f"fastnn.{op}: output_scale: expected none where the result is {result}")
        if not isinstance(zero_point, int) or zero_point != 0:
            raise ValueError(f"fastnn.{op}: output_zero_point: expected none where the result is {result}")
        return None, None
    if scale is None:
        raise ValueError(f"fastnn.{op}: output_scale: expected a number where the result is {result}, got None")
    return _named(op, "output", scale, zero_point, scheme(op, result), (), device)


def _check_residual(
    op: str, residual: Any, scale: Any, zero_point: Any, shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The residual's scale and zero point."""
    _check_images(op, "residual", residual, (torch.uint8, torch.int8), len(shape) - 2)
    if tuple(residual.shape) != shape or residual.device != device:
        raise ValueError(
            f"fastnn.{op}: residual: expected ({', '.join(map(str, shape))}) on {device}, got {describe('residual', residual)}"
        )
    if scale is None:
        raise ValueError(f"fastnn.{op}: residual_scale: expected a number where there is a residual, got None")
    return _named(op, "residual", scale, zero_point, scheme(op, residual.dtype), (), device)


def _named(
    op: str, of: str, scale: Any, zero_point: Any, dtype: str, shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """parameters(), which speaks of a scale and a zero point, of those of one tensor of several."""
    if zero_point is None and of != "weight":
        raise TypeError(f"fastnn.{op}: {of}_zero_point: expected a Tensor or an int, got None")
    try:
        scale, zero_point = parameters(op, scale, zero_point, dtype, shape, device)
    except (TypeError, ValueError) as error:
        message = str(error)
        for name in ("scale", "zero_point"):
            message = message.replace(f" {name}: ", f" {of}_{name}: ").replace(
                f"expected {name} ", f"expected {of}_{name} "
            )
        raise type(error)(message) from None
    scale = scale.to(torch.float32)
    return (scale if shape else scale.reshape(())), None if zero_point is None else zero_point.to(torch.int32).reshape(
        ()
    )


# ---- the op ------------------------------------------------------------------------------------------------------


def _fake(input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    *_, stride, padding, dilation, _, _, dtype = rest
    size = formulas.output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    shape = (input.shape[0], weight.shape[0], *size)
    return torch.empty_strided(shape, channels_last_strides(shape), dtype=dtype, device=input.device)


def _no_gradient(ctx: Any, *_: Any) -> tuple[None, ...]:
    return (None,) * 17


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    """Samples of images are more images; others have a call each."""
    input, residual = args[0], args[8]
    dims = [dim if isinstance(arg, Tensor) else None for arg, dim in zip(args, in_dims, strict=True)]
    if all(dim is None for i, dim in enumerate(dims) if i not in (0, 8)) and dims[0] is not None:

        def fold(x: Tensor | None, dim: int | None) -> Tensor | None:
            if x is None:
                return None
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.flatten(0, 1)

        folded = (fold(input, dims[0]), *args[1:8], fold(residual, dims[8]), *args[9:])
        return INT8_CONV(*folded).unflatten(0, (info.batch_size, -1)), 0
    return sample_by_sample(INT8_CONV, info, in_dims, args)


INT8_CONV = Op(
    "int8_conv(Tensor input, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor input_scale, Tensor input_zero_point, "
    "Tensor? output_scale, Tensor? output_zero_point, Tensor? residual, Tensor? residual_scale, Tensor? residual_zero_point, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str activation, ScalarType dtype) -> Tensor",
    kernel=kernels.int8_conv,
    reference=formulas.int8_conv,
    fake=_fake,
    save=lambda ctx, args, result: (),
    backward=_no_gradient,
    vmap=_vmap,
    differentiable=0,
)
