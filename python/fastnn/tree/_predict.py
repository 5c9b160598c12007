"""Prediction of trees and forests by fastnn's kernels, and what every estimator that is made of trees shares.

A `Forest` is flattened from scikit-learn's `Tree` objects when it is first needed, and belongs to no estimator's state: it
is neither pickled nor copied. It is flattened anew where an estimator has got other trees, or where somebody has written
into the arrays of one (`tree_.value[...] = ...`) since: every prediction sums them up first.

Leaves are those of scikit-learn, row by row: a float32 is <= a float64 threshold exactly where it is <= the largest float32
that is. Sums over trees are in float64 and in the order of the trees, which is scikit-learn's with `n_jobs=1`: forests
give its bits, for any number of threads.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.sparse
from sklearn.base import is_classifier
from sklearn.tree._tree import Tree
from sklearn.utils.validation import check_is_fitted, validate_data

from .. import _cpu
from ._tensors import TensorMixin

__all__ = [
    "NODE",
    "Forest",
    "ForestMixin",
    "NotFinite",
    "TreeMixin",
    "cached_forest",
    "leaf_paths",
    "plot",
    "through_forest",
]

#: The fields that a tree's records have; scikit-learn's own have more. `missing_go_to_left` and `category` may lack.
NODE = np.dtype(
    [
        ("left_child", np.int64),
        ("right_child", np.int64),
        ("feature", np.int64),
        ("threshold", np.float64),
        ("missing_go_to_left", np.uint8),
        ("category", np.int64),
    ]
)
_DTYPES = {np.dtype(np.float32): 0, np.dtype(np.float64): 1, np.dtype(np.uint8): 5}


class NotFinite(ValueError):
    """X has a NaN or an infinity where the caller allows none."""


def _records(tree: Any) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and values of a scikit-learn Tree, as views."""
    if isinstance(tree, tuple):
        nodes, values = tree
    else:
        state = tree.__getstate__()
        nodes, values = state["nodes"], state["values"]
    if not len(nodes):
        raise ValueError("a tree needs a node")
    return nodes, np.ascontiguousarray(values, np.float64).reshape(len(nodes), -1)


