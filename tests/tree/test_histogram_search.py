"""Trees and forests by histogram search (``max_bins``).

Where each value has a bin of its own they are scikit-learn's exact trees, node for node and to the bit; elsewhere every
split is compared with a slow search among the same bins, which are scikit-learn's.
"""

from __future__ import annotations

import inspect
import pickle

import numpy as np
import pytest
import sklearn.ensemble
import sklearn.tree
import torch
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.datasets import make_classification
from sklearn.ensemble._hist_gradient_boosting.binning import _BinMapper
from sklearn.model_selection import GridSearchCV
from sklearn.tree._criterion import MSE
from sklearn.utils._param_validation import InvalidParameterError

import fastnn.tree
from fastnn import _cpu, _state

from .compare import assert_same, count_ties

ESTIMATORS = [
    "DecisionTreeClassifier",
    "DecisionTreeRegressor",
    "ExtraTreeClassifier",
    "ExtraTreeRegressor",
    "ExtraTreesClassifier",
    "ExtraTreesRegressor",
    "RandomForestClassifier",
    "RandomForestRegressor",
]
PARAMETERS = [
    {},
    {"max_depth": 5, "min_samples_leaf": 7},
    {"max_features": "sqrt", "min_samples_split": 0.02},
    {"max_features": 0.6, "max_leaf_nodes": 12},
    {"max_leaf_nodes": 9, "min_impurity_decrease": 0.001},
    {"min_weight_fraction_leaf": 0.05},
    {"ccp_alpha": 0.005},
]


def module_of(name):
    return sklearn.ensemble if hasattr(sklearn.ensemble, name) else sklearn.tree


def data(rows, columns=7, n_classes=2, seed=0, kind="few", missing=False):
    x, y = make_classification(
        rows,
        columns,
        n_informative=min(5, columns),
        n_redundant=0,
        n_classes=n_classes,
        n_clusters_per_class=1,
        flip_y=0.1,
        random_state=seed,
    )
    if kind == "few":
        x = np.round(x * 4)
        x[:, 0] = x[:, 0] > 0
    if missing:
        x = np.where(np.random.RandomState(seed).rand(*x.shape) < 0.1, np.nan, x)
    return x.astype(np.float32), y


def both(name, x, y, sample_weight=None, **parameters):
    parameters = {"random_state": 3, **parameters}
    if "Forest" in name or "Trees" in name:
        parameters = {"n_estimators": 4, **parameters}
    ours = getattr(fastnn.tree, name)(max_bins=255, **parameters).fit(x, y, sample_weight)
    return ours, getattr(module_of(name), name)(**parameters).fit(x, y, sample_weight)


def assert_same_forest(ours, theirs):
    for mine, other in zip(ours.estimators_, theirs.estimators_, strict=True):
        assert mine.max_bins == 255
        assert_same(mine.tree_, other.tree_)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
@pytest.mark.parametrize(("rows", "n_classes"), [(61, 2), (900, 2), (900, 3), (700, 10)])
def test_few_values_give_the_exact_tree(isa, no_fallback, rows, n_classes, parameters, missing):
    x, y = data(rows, n_classes=n_classes, missing=missing)
    for sample_weight in (None, np.random.RandomState(1).randint(0, 4, rows)):
        for criterion in ("gini", "entropy"):
            ours, theirs = both("DecisionTreeClassifier", x, y, sample_weight, criterion=criterion, **parameters)
            assert_same(ours.tree_, theirs.tree_)
        ours, theirs = both("DecisionTreeRegressor", x, y * 3.0, sample_weight, **parameters)
        assert_same(ours.tree_, theirs.tree_)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("n_classes", [2, 5])
