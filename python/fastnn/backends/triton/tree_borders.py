"""The best border of each column of a node, from its sums: in float64, in the CPU's order of operations."""

from __future__ import annotations

import triton
import triton.language as tl

from .tree_nodes import AT_LEVELS, AT_ROWS, FIELDS, NONE


@triton.jit
def gini_proxy(nl, square_left, nr, square_right):
    """-(nr · gini_right) - nl · gini_left, rounded as on the CPU; never contracted."""
    gl = 1.0 - square_left / (nl * nl)
    gr = 1.0 - square_right / (nr * nr)
    return (0.0 - nr) * gr - nl * gl


@triton.jit
def best_border(
    rows, missing_rows, weight, square_left, square_right, total, slot, present, of_rows, min_leaf, min_weight
):
    """The largest proxy of each column, and the first bin that has it, with some missing rows on the left."""
    left = rows + missing_rows
    # A side has a row at least; where missing values go left, one of the others goes with them.
    possible = present & (left >= tl.maximum(missing_rows + 1, min_leaf)) & (left <= of_rows - min_leaf)
    nl = weight.to(tl.float64)
    nr = (total - weight).to(tl.float64)
    possible = possible & (nl >= min_weight) & (nr >= min_weight)
    proxy = gini_proxy(nl, square_left.to(tl.float64), nr, square_right.to(tl.float64))
    proxy = tl.where(possible, proxy, float("-inf"))
    best = tl.max(proxy, 1)
    return best, tl.min(tl.where(possible & (proxy == best[:, None]), slot, NONE), 1)


@triton.jit
def find_borders(
    sums,
    nodes,
    weights,
    min_weight,  # where it lies: arguments are float32
    proxies,  # of candidates, and their numbers of each size
    words_of,
    halves_of,
    bytes_of,
    columns,
    slots,
    classes,
    words,
    min_leaf,
    WEIGHTED: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """The best border of some columns of a node; of two as good ones that with missing values on the right and of lower
    bins."""
    blocks = tl.cdiv(columns, COLUMNS)
    node = tl.program_id(0) // blocks
    if tl.load(nodes + node * FIELDS + AT_LEVELS) <= 0:
        return
    column = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    there = column < columns
    slot = tl.arange(0, SLOTS)[None, :]
    ordered = slot < slots - 1
    inside = there[:, None] & ordered
    sums += node.to(tl.int64) * columns * words * slots
    weights += node * words
    # In pass 0 missing values go right, in pass 1 left.
    rows = tl.zeros((COLUMNS, SLOTS), tl.int32)
    rows_before = tl.zeros((COLUMNS, SLOTS), tl.int32)
    missing = tl.zeros((COLUMNS,), tl.int32)
    weight = tl.zeros((COLUMNS, SLOTS), tl.int32)
    missing_weight = tl.zeros((COLUMNS,), tl.int32)
    left_0 = tl.zeros((COLUMNS, SLOTS), tl.int64)
    right_0 = tl.zeros((COLUMNS, SLOTS), tl.int64)
    left_1 = tl.zeros((COLUMNS, SLOTS), tl.int64)
    right_1 = tl.zeros((COLUMNS, SLOTS), tl.int64)
    total = 0
    for word in range(words):
        line = sums + (column * words + word) * slots
        up_to = tl.load(line[:, None] + slot, mask=inside, other=0)
        of_missing = tl.load(line + slots - 1, mask=there, other=0)
        if not WEIGHTED or word == classes:
            rows += up_to
            rows_before += tl.load(line[:, None] + slot - 1, mask=inside & (slot > 0), other=0)
            missing += of_missing
        if word < classes:
            everything = tl.load(weights + word)
            total += everything
            weight += up_to
            missing_weight += of_missing
            l = up_to.to(tl.int64)
            r = everything - l
            left_0 += l * l
            right_0 += r * r
            l += of_missing[:, None]
            r = everything - l
            left_1 += l * l
            right_1 += r * r
    present = inside & (rows != rows_before)
    of_rows = tl.load(nodes + node * FIELDS + AT_ROWS)
    least = tl.load(min_weight)
    none = missing[:, None] * 0
    proxy, last = best_border(rows, none, weight, left_0, right_0, total, slot, present, of_rows, min_leaf, least)
    other, last_1 = best_border(
        rows,
        missing[:, None],
        weight + missing_weight[:, None],
        left_1,
        right_1,
        total,
        slot,
        present & (missing > 0)[:, None],
        of_rows,
        min_leaf,
        least,
    )
    missing_left = other > proxy
    proxy = tl.where(missing_left, other, proxy)
    last = tl.where(missing_left, last_1, last)
    found = proxy > float("-inf")
    left = tl.sum(tl.where(slot == last[:, None], rows, 0), 1) + tl.where(missing_left, missing, 0)
    next = tl.min(tl.where(present & (slot > last[:, None]), slot, NONE), 1)
    filled = tl.sum(present.to(tl.int32), 1)
    at = node * columns + column
    tl.store(proxies + at * 3, proxy, mask=there)
    tl.store(words_of + at * 6 + 2, tl.where(found, left, 0), mask=there)
    tl.store(words_of + at * 6 + 3, missing, mask=there)
    tl.store(halves_of + at * 12 + 8, tl.where(found, last, -1).to(tl.int16), mask=there)
    tl.store(halves_of + at * 12 + 9, tl.where(found & (next < slots), next, -1).to(tl.int16), mask=there)
    constant = (filled == 0) | ((missing == 0) & (filled == 1))
    tl.store(bytes_of + at * 24 + 20, constant.to(tl.uint8), mask=there)
    tl.store(bytes_of + at * 24 + 21, missing_left.to(tl.uint8), mask=there)
