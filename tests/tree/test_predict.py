"""Prediction by fastnn's kernels: the leaves and sums of scikit-learn's own trees, bit for bit."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import make_classification
from sklearn.ensemble import (
    ExtraTreesRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from fastnn import _cpu
from fastnn.tree._predict import (
    NODE,
    ClassifierForestMixin,
    ClassifierTreeMixin,
    Forest,
    NotFinite,
    RegressorForestMixin,
    TreeMixin,
)

ROWS = (1, 2, 15, 17, 63, 64, 65, 127, 521)


class Tree(ClassifierTreeMixin, DecisionTreeClassifier):
    """scikit-learn's tree, predicting by fastnn's kernels."""


class RegressionTree(TreeMixin, DecisionTreeRegressor):
    """The same of a regression."""


class Trees(ClassifierForestMixin, RandomForestClassifier):
    """scikit-learn's forest, predicting by fastnn's kernels."""


class RegressionTrees(RegressorForestMixin, RandomForestRegressor):
    """The same of a regression."""


def rows(n, features, seed=0):
    return np.random.default_rng(seed).standard_normal((n, features), np.float32)


def classes(X, count, seed=0):
    noise = np.random.default_rng(seed).standard_normal(len(X))
    score = X[:, 0] * X[:, len(X[0]) // 2] + X[:, -1] + 0.5 * noise
    return np.searchsorted(np.quantile(score, np.arange(1, count) / count), score)


def forest_of(model):
    return Forest([tree.tree_ for tree in model.estimators_])


def many(kind):
    """A fitted forest, and the rows it is asked about."""
    features = {"one feature": 1, "many features": 1531}.get(kind, 7)
    X = rows(1500, features)
    y = classes(X, 5 if kind == "many classes" else 2)
    options = {"n_estimators": 7, "random_state": 0}
    if kind == "regression":
        return RandomForestRegressor(max_depth=6, **options).fit(X, X[:, 0] + y), X
    if kind == "several outputs":
        return RandomForestRegressor(max_depth=9, **options).fit(X, np.stack([X[:, 0], y, X[:, 1]], 1)), X
    if kind == "full depth regression":
        return ExtraTreesRegressor(**options).fit(X, X[:, 0] * X[:, 1]), X
    if kind == "leaves only":
        return RandomForestClassifier(**options).fit(X, np.ones(len(X))), X
    if kind == "several classes of several outputs":
        return RandomForestClassifier(max_depth=4, **options).fit(X, np.stack([classes(X, 3), y], 1)), X
    depth = {"full depth": None, "stumps": 1, "narrow": None}.get(kind, 8)
    leaves = 20 if kind == "narrow" else None
    return RandomForestClassifier(max_depth=depth, max_leaf_nodes=leaves, **options).fit(X, y), X


KINDS = (
    "depth 8",
    "full depth",
    "stumps",
    "narrow",
    "leaves only",
    "many classes",
    "one feature",
    "many features",
    "regression",
    "full depth regression",
    "several outputs",
    "several classes of several outputs",
)


def values_of(model, X):
    """The mean of the trees' values, as scikit-learn sums them up."""
    total = 0.0
    for tree in model.estimators_:
        total = total + tree.tree_.predict(X).reshape(len(X), -1)
    return total / len(model.estimators_)


@pytest.mark.parametrize("kind", KINDS)
def test_leaves_and_sums_are_those_of_scikit_learn(kind, isa):
    model, X = many(kind)
    forest = forest_of(model)
    leaves, values = model.apply(X), values_of(model, X)
    for n in ROWS:
        assert np.array_equal(forest.apply(X[:n]), leaves[:n])
        assert np.array_equal(forest.predict(X[:n], divisor=len(forest)), values[:n])


