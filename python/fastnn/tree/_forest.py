"""Forests: scikit-learn's estimators on fastnn's trees, whose columns are sorted (or put into bins) once for all of them."""

from __future__ import annotations

import functools
import threading

import numpy as np
import sklearn.ensemble
from joblib import effective_n_jobs

from ._decision_tree import (
    DecisionTreeClassifier,
    DecisionTreeRegressor,
    ExtraTreeClassifier,
    ExtraTreeRegressor,
)
from ._histogram_search import with_max_bins
from ._predict import ClassifierForestMixin, RegressorForestMixin
from ._sklearn import KnownParameters, fit_forest


class Shared:
    """What the trees of one forest have in common while they are grown."""

    #: Whether y is encoded once for all trees, which then know codes in place of classes.
    encodes = True

    def __init__(self):
        self._lock = threading.Lock()
        self._columns = None
        self._encoded = None
        self.template = None
        self.settings = None

    def __reduce__(self):
        return (type(self), ())  # a worker in another process makes its own

    def columns(self, X, make, threads: int):
        """make(X, threads=threads), the sorted or binned columns, once."""
        with self._lock:
            if self._columns is None or self._columns[1] is not X:
                self._columns = (make(X, threads=threads), X)
            return self._columns[0]

    def encoded(self, y, encode):
        """encode(y), once."""
        with self._lock:
            if self._encoded is None or self._encoded[1] is not y:
                self._encoded = (encode(y), y)
            return self._encoded[0]


class ExactForest(KnownParameters):
    """Before the class of scikit-learn among the bases; ``_tree`` is the class of the trees."""

    _shared = None

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "_tree" in cls.__dict__:
            inherited = cls.__init__

            # scikit-learn reads the parameters from the signature, which is that of its own class.
            @functools.wraps(inherited)
            def __init__(self, *args, **kwargs):
                inherited(self, *args, **kwargs)
                self.estimator = cls._tree()

            cls.__init__ = __init__

    def fit(self, X, y, sample_weight=None):
        """As scikit-learn's."""
        self._shared = Shared()
        try:
            return fit_forest(self, X, y, sample_weight)
        finally:
            del self._shared
            for tree in getattr(self, "estimators_", ()):
                tree.__dict__.pop("_shared", None)
                tree.__dict__.pop("_threads", None)

    def _make_estimator(self, append=True, random_state=None):
        shared = self._shared
        if shared is None or append or not isinstance(self.criterion, str):
            return super()._make_estimator(append, random_state)
        if shared.template is None:
            template = super()._make_estimator(append=False)
            template._shared = shared
            template._threads = 1 if effective_n_jobs(self.n_jobs) > 1 else 0
            shared.template = template
        # As clone and set_params make it, at a tenth of their time.
        tree = object.__new__(type(shared.template))
        tree.__dict__.update(shared.template.__dict__)
        tree.random_state = random_state.randint(np.iinfo(np.int32).max)
        return tree


@with_max_bins
class RandomForestClassifier(ExactForest, ClassifierForestMixin, sklearn.ensemble.RandomForestClassifier):
    __doc__ = sklearn.ensemble.RandomForestClassifier.__doc__
    _tree = DecisionTreeClassifier


@with_max_bins
class RandomForestRegressor(ExactForest, RegressorForestMixin, sklearn.ensemble.RandomForestRegressor):
    __doc__ = sklearn.ensemble.RandomForestRegressor.__doc__
    _tree = DecisionTreeRegressor


@with_max_bins
class ExtraTreesClassifier(ExactForest, ClassifierForestMixin, sklearn.ensemble.ExtraTreesClassifier):
    __doc__ = sklearn.ensemble.ExtraTreesClassifier.__doc__
    _tree = ExtraTreeClassifier


@with_max_bins
class ExtraTreesRegressor(ExactForest, RegressorForestMixin, sklearn.ensemble.ExtraTreesRegressor):
    __doc__ = sklearn.ensemble.ExtraTreesRegressor.__doc__
    _tree = ExtraTreeRegressor