class Forest:
    """Trees, flattened for prediction.

    Args:
        trees: scikit-learn `Tree` objects, or pairs of node records (the fields of `NODE`) and values (nodes, outputs). In
            a record whose `category` is not -1, a row goes left where its feature is in that set of `categories`.
        n_features: the length of a row.
        columns: for each tree, the first column of the result that its values are added to; 0 by default.
        width: columns of the result; by default the trees' outputs.
        scale: what values are multiplied by.
        categories: (sets, 8), uint32: bit c % 32 of word c // 32 says whether c is in the set.
        missing_bin: for X in uint8, the number that means NaN.

    Raises:
        ValueError: for nodes that are no tree.
    """

    def __init__(
        self,
        trees: Sequence[Any],
        n_features: int | None = None,
        *,
        columns: Sequence[int] | None = None,
        width: int | None = None,
        scale: float = 1.0,
        categories: np.ndarray | None = None,
        missing_bin: int = -1,
    ) -> None:
        if not trees:
            raise ValueError("a forest needs a tree")
        self.n_features = int(trees[0].n_features if n_features is None else n_features)
        self.missing_bin = missing_bin
        records = [_records(tree) for tree in trees]
        outputs = records[0][1].shape[1]
        self.width = outputs if width is None else width
        self._forest = _cpu.Forest(self.n_features, outputs, self.width)
        if categories is not None:
            categories = np.ascontiguousarray(categories, np.uint32).reshape(-1, 8)
            self._forest.set_categories(categories.ctypes.data, len(categories))
        for i, (nodes, values) in enumerate(records):
            if values.shape[1] != outputs:
                raise ValueError(f"a tree has {values.shape[1]} outputs, the first one {outputs}")
            self._add(nodes, values, 0 if columns is None else int(columns[i]), scale)

    def _add(self, nodes: np.ndarray, values: np.ndarray, column: int, scale: float) -> None:
        fields = nodes.dtype.fields
        offsets = []
        for name in NODE.names:
            if name in ("missing_go_to_left", "category") and name not in fields:
                offsets.append(-1)
                continue
            dtype, offset = fields[name][:2]
            if dtype != NODE[name]:
                raise ValueError(f"{name} of a node: expected {NODE[name]}, got {dtype}")
            offsets.append(offset)
        if nodes.ndim != 1 or (nodes.size and nodes.strides[0] < 0):
            raise ValueError("nodes: expected one dimension")
        stride = nodes.strides[0] if len(nodes) > 1 else nodes.itemsize
        self._forest.add(nodes.ctypes.data, len(nodes), stride, tuple(offsets), values.ctypes.data, column, scale)

    @property
    def sees_all(self) -> bool:
        """Whether every feature is looked at for NaN and infinities, also one that no tree asks for."""
        return self._forest.sees_all

    def __len__(self) -> int:
        return self._forest.trees

    def _arguments(self, X: np.ndarray) -> tuple[Any, ...]:
        item = X.itemsize
        if X.dtype not in _DTYPES or X.ndim != 2 or X.strides[0] % item or X.strides[1] % item:
            raise ValueError("X: expected two dimensions of float32, float64 or uint8")
        strides = (X.strides[0] // item, X.strides[1] // item)
        return X.ctypes.data, _DTYPES[X.dtype], X.shape, strides, self.missing_bin

    @staticmethod
    def _check(saw: int, allow_nan: bool, allow_infinity: bool) -> None:
        if (saw & _cpu.SAW_NAN and not allow_nan) or (saw & _cpu.SAW_INFINITY and not allow_infinity):
            raise NotFinite("X has NaN or infinities")

    def apply(self, X: np.ndarray, *, allow_nan: bool = True, allow_infinity: bool = True) -> np.ndarray:
        """The leaves, (rows, trees) in int64, of X (rows, features) in float32, float64 (as if cast to float32) or uint8,
        with any strides."""
        out = np.empty((len(self), len(X)), np.int64)
        self._check(self._forest.apply(*self._arguments(X), out.ctypes.data), allow_nan, allow_infinity)
        return out.T

    def predict(
        self,
        X: np.ndarray,
        *,
        out: np.ndarray | None = None,
        divisor: float = 1.0,
        trees: tuple[int, int] | None = None,
        allow_nan: bool = True,
        allow_infinity: bool = True,
    ) -> np.ndarray:
        """Sums of the leaves' values over the trees, or those from `trees[0]` to before `trees[1]`, (rows, width) in
        float64: added to `out` if that is given, then divided by `divisor`."""
        accumulate = out is not None
        if out is None:
            out = np.empty((len(X), self.width))
        elif out.shape != (len(X), self.width) or out.dtype != np.float64 or not out.flags.c_contiguous:
            raise ValueError(f"out: expected contiguous float64 of shape {(len(X), self.width)}")
        first, last = (0, len(self)) if trees is None else trees
        saw = self._forest.predict(*self._arguments(X), first, last, accumulate, divisor, out.ctypes.data)
        self._check(saw, allow_nan, allow_infinity)
        return out


class _Known:
    """A forest, and what it was made of."""

    def __init__(self, key: list[Any], build: Callable[[], Any]) -> None:
        self.key = key
        # Views, which keep the memory where it is.
        self.arrays = [array for made_of in key for array in _arrays_of(made_of)]
        self.watch = _cpu.TreeWatch([(array.ctypes.data, array.nbytes) for array in self.arrays])
        self.forest = build()

    def holds(self, key: list[Any]) -> bool:
        return (
            len(self.key) == len(key)
            and all(a is b for a, b in zip(self.key, key, strict=True))
            and not self.watch.changed()
        )


def _arrays_of(made_of: Any) -> list[np.ndarray]:
    if isinstance(made_of, np.ndarray):
        arrays = [made_of]
    elif isinstance(made_of, Tree):
        state = made_of.__getstate__()
        arrays = [state["nodes"], state["values"]]
    else:
        return []
    return [array for array in arrays if array.flags.c_contiguous]


_forests: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def cached_forest(estimator: Any, key: list[Any], build: Callable[[], Any]) -> Any:
    """The estimator's forest; built anew where `key`, the objects that it is made of, are not those of last time, or where
    numbers in them, if they are arrays or trees, are others."""
    with _lock:
        known = _forests.get(estimator)
    if known is None or not known.holds(key):
        known = _Known(key, build)
        with _lock:
            _forests[estimator] = known
    return known.forest


def through_forest(
    estimator: Any,
    forest: Forest,
    X: Any,
    run: Callable[..., np.ndarray],
    validate: Callable[[Any], Any],
) -> np.ndarray | None:
    """run(X, allow_nan=..., allow_infinity=...) of X once it is validated; None for a sparse X.

    A plain float array is read as it lies: the kernels cast it block by block and notice what is not finite on the way. If
    there is something, or X is anything else, it goes through scikit-learn's own validation, which knows what to say.
    """
    if (
        type(X) is np.ndarray
        and X.ndim == 2
        and X.dtype in (np.float32, np.float64)
        and X.size
        and forest.sees_all
        and not (X.strides[0] % X.itemsize or X.strides[1] % X.itemsize)
    ):
        validate_data(estimator, X, reset=False, skip_check_array=True)
        try:
            return run(X, allow_nan=False, allow_infinity=False)
        except NotFinite:
            pass
    X = validate(X)
    if scipy.sparse.issparse(X):
        return None
    return run(X, allow_nan=True, allow_infinity=True)


def leaf_paths(tree: Any, leaves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nodes from the root to each of these leaves, one path after the other, and where each begins."""
    nodes = tree.__getstate__()["nodes"]
    n = len(nodes)
    parent, depth = np.full(n, -1, np.int64), np.ones(n, np.int64)
    inner = np.flatnonzero(nodes["left_child"] >= 0)
    for side in ("left_child", "right_child"):
        parent[nodes[side][inner]] = inner
    # Level by level: children come after their parent, but not one level after the other.
    level = np.array([0])
    while level.size:
        level = level[nodes["left_child"][level] >= 0]
        below = np.concatenate([nodes["left_child"][level], nodes["right_child"][level]])
        depth[below] = depth[parent[below]] + 1
        level = below
    begins = np.concatenate([[0], np.cumsum(depth[leaves])])
    path = np.empty(begins[-1], np.int64)
    node, place = leaves.astype(np.int64), begins[1:] - 1
    while node.size:
        path[place] = node
        node = parent[node]
        place = (place - 1)[node >= 0]
        node = node[node >= 0]
    return path, begins


def _per_output(values: np.ndarray, estimator: Any) -> Any:
    """(rows, outputs * classes) as predict_proba returns it."""
    if estimator.n_outputs_ == 1:
        return values[:, : estimator.n_classes_]
    outputs = estimator.n_outputs_
    values = values.reshape(len(values), outputs, values.shape[1] // outputs)  # also of no rows
    return [np.ascontiguousarray(values[:, k, :n]) for k, n in enumerate(estimator.n_classes_)]


def _likeliest(proba: Any, estimator: Any) -> np.ndarray:
    if estimator.n_outputs_ == 1:
        return estimator.classes_.take(np.argmax(proba, axis=1), axis=0)
    classes = estimator.classes_
    predictions = np.zeros((len(proba[0]), estimator.n_outputs_), classes[0].dtype)
    for k, p in enumerate(proba):
        predictions[:, k] = classes[k].take(np.argmax(p, axis=1), axis=0)
    return predictions


def _plain(value: Any) -> Any:
    """Every fastnn estimator in it replaced by the scikit-learn one."""
    if isinstance(value, SklearnMixin):
        return value.to_sklearn()
    if type(value) in (list, tuple):
        return type(value)(_plain(entry) for entry in value)
    if isinstance(value, np.ndarray) and value.dtype == object:
        plain = np.empty_like(value)
        for index in np.ndindex(value.shape):
            plain[index] = _plain(value[index])
        return plain
    return value


class SklearnMixin(TensorMixin):
    """What every estimator here has beside scikit-learn's own methods."""

    #: Parameters that scikit-learn's estimator has not.
    _own_parameters: tuple[str, ...] = ()

    def to_sklearn(self) -> Any:
        """The plain scikit-learn estimator of the same name, parameters and state (arrays and trees are shared)."""
        plain = next(base for base in type(self).__mro__ if base.__module__.split(".")[0] == "sklearn")
        new = plain.__new__(plain)
        own = self._own_parameters
        new.__dict__.update({name: _plain(value) for name, value in self.__dict__.items() if name not in own})
        if own and "estimator_params" in new.__dict__:
            new.estimator_params = tuple(name for name in new.estimator_params if name not in own)
        return new


class TreeMixin(SklearnMixin):
    """Prediction of a DecisionTree* or ExtraTree*; before the scikit-learn class among the bases."""

    def _tree_run(self, X: Any, check_input: bool, what: str) -> np.ndarray | None:
        check_is_fitted(self)
        forest = cached_forest(self, [self.tree_], lambda: Forest([self.tree_]))
        run = getattr(forest, what)
        if not check_input:
            X = self._validate_X_predict(X, False)
            return None if scipy.sparse.issparse(X) or X.dtype != np.float32 else run(X)
        return through_forest(self, forest, X, run, lambda X: self._validate_X_predict(X, True))

    def predict(self, X: Any, check_input: bool = True) -> np.ndarray:
        """As scikit-learn's."""
        values = self._tree_run(X, check_input, "predict")
        if values is None:
            return super().predict(X, check_input)
        if is_classifier(self):
            return _likeliest(_per_output(values, self), self)
        return values[:, 0] if self.n_outputs_ == 1 else values

    def apply(self, X: Any, check_input: bool = True) -> np.ndarray:
        """As scikit-learn's: the number of the leaf, (rows,)."""
        leaves = self._tree_run(X, check_input, "apply")
        return super().apply(X, check_input) if leaves is None else leaves[:, 0]

    def decision_path(self, X: Any, check_input: bool = True) -> Any:
        """As scikit-learn's: an indicator matrix in CSR, (rows, nodes)."""
        leaves = self._tree_run(X, check_input, "apply")
        if leaves is None:
            return super().decision_path(X, check_input)
        path, begins = leaf_paths(self.tree_, leaves[:, 0])
        like = type(self.tree_.decision_path(np.zeros((0, self.n_features_in_), np.float32)))
        ones = np.ones(len(path), np.int64)
        return like((ones, path, begins), shape=(len(leaves), self.tree_.node_count))

    def export_text(self, **options: Any) -> str:
        """The rules as text: `sklearn.tree.export_text`, with its options."""
        from sklearn.tree import export_text

        return export_text(self, **options)

    def plot(self, **options: Any) -> Any:
        """Draws the tree with matplotlib: `sklearn.tree.plot_tree`, with its options."""
        from sklearn.tree import plot_tree

        return plot_tree(self, **options)


class ClassifierTreeMixin(TreeMixin):
    """Of a classifier."""

    def predict_proba(self, X: Any, check_input: bool = True) -> Any:
        """As scikit-learn's: (rows, classes), or a list of such."""
        values = self._tree_run(X, check_input, "predict")
        return super().predict_proba(X, check_input) if values is None else _per_output(values, self)


class TreesMixin(SklearnMixin):
    """Of an ensemble whose `estimators_` are trees, one after the other."""

    def plot(self, tree: int = 0, **options: Any) -> Any:
        """Draws one of the trees with matplotlib: `sklearn.tree.plot_tree`, with its options."""
        from sklearn.tree import plot_tree

        check_is_fitted(self)
        return plot_tree(self.estimators_[tree], **options)

    def export_text(self, tree: int = 0, **options: Any) -> str:
        """The rules of one of the trees as text: `sklearn.tree.export_text`, with its options."""
        from sklearn.tree import export_text

        check_is_fitted(self)
        return export_text(self.estimators_[tree], **options)


class ForestMixin(TreesMixin):
    """Prediction of a RandomForest* or ExtraTrees*; before the scikit-learn class among the bases."""

    def _forest(self) -> Forest:
        check_is_fitted(self)
        trees = [estimator.tree_ for estimator in self.estimators_]
        return cached_forest(self, trees, lambda: Forest(trees))

    def _forest_run(self, X: Any, what: str, **options: Any) -> np.ndarray | None:
        forest = self._forest()

        def run(X: np.ndarray, **allow: bool) -> np.ndarray:
            return getattr(forest, what)(X, **options, **allow)

        return through_forest(self, forest, X, run, self._validate_X_predict)

    def apply(self, X: Any) -> np.ndarray:
        """As scikit-learn's: the number of the leaf in each tree, (rows, trees)."""
        leaves = self._forest_run(X, "apply")
        return super().apply(X) if leaves is None else leaves

    def decision_path(self, X: Any) -> Any:
        """As scikit-learn's: an indicator matrix in CSR, (rows, nodes of all trees), and where each tree's begin."""
        leaves = self._forest_run(X, "apply")
        if leaves is None:
            return super().decision_path(X)
        parts = []
        for estimator, leaf in zip(self.estimators_, leaves.T, strict=True):
            path, begins = leaf_paths(estimator.tree_, leaf)
            like = type(estimator.tree_.decision_path(np.zeros((0, self.n_features_in_), np.float32)))
            shape = (len(leaf), estimator.tree_.node_count)
            parts.append(like((np.ones(len(path), np.int64), path, begins), shape=shape))
        nodes = np.array([0, *(part.shape[1] for part in parts)]).cumsum()
        return scipy.sparse.hstack(parts).tocsr(), nodes


class ClassifierForestMixin(ForestMixin):
    """Of a classifier."""

    def predict_proba(self, X: Any) -> Any:
        """As scikit-learn's: the mean of the trees' probabilities, (rows, classes), or a list of such."""
        values = self._forest_run(X, "predict", divisor=len(self.estimators_) if hasattr(self, "estimators_") else 1)
        return super().predict_proba(X) if values is None else _per_output(values, self)


class RegressorForestMixin(ForestMixin):
    """Of a regressor."""

    def predict(self, X: Any) -> np.ndarray:
        """As scikit-learn's: the mean of the trees' predictions, (rows,) or (rows, outputs)."""
        values = self._forest_run(X, "predict", divisor=len(self.estimators_) if hasattr(self, "estimators_") else 1)
        if values is None:
            return super().predict(X)
        return values[:, 0] if self.n_outputs_ == 1 else values


def plot(estimator: Any, *args: Any, **options: Any) -> Any:
    """Draws a tree with matplotlib: that of a decision tree, the first of an ensemble (or `tree=`, in gradient boosting
    `stage=` and `output=`). Options and result are those of `sklearn.tree.plot_tree`. TypeError for what has no `tree_`
    to draw, as histogram boosting."""
    if not isinstance(estimator, SklearnMixin) or not hasattr(estimator, "plot"):
        raise TypeError(f"{type(estimator).__name__} has no trees to plot")
    return estimator.plot(*args, **options)
