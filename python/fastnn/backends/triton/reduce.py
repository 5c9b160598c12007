"""The sums of a matrix's columns: a bias's gradient.

Two stages without atomics: programs sum pieces of rows, whose sums are then summed in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._matmul import rows_of
from ._launch import ceil_div, launch

_PIECE, _MOST_PIECES = 256, 1024
_ROWS, _COLUMNS = 32, 64  # of a tile


@triton.jit
def sum_pieces(
    x,
    to,
    rows,
    columns,
    row_stride,
    column_stride,
    piece,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """to[piece, column] = the sum of rows [piece * index, ...) of x, in float64 where ``to`` is."""
    blocks = tl.cdiv(columns, COLUMNS)
    index = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    first = index * piece
    end = tl.minimum(first + piece, rows)
    wide = tl.float64 if to.dtype.element_ty == tl.float64 else tl.float32
    sums = tl.zeros((ROWS, COLUMNS), wide)
    for at in range(first, end, ROWS):
        row = at + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (column < columns)[None, :]
        sums += tl.load(x + row[:, None] * row_stride + column[None, :] * column_stride, mask=inside, other=0.0).to(
            wide
        )
    total = tl.sum(sums, 0)
    tl.store(to + index * columns + column, total.to(to.dtype.element_ty), mask=column < columns)


def column_sum(x: Tensor) -> Tensor:
    """The sum over all dimensions but the last, added up in float32."""
    rows = rows_of(x)
    if rows is None:
        rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty(rows.shape[1])
    if out.numel() == 0:
        return out
    pieces = min(max(ceil_div(rows.shape[0], _PIECE), 1), _MOST_PIECES)
    if pieces > 1:
        parts = x.new_empty((pieces, rows.shape[1]), dtype=torch.float32)
        sum_rows(rows, parts, pieces)
        rows = parts
    sum_rows(rows, out, 1)
    return out


def sum_rows(x: Tensor, to: Tensor, pieces: int) -> None:
    """Of each of ``pieces`` pieces of the rows."""
    rows, columns = x.shape
    programs = pieces * ceil_div(columns, _COLUMNS)
    piece = max(ceil_div(rows, pieces), 1)
    launch(sum_pieces, programs, x, x, to, rows, columns, *x.stride(), piece, ROWS=_ROWS, COLUMNS=_COLUMNS)
