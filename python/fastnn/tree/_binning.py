"""Binning at memory speed: scikit-learn's ``_BinMapper``, with the same edges, on the kernels of ``src/cpp/tree/binning``.

Depends on scikit-learn's private ``_BinMapper`` for its parameters and attributes; what it computes is the same from
version 1.9 on. For the quantiles of older versions, and of samples with weights, scikit-learn's own function is called.
"""

from __future__ import annotations

import numpy as np
import sklearn
from sklearn.ensemble._hist_gradient_boosting import binning as _reference
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted

from fastnn import _cpu

_SAME_QUANTILES = tuple(int(part) for part in sklearn.__version__.split(".")[:2]) >= (1, 9)


def describe(X: np.ndarray) -> tuple:
    """``X`` (rows, columns; float32 or float64) as the kernels take it; a copy must be kept alive by the caller."""
    item = X.itemsize
    return X.ctypes.data, X.dtype == np.float32, *X.shape, X.strides[0] // item, X.strides[1] // item


def readable(X: np.ndarray) -> np.ndarray:
    """``X`` itself where the kernels can read it in place: float32 or float64, native, its strides whole elements."""
    if X.dtype not in (np.float32, np.float64) or any(step % X.itemsize for step in X.strides) or not X.dtype.isnative:
        return np.ascontiguousarray(X, dtype=np.float64)
    return X


def bin_edges(X: np.ndarray, max_bins: int = 255, *, sample: np.ndarray | None = None, skip=None) -> list[np.ndarray]:
    """The edges between the bins of each column of ``X`` (float32 or float64; NaN is missing).

    As scikit-learn's ``_find_binning_thresholds``: midpoints where a column has at most ``max_bins`` distinct values,
    else the quantiles 1 / max_bins, 2 / max_bins, ... by numpy's ``"averaged_inverted_cdf"``, each once. ``sample`` are
    the rows to look at (all), ``skip`` marks columns to leave out, whose entry is empty.
    """
    X = readable(X)
    rows, columns = X.shape
    if sample is not None:
        sample = np.ascontiguousarray(sample, dtype=np.int64)
    if skip is not None:
        skip = np.ascontiguousarray(skip, dtype=np.uint8)
    quantiles = np.linspace(0, 100, num=max_bins + 1)[1:-1] / 100
    edges = np.empty((columns, max_bins - 1))
    counts = np.empty(columns, dtype=np.int32)
    _cpu.bin_edges(
        describe(X),
        0 if sample is None else sample.ctypes.data,
        rows if sample is None else len(sample),
        0 if skip is None else skip.ctypes.data,
        max_bins,
        quantiles.ctypes.data,
        edges.ctypes.data,
        counts.ctypes.data,
    )
    return [column[:count].copy() for column, count in zip(edges, counts.tolist(), strict=True)]


def empty_bins(rows: int, columns: int) -> np.ndarray:
    """An array of uint8 in Fortran order, to be filled; behind its last bin there are 64 bytes of its own memory."""
    return np.empty(rows * columns + 64, dtype=np.uint8)[: rows * columns].reshape((rows, columns), order="F")


def bin_columns(X: np.ndarray, edges: list[np.ndarray], missing: int = 255, categorical=None) -> np.ndarray:
    """The bins of ``X`` (rows, columns), uint8 in Fortran order: bin i where edges[i - 1] < x <= edges[i].

    NaN goes to the bin ``missing``, and in a categorical column also what is negative; there the edges are the
    categories. The array is one of :func:`empty_bins`.
    """
    X = readable(X)
    rows, columns = X.shape
    if len(edges) != columns:
        raise ValueError(f"bin_columns: edges: expected one array for each of {columns} columns, got {len(edges)}")
    offsets = np.zeros(columns + 1, dtype=np.int64)
    np.cumsum([len(column) for column in edges], out=offsets[1:])
    flat = np.ascontiguousarray(np.concatenate([np.empty(0), *edges]), dtype=np.float64)
    if categorical is not None:
        categorical = np.ascontiguousarray(categorical, dtype=np.uint8)
    out = empty_bins(rows, columns)
    _cpu.bin_columns(
        describe(X),
        flat.ctypes.data,
        offsets.ctypes.data,
        0 if categorical is None else categorical.ctypes.data,
        missing,
        out.ctypes.data,
        rows,
    )
    return out


