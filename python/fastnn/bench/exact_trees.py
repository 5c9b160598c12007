"""Trees and forests by exact search, and extra trees: scikit-learn's own, node for node; and forests by histograms beside
those of other libraries.

THREADS are torch's for single trees (scikit-learn grows a tree on one), and jobs for forests. A DEPTH of 1000 is no limit.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import fastnn

from .benchmark import TREE_PAUSE, Benchmark, Problem, register

_NO_LIMIT = 1000
_DECISIONS = ("feature", "threshold")


@functools.lru_cache(maxsize=2)
def _data(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import make_classification

    x, y = make_classification(rows, columns, random_state=0)
    return x.astype(np.float32), y


def _with_threads(threads: int, call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return call(*args)
        finally:
            torch.set_num_threads(before)

    return run


def _nodes(estimators: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """All that trees decide by."""
    trees = [estimator.tree_ for estimator in estimators]
    return tuple(torch.from_numpy(np.concatenate([getattr(tree, name) for tree in trees])) for name in _DECISIONS)


def _tree(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    import sklearn.tree

    rows, columns, depth, threads = shape
    parameters = {"max_depth": None if depth == _NO_LIMIT else depth, "random_state": 0}

    def of(module: Any) -> Callable[..., Any]:
        return lambda x, y: _nodes([module.DecisionTreeClassifier(**parameters).fit(x, y)])

    contestants = {"fastnn": _with_threads(threads, of(fastnn.tree)), "scikit-learn": of(sklearn.tree)}
    work = 4.0 * rows * columns
    return Problem(lambda: _data(rows, columns), contestants, work, unit="B", peak=None, steady=True)


def _exact_forest(kind: str) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    """Of scikit-learn's class of that name."""

    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        import sklearn.ensemble

        rows, columns, trees, depth, threads = shape
        limit = None if depth == _NO_LIMIT else depth
        parameters = {"n_estimators": trees, "max_depth": limit, "random_state": 0, "n_jobs": threads}

        def of(module: Any) -> Callable[..., Any]:
            return _with_threads(
                threads, lambda x, y: _nodes(getattr(module, kind)(**parameters).fit(x, y).estimators_)
            )

        contestants = {"fastnn": of(fastnn.tree), "scikit-learn": of(sklearn.ensemble)}
        work = 4.0 * rows * columns * trees
        return Problem(lambda: _data(rows, columns), contestants, work, unit="B", peak=None, steady=True)

    return build


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@functools.lru_cache(maxsize=1)
def _split(rows: int, columns: int) -> tuple[np.ndarray, ...]:
    """Rows to fit, their classes, and a quarter as many held out."""
    x, y = _data(rows + rows // 4, columns)
    return x[:rows], y[:rows], x[rows:], y[rows:]


def _forest(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    """Of limited depth, forests by histograms of 255 or 256 bins; else exact ones. The result of the former is the accuracy
    on rows that were held out, since the peers' trees are others."""
    rows, columns, trees, depth, threads = shape
    if depth == _NO_LIMIT:
        return _exact_forest("RandomForestClassifier")(shape, dtype)
    parameters = {"n_estimators": trees, "max_depth": depth, "random_state": 0, "n_jobs": threads}
    makers: dict[str, Callable[[], Any]] = {}
    absent = {}
    makers["fastnn"] = lambda: fastnn.tree.RandomForestClassifier(max_bins=255, **parameters)
    # The fast ones alone: scikit-learn takes ten times as long.
    if _installed("scikit-learn-intelex"):
        ensemble = importlib.import_module("sklearnex.ensemble")
        makers["scikit-learn-intelex"] = lambda: ensemble.RandomForestClassifier(max_bins=256, **parameters)
    else:
        absent["scikit-learn-intelex"] = "not installed"
    if _installed("xgboost"):
        xgboost = importlib.import_module("xgboost")
        share = int(np.sqrt(columns)) / columns
        makers["XGBoost"] = lambda: xgboost.XGBRFClassifier(
            n_estimators=trees, max_depth=depth, max_bin=256, colsample_bynode=share, random_state=0, n_jobs=threads
        )
    else:
        absent["XGBoost"] = "not installed"

    def fit(make: Callable[[], Any]) -> Callable[..., Any]:
        def call(x: np.ndarray, y: np.ndarray, x_held: np.ndarray, y_held: np.ndarray) -> torch.Tensor:
            found = make().fit(x, y).predict(x_held)
            return torch.tensor([float((found == y_held).mean())], dtype=torch.float64)

        return _with_threads(threads, call)

    return Problem(
        lambda: _split(rows, columns),
        {name: fit(make) for name, make in makers.items()},
        4.0 * rows * columns * trees,
        unit="B",
        peak=None,
        absent=absent,
        tolerance=0.005,
        pause=TREE_PAUSE,
        steady=True,
    )


def _small(load: str, name: str) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        from sklearn import datasets, ensemble, tree

        x, y = getattr(datasets, load)(return_X_y=True)
        theirs = getattr(ensemble if "Forest" in name else tree, name)
        ours = getattr(fastnn.tree, name)
        (threads,) = shape

        def fit(kind: Any) -> Callable[..., Any]:
            def call(x: np.ndarray, y: np.ndarray) -> torch.Tensor:
                estimator = kind(random_state=0).fit(x, y)
                return torch.from_numpy(estimator.feature_importances_)

            return _with_threads(threads, call)

        contestants = {"fastnn": fit(ours), "scikit-learn": fit(theirs)}
        return Problem(lambda: (x, y), contestants, float(x.nbytes), unit="B", peak=None, steady=True)

    return build


_FLOAT32 = (torch.float32,)
_A, _B, _C = (100_000, 20), (1_000_000, 20), (10_000, 500)
register(
    Benchmark(
        "exact_tree",
        "ROWSxCOLUMNSxDEPTHxTHREADS",
        tuple((*size, depth, threads) for size in (_A, _C) for depth in (8, _NO_LIMIT) for threads in (1, 2)),
        _tree,
        _FLOAT32,
    )
)
for _name, _build in (("forest", _forest), ("extra_trees", _exact_forest("ExtraTreesClassifier"))):
    register(
        Benchmark(
            _name,
            "ROWSxCOLUMNSxTREESxDEPTHxTHREADS",
            tuple((*_A, 100, depth, threads) for depth in (8, _NO_LIMIT) for threads in (1, 2)),
            _build,
            _FLOAT32,
        )
    )
for _load in ("digits", "breast_cancer"):
    for _kind in ("DecisionTreeClassifier", "RandomForestClassifier"):
        _what = "tree" if _kind.startswith("Decision") else "forest"
        register(Benchmark(f"{_load}_{_what}", "THREADS", ((1,), (2,)), _small(f"load_{_load}", _kind), _FLOAT32))
