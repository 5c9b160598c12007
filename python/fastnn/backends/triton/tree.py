"""The search of splits among bins: values to bins, and levels of trees from histograms of classes.

The kernels are those of src/cuda/tree/, level by level, and so are the trees: to the bit the CPU's. Numbers are integers until a
border's quality is computed, in float64 and in the CPU's order of operations. Only the counting is another: Triton has no
shared memory in which to add to a bin. It is a product of matrices of bytes instead, on tensor cores. With a bin's upper and
lower four bits

    count[upper, (class, lower)] = Σ over rows of [row's upper bits are `upper`] · [row's are (class, lower)] · weight

which for two classes is 16 + 32 comparisons a byte of bins, whatever the bins are, and no two threads ever add to one place.
Weights are multiplied in digits of seven bits. Nothing waits for the host between levels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _tree
from .._tree import CANDIDATE, GROUP, NODE
from ._launch import ceil_div, launch

_MOST_CLASSES = 64
#: Nodes of a level.
_MOST_NODES = 256
#: Rows: of a program that counts, and those that it multiplies at a time; of one that parts rows; of one that makes bins.
_COUNTED, _TOGETHER, _MOVED, _BINNED = 4096, 64, 1024, 64
#: Words of a bin that are counted at a time, at most; rows of bins that are summed; columns whose borders are looked at.
_WORDS, _LINES, _COLUMNS = 4, 16, 4

#: The numbers of a node, and where they are.
_FIELDS = tl.constexpr(NODE // 4)
_BEGIN, _ROWS, _LEVELS, _FEATURE, _LAST = (tl.constexpr(i) for i in range(5))
_MISSING_LEFT, _LEFT_ROWS, _IS_COUNTED, _TO_LEFT, _TO_RIGHT = (tl.constexpr(i) for i in range(5, 10))
_NONE = tl.constexpr((1 << 31) - 1)


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


@triton.jit(do_not_specialize=["count"])
def plan_level(nodes, plan, count, COUNTED: tl.constexpr, MOVED: tl.constexpr, NODES: tl.constexpr):
    """For each node the pieces of rows up to its own: of those that are counted, and of all."""
    i = tl.arange(0, NODES)
    inside = i < count
    rows = tl.load(nodes + i * _FIELDS + _ROWS, mask=inside, other=0)
    is_counted = tl.load(nodes + i * _FIELDS + _IS_COUNTED, mask=inside, other=0)
    counted = tl.where(is_counted != 0, (rows + (COUNTED - 1)) // COUNTED, 0)
    tl.store(plan + i, tl.where(inside, tl.cumsum(counted, 0), _NONE))
    tl.store(plan + NODES + i, tl.where(inside, tl.cumsum((rows + (MOVED - 1)) // MOVED, 0), _NONE))


@triton.jit
def node_of(plan, number, NODES: tl.constexpr):
    """Whose a piece is (of no node: the number of nodes or more), and how many of the node's come before it."""
    node = tl.sum((tl.load(plan + tl.arange(0, NODES)) <= number).to(tl.int32), 0)
    return node, number - tl.load(plan + node - 1, mask=node > 0, other=0)


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
    rows = tl.minimum(tl.load(nodes + node * _FIELDS + _ROWS) - before * PIECE, PIECE)
    order += tl.load(nodes + node * _FIELDS + _BEGIN).to(tl.int64) + before * PIECE
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
    """Sums over the bins up to each (the last, of missing values, alone), of what was counted; of the other node of two they are
    its parent's less these. A line is a word of a column."""
    blocks = tl.cdiv(lines, LINES)
    place = tl.program_id(0) // blocks
    node = place
    if not TOP:
        node = place * 2 + (tl.load(nodes + place * 2 * _FIELDS + _IS_COUNTED) == 0).to(tl.int32)
    if tl.load(nodes + node * _FIELDS + _IS_COUNTED) == 0:
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
        searched = tl.load(nodes + sibling * _FIELDS + _LEVELS) > 0
        rest = tl.load(above + of_parent, mask=inside & searched, other=0) - own
        tl.store(sums + (sibling.to(tl.int64) * lines + line) * slots + slot, rest, mask=inside & searched)


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
    return best, tl.min(tl.where(possible & (proxy == best[:, None]), slot, _NONE), 1)


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
    """The best border of some columns of a node; of two as good ones that with missing values on the right and of lower bins."""
    blocks = tl.cdiv(columns, COLUMNS)
    node = tl.program_id(0) // blocks
    if tl.load(nodes + node * _FIELDS + _LEVELS) <= 0:
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
    of_rows = tl.load(nodes + node * _FIELDS + _ROWS)
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
    next = tl.min(tl.where(present & (slot > last[:, None]), slot, _NONE), 1)
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


