"""Pooling in plain torch: every window spelled out by its indices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._pool import Windows, code_dtype


def _axis(n: int, out: int, windows: Windows, d: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Along one dimension: the position of tap 0 of each output (out,); which of its taps count (out, taps), whether
    inside of the input or not; and the step between taps."""
    o = torch.arange(out, device=device)
    if windows.kernel:
        begin = o * windows.stride[d] - windows.padding[d]
        count = torch.full_like(o, windows.kernel[d])
        step = windows.dilation[d]
    else:
        begin = o * n // out
        count = ((o + 1) * n + out - 1) // out - begin
        step = 1
    most = int(count.max()) if not windows.kernel else windows.kernel[d]
    return begin, torch.arange(most, device=device) < count[:, None], step


def _spread(rows: Sequence[Tensor], dims: int) -> list[Tensor]:
    """(out, taps) of each dimension, made to broadcast to (*out, *taps)."""
    shaped = []
    for d, row in enumerate(rows):
        shape = [1] * (2 * dims)
        shape[d], shape[dims + d] = row.shape
        shaped.append(row.view(shape))
    return shaped


def _unfold(x: Tensor, windows: Windows, output: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The elements of each window (..., *output, taps), and which of them are there (*output, taps)."""
    dims = len(output)
    indices, inside = [], []
    for d, (n, out) in enumerate(zip(x.shape[x.dim() - dims :], output, strict=True)):
        begin, counts, step = _axis(n, out, windows, d, x.device)
        at = begin[:, None] + torch.arange(counts.shape[1], device=x.device) * step
        indices.append(at.clamp(0, n - 1))
        inside.append(counts & (at >= 0) & (at < n))
    there = torch.ones((), dtype=torch.bool, device=x.device)
    for mask in _spread(inside, dims):
        there = there & mask
    return x[(..., *_spread(indices, dims))].flatten(-dims), there.flatten(dims)


def max_pool(x: Tensor, windows: Windows, output: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The maxima, and which tap of its window each is: the first, or where there are NaN the last of those."""
    elements, there = _unfold(x, windows, output)
    size = x.shape[x.dim() - len(output) :]
    seen = elements.detach().masked_fill(~there, -torch.inf)
    nan = seen.isnan()
    first = ((seen == seen.amax(-1, keepdim=True)) & there).int().argmax(-1)
    last_nan = nan.shape[-1] - 1 - nan.int().flip(-1).argmax(-1)
    codes = torch.where(nan.any(-1), last_nan, first)
    values = elements.gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    return values, codes.to(code_dtype(windows, size, output))


def max_pool_indices(codes: Tensor, windows: Windows, size: Sequence[int]) -> Tensor:
    """Where in a flattened plane the codes point to."""
    dims = len(size)
    output = codes.shape[codes.dim() - dims :]
    axes = [_axis(n, out, windows, d, codes.device) for d, (n, out) in enumerate(zip(size, output, strict=True))]
    rest = codes.long()
    place, scale = torch.zeros_like(rest), 1
    for d in reversed(range(dims)):
        begin, counts, step = axes[d]
        tap = rest % counts.shape[1]
        rest = rest // counts.shape[1]
        shape = [1] * dims
        shape[d] = output[d]
        place = place + (begin.view(shape) + tap * step) * scale
        scale *= size[d]
    return place


def max_pool_backward(grad: Tensor, codes: Tensor, windows: Windows, size: Sequence[int], dims: int) -> Tensor:
    # reshape, and zeros that know nothing of grad: a batch of gradients (is_grads_batched) comes through here.
    lead, output = codes.shape[: codes.dim() - dims], codes.shape[codes.dim() - dims :]
    places = max_pool_indices(codes, windows, size[len(size) - dims :]).reshape(*lead, math.prod(output))
    zeros = torch.zeros((*lead, math.prod(size[len(size) - dims :])), dtype=torch.float64, device=grad.device)
    flat = grad.double().reshape(*lead, math.prod(output))
    return zeros.scatter_add(-1, places, flat).reshape(tuple(size)).to(grad.dtype)


def max_pool_gather(x: Tensor, codes: Tensor, windows: Windows, dims: int) -> Tensor:
    lead, output = codes.shape[: codes.dim() - dims], codes.shape[codes.dim() - dims :]
    size = x.shape[x.dim() - dims :]
    places = max_pool_indices(codes, windows, size).reshape(*lead, math.prod(output))
    return x.reshape(*lead, math.prod(size)).gather(-1, places).reshape(codes.shape)


def avg_pool(
    x: Tensor,
    windows: Windows,
    output: Sequence[int],
    include_padding: bool = True,
    divisor: int = 0,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The sum of each window over ``divisor`` or, where that is 0, over how many elements it has; padding counts as far
    as ``include_padding`` says, and never beyond it."""
    dims = len(output)
    elements, there = _unfold(x.to(dtype), windows, output)
    total = elements.masked_fill(~there, 0).sum(-1)
    if divisor:
        return (total / divisor).to(x.dtype)
    if not include_padding or not windows.kernel:
        return (total / there.sum(-1)).to(x.dtype)
    counts = torch.ones((), dtype=dtype, device=x.device)
    for d, (n, out) in enumerate(zip(x.shape[x.dim() - dims :], output, strict=True)):
        begin, _, _ = _axis(n, out, windows, d, x.device)
        shape = [1] * dims
        shape[d] = out
        counts = counts * ((begin + windows.kernel[d]).clamp(max=n + windows.padding[d]) - begin).view(shape)
    return (total / counts).to(x.dtype)


def avg_pool_backward(
    grad: Tensor, windows: Windows, size: Sequence[int], dims: int, include_padding: bool = True, divisor: int = 0
) -> Tensor:
    """The pool is linear, so that its gradient anywhere is the one of zeros."""
    output = grad.shape[grad.dim() - dims :]
    _, back = torch.func.vjp(
        lambda x: avg_pool(x, windows, output, include_padding, divisor),
        torch.zeros(tuple(size), dtype=torch.float64, device=grad.device),
    )
    return back(grad.double())[0].to(grad.dtype)