@pytest.mark.parametrize("threads", [1, 2])
def test_kept_histograms(isa, no_fallback, n_classes, missing, threads):
    """Large nodes, whose children's histograms are differences; also where leaves come between them."""
    x, y = data(9000, n_classes=n_classes, missing=missing)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for parameters in ({"max_depth": 9}, {"max_leaf_nodes": 40}, {"min_samples_leaf": 300}, {"max_features": 0.5}):
            ours, theirs = both("DecisionTreeClassifier", x, y, **parameters)
            assert_same(ours.tree_, theirs.tree_)
            ours, theirs = both("DecisionTreeRegressor", x, y + 1.0, **parameters)
            assert_same(ours.tree_, theirs.tree_)
    finally:
        torch.set_num_threads(before)


def test_many_columns_and_bins(no_fallback):
    """Each of 255 bins is filled, and 300 columns are looked at by several threads."""
    rng = np.random.RandomState(0)
    x = rng.randint(0, 255, (1500, 300)).astype(np.float32)
    x[:255] = np.arange(255)[:, None]
    y = (x[:, 3] + 40 * rng.randn(len(x)) > 120) + (x[:, 7] > 200)
    for parameters in ({"max_depth": 6}, {"max_features": "sqrt"}):
        assert_same(*(tree.tree_ for tree in both("DecisionTreeClassifier", x, y, **parameters)))
        assert_same(*(tree.tree_ for tree in both("DecisionTreeClassifier", x, y > 0, **parameters)))


def test_values_that_count_as_equal(isa, no_fallback):
    """Values within 1e-7 of each other are one to scikit-learn."""
    rng = np.random.RandomState(0)
    x = (rng.randint(0, 9, (1400, 4)) * np.array([6e-8, 1e-7, 1, 3e-8])).astype(np.float32)
    y = rng.randint(0, 3, len(x)) * (x[:, 1] > 4e-7) + (x[:, 0] > 2e-7)
    for target in (y, y > 0):
        assert_same(*(tree.tree_ for tree in both("DecisionTreeClassifier", x, target)))
        assert_same(*(tree.tree_ for tree in both("DecisionTreeClassifier", x, target, max_features=2)))
    assert_same(*(tree.tree_ for tree in both("DecisionTreeRegressor", x, y)))


def test_fractional_weights():
    """Sums are rounded in another order than scikit-learn's: gains that are equal may be told apart otherwise."""
    x, y = data(1500, n_classes=3)
    weights = np.random.RandomState(1).rand(len(y))
    ties = 0
    for name in ("DecisionTreeClassifier", "DecisionTreeRegressor"):
        ties += count_ties(*(tree.tree_ for tree in both(name, x, y, weights, max_depth=6, min_samples_leaf=30)))
    assert ties <= 1
    for class_weight in ("balanced", {0: 0.3, 1: 1.7, 2: 1}):
        pair = both("DecisionTreeClassifier", x, y, class_weight=class_weight, max_depth=6)
        ties += count_ties(*(tree.tree_ for tree in pair))
    assert ties <= 20  # of about 150: the same classes are often divided by two features alike
    pair = both("DecisionTreeClassifier", x, y, class_weight={0: 3, 1: 1, 2: 2})
    assert_same(*(tree.tree_ for tree in pair))


@pytest.mark.parametrize("missing", [False, True])
def test_other_criteria_and_constraints(isa, no_fallback, missing):
    x, y = data(800, missing=missing)
    target = np.random.RandomState(0).rand(len(y)) + y
    pair = both("DecisionTreeRegressor", x, target, min_samples_leaf=20)
    assert count_ties(*(tree.tree_ for tree in pair)) <= 1
    assert_same(*(t.tree_ for t in both("DecisionTreeRegressor", x, y, criterion="poisson", max_depth=3)))
    if not missing:
        signs = [1, -1, 0, 0, 1, 0, -1]
        assert_same(*(t.tree_ for t in both("DecisionTreeClassifier", x, y, monotonic_cst=signs)))
        assert_same(*(t.tree_ for t in both("DecisionTreeRegressor", x, y, monotonic_cst=signs)))
    several = np.stack([y, x[:, 1] > 0, (np.nan_to_num(x[:, 2]) + 30).astype(int) % 3], axis=1).astype(float)
    assert_same(*(t.tree_ for t in both("DecisionTreeClassifier", x, several)))
    assert_same(*(t.tree_ for t in both("DecisionTreeRegressor", x, several)))


