"""The convolution of 8-bit images on CUDA tensors, whose arguments the ops have checked; the values of scales and zero points are
not looked at, as that would mean to wait for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._conv import five, three
from .._quantize import address
from .._tensors import channels_last_strides
from ..codes import DTYPE
from ..reference.int8_conv import output_size
from . import module, where


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
    """As backends.cpu.int8_conv.int8_conv."""
    rank = input.dim() - 2
    shape = (
        input.shape[0],
        weight.shape[0],
        *output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation),
    )
    strides = channels_last_strides(shape)
    y = input.new_empty_strided(shape, strides, dtype=dtype)
    if residual is not None and residual.stride() != strides:
        residual = residual.new_empty_strided(shape, strides).copy_(residual)
    kept = []  # what the kernels read: freed once they are launched, in the order of the stream

    def allocate(size: int) -> int:
        kept.append(input.new_empty(size, dtype=torch.uint8))
        return kept[-1].data_ptr()

    def numbers(x: Tensor | None, of: torch.dtype) -> int:
        if x is None:
            return 0
        kept.append(x.to(of).contiguous())
        return kept[-1].data_ptr()

    module().int8_conv(
        *(input.data_ptr(), five(input.shape), five(input.stride()), input.dtype is torch.int8),
        *(weight.data_ptr(), five(weight.shape), five(weight.stride())),
        *(y.data_ptr(), five(shape), five(strides), DTYPE[dtype]),
        *(three(stride, 1), (*three(padding[:rank], 0), *three(padding[-rank:], 0)), three(dilation, 1), groups),
        *(numbers(input_scale, torch.float32), numbers(input_zero_point, torch.int32)),
        *(numbers(weight_scale, torch.float32), weight_scale.numel() == 1),
        *(numbers(output_scale, torch.float32), numbers(output_zero_point, torch.int32), numbers(bias, torch.float32)),
        *(address(residual), residual is not None and residual.dtype is torch.int8),
        *(numbers(residual_scale, torch.float32), numbers(residual_zero_point, torch.int32)),
        *(activation != "none", activation == "relu6", allocate),
        **where(input),
    )
    return y
