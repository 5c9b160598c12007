"""The convolution of 8-bit images on CUDA tensors, whose arguments the ops have checked."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _int8_conv
from .._conv import five, three
from .._quantize import address
from ..codes import DTYPE
from . import module, where


def _convolve(
    y: Tensor,
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
) -> None:
    rank = input.dim() - 2
    kept = []  # what the kernels read: freed once they are launched, in the order of the stream

    def allocate(size: int) -> int:
        kept.append(input.new_empty(size, dtype=torch.uint8))
        return kept[-1].data_ptr()

    module().int8_conv(
        *(input.data_ptr(), five(input.shape), five(input.stride()), input.dtype is torch.int8),
        *(weight.data_ptr(), five(weight.shape), five(weight.stride())),
        *(y.data_ptr(), five(y.shape), five(y.stride()), DTYPE[y.dtype]),
        *(three(stride, 1), (*three(padding[:rank], 0), *three(padding[-rank:], 0)), three(dilation, 1), groups),
        *(input_scale.data_ptr(), input_zero_point.data_ptr()),
        *(weight_scale.data_ptr(), weight_scale.numel() == 1),
        *(address(output_scale), address(output_zero_point), address(bias)),
        *(address(residual), residual is not None and residual.dtype is torch.int8),
        *(address(residual_scale), address(residual_zero_point)),
        *(activation != "none", activation == "relu6", allocate),
        **where(input),
    )


int8_conv = functools.partial(_int8_conv.int8_conv, _convolve)
