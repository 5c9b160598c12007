"""Trees grown on histograms: against numpy's sums, and node for node against scikit-learn's ``TreeGrower``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.ensemble._hist_gradient_boosting.grower import TreeGrower

from fastnn import _cpu
from fastnn.tree._binning import bin_columns, bin_edges
from fastnn.tree._histogram_tree import GrowthLimits, HistogramGrower, make_predictor


class Problem:
    """Binned rows with gradients, and hessians or None for ones."""

    def __init__(self, rows, features, *, missing=0.0, categories=0, ties=False, hessians=True, far=False, seed=0):
        rng = np.random.default_rng(seed)
        X = rng.standard_normal((rows, features))
        if ties:
            X = np.round(X)
        self.categorical = np.zeros(features, dtype=np.uint8)
        if categories:
            self.categorical[::2] = 1
            X[:, ::2] = rng.integers(0, categories, X[:, ::2].shape)
        clean = X.copy()
        if missing:
            X[rng.random(X.shape) < missing] = np.nan
        edges = bin_edges(X, skip=self.categorical)
        self.edges = [
            np.arange(float(np.nanmax(X[:, f]) + 1)) if self.categorical[f] else edges[f] for f in range(features)
        ]
        self.X = X
        self.binned = bin_columns(X, self.edges, 255, self.categorical)
        self.n_bins = np.array([len(e) + 1 - c for e, c in zip(self.edges, self.categorical, strict=True)], np.uint32)
        signal = np.sin(3 * clean[:, 0]) + (clean[:, -1] > 0.3) * clean[:, features // 2]
        self.gradient = (signal + np.isnan(X[:, 0]) * 2 + rng.standard_normal(rows)).astype(np.float32)
        self.hessian = (0.5 + rng.random(rows)).astype(np.float32) if hessians else None
        if far:  # a few rows dwarf the others
            self.gradient[:2] = 1e10, -3e9
            if hessians:
                self.hessian[::3] *= 1e6
                self.gradient[::3] *= 1e6

    def ours(self, limits, **more):
        grower = HistogramGrower(self.binned, self.n_bins, 255, categorical=self.categorical, **more)
        return grower, grower.grow(self.gradient, self.hessian, limits)

    def theirs(self, limits, *, monotonic=None, interaction_cst=None, max_features=1.0, rng=None):
        grower = TreeGrower(
            np.asfortranarray(self.binned),
            self.gradient,
            np.ones(1, dtype=np.float32) if self.hessian is None else self.hessian,
            n_bins=256,
            n_bins_non_missing=self.n_bins,
            has_missing_values=(self.binned == 255).any(axis=0),
            is_categorical=self.categorical,
            monotonic_cst=monotonic,
            interaction_cst=interaction_cst,
            feature_fraction_per_split=max_features,
            rng=rng,
            max_leaf_nodes=limits.max_leaf_nodes,
            max_depth=limits.max_depth,
            min_samples_leaf=limits.min_samples_leaf,
            min_gain_to_split=limits.min_gain_to_split,
            min_hessian_to_split=limits.min_hessian_to_split,
            l2_regularization=limits.l2_regularization,
            shrinkage=limits.shrinkage,
        )
        grower.grow()
        return grower.make_predictor(self.edges)


def same_trees(got, expected):
    assert len(got.nodes) == len(expected.nodes)
    assert len(got.nodes) > 1
    for name in got.nodes.dtype.names:
        if name in ("value", "gain"):
            np.testing.assert_allclose(got.nodes[name], expected.nodes[name], rtol=1e-5, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(got.nodes[name], expected.nodes[name], err_msg=name)
    np.testing.assert_array_equal(got.binned_left_cat_bitsets, expected.binned_left_cat_bitsets)
    np.testing.assert_array_equal(got.raw_left_cat_bitsets, expected.raw_left_cat_bitsets)


def same_up_to_sides(got, expected, binned):
    """Halves of the categories are found from either end, with the same gain: which half is called left is rounding."""
    assert len(got.nodes) == len(expected.nodes)
    for name in ("gain", "value", "count", "depth", "feature_idx", "is_leaf"):
        a, b = np.sort(got.nodes[name]), np.sort(expected.nodes[name])
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(
        got.predict_binned(binned, 255, 1), expected.predict_binned(binned, 255, 1), rtol=1e-5, atol=1e-5
    )


def check(problem, limits, **more):
    seeded = dict(more)
    if "max_features" in more:
        more, seeded = more | {"rng": np.random.default_rng(5)}, more | {"rng": np.random.default_rng(5)}
    grower, nodes = problem.ours(limits, **more)
    got = make_predictor(nodes, problem.edges, problem.n_bins)
    expected = problem.theirs(limits, **seeded)
    if problem.categorical.any():
        same_up_to_sides(got, expected, problem.binned)
    else:
        same_trees(got, expected)
    added = np.zeros(len(problem.binned))
    grower.add_values(nodes, added)
    np.testing.assert_array_equal(added, got.predict_binned(problem.binned, 255, 1))
    np.testing.assert_array_equal(added, nodes["value"][grower.leaf_of_rows(nodes)])
    return nodes


PROBLEMS = {
    "plain": dict(rows=5003, features=7),
    "hessians of 1": dict(rows=5003, features=7, hessians=False),
    "missing": dict(rows=3001, features=5, missing=0.2),
    "missing, hessians of 1": dict(rows=3001, features=5, missing=0.2, hessians=False),
    "categories": dict(rows=4001, features=6, categories=30),
    "missing categories": dict(rows=4001, features=6, categories=30, missing=0.1),
    "ties": dict(rows=2003, features=4, ties=True, missing=0.1),
    "one feature": dict(rows=1009, features=1),
    "67 features": dict(rows=503, features=67),
    "131 features": dict(rows=311, features=131, missing=0.05),
    "far apart": dict(rows=3001, features=5, far=True),
    "far apart, hessians of 1": dict(rows=3001, features=5, hessians=False, far=True),
    "far apart, categories": dict(rows=3001, features=4, categories=20, hessians=False, far=True),
    "100003 rows": dict(rows=100_003, features=3),
}
LIMITS = {
    "31 leaves": GrowthLimits(max_leaf_nodes=31),
    "depth 6": GrowthLimits(max_depth=6, l2_regularization=1.5, shrinkage=0.1),
    "no limits": GrowthLimits(),
    "two leaves": GrowthLimits(max_leaf_nodes=2),
    "large gains": GrowthLimits(max_leaf_nodes=31, min_gain_to_split=20.0, min_hessian_to_split=50.0),
}


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_tree_is_scikit_learns(isa, problem, limits):
    check(Problem(**PROBLEMS[problem]), LIMITS[limits])


def test_monotonic(isa):
    problem = Problem(5003, 5, missing=0.1)
    nodes = check(problem, GrowthLimits(max_leaf_nodes=31), monotonic=np.array([1, -1, 0, 1, -1], np.int8))
    free = problem.ours(GrowthLimits(max_leaf_nodes=31))[1]
    assert len(nodes) != len(free) or not np.array_equal(nodes["feature"], free["feature"])


@pytest.mark.parametrize("problem", ["plain", "missing categories"])
def test_interactions(isa, problem):
    sets = [{0, 1}, {1, 2, 3}, {4, 5, *range(6, PROBLEMS[problem]["features"])}]
    nodes = check(Problem(**PROBLEMS[problem]), GrowthLimits(max_leaf_nodes=31), interaction_cst=sets)

    def walk(node, seen):
        if nodes["leaf"][node]:
            assert any(seen <= group for group in sets)
            return
        for child in (nodes["left"][node], nodes["right"][node]):
            walk(child, seen | {int(nodes["feature"][node])})

    walk(0, set())


def test_features_are_drawn_as_scikit_learn_draws(isa):
    check(Problem(**PROBLEMS["67 features"]), GrowthLimits(max_leaf_nodes=31), max_features=0.3)
    check(
        Problem(**PROBLEMS["plain"]),
        GrowthLimits(max_depth=5),
        max_features=0.5,
        interaction_cst=[{0, 1, 2, 3}, {3, 4, 5, 6}],
    )


@pytest.mark.parametrize("hessians", [True, False])
def test_sums_against_numpy(isa, hessians):
    # Multiples of 1/8 are exact in any order: so are all sums.
    problem = Problem(7001, 4, missing=0.1, hessians=hessians)
    problem.gradient = np.round(problem.gradient * 8).astype(np.float32) / 8
    if hessians:
        problem.hessian = np.round(problem.hessian * 8).astype(np.float32) / 8
    grower, nodes = problem.ours(GrowthLimits(max_leaf_nodes=20, l2_regularization=0.5))
    hessian = np.ones(7001) if problem.hessian is None else problem.hessian.astype(np.float64)
    leaf = grower.leaf_of_rows(nodes)
    rows_of = {node: leaf == node for node in np.flatnonzero(nodes["leaf"])}

    def rows(node):
        if node not in rows_of:
            rows_of[node] = rows(nodes["left"][node]) | rows(nodes["right"][node])
        return rows_of[node]

    def score(mask):
        g, h = problem.gradient[mask].astype(np.float64).sum(), hessian[mask].sum()
        return g * g / (h + 0.5)

    for node in range(len(nodes)):
        mine = rows(node)
        assert nodes["count"][node] == mine.sum()
        assert nodes["gradient"][node] == problem.gradient[mine].astype(np.float64).sum()
        assert nodes["hessian"][node] == hessian[mine].sum()
        if nodes["leaf"][node]:
            continue
        # No other split of the node gains more.
        best = -np.inf
        for f in range(4):
            bins = problem.binned[:, f]
            for last in range(problem.n_bins[f]):
                for missing_left in (False, True):
                    left = mine & (((bins <= last) & (bins != 255)) | (missing_left & (bins == 255)))
                    right = mine & ~left
                    if min(left.sum(), right.sum()) >= 20:
                        best = max(best, score(left) + score(right))
            if node > 4:
                break  # the first nodes, and one feature of the others: this is slow
        gain = best - score(mine)
        if node == 0:  # scikit-learn's root has a value of 0
            gain += score(mine)
        assert nodes["gain"][node] >= gain - 1e-9 * abs(gain)
        if node <= 4:
            np.testing.assert_allclose(nodes["gain"][node], gain, rtol=1e-9)


@pytest.mark.parametrize("problem", ["plain", "hessians of 1", "131 features", "100003 rows", "far apart"])
@pytest.mark.parametrize("limits", ["40 leaves", "depth 6", "no limits"])  # the last two are grown branch by branch
def test_threads_and_order_of_rows_change_nothing(problem, limits):
    limits = (LIMITS | {"40 leaves": GrowthLimits(max_leaf_nodes=40)})[limits]
    p = Problem(**PROBLEMS[problem])
    order = np.random.default_rng(1).permutation(len(p.binned))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(p.ours(limits)[1].tobytes())
    p.binned, p.gradient = np.asfortranarray(np.pad(p.binned[order], ((0, 1), (0, 0))))[:-1], p.gradient[order]
    p.hessian = None if p.hessian is None else p.hessian[order]
    results.append(p.ours(limits)[1].tobytes())
    assert len(set(results)) == 1


def test_instruction_sets_agree(use_isa):
    p = Problem(**PROBLEMS["missing categories"])
    results = set()
    for name in _cpu.available_isas():
        use_isa(name)
        results.add(p.ours(GrowthLimits())[1].tobytes())
    assert len(results) == 1


def test_weights_of_zero(isa):
    # Rows of weight 0 count, and change no sum.
    problem = Problem(3001, 3)
    problem.gradient[::3] = 0
    problem.hessian[::3] = 0
    check(problem, GrowthLimits(max_leaf_nodes=31))
    problem.gradient[:] = 0
    problem.hessian[:] = 0
    _, nodes = problem.ours(GrowthLimits())
    assert len(nodes) == 1 and nodes["value"][0] == 0


def words(gradient, hessian, min_samples_leaf=20):
    """How many int64 a bin's sums take, of two features that do not matter."""
    binned = np.asfortranarray(np.zeros((len(gradient), 2), np.uint8))
    grower = HistogramGrower(binned, np.array([3, 3]), 255)
    grower.grow(gradient, hessian, GrowthLimits(min_samples_leaf=min_samples_leaf))
    return grower._grower.words()


