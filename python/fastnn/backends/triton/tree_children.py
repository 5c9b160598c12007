"""The column that a node is split by, and the two nodes below it."""

from __future__ import annotations

import triton
import triton.language as tl

from .tree_nodes import (
    AT_BEGIN,
    AT_FEATURE,
    AT_IS_COUNTED,
    AT_LAST,
    AT_LEFT_ROWS,
    AT_LEVELS,
    AT_MISSING_LEFT,
    AT_ROWS,
    AT_TO_LEFT,
    AT_TO_RIGHT,
    FIELDS,
    NONE,
)


@triton.jit
def store_child(child, begin, rows, levels, is_counted):
    for field in tl.static_range(FIELDS):
        tl.store(child + field, 0)
    tl.store(child + AT_BEGIN, begin)
    tl.store(child + AT_ROWS, rows)
    tl.store(child + AT_LEVELS, levels)
    tl.store(child + AT_FEATURE, -1)
    tl.store(child + AT_IS_COUNTED, is_counted.to(tl.int32))


@triton.jit
def is_searched(weight, heaviest, rows, levels, min_split, min_leaf, min_weight):
    heavy = (weight.to(tl.float64) >= 2 * min_weight) & (heaviest != weight)
    return heavy & (rows >= min_split) & (rows // 2 >= min_leaf) & (levels > 1)


@triton.jit
def choose_columns(
    sums,
    nodes,
    below,
    weights,
    weights_below,
    min_weight,
    proxies,
    words_of,
    halves_of,
    bytes_of,
    columns,
    slots,
    classes,
    words,
    min_split,
    min_leaf,
    WEIGHTED: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """The first of the columns with the best split, or the one that the node was given, and the two nodes below. One
    that is not split has its rows in the left one."""
    at = tl.program_id(0)
    node = nodes + at * FIELDS
    levels = tl.load(node + AT_LEVELS)
    feature = tl.load(node + AT_FEATURE)
    last = tl.load(node + AT_LAST)
    missing_left = tl.load(node + AT_MISSING_LEFT)
    chosen = (levels > 0) & (feature < 0)
    first = at.to(tl.int64) * columns
    proxy = tl.full((1,), float("-inf"), tl.float64)
    of = tl.full((1,), -1, tl.int32)
    for begin in range(0, tl.where(chosen, columns, 0), COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        there = column < columns
        there = there & (tl.load(words_of + (first + column) * 6 + 2, mask=there, other=0) != 0)
        each = tl.load(proxies + (first + column) * 3, mask=there, other=float("-inf"))
        best = tl.max(each, 0)
        best_of = tl.min(tl.where(there & (each == best), column, NONE), 0)
        of = tl.where(best > proxy, best_of, of)
        proxy = tl.where(best > proxy, best, proxy)
    column = tl.max(of, 0)
    chosen = chosen & (column >= 0)
    feature = tl.where(chosen, column, feature)
    last = tl.load(halves_of + (first + column) * 12 + 8, mask=chosen, other=0).to(tl.int32) + tl.where(chosen, 0, last)
    given = tl.where(chosen, 0, missing_left)
    missing_left = tl.load(bytes_of + (first + column) * 24 + 21, mask=chosen, other=0).to(tl.int32) + given

    split = (levels > 0) & (feature >= 0)
    word = tl.arange(0, WORDS)
    there = word < words
    both = tl.load(weights + at * words + word, mask=there, other=0)
    line = sums + ((first + feature) * words + word) * slots
    left = tl.load(line + last, mask=there & split, other=0)
    left += tl.load(line + slots - 1, mask=there & split & (missing_left != 0), other=0)
    left = tl.where(split, left, both)
    right = both - left
    tl.store(weights_below + 2 * at * words + word, left, mask=there)
    tl.store(weights_below + (2 * at + 1) * words + word, right, mask=there)
    of_class = word < classes
    weight_left = tl.sum(tl.where(of_class, left, 0), 0)
    weight_right = tl.sum(tl.where(of_class, right, 0), 0)
    rows_left = weight_left
    rows_right = weight_right
    if WEIGHTED:
        rows_left = tl.sum(tl.where(word == classes, left, 0), 0)
        rows_right = tl.sum(tl.where(word == classes, right, 0), 0)
    heaviest_left = tl.max(tl.where(of_class, left, 0), 0)
    heaviest_right = tl.max(tl.where(of_class, right, 0), 0)
    least = tl.load(min_weight)
    searched_left = split & is_searched(weight_left, heaviest_left, rows_left, levels, min_split, min_leaf, least)
    searched_right = split & is_searched(weight_right, heaviest_right, rows_right, levels, min_split, min_leaf, least)
    searched = searched_left | searched_right
    begin = tl.load(node + AT_BEGIN)
    store_child(
        below + 2 * at * FIELDS,
        begin,
        rows_left,
        tl.where(searched_left, levels - 1, 0),
        searched & (rows_left < rows_right),
    )
    store_child(
        below + (2 * at + 1) * FIELDS,
        begin + rows_left,
        rows_right,
        tl.where(searched_right, levels - 1, 0),
        searched & (rows_right <= rows_left),
    )
    tl.store(node + AT_FEATURE, tl.where(split, feature, -1))
    tl.store(node + AT_LAST, last)
    tl.store(node + AT_MISSING_LEFT, missing_left)
    tl.store(node + AT_LEFT_ROWS, rows_left)
    tl.store(node + AT_TO_LEFT, begin)
    tl.store(node + AT_TO_RIGHT, begin + rows_left)
