"""What holds of every estimator of fastnn.tree: scikit-learn's own checks, and that it is a scikit-learn estimator in use."""

from __future__ import annotations

import inspect
import pickle
import re
import subprocess
import sys

import joblib
import numpy as np
import pytest
import sklearn.ensemble
import sklearn.tree
import torch
from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.datasets import load_breast_cancer, make_classification
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastnn.tree

ESTIMATORS = [
    cls
    for name in sorted(set(fastnn.tree.__all__))
    if inspect.isclass(cls := getattr(fastnn.tree, name)) and issubclass(cls, BaseEstimator)
]
SMALL = {"n_estimators": 5, "max_iter": 5}
#: Of rows that are drawn, of splits that tie: scikit-learn expects the same of its own forests and gradient boosting.
WEIGHTS = {
    f"check_sample_weight_equivalence_on_{kind}_data": "sample_weight is not equivalent to repeating samples"
    for kind in ("dense", "sparse")
}


def small(cls, **options):
    accepted = cls().get_params()
    size = {name: value for name, value in SMALL.items() if name in accepted}
    seed = {"random_state": 0} if "random_state" in accepted else {}
    return cls(**{**size, **seed, **options})


def plain(cls):
    """The scikit-learn class of the same name, or None."""
    return getattr(sklearn.tree, cls.__name__, getattr(sklearn.ensemble, cls.__name__, None))


def data(cls, n=200, dtype=np.float32):
    X, y = make_classification(n, 6, n_informative=4, random_state=0)
    return X.astype(dtype), y if is_classifier(cls()) else X[:, 0] * X[:, 1] + y


def expected_failures(estimator):
    return WEIGHTS if type(estimator).__name__.startswith(("RandomForest", "GradientBoosting", "Cascade")) else {}


def test_every_estimator_is_here():
    names = {cls.__name__ for cls in ESTIMATORS}
    assert names >= {
        "DecisionTreeClassifier",
        "RandomForestRegressor",
        "AdaBoostClassifier",
        "GradientBoostingClassifier",
        "GradientBoostingRegressor",
        "CascadeClassifier",
    }


@parametrize_with_checks(
    [small(cls) for cls in ESTIMATORS], expected_failed_checks=expected_failures, xfail_strict=True
)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("cls", ESTIMATORS)
def test_signature_and_parameters_are_scikit_learns(cls):
    theirs = plain(cls)
    if theirs is None:
        assert cls.__name__ == "CascadeClassifier"
        return
    assert issubclass(cls, theirs)
    added = set(cls._own_parameters)
    assert added <= {"max_bins"}
    signature = inspect.signature(cls)
    known = [parameter for name, parameter in signature.parameters.items() if name not in added]
    assert signature.replace(parameters=known) == inspect.signature(theirs)
    assert set(cls().get_params()) - added == set(theirs().get_params())


@pytest.mark.parametrize("cls", ESTIMATORS)
def test_clone_pickle_and_deep_copies(cls):
    X, y = data(cls)
    model = small(cls).fit(X, y)
    expected = model.predict(X)
    assert np.array_equal(clone(model).fit(X, y).predict(X), expected)
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is cls and np.array_equal(again.predict(X), expected)
    assert not any("shared" in name or "once" in name for name in vars(model))


@pytest.mark.parametrize("cls", ESTIMATORS)
def test_to_sklearn_is_the_same_model(cls):
    X, y = data(cls)
    model = small(cls).fit(X, y)
    if plain(cls) is None:
        assert not hasattr(model, "to_sklearn")
        return
    other = model.to_sklearn()
    assert type(other) is plain(cls)
    for name in ("predict", "predict_proba", "decision_function", "apply"):
        assert hasattr(model, name) == hasattr(other, name)
        if hasattr(other, name):
            ours, theirs = getattr(model, name)(X), getattr(other, name)(X)
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), name
    # It is a plain one to the last tree, and lives where fastnn is not.
    text = pickle.dumps(other)
    assert b"fastnn" not in text
    assert other.fit(X, y).score(X, y) > 0.2
    assert type(small(cls).to_sklearn()) is plain(cls)


@pytest.mark.parametrize("cls", ESTIMATORS)
def test_search_pipeline_and_cross_validation(cls):
    X, y = data(cls)
    depth = "estimator__max_depth" if cls.__name__ in ("AdaBoostClassifier", "CascadeClassifier") else "max_depth"
    model = small(cls)
    if depth.startswith("estimator"):
        inner = fastnn.tree.DecisionTreeClassifier()
        model.set_params(estimator=inner)
    search = GridSearchCV(model, {depth: [1, 3]}, cv=3).fit(X, y)
    assert search.best_params_[depth] in (1, 3) and np.isfinite(search.best_score_)
    piped = make_pipeline(StandardScaler(), small(cls)).fit(X, y)
    assert piped.score(X, y) > 0.2
    assert len(cross_val_score(small(cls), X, y, cv=3)) == 3


