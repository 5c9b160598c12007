"""Gradient boosting and AdaBoost: the models scikit-learn fits, from fastnn's trees."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import sklearn.ensemble
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression

import fastnn.tree
from fastnn import _state


def regression(n=700, features=6):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((n, features)).astype(np.float32)
    return X, np.sin(2 * X[:, 0]) + X[:, 1] * X[:, 2] + 0.2 * rng.standard_normal(n)


def labels(classes, n=700):
    X, score = regression(n)
    return X, np.searchsorted(np.quantile(score, np.arange(1, classes) / classes), score)


def both(name, X, y, sample_weight=None, **parameters):
    pair = []
    for module in (fastnn.tree, sklearn.ensemble):
        options = {"random_state": 0, **parameters}
        pair.append(getattr(module, name)(**options).fit(X, y, sample_weight=sample_weight))
    return pair


def assert_same_model(ours, theirs, X, exact=False):
    """Same trees, where no two splits part the rows in the same way; values as close as sums in another order are."""
    assert ours.estimators_.shape == theirs.estimators_.shape
    for mine, other in zip(ours.estimators_.ravel(), theirs.estimators_.ravel(), strict=True):
        assert type(mine) is fastnn.tree.DecisionTreeRegressor
        assert np.array_equal(mine.tree_.feature, other.tree_.feature)
        assert np.allclose(mine.tree_.threshold, other.tree_.threshold, rtol=1e-12)
        leaf = mine.tree_.children_left < 0
        assert np.allclose(mine.tree_.value[leaf], other.tree_.value[leaf], rtol=1e-7, atol=1e-10)
    assert np.allclose(ours.train_score_, theirs.train_score_, rtol=1e-9, atol=1e-12)
    assert np.array_equal(ours.apply(X), theirs.apply(X))
    assert np.allclose(ours.predict(X) == theirs.predict(X), True) or np.allclose(ours.predict(X), theirs.predict(X))
    # From the same trees prediction has the same bits.
    plain = ours.to_sklearn()
    assert np.array_equal(ours.predict(X), plain.predict(X))
    for a, b in zip(ours.staged_predict(X), plain.staged_predict(X), strict=True):
        assert np.array_equal(a, b)
    if hasattr(plain, "decision_function"):
        assert np.array_equal(ours.decision_function(X), plain.decision_function(X))
        assert np.array_equal(ours.predict_proba(X), plain.predict_proba(X))
        for a, b in zip(ours.staged_decision_function(X), plain.staged_decision_function(X), strict=True):
            assert np.array_equal(a, b)


#: In small nodes two features often part the rows in the same way: a tie, which roundings decide.
LARGE_LEAVES = {"n_estimators": 12, "min_samples_leaf": 25}
REGRESSIONS = (
    {},
    {"loss": "absolute_error"},
    {"loss": "huber", "alpha": 0.8},
    {"loss": "quantile", "alpha": 0.3},
    {"subsample": 0.6},
    {"subsample": 0.6, "loss": "huber"},
    {"max_features": 2, "max_leaf_nodes": 6},
    {"max_depth": 5, "min_samples_leaf": 20, "ccp_alpha": 0.001},
    {"init": "zero", "learning_rate": 0.5},
    {"n_iter_no_change": 2, "n_estimators": 60, "learning_rate": 0.8},
)


@pytest.mark.parametrize("parameters", REGRESSIONS, ids=str)
@pytest.mark.parametrize("weighted", (False, True))
def test_regression_is_scikit_learns(parameters, weighted):
    X, y = regression()
    weight = np.random.default_rng(1).integers(1, 4, len(y)).astype(float) if weighted else None
    ours, theirs = both("GradientBoostingRegressor", X, y, weight, **{**LARGE_LEAVES, **parameters})
    assert_same_model(ours, theirs, X)
    if "n_iter_no_change" in parameters:
        assert 2 <= ours.n_estimators_ < 60
    if "subsample" in parameters:
        assert np.allclose(ours.oob_improvement_, theirs.oob_improvement_)


CLASSIFICATIONS = (
    {},
    {"subsample": 0.5},
    {"max_features": "sqrt", "max_depth": 4},
    {"init": "zero"},
    {"n_iter_no_change": 3, "n_estimators": 80, "learning_rate": 0.7},
)


@pytest.mark.parametrize("parameters", CLASSIFICATIONS, ids=str)
@pytest.mark.parametrize("classes", (2, 4))
def test_classification_is_scikit_learns(parameters, classes):
    X, y = labels(classes)
    ours, theirs = both("GradientBoostingClassifier", X, y, **{**LARGE_LEAVES, **parameters})
    assert_same_model(ours, theirs, X)


def test_exponential_loss():
    X, y = labels(2)
    ours, theirs = both("GradientBoostingClassifier", X, y, loss="exponential", **LARGE_LEAVES)
    assert_same_model(ours, theirs, X)


def test_warm_start_goes_on():
    X, y = regression()
    model = fastnn.tree.GradientBoostingRegressor(n_estimators=5, warm_start=True, random_state=0).fit(X, y)
    first = model.predict(X)
    model.set_params(n_estimators=12).fit(X, y)
    whole = fastnn.tree.GradientBoostingRegressor(n_estimators=12, random_state=0).fit(X, y)
    assert np.allclose(model.predict(X), whole.predict(X)) and not np.allclose(first, whole.predict(X))


def test_a_learning_rate_that_is_changed_later_is_noticed():
    X, y = regression()
    model = fastnn.tree.GradientBoostingRegressor(n_estimators=5, random_state=0).fit(X, y)
    model.predict(X)
    model.set_params(learning_rate=0.3)
    assert np.array_equal(model.predict(X), model.to_sklearn().predict(X))


def test_progress_is_a_bar(capsys):
    X, y = regression(100)
    seen = []
    model = fastnn.tree.GradientBoostingRegressor(n_estimators=4, verbose=1, random_state=0)
    model.fit(X, y, monitor=lambda i, _, variables: seen.append(i))
    shown = capsys.readouterr()
    assert "4/4" in shown.err and "loss=" in shown.err and shown.out == ""
    assert model.verbose == 1 and seen == [0, 1, 2, 3]
    quiet = fastnn.tree.GradientBoostingRegressor(n_estimators=4, random_state=0).fit(X, y)
    assert capsys.readouterr().err == "" and np.array_equal(quiet.predict(X), model.predict(X))
    fastnn.tree.GradientBoostingRegressor(n_estimators=4, verbose=2).fit(X, y)
    assert "Train Loss" in capsys.readouterr().out
    stopped = fastnn.tree.GradientBoostingRegressor(n_estimators=4, verbose=1).fit(X, y, monitor=lambda i, *_: i == 1)
    assert stopped.n_estimators_ == 2


@pytest.mark.parametrize("name", ("GradientBoostingClassifier", "AdaBoostClassifier"))
def test_sparse_rows(name):
    X, y = labels(2, 150)
    X[X < 0] = 0
    sparse = scipy.sparse.csr_array(X)
    _state.reset_fallbacks()
    ours, theirs = both(name, sparse, y, n_estimators=5)
    # What fastnn does not grow is counted.
    assert any(reason == "a sparse X" for _, reason in _state.fallbacks())
    assert np.allclose(ours.decision_function(sparse), theirs.decision_function(sparse))
    assert np.allclose(ours.decision_function(X), theirs.decision_function(X))
    assert np.array_equal(ours.predict(sparse), theirs.predict(sparse))
    _state.reset_fallbacks()


@pytest.mark.parametrize("classes", (2, 3))
@pytest.mark.parametrize("depth", (1, 3))
def test_adaboost_is_scikit_learns(classes, depth):
    X, y = labels(classes)
    y = np.array(["a", "b", "c"])[y]
    inner = [module.DecisionTreeClassifier(max_depth=depth) for module in (fastnn.tree, sklearn.tree)]
    ours = fastnn.tree.AdaBoostClassifier(inner[0], n_estimators=15, random_state=0).fit(X, y)
    theirs = sklearn.ensemble.AdaBoostClassifier(inner[1], n_estimators=15, random_state=0).fit(X, y)
    assert np.allclose(ours.estimator_weights_, theirs.estimator_weights_, rtol=1e-9)
    assert np.array_equal(ours.predict(X), theirs.predict(X))
    plain = ours.to_sklearn()
    assert np.array_equal(ours.decision_function(X), plain.decision_function(X))
    assert np.array_equal(ours.predict_proba(X), plain.predict_proba(X))
    assert ours.score(X, y) > 0.6
    for a, b in zip(ours.staged_score(X, y), plain.staged_score(X, y), strict=True):
        assert a == b


def test_adaboost_of_what_is_no_tree():
    X, y = labels(2)
    ours = fastnn.tree.AdaBoostClassifier(LogisticRegression(), n_estimators=4, random_state=0).fit(X, y)
    theirs = sklearn.ensemble.AdaBoostClassifier(LogisticRegression(), n_estimators=4, random_state=0).fit(X, y)
    assert np.array_equal(ours.decision_function(X), theirs.decision_function(X))
    default = fastnn.tree.AdaBoostClassifier(n_estimators=4).fit(X, y)
    assert all(type(tree) is fastnn.tree.DecisionTreeClassifier for tree in default.estimators_)
    assert not any("_shared" in vars(tree) for tree in default.estimators_)


@pytest.mark.parametrize("load", (load_breast_cancer, load_digits))
def test_accuracy_on_real_data(load):
    X, y = load(return_X_y=True)
    train = np.arange(len(y)) % 3 != 0
    options = {"n_estimators": 20, "max_depth": 3}
    ours, theirs = both("GradientBoostingClassifier", X[train], y[train], **options)
    scores = [model.score(X[~train], y[~train]) for model in (ours, theirs)]
    assert scores[0] > 0.85 and abs(scores[0] - scores[1]) <= 0.01