def test_large_whole_weights(isa, no_fallback):
    """That do not fit beside a row's number and class, or into a field of a word."""
    x, y = data(3000)
    rng = np.random.RandomState(0)
    for most in (900, 5000, 30000):
        weights = rng.randint(0, most, len(y))
        assert_same(*(t.tree_ for t in both("DecisionTreeClassifier", x, y, weights, max_depth=6)))
        assert_same(*(t.tree_ for t in both("DecisionTreeRegressor", x, y, weights, max_depth=6)))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 3e5, 1e30])
def test_targets_of_any_size(scale):
    x, y = data(2500)
    target = (y + np.random.RandomState(0).rand(len(y))) * scale
    ours, theirs = both("DecisionTreeRegressor", x, target, min_samples_leaf=40)
    same = ours.tree_.feature == theirs.tree_.feature
    assert same.all() and np.array_equal(ours.tree_.threshold, theirs.tree_.threshold)
    np.testing.assert_allclose(ours.tree_.value, theirs.tree_.value, rtol=1e-9)


def test_targets_of_zero():
    x, y = data(100)
    assert both("DecisionTreeRegressor", x, 0.0 * y)[0].tree_.node_count == 1


@pytest.mark.filterwarnings("ignore:Some inputs do not have OOB scores")
@pytest.mark.parametrize("name", ["RandomForestClassifier", "RandomForestRegressor"])
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"max_features": None, "max_depth": 6, "n_jobs": 2},
        {"max_features": 1, "max_leaf_nodes": 11},
        {"bootstrap": False, "max_features": 2},
        {"min_samples_leaf": 5, "max_samples": 0.5, "oob_score": True},
    ],
    ids=str,
)
def test_forests_tree_for_tree(isa, no_fallback, name, parameters):
    for n_classes, missing in ((2, True), (4, False)):
        x, y = data(1300, n_classes=n_classes, missing=missing)
        ours, theirs = both(name, x, y, **parameters)
        assert_same_forest(ours, theirs)
        # With two jobs, scikit-learn adds up the trees in the order in which they come.
        np.testing.assert_allclose(ours.predict(x), theirs.predict(x), rtol=1e-12)
        if "oob_score" in parameters:
            assert ours.oob_score_ == pytest.approx(theirs.oob_score_)


def test_more_rows_than_the_edges_are_found_from():
    rng = np.random.RandomState(0)
    x = rng.randint(0, 30, (210_000, 2)).astype(np.float32)
    y = (x[:, 0] + x[:, 1] + rng.randint(0, 9, len(x)) > 34).astype(int)
    assert_same(*(tree.tree_ for tree in both("DecisionTreeClassifier", x, y, max_depth=3)))


# Continuous values: all borders between bins, slowly.


class Slow:
    """Of each column the bins of scikit-learn's own mapper, and the values that fell into each."""

    def __init__(self, x, max_bins):
        mapper = _BinMapper(n_bins=max_bins + 1, random_state=0).fit(x.astype(np.float64))
        self.bins = mapper.transform(x.astype(np.float64)).astype(int)
        self.missing = mapper.missing_values_bin_idx_
        self.x = x

    def range_of(self, f, bin):
        values = self.x[self.bins[:, f] == bin, f]
        return values.min(), values.max()

    def borders(self, rows, f):
        """(threshold, whether NaN goes left, which rows go left) of all borders of the node."""
        bins = self.bins[rows, f]
        filled = [b for b in np.unique(bins) if b != self.missing]
        some_missing = (bins == self.missing).any()
        for missing_left in (False, True) if some_missing else (False,):
            for i, b in enumerate(filled):
                if i + 1 < len(filled):
                    threshold = (float(self.range_of(f, b)[1]) + float(self.range_of(f, filled[i + 1])[0])) / 2
                elif some_missing and not missing_left:
                    threshold = np.inf
                else:
                    continue
                yield threshold, missing_left, np.where(bins == self.missing, missing_left, bins <= b)

    def impurity(self, y, w, criterion):
        if criterion == "squared_error":
            mean = np.average(y, weights=w)
            return np.average((y - mean) ** 2, weights=w)
        p = np.array([w[y == c].sum() for c in np.unique(y)]) / w.sum()
        return 1 - (p**2).sum() if criterion == "gini" else -(p * np.log2(p)).sum()


