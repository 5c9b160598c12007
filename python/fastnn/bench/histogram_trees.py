"""Binning, one histogram tree and boosted ones, on make_classification's data: N rows of F features, on T threads.

The peers are scikit-learn's histogram gradient boosting, LightGBM and XGBoost; the last two are the extra
`fastnn[bench]`. All get the same limits: 255 bins, at least 20 rows a leaf, no regularisation, a learning rate of 0.1,
trees that are limited by their depth alone. Arrays of float64 go in, so that a fit includes its validation and binning.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .benchmark import TREE_PAUSE, Benchmark, Problem, register

HELD_OUT = 10_000
_Fit = Callable[[np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]]


@functools.lru_cache(maxsize=1)
def _data(rows: int, features: int) -> tuple[np.ndarray, ...]:
    from sklearn.datasets import make_classification

    X, y = make_classification(rows + HELD_OUT, features, n_informative=10, random_state=0)
    return X[:rows], y[:rows], X[rows:], y[rows:]


def absent_peers() -> dict[str, str]:
    return {
        name: f"not installed: {name}" for name in ("lightgbm", "xgboost") if importlib.util.find_spec(name) is None
    }


@functools.cache
def _runtimes() -> Any:
    """Every OpenMP runtime of the contestants."""
    from threadpoolctl import ThreadpoolController

    for module in ("sklearn.ensemble", "lightgbm", "xgboost"):
        if module not in absent_peers():
            importlib.import_module(module)  # loads them
    return ThreadpoolController()


def _on_threads(threads: int, call: Callable[..., Any]) -> Callable[..., Any]:
    """The call with as many threads in every OpenMP runtime."""
    runtimes = _runtimes()

    def limited(*args: Any) -> Any:
        before = torch.get_num_threads()
        with runtimes.limit(limits=threads, user_api="openmp"):
            torch.set_num_threads(threads)
            try:
                return call(*args)
            finally:
                torch.set_num_threads(before)

    return limited


def _fits(depth: int, trees: int, threads: int, alone: bool) -> dict[str, _Fit]:
    """What fits a model and returns how it predicts classes, by name; `alone`: ours is a DecisionTreeClassifier."""
    ours = {"max_iter": trees, "max_depth": depth, "max_leaf_nodes": None, "early_stopping": False}

    def fastnn(X: np.ndarray, y: np.ndarray) -> Any:
        from fastnn.tree import HistGradientBoostingClassifier

        return HistGradientBoostingClassifier(**ours).fit(X, y).predict

    def one_tree(X: np.ndarray, y: np.ndarray) -> Any:
        from fastnn.tree import DecisionTreeClassifier

        return DecisionTreeClassifier(max_bins=255, max_depth=depth, min_samples_leaf=20).fit(X, y).predict

    def sklearn(X: np.ndarray, y: np.ndarray) -> Any:
        from sklearn.ensemble import HistGradientBoostingClassifier

        return HistGradientBoostingClassifier(**ours).fit(X, y).predict

    def lightgbm(X: np.ndarray, y: np.ndarray) -> Any:
        import lightgbm

        parameters = {
            "objective": "binary",
            "num_threads": threads,
            "max_bin": 255,
            "max_depth": depth,
            "num_leaves": 2**depth,
            "learning_rate": 0.1,
            "min_data_in_leaf": 20,
            "verbosity": -1,
        }
        model = lightgbm.train(parameters, lightgbm.Dataset(X, y, params=parameters), num_boost_round=trees)
        return lambda rows: model.predict(rows) > 0.5

    def xgboost(X: np.ndarray, y: np.ndarray) -> Any:
        import xgboost

        parameters = {
            "objective": "binary:logistic",
            "nthread": threads,
            "tree_method": "hist",
            "max_depth": depth,
            "eta": 0.1,
            "reg_lambda": 0.0,
        }
        matrix = xgboost.QuantileDMatrix(X, y, max_bin=256, nthread=threads)
        model = xgboost.train(parameters, matrix, num_boost_round=trees)
        return lambda rows: model.predict(xgboost.DMatrix(rows)) > 0.5

    mine = one_tree if alone else fastnn
    return {"fastnn": mine, "scikit-learn": sklearn, "lightgbm": lightgbm, "xgboost": xgboost}


def checked_once(fit: _Fit, held_out: np.ndarray, truth: np.ndarray) -> Callable[..., torch.Tensor]:
    """Fits; returns the first model's accuracy on rows that it has not seen, whose prediction is no part of the work."""
    first: list[torch.Tensor] = []

    def call(X: np.ndarray, y: np.ndarray) -> torch.Tensor:
        predict = fit(X, y)
        if not first:
            first.append(torch.tensor([np.mean(predict(held_out) == truth)]))
        return first[0]

    return call