@triton.jit
def store_child(child, begin, rows, levels, is_counted):
    for field in tl.static_range(_FIELDS):
        tl.store(child + field, 0)
    tl.store(child + _BEGIN, begin)
    tl.store(child + _ROWS, rows)
    tl.store(child + _LEVELS, levels)
    tl.store(child + _FEATURE, -1)
    tl.store(child + _IS_COUNTED, is_counted.to(tl.int32))


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
    """The first of the columns with the best split, or the one that the node was given, and the two nodes below. One that is not
    split has its rows in the left one."""
    at = tl.program_id(0)
    node = nodes + at * _FIELDS
    levels = tl.load(node + _LEVELS)
    feature = tl.load(node + _FEATURE)
    last = tl.load(node + _LAST)
    missing_left = tl.load(node + _MISSING_LEFT)
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
        best_of = tl.min(tl.where(there & (each == best), column, _NONE), 0)
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
    begin = tl.load(node + _BEGIN)
    store_child(
        below + 2 * at * _FIELDS,
        begin,
        rows_left,
        tl.where(searched_left, levels - 1, 0),
        searched & (rows_left < rows_right),
    )
    store_child(
        below + (2 * at + 1) * _FIELDS,
        begin + rows_left,
        rows_right,
        tl.where(searched_right, levels - 1, 0),
        searched & (rows_right <= rows_left),
    )
    tl.store(node + _FEATURE, tl.where(split, feature, -1))
    tl.store(node + _LAST, last)
    tl.store(node + _MISSING_LEFT, missing_left)
    tl.store(node + _LEFT_ROWS, rows_left)
    tl.store(node + _TO_LEFT, begin)
    tl.store(node + _TO_RIGHT, begin + rows_left)


@triton.jit(do_not_specialize=["count"])
def move_rows(bins, order, spare, nodes, plan, count, step, slots, PIECE: tl.constexpr, NODES: tl.constexpr):
    """Rows to the side where they go, each piece's in their order. Which piece comes first is left to chance, and changes
    nothing: whatever is made of rows are sums of integers."""
    node, before = node_of(plan + NODES, tl.program_id(0), NODES)
    if node >= count:
        return
    nodes += node * _FIELDS
    i = tl.arange(0, PIECE)
    rows = tl.load(nodes + _ROWS) - before * PIECE
    inside = i < rows
    row = tl.load(order + tl.load(nodes + _BEGIN).to(tl.int64) + before * PIECE + i, mask=inside, other=0)
    feature = tl.load(nodes + _FEATURE)
    bin = tl.load(bins + (row & 0xFFFFFFFF) * step + feature, mask=inside & (feature >= 0), other=0).to(tl.int32)
    missing = (bin == slots - 1) & (tl.load(nodes + _MISSING_LEFT) != 0)
    left = inside & ((feature < 0) | (bin <= tl.load(nodes + _LAST)) | missing)
    lefts = tl.cumsum(left.to(tl.int32), 0) - left.to(tl.int32)  # before
    on_left = tl.sum(left.to(tl.int32), 0)
    to_left = tl.atomic_add(nodes + _TO_LEFT, on_left, sem="relaxed")
    to_right = tl.atomic_add(nodes + _TO_RIGHT, tl.minimum(rows, PIECE) - on_left, sem="relaxed")
    to = tl.where(left, to_left + lefts, to_right + i - lefts)
    tl.store(spare + to, row, mask=inside)


@triton.jit(do_not_specialize=["count"])
def copy_rows(order, spare, nodes, plan, count, PIECE: tl.constexpr, NODES: tl.constexpr):
    """Back to where they were, the rows of the roots."""
    node, before = node_of(plan + NODES, tl.program_id(0), NODES)
    if node >= count:
        return
    i = before * PIECE + tl.arange(0, PIECE)
    inside = i < tl.load(nodes + node * _FIELDS + _ROWS)
    at = tl.load(nodes + node * _FIELDS + _BEGIN).to(tl.int64) + i
    tl.store(order + at, tl.load(spare + at, mask=inside, other=0), mask=inside)


def most_classes() -> int:
    """How many classes the kernels count."""
    return _MOST_CLASSES


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