def check_every_split(tree, slow, y, w, criterion, min_samples_leaf):
    """Each split is one of those between bins, none of which gains more, and the node's numbers are right."""
    rows, inner = {0: np.flatnonzero(w)}, 0
    for node in range(tree.node_count):
        of = rows[node]
        assert tree.n_node_samples[node] == len(of)
        impurity = slow.impurity(y[of], w[of], criterion)
        assert tree.impurity[node] == pytest.approx(impurity, abs=1e-12)
        if tree.children_left[node] < 0:
            continue
        inner += 1
        best, mine = -np.inf, None
        for f in range(slow.x.shape[1]):
            for threshold, missing_left, left in slow.borders(of, f):
                if min(left.sum(), (~left).sum()) < min_samples_leaf:
                    continue
                sides = [of[left], of[~left]]
                weighted = sum(w[side].sum() * slow.impurity(y[side], w[side], criterion) for side in sides)
                gain = impurity - weighted / w[of].sum()
                best = max(best, gain)
                same = f == tree.feature[node] and threshold == tree.threshold[node]
                nan_there = (slow.bins[of, f] == slow.missing).any()
                if same and (not nan_there or missing_left == tree.missing_go_to_left[node]):
                    mine = gain
                    rows[tree.children_left[node]], rows[tree.children_right[node]] = sides
        assert mine is not None and mine >= best - 1e-12
    assert inner > 3


@pytest.mark.parametrize("max_bins", [2, 3, 37, 255])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("criterion", ["gini", "entropy", "squared_error"])
def test_continuous_values_against_a_slow_search(isa, no_fallback, max_bins, missing, criterion):
    x, y = data(500, 4, n_classes=3 if max_bins == 37 else 2, kind="continuous", missing=missing)
    slow = Slow(x, max_bins)
    name, target = "DecisionTreeClassifier", y
    if criterion == "squared_error":
        name, target = "DecisionTreeRegressor", y + np.nan_to_num(x[:, 1])
    for weights in (None, np.random.RandomState(1).randint(0, 3, len(y))):
        tree = getattr(fastnn.tree, name)(
            criterion=criterion, max_bins=max_bins, max_depth=3, min_samples_leaf=4, random_state=0
        ).fit(x, target, weights)
        w = np.ones(len(y)) if weights is None else weights.astype(float)
        check_every_split(tree.tree_, slow, target, w, criterion, 4)


def test_nothing_depends_on_threads_jobs_or_instruction_set(use_isa):
    x, y = data(5000, 12, n_classes=4, kind="continuous")
    weights = np.random.RandomState(0).rand(len(y))
    trees = {}
    before = torch.get_num_threads()
    for name, target, sample_weight in (
        ("DecisionTreeClassifier", y, None),
        ("DecisionTreeClassifier", y, weights),
        ("DecisionTreeRegressor", x[:, 0] * y, None),
        ("DecisionTreeRegressor", x[:, 0] * y, weights),
    ):
        for isa in _cpu.available_isas():
            for threads in (1, 2):
                use_isa(isa)
                torch.set_num_threads(threads)
                try:
                    tree = getattr(fastnn.tree, name)(max_bins=64, max_depth=9, random_state=0)
                    tree.fit(x, target, sample_weight)
                finally:
                    torch.set_num_threads(before)
                assert_same(tree.tree_, trees.setdefault((name, sample_weight is None), tree).tree_)
    forests = [
        fastnn.tree.RandomForestClassifier(6, max_bins=64, random_state=0, n_jobs=jobs).fit(x, y) for jobs in (1, 2)
    ]
    for one, other in zip(*(forest.estimators_ for forest in forests), strict=True):
        assert_same(one.tree_, other.tree_)


