"""softmax and log_softmax on plain tensors without zero sizes, whose shapes the ops have checked.

A program has a row: it goes through it twice, first for the largest and the sum (online: Milakov and Gimelshein,
arXiv:1805.02867), then for the results.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._tensors import merge
from ._launch import launch
from .elementwise import offset

_MOST = 4096


@triton.jit
def rows_forward(
    x,
    y,
    size,
    x_step,
    y_step,
    shape,  # of the other dimensions
    x_strides,
    y_strides,
    LOG: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += offset(row, shape, x_strides, DIMS)
    y += offset(row, shape, y_strides, DIMS)
    along = tl.arange(0, BLOCK).to(tl.int64)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, size, BLOCK):
        i = first + along
        values = tl.load(x + i * x_step, mask=i < size, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, tl.max(values, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(values - shift), 0)
        largest = higher
    for first in range(0, size, BLOCK):
        i = first + along
        values = tl.load(x + i * x_step, mask=i < size, other=0.0).to(tl.float32) - largest
        result = values - tl.log(total) if LOG else tl.exp(values) / total
        tl.store(y + i * y_step, result.to(y.dtype.element_ty), mask=i < size)


@triton.jit
def rows_backward(
    grad,
    saved,
    to,
    size,
    grad_step,
    saved_step,
    to_step,
    shape,
    grad_strides,
    saved_strides,
    to_strides,
    LOG: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y (g - Σ y g), of the logarithm g - exp(y) Σ g."""
    row = tl.program_id(0).to(tl.int64)
    grad += offset(row, shape, grad_strides, DIMS)
    saved += offset(row, shape, saved_strides, DIMS)
    to += offset(row, shape, to_strides, DIMS)
    along = tl.arange(0, BLOCK).to(tl.int64)
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, size, BLOCK):
        i = first + along
        g = tl.load(grad + i * grad_step, mask=i < size, other=0.0).to(tl.float32)
        if not LOG:
            g *= tl.load(saved + i * saved_step, mask=i < size, other=0.0).to(tl.float32)
        total += tl.sum(g, 0)
    for first in range(0, size, BLOCK):
        i = first + along
        g = tl.load(grad + i * grad_step, mask=i < size, other=0.0).to(tl.float32)
        y = tl.load(saved + i * saved_step, mask=i < size, other=0.0).to(tl.float32)
        result = g - tl.exp(y) * total if LOG else y * (g - total)
        tl.store(to + i * to_step, result.to(to.dtype.element_ty), mask=i < size)


def softmax(input: Tensor, dim: int, log: bool, out: Tensor | None = None) -> Tensor:
    """Along ``dim``, counted from 0; contiguous, or written to ``out``, which may be ``input``."""
    if out is None:
        out = input.new_empty(input.shape)
    _run(rows_forward, dim, log, input, out)
    return out


def softmax_backward(grad: Tensor, saved: Tensor, dim: int, log: bool) -> Tensor:
    """The gradient by the input, from the result ``saved``; contiguous."""
    out = saved.new_empty(saved.shape)
    _run(rows_backward, dim, log, grad, saved, out)
    return out


def _run(kernel: triton.JITFunction, dim: int, log: bool, *tensors: Tensor) -> None:
    out = tensors[-1]
    size = out.shape[dim]
    shape, strides = merge(*(rest[:dim] + rest[dim + 1 :] for rest in (out.shape, *(t.stride() for t in tensors))))
    block = min(triton.next_power_of_2(size), _MOST)
    steps = (tensor.stride(dim) for tensor in tensors)
    options = dict(LOG=log, DIMS=len(shape), BLOCK=block, num_warps=4 if block < 2048 else 8)
    launch(kernel, out.numel() // size, out, *tensors, size, *steps, shape, *strides, **options)
