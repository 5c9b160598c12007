"""Trees of classes by histogram search on a GPU, where X is a tensor there: the trees that the CPU's search grows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .. import _cpu, _state, backends
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


def _like(X: torch.Tensor) -> torch.Tensor:
    """What the kernels are given lies where X does."""
    return X.new_empty(0, dtype=torch.float32)


def _why_not(estimator: Any, X: torch.Tensor) -> str | None:
    reason = backends.supports("split_search", _like(X))
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
    """The bins of a tensor that :func:`keeps` let stay, or None, counted as a fallback, where this target's tree is the
    CPU's."""
    bins = None
    reason = _reason_against(target, backends.file_of("tree", "most_classes", _like(X)).most_classes())
    if reason is None:
        bins = DeviceBins(X, estimator.max_bins)
        if bins.close:
            reason = "values of neighbouring bins that count as equal, on a GPU"
    if reason is None:
        return bins
    _state.count_fallback(f"tree.{type(estimator).__name__}", reason)
    return None


def _reason_against(target: _exact.Target, most: int) -> str | None:
    if target.y.shape[1] != 1:
        return "several outputs on a GPU"
    if not _exact.fits(target):
        return "rows times classes beyond 2^32"
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


#: Elements that are sorted at a time.
_SORTED = 1 << 25


def edges_of(X: torch.Tensor, max_bins: int) -> list[np.ndarray]:
    """As :func:`~fastnn.tree._binning.bin_edges`, with the same edges, of a float32 tensor without infinities where it is."""
    together = max(1, _SORTED // len(X))
    return [edges for part in X.split(together, dim=1) for edges in _edges_of_few(part, max_bins)]


def _edges_of_few(X: torch.Tensor, max_bins: int) -> list[np.ndarray]:
    values = X.T.contiguous().sort(dim=1).values  # NaN last
    numbers = ~values.isnan()
    first = numbers.clone()  # of those that are equal
    first[:, 1:] &= values[:, 1:] != values[:, :-1]
    distinct = torch.zeros((len(values), max_bins + 1), dtype=torch.float32, device=X.device)
    # The last place is that of all that there is no place for.
    place = torch.where(numbers, first.cumsum(dim=1) - 1, max_bins).clamp_(max=max_bins)
    distinct.scatter_(1, place, values)
    n, distinct_n = (mask.sum(dim=1).cpu().numpy()[:, None] for mask in (numbers, first))
    virtual = n * (np.linspace(0, 100, num=max_bins + 1)[1:-1] / 100) - 1
    before = np.floor(virtual)
    last = np.maximum(n - 1, 0)
    rank = np.clip(before.astype(np.int64), 0, last)
    ranks = np.stack([rank, np.minimum(rank + 1, last)], axis=2).reshape(len(rank), -1)
    found = values.gather(1, torch.from_numpy(ranks).to(X.device)).cpu().numpy().astype(np.float64)
    low, high = found[:, 0::2], found[:, 1::2]
    # As numpy interpolates, for "averaged_inverted_cdf".
    quantiles = high - (high - low) * (1 - np.where(virtual == before, 0.5, 1.0))
    few = distinct.cpu().numpy().astype(np.float64)
    middles = (few[:, :-1] + few[:, 1:]) / 2
    return [
        middles[f, : max(count - 1, 0)] if count <= max_bins else np.unique(quantiles[f])
        for f, count in enumerate(distinct_n[:, 0].tolist())
    ]


class DeviceBins:
    """As :class:`~fastnn.tree._histogram_search.Bins`, of a float32 tensor on a GPU."""

    def __init__(self, X: torch.Tensor, max_bins: int) -> None:
        X = X.to(torch.float32)
        self._kernels = backends.file_of("tree", "bin_rows", _like(X))
        self._shape, self._slots = tuple(X.shape), max_bins + 1
        sample, _ = BinMapper(n_bins=max_bins + 1, random_state=0).draw(len(X))
        looked_at = X if sample is None else X[torch.from_numpy(sample).to(X.device)]
        self._bins, self._least, self._largest = self._kernels.bin_rows(X, edges_of(looked_at, max_bins), self._slots)
        self._least, self._largest = map(np.ascontiguousarray, (self._least, self._largest))
        #: Whether neighbouring bins have values so close that they count as equal: these are not searched here.
        self.close = self._columns(1).close

    def _columns(self, most_nodes: int) -> _cpu.TreeAheadColumns:
        ranges = self._least.ctypes.data, self._largest.ctypes.data
        return _cpu.TreeAheadColumns(*self._shape, self._slots, *ranges, most_nodes)

    def grow(self, target: _exact.Target, settings: _exact.Settings) -> _cpu.ExactTree:
        search = self._kernels.SplitSearch(
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
