"""Trees of exact search against scikit-learn's, node for node."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import sklearn.tree
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csc_matrix
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_digits, make_classification
from sklearn.tree._criterion import MSE

import fastnn
import fastnn.tree
from fastnn import _state

from .compare import FIELDS, assert_same, count_ties

PARAMETERS = [
    {},
    {"max_depth": 5, "min_samples_leaf": 7},
    {"min_samples_split": 0.05, "min_samples_leaf": 0.01},
    {"max_features": "sqrt"},
    {"max_features": 0.6, "max_leaf_nodes": 12},
    {"max_leaf_nodes": 9},
    {"min_weight_fraction_leaf": 0.05},
    {"min_impurity_decrease": 0.01},
    {"splitter": "random"},
    {"splitter": "random", "max_features": 1, "min_samples_leaf": 3},
    {"ccp_alpha": 0.005},
]


def classes(rows, columns, n_classes=2, seed=0):
    x, y = make_classification(
        rows,
        columns,
        n_informative=min(4, columns),
        n_redundant=0,
        n_classes=n_classes,
        n_clusters_per_class=1,
        flip_y=0.1,
        random_state=seed,
    )
    return x.astype(np.float32), y


def values_of(kind, x, seed=0):
    """Continuous, with many equal values, or with values missing."""
    if kind == "equal":
        return np.round(x * 2)
    if kind == "missing":
        return np.where(np.random.RandomState(seed).rand(*x.shape) < 0.1, np.nan, x).astype(np.float32)
    return x


def both(name, x, y, sample_weight=None, **parameters):
    fitted = []
    for module in (fastnn.tree, sklearn.tree):
        estimator = getattr(module, name)(random_state=3, **parameters)
        fitted.append(estimator.fit(x, y, sample_weight=sample_weight))
    return fitted


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
@pytest.mark.parametrize("kind", ["continuous", "equal", "missing"])
@pytest.mark.parametrize(("rows", "columns", "n_classes"), [(503, 7, 2), (257, 5, 3), (37, 3, 2), (127, 11, 5)])
def test_whole_weights_give_the_same_bits(isa, no_fallback, rows, columns, n_classes, kind, parameters):
    """Sums of whole weights are exact: even ties are broken as scikit-learn breaks them."""
    x, y = classes(rows, columns, n_classes)
    x = values_of(kind, x)
    weights = np.random.RandomState(1).randint(0, 4, rows)
    for criterion in ("gini", "entropy"):
        for sample_weight in (None, weights):
            ours, theirs = both("DecisionTreeClassifier", x, y, sample_weight, criterion=criterion, **parameters)
            assert_same(ours.tree_, theirs.tree_)


@pytest.mark.parametrize("rows", [2, 3, 15, 16, 17, 31, 32, 33, 127, 128, 129, 255, 256, 257, 8191, 8192])
def test_lengths_around_the_vectors_and_blocks(isa, rows):
    x, y = classes(max(rows, 40), 3)
    x, y = x[:rows], y[:rows]
    for n_classes in (2, 3):
        target = y if n_classes == 2 else (y + (np.arange(rows) % 3 == 0)) % 3
        ours, theirs = both("DecisionTreeClassifier", x, target, max_depth=9)
        assert_same(ours.tree_, theirs.tree_)
    ours, theirs = both("DecisionTreeRegressor", x, np.round(x[:, 0] * 8) + y, max_depth=9)
    assert_same(ours.tree_, theirs.tree_)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_matter(threads):
    x, y = classes(20011, 13)
    torch.set_num_threads(threads)
    ours, theirs = both("DecisionTreeClassifier", x, y)
    assert_same(ours.tree_, theirs.tree_)
    ours, theirs = both("DecisionTreeClassifier", values_of("missing", x), y, max_depth=6)
    assert_same(ours.tree_, theirs.tree_)


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
@pytest.mark.parametrize("kind", ["continuous", "equal", "missing"])
def test_weights_whose_sums_are_exact_give_the_same_bits(kind, parameters):
    x, y = classes(503, 7, 3)
    weights = np.random.RandomState(1).randint(0, 64, len(y)) / 64
    for criterion in ("gini", "entropy"):
        ours, theirs = both("DecisionTreeClassifier", values_of(kind, x), y, weights, criterion=criterion, **parameters)
        assert_same(ours.tree_, theirs.tree_)


# Draws go on from the node before: after a tie that is broken otherwise, other features are drawn.
WITHOUT_DRAWS = [p for p in PARAMETERS if not p.keys() & {"max_features", "splitter", "ccp_alpha"}]


@pytest.mark.parametrize("parameters", [*WITHOUT_DRAWS, {"class_weight": "balanced"}], ids=str)
@pytest.mark.parametrize("kind", ["continuous", "equal", "missing"])
def test_fractional_weights(kind, parameters, record_property):
    """Sums round, in an order that differs: splits may differ where gains are equal, and nowhere else."""
    x, y = classes(701, 7)
    x = values_of(kind, x)
    ours, theirs = both("DecisionTreeClassifier", x, y, np.random.RandomState(1).rand(len(y)), **parameters)
    ties = count_ties(ours.tree_, theirs.tree_)
    record_property("ties", ties)
    assert ties <= 0.12 * theirs.tree_.node_count


@pytest.mark.parametrize("criterion", ["squared_error", "poisson"])
@pytest.mark.parametrize("kind", ["continuous", "equal", "missing"])
@pytest.mark.parametrize("parameters", WITHOUT_DRAWS, ids=str)
def test_regressor(isa, no_fallback, kind, criterion, parameters, record_property):
    x, y = classes(523, 7)
    x = values_of(kind, x)
    y = np.abs(np.random.RandomState(0).randn(len(y))) + y
    weights = np.random.RandomState(1).rand(len(y))
    for sample_weight in (None, weights):
        ours, theirs = both("DecisionTreeRegressor", x, y, sample_weight, criterion=criterion, **parameters)
        ties = count_ties(ours.tree_, theirs.tree_)
        record_property("ties", ties)
        assert ties <= 0.12 * theirs.tree_.node_count


@pytest.mark.parametrize("kind", ["continuous", "equal", "missing"])
@pytest.mark.parametrize("parameters", PARAMETERS[:-1], ids=str)
def test_regressor_of_whole_numbers_gives_the_same_bits(isa, kind, parameters):
    x, y = classes(611, 6)
    x = values_of(kind, x)
    y = np.round(4 * np.random.RandomState(0).randn(len(y))) + y
    for sample_weight in (None, np.random.RandomState(1).randint(0, 4, len(y))):
        ours, theirs = both("DecisionTreeRegressor", x, y, sample_weight, **parameters)
        assert_same(ours.tree_, theirs.tree_)


@pytest.mark.parametrize("splitter", ["best", "random"])
@pytest.mark.parametrize("leaves", [None, 11])
def test_monotonic_constraints(splitter, leaves):
    x, y = classes(499, 5)
    for kind in ("continuous", "missing"):
        signs = [1, -1, 0, 0, 1]
        parameters = {"monotonic_cst": signs, "splitter": splitter, "max_leaf_nodes": leaves}
        ours, theirs = both("DecisionTreeClassifier", values_of(kind, x), y, **parameters)
        assert_same(ours.tree_, theirs.tree_)
        ours, theirs = both("DecisionTreeRegressor", values_of(kind, x), y * 3.0, **parameters)
        assert_same(ours.tree_, theirs.tree_)


def test_outputs():
    x, y = classes(401, 6, 3)
    several = np.stack([y, y % 2, (x[:, 0] > 0).astype(int)], axis=1)
    for criterion in ("gini", "entropy"):
        ours, theirs = both("DecisionTreeClassifier", x, several, criterion=criterion)
        assert_same(ours.tree_, theirs.tree_)
        assert [list(c) for c in ours.classes_] == [list(c) for c in theirs.classes_]
        for mine, other in zip(ours.predict_proba(x), theirs.predict_proba(x), strict=True):
            np.testing.assert_array_equal(mine, other)
    ours, theirs = both("DecisionTreeRegressor", x, several * 2.0)
    assert_same(ours.tree_, theirs.tree_)


@pytest.mark.parametrize("name", ["ExtraTreeClassifier", "ExtraTreeRegressor"])
@pytest.mark.parametrize("parameters", [{}, {"max_features": 3, "min_samples_leaf": 2}], ids=str)
def test_extra_trees(isa, no_fallback, name, parameters):
    x, y = classes(607, 9, 3)
    for kind in ("continuous", "equal", "missing"):
        ours, theirs = both(name, values_of(kind, x), y, **parameters)
        assert_same(ours.tree_, theirs.tree_)


@pytest.mark.parametrize("max_features", [None, 2, 9])
def test_random_splits_of_more_rows_than_are_copied(isa, no_fallback, max_features):
    """Nodes of few rows are copied together, of all kinds of targets; not where few features are looked at."""
    draws = np.random.RandomState(0)
    x = draws.randn(2503, 60).astype(np.float32)
    x[draws.rand(*x.shape) < 0.02] = np.nan
    whole = np.round(3 * np.nan_to_num(x[:, 0]) + draws.randn(len(x))) + 9
    weights = draws.randint(0, 3, len(x))
    few = {"splitter": "random", "max_features": max_features, "min_samples_leaf": 2}
    for y, parameters in (
        (whole > 9, {}),
        (whole % 10, {}),
        (whole % 3, {"criterion": "entropy"}),
        (np.stack([whole % 3, whole > 9], axis=1), {}),
        (whole > 9, {"max_leaf_nodes": 200}),
    ):
        for sample_weight in (None, weights):
            ours, theirs = both("DecisionTreeClassifier", x, y, sample_weight, **few, **parameters)
            assert_same(ours.tree_, theirs.tree_)
    for y, parameters in (
        (whole, {}),
        (np.stack([whole, 2 - whole], axis=1), {}),
        (whole, {"max_leaf_nodes": 200}),
    ):
        for sample_weight in (None, weights):
            ours, theirs = both("DecisionTreeRegressor", x, y, sample_weight, **few, **parameters)
            assert_same(ours.tree_, theirs.tree_)
    # Sums that are rounded: splits tie that part a few rows alike, the rarer the fewer the columns.
    y, fraction = np.abs(whole) + draws.rand(len(x)), draws.rand(len(x))
    for parameters in ({}, {"criterion": "poisson"}):
        ours, theirs = both("DecisionTreeRegressor", x[:, :12], y, fraction, **few, **parameters)
        assert count_ties(ours.tree_, theirs.tree_) <= 0.01 * ours.tree_.node_count


@pytest.mark.parametrize("n_classes", [2, 10, 16, 17, 64, 65])
@pytest.mark.parametrize("kind", ["few", "one more", "too near", "missing", "heavy"])
def test_columns_of_few_values(isa, no_fallback, n_classes, kind):
    """Up to 32 values are counted in place of sorted, in nodes of little weight."""
    draws = np.random.RandomState(0)
    x = draws.randint(0, 32, (400, 5)).astype(np.float32) / 4
    x[:32, 0] = np.arange(32) / 4
    y = draws.randint(0, n_classes, 400)
    y[:n_classes] = np.arange(n_classes)
    weights = draws.randint(0, 3, 400)
    if kind == "one more":
        x[40, 0] = 99
    elif kind == "too near":
        x[40, 1], x[41, 1] = 0, 5e-8
    elif kind == "missing":
        x[40:50, 2] = np.nan
    elif kind == "heavy":
        weights = weights * 100 + 1
    for parameters in ({}, {"max_features": 2}, {"min_samples_leaf": 4, "min_weight_fraction_leaf": 0.02}):
        for sample_weight in (None, weights):
            ours, theirs = both("DecisionTreeClassifier", x, y, sample_weight, **parameters)
            assert_same(ours.tree_, theirs.tree_)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("DecisionTreeClassifier", {"max_features": 2}),
        ("DecisionTreeClassifier", {"max_features": 2, "criterion": "entropy", "max_depth": 9}),
        ("DecisionTreeClassifier", {"max_features": 3, "monotonic_cst": [1, 0, 0, -1, 0, 0]}),
        ("DecisionTreeClassifier", {"max_features": 2, "max_leaf_nodes": 60}),
        ("DecisionTreeRegressor", {"max_features": 2}),
        ("DecisionTreeRegressor", {"max_features": 2, "criterion": "poisson"}),
        ("DecisionTreeRegressor", {"max_features": 3, "monotonic_cst": [1, 0, 0, -1, 0, 0]}),
        ("ExtraTreeClassifier", {}),
        ("ExtraTreeRegressor", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("weights", ["none", "small", "large"])
@pytest.mark.parametrize("outputs", [1, 2])
def test_rows_of_small_nodes_laid_together(isa, no_fallback, name, parameters, weights, outputs):
    """Below a node of some thousand rows; columns of many values, of few, and with values missing."""
    if outputs == 2 and "monotonic_cst" in parameters:
        return
    draws = np.random.RandomState(0)
    x, y = classes(2500, 6)
    x[:, 1] = np.round(x[:, 1])
    x[:, 4] = values_of("missing", x[:, 4:5])[:, 0]
    most = {"none": 2, "small": 3, "large": 2**19}[weights]
    sample_weight = None if weights == "none" else draws.randint(0, most, len(y))
    if "poisson" not in parameters.values():
        y = np.stack([y, (x[:, 0] > 0) + 0], axis=1)[:, :outputs].squeeze()
        ours, theirs = both(name, x, y, sample_weight, **parameters)
        assert_same(ours.tree_, theirs.tree_)
    else:
        ours, theirs = both(name, x, y + draws.randint(0, 3, len(y)), sample_weight, **parameters)
        # The loss of a node is a sum over its rows, in an order that differs; the gains are not.
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(ours.tree_, field), getattr(theirs.tree_, field))
        np.testing.assert_allclose(ours.tree_.impurity, theirs.tree_.impurity, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint64, np.float64, bool, str])
def test_classes_of_any_type(dtype):
    x, y = classes(200, 4, 3)
    least, most = (np.iinfo(dtype).min, np.iinfo(dtype).max) if np.issubdtype(dtype, np.integer) else (0, 1)
    y = np.array([least, most, 1]).astype(dtype)[y] if dtype is str else np.array([least, most, 1], dtype)[y]
    ours, theirs = both("DecisionTreeClassifier", x, y)
    assert_same(ours.tree_, theirs.tree_)
    assert ours.classes_.dtype == theirs.classes_.dtype
    np.testing.assert_array_equal(ours.classes_, theirs.classes_)


@pytest.mark.parametrize(("rows", "n_classes"), [(21, 10), (21, 11), (33, 17), (35, 18), (200, 100), (200, 101)])
def test_labels_that_may_be_no_classes(rows, n_classes):
    """scikit-learn warns where there are more classes than half the rows."""
    x, y = np.random.RandomState(0).randn(rows, 3), np.arange(rows) % n_classes
    seen = []
    for module in (sklearn.tree, fastnn.tree):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module.DecisionTreeClassifier().fit(x, y)
        seen.append([str(warning.message) for warning in caught])
    assert seen[0] == seen[1]


def test_parameters_are_checked_whenever_they_change():
    x, y = classes(60, 3)
    tree = fastnn.tree.DecisionTreeClassifier(max_depth=2).fit(x, y)
    for wrong in ({"max_depth": 2.0}, {"max_depth": -1}, {"criterion": "none"}, {"max_features": [1]}):
        with pytest.raises(ValueError, match=f"The '{next(iter(wrong))}' parameter of DecisionTreeClassifier must be"):
            clone(tree).set_params(**wrong).fit(x, y)


@pytest.mark.parametrize("load", [load_digits, load_breast_cancer])
def test_data_of_scikit_learn(load):
    x, y = load(return_X_y=True)
    for parameters in ({}, {"max_depth": 8}, {"max_features": "sqrt"}):
        ours, theirs = both("DecisionTreeClassifier", x, y, **parameters)
        assert_same(ours.tree_, theirs.tree_)
        np.testing.assert_array_equal(ours.predict(x), theirs.predict(x))
        np.testing.assert_array_equal(ours.feature_importances_, theirs.feature_importances_)


def test_any_layout():
    x, y = classes(300, 8)
    expected = sklearn.tree.DecisionTreeClassifier(random_state=0).fit(x, y).tree_
    wide = np.zeros((600, 16), np.float32)
    wide[::2, ::2] = x
    odd = np.zeros((300, 33), np.uint8)
    odd[:, 1:] = np.ascontiguousarray(x).view(np.uint8)
    layouts = [np.asfortranarray(x), wide[::2, ::2], x[::-1][::-1], x.astype(np.float64), x.tolist()]
    layouts.append(np.ndarray((300, 8), np.float32, odd.data, 1, (33, 4)))
    for layout in layouts:
        assert_same(fastnn.tree.DecisionTreeClassifier(random_state=0).fit(layout, y).tree_, expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_property(data):
    """Small whole numbers: every value, gain and weight has equals."""
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 4))
    cell = st.sampled_from([0.0, -0.0, 1.0, 1.0 + 2e-7, -3.0, float("nan"), 2.0**-140, 3e38])
    x = np.array(data.draw(st.lists(cell, min_size=rows * columns, max_size=rows * columns)), np.float32)
    x = x.reshape(rows, columns)
    y = np.array(data.draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows)))
    weights = np.array(data.draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows)))
    if not weights.any():
        weights = None
    splitter = data.draw(st.sampled_from(["best", "random"]))
    for name in ("DecisionTreeClassifier", "DecisionTreeRegressor"):
        ours, theirs = both(name, x, y, weights, splitter=splitter)
        assert_same(ours.tree_, theirs.tree_)


@pytest.mark.parametrize(
    ("x", "y", "parameters"),
    [
        (np.zeros((0, 3)), np.zeros(0), {}),
        (np.zeros((3, 0)), np.zeros(3), {}),
        (np.zeros(3), np.zeros(3), {}),
        (np.array([[1.0], [np.inf]]), [0, 1], {}),
        (np.zeros((3, 1)), np.zeros(4), {}),
        (np.array([["a"], ["b"]]), [0, 1], {}),
        (np.zeros((3, 1)), [0.5, 0.1, 0.2], {}),
        (np.zeros((3, 1)), [0, 1, 1], {"max_depth": 0}),
        (np.zeros((3, 1)), [0, 1, 1], {"criterion": "none"}),
        (np.zeros((3, 2)), [0, 1, 1], {"monotonic_cst": [1]}),
        (np.zeros((3, 1)), [0, 1, 1], {"monotonic_cst": [2]}),
        (np.zeros((3, 1)), [0, 1, 2], {"monotonic_cst": [1]}),
        (np.zeros((3, 1)), [0, 1, 1], {"sample_weight": [1, 2]}),
    ],
)
def test_errors_are_those_of_scikit_learn(x, y, parameters):
    parameters = dict(parameters)
    sample_weight = parameters.pop("sample_weight", None)
    messages = []
    for module in (sklearn.tree, fastnn.tree):
        with pytest.raises((ValueError, TypeError)) as caught:
            module.DecisionTreeClassifier(**parameters).fit(x, y, sample_weight=sample_weight)
        messages.append((type(caught.value), str(caught.value)))
    assert messages[0] == messages[1]


def test_what_is_left_to_scikit_learn_is_counted():
    x, y = classes(60, 3)
    _state.reset_fallbacks()
    fastnn.tree.DecisionTreeClassifier(random_state=0).fit(csc_matrix(x), y)
    fastnn.tree.DecisionTreeRegressor(criterion=MSE(1, len(y))).fit(x, y)
    found = {(f["op"], f["reason"]): f["count"] for f in fastnn.info()["fallbacks"]}
    assert found == {
        ("tree.DecisionTreeClassifier", "a sparse X"): 1,
        ("tree.DecisionTreeRegressor", "a Criterion object"): 1,
    }
    _state.reset_fallbacks()
    with fastnn.strict(), pytest.raises(fastnn.FallbackError):
        fastnn.tree.DecisionTreeRegressor(criterion=MSE(1, len(y))).fit(x, y)
