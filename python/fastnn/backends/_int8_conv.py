"""What the convolutions of 8-bit images on GPUs have in common; the values of scales and zero points are not looked at, as that
would mean to wait for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._tensors import channels_last_strides
from .reference.int8_conv import output_size


def int8_conv(
    convolve: Callable[..., None],
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
    """As backends.cpu.int8_conv.int8_conv.

    ``convolve`` writes its first argument, y (N, M, *out), which has an element; the others are those of here but the last.
    Scales are contiguous float32, zero points int32 and the bias float32; the residual has y's strides.
    """
    size = output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    shape = (input.shape[0], weight.shape[0], *size)
    y = input.new_empty_strided(shape, channels_last_strides(shape), dtype=dtype)
    if y.numel() == 0:
        return y
    if residual is not None and residual.stride() != y.stride():
        residual = residual.new_empty_strided(shape, y.stride()).copy_(residual)

    def floats(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(torch.float32).contiguous()

    def integers(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(torch.int32).contiguous()

    numbers: tuple[Any, ...] = (
        *(floats(weight_scale), floats(bias), floats(input_scale), integers(input_zero_point)),
        *(floats(output_scale), integers(output_zero_point)),
        *(residual, floats(residual_scale), integers(residual_zero_point)),
    )
    convolve(y, input, weight, *numbers, stride, padding, dilation, groups, activation)
    return y
