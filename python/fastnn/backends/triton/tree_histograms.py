"""Bins are counted, and the counts summed up to each bin.

Counting is a product of bytes: see tree.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tree_nodes import AT_BEGIN, AT_IS_COUNTED, AT_LEVELS, AT_ROWS, FIELDS, node_of


@triton.jit
def add_rows(
    sums, bin, of, weight, inside, first_word, classes, DIGITS: tl.constexpr, UPPER: tl.constexpr, WORDS: tl.constexpr
):
    """What some rows weigh in the bins of a column: sums[upper bits, (word, lower bits)]."""
    upper = (tl.arange(0, UPPER)[:, None] == (bin >> 4)[None, :]).to(tl.int8)
    cell = tl.arange(0, 16 * WORDS)
    word = (first_word + cell // 16)[None, :]
    here = ((bin & 15)[:, None] == (cell % 16)[None, :]) & inside[:, None]
    of_class = here & (word == of[:, None])
    lower = tl.where(of_class, (weight & 127)[:, None], 0)
    # The word behind those of the classes counts rows.
    lower = tl.where(here & (word == classes), 1, lower)
    sums = tl.dot(upper, lower.to(tl.int8), sums, out_dtype=tl.int32)
    for digit in range(1, DIGITS):
        lower = tl.where(of_class, ((weight >> (7 * digit)) & 127)[:, None], 0)
        sums += tl.dot(upper, lower.to(tl.int8), out_dtype=tl.int32) << (7 * digit)
    return sums


@triton.jit(do_not_specialize=["count"])
def count_bins(
    bins,
    order,
    nodes,
    plan,
    counts,  # of one node of two, in the place of their parent
    count,
    columns,
    groups,
    slots,
    classes,
    words,
    TOP: tl.constexpr,
    DIGITS: tl.constexpr,
    UPPER: tl.constexpr,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    NODES: tl.constexpr,
):
    """Counts a piece of rows in a group of columns."""
    chunks = tl.cdiv(words, WORDS)
    program = tl.program_id(0)
    node, before = node_of(plan, program // (groups * chunks), NODES)
    if node >= count:
        return
    group = program // chunks % groups
    first_word = program % chunks * WORDS
    rows = tl.minimum(tl.load(nodes + node * FIELDS + AT_ROWS) - before * PIECE, PIECE)
    order += tl.load(nodes + node * FIELDS + AT_BEGIN).to(tl.int64) + before * PIECE
    counts += (node if TOP else node // 2).to(tl.int64) * columns * words * slots
    bins += group * GROUP
    step = groups * GROUP
    # The bytes of a row are a sector of memory, which is read once and then found in L1.
    for column in range(tl.minimum(columns - group * GROUP, GROUP)):
        sums = tl.zeros((UPPER, 16 * WORDS), tl.int32)
        for begin in range(0, rows, ROWS):
            i = begin + tl.arange(0, ROWS)
            inside = i < rows
            row = tl.load(order + i, mask=inside, other=0)
            bin = tl.load(bins + (row & 0xFFFFFFFF) * step + column, mask=inside, other=0).to(tl.int32)
            of = (row >> 32).to(tl.int32) & 255
            weight = (row >> 40).to(tl.int32) & 0xFFFFFF
            sums = add_rows(sums, bin, of, weight, inside, first_word, classes, DIGITS, UPPER, WORDS)
        cell = tl.arange(0, 16 * WORDS)
        word = (first_word + cell // 16)[None, :]
        slot = tl.arange(0, UPPER)[:, None] * 16 + (cell % 16)[None, :]
        line = (group.to(tl.int64) * GROUP + column) * words + word
        counted = (sums != 0) & (word < words) & (slot < slots)
        tl.atomic_add(counts + line * slots + slot, sums, mask=counted, sem="relaxed")


@triton.jit
def sum_bins(counts, sums, above, nodes, lines, slots, TOP: tl.constexpr, LINES: tl.constexpr, SLOTS: tl.constexpr):
    """Sums over the bins up to each (the last, of missing values, alone), of what was counted; of the other node of two
    they are its parent's less these. A line is a word of a column."""
    blocks = tl.cdiv(lines, LINES)
    place = tl.program_id(0) // blocks
    node = place
    if not TOP:
        node = place * 2 + (tl.load(nodes + place * 2 * FIELDS + AT_IS_COUNTED) == 0).to(tl.int32)
    if tl.load(nodes + node * FIELDS + AT_IS_COUNTED) == 0:
        return
    line = (tl.program_id(0) % blocks * LINES + tl.arange(0, LINES)).to(tl.int64)[:, None]
    slot = tl.arange(0, SLOTS)[None, :]
    inside = (line < lines) & (slot < slots)
    of_parent = (place.to(tl.int64) * lines + line) * slots + slot
    own = tl.load(counts + of_parent, mask=inside, other=0)
    missing = slot == slots - 1
    own = tl.where(missing, own, tl.cumsum(tl.where(missing, 0, own), 1))
    tl.store(sums + (node.to(tl.int64) * lines + line) * slots + slot, own, mask=inside)
    if not TOP:
        sibling = node ^ 1
        searched = tl.load(nodes + sibling * FIELDS + AT_LEVELS) > 0
        rest = tl.load(above + of_parent, mask=inside & searched, other=0) - own
        tl.store(sums + (sibling.to(tl.int64) * lines + line) * slots + slot, rest, mask=inside & searched)
