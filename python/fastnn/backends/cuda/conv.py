"""The convolution kernels on CUDA tensors: see backends._conv."""

from __future__ import annotations

import math
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


#: Kernels count pixels and channels in 32 bits, and blocks of a launch are limited.
_MOST_PIXELS, _MOST_BLOCKS = 1 << 31, 65535


def too_large(
    x: Sequence[int],
    w: Sequence[int],
    y: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str | None:
    """None where the kernels can compute each of tensors of these shapes from the others, else the reason why not, for
    people."""
    depthwise = w[1] == 1 and w[0] == groups
    for name, shape in (("x", x), ("y", y)):
        if (math.prod(shape) if depthwise else shape[0] * math.prod(shape[2:])) >= _MOST_PIXELS:
            return f"{name}: 2^31 pixels or more on CUDA"
    reach = max(p + d * k + n for p, d, k, n in zip(padding, dilation, w[2:], x[2:], strict=True))
    if math.prod(w) >= _MOST_PIXELS or reach >= _MOST_PIXELS // 4:
        return "w: 2^31 elements, or a reach of 2^29 pixels, or more on CUDA"
    if (groups > _MOST_BLOCKS and not depthwise) or math.prod(stride) > _MOST_BLOCKS:
        return f"groups, or strides multiplied, beyond {_MOST_BLOCKS} on CUDA"
    return None


_convolutions = Convolutions(convolve, column_sum)
forward = _convolutions.forward
input = _convolutions.input
weight = _convolutions.weight
channel_sum = _convolutions.channel_sum
inverted_residual = _convolutions.inverted_residual
