"""How the kernels that search splits on a GPU are called, in CUDA C++ and in Triton: what lies where, and what the host
does."""

from __future__ import annotations

import abc
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .. import _cpu

#: Columns of bins come in groups of so many.
GROUP = 32
#: The histograms of one search take no more memory than this, if those of one node do not.
MOST_BYTES = 1 << 30
#: Bytes of a node, of one of its weights, and of a candidate: see src/cpp/tree/ahead_nodes.hpp.
NODE, WEIGHT, CANDIDATE = _cpu.tree_ahead_sizes


def bin_rows(
    put: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None], x: Tensor, edges: list[np.ndarray], slots: int
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """The bins of a float32 matrix of any strides, and the least and the largest value in each.

    A value is in bin i of its column where edges[i - 1] < x <= edges[i], of float64 edges in ascending order, fewer than
    ``slots`` - 1; NaN is in bin ``slots`` - 1. Bins are uint8, (rows, columns padded to a multiple of 32); the ranges
    float32 (columns, slots) on the CPU, infinity and -infinity where nothing is.

    ``put`` is the kernel: (x, edges (columns, slots), how many a column has, bins, ranges (2, columns, slots)). Ranges
    are floats as unsigned integers in the same order, 2^32 - 1 and 0 at first.
    """
    rows, columns = x.shape
    table = np.zeros((columns, slots), dtype=np.float32)
    for row, column in zip(table, edges, strict=True):
        # The largest float32 that is no larger: no float32 lies between it and the edge.
        with np.errstate(over="ignore"):
            rounded = column.astype(np.float32)
        above = rounded > column
        rounded[above] = np.nextafter(rounded[above], np.float32(-np.inf))
        row[: len(column)] = rounded
    counts = torch.tensor([len(column) for column in edges], dtype=torch.int32, device=x.device)
    bins = torch.empty((rows, -(-columns // GROUP) * GROUP), dtype=torch.uint8, device=x.device)
    ranges = torch.empty((2, columns, slots), dtype=torch.int32, device=x.device)
    ranges[0] = -1
    ranges[1] = 0
    put(x, torch.from_numpy(table).to(x.device), counts, bins, ranges)
    bits = ranges.cpu().numpy().view(np.uint32)
    nothing = bits[0] > bits[1]
    values = np.where(bits >> 31, bits ^ np.uint32(1 << 31), ~bits).view(np.float32)
    return bins, np.where(nothing, np.float32(np.inf), values[0]), np.where(nothing, np.float32(-np.inf), values[1])


class SplitSearch(abc.ABC):
    """The search of a tree of ``columns`` columns in ``bins``, by :func:`bin_rows`: what ``_cpu.tree_grow_ahead`` calls.

    ``codes`` are the rows' classes, from 0 to ``classes`` - 1, and ``weights`` whole numbers below 2^24, or None for 1
    each; rows of weight 0 are left out. The rows of a node lie together and change places with every search.
    ``most_nodes`` is how many nodes of a level the kernels search.
    """

    def __init__(
        self,
        bins: Tensor,
        columns: int,
        slots: int,
        classes: int,
        codes: np.ndarray,
        weights: np.ndarray | None,
        *,
        min_split: int,
        min_leaf: int,
        min_weight: float,
        most_nodes: int,
    ) -> None:
        self.bins, self.columns, self.slots, self.classes = bins, columns, slots, classes
        self.weighted = weights is not None
        self.limits = min_split, min_leaf, min_weight
        bytes_of_node = bins.shape[1] * self.words * slots * 4
        self.most_nodes = most_nodes
        while self.most_nodes > 1 and self.most_nodes * bytes_of_node * 5 // 2 > MOST_BYTES:
            self.most_nodes //= 2
        kept = np.arange(len(codes)) if weights is None else np.flatnonzero(weights)
        order = np.empty((len(kept), 2), dtype=np.uint32)
        order[:, 0] = kept
        order[:, 1] = codes[kept].astype(np.uint32) | (256 if weights is None else weights[kept].astype(np.uint32) << 8)
        #: Rows, and what they add to their bins: the class in the lower 8 bits, the weight above.
        self.order = torch.from_numpy(order.view(np.int32)).to(bins.device)
        self.spare = torch.empty_like(self.order)

    @property
    def words(self) -> int:
        """Of a bin: what the rows of each class weigh and, where that is not 1 each, how many they are."""
        return self.classes + self.weighted

    def __call__(self, roots: bytes, weights: bytes, levels: int, rows: int) -> tuple[np.ndarray, ...]:
        count = len(roots) // NODE
        searched = count * (2**levels - 1)
        reached = count * (2 ** (levels + 1) - 1)
        nodes, weights_of, candidates = (
            torch.empty(size, dtype=torch.uint8, device=self.bins.device)
            for size in (reached * NODE, reached * self.words * WEIGHT, searched * self.columns * CANDIDATE)
        )
        for to, given in ((nodes, roots), (weights_of, weights)):
            to[: len(given)].copy_(torch.frombuffer(bytearray(given), dtype=torch.uint8))
        self.search(nodes, weights_of, candidates, count, levels, rows)
        return nodes.cpu().numpy(), weights_of.cpu().numpy(), candidates.cpu().numpy()

    @abc.abstractmethod
    def search(self, nodes: Tensor, weights: Tensor, candidates: Tensor, roots: int, levels: int, rows: int) -> None:
        """Some levels of trees, whose roots lie first in ``nodes`` and ``weights``, as bytes: see ahead_nodes.hpp."""
