"""Prediction by forests: random forests of as many trees and as deep as each library fits them to the same rows.

The rows are float32 in C order, THREADS those of each library, and the result is the accuracy on the rows predicted: other
libraries' trees are others. daal4py, a part of scikit-learn-intelex, predicts XGBoost's boosted trees faster than its
forests, and takes part as another form of it.
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

_FITTED_ROWS = 20_000
_PEERS = {"scikit-learn-intelex": "sklearnex", "XGBoost": "xgboost"}


@functools.lru_cache(maxsize=1)
def _data(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import make_classification

    X, y = make_classification(rows, columns, n_informative=max(2, columns // 2), random_state=0)
    return X.astype(np.float32), y


def _accuracy(y: np.ndarray, score: np.ndarray) -> torch.Tensor:
    positive = score[:, 1] if score.ndim == 2 else score
    return torch.tensor([np.mean((positive > 0.5) == y)], dtype=torch.float64)


def _build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    from .. import tree as trees

    rows, columns, count, depth, threads = shape
    X, y = _data(rows, columns)
    X_fit, y_fit = X[:_FITTED_ROWS], y[:_FITTED_ROWS]
    parameters = {"n_estimators": count, "max_depth": depth, "random_state": 0, "n_jobs": threads}
    ours = trees.RandomForestClassifier(**parameters).fit(X_fit, y_fit)
    theirs = ours.to_sklearn()
    absent = {name: "not installed" for name, module in _PEERS.items() if not importlib.util.find_spec(module)}
    predict: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "fastnn": ours.predict_proba,
        "scikit-learn": theirs.predict_proba,
    }
    if "scikit-learn-intelex" not in absent:
        ensemble = importlib.import_module("sklearnex.ensemble")
        predict["scikit-learn-intelex"] = ensemble.RandomForestClassifier(**parameters).fit(X_fit, y_fit).predict_proba
    if "XGBoost" not in absent:
        xgboost = importlib.import_module("xgboost")
        sizes = {"n_estimators": count, "max_depth": depth, "n_jobs": threads}
        forest = xgboost.XGBRFClassifier(**sizes).fit(X_fit, y_fit).get_booster()
        boosted = xgboost.XGBClassifier(**sizes, learning_rate=0.1).fit(X_fit, y_fit).get_booster()
        predict["XGBoost"] = forest.inplace_predict
        predict["XGBoost boosted"] = boosted.inplace_predict
        if "scikit-learn-intelex" not in absent:
            daal4py = importlib.import_module("daal4py")
            model = daal4py.mb.convert_model(boosted)

            def converted(X: np.ndarray) -> np.ndarray:
                daal4py.daalinit(threads)
                return model.predict_proba(X)

            predict["scikit-learn-intelex boosted"] = converted

    def call(function: Callable[[np.ndarray], np.ndarray]) -> Callable[..., Any]:
        def run(X: np.ndarray) -> torch.Tensor:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                return _accuracy(y, function(X))
            finally:
                torch.set_num_threads(before)

        return run

    contestants = {name: call(function) for name, function in predict.items()}
    # Boosted trees fit their rows better than forests.
    return Problem(
        lambda: (X,),
        contestants,
        float(rows * count * depth),
        unit="OP",
        peak=None,
        absent=absent,
        tolerance=0.2,
        pause=TREE_PAUSE,
        steady=True,
    )


register(
    Benchmark(
        "tree_predict",
        "ROWSxCOLUMNSxTREESxDEPTHxTHREADS",
        ((100_000, 20, 100, 8, 1), (100_000, 20, 100, 8, 2)),
        _build,
        (torch.float32,),
    )
)
