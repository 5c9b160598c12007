"""Rows go to the side of their node where its split sends them."""

from __future__ import annotations

import triton
import triton.language as tl

from .tree_nodes import (
    AT_BEGIN,
    AT_FEATURE,
    AT_LAST,
    AT_MISSING_LEFT,
    AT_ROWS,
    AT_TO_LEFT,
    AT_TO_RIGHT,
    FIELDS,
    node_of,
)


@triton.jit(do_not_specialize=["count"])
def move_rows(bins, order, spare, nodes, plan, count, step, slots, PIECE: tl.constexpr, NODES: tl.constexpr):
    """Rows to the side where they go, each piece's in their order. Which piece comes first is left to chance, and changes
    nothing: whatever is made of rows are sums of integers."""
    node, before = node_of(plan + NODES, tl.program_id(0), NODES)
    if node >= count:
        return
    nodes += node * FIELDS
    i = tl.arange(0, PIECE)
    rows = tl.load(nodes + AT_ROWS) - before * PIECE
    inside = i < rows
    row = tl.load(order + tl.load(nodes + AT_BEGIN).to(tl.int64) + before * PIECE + i, mask=inside, other=0)
    feature = tl.load(nodes + AT_FEATURE)
    bin = tl.load(bins + (row & 0xFFFFFFFF) * step + feature, mask=inside & (feature >= 0), other=0).to(tl.int32)
    missing = (bin == slots - 1) & (tl.load(nodes + AT_MISSING_LEFT) != 0)
    left = inside & ((feature < 0) | (bin <= tl.load(nodes + AT_LAST)) | missing)
    lefts = tl.cumsum(left.to(tl.int32), 0) - left.to(tl.int32)  # before
    on_left = tl.sum(left.to(tl.int32), 0)
    to_left = tl.atomic_add(nodes + AT_TO_LEFT, on_left, sem="relaxed")
    to_right = tl.atomic_add(nodes + AT_TO_RIGHT, tl.minimum(rows, PIECE) - on_left, sem="relaxed")
    to = tl.where(left, to_left + lefts, to_right + i - lefts)
    tl.store(spare + to, row, mask=inside)


@triton.jit(do_not_specialize=["count"])
def copy_rows(order, spare, nodes, plan, count, PIECE: tl.constexpr, NODES: tl.constexpr):
    """Back to where they were, the rows of the roots."""
    node, before = node_of(plan + NODES, tl.program_id(0), NODES)
    if node >= count:
        return
    i = before * PIECE + tl.arange(0, PIECE)
    inside = i < tl.load(nodes + node * FIELDS + AT_ROWS)
    at = tl.load(nodes + node * FIELDS + AT_BEGIN).to(tl.int64) + i
    tl.store(order + at, tl.load(spare + at, mask=inside, other=0), mask=inside)
