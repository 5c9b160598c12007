"""The search of splits among bins on CUDA tensors: values to bins, and levels of trees from histograms of classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _tree
from . import module, where


def most_classes() -> int:
    """How many classes the kernels count."""
    return module().tree_most_classes


def _put(x: Tensor, edges: Tensor, counts: Tensor, bins: Tensor, ranges: Tensor) -> None:
    module().tree_bin_rows(
        x.data_ptr(),
        *x.shape,
        *x.stride(),
        edges.shape[1],
        edges.data_ptr(),
        counts.data_ptr(),
        bins.data_ptr(),
        ranges[0].data_ptr(),
        ranges[1].data_ptr(),
        **where(x),
    )


def bin_rows(x: Tensor, edges: list[np.ndarray], slots: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """See _tree.bin_rows."""
    return _tree.bin_rows(_put, x, edges, slots)


class SplitSearch(_tree.SplitSearch):
    """See _tree.SplitSearch."""

    def __init__(self, *args: Any, **limits: Any) -> None:
        super().__init__(*args, most_nodes=module().tree_most_nodes, **limits)

    def search(self, nodes: Tensor, weights: Tensor, candidates: Tensor, roots: int, levels: int, rows: int) -> None:
        sizes = rows, self.columns, self.slots, self.classes, self.weighted, roots, levels
        workspace = nodes.new_empty(module().tree_split_search_workspace(*sizes), dtype=torch.uint8)
        module().tree_split_search(
            *sizes,
            *self.limits,
            self.bins.data_ptr(),
            self.order.data_ptr(),
            self.spare.data_ptr(),
            nodes.data_ptr(),
            weights.data_ptr(),
            candidates.data_ptr(),
            workspace.data_ptr(),
            **where(self.bins),
        )