def test_the_format_of_the_sums():
    """Long integers where numbers are so far apart that shorter ones would lose some, and only there."""
    rng = np.random.default_rng(0)
    normal, ones = rng.standard_normal(20_000).astype(np.float32), np.ones(20_000, np.float32)
    probability = 1 / (1 + np.exp(-3 * normal))
    assert words(normal, None) == 1
    assert words(normal, ones) == words(probability, probability * (1 - probability)) == 2
    assert words(np.repeat(normal, 25), None) == words(normal * 1e-30, None) == 1
    assert words(np.repeat(normal, 60), None) == 2  # the count takes too many bits
    assert words(np.zeros_like(normal), None) == 1
    outlier = normal.copy()
    outlier[3] = 1e4
    assert words(outlier, None) == 4 and words(normal, np.abs(outlier)) == 2
    outlier[3] = 1e10
    assert words(outlier, None) == words(outlier, ones) == words(normal, np.abs(outlier)) == 4
    # A few small ones that a node could be split by, and that are nothing to a node of more rows.
    few = normal + 3
    few[:100] = 1e-10
    assert words(few, None) == 4 and words(few, None, min_samples_leaf=51) == 1


@pytest.mark.parametrize(("what", "bad"), [("gradient", np.nan), ("gradient", np.inf), ("hessian", np.nan)])
def test_what_is_not_finite_grows_a_leaf(what, bad):
    p = Problem(503, 3)
    grower, before = p.ours(GrowthLimits())
    getattr(p, what)[77] = bad
    nodes = grower.grow(p.gradient, p.hessian, GrowthLimits(shrinkage=0.5))
    expected = p.theirs(GrowthLimits(shrinkage=0.5)).nodes
    assert len(nodes) == len(expected) == 1
    for name in ("value", "count", "gain"):
        assert nodes[name][0] == expected[name][0]
    np.testing.assert_array_equal(grower.leaf_of_rows(nodes), np.zeros(503))
    getattr(p, what)[77] = 1
    assert len(grower.grow(p.gradient, p.hessian, GrowthLimits())) > 1 < len(before)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_gradients_of_any_size(isa, scale):
    problem = Problem(2003, 3, hessians=False)
    problem.gradient *= np.float32(scale)
    grower = HistogramGrower(problem.binned, problem.n_bins, 255)
    nodes = grower.grow(problem.gradient, None, GrowthLimits(max_leaf_nodes=15))
    plain = problem.theirs(GrowthLimits(max_leaf_nodes=15))
    np.testing.assert_array_equal(
        nodes["feature"][nodes["leaf"] == 0], plain.nodes["feature_idx"][plain.nodes["is_leaf"] == 0]
    )
    np.testing.assert_array_equal(nodes["count"], plain.nodes["count"])
    np.testing.assert_allclose(nodes["value"], plain.nodes["value"], rtol=1e-5)