def _power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length()


class SplitSearch(_tree.SplitSearch):
    """See _tree.SplitSearch."""

    def __init__(self, bins: Tensor, columns: int, slots: int, classes: int, *rows: Any, **limits: Any) -> None:
        super().__init__(bins, columns, slots, classes, *rows, most_nodes=_MOST_NODES, **limits)
        _, weights = rows
        self._digits = 1 if weights is None else ceil_div(int(weights.max()).bit_length(), 7)

    def search(self, nodes: Tensor, weights: Tensor, candidates: Tensor, roots: int, levels: int, rows: int) -> None:
        on, columns, words, slots = self.bins, self.columns, self.words, self.slots
        min_split, min_leaf, min_weight = self.limits
        # No node has so many rows.
        min_split, min_leaf = min(min_split, (1 << 31) - 1), min(min_leaf, (1 << 31) - 1)
        min_weight = torch.full((1,), min_weight, dtype=torch.float64, device=on.device)
        groups, slots_padded = on.shape[1] // GROUP, max(_power_of_two(slots), 16)
        words_together = min(_power_of_two(words), _WORDS)
        # Nodes at most, and those that are counted: the roots, or one of two.
        most = roots << (levels - 1)
        counted = roots if levels == 1 else max(most // 2, roots)
        counts, *both = (
            torch.empty((n, columns, words, slots), dtype=torch.int32, device=on.device) for n in (counted, most, most)
        )
        plans = torch.empty((levels, 2, _MOST_NODES), dtype=torch.int32, device=on.device)
        nodes, weights = nodes.view(torch.int32), weights.view(torch.int32)
        order, spare = self.order.view(torch.int64), self.spare.view(torch.int64)
        first, count = nodes, roots
        pieces = dict(PIECE=_MOVED, NODES=_MOST_NODES)
        for level in range(levels):
            top = level == 0
            sums, above = both[level % 2], both[1 - level % 2]
            plan = plans[level]
            counted = count if top else count // 2
            counts[:counted].zero_()
            below, weights_below = nodes[count * (NODE // 4) :], weights[count * words :]
            found = [candidates.view(type) for type in (torch.float64, torch.int32, torch.int16, torch.uint8)]
            launch(plan_level, 1, on, nodes, plan, count, COUNTED=_COUNTED, MOVED=_MOVED, NODES=_MOST_NODES)
            launch(
                count_bins,
                (ceil_div(rows if top else rows // 2, _COUNTED) + counted) * groups * ceil_div(words, words_together),
                on,
                on,
                order,
                nodes,
                plan,
                counts,
                count,
                columns,
                groups,
                slots,
                self.classes,
                words,
                TOP=top,
                DIGITS=self._digits,
                UPPER=max(slots_padded // 16, 16),
                WORDS=words_together,
                GROUP=GROUP,
                PIECE=_COUNTED,
                ROWS=_TOGETHER,
                NODES=_MOST_NODES,
            )
            lines = columns * words
            launch(
                sum_bins,
                counted * ceil_div(lines, _LINES),
                on,
                counts,
                sums,
                above,
                nodes,
                lines,
                slots,
                TOP=top,
                LINES=_LINES,
                SLOTS=slots_padded,
            )
            launch(
                find_borders,
                count * ceil_div(columns, _COLUMNS),
                on,
                sums,
                nodes,
                weights,
                min_weight,
                *found,
                columns,
                slots,
                self.classes,
                words,
                min_leaf,
                WEIGHTED=self.weighted,
                COLUMNS=_COLUMNS,
                SLOTS=slots_padded,
                enable_fp_fusion=False,
            )
            launch(
                choose_columns,
                count,
                on,
                sums,
                nodes,
                below,
                weights,
                weights_below,
                min_weight,
                *found,
                columns,
                slots,
                self.classes,
                words,
                min_split,
                min_leaf,
                WEIGHTED=self.weighted,
                COLUMNS=128,
                WORDS=_power_of_two(words),
            )
            moved = ceil_div(rows, _MOVED) + count
            launch(move_rows, moved, on, on, order, spare, nodes, plan, count, on.shape[1], slots, **pieces)
            order, spare = spare, order
            nodes, weights = below, weights_below
            candidates = candidates[count * columns * CANDIDATE :]
            count *= 2
        if levels % 2:
            launch(copy_rows, ceil_div(rows, _MOVED) + roots, on, spare, order, first, plans[0], roots, **pieces)
