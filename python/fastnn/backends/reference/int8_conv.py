"""Convolution of 8-bit images in plain torch: exact sums in float64, the rest in float32 as in fastnn.ops.int8_conv.

Arguments are those of torch.ops.fastnn.int8_conv. Its padding is one number for each dimension, or as many for the
beginnings and then for the ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantize import RANGE, check_values


def int8_conv(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    input_zero_point: Tensor,
    output_scale: Tensor | None,
    output_zero_point: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_zero_point: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    check(input, weight_scale, input_scale, input_zero_point, output_scale, output_zero_point, dtype)
    if residual is not None:
        check_residual(residual, residual_scale, residual_zero_point)
    # Integers below 2^53: each product and sum is exact.
    shifted = input.to(torch.float64) - input_zero_point
    rank = weight.dim() - 2
    shifted = F.pad(shifted, [n for d in reversed(range(rank)) for n in (padding[d], padding[d - rank])])
    convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    sums = convolve(shifted, weight.to(torch.float64), None, stride, 0, dilation, groups)
    channels = (-1, *(1,) * (weight.dim() - 2))
    scale, shift, inverse = columns(weight_scale, bias, input_scale, output_scale, weight.shape[0])
    v = sums.to(torch.float32) * scale.view(channels) + shift.view(channels)
    if residual is not None:
        difference = residual.to(torch.int32) - residual_zero_point.to(torch.int32)
        v = v + difference.to(torch.float32) * (residual_scale * inverse)
    low, high = (0.0 if activation != "none" else -torch.inf), (6 * inverse if activation == "relu6" else torch.inf)
    v = v.clamp(min=low)
    if activation == "relu6":
        v = torch.minimum(v, high)
    if not dtype.is_floating_point:
        least, most = RANGE[str(dtype).removeprefix("torch.")]
        zero_point = output_zero_point.to(torch.float32)
        v = torch.where(v.isnan(), 0.0, v)
        v = (v.round() + zero_point).clamp(least, most)
    v = v.to(dtype)
    return v.movedim(1, -1).contiguous().movedim(-1, 1)


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """The spatial sizes of the result."""
    rank = len(kernel)
    return [
        (size[d] + padding[d] + padding[d - rank] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
        for d in range(rank)
    ]


def columns(
    weight_scale: Tensor, bias: Tensor | None, input_scale: Tensor, output_scale: Tensor | None, filters: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What sums are multiplied by, what is added to them, one number a filter; and one over the output's scale."""
    one = torch.ones((), dtype=torch.float32, device=weight_scale.device)
    inverse = one if output_scale is None else one / output_scale.to(torch.float32)
    scale = (input_scale.to(torch.float32) * weight_scale.to(torch.float32) * inverse).expand(filters)
    shift = scale.new_zeros(filters) if bias is None else bias.to(torch.float32) * inverse
    return scale, shift, inverse


def check(
    input: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    input_zero_point: Tensor,
    output_scale: Tensor | None,
    output_zero_point: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """ValueError for scales and zero points that are none."""
    check_named("input", input_scale, input_zero_point, input.dtype)
    check_named("weight", weight_scale, None, torch.int8)
    if output_scale is not None:
        check_named("output", output_scale, output_zero_point, dtype)


def check_residual(residual: Tensor, residual_scale: Tensor, residual_zero_point: Tensor) -> None:
    check_named("residual", residual_scale, residual_zero_point, residual.dtype)


def check_named(name: str, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> None:
    try:
        check_values(scale, zero_point, str(dtype).removeprefix("torch."))
    except ValueError as error:
        raise ValueError(f"fastnn.int8_conv: {name}_{error}") from None
