"""Single trees: scikit-learn's estimators, grown by fastnn's kernels."""

from __future__ import annotations

import functools
from math import ceil
from numbers import Integral

import numpy as np
import sklearn.tree
import torch
from scipy.sparse import issparse
from sklearn.base import ClassifierMixin
from sklearn.tree._classes import BaseDecisionTree
from sklearn.utils import check_array, check_random_state, compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, validate_data

from .. import _cpu, _state
from ..backends.cpu import empty
from . import _device_search, _exact
from ._histogram_search import Bins, with_max_bins
from ._predict import ClassifierTreeMixin, TreeMixin
from ._sklearn import KnownParameters, tree_of
from ._tensors import takes_tensors, to_numpy

_CLASSIFICATION = ("gini", "entropy", "log_loss")
_REGRESSION = ("squared_error", "absolute_error", "poisson")


class ExactTree(KnownParameters, BaseDecisionTree):
    """Grows ``tree_`` by :mod:`fastnn.tree._exact`. To be inherited after scikit-learn's class, whose ``fit`` calls ``_fit``.

    ``_shared`` (a :class:`Shared`, or None) is what the trees of one ensemble have in common while it is fitted;
    ``_threads`` how many threads grow the tree, 0 for torch's number.
    """

    _shared = None
    _threads = 0
    max_bins: int | None = None

    def _fit(self, X, y, sample_weight=None, check_input=True, missing_values_in_feature_mask=None):
        reason = self._why_not(X)
        if reason is not None:
            _state.count_fallback(f"tree.{type(self).__name__}", reason)
            return super()._fit(X, y, sample_weight, check_input, missing_values_in_feature_mask)
        if check_input:
            X, y = self._checked(X, y)
        labels, given_weight = y, sample_weight
        n_samples, self.n_features_in_ = X.shape
        shared = self._shared
        encodes = shared is not None and shared.encodes
        if not encodes:
            y, classes, expanded = self._encoded(y)
        else:
            y, classes, expanded = shared.encoded(y, self._encoded)
            self._take_classes(classes, y.shape[1])
        if len(y) != n_samples:
            raise ValueError(f"Number of labels={len(y)} does not match number of samples={n_samples}")
        # Of a forest's trees the first is enough: what is not finite stays so in all of them.
        if sample_weight is not None and (not encodes or shared.settings is None):
            sample_weight = _check_sample_weight(sample_weight, y, dtype=np.float64)
        if expanded is not None:
            sample_weight = expanded if sample_weight is None else sample_weight * expanded
        if sample_weight is not None:
            sample_weight = np.ascontiguousarray(sample_weight, dtype=np.float64)
        target = _exact.Target(_alias(self.criterion), y, classes, sample_weight)
        columns = None
        if isinstance(X, torch.Tensor):
            columns = _device_search.bins_of(self, X, target)
            X = X if columns is not None else to_numpy(X)
        if not _exact.fits(target):
            _state.count_fallback(f"tree.{type(self).__name__}", "rows times classes beyond 2^32")
            mask = self._compute_missing_values_in_feature_mask(X)
            return super()._fit(X, labels, given_weight, False, mask)
        if shared is None or shared.settings is None:
            settings = self._settings(n_samples, sample_weight)._replace(
                monotonic=self._signs(X), threads=self._threads
            )
            if shared is not None and not self.min_weight_fraction_leaf:
                shared.settings = settings, self.max_features_
        else:
            settings, self.max_features_ = shared.settings
        settings = settings._replace(seed=self._seed())
        if columns is not None:
            grow = _device_search.DeviceBins.grow
        elif self.splitter == "random":
            make, grow = _exact.columns_of, _exact.grow_random
        elif self.max_bins is None:
            make, grow = _exact.presort, _exact.grow
        else:
            make, grow = functools.partial(Bins, max_bins=self.max_bins), Bins.grow
        if columns is None:
            columns = make(X, threads=self._threads) if shared is None else shared.columns(X, make, self._threads)
        grown = grow(columns, target, settings)
        counts = np.ones(self.n_outputs_, dtype=np.intp) if classes is None else classes
        self.tree_ = tree_of(grown, self.n_features_in_, counts, self.n_outputs_)
        if classes is not None and self.n_outputs_ == 1:
            self.n_classes_, self.classes_ = self.n_classes_[0], self.classes_[0]
        if self.ccp_alpha != 0.0:
            self._prune_tree()
        return self

    def _seed(self) -> int:
        """What scikit-learn's splitter draws as the seed of its own draws."""
        state, below = self.random_state, 2**31 - 1
        if type(state) is int and 0 <= state < 2**32:
            return _cpu.tree_first_draw(state, below)
        return check_random_state(state).randint(0, below)

    def _why_not(self, X) -> str | None:
        """Why scikit-learn grows this tree, or None."""
        if issparse(X):
            return "a sparse X"
        if not isinstance(self.splitter, str):
            return "a Splitter object"
        if not isinstance(self.criterion, str):
            return "a Criterion object"
        if self.criterion not in (_CLASSIFICATION if isinstance(self, ClassifierMixin) else _REGRESSION):
            return f"criterion={self.criterion!r}"
        return None

    def _checked(self, X, y):
        """X as float32 and y as it is, with scikit-learn's errors."""
        if isinstance(X, torch.Tensor):
            plain = _device_search.checked(X), check_array(y, ensure_2d=False, dtype=None)
        else:
            plain = _plain_arrays(X, y)
        if plain is not None:
            X, y = plain
            self.n_features_in_ = X.shape[1]
            self.__dict__.pop("feature_names_in_", None)
        else:
            X, y = validate_data(
                self,
                X,
                y,
                validate_separately=(
                    {"dtype": np.float32, "ensure_all_finite": False},
                    {"ensure_2d": False, "dtype": None},
                ),
            )
            self._compute_missing_values_in_feature_mask(X)
        if self.criterion == "poisson":
            if np.any(y < 0):
                raise ValueError("Some value(s) of y are negative which is not allowed for Poisson regression.")
            if np.sum(y) <= 0:
                raise ValueError("Sum of y is not positive which is necessary for Poisson regression.")
        return X, y

    def _encoded(self, y):
        """y as float64 (rows, outputs), the number of classes of each output or None, and the rows' class weights or None."""
        y = np.atleast_1d(y)
        if y.ndim == 1:
            y = np.reshape(y, (-1, 1))
        self.n_outputs_ = y.shape[1]
        if not isinstance(self, ClassifierMixin):
            return np.ascontiguousarray(y, dtype=np.float64), None, None
        codes = _codes_of_integers(y)
        if codes is not None:
            values, codes = codes
            self.classes_ = [values]
            self.n_classes_ = np.array([len(values)], dtype=np.intp)
            expanded = None if self.class_weight is None else compute_sample_weight(self.class_weight, y)
            return codes, self.n_classes_, expanded
        check_classification_targets(y)
        expanded = None if self.class_weight is None else compute_sample_weight(self.class_weight, y)
        codes = np.empty(y.shape, dtype=np.float64)
        self.classes_ = []
        for k in range(self.n_outputs_):
            values, codes[:, k] = np.unique(y[:, k], return_inverse=True)
            self.classes_.append(values)
        self.n_classes_ = np.array([len(values) for values in self.classes_], dtype=np.intp)
        return codes, self.n_classes_, expanded

    def _take_classes(self, classes, n_outputs: int):
        """What :meth:`_encoded` sets, where a forest has asked for it once."""
        self.n_outputs_ = n_outputs
        if classes is not None:
            # A forest's trees are grown on codes.
            self.n_classes_ = classes
            self.classes_ = [np.arange(n, dtype=np.float64) for n in classes]

    def _settings(self, n_samples: int, sample_weight) -> _exact.Settings:
        columns = self.n_features_in_
        least = self.min_samples_leaf
        if not isinstance(least, Integral):
            least = ceil(least * n_samples)
        split = self.min_samples_split
        if not isinstance(split, Integral):
            split = max(2, ceil(split * n_samples))
        most = self.max_features
        if most == "sqrt":
            most = max(1, int(np.sqrt(columns)))
        elif most == "log2":
            most = max(1, int(np.log2(columns)))
        elif most is None:
            most = columns
        elif not isinstance(most, Integral):
            most = max(1, int(most * columns)) if most > 0.0 else 0
        self.max_features_ = most
        weight = n_samples if sample_weight is None else np.sum(sample_weight)
        return _exact.Settings(
            max_features=int(most),
            max_depth=np.iinfo(np.int32).max if self.max_depth is None else int(self.max_depth),
            min_samples_split=int(max(split, 2 * least)),
            min_samples_leaf=int(least),
            max_leaf_nodes=-1 if self.max_leaf_nodes is None else int(self.max_leaf_nodes),
            min_weight_leaf=float(self.min_weight_fraction_leaf * weight),
            min_impurity_decrease=float(self.min_impurity_decrease),
            monotonic=None,
            seed=1,
            threads=0,
        )

    def _signs(self, X) -> np.ndarray | None:
        """The monotonic constraints, of the probability of the first class in classification."""
        if self.monotonic_cst is None:
            return None
        if self.n_outputs_ > 1:
            raise ValueError("Monotonicity constraints are not supported with multiple outputs.")
        signs = np.asarray(self.monotonic_cst)
        if signs.shape[0] != X.shape[1]:
            raise ValueError(
                f"monotonic_cst has shape {signs.shape[0]} but the input data X has {X.shape[1]} features."
            )
        if not np.all(np.isin(signs, (-1, 0, 1))):
            raise ValueError(f"monotonic_cst must be None or an array-like of -1, 0 or 1, but got {np.unique(signs)}")
        signs = np.ascontiguousarray(signs, dtype=np.int8)
        if not isinstance(self, ClassifierMixin):
            return signs
        if self.n_classes_[0] > 2:
            raise ValueError("Monotonicity constraints are not supported with multiclass classification")
        return -signs


