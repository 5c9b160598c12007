"""Decision trees, forests and boosting on fastnn's split kernels, with scikit-learn's names and parameters.

:func:`best_split` needs numpy and torch alone. The estimators are subclasses of scikit-learn's of the same name, and are
imported when they are asked for: ``pip install fastnn[tree]``.
"""

import importlib as _importlib

from ._best_split import BestSplit, best_split

# Name -> the module that defines it.
_ESTIMATORS = {
    "AdaBoostClassifier": "_adaboost",
    "CascadeClassifier": "_cascade",
    "DecisionTreeClassifier": "_decision_tree",
    "DecisionTreeRegressor": "_decision_tree",
    "ExtraTreeClassifier": "_decision_tree",
    "ExtraTreeRegressor": "_decision_tree",
    "ExtraTreesClassifier": "_forest",
    "ExtraTreesRegressor": "_forest",
    "GradientBoostingClassifier": "_gradient_boosting",
    "GradientBoostingRegressor": "_gradient_boosting",
    "HistGradientBoostingClassifier": "_hist_gradient_boosting",
    "HistGradientBoostingRegressor": "_hist_gradient_boosting",
    "RandomForestClassifier": "_forest",
    "RandomForestRegressor": "_forest",
    "Stage": "_cascade",
    "StageReport": "_cascade",
    "local_fit": "_distributed",
    "plot": "_predict",
}
# scikit-learn's own, which read these estimators as they do theirs.
_EXPORTS = ("export_graphviz", "export_text", "plot_tree")


def __getattr__(name):
    if name not in _ESTIMATORS and name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        _importlib.import_module("sklearn")
    except ImportError as error:
        raise ImportError(f"fastnn.tree.{name} needs scikit-learn: pip install fastnn[tree]") from error
    if name in _EXPORTS:
        return getattr(_importlib.import_module("sklearn.tree"), name)
    return getattr(_importlib.import_module(f"{__name__}.{_ESTIMATORS[name]}"), name)


def __dir__():
    return sorted([*globals(), *_ESTIMATORS, *_EXPORTS])


__all__ = ["BestSplit", "best_split"]  # noqa: RUF100
__all__ += sorted([*_ESTIMATORS, *_EXPORTS])
