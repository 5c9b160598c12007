"""The convolution kernels on CUDA tensors: x (N, C, *spatial), w (M, C / groups, *kernel), y (N, M, *out), 1 to 3 spatial
dimensions, all of one dtype and any strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _state
from .._conv import five, gives_channels_last, result_shape, three
from ..codes import ACTIVATION, DTYPE, precision
from ..cpu import image_strides
from . import column_sum, module, where


def forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "none",
    residual: Tensor | None = None,
    prepared: Any = None,
    overwrite: bool = False,
) -> Tensor:
    """activation(conv(x, w) + bias + residual); the residual has the result's shape. Nothing is kept of w for other calls
    in ``prepared``, nor is the residual overwritten."""
    channels_last = gives_channels_last(x, w, False, stride, padding, dilation, groups)
    y = _empty(x, result_shape(x, w, stride, padding, dilation), channels_last)
    if residual is not None and residual.stride() != y.stride():
        residual = torch.empty_like(y).copy_(residual)
    convolve("forward", x, w, y, stride, padding, dilation, groups, bias, activation, residual)
    return y


def inverted_residual(*args: Any) -> None:
    """There is no kernel of three layers in one pass: the layers are called one by one."""


def input(
    y: Tensor,
    w: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient of x, of the spatial sizes ``size``, from that of y; with ``bias``, the transposed convolution."""
    channels_last = gives_channels_last(y, w, True, stride, padding, dilation, groups)
    x = _empty(y, (y.shape[0], w.shape[1] * groups, *size), channels_last)
    convolve("input", x, w, y, stride, padding, dilation, groups, bias)
    return x


def weight(
    y: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    """The gradient of w from that of y."""
    w = _empty(x, (y.shape[1], x.shape[1] // groups, *kernel), channels_last)
    convolve("weight", x, w, y, stride, padding, dilation, groups)
    return w


def channel_sum(y: Tensor) -> Tensor:
    """The sum over all but dimension 1: the gradient of the bias."""
    return column_sum(y.movedim(1, -1))


def _empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    return like.new_empty_strided(shape, image_strides(shape, channels_last))


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
