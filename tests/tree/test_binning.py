"""Binning against scikit-learn's ``_BinMapper``: the same edges and the same bins, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.ensemble._hist_gradient_boosting.binning import _BinMapper, _find_binning_thresholds

from fastnn.tree._binning import BinMapper, bin_columns, bin_edges, weighted_edges


def with_missing(x, share=0.1, seed=1):
    x = x.copy()
    x[np.random.default_rng(seed).random(x.shape) < share] = np.nan
    return x


def matrices():
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((5003, 7))
    yield "normal", normal
    yield "float32", normal.astype(np.float32)
    yield "fortran", np.asfortranarray(rng.standard_normal((1013, 19)))
    yield "steps", rng.standard_normal((3003, 40))[::3, ::2]
    yield "backwards", rng.standard_normal((1501, 5))[::-1, ::-1]
    yield "one row", rng.standard_normal((1, 3))
    yield "one column", rng.standard_normal((4999, 1))
    yield "many columns", rng.standard_normal((307, 131))
    yield "integers", rng.integers(0, 1000, (20011, 5)).astype(float)
    yield "few", rng.integers(0, 7, (997, 3)).astype(float)
    yield "missing", with_missing(rng.standard_normal((10007, 37)))
    yield "more than the sample", rng.standard_normal((200_003, 2))
    yield "wide range", np.clip(rng.standard_cauchy((30011, 3)) ** 3, -1e30, 1e30)
    yield "same in float32", 1 + rng.standard_normal((9001, 3)) * 1e-9
    yield "beyond float32", rng.standard_normal((3001, 2)) * 1e300
    yield "below float32", rng.standard_normal((3001, 2)) * 1e-300
    extremes = rng.standard_normal((3001, 4))
    extremes[:3, 0], extremes[:3, 1], extremes[:, 2] = np.inf, -np.inf, 3.0
    extremes[::2, 3], extremes[1::2, 3] = 0.0, -0.0
    yield "infinity, constant, -0", extremes


MATRICES = dict(matrices())


@pytest.mark.parametrize("n_bins", [256, 17, 3])
@pytest.mark.parametrize("name", MATRICES)
def test_edges_and_bins_are_scikit_learns(isa, name, n_bins):
    X = MATRICES[name]
    ours, theirs = BinMapper(n_bins=n_bins, random_state=7), _BinMapper(n_bins=n_bins, random_state=7)
    got, expected = ours.fit_transform(X), theirs.fit_transform(X)
    for f, (a, b) in enumerate(zip(ours.bin_thresholds_, theirs.bin_thresholds_, strict=True)):
        np.testing.assert_array_equal(a, b, err_msg=f"column {f}")
    assert ours.n_bins_non_missing_.dtype == theirs.n_bins_non_missing_.dtype
    np.testing.assert_array_equal(ours.n_bins_non_missing_, theirs.n_bins_non_missing_)
    assert got.dtype == np.uint8 and got.flags.f_contiguous
    np.testing.assert_array_equal(got, expected)
    plain = ours.to_sklearn()
    assert type(plain) is _BinMapper
    np.testing.assert_array_equal(plain.transform(X), expected)


def test_values_on_the_edges(isa):
    # Every edge itself, and the float64 before and after it, which are the same float32.
    edges = np.sort(np.random.default_rng(0).standard_normal(255))
    x = np.concatenate([edges, np.nextafter(edges, -np.inf), np.nextafter(edges, np.inf), [np.inf, -np.inf, np.nan]])
    got = bin_columns(x[:, None], [edges])[:, 0]
    expected = np.searchsorted(edges, x)  # edges[i - 1] < x <= edges[i]
    expected[-1] = 255
    np.testing.assert_array_equal(got, expected)


def test_weights(isa):
    rng = np.random.default_rng(0)
    X, weight = rng.standard_normal((3001, 3)), rng.integers(0, 4, 3001).astype(float)
    for subsample in (200_000, 1000):
        ours = BinMapper(random_state=3, subsample=subsample).fit(X, sample_weight=weight)
        theirs = _BinMapper(random_state=3, subsample=subsample).fit(X, sample_weight=weight)
        for a, b in zip(ours.bin_thresholds_, theirs.bin_thresholds_, strict=True):
            np.testing.assert_array_equal(a, b)


def test_categories(isa):
    rng = np.random.default_rng(0)
    X = np.column_stack([rng.integers(0, 40, 2003), rng.standard_normal(2003), rng.integers(-2, 3, 2003)]).astype(float)
    X[::17, 0] = np.nan
    arguments = dict(
        is_categorical=np.array([True, False, True]),
        known_categories=[np.arange(40.0), None, np.arange(3.0)],
        random_state=0,
    )
    ours, theirs = BinMapper(**arguments).fit(X), _BinMapper(**arguments).fit(X)
    np.testing.assert_array_equal(ours.transform(X), theirs.transform(X))
    np.testing.assert_array_equal(ours.n_bins_non_missing_, theirs.n_bins_non_missing_)
    for arguments, message in (
        (dict(is_categorical=[True], known_categories=None), "Known categories for feature 0 must be provided."),
        (dict(is_categorical=None, known_categories=[np.arange(2.0)]), "Feature 0 isn't marked as a categorical"),
    ):
        with pytest.raises(ValueError, match=message):
            BinMapper(**arguments).fit(X[:, :1])


def test_all_missing(isa):
    X = np.full((101, 2), np.nan)
    X[:, 1] = np.arange(101)
    edges = bin_edges(X)
    assert [len(e) for e in edges] == [0, 100]
    assert (bin_columns(X, edges)[:, 0] == 255).all()


def test_threads_change_nothing():
    X = with_missing(np.random.default_rng(0).standard_normal((70_001, 11)))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        edges = bin_edges(X)
        results.append((np.concatenate(edges), bin_columns(X, edges)))
    for edges, bins in results[1:]:
        np.testing.assert_array_equal(edges, results[0][0])
        np.testing.assert_array_equal(bins, results[0][1])


def test_bad_input():
    X = np.random.default_rng(0).standard_normal((50, 2))
    with pytest.raises(ValueError, match="n_bins=2 should be no smaller than 3 and no larger than 256"):
        BinMapper(n_bins=2).fit(X)
    with pytest.raises(ValueError, match="This estimator was fitted with 2 features but 1 got passed to transform"):
        BinMapper().fit(X).transform(X[:, :1])
    with pytest.raises(ValueError, match="edges: expected one array for each of 2 columns, got 1"):
        bin_columns(X, [np.zeros(1)])
    with pytest.raises(ValueError, match="sample: expected rows from 0 to 49, got 50"):
        bin_edges(X, sample=np.array([0, 50]))
    with pytest.raises(ValueError, match="max_bins: expected 2 to 255, got 256"):
        bin_edges(X, 256)
    with pytest.raises(ValueError, match="up to 255 edges a column"):
        bin_columns(X, [np.arange(256.0), np.zeros(1)])


@pytest.mark.parametrize("kind", ["any", "integers", "many orders of magnitude", "ties", "missing", "infinite"])
def test_edges_of_rows_with_weights(kind):
    rng = np.random.default_rng(0)
    X, weight = rng.standard_normal(2003), rng.random(2003)
    if kind == "integers":
        weight = rng.integers(0, 4, 2003).astype(float)
    elif kind == "many orders of magnitude":
        weight = np.exp(20 * rng.standard_normal(2003))
    elif kind == "ties":
        X = np.round(X, 2)
    elif kind == "missing":
        X[::3] = np.nan
    elif kind == "infinite":
        X[:300], X[300:500] = np.inf, -np.inf
    for max_bins in (255, 31, 2):
        with np.errstate(invalid="ignore"):
            expected = _find_binning_thresholds(X, max_bins, sample_weight=weight)
            got = weighted_edges(X, weight, max_bins)
        assert got.dtype == expected.dtype and len(got) > 0
        np.testing.assert_array_equal(got, expected)