def _plain_arrays(X, y):
    """X as float32 and y, where both are arrays that scikit-learn's checks would pass as they are; else None."""
    if (
        type(X) is not np.ndarray
        or type(y) is not np.ndarray
        or X.ndim != 2
        or y.ndim != 1
        or X.dtype.kind != "f"
        or y.dtype.kind not in "biuf"
        or not X.size
        or not y.size
    ):
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        X = _as_float32(X)
        if not np.isfinite(np.sum(X)) or (y.dtype.kind == "f" and not np.isfinite(np.sum(y))):
            return None
    return X, y


#: Elements of an array whose copy is worth memory that was used before.
_LARGE = 1 << 20


def _as_float32(X):
    """X itself, or rounded; large copies are made by all threads, in memory that the process need not ask for anew."""
    if X.dtype != np.float64 or X.size < _LARGE or not X.flags.c_contiguous or not X.flags.writeable:
        return X.astype(np.float32, copy=False)
    return empty(X.shape, torch.float32).copy_(torch.from_numpy(X)).numpy()


def _codes_of_integers(y):
    """The sorted classes and the codes (rows, 1) of one output of few integers, by counting; else None."""
    if y.dtype.kind not in "iu" or y.shape[1] != 1 or not len(y):
        return None
    y = y[:, 0]
    least, most = int(y.min()), int(y.max())
    if most - least >= 256 or max(-least, most) >= 2**62:
        return None
    offsets = y.astype(np.int64) - least
    there = np.bincount(offsets) != 0
    values = np.flatnonzero(there)
    if 2 * len(values) >= len(y):  # scikit-learn may warn that these are no classes
        return None
    codes = np.cumsum(there) - 1.0
    return (values + least).astype(y.dtype), codes[offsets][:, None]