def test_constant_and_missing_columns():
    x, y = data(300)
    x[:, 1], x[:, 2] = 5, np.nan
    x[:100, 3] = np.nan
    assert_same(*(tree.tree_ for tree in both("DecisionTreeClassifier", x, y)))
    assert_same(*(tree.tree_ for tree in both("DecisionTreeClassifier", x[:, [1, 2]], y)))
    one = fastnn.tree.DecisionTreeClassifier(max_bins=2).fit([[1.0]], [3])
    assert one.tree_.node_count == 1 and one.predict([[7.0]]) == [3]


@pytest.mark.parametrize("order", ["C", "F", "steps"])
def test_memory_orders(order):
    x, y = data(400)
    given = {"C": np.ascontiguousarray, "F": np.asfortranarray, "steps": lambda v: np.repeat(v, 2, axis=1)[:, ::2]}
    ours = fastnn.tree.DecisionTreeClassifier(max_bins=255, random_state=3).fit(given[order](x), y)
    assert_same(ours.tree_, sklearn.tree.DecisionTreeClassifier(random_state=3).fit(x, y).tree_)


# The parameter.


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_parameter(name):
    cls, x, y = getattr(fastnn.tree, name), *data(150)
    options = {"random_state": 0, **({"n_estimators": 3} if "Trees" in name or "Forest" in name else {})}
    assert inspect.signature(cls).parameters["max_bins"].default is None
    assert cls().get_params()["max_bins"] is None and "max_bins : int" in cls.__doc__
    model = cls(max_bins=9, **options)
    assert "max_bins=9" in repr(model) and clone(model).max_bins == 9
    again = pickle.loads(pickle.dumps(model.fit(x, y)))
    assert again.max_bins == 9
    np.testing.assert_array_equal(again.predict(x), model.predict(x))
    plain = model.to_sklearn()
    assert type(plain) is getattr(module_of(name), name) and not hasattr(plain, "max_bins")
    np.testing.assert_array_equal(plain.predict(x), model.predict(x))
    clone(plain).fit(x, y)
    if hasattr(plain, "estimators_"):
        assert not any(hasattr(tree, "max_bins") for tree in [plain.estimator, *plain.estimators_])
        assert all(tree.max_bins == 9 for tree in model.estimators_)
    model.set_params(max_bins=None).fit(x, y)
    assert_all_same(model, cls(**options).fit(x, y))


def assert_all_same(one, other):
    for a, b in zip(getattr(one, "estimators_", [one]), getattr(other, "estimators_", [other]), strict=True):
        assert_same(a.tree_, b.tree_)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("value", [1, 256, 0, -3, 2.5, "all", True])
def test_wrong_values(name, value):
    with pytest.raises(InvalidParameterError, match=r"The 'max_bins' parameter of .* must be an int in the range"):
        getattr(fastnn.tree, name)(max_bins=value).fit([[0.0], [1.0]], [0, 1])


def test_grid_search():
    x, y = data(200, kind="continuous")
    search = GridSearchCV(fastnn.tree.RandomForestClassifier(3, random_state=0), {"max_bins": [None, 4, 255]}, cv=2)
    assert search.fit(x, y).best_params_["max_bins"] in (None, 4, 255)


def test_random_thresholds_are_drawn_as_without_bins():
    x, y = data(300, kind="continuous")
    for name in ("ExtraTreesClassifier", "ExtraTreesRegressor"):
        forests = [getattr(fastnn.tree, name)(3, random_state=0, max_bins=b).fit(x, y) for b in (None, 5)]
        assert_all_same(*forests)
    ours, theirs = both("ExtraTreeClassifier", data(300)[0], y, splitter="best")
    assert_same(ours.tree_, theirs.tree_)


