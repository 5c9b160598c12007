"""The exact search's kernels on numpy arrays: columns sorted once, trees grown from them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .. import _cpu

CRITERIA = {"gini": 0, "entropy": 1, "log_loss": 1, "squared_error": 2, "poisson": 3, "absolute_error": 4}


def readable(X: np.ndarray) -> np.ndarray:
    """A float32 matrix itself where the kernels can read it in place."""
    if X.strides[0] % 4 or X.strides[1] % 4 or not X.flags.aligned:
        return np.ascontiguousarray(X)
    return X


def presort(X: np.ndarray, threads: int = 0) -> _cpu.TreePresort:
    """The columns of a float32 matrix of any strides, sorted."""
    X = readable(X)
    rows, columns = X.shape
    return _cpu.TreePresort(X.ctypes.data, rows, columns, X.strides[0] // 4, X.strides[1] // 4, threads)


def columns_of(X: np.ndarray, threads: int = 0) -> _cpu.TreeColumns:
    """The columns of a float32 matrix of any strides, each in one piece: for random splits."""
    X = readable(X)
    rows, columns = X.shape
    return _cpu.TreeColumns(X.ctypes.data, rows, columns, X.strides[0] // 4, X.strides[1] // 4, threads)


class Target(NamedTuple):
    """What is predicted: float64 ``y`` (rows, outputs), codes 0, 1, ... in classification, and float64 weights."""

    criterion: str
    y: np.ndarray
    classes: np.ndarray | None
    weights: np.ndarray | None

    @property
    def most_classes(self) -> int:
        return 1 if self.classes is None else int(self.classes.max())

    def arguments(self) -> tuple:
        return (
            CRITERIA[self.criterion],
            self.y.shape[1],
            0 if self.classes is None else self.classes.ctypes.data,
            self.most_classes,
            self.y.ctypes.data,
            0 if self.weights is None else self.weights.ctypes.data,
        )


class Settings(NamedTuple):
    """The parameters of a tree, as numbers. ``max_leaf_nodes`` of -1 grows depth first; 0 threads are torch's."""

    max_features: int
    max_depth: int
    min_samples_split: int
    min_samples_leaf: int
    max_leaf_nodes: int
    min_weight_leaf: float
    min_impurity_decrease: float
    monotonic: np.ndarray | None
    seed: int
    threads: int

    def arguments(self) -> tuple:
        return tuple(self._replace(monotonic=0 if self.monotonic is None else self.monotonic.ctypes.data))


def fits(target: Target) -> bool:
    """Whether rows and classes fit into the kernels' 32-bit keys."""
    classes = target.most_classes if target.y.shape[1] == 1 else 1
    bits = max(1, (classes - 1).bit_length()) if classes <= 65536 else 1
    return target.y.shape[0] < 2 ** min(31, 32 - bits) - 1


def grow_random(columns: _cpu.TreeColumns, target: Target, settings: Settings) -> _cpu.ExactTree:
    return _cpu.tree_grow_random(columns, target.arguments(), settings.arguments())


def grow(sorted_columns: _cpu.TreePresort, target: Target, settings: Settings) -> _cpu.ExactTree:
    return _cpu.tree_grow_exact(sorted_columns, target.arguments(), settings.arguments())
