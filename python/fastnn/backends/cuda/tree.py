"""The search of splits among bins on CUDA tensors: values to bins, and levels of trees from histograms of classes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ... import _cpu
from . import module, where

#: Columns of bins come in groups of so many.
_GROUP = 32
#: The histograms of one search take no more memory than this, if those of one node do not.
_MOST_BYTES = 1 << 30
_NODE, _WEIGHT, _CANDIDATE = _cpu.tree_ahead_sizes


def most_classes() -> int:
    """How many classes the kernels count."""
    return module().tree_most_classes


def bin_rows(x: Tensor, edges: list[np.ndarray], slots: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """The bins of a float32 matrix of any strides, and the least and the largest value in each.

    A value is in bin i of its column where edges[i - 1] < x <= edges[i], of float64 edges in ascending order, fewer than
    ``slots`` - 1; NaN is in bin ``slots`` - 1. Bins are uint8, (rows, columns padded to a multiple of 32); the ranges
    float32 (columns, slots) on the CPU, infinity and -infinity where nothing is.
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
    on_device = torch.from_numpy(table).to(x.device)
    bins = torch.empty((rows, -(-columns // _GROUP) * _GROUP), dtype=torch.uint8, device=x.device)
    ranges = torch.empty((2, columns, slots), dtype=torch.int32, device=x.device)
    ranges[0] = -1
    ranges[1] = 0
    module().tree_bin_rows(
        x.data_ptr(),
        rows,
        columns,
        *x.stride(),
        slots,
        on_device.data_ptr(),
        counts.data_ptr(),
        bins.data_ptr(),
        ranges[0].data_ptr(),
        ranges[1].data_ptr(),
        **where(x),
    )
    bits = ranges.cpu().numpy().view(np.uint32)
    nothing = bits[0] > bits[1]
    values = np.where(bits >> 31, bits ^ np.uint32(1 << 31), ~bits).view(np.float32)
    return bins, np.where(nothing, np.float32(np.inf), values[0]), np.where(nothing, np.float32(-np.inf), values[1])


class SplitSearch:
    """The search of a tree of ``columns`` columns in ``bins``, by :func:`bin_rows`: what ``_cpu.tree_grow_ahead`` calls.

    ``codes`` are the rows' classes, from 0 to ``classes`` - 1, and ``weights`` whole numbers below 2^24, or None for 1
    each; rows of weight 0 are left out. The rows of a node lie together and change places with every search.
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
    ) -> None:
        self._bins, self._columns, self._slots, self._classes = bins, columns, slots, classes
        self._weighted = weights is not None
        self._limits = min_split, min_leaf, min_weight
        words = classes + self._weighted
        bytes_of_node = bins.shape[1] * words * slots * 4
        self.most_nodes = module().tree_most_nodes
        while self.most_nodes > 1 and self.most_nodes * bytes_of_node * 5 // 2 > _MOST_BYTES:
            self.most_nodes //= 2
        kept = np.arange(len(codes)) if weights is None else np.flatnonzero(weights)
        order = np.empty((len(kept), 2), dtype=np.int32)
        order[:, 0] = kept
        order[:, 1] = codes[kept].astype(np.int32) | (256 if weights is None else weights[kept].astype(np.int32) << 8)
        self._order = torch.from_numpy(order).to(bins.device)
        self._spare = torch.empty_like(self._order)

    def __call__(self, roots: bytes, weights: bytes, levels: int, rows: int) -> tuple[np.ndarray, ...]:
        device, count = self._bins.device, len(roots) // _NODE
        searched = count * (2**levels - 1)
        reached = count * (2 ** (levels + 1) - 1)
        nodes = torch.empty(reached * _NODE, dtype=torch.uint8, device=device)
        weights_of = torch.empty(reached * (self._classes + self._weighted) * _WEIGHT, dtype=torch.uint8, device=device)
        for to, given in ((nodes, roots), (weights_of, weights)):
            to[: len(given)].copy_(torch.frombuffer(bytearray(given), dtype=torch.uint8))
        candidates = torch.empty(searched * self._columns * _CANDIDATE, dtype=torch.uint8, device=device)
        sizes = rows, self._columns, self._slots, self._classes, self._weighted, count, levels
        workspace = torch.empty(module().tree_split_search_workspace(*sizes), dtype=torch.uint8, device=device)
        module().tree_split_search(
            *sizes,
            *self._limits,
            self._bins.data_ptr(),
            self._order.data_ptr(),
            self._spare.data_ptr(),
            nodes.data_ptr(),
            weights_of.data_ptr(),
            candidates.data_ptr(),
            workspace.data_ptr(),
            **where(self._bins),
        )
        return nodes.cpu().numpy(), weights_of.cpu().numpy(), candidates.cpu().numpy()
