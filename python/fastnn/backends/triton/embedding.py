"""Embedding on plain tensors, whose arguments the ops have checked. An index that there is no row for gives NaN.

The gradient is a program for each row of the table and piece of its columns, which sums the gradients of the row's places in
their order; torch sorts these by row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import ceil_div, launch

_ROWS, _COLUMNS = 16, 128  # of a tile


@triton.jit
def gather(
    table,
    indices,
    out,
    rows,
    count,
    columns,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(columns, COLUMNS)
    place = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    index = tl.load(indices + place, mask=place < count, other=0).to(tl.int64)
    inside = (place < count)[:, None] & (column < columns)[None, :]
    exists = inside & ((index >= 0) & (index < rows))[:, None]
    from_ = index[:, None] * row_stride + column[None, :] * column_stride
    values = tl.load(table + from_, mask=exists, other=float("nan"))
    tl.store(out + place[:, None] * columns + column[None, :], values, mask=inside)


@triton.jit
def sum_places(
    grad,
    order,
    begins,
    out,
    columns,
    row_stride,
    column_stride,
    padding,
    BY_FREQUENCY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[row] = the sum of the rows order[begins[row]] to order[begins[row + 1] - 1] of grad, or their mean."""
    blocks = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.load(begins + row)
    end = tl.where(row == padding, begin, tl.load(begins + row + 1))
    sums = tl.zeros((COLUMNS,), tl.float32)
    for first in range(begin, end, ROWS):
        i = first + tl.arange(0, ROWS)
        place = tl.load(order + i, mask=i < end, other=0)
        inside = (i < end)[:, None] & (column < columns)[None, :]
        values = tl.load(grad + place[:, None] * row_stride + column[None, :] * column_stride, mask=inside, other=0.0)
        sums += tl.sum(values.to(tl.float32), 0)
    if BY_FREQUENCY:
        sums /= tl.maximum(end - begin, 1).to(tl.float32)
    tl.store(out + row * columns + column, sums.to(out.dtype.element_ty), mask=column < columns)


def _columns(columns: int) -> int:
    return min(triton.next_power_of_2(columns), _COLUMNS)


def embedding(weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    """weight[indices]; the last two arguments are for the gradient."""
    rows, columns = weight.shape
    out = weight.new_empty((*indices.shape, columns))
    if out.numel() == 0:
        return out
    tile = _columns(columns)
    launch(
        *(gather, ceil_div(indices.numel(), _ROWS) * ceil_div(columns, tile), weight),
        *(weight, indices.contiguous(), out, rows, indices.numel(), columns, *weight.stride()),
        ROWS=_ROWS,
        COLUMNS=tile,
    )
    return out


def embedding_backward(
    grad: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    """The gradient of a weight of so many rows."""
    columns = grad.shape[-1]
    rows = grad.reshape(indices.numel(), columns)
    out = grad.new_empty((num_weights, columns))
    if out.numel() == 0:
        return out
    flat, order = indices.reshape(-1).to(torch.int64).sort(stable=True)
    begins = torch.searchsorted(flat, torch.arange(num_weights + 1, device=flat.device))
    tile = _columns(columns)
    launch(
        *(sum_places, num_weights * ceil_div(columns, tile), grad),
        *(rows, order, begins, out, columns, *rows.stride(), padding_idx),
        BY_FREQUENCY=scale_grad_by_freq,
        ROWS=_ROWS,
        COLUMNS=tile,
    )
    return out