def _trees(
    depth: int, trees: int, tolerance: float, alone: bool = False
) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        rows, features, threads = shape
        X, y, held_out, truth = _data(rows, features)
        absent = absent_peers()
        contestants = {
            name: _on_threads(threads, checked_once(fit, held_out, truth))
            for name, fit in _fits(depth, trees, threads, alone).items()
            if name not in absent
        }
        return Problem(
            lambda: (X, y),
            contestants,
            X.nbytes,
            unit="B",
            peak=None,
            absent=absent,
            tolerance=tolerance,
            pause=TREE_PAUSE,
            steady=True,
        )

    return build


def _binning(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    rows, features, threads = shape
    X, y, *_ = _data(rows, features)

    def fastnn(X: np.ndarray, y: np.ndarray) -> torch.Tensor:
        from fastnn.tree._binning import BinMapper

        bins = BinMapper(random_state=0).fit(X).transform(X)
        return torch.tensor(bins.shape)

    def sklearn(X: np.ndarray, y: np.ndarray) -> torch.Tensor:
        from sklearn.ensemble._hist_gradient_boosting.binning import _BinMapper

        bins = _BinMapper(random_state=0, n_threads=threads).fit(X).transform(X)
        return torch.tensor(bins.shape)

    def lightgbm(X: np.ndarray, y: np.ndarray) -> torch.Tensor:
        import lightgbm

        parameters = {"max_bin": 255, "num_threads": threads, "verbosity": -1}
        data = lightgbm.Dataset(X, y, params=parameters).construct()
        return torch.tensor([data.num_data(), data.num_feature()])

    def xgboost(X: np.ndarray, y: np.ndarray) -> torch.Tensor:
        import xgboost

        data = xgboost.QuantileDMatrix(X, y, max_bin=256, nthread=threads)
        return torch.tensor([data.num_row(), data.num_col()])

    absent = absent_peers()
    makers = {"fastnn": fastnn, "scikit-learn": sklearn, "lightgbm": lightgbm, "xgboost": xgboost}
    contestants = {name: _on_threads(threads, call) for name, call in makers.items() if name not in absent}
    return Problem(
        lambda: (X, y), contestants, X.nbytes, unit="B", peak=None, absent=absent, pause=TREE_PAUSE, steady=True
    )


_FLOAT64 = (torch.float64,)
_SHAPES = ((100_000, 20, 1), (10_000, 500, 1))
register(Benchmark("binning", "NxFxT", ((1_000_000, 20, 1),), _binning, _FLOAT64))
# How far accuracies may be apart. The peers' bins differ, and so do single trees of few rows, by more than many together.
register(Benchmark("histogram_tree", "NxFxT", _SHAPES, _trees(8, 1, 2e-2), _FLOAT64))
register(Benchmark("binned_tree", "NxFxT", _SHAPES, _trees(8, 1, 2e-2, alone=True), _FLOAT64))
register(Benchmark("boosting", "NxFxT", _SHAPES, _trees(6, 100, 5e-3), _FLOAT64))