def test_bins_in_any_memory(isa):
    """The kernels load 3 bytes behind the last bin, which are there in arrays of `empty_bins` only."""
    p = Problem(5003, 7)
    _, expected = p.ours(GrowthLimits())
    memory = np.zeros(p.binned.size + 64, np.uint8)
    inside = memory[7 : 7 + p.binned.size].reshape(p.binned.shape, order="F")
    at_the_end = memory[64:].reshape(p.binned.shape, order="F")
    for place in (
        inside,
        at_the_end,
        np.zeros_like(p.binned, order="F"),
        np.zeros((5003, 9), np.uint8, order="F")[:, 1:8],
    ):
        place[:] = p.binned
        grower = HistogramGrower(place, p.n_bins, 255)
        assert (grower.binned is place) == (place is inside)
        np.testing.assert_array_equal(grower.grow(p.gradient, p.hessian, GrowthLimits()), expected)


def test_few_rows(isa):
    for rows in (1, 2, 15, 17):
        problem = Problem(rows, 3)
        _, nodes = problem.ours(GrowthLimits(min_samples_leaf=1))
        assert nodes["count"][0] == rows
        leaves = nodes[nodes["leaf"] != 0]
        assert leaves["count"].sum() == rows
        assert (leaves["end"] - leaves["begin"] == leaves["count"]).all()


