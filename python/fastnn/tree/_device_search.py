"""Trees of classes by histogram search on a GPU, where X is a tensor there: the trees that the CPU's search grows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .. import _cpu, _state, backends
from ..backends import cuda
from ..backends.cuda import tree as kernels
from . import _exact
from ._binning import BinMapper

#: The largest weight of a row, and the largest sum, whose square is exact in float64.
_MOST_WEIGHT, _MOST_SUM = 2**24 - 1, 2**26


def keeps(estimator: Any, X: Any) -> bool:
    """Whether ``X`` is a tensor that the estimator's tree is to be grown from where it is.

    One on a GPU for which there is no kernel is counted as a fallback, and grown from on the CPU.
    """
    if not isinstance(X, torch.Tensor) or estimator.max_bins is None or backends.names_of(X)[0] == "cpu":
        return False
    reason = _why_not(estimator, X)
    if reason is not None:
        _state.count_fallback(f"tree.{type(estimator).__name__}", reason)
    return reason is None


def _why_not(estimator: Any, X: torch.Tensor) -> str | None:
    if "cuda" not in backends.names_of(X):
        return "no kernel for trees but CUDA's"
    reason = cuda.supports("split_search", X.new_empty(0, dtype=torch.float32))
    if reason is not None:
        return reason
    if estimator.splitter != "best" or estimator.criterion != "gini":
        return f"splitter={estimator.splitter!r}, criterion={estimator.criterion!r} on a GPU"
    return None if estimator.monotonic_cst is None else "monotonic constraints on a GPU"


def checked(X: torch.Tensor) -> torch.Tensor:
    """X as float32, with scikit-learn's errors."""
    if X.is_complex():
        raise ValueError(f"Complex data not supported\n{X.dtype}\n")
    if X.dim() != 2:
        raise ValueError(f"Expected 2D array, got {X.dim()}D tensor instead of shape {tuple(X.shape)}")
    for size, name in zip(X.shape, ("sample", "feature"), strict=True):
        if not size:
            raise ValueError(f"Found array with 0 {name}(s) (shape={tuple(X.shape)}) while a minimum of 1 is required.")
    X = X.detach().to(torch.float32)
    if torch.isinf(X).any():
        raise ValueError("Input X contains infinity or a value too large for dtype('float32').")
    return X


def bins_of(estimator: Any, X: torch.Tensor, target: _exact.Target) -> DeviceBins | None:
    """The bins of a tensor that :func:`keeps` let stay, or None, counted as a fallback, where this target's tree is the CPU's."""
    bins = None
    reason = _reason_against(target)
    if reason is None:
        bins = DeviceBins(X, estimator.max_bins)
        if bins.close:
            reason = "values of neighbouring bins that count as equal, on a GPU"
    if reason is None:
        return bins
    _state.count_fallback(f"tree.{type(estimator).__name__}", reason)
    return None


def _reason_against(target: _exact.Target) -> str | None:
    if target.y.shape[1] != 1:
        return "several outputs on a GPU"
    if not _exact.fits(target):
        return "rows times classes beyond 2^32"
    most = kernels.most_classes()
    if target.most_classes > most:
        return f"more than {most} classes on a GPU"
    weights = target.weights
    if weights is None:
        return None if len(target.y) <= _MOST_SUM else "more than 2^26 rows on a GPU"
    if (weights != np.floor(weights)).any() or (weights < 0).any():
        return "weights that are not whole on a GPU"
    if weights.max() > _MOST_WEIGHT or weights.sum() > _MOST_SUM:
        return "weights beyond 2^24, or 2^26 together, on a GPU"
    return None


class DeviceBins:
    """As :class:`~fastnn.tree._histogram_search.Bins`, of a float32 tensor on a GPU. The edges are found on the CPU."""

    def __init__(self, X: torch.Tensor, max_bins: int) -> None:
        X = X.to(torch.float32)
        self._shape, self._slots = tuple(X.shape), max_bins + 1
        mapper = BinMapper(n_bins=max_bins + 1, random_state=0)
        sample, _ = mapper.draw(len(X))
        looked_at = X if sample is None else X[torch.from_numpy(sample).to(X.device)]
        mapper.fit_sample(looked_at.cpu().numpy())
        self._bins, self._least, self._largest = kernels.bin_rows(X, mapper.bin_thresholds_, self._slots)
        self._least, self._largest = map(np.ascontiguousarray, (self._least, self._largest))
        #: Whether neighbouring bins have values so close that they count as equal: these are not searched here.
        self.close = self._columns(1).close

    def _columns(self, most_nodes: int) -> _cpu.TreeAheadColumns:
        ranges = self._least.ctypes.data, self._largest.ctypes.data
        return _cpu.TreeAheadColumns(*self._shape, self._slots, *ranges, most_nodes)

    def grow(self, target: _exact.Target, settings: _exact.Settings) -> _cpu.ExactTree:
        search = kernels.SplitSearch(
            self._bins,
            self._shape[1],
            self._slots,
            target.most_classes,
            target.y[:, 0],
            target.weights,
            min_split=settings.min_samples_split,
            min_leaf=settings.min_samples_leaf,
            min_weight=settings.min_weight_leaf,
        )
        columns = self._columns(search.most_nodes)
        return _cpu.tree_grow_ahead(columns, target.arguments(), settings.arguments(), search)