@pytest.mark.parametrize("kind", ("depth 8", "full depth", "many features"))
def test_any_layout(kind, isa):
    model, X = many(kind)
    X = X[:389]
    forest = forest_of(model)
    leaves, values = model.apply(X), values_of(model, X)
    wide = np.full((len(X) * 2 + 1, X.shape[1] * 3 + 2), np.nan, np.float32)
    spread = wide[1::2, 1:-1:3]
    spread[...] = X
    shifted = np.full(X.size + 1, np.nan, np.float32)[1:].reshape(X.shape)
    shifted[...] = X
    for layout in (
        np.asfortranarray(X),
        X[::-1][::-1],
        spread,
        shifted,
        X.astype(np.float64),
        spread.astype(np.float64),
    ):
        # What lies around the rows is NaN, and is not seen.
        assert np.array_equal(forest.apply(layout, allow_nan=False), leaves)
        assert np.array_equal(forest.predict(layout, allow_nan=False, divisor=7), values)
    backwards = X[::-1]
    assert np.array_equal(forest.apply(backwards), leaves[::-1])
    one = np.broadcast_to(X[3], X.shape)
    assert np.array_equal(forest.apply(one), np.broadcast_to(leaves[3], leaves.shape))


@pytest.mark.parametrize("depth", (3, 8, None))
def test_missing_values(depth, isa):
    rng = np.random.default_rng(0)
    X = rows(1200, 6)
    y = classes(X, 3)
    # Missing where it says something, so that both directions are learnt; and everywhere later.
    X[(y == 1)[:, None] & (rng.random(X.shape) < 0.3)] = np.nan
    X[(y == 0)[:, None] & (np.arange(6) == 2) & (rng.random(X.shape) < 0.3)] = np.nan
    model = RandomForestClassifier(5, max_depth=depth, random_state=0).fit(X, y)
    ways = {int(way) for tree in model.estimators_ for way in tree.tree_.missing_go_to_left}
    assert ways == {0, 1}
    X[rng.random(X.shape) < 0.2] = np.nan
    forest = forest_of(model)
    assert np.array_equal(forest.apply(X), model.apply(X))
    assert np.array_equal(forest.predict(X, divisor=5), values_of(model, X))
    with pytest.raises(NotFinite):
        forest.predict(X, allow_nan=False)


def records(nodes):
    """(left, right, feature, threshold, missing, category) each."""
    return np.array(nodes, NODE)


def test_a_threshold_between_two_floats(isa):
    """x <= threshold is decided as in float64, also where the threshold is no float32."""
    between = 1 + 2.0**-30
    x = np.float32(1)
    next_up = np.nextafter(x, np.float32(2))
    rows_of_it = np.array([[x], [next_up], [np.nextafter(x, np.float32(0))]], np.float32)
    huge = np.array([[np.float32(3.4e38)], [np.inf], [-np.inf]], np.float32)
    for threshold, X in ((between, rows_of_it), (1.0, rows_of_it), (-1e300, huge), (1e300, huge), (np.inf, huge)):
        tree = records([(1, 2, 0, threshold, 0, -1), (-1, -1, -2, 0, 0, -1), (-1, -1, -2, 0, 0, -1)])
        forest = Forest([(tree, np.zeros((3, 1)))], 1)
        expected = np.where(X[:, :1].astype(np.float64) <= threshold, 1, 2)
        assert np.array_equal(forest.apply(X), expected), threshold


def random_tree(rng, nodes, features, sets):
    """Grown at random, with categories in some nodes."""
    tree = np.zeros(nodes, NODE)
    tree["left_child"] = tree["right_child"] = -1
    tree["category"] = -1
    leaves, count = [0], 1
    while count + 2 <= nodes:
        i = leaves.pop(rng.integers(len(leaves)))
        category = rng.integers(sets) if rng.random() < 0.5 else -1
        tree[i] = (count, count + 1, rng.integers(features), rng.integers(255), rng.integers(2), category)
        leaves += [count, count + 1]
        count += 2
    return tree[:count]


