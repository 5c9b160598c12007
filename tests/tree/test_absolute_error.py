"""Trees by absolute error: scikit-learn's to the bit where the order of the rows is, and a reference in float64."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.ensemble
import sklearn.tree
import torch
from sklearn.datasets import make_regression

import fastnn.tree
from fastnn.tree import best_split

from .compare import FIELDS, assert_same, count_ties

PARAMETERS = [
    {},
    {"max_depth": 5, "min_samples_leaf": 7},
    {"min_samples_split": 0.05, "min_samples_leaf": 0.01},
    {"max_features": "sqrt"},
    {"max_features": 0.6, "max_leaf_nodes": 12},
    {"max_leaf_nodes": 60},
    {"min_weight_fraction_leaf": 0.03},
    {"min_impurity_decrease": 0.5},
    {"splitter": "random"},
    {"splitter": "random", "max_features": 1, "min_samples_leaf": 3},
    {"splitter": "random", "max_leaf_nodes": 60},
    {"ccp_alpha": 0.5},
]
WEIGHTS = {
    "none": lambda draws, n: None,
    "whole": lambda draws, n: draws.randint(0, 4, n),
    "far apart": lambda draws, n: draws.randint(1, 400, n) ** 3,
    "fractions": lambda draws, n: draws.rand(n),
    "equal": lambda draws, n: np.full(n, 0.1),
}


def data(rows, columns, outputs=1):
    x, y = make_regression(rows, columns, noise=20, n_targets=outputs, random_state=rows)
    return x.astype(np.float32), y


def both(name, x, y, sample_weight=None, **parameters):
    fitted = []
    for modules in ((fastnn.tree,), (sklearn.tree, sklearn.ensemble)):
        cls = next(getattr(module, name) for module in modules if hasattr(module, name))
        estimator = cls(random_state=3, criterion="absolute_error", **parameters)
        fitted.append(estimator.fit(x, y, sample_weight=sample_weight))
    return fitted


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("rows", "columns", "outputs"), [(503, 7, 1), (257, 5, 3), (37, 3, 1), (1201, 4, 1)])
def test_same_bits(no_fallback, rows, columns, outputs, weights, parameters):
    """Where no two values and targets are equal, rows have one order, and sums round as scikit-learn's do."""
    x, y = data(rows, columns, outputs)
    sample_weight = WEIGHTS[weights](np.random.RandomState(1), rows)
    ours, theirs = both("DecisionTreeRegressor", x, y, sample_weight, **parameters)
    assert_same(ours.tree_, theirs.tree_)
    np.testing.assert_array_equal(ours.predict(x), theirs.predict(x))


@pytest.mark.parametrize("parameters", PARAMETERS[:-1], ids=str)
@pytest.mark.parametrize("kind", ["equal", "missing"])
@pytest.mark.parametrize("weights", ["none", "whole", "far apart"])
def test_whole_numbers_give_the_same_bits(isa, no_fallback, kind, weights, parameters):
    """Sums of whole numbers are exact in any order."""
    draws = np.random.RandomState(0)
    x, y = data(411, 6)
    x = np.round(x * 2) if kind == "equal" else np.where(draws.rand(*x.shape) < 0.1, np.nan, x).astype(np.float32)
    sample_weight = WEIGHTS[weights](draws, len(y))
    for target in (np.round(y), np.round(y / 50)):
        ours, theirs = both("DecisionTreeRegressor", x, target, sample_weight, **parameters)
        assert_same(ours.tree_, theirs.tree_)


@pytest.mark.parametrize("kind", ["equal", "missing"])
@pytest.mark.parametrize("weights", ["none", "whole"])
@pytest.mark.parametrize("parameters", [{}, {"max_depth": 6}, {"max_leaf_nodes": 60}, {"min_samples_leaf": 7}], ids=str)
def test_equal_and_missing_values(no_fallback, kind, weights, parameters, record_property):
    """Equal values and missing ones have no order of their own: splits may differ where gains are equal."""
    draws = np.random.RandomState(0)
    x, y = data(523, 7)
    x = np.round(x * 2) if kind == "equal" else np.where(draws.rand(*x.shape) < 0.1, np.nan, x).astype(np.float32)
    ours, theirs = both("DecisionTreeRegressor", x, y, WEIGHTS[weights](draws, len(y)), **parameters)
    ties = count_ties(ours.tree_, theirs.tree_)
    record_property("ties", ties)
    assert ties <= 0.05 * theirs.tree_.node_count


@pytest.mark.parametrize("splitter", ["best", "random"])
@pytest.mark.parametrize("leaves", [None, 40])
@pytest.mark.parametrize("weights", ["none", "whole", "fractions"])
def test_monotonic_constraints(no_fallback, splitter, leaves, weights):
    x, y = data(499, 5)
    signs = [1, -1, 0, 0, 1]
    sample_weight = WEIGHTS[weights](np.random.RandomState(1), len(y))
    parameters = {"monotonic_cst": signs, "splitter": splitter, "max_leaf_nodes": leaves}
    ours, theirs = both("DecisionTreeRegressor", x, y, sample_weight, **parameters)
    assert_same(ours.tree_, theirs.tree_)
    x[np.random.RandomState(0).rand(*x.shape) < 0.1] = np.nan
    ours, theirs = both("DecisionTreeRegressor", x, np.round(y), None, **parameters)
    assert_same(ours.tree_, theirs.tree_)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_matter(threads):
    x, y = data(5003, 13)
    torch.set_num_threads(threads)
    ours, theirs = both("DecisionTreeRegressor", x, y, max_depth=6)
    assert_same(ours.tree_, theirs.tree_)


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 127, 128, 129])
def test_few_rows(rows):
    x, y = data(rows, 4)
    for splitter in ("best", "random"):
        ours, theirs = both("DecisionTreeRegressor", x, y, splitter=splitter)
        assert_same(ours.tree_, theirs.tree_)


