"""The convolution kernels on CUDA tensors: see backends._conv."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _state
from .._conv import Convolutions, five, three
from ..codes import ACTIVATION, DTYPE, precision
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
        x.data_ptr(),
        five(x.shape),
        five(x.stride()),
        w.data_ptr(),
        five(w.shape),
        five(w.stride()),
        y.data_ptr(),
        five(y.shape),
        five(y.stride()),
        DTYPE[x.dtype],
        three(stride, 1),
        three(padding, 0),
        three(dilation, 1),
        groups,
        precision(x.dtype),
        _state.settings().batch_invariant,
        0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        ACTIVATION[activation],
        allocate,
        **where(x),
    )


_convolutions = Convolutions(convolve, column_sum)
forward = _convolutions.forward
input = _convolutions.input
weight = _convolutions.weight
channel_sum = _convolutions.channel_sum
inverted_residual = _convolutions.inverted_residual
