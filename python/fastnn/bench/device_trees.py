"""One tree of classes grown from 255 bins, ROWS of COLUMNS to a DEPTH, where the tensors are: on a GPU, or on the CPU.

The columns are in bins already, for all contestants. `cpu` is fastnn's own search on the CPU, with torch's threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .. import backends
from .._state import FallbackError
from .benchmark import Benchmark, Problem, register
from .histogram_trees import HELD_OUT, absent_peers, checked_once


@functools.lru_cache(maxsize=1)
def _data(rows: int, columns: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows + HELD_OUT, columns), dtype=np.float32)
    y = x[:, :10].sum(axis=1) + rng.standard_normal(len(x)) > 0
    return x[:rows], y[:rows].astype(np.int64), x[rows:], y[rows:]


def _grown(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    from ..tree import _device_search, _exact
    from ..tree._histogram_search import Bins
    from ..tree._sklearn import tree_of

    rows, columns, depth = shape
    backend = backends.names_of(torch.empty(0))[0]
    reason = None if backend == "cpu" else backends.supports("split_search", torch.empty(0))
    if reason is not None:
        raise FallbackError(f"device_tree: {reason}")
    x, y, held_out, truth = _data(rows, columns)
    target = _exact.Target("gini", y.astype(np.float64)[:, None], np.array([2]), None)
    settings = _exact.Settings(columns, depth, 2, 1, -1, 0.0, 0.0, None, 1, 0)
    given = torch.tensor(x)

    def of(bins: Any) -> Callable[..., Any]:
        def fit(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
            grown = bins.grow(target, settings)
            return lambda rows: tree_of(grown, columns, np.array([2]), 1).predict(rows).argmax(axis=1)

        return fit

    def xgboost() -> Callable[..., Any]:
        import xgboost

        matrix = xgboost.DMatrix(x, y)  # in bins from the first fit on
        parameters = {
            "objective": "binary:logistic",
            "tree_method": "hist",
            "device": given.device.type,
            "max_depth": depth,
            "max_bin": 256,
            "base_score": 0.5,
            "reg_lambda": 0.0,
            "min_child_weight": 0.0,
        }

        def fit(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
            model = xgboost.train(parameters, matrix, num_boost_round=1)
            return lambda rows: model.predict(xgboost.DMatrix(rows)) > 0.5

        return fit

    on_cpu = Bins(x, 255)
    on_device = on_cpu if backend == "cpu" else _device_search.DeviceBins(given, 255)
    makers = {"fastnn": lambda: of(on_device), "cpu": lambda: of(on_cpu), "xgboost": xgboost}
    absent = {name: reason for name, reason in absent_peers().items() if name in makers}
    contestants = {name: checked_once(make(), held_out, truth) for name, make in makers.items() if name not in absent}
    # Of as many bytes as there are bins.
    return Problem(
        lambda: (x, y), contestants, rows * columns, unit="B", peak=None, absent=absent, tolerance=0.02, steady=True
    )


register(Benchmark("device_tree", "ROWSxCOLUMNSxDEPTH", ((1_000_000, 100, 8),), _grown, (torch.float32,)))
