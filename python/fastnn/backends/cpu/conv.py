"""The convolution kernels on CPU tensors: x (N, C, *spatial), w (M, C / groups, *kernel), y (N, M, *out), 1 to 3
spatial dimensions, all of one floating-point dtype and any strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _cpu
from .._conv import CHANNELS_LAST, arguments, five, gives_channels_last, result_shape
from . import DTYPE, empty_channels, image_strides, precision


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
    prepared: _cpu.Prepared | None = None,
    overwrite: bool = False,
) -> Tensor:
    """activation(conv(x, w) + bias + residual); the residual has the result's shape. ``prepared`` is of this very w, and
    with ``overwrite`` the residual may become the result."""
    channels_last = gives_channels_last(x, w, False, stride, padding, dilation, groups)
    if not _has_dense_filters(w):
        w, prepared = w.contiguous(), None
    shape = result_shape(x, w, stride, padding, dilation)
    if overwrite and residual is not None and _has_strides(residual, image_strides(shape, channels_last)):
        options = (stride, padding, dilation, groups, bias, activation, residual, prepared)
        if residual.data_ptr() != x.data_ptr() and _call(_cpu.conv_onto_residual, x, w, residual, *options):
            return residual
    y = empty_channels(shape, x.dtype, channels_last)
    if residual is not None and residual.stride() != y.stride():
        residual = empty_channels(y.shape, y.dtype, channels_last).copy_(residual)
    _call(_cpu.conv_forward, x, w, y, stride, padding, dilation, groups, bias, activation, residual, prepared)
    return y


#: Filters, bias, activation by its number and what is kept of these filters, which may be None where that is enough.
Layer = tuple[Tensor | None, Tensor | None, int, _cpu.Prepared]


def inverted_residual(
    x: Tensor,
    residual: Tensor | None,
    expand: Layer | None,
    expand_stride: Sequence[int],
    expand_padding: Sequence[int],
    depthwise: Layer,
    stride: int,
    project: Layer,
) -> Tensor | None:
    """A convolution to many channels (or none), a depthwise 3 x 3 one (padding 1) and a pointwise one in one pass, in
    channels-last. None where there are no kernels for it, or the residual is laid out otherwise."""
    size = x.shape[2:]
    if expand is not None:
        numbers = zip(size, expand[0].shape[2:], expand_stride, expand_padding, strict=True)
        size = [(n + 2 * p - k) // s + 1 for n, k, s, p in numbers]
    shape = (x.shape[0], project[0].shape[0], *((n - 1) // stride + 1 for n in size))
    if residual is not None and (residual.shape != shape or not _has_strides(residual, image_strides(shape, True))):
        return None
    y = empty_channels(shape, x.dtype, True)
    taken = _cpu.inverted_residual(
        x.data_ptr(),
        five(x.shape),
        five(x.stride()),
        y.data_ptr(),
        five(shape),
        five(y.stride()),
        DTYPE[x.dtype],
        None if expand is None else _layer(expand),
        tuple(expand_stride),
        tuple(expand_padding),
        _layer(depthwise),
        stride,
        _layer(project),
        0 if residual is None else residual.data_ptr(),
        precision(x.dtype),
    )
    return y if taken else None


def _layer(layer: Layer) -> tuple[Any, ...]:
    w, bias, activation, prepared = layer
    bias_ptr = 0 if bias is None else bias.data_ptr()
    return w.data_ptr(), five(w.shape), five(w.stride()), bias_ptr, activation, prepared


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
    x = empty_channels((y.shape[0], w.shape[1] * groups, *size), y.dtype, channels_last)
    _call(_cpu.conv_input, x, w, y, stride, padding, dilation, groups, bias)
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
    w = empty_channels((y.shape[1], x.shape[1] // groups, *kernel), x.dtype, channels_last)
    # Positions one stride apart, as in all that torch makes; an odd view is worth a copy.
    y = y if _is_evenly_spaced(y) else y.contiguous()
    _call(_cpu.conv_weight, x, w, y, stride, padding, dilation, groups)
    return w


def channel_sum(y: Tensor) -> Tensor:
    """The sum over all but dimension 1: the gradient of the bias."""
    out = torch.empty(y.shape[1], dtype=y.dtype)
    _cpu.channel_sum(y.data_ptr(), five(y.shape), five(y.stride()), out.data_ptr(), DTYPE[y.dtype])
    return out


def _has_dense_filters(w: Tensor) -> bool:
    return w.is_contiguous() or (w.dim() > 3 and w.is_contiguous(memory_format=CHANNELS_LAST[w.dim()]))


def _is_evenly_spaced(y: Tensor) -> bool:
    step = 0
    count = 1
    for size, stride in zip(reversed(y.shape[2:]), reversed(y.stride()[2:]), strict=True):
        if size == 1:
            continue
        if count == 1:
            step = stride
        elif stride != step * count:
            return False
        count *= size
    return True


def _has_strides(x: Tensor, strides: Sequence[int]) -> bool:
    """Where there is more than one element, for which alone strides matter."""
    return all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), strides, strict=True))


def _call(
    function: Callable[..., Any],
    x: Tensor,
    w: Tensor,
    y: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    prepared: _cpu.Prepared | None = None,
) -> Any:
    if bias is not None:
        bias = bias.contiguous()
    return function(
        *arguments(x, w, y, stride, padding, dilation, groups, bias, activation, residual),
        prepared,
    )
