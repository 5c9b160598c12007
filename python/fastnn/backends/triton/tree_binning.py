"""Values to bins: see _tree.bin_rows."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _tree
from .._tree import GROUP
from ._launch import ceil_div, launch

#: Rows of a program.
_BINNED = 64


@triton.jit
def put_into_bins(
    x,
    edges,  # (columns, slots)
    counts,
    bins,
    least,  # (columns, slots)
    largest,
    rows,
    columns,
    groups,
    row_step,
    column_step,
    slots,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % groups).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    here = (row < rows)[:, None]
    inside = here & (column < columns)[None, :]
    value = tl.load(x + row[:, None] * row_step + column[None, :] * column_step, mask=inside, other=0.0)
    beyond = tl.load(counts + column, mask=column < columns, other=0)[None, :]
    beyond = tl.where(inside, beyond, 0)  # bin <= the answer <= beyond
    bin = beyond * 0
    for _ in range(8):
        middle = (bin + beyond) // 2
        searched = bin < beyond
        edge = tl.load(edges + column[None, :] * slots + middle, mask=searched, other=0.0)
        above = searched & (value > edge)
        beyond = tl.where(searched & (value <= edge), middle, beyond)
        bin = tl.where(above, middle + 1, bin)
    number = value == value
    bin = tl.where(number, bin, slots - 1)
    tl.store(bins + row[:, None] * (groups * GROUP) + column[None, :], bin.to(tl.uint8), mask=here)
    bits = value.to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    at = column[None, :] * slots + bin
    # Soon there is nothing to write. What was read may be old, but never too extreme.
    ranged = inside & number
    extreme = ranged & (ordered < tl.load(least + at, mask=ranged, other=0))
    tl.atomic_min(least + at, ordered, mask=extreme, sem="relaxed")
    extreme = ranged & (ordered > tl.load(largest + at, mask=ranged, other=0))
    tl.atomic_max(largest + at, ordered, mask=extreme, sem="relaxed")


def _put(x: Tensor, edges: Tensor, counts: Tensor, bins: Tensor, ranges: Tensor) -> None:
    (rows, columns), groups = x.shape, bins.shape[1] // GROUP
    launch(
        put_into_bins,
        ceil_div(rows, _BINNED) * groups,
        x,
        x,
        edges,
        counts,
        bins,
        *ranges.view(torch.uint32),
        rows,
        columns,
        groups,
        *x.stride(),
        edges.shape[1],
        GROUP=GROUP,
        ROWS=_BINNED,
    )


def bin_rows(x: Tensor, edges: list[np.ndarray], slots: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """See _tree.bin_rows."""
    return _tree.bin_rows(_put, x, edges, slots)
