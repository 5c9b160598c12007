"""The search of splits among bins: values to bins, and levels of trees from histograms of classes.

The kernels are those of src/cuda/tree/, level by level, and so are the trees: to the bit the CPU's. Numbers are
integers until a border's quality is computed, in float64 and in the CPU's order of operations. Only the counting is
another: Triton has no shared memory in which to add to a bin. It is a product of matrices of bytes instead, on tensor
cores. With a bin's upper and lower four bits

    count[upper, (class, lower)] = Σ over rows of [row's upper bits are `upper`] · [row's are (class, lower)] · weight

which for two classes is 16 + 32 comparisons a byte of bins, whatever the bins are, and no two threads ever add to one place.
Weights are multiplied in digits of seven bits. Nothing waits for the host between levels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _tree
from .._tree import CANDIDATE, GROUP, NODE
from ._launch import ceil_div, launch
from .tree_binning import bin_rows
from .tree_borders import find_borders
from .tree_children import choose_columns
from .tree_histograms import count_bins, sum_bins
from .tree_nodes import plan_level
from .tree_rows import copy_rows, move_rows

__all__ = ["SplitSearch", "bin_rows", "most_classes"]

_MOST_CLASSES = 64
#: Nodes of a level.
_MOST_NODES = 256
#: Rows: of a program that counts, and those that it multiplies at a time; of one that parts rows.
_COUNTED, _TOGETHER, _MOVED = 4096, 64, 1024
#: Words of a bin that are counted at a time, at most; rows of bins that are summed; columns whose borders are looked at.
_WORDS, _LINES, _COLUMNS = 4, 16, 4


def most_classes() -> int:
    """How many classes the kernels count."""
    return _MOST_CLASSES


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