@pytest.mark.parametrize("name", ["ExtraTreeRegressor", "RandomForestRegressor", "ExtraTreesRegressor"])
@pytest.mark.parametrize("parameters", [{}, {"max_features": 3, "min_samples_leaf": 2}], ids=str)
def test_forests(no_fallback, name, parameters):
    x, y = data(607, 9)
    if "Tree" not in name[:9]:
        parameters = {**parameters, "n_estimators": 3}
    ours, theirs = both(name, x, y, **parameters)
    for mine, other in zip(trees(ours), trees(theirs), strict=True):
        assert_same(mine.tree_, other.tree_)
    np.testing.assert_array_equal(ours.predict(x), theirs.predict(x))


def trees(estimator):
    return getattr(estimator, "estimators_", [estimator])


def test_random_splits_of_more_rows_than_are_copied(no_fallback):
    x, y = data(5003, 60)
    for sample_weight in (None, np.random.RandomState(0).randint(0, 3, len(y))):
        ours, theirs = both("ExtraTreeRegressor", x, y, sample_weight, min_samples_leaf=3)
        assert_same(ours.tree_, theirs.tree_)


@pytest.mark.parametrize(("offset", "scale"), [(1e6, 1), (1e12, 1), (0, 1e-300), (0, 1e304), (-3, 1e10)])
def test_targets_of_any_size(no_fallback, offset, scale):
    """Far from 0 sums round so much that most splits gain the same but for that."""
    x, y = data(301, 3)
    ours, theirs = both("DecisionTreeRegressor", x, y * scale + offset)
    assert_same(ours.tree_, theirs.tree_)


def test_negative_weights(no_fallback):
    x, y = data(301, 3)
    draws = np.random.RandomState(0)
    sample_weight = np.where(draws.rand(len(y)) < 0.1, -0.3, 1.0)
    ours, theirs = both("DecisionTreeRegressor", x, y, sample_weight, max_depth=3, min_samples_leaf=40)
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(ours.tree_, field), getattr(theirs.tree_, field))


def test_bins_where_each_value_has_its_own(no_fallback):
    x, y = data(511, 6)
    x = np.round(x * 4)
    x[np.random.RandomState(0).rand(*x.shape) < 0.1] = np.nan
    for target in (np.round(y), np.round(np.stack([y, -y / 7], axis=1))):
        for parameters in ({}, {"max_leaf_nodes": 30}, {"max_features": 3}):
            exact, theirs = both("DecisionTreeRegressor", x, target, **parameters)
            binned = fastnn.tree.DecisionTreeRegressor(
                random_state=3, criterion="absolute_error", max_bins=255, **parameters
            ).fit(x, target)
            assert_same(exact.tree_, theirs.tree_)
            for field in (*FIELDS, "impurity", "value"):
                np.testing.assert_array_equal(getattr(binned.tree_, field), getattr(theirs.tree_, field))


def median(y, w):
    """The weighted median: halfway between two targets where half of the weight is below."""
    order = np.argsort(y)
    y, w = y[order], w[order]
    below = np.cumsum(w)
    at = int(np.searchsorted(below, below[-1] / 2))
    return (y[at] + y[at + 1]) / 2 if below[at] == below[-1] / 2 else y[at]


@pytest.mark.parametrize("weights", ["none", "whole", "fractions"])
@pytest.mark.parametrize("outputs", [1, 2])
def test_float64_reference(weights, outputs):
    """Every node of a tree: its values are medians, its impurity the mean distance, and no split would be better."""
    x, y = data(83, 3, outputs)
    y = y.reshape(len(y), -1)
    w = WEIGHTS[weights](np.random.RandomState(1), len(y))
    fitted = fastnn.tree.DecisionTreeRegressor(criterion="absolute_error", random_state=0).fit(x, y, sample_weight=w)
    tree, w = fitted.tree_, np.ones(len(y)) if w is None else w.astype(np.float64)
    paths = fitted.decision_path(x).toarray().astype(bool)

    def error(rows):
        rows = rows & (w > 0)
        centre = np.array([median(y[rows, k], w[rows]) for k in range(outputs)])
        return (w[rows, None] * np.abs(y[rows] - centre)).sum() / outputs, centre

    for node in range(tree.node_count):
        rows = paths[:, node]
        whole, centre = error(rows)
        np.testing.assert_array_equal(tree.value[node, :, 0], centre)
        np.testing.assert_allclose(tree.impurity[node], whole / w[rows].sum(), rtol=1e-9, atol=1e-12)
        if tree.children_left[node] < 0:
            continue
        best = np.inf
        for column in x.T:
            values = np.unique(column[rows & (w > 0)])
            for threshold in values[:-1]:
                left = rows & (column <= threshold)
                best = min(best, error(left)[0] + error(rows & ~left)[0])
        chosen = sum(error(paths[:, child[node]])[0] for child in (tree.children_left, tree.children_right))
        np.testing.assert_allclose(chosen, best, rtol=1e-9, atol=1e-12)


def test_best_split_is_the_root_of_a_tree():
    x, y = data(211, 5)
    for sample_weight in (None, np.random.RandomState(1).rand(len(y))):
        found = best_split(x, y, sample_weight=sample_weight, criterion="absolute_error")
        root = both("DecisionTreeRegressor", x, y, sample_weight, max_depth=1)[1].tree_
        assert (found.feature, found.threshold) == (root.feature[0], root.threshold[0])
        np.testing.assert_allclose(found.impurity, root.impurity[0], rtol=1e-12)
