"""Convolution as a sum over patches, in float64: strided views of the padded input against the filters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _patches(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """(N, C, *out, *kernel)"""
    for d, (k, s, dil) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + d, dil * (k - 1) + 1, s)[..., ::dil]
    return x


def _pad(x: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """With zeros; a negative number crops."""
    pairs = [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]
    return torch.nn.functional.pad(x, pairs)


def _correlate(x: Tensor, w: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int) -> Tensor:
    """Of an input that is padded already."""
    rank = x.dim() - 2
    p = _patches(x, w.shape[2:], stride, dilation)
    out = p.shape[2 : 2 + rank]
    p = p.reshape(x.shape[0], groups, x.shape[1] // groups, *p.shape[2:])
    # (N, G, out, C / G, kernel) against (G, M / G, C / G, kernel)
    p = p.movedim(2, 2 + rank).flatten(3 + rank - 1).flatten(2, 1 + rank)
    filters = w.reshape(groups, w.shape[0] // groups, -1)
    return torch.matmul(filters, p.mT).reshape(x.shape[0], w.shape[0], *out)


def forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    y = _correlate(_pad(x.double(), padding, padding), w.double(), stride, dilation, groups)
    return _plus(y, bias).to(x.dtype)


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
    rank = y.dim() - 2
    wide = y.double()
    for d in range(rank):  # stride - 1 zeros between neighbours
        length = wide.shape[2 + d]
        wide = torch.stack([wide, *[torch.zeros_like(wide)] * (stride[d] - 1)], 3 + d).flatten(2 + d, 3 + d)
        wide = wide.narrow(2 + d, 0, (length - 1) * stride[d] + 1)
    reach = [dilation[d] * (w.shape[2 + d] - 1) for d in range(rank)]
    before = [reach[d] - padding[d] for d in range(rank)]
    after = [size[d] + reach[d] - wide.shape[2 + d] - before[d] for d in range(rank)]
    rows, channels = w.shape[0] // groups, w.shape[1]
    turned = w.double().flip(tuple(range(2, w.dim()))).reshape(groups, rows, channels, *w.shape[2:])
    turned = turned.transpose(1, 2).reshape(groups * channels, rows, *w.shape[2:])
    x = _correlate(_pad(wide, before, after), turned, [1] * rank, dilation, groups)
    return _plus(x, bias).to(y.dtype)


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
    rank = x.dim() - 2
    p = _patches(_pad(x.double(), padding, padding), kernel, stride, dilation)
    p = p[(slice(None), slice(None), *(slice(0, y.shape[2 + d]) for d in range(rank)))]
    n, channels, rows = x.shape[0], x.shape[1] // groups, y.shape[1] // groups
    p = p.reshape(n, groups, channels, *p.shape[2:]).flatten(3, 2 + rank)  # (N, G, C, out, *kernel)
    p = p.movedim(3, -1).flatten(2, -2)  # (N, G, C kernel, out)
    g = y.double().reshape(n, groups, rows, -1)
    w = torch.matmul(g, p.mT).sum(0).reshape(y.shape[1], channels, *kernel).to(x.dtype)
    if channels_last:
        return w.contiguous(memory_format=torch.channels_last if rank == 2 else torch.channels_last_3d)
    return w


def _plus(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.double().reshape(-1, *[1] * (y.dim() - 2))