def weighted_edges(column: np.ndarray, weight: np.ndarray, max_bins: int) -> np.ndarray:
    """The edges of a column whose rows have weights, as scikit-learn's ``_find_binning_thresholds``, with its roundings.

    That one sorts the column once for each quantile; this one sorts it once.
    """
    looked_at = ~np.isnan(column) & (weight != 0)
    values, weights = column[looked_at], weight[looked_at]
    order = np.argsort(values)
    values, weights = values[order], weights[order]
    distinct = np.count_nonzero(values[1:] != values[:-1]) + 1
    if not _SAME_QUANTILES or column.dtype != np.float64 or distinct <= max_bins:
        return _reference._find_binning_thresholds(column, max_bins, sample_weight=weight)
    order = np.argsort(values)  # as there: what is equal may change places, and with it the sums of weights
    sums = np.cumsum(weights[order])
    ranks = np.linspace(0, 100, num=max_bins + 1)[1:-1] / 100 * sums[-1]
    last = len(values) - 1
    at = np.minimum(np.searchsorted(sums, ranks), last)
    here, next_one = values[order[at]], values[order[np.minimum(at + 1, last)]]
    edges = np.where(sums[at] - ranks > np.finfo(np.float64).eps, here, (here + next_one) / 2)
    return np.minimum(np.unique(edges), _reference.ALMOST_INF)


class BinMapper(_reference._BinMapper):
    """scikit-learn's ``_BinMapper`` with the same parameters, attributes and bins; float32 is not copied to float64."""

    def fit(self, X, y=None, sample_weight=None):
        """Finds the edges; see ``_BinMapper.fit``."""
        if not _SAME_QUANTILES:
            return super().fit(X, y) if sample_weight is None else super().fit(X, y, sample_weight=sample_weight)
        if not 3 <= self.n_bins <= 256:
            raise ValueError(f"n_bins={self.n_bins} should be no smaller than 3 and no larger than 256.")
        X = check_array(X, dtype=[np.float64, np.float32], ensure_all_finite=False)
        return self.fit_sample(X, *self.draw(X.shape[0], sample_weight))

    def draw(self, rows, sample_weight=None):
        """The rows that the edges are found from (None: all), and their weights."""
        rng = check_random_state(self.random_state)
        if self.subsample is None or rows <= self.subsample:
            return None, sample_weight
        share = None if sample_weight is None else sample_weight / np.sum(sample_weight)
        # Drawn by their weights, so that they have none any more.
        return rng.choice(rows, self.subsample, p=share, replace=True), None

    def fit_sample(self, X, sample=None, sample_weight=None):
        """The edges of the rows ``sample`` of ``X``, of all where it is None."""
        columns = X.shape[1]
        max_bins = self.n_bins - 1
        categorical = np.zeros(columns, dtype=np.uint8) if self.is_categorical is None else self.is_categorical
        self.is_categorical_ = np.asarray(categorical, dtype=np.uint8)
        known = [None] * columns if self.known_categories is None else self.known_categories
        for f, categories in enumerate(known):
            if self.is_categorical_[f] and categories is None:
                raise ValueError(f"Known categories for feature {f} must be provided.")
            if not self.is_categorical_[f] and categories is not None:
                raise ValueError(f"Feature {f} isn't marked as a categorical feature, but categories were passed.")
        if sample_weight is None:
            edges = bin_edges(X, max_bins, sample=sample, skip=self.is_categorical_)
        else:
            edges = [
                None if self.is_categorical_[f] else weighted_edges(X[:, f], sample_weight, max_bins)
                for f in range(columns)
            ]
        self.missing_values_bin_idx_ = self.n_bins - 1
        self.bin_thresholds_ = [known[f] if self.is_categorical_[f] else edges[f] for f in range(columns)]
        sizes = [len(e) + (not c) for e, c in zip(self.bin_thresholds_, self.is_categorical_.tolist(), strict=True)]
        self.n_bins_non_missing_ = np.array(sizes, dtype=np.uint32)
        return self

    def transform(self, X):
        """The bins of ``X``, uint8 in Fortran order; see ``_BinMapper.transform``."""
        X = check_array(X, dtype=[np.float64, np.float32], ensure_all_finite=False)
        check_is_fitted(self)
        if X.shape[1] != self.n_bins_non_missing_.shape[0]:
            raise ValueError(
                f"This estimator was fitted with {self.n_bins_non_missing_.shape[0]} features but {X.shape[1]} got "
                "passed to transform()"
            )
        return bin_columns(X, self.bin_thresholds_, self.missing_values_bin_idx_, self.is_categorical_)

    def to_sklearn(self):
        """scikit-learn's own mapper with the same state."""
        plain = _reference._BinMapper(**self.get_params(deep=False))
        vars(plain).update(vars(self))
        return plain
