"""The best split of every feature, and of all of them."""

from __future__ import annotations

from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import _cpu
from ._exact import CRITERIA, Target, fits, presort
from ._tensors import to_numpy


class BestSplit(NamedTuple):
    """What :func:`best_split` found. Features without a split have NaN thresholds and impurities, and a gain of 0.

    ``thresholds``, ``impurities`` and ``gains`` hold one float64 a feature (F,): where it is split (``x <= threshold`` goes
    left), the impurity of the two sides, each weighted by its share of the rows, and by how much that is below the
    impurity of all rows, which is ``impurity``. ``missing_go_left`` (F,) says where NaN goes. ``feature`` is the first
    of the largest gain, -1 where no feature can be split, and ``threshold`` and ``gain`` are its.
    """

    feature: int
    threshold: float
    gain: float
    impurity: float
    thresholds: Any
    impurities: Any
    gains: Any
    missing_go_left: Any


def best_split(x, y, *, sample_weight=None, n_classes: int | None = None, criterion: str = "gini") -> BestSplit:
    """The best threshold of every feature and the best of all, by exact search.

    Args:
        x: (N, F) or (N,), numpy array or tensor; computed in float32, as scikit-learn's trees are. NaN is missing, and
            goes to the side where the split is better.
        y: (N,). For "gini", "entropy" and "log_loss" classes: integers from 0 to ``n_classes`` - 1, or, where ``n_classes``
            is None, whatever can be sorted. For the other criteria numbers, computed in float64.
        sample_weight: (N,) weights, or None for 1 each. Rows of weight 0 are left out.
        n_classes: how many classes there are.
        criterion: "gini": 1 − Σ p², "entropy" or "log_loss": −Σ p log2 p, "squared_error": the mean squared distance to
            the mean, "absolute_error": the mean distance to the median, "poisson": half the deviance from the mean. (Breiman
            et al., Classification and Regression Trees, 1984.)

    Returns:
        A :class:`BestSplit`; its arrays are torch tensors where ``x`` is one. A threshold is halfway between two neighbouring
        values, which count as one where they are closer than 1e-7; and of equally good ones the first is taken.

    Raises:
        ValueError: for other shapes, lengths, criteria, infinite values, NaN in ``y`` or the weights, no rows, classes
            outside of ``n_classes``, an ``n_classes`` beyond 65536, and strings that are no numbers.
        TypeError: for complex numbers, objects that cannot be read as numbers, and an ``n_classes`` that is no integer.
    """
    if not isinstance(criterion, str) or criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {sorted(CRITERIA)}, got {criterion!r}")
    as_torch = isinstance(x, torch.Tensor)
    x = _real(x, "x", np.float32)
    if x.ndim == 1:
        x = x[:, None]
    if x.ndim != 2:
        raise ValueError(f"x must have 1 or 2 dimensions, got {x.ndim}")
    n = x.shape[0]
    if n == 0 or x.shape[1] == 0:
        raise ValueError(f"x must have rows and columns, got shape {x.shape}")
    if np.isinf(x).any():
        raise ValueError("x must not contain infinity or values beyond float32")
    y, classes = _targets(np.asarray(to_numpy(y)), n_classes, criterion)
    if y.shape != (n,):
        raise ValueError(f"y must have shape ({n},) as x has {n} rows, got {y.shape}")
    weights = None
    if sample_weight is not None:
        weights = np.ascontiguousarray(_real(sample_weight, "sample_weight", np.float64))
        if weights.shape != (n,):
            raise ValueError(f"sample_weight must have shape ({n},) as x has {n} rows, got {weights.shape}")
        if not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError("sample_weight must be finite and not negative")
    target = Target(criterion, y[:, None], classes, weights)
    if not fits(target):
        raise ValueError(f"{n} rows of {target.most_classes} classes are too many: their product must be below 2^32")
    whole, columns = _cpu.tree_best_splits(presort(x), target.arguments())
    found = np.array(columns, dtype=np.float64)
    thresholds, impurities, none = found[:, 0], found[:, 1], found[:, 3] == 0
    gains = np.where(none, 0.0, np.maximum(found[:, 2], 0.0))
    feature = -1 if none.all() else int(np.argmax(np.where(none, -np.inf, gains)))
    arrays = [thresholds, impurities, gains, found[:, 4] != 0]
    if as_torch:
        arrays = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    threshold, gain = (float("nan"), 0.0) if feature < 0 else (float(thresholds[feature]), float(gains[feature]))
    return BestSplit(feature, threshold, gain, whole, *arrays)


def _real(values: Any, name: str, dtype: type) -> np.ndarray:
    """An array of this type; numpy itself would drop the imaginary part of complex numbers."""
    values = np.asarray(to_numpy(values))
    if values.dtype.kind == "c":
        raise TypeError(f"{name} must hold real numbers, got {values.dtype}")
    return values.astype(dtype, copy=False)


#: A table of all classes is kept; more than there are may be given, and this bounds it.
_MOST_CLASSES = 65536


def _targets(y: np.ndarray, n_classes: int | None, criterion: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Numbers, or the codes of classes and how many there are."""
    if y.ndim != 1:
        raise ValueError(f"y must have 1 dimension, got {y.ndim}")
    if criterion in ("squared_error", "absolute_error", "poisson"):
        if n_classes is not None:
            raise ValueError(f"n_classes is for classes, got {n_classes} with criterion={criterion!r}")
        y = np.ascontiguousarray(_real(y, "y", np.float64))
        if not np.isfinite(y).all():
            raise ValueError("y must be finite")
        if criterion == "poisson" and ((y < 0).any() or y.sum() <= 0):
            raise ValueError("y must not be negative, and its sum must be positive, with criterion='poisson'")
        return y, None
    if n_classes is None:
        values, y = np.unique(y, return_inverse=True)
        if (values != values).any():
            raise ValueError("y must not contain NaN")
        n_classes = len(values)
    else:
        if not isinstance(n_classes, Integral):
            raise TypeError(f"n_classes must be an integer, got {n_classes!r}")
        if n_classes > _MOST_CLASSES:
            raise ValueError(f"n_classes must be at most {_MOST_CLASSES}, got {n_classes}")
        codes = np.asarray(y)
        if codes.dtype.kind not in "biu" or (codes.size and (codes.min() < 0 or codes.max() >= n_classes)):
            raise ValueError(f"y must hold integers from 0 to n_classes - 1 = {n_classes - 1}")
        y = codes
    return np.ascontiguousarray(y, dtype=np.float64), np.array([max(n_classes, 1)], dtype=np.int64)