def test_few_bins_are_few_thresholds():
    x, y = data(500, kind="continuous")
    tree = fastnn.tree.DecisionTreeClassifier(max_bins=4).fit(x, y).tree_
    inner = tree.feature >= 0
    assert all(len(set(tree.threshold[inner & (tree.feature == f)])) <= 6 for f in range(x.shape[1]))


def test_inside_ensembles():
    x, y = data(300)
    tree = fastnn.tree.DecisionTreeClassifier(max_depth=2, max_bins=255)
    model = fastnn.tree.AdaBoostClassifier(tree, n_estimators=4, random_state=0).fit(x, y)
    other = sklearn.ensemble.AdaBoostClassifier(
        sklearn.tree.DecisionTreeClassifier(max_depth=2), n_estimators=4, random_state=0
    )
    np.testing.assert_array_equal(model.predict(x), other.fit(x, y).predict(x))


def test_what_scikit_learn_grows_itself_is_counted():
    x, y = data(100)
    for estimator, given in (
        (fastnn.tree.DecisionTreeClassifier(max_bins=9), csr_matrix(x)),
        (fastnn.tree.DecisionTreeRegressor(max_bins=9, criterion=MSE(1, len(y))), x),
    ):
        _state.reset_fallbacks()
        estimator.fit(given, y)
        assert sum(_state.fallbacks().values()) == 1
    _state.reset_fallbacks()


def test_tensors_and_float64():
    x, y = data(300, kind="continuous")
    tree = fastnn.tree.DecisionTreeClassifier(max_bins=31, random_state=0)
    expected = clone(tree).fit(x, y)
    assert_same(clone(tree).fit(torch.from_numpy(x), torch.from_numpy(y)).tree_, expected.tree_)
    assert_same(clone(tree).fit(x.astype(np.float64), y).tree_, expected.tree_)


def test_large_arrays_of_float64():
    """Which are rounded to float32 by another way than small ones."""
    rng = np.random.RandomState(0)
    x = rng.rand(70_000, 16)
    x[0, 0] = np.nan
    y = (x[:, 3] > 0.5) ^ (rng.rand(len(x)) < 0.1)
    tree = fastnn.tree.DecisionTreeClassifier(max_bins=31, max_depth=2, random_state=0)
    expected = clone(tree).fit(x.astype(np.float32), y)
    for given in (x, np.asfortranarray(x), x[:, ::-1][:, ::-1]):
        assert_same(clone(tree).fit(given, y).tree_, expected.tree_)
    x[5, 5] = 1e300
    with pytest.raises(ValueError, match="infinity or a value too large for dtype"):
        tree.fit(x, y)


def test_bad_addresses():
    x = np.zeros((4, 2), np.float32)
    bins = np.zeros(8 + 64, np.uint8)
    with pytest.raises(ValueError, match="step"):
        _cpu.TreeBins(x.ctypes.data, 4, 2, 2, 1, bins.ctypes.data, 3)
    with pytest.raises(ValueError, match="rows and columns"):
        _cpu.TreeBins(x.ctypes.data, 0, 2, 2, 1, bins.ctypes.data, 4)
    with pytest.raises(ValueError, match="bins"):
        _cpu.TreeBins(x.ctypes.data, 4, 2, 2, 1, 0, 4)
    given = _cpu.TreeBins(x.ctypes.data, 4, 2, 2, 1, bins.ctypes.data, 4)
    y = np.zeros((4, 1))
    target = (2, 1, 0, 1, y.ctypes.data, 0)
    with pytest.raises(ValueError, match="min_samples_leaf"):
        _cpu.tree_grow_binned(given, target, (2, 3, 2, 0, -1, 0.0, 0.0, 0, 1, 1))
    with pytest.raises(ValueError, match="ten"):
        _cpu.tree_grow_binned(given, target, (True, 2))