@pytest.mark.parametrize("cls", ESTIMATORS)
@pytest.mark.parametrize("backend", ("threading", "loky"))
def test_joblib(cls, backend):
    X, y = data(cls)
    expected = cross_val_predict(small(cls), X, y, cv=2)
    with joblib.parallel_backend(backend, n_jobs=2):
        assert np.array_equal(cross_val_predict(small(cls), X, y, cv=2), expected)
    if "n_jobs" in cls().get_params():
        expected = small(cls).fit(X, y).predict(X)
        assert np.array_equal(small(cls, n_jobs=2).fit(X, y).predict(X), expected)
        with joblib.parallel_config(backend):
            assert np.array_equal(small(cls, n_jobs=2).fit(X, y).predict(X), expected)


@pytest.mark.parametrize("cls", ESTIMATORS)
def test_tensors_in_tensors_out(cls):
    X, y = data(cls)
    expected = small(cls).fit(X, y)
    model = small(cls).fit(torch.from_numpy(X), torch.from_numpy(y))
    for name in ("predict", "predict_proba", "predict_log_proba", "decision_function", "apply"):
        if not hasattr(model, name):
            continue
        with np.errstate(divide="ignore"):
            got, wanted = getattr(model, name)(torch.from_numpy(X)), getattr(expected, name)(X)
        assert isinstance(got, torch.Tensor) and isinstance(wanted, np.ndarray), name
        assert np.array_equal(got.numpy(), wanted), name
    assert model.score(torch.from_numpy(X), torch.from_numpy(y)) == expected.score(X, y)


@pytest.mark.parametrize("cls", ESTIMATORS)
def test_any_kind_of_rows(cls):
    X, y = data(cls)
    model = small(cls).fit(X, y)
    expected = model.predict(X)
    spread = np.full((2 * len(X), 13), np.nan, np.float32)
    spread[::2, 1::2] = X
    for given in (spread[::2, 1::2], np.asfortranarray(X), X.astype(np.float64), X.tolist()):
        assert np.array_equal(model.predict(given), expected)
    half = X.astype(np.float16)
    assert np.array_equal(model.predict(half), model.predict(half.astype(np.float32)))
    assert np.array_equal(model.predict(X[::-1]), expected[::-1])


@pytest.mark.parametrize("cls", ESTIMATORS)
def test_errors_of_scikit_learn(cls):
    X, y = data(cls)
    with pytest.raises(NotFittedError):
        small(cls).predict(X)
    model = small(cls).fit(X, y)
    with pytest.raises(ValueError, match=r"X has 5 features, but .* is expecting 6 features as input"):
        model.predict(X[:, :5])
    with pytest.raises(ValueError, match=re.escape("Found array with 0 sample(s)")):
        model.predict(X[:0])
    infinite = X.copy()
    infinite[3, 1] = np.inf
    bad = [(X[:0], y[:0]), (X, y[:-1]), (X[0], y[:1]), (np.full(X.shape, "a", object), y)]
    if "Hist" not in cls.__name__:  # that one bins infinities
        with pytest.raises(ValueError, match="Input X contains infinity"):
            model.predict(infinite)
        bad.append((infinite, y))
    theirs = plain(cls)
    for bad_X, bad_y in bad:
        with pytest.raises(ValueError) as caught:
            small(cls).fit(bad_X, bad_y)
        if theirs is not None:
            with pytest.raises(type(caught.value)) as expected:
                small(theirs).fit(bad_X, bad_y)
            assert str(caught.value) == str(expected.value)


def test_without_scikit_learn():
    """The module can be imported and says what to install."""
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import fastnn.tree\n"
        "try:\n    fastnn.tree.AdaBoostClassifier\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "pip install fastnn[tree]" in done.stdout, done.stderr


def test_plot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for cls in (
        fastnn.tree.DecisionTreeClassifier,
        fastnn.tree.RandomForestRegressor,
        fastnn.tree.GradientBoostingClassifier,
        fastnn.tree.AdaBoostClassifier,
    ):
        X, y = data(cls)
        model = small(cls).fit(X, y)
        _, axes = plt.subplots()
        assert len(fastnn.tree.plot(model, ax=axes, filled=True)) >= 3
        assert "|---" in model.export_text()
        plt.close("all")
    with pytest.raises(TypeError, match="no trees to plot"):
        fastnn.tree.plot(StandardScaler())
    with pytest.raises(NotFittedError):
        fastnn.tree.plot(fastnn.tree.AdaBoostClassifier())


def test_scikit_learns_exports_are_here_too():
    model = fastnn.tree.DecisionTreeClassifier(max_depth=2).fit(*load_breast_cancer(return_X_y=True))
    plain = model.to_sklearn()
    assert fastnn.tree.export_text(model) == model.export_text() == sklearn.tree.export_text(plain)
    assert fastnn.tree.export_graphviz(model) == sklearn.tree.export_graphviz(plain)
    assert fastnn.tree.plot_tree is sklearn.tree.plot_tree