def test_bad_input():
    p = Problem(101, 3)
    with pytest.raises(ValueError, match="expected uint8 in Fortran order"):
        HistogramGrower(np.ascontiguousarray(p.binned), p.n_bins, 255)
    with pytest.raises(ValueError, match="Categorical features cannot have monotonic constraints"):
        HistogramGrower(p.binned, p.n_bins, 255, categorical=[1, 0, 0], monotonic=[1, 0, 0])
    with pytest.raises(ValueError, match="bins: expected 0 to 15, got 101"):
        HistogramGrower(p.binned, p.n_bins, 15)
    grower = HistogramGrower(p.binned, p.n_bins, 255)
    with pytest.raises(ValueError, match="expected 101 gradients and hessians"):
        grower.grow(p.gradient[1:], p.hessian, GrowthLimits())

    def interrupted(count):
        raise KeyboardInterrupt

    sampling = HistogramGrower(p.binned, p.n_bins, 255, max_features=0.5, rng=np.random.default_rng(0))
    sampling._subsample = interrupted
    with pytest.raises(KeyboardInterrupt):
        sampling.grow(p.gradient, p.hessian, GrowthLimits(min_samples_leaf=1))
    grower.grow(p.gradient, p.hessian, GrowthLimits(min_samples_leaf=1))
