"""The convolution kernels on CUDA tensors: see backends._conv."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._conv import Convolutions, arguments
from . import column_sum, module, where


def convolve(
    product: str,
    x: Tensor,
    w: Tensor,
    y: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> None:
    """Writes y ("forward"), x ("input") or w ("weight") from the other two; the residual has the strides of what is written."""
    copies = []  # which the kernels read: freed once they are launched, in the order of the stream

    def allocate(size: int) -> int:
        copies.append(x.new_empty(size, dtype=torch.uint8))
        return copies[-1].data_ptr()

    if bias is not None:
        bias = bias.contiguous()
    getattr(module(), f"conv_{product}")(
        *arguments(x, w, y, stride, padding, dilation, groups, bias, activation, residual),
        allocate,
        **where(x),
    )


_convolutions = Convolutions(convolve, column_sum)
forward = _convolutions.forward
input = _convolutions.input
weight = _convolutions.weight
channel_sum = _convolutions.channel_sum
inverted_residual = _convolutions.inverted_residual