@pytest.mark.parametrize("nodes", (3, 31, 401, 4001))
def test_categories_and_bins(nodes, isa):
    rng = np.random.default_rng(nodes)
    sets = rng.integers(0, 2**32, (9, 8), dtype=np.uint64).astype(np.uint32)
    trees = [random_tree(rng, nodes, 5, len(sets)) for _ in range(3)]
    forest = Forest([(tree, np.zeros((len(tree), 1))) for tree in trees], 5, categories=sets, missing_bin=255)
    bins = rng.integers(0, 256, (131, 5)).astype(np.uint8)

    def leaf(tree, row):
        i = 0
        while tree["left_child"][i] >= 0:
            node, x = tree[i], int(row[tree["feature"][i]])
            if x == 255:
                left = bool(node["missing_go_to_left"])
            elif node["category"] >= 0:
                left = bool(sets[node["category"], x // 32] >> np.uint32(x % 32) & np.uint32(1))
            else:
                left = x <= node["threshold"]
            i = node["left_child" if left else "right_child"]
        return i

    expected = np.array([[leaf(tree, row) for tree in trees] for row in bins])
    assert np.array_equal(forest.apply(bins), expected)
    assert np.array_equal(forest.apply(np.asfortranarray(bins)), expected)
    # As numbers with NaN they are the same.
    numbers = np.where(bins == 255, np.nan, bins).astype(np.float32)
    assert np.array_equal(forest.apply(numbers), expected)


def test_what_is_no_category_is_in_no_set(isa):
    tree = records([(1, 2, 0, 0.0, 0, 0), (-1, -1, -2, 0, 0, -1), (-1, -1, -2, 0, 0, -1)])
    everything = np.full((1, 8), 0xFFFFFFFF, np.uint32)
    forest = Forest([(tree, np.zeros((3, 1)))], 1, categories=everything)
    X = np.array([[0], [255], [255.5], [256], [1e30], [np.inf], [-1], [-np.inf], [np.nan]], np.float32)
    assert forest.apply(X)[:, 0].tolist() == [1, 1, 1, 2, 2, 2, 2, 2, 2]


def test_columns_scale_and_a_start(isa):
    X = rows(333, 4)
    trees = [
        DecisionTreeRegressor(max_depth=d, random_state=0).fit(X, X[:, d % 4] * X[:, 0]).tree_ for d in (2, 3, 9, 12)
    ]
    start = np.random.default_rng(0).standard_normal((333, 3))
    expected = start.copy()
    columns = [0, 2, 2, 1]
    for tree, column in zip(trees, columns, strict=True):
        expected[:, column] += 0.1 * tree.predict(X)[:, 0]
    out = start.copy()
    assert Forest(trees, columns=columns, width=3, scale=0.1).predict(X, out=out) is out
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("kind", ("depth 8", "full depth"))
def test_bits_do_not_depend_on_the_threads(kind, isa):
    model, X = many(kind)
    X = np.tile(X, (20, 1))
    forest = forest_of(model)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append((forest.apply(X), forest.predict(X)))
    assert np.array_equal(results[0][0], results[1][0])
    assert np.array_equal(results[0][1], results[1][1])


def test_more_trees_than_the_cache_holds(isa):
    X = rows(4001, 5)
    model = RandomForestRegressor(25, random_state=0).fit(X, X[:, 0] * X[:, 1] + rows(4001, 1, 1)[:, 0])
    forest = forest_of(model)
    assert forest._forest.bytes > 1 << 20
    assert np.array_equal(forest.apply(X), model.apply(X))
    assert np.array_equal(forest.predict(X, divisor=25), values_of(model, X))


@pytest.mark.parametrize(
    "broken",
    (
        [(0, 1, 0, 0.0, 0, -1), (-1, -1, 0, 0.0, 0, -1)],
        [(1, 2, 0, 0.0, 0, -1), (-1, -1, 0, 0.0, 0, -1)],
        [(1, 2, 3, 0.0, 0, -1), (-1, -1, 0, 0.0, 0, -1), (-1, -1, 0, 0.0, 0, -1)],
        [(1, 2, -2, 0.0, 0, -1), (-1, -1, 0, 0.0, 0, -1), (-1, -1, 0, 0.0, 0, -1)],
        [(1, 2, 0, 0.0, 0, 0), (-1, -1, 0, 0.0, 0, -1), (-1, -1, 0, 0.0, 0, -1)],
        # Each has the next as both of its children.
        [*((i + 1, i + 1, 0, 0.0, 0, -1) for i in range(60)), (-1, -1, 0, 0.0, 0, -1)],
        [(1, 2, 0, 0.0, 0, -1), (2, 3, 0, 0.0, 0, -1), (-1, -1, 0, 0.0, 0, -1), (-1, -1, 0, 0.0, 0, -1)],
        [],
    ),
)
def test_what_is_no_tree(broken):
    with pytest.raises(ValueError, match="tree"):
        Forest([(records(broken), np.zeros((len(broken), 1)))], 3)


def test_a_range_of_trees():
    X = rows(300, 4)
    trees = [DecisionTreeRegressor(max_depth=d).fit(X, X[:, 0] * X[:, 1]).tree_ for d in (2, 5, None)]
    forest = Forest(trees)
    for first, last in ((0, 3), (1, 2), (1, 3), (3, 3)):
        expected = sum((tree.predict(X) for tree in trees[first:last]), np.zeros((300, 1)))
        same(forest.predict(X, trees=(first, last)), expected)
    for wrong in ((-1, 2), (2, 1), (0, 4)):
        with pytest.raises(ValueError, match="trees"):
            forest.predict(X, trees=wrong)


def test_arguments_that_cannot_be():
    X = rows(10, 4)
    forest = Forest([DecisionTreeRegressor().fit(X, X[:, 0]).tree_])
    for wrong in (X[:, :3], X[0], X.astype(np.float16), X.astype(np.int64)):
        with pytest.raises(ValueError):
            forest.predict(wrong)
    with pytest.raises(ValueError, match="out"):
        forest.predict(X, out=np.zeros((10, 2)))
    with pytest.raises(ValueError, match="forest"):
        Forest([])
    assert forest.predict(X[:0]).shape == (0, 1)
    assert forest.apply(X[:0]).shape == (0, 1)
    with pytest.raises(ValueError):
        _cpu.Forest(0, 1, 1)


# ---- the estimators' methods


def same(ours, theirs):
    if isinstance(theirs, list):
        assert isinstance(ours, list) and len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
    elif hasattr(theirs, "toarray"):
        assert type(ours) is type(theirs) and ours.shape == theirs.shape
        assert (ours != theirs).nnz == 0 and ours.nnz == theirs.nnz
        assert np.array_equal(ours.indices, theirs.indices)
    elif isinstance(theirs, tuple):
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
    else:
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("cls", (Tree, RegressionTree, Trees, RegressionTrees))
@pytest.mark.parametrize("outputs", (1, 2))
def test_methods_return_what_scikit_learns_do(cls, outputs):
    X = rows(300, 6)
    y = classes(X, 3) if outputs == 1 else np.stack([classes(X, 3), classes(X, 2)], 1)
    options = {"n_estimators": 5} if "Trees" in cls.__name__ else {}
    ours = cls(max_depth=10, random_state=0, **options).fit(X, y)
    theirs = ours.to_sklearn()
    assert type(theirs).__module__.startswith("sklearn.")
    for name in ("predict", "predict_proba", "predict_log_proba", "apply", "decision_path"):
        assert hasattr(ours, name) == hasattr(theirs, name)
        if hasattr(theirs, name):
            for given in (X, X.astype(np.float64), X.astype(np.float16), X.tolist(), np.asfortranarray(X)):
                with np.errstate(divide="ignore"):
                    same(getattr(ours, name)(given), getattr(theirs, name)(given))
    if outputs == 1:
        assert ours.score(X, y) == theirs.score(X, y)


@pytest.mark.parametrize("cls", (Tree, Trees))
def test_errors_are_scikit_learns(cls):
    X = rows(100, 4)
    ours = cls(random_state=0).fit(X, classes(X, 2))
    theirs = ours.to_sklearn()
    infinite, huge = X.copy(), X.astype(np.float64)
    infinite[3, 1] = np.inf
    huge[3, 1] = 1e300
    for wrong in (X[:, :3], X[:0], X[0], infinite, huge, np.full((2, 4), "a"), np.zeros((2, 4, 1)), None):
        for name in ("predict", "predict_proba", "apply", "decision_path"):
            errors = []
            for model in (ours, theirs):
                with pytest.raises((ValueError, TypeError)) as caught, np.errstate(over="ignore"):
                    getattr(model, name)(wrong)
                errors.append((type(caught.value), str(caught.value).replace(type(model).__name__, "Model")))
            assert errors[0] == errors[1]
    from sklearn.exceptions import NotFittedError

    for name in ("predict", "predict_proba", "apply", "decision_path"):
        with pytest.raises(NotFittedError):
            getattr(cls(), name)(X)


def test_nan_of_a_fitted_estimator():
    X = rows(200, 5)
    X[::7, 2] = np.nan
    y = classes(np.nan_to_num(X), 3)
    ours = Trees(5, random_state=0).fit(X, y)
    same(ours.predict_proba(X), ours.to_sklearn().predict_proba(X))
    assert np.isnan(X).any()


def test_sparse_rows_go_the_same_way():
    import scipy.sparse

    X = rows(200, 5)
    X[X < 0] = 0
    ours = Trees(5, random_state=0).fit(X, classes(X, 2))
    sparse = scipy.sparse.csr_array(X)
    for name in ("predict", "predict_proba", "apply"):
        same(getattr(ours, name)(sparse), getattr(ours, name)(X))


def test_the_forest_is_neither_pickled_nor_part_of_the_state():
    X = rows(200, 5)
    ours = Trees(5, random_state=0).fit(X, classes(X, 2))
    before, size = set(ours.__dict__), len(pickle.dumps(ours))
    expected = ours.predict_proba(X)
    assert set(ours.__dict__) == before and len(pickle.dumps(ours)) == size
    same(pickle.loads(pickle.dumps(ours)).predict_proba(X), expected)
    assert not hasattr(clone(ours), "estimators_")
    # Other trees are noticed.
    ours.fit(X, classes(X, 2)[::-1])
    same(ours.predict_proba(X), ours.to_sklearn().predict_proba(X))
    ours.estimators_ = ours.estimators_[:2]
    same(ours.apply(X), ours.to_sklearn().apply(X))


def test_tensors_in_tensors_out():
    X, y = make_classification(150, 6, random_state=0)
    X = X.astype(np.float32)
    tX, ty = torch.from_numpy(X), torch.from_numpy(y)
    ours = Trees(5, random_state=0).fit(tX, ty)
    numpy_fit = Trees(5, random_state=0).fit(X, y)
    for name in ("predict", "predict_proba", "predict_log_proba", "apply"):
        with np.errstate(divide="ignore"):
            got, expected = getattr(ours, name)(tX), getattr(numpy_fit, name)(X)
            assert isinstance(getattr(ours, name)(X=X), np.ndarray)
        assert isinstance(got, torch.Tensor) and isinstance(expected, np.ndarray)
        same(got.numpy(), expected)
    assert ours.score(tX, ty) == numpy_fit.score(X, y)
    same(ours.predict(tX.requires_grad_()).numpy(), numpy_fit.predict(X))
    rounded = torch.from_numpy(X).bfloat16()
    same(ours.predict(rounded).numpy(), numpy_fit.predict(rounded.float().numpy()))
    words = Trees(2, random_state=0).fit(X, np.where(y > 0, "yes", "no"))
    assert words.predict(torch.from_numpy(X)).dtype.kind == "U"


@pytest.mark.parametrize("cls", (Tree, Trees))
def test_text_and_plot(cls):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    X = rows(80, 3)
    ours = cls(max_depth=2, random_state=0).fit(X, classes(X, 2))
    assert "feature_" in ours.export_text() and "|---" in ours.export_text(decimals=1)
    _, axes = plt.subplots()
    assert len(ours.plot(ax=axes)) >= 3
    plt.close("all")
