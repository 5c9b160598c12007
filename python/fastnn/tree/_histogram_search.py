"""Trees and forests by histogram search: ``max_bins``, and columns put into bins."""

from __future__ import annotations

import functools
import inspect
import re
from numbers import Integral

import numpy as np
from sklearn.utils._param_validation import Interval

from .. import _cpu
from . import _exact
from ._binning import BinMapper, bin_columns

_DOC = """    max_bins : int, default=None
        The number of bins, 2 to 255, that the values of each feature are put into, with scikit-learn's edges (those of
        ``HistGradientBoosting``; of more than 200000 rows they are found from a sample of so many); missing values have
        a bin of their own. Splits are then looked for between bins, and where a feature has at most ``max_bins`` values,
        they are the splits that are found without. With None, and with ``splitter="random"`` (which draws thresholds),
        every value is looked at. The same holds for what scikit-learn grows itself: sparse X, criteria that are objects.
        ``DecisionTreeClassifier`` grows the tree of X that is a tensor on a GPU there, by Gini impurity, of up to 64 classes
        and whole weights: the same tree.

"""


def with_max_bins(cls):
    """Gives an estimator the keyword ``max_bins``, which ``to_sklearn`` drops."""
    inherited = cls.__init__

    @functools.wraps(inherited)
    def __init__(self, *args, max_bins=None, **kwargs):
        inherited(self, *args, **kwargs)
        self.max_bins = max_bins
        if hasattr(self, "estimator_params"):
            self.estimator_params = (*self.estimator_params, "max_bins")

    # scikit-learn reads the parameters from the signature.
    known = inspect.signature(inherited)
    added = inspect.Parameter("max_bins", inspect.Parameter.KEYWORD_ONLY, default=None)
    __init__.__signature__ = known.replace(parameters=[*known.parameters.values(), added])
    cls.__init__ = __init__
    cls.max_bins = None  # of estimators pickled before there was any
    cls._own_parameters = ("max_bins",)
    cls._parameter_constraints = {
        **cls._parameter_constraints,
        "max_bins": [Interval(Integral, 2, 255, closed="both"), None],
    }
    cls.__doc__ = re.sub(r"(?m)^ {4}Attributes\n {4}-+$", lambda found: _DOC + found[0], cls.__doc__, count=1)
    return cls


class Bins:
    """The columns of a float32 matrix in at most ``max_bins`` bins each, besides that of NaN."""

    def __init__(self, X: np.ndarray, max_bins: int, threads: int = 0):
        X = _exact.readable(X)
        mapper = BinMapper(n_bins=max_bins + 1, random_state=0)
        mapper.fit_sample(X, *mapper.draw(len(X)))
        self.binned = bin_columns(X, mapper.bin_thresholds_)
        rows, columns = X.shape
        strides = X.strides[0] // 4, X.strides[1] // 4
        self._kernel = _cpu.TreeBins(X.ctypes.data, rows, columns, *strides, self.binned.ctypes.data, rows, threads)

    def grow(self, target: _exact.Target, settings: _exact.Settings) -> _cpu.ExactTree:
        return _cpu.tree_grow_binned(self._kernel, target.arguments(), settings.arguments())
