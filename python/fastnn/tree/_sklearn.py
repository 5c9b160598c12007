"""What depends on scikit-learn's private parts."""

from __future__ import annotations

import inspect
import types

import numpy as np
from joblib import effective_n_jobs
from sklearn.base import _fit_context
from sklearn.ensemble import _forest
from sklearn.tree._tree import NODE_DTYPE, Tree

from .. import _cpu
from ._progress import progress_bar

# As the kernels lay out a node.
_NODE = np.dtype(
    {
        "names": [
            "left_child",
            "right_child",
            "feature",
            "threshold",
            "impurity",
            "n_node_samples",
            "weighted_n_node_samples",
            "missing_go_to_left",
        ],
        "formats": ["<i8", "<i8", "<i8", "<f8", "<f8", "<i8", "<f8", "u1"],
        "offsets": [0, 8, 16, 24, 32, 40, 48, 56],
        "itemsize": 64,
    }
)


_SAME_NODE = _NODE == NODE_DTYPE


class KnownParameters:
    """Before scikit-learn's class among the bases: parameters that were found to be valid once are not checked again."""

    _parameter_names: tuple[str, ...] | None = None

    def _validate_params(self):
        cls = type(self)
        names = cls.__dict__.get("_parameter_names")
        if names is None:
            names = cls._parameter_names = tuple(cls._get_param_names())
        values = [getattr(self, name) for name in names]
        types = tuple(map(type, values))
        if not _PLAIN.issuperset(types):
            super()._validate_params()
            return
        key = cls, types, tuple(values)
        if key in _valid:
            return
        super()._validate_params()
        if len(_valid) >= _MOST_VALID:
            _valid.clear()
        _valid.add(key)


_PLAIN = {type(None), bool, int, float, str}
_MOST_VALID = 1024
_valid: set[tuple] = set()


def tree_of(grown, n_features: int, n_classes: np.ndarray, n_outputs: int) -> Tree:
    """A scikit-learn ``Tree`` of what the kernels have grown."""
    tree = Tree(n_features, n_classes, n_outputs)
    nodes = np.empty(grown.count, _NODE)
    values = np.empty((grown.count, n_outputs, int(n_classes.max())))
    grown.copy_to(nodes.ctypes.data, values.ctypes.data)
    if not _SAME_NODE:
        given, nodes = nodes, np.zeros(grown.count, NODE_DTYPE)
        for name in NODE_DTYPE.names:
            nodes[name] = given[name]
    tree.__setstate__({"max_depth": grown.max_depth, "node_count": grown.count, "nodes": nodes, "values": values})
    return tree


def grow_one(tree, bootstrap, X, y, sample_weight, tree_idx, n_trees, verbose=0, **options):
    """scikit-learn's ``_parallel_build_trees``, with the draws of its bootstrap by the kernels."""
    seed, draws = tree.random_state, options.get("n_samples_bootstrap")
    if (
        not bootstrap
        or sample_weight is not None
        or draws is None
        or not isinstance(seed, int)
        or verbose > 1
        or options.get("class_weight") == "balanced_subsample"
    ):
        return _forest._parallel_build_trees(
            tree, bootstrap, X, y, sample_weight, tree_idx, n_trees, verbose, **options
        )
    counts = np.empty(X.shape[0])
    _cpu.tree_bootstrap(seed, X.shape[0], int(draws), counts.ctypes.data)
    return tree._fit(
        X,
        y,
        sample_weight=counts,
        check_input=False,
        missing_values_in_feature_mask=options.get("missing_values_in_feature_mask"),
    )


class Loop:
    """joblib's ``Parallel`` where there is more than one job; else a loop, which costs a tree of few rows less than itself.

    ``verbose=1`` shows a progress bar.
    """

    def __init__(self, n_jobs=None, verbose=0, **options):
        self.jobs, self.verbose, self.options = n_jobs, verbose, options

    def __call__(self, tasks):
        tasks = list(tasks)
        shown = tasks
        if self.verbose == 1:
            shown = progress_bar("trees", tasks)
        if effective_n_jobs(self.jobs) == 1:
            return [function(*args, **kwargs) for function, args, kwargs in shown]
        parallel = _forest.Parallel(n_jobs=self.jobs, verbose=max(0, self.verbose - 1), **self.options)
        return parallel(_forest.delayed(function)(*args, **kwargs) for function, args, kwargs in shown)


def _later(function):
    return lambda *args, **kwargs: (function, args, kwargs)


def _replaced(function, **names):
    """scikit-learn's function, which finds these in place of what its module calls so."""
    inner = inspect.unwrap(function)
    copy = types.FunctionType(
        inner.__code__, {**inner.__globals__, **names}, inner.__name__, inner.__defaults__, inner.__closure__
    )
    copy.__kwdefaults__ = inner.__kwdefaults__
    return copy


#: ``BaseForest.fit``: scikit-learn's own code, but for its loop over the trees.
fit_forest = _fit_context(prefer_skip_nested_validation=True)(
    _replaced(_forest.BaseForest.fit, Parallel=Loop, delayed=_later, _parallel_build_trees=grow_one)
)
