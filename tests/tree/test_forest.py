"""Forests against scikit-learn's, tree for tree."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import sklearn.ensemble
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_digits, make_classification
from sklearn.tree._criterion import MSE

import fastnn.tree
from fastnn import _cpu, _state

from .compare import assert_same

FORESTS = ["RandomForestClassifier", "RandomForestRegressor", "ExtraTreesClassifier", "ExtraTreesRegressor"]


def data(rows=301, columns=9, n_classes=3):
    x, y = make_classification(rows, columns, n_informative=5, n_classes=n_classes, random_state=0, flip_y=0.1)
    return x.astype(np.float32), y


def both(name, x, y, sample_weight=None, **parameters):
    parameters = {"n_estimators": 7, "random_state": 5, **parameters}
    modules = (fastnn.tree, sklearn.ensemble)
    return [getattr(module, name)(**parameters).fit(x, y, sample_weight) for module in modules]


def assert_same_forest(ours, theirs):
    assert len(ours.estimators_) == len(theirs.estimators_)
    for mine, other in zip(ours.estimators_, theirs.estimators_, strict=True):
        assert mine.random_state == other.random_state
        assert mine.get_params() == {"max_bins": None, **other.get_params()}
        assert_same(mine.tree_, other.tree_)
    np.testing.assert_array_equal(ours.feature_importances_, theirs.feature_importances_)


@pytest.mark.parametrize("name", FORESTS)
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"max_depth": 4},
        {"max_features": None, "n_jobs": 2},
        {"max_features": 1, "max_leaf_nodes": 11},
        {"min_samples_leaf": 5, "bootstrap": True, "max_samples": 0.5},
        {"ccp_alpha": 0.002},
    ],
    ids=str,
)
@pytest.mark.parametrize("missing", [False, True])
def test_tree_for_tree(isa, no_fallback, name, parameters, missing):
    x, y = data()
    if missing:
        x = np.where(np.random.RandomState(0).rand(*x.shape) < 0.1, np.nan, x)
    ours, theirs = both(name, x, y, **parameters)
    assert_same_forest(ours, theirs)
    np.testing.assert_array_equal(ours.predict(x), theirs.predict(x))


@pytest.mark.parametrize("name", FORESTS)
def test_weights_and_outputs(name):
    x, y = data()
    weights = np.random.RandomState(1).randint(0, 3, len(y))
    assert_same_forest(*both(name, x, y, weights))
    several = np.stack([y, (x[:, 0] > 0).astype(int)], axis=1)
    ours, theirs = both(name, x, several)
    assert_same_forest(ours, theirs)
    np.testing.assert_array_equal(ours.predict(x), theirs.predict(x))


@pytest.mark.parametrize("class_weight", [{0: 2, 1: 1, 2: 4}, "balanced", "balanced_subsample"])
def test_class_weight(class_weight):
    x, y = data(n_classes=3)
    ours, theirs = both("RandomForestClassifier", x, y, class_weight=class_weight, max_depth=3, max_features=None)
    assert isinstance(class_weight, str) or [t.tree_.node_count for t in ours.estimators_] == [
        t.tree_.node_count for t in theirs.estimators_
    ]
    assert ours.score(x, y) == pytest.approx(theirs.score(x, y), abs=0.05)


@pytest.mark.parametrize("name", ["RandomForestClassifier", "ExtraTreesClassifier"])
@pytest.mark.parametrize("class_weight", ["balanced", "balanced_subsample"])
def test_a_class_of_no_weight_cannot_be_balanced(name, class_weight):
    x, y = data(n_classes=2)
    seen = []
    for module in (fastnn.tree, sklearn.ensemble):
        forest = getattr(module, name)(n_estimators=2, class_weight=class_weight, bootstrap=False, random_state=0)
        with pytest.raises(ValueError, match="NaN") as caught, np.errstate(divide="ignore", invalid="ignore"):
            forest.fit(x, y, sample_weight=(y == 0).astype(float))
        seen.append(str(caught.value))
    assert seen[0] == seen[1]


def test_out_of_bag():
    x, y = data()
    ours, theirs = both("RandomForestClassifier", x, y, oob_score=True, n_estimators=30)
    assert ours.oob_score_ == theirs.oob_score_
    np.testing.assert_array_equal(ours.oob_decision_function_, theirs.oob_decision_function_)
    ours, theirs = both("RandomForestRegressor", x, y, oob_score=True, n_estimators=30)
    assert ours.oob_score_ == pytest.approx(theirs.oob_score_)


def test_no_row_is_out_of_the_bag():
    """Every tree is asked about no rows."""
    x, y = np.zeros((1, 2)), np.array([[0, 1]])
    decisions = []
    for module in (fastnn.tree, sklearn.ensemble):
        forest = module.RandomForestClassifier(n_estimators=2, oob_score=True, random_state=0)
        with pytest.warns(UserWarning, match="do not have OOB scores"):
            decisions.append(forest.fit(x, y).oob_decision_function_)
    np.testing.assert_array_equal(*decisions)


@pytest.mark.parametrize("name", FORESTS)
def test_warm_start(name):
    x, y = data()
    forests = []
    for module in (fastnn.tree, sklearn.ensemble):
        forest = getattr(module, name)(n_estimators=3, warm_start=True, random_state=2).fit(x, y)
        forests.append(forest.set_params(n_estimators=6).fit(x, y))
    assert_same_forest(*forests)
    assert all(type(t).__module__.startswith("fastnn") for t in forests[0].estimators_)


@pytest.mark.parametrize("load", [load_digits, load_breast_cancer])
def test_data_of_scikit_learn(load):
    x, y = load(return_X_y=True)
    for name in ("RandomForestClassifier", "ExtraTreesClassifier"):
        assert_same_forest(*both(name, x, y))


@pytest.mark.parametrize("rows", [5000, 70000])
@pytest.mark.parametrize("name", FORESTS)
def test_larger(name, rows):
    x, y = data(rows, 12)
    ours, theirs = both(name, x, y, n_estimators=2, max_features=3, max_depth=14 if rows > 10000 else None)
    assert_same_forest(ours, theirs)


def test_jobs_do_not_matter():
    x, y = data(2000)
    forests = [fastnn.tree.RandomForestClassifier(8, random_state=0, n_jobs=jobs).fit(x, y) for jobs in (None, 1, 2, 4)]
    for forest in forests[1:]:
        assert_same_forest(forest, forests[0])


def test_what_a_forest_keeps():
    """No data of the fit stays behind, and copies and pickles are whole."""
    x, y = data()
    forest = fastnn.tree.RandomForestClassifier(4, random_state=0).fit(x, y)
    plain = sklearn.ensemble.RandomForestClassifier(4, random_state=0).fit(x, y)
    assert sorted(forest.__dict__) == sorted([*plain.__dict__, "max_bins"])
    assert sorted(forest.estimators_[0].__dict__) == sorted([*plain.estimators_[0].__dict__, "max_bins"])
    again = pickle.loads(pickle.dumps(forest))
    assert_same_forest(again, forest)
    assert clone(forest).get_params() == {"max_bins": None, **plain.get_params()}
    with pytest.raises(ValueError, match="n_estimators=2 must be larger"):
        forest.set_params(n_estimators=2, warm_start=True).fit(x, y)
    assert sorted(forest.__dict__) == sorted([*plain.__dict__, "max_bins"])


def test_tensors():
    x, y = data()
    forest = fastnn.tree.RandomForestClassifier(4, random_state=0).fit(torch.from_numpy(x), torch.from_numpy(y))
    assert_same_forest(forest, sklearn.ensemble.RandomForestClassifier(4, random_state=0).fit(x, y))
    assert isinstance(forest.predict(torch.from_numpy(x)), torch.Tensor)


def test_a_criterion_of_scikit_learn_is_counted():
    x, y = data(50)
    _state.reset_fallbacks()
    both("RandomForestRegressor", x, y, criterion=MSE(1, len(y)), n_estimators=3)
    assert _state.fallbacks() == {("tree.DecisionTreeRegressor", "a Criterion object"): 3}
    _state.reset_fallbacks()


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31 - 1, 2**32 - 1])
@pytest.mark.parametrize("rows", [1, 2, 3, 255, 256, 257, 1000, 70001])
def test_draws_are_those_of_numpy(seed, rows):
    assert _cpu.tree_first_draw(seed, 2**31 - 1) == np.random.RandomState(seed).randint(0, 2**31 - 1)
    for draws in (0, 1, rows, 2 * rows):
        counts = np.full(rows, -1.0)
        _cpu.tree_bootstrap(seed, rows, draws, counts.ctypes.data)
        expected = np.bincount(np.random.RandomState(seed).randint(0, rows, draws), minlength=rows)
        np.testing.assert_array_equal(counts, expected)


def test_progress(capsys):
    x, y = data(60)
    fastnn.tree.RandomForestClassifier(5, verbose=1).fit(x, y)
    assert "5/5" in capsys.readouterr().err
