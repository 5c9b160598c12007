"""The search by buckets of ranks, which forests of two classes use in nodes of 128 rows or more: scikit-learn's trees to the
bit, whichever buckets are kept."""

import numpy as np
import pytest
import sklearn.ensemble
import sklearn.tree

import fastnn.tree

from .compare import assert_same


def table(kind, rows, columns, seed=0):
    random = np.random.RandomState(seed)
    x = random.normal(size=(rows, columns))
    if kind == "equal":
        x = np.round(x * 3) / 10
    elif kind == "many equal":
        x = np.round(x * 200) / 10
    elif kind == "near":  # chains of values that count as one
        x *= 1e-7
    elif kind == "skewed":
        x[:, 1] = np.exp(5 * x[:, 0])
    elif kind == "mostly 0":
        x[random.rand(*x.shape) < 0.6] = 0
    noise = random.normal(size=rows) * x[:, 0].std()
    return x.astype(np.float32), (x[:, 0] - x[:, -1] + noise > 0).astype(np.int64)


def same(x, y, sample_weight=None, random_state=3, **parameters):
    fitted = [
        module.DecisionTreeClassifier(random_state=random_state, **parameters).fit(x, y, sample_weight)
        for module in (fastnn.tree, sklearn.tree)
    ]
    assert_same(fitted[0].tree_, fitted[1].tree_)


@pytest.mark.parametrize("kind", ["continuous", "equal", "many equal", "near", "skewed", "mostly 0"])
@pytest.mark.parametrize("rows", [127, 128, 129, 500, 1023, 4099, 20011])
def test_trees(isa, no_fallback, rows, kind):
    x, y = table(kind, rows, 7)
    weights = np.random.RandomState(1).randint(0, 4, rows)
    for parameters in (
        {"max_features": 1},
        {"max_features": 3},
        {"max_features": 3, "min_samples_leaf": 5},
        {"max_features": 2, "min_weight_fraction_leaf": 0.02, "max_depth": 7},
        {"max_features": 2, "max_leaf_nodes": 40},
    ):
        same(x, y, **parameters)
        same(x, y, weights, **parameters)


@pytest.mark.parametrize("share", [0.5, 0.01])
def test_classes_that_no_column_tells_apart(isa, no_fallback, share):
    """No bucket is far better than another."""
    random = np.random.RandomState(0)
    x = random.normal(size=(5003, 6)).astype(np.float32)
    same(x, (random.rand(5003) < share).astype(int), max_features=2)


def test_weights_that_fill_the_keys(isa, no_fallback):
    x, y = table("continuous", 3001, 6)
    for largest in (127, 128, 700):  # 7 bits of weight and 1 of class; more
        weights = np.random.RandomState(largest).randint(1, largest + 1, len(y))
        same(x, y, weights, max_features=2)


def test_many_rows_in_one_bucket(isa, no_fallback):
    """Below the first split, where another column is drawn, that one holds 1,499 ranks in a row and one far away."""
    rows, few = 100_000, 1500
    random = np.random.RandomState(0)
    x = np.repeat(np.arange(rows, dtype=np.float32)[:, None], 3, axis=1)
    x[700, 1] = x[800, 2] = 2 * rows
    y = (random.rand(rows) < 0.5).astype(int)
    y[few:] = 1
    for random_state in range(8):  # which columns are drawn
        same(x, y, random_state=random_state, max_features=1, max_depth=3)


def test_forest(isa, no_fallback):
    x, y = table("continuous", 6007, 9)
    ours, theirs = (
        module.RandomForestClassifier(7, random_state=0, n_jobs=2).fit(x, y)
        for module in (fastnn.tree, sklearn.ensemble)
    )
    for mine, other in zip(ours.estimators_, theirs.estimators_, strict=True):
        assert_same(mine.tree_, other.tree_)