def _alias(criterion: str) -> str:
    return "entropy" if criterion == "log_loss" else criterion


@with_max_bins
class DecisionTreeClassifier(ClassifierTreeMixin, sklearn.tree.DecisionTreeClassifier, ExactTree):
    __doc__ = sklearn.tree.DecisionTreeClassifier.__doc__

    @takes_tensors
    def fit(self, X, y, sample_weight=None, check_input=True):
        """As scikit-learn's. From a tensor on a GPU, with ``max_bins``, the same tree is grown there."""
        X = X if _device_search.keeps(self, X) else to_numpy(X)
        return super().fit(X, to_numpy(y), to_numpy(sample_weight), check_input)


@with_max_bins
class DecisionTreeRegressor(TreeMixin, sklearn.tree.DecisionTreeRegressor, ExactTree):
    __doc__ = sklearn.tree.DecisionTreeRegressor.__doc__


@with_max_bins
class ExtraTreeClassifier(ClassifierTreeMixin, sklearn.tree.ExtraTreeClassifier, ExactTree):
    __doc__ = sklearn.tree.ExtraTreeClassifier.__doc__


@with_max_bins
class ExtraTreeRegressor(TreeMixin, sklearn.tree.ExtraTreeRegressor, ExactTree):
    __doc__ = sklearn.tree.ExtraTreeRegressor.__doc__
