"""best_split against every threshold tried in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnn.tree import best_split


def impurity(y, w, criterion):
    """The definitions, in float64."""
    if criterion in ("gini", "entropy"):
        p = np.array([w[y == c].sum() for c in np.unique(y)]) / w.sum()
        p = p[p > 0]
        return 1 - (p**2).sum() if criterion == "gini" else -(p * np.log2(p)).sum()
    mean = (w * y).sum() / w.sum()
    if criterion == "absolute_error":  # the best constant is one of the targets
        return min((w * np.abs(y - constant)).sum() for constant in y) / w.sum()
    if criterion == "squared_error":
        return (w * (y - mean) ** 2).sum() / w.sum()
    if mean <= 0:
        return np.inf
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(y > 0, w * y * np.log(y / mean), 0).sum() / w.sum()


def after(goes_left, y, w, criterion):
    total = 0.0
    for side in (goes_left, ~goes_left):
        total += w[side].sum() / w.sum() * impurity(y[side], w[side], criterion)
    return total


def brute_force(column, y, w, criterion):
    """(impurity after, threshold, NaN goes left) of the best split: all thresholds, NaN on either side."""
    there = w > 0
    column, y, w = column[there].astype(np.float64), y[there], w[there]
    values = np.unique(column[~np.isnan(column)])
    missing = np.isnan(column)
    best = (np.inf, np.nan, False)
    thresholds = [
        (a + b) / 2 for a, b in itertools.pairwise(values) if np.float32(b) > np.float32(a) + np.float32(1e-7)
    ]
    for left in (False, True) if missing.any() else (False,):
        for threshold in thresholds + ([np.inf] if missing.any() and not left and len(values) else []):
            goes = np.where(missing, left, column <= threshold)
            found = after(goes, y, w, criterion)
            if found < best[0] - 1e-12:
                best = (found, threshold, left)
    return best


def test_worked_examples():
    assert best_split(np.zeros(10), np.array([0] * 6 + [1] * 4)).impurity == pytest.approx(0.48)
    # Photon pT in GeV: one signal, two background.
    pt, kind = np.array([20.0, 30, 50]), np.array(["signal", "background", "background"])
    found = best_split(pt, kind)
    assert (found.feature, found.threshold) == (0, 25.0)
    assert found.impurities[0] == 0
    assert found.gain == found.impurity == pytest.approx(4 / 9)
    assert after(pt <= 40, kind, np.ones(3), "gini") == pytest.approx(1 / 3)
    assert best_split(pt[:2], kind[:2]).impurity * 2 / 3 == pytest.approx(1 / 3)
    # Lepton pT.
    found = best_split(np.array([14.0, 16, 20]), np.array(["background", "background", "signal"]))
    assert found.threshold == 18.0
    assert found.impurities[0] == 0


@pytest.mark.parametrize("criterion", ["gini", "entropy", "squared_error", "absolute_error", "poisson"])
@pytest.mark.parametrize("weighted", [None, "whole", "fractions"])
@pytest.mark.parametrize("n_classes", [2, 3, 7])
@pytest.mark.parametrize("rows", [2, 3, 16, 17, 61, 131])
def test_every_threshold(isa, criterion, weighted, n_classes, rows):
    rng = np.random.RandomState(rows)
    x = rng.randn(rows, 5).astype(np.float32)
    x[:, 1] = np.round(x[:, 1])
    x[:, 2] = 1.5
    x[rng.rand(rows) < 0.3, 3] = np.nan
    x[rng.rand(rows) < 0.3, 4] = np.nan
    x[:, 4] = np.round(x[:, 4])
    y = rng.randint(0, n_classes, rows)
    weights = {None: None, "whole": rng.randint(0, 3, rows) + (np.arange(rows) < 2), "fractions": rng.rand(rows)}[
        weighted
    ]
    found = best_split(x, y, sample_weight=weights, criterion=criterion)
    w = np.ones(rows) if weights is None else weights.astype(np.float64)
    for f in range(5):
        expected, threshold, _ = brute_force(x[:, f], y, w, criterion)
        if np.isinf(expected):
            assert np.isnan(found.thresholds[f])
            assert found.gains[f] == 0
            continue
        np.testing.assert_allclose(found.impurities[f], expected, rtol=1e-9, atol=1e-12)
        if found.thresholds[f] != threshold:  # then it is as good
            missing = np.isnan(x[:, f])
            goes = np.where(missing, found.missing_go_left[f], x[:, f] <= found.thresholds[f])
            np.testing.assert_allclose(after(goes, y, w, criterion), expected, rtol=1e-9, atol=1e-12)
    assert found.impurity == pytest.approx(impurity(y[w > 0], w[w > 0], criterion), rel=1e-9, abs=1e-12)
    if found.feature >= 0:
        assert found.gain == found.gains.max()
        assert found.feature == int(np.argmax(found.gains))


def test_tensors():
    x, y = torch.randn(50, 3), torch.randint(0, 3, (50,))
    expected = best_split(x.numpy(), y.numpy(), n_classes=3)
    for given_x in (x, x.double(), x.t().contiguous().t(), x.requires_grad_()):
        found = best_split(given_x, y, n_classes=3)
        assert isinstance(found.gains, torch.Tensor)
        assert found.thresholds.dtype == torch.float64
        assert found.threshold == expected.threshold
        np.testing.assert_array_equal(found.gains.numpy(), expected.gains)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 2)), min_size=1, max_size=30), st.integers(3, 5))
def test_property(rows, n_classes):
    x, y = np.array(rows, dtype=np.float64).T
    found = best_split(x, y.astype(int), n_classes=n_classes)
    expected, _, _ = brute_force(x, y, np.ones(len(y)), "gini")
    if np.isinf(expected):
        assert found.feature == -1
    else:
        assert found.impurities[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "parameters", "message"),
    [
        ((np.zeros((0, 2)), []), {}, "x must have rows"),
        ((np.zeros((2, 2, 2)), [0, 1]), {}, "x must have 1 or 2 dimensions"),
        ((np.zeros(3), [0, 1]), {}, r"y must have shape \(3,\)"),
        ((np.zeros(3), [[0], [1], [0]]), {}, "y must have 1 dimension"),
        ((np.array([0, np.inf]), [0, 1]), {}, "infinity"),
        ((np.zeros(2), [0, 1]), {"criterion": "best"}, "criterion must be"),
        ((np.zeros(2), [0, 1]), {"criterion": ["gini"]}, "criterion must be"),
        ((np.zeros(2), [0, np.nan]), {}, "y must not contain NaN"),
        ((np.zeros(2), [0, 2]), {"n_classes": 2}, "integers from 0 to n_classes - 1 = 1"),
        ((np.zeros(2), [0, 1]), {"n_classes": 10**12}, "n_classes must be at most 65536"),
        (([["a"], ["b"]], [0, 1]), {}, "could not convert"),
        ((np.zeros(2), [0, -1]), {"n_classes": 2}, "integers from 0"),
        ((np.zeros(2), [0.5, 1]), {"n_classes": 2}, "integers from 0"),
        ((np.zeros(2), [0, 1]), {"sample_weight": [1]}, "sample_weight must have shape"),
        ((np.zeros(2), [0, 1]), {"sample_weight": [1, -1]}, "not negative"),
        ((np.zeros(2), [0, -1]), {"criterion": "poisson"}, "must not be negative"),
        ((np.zeros(2), [0, np.nan]), {"criterion": "squared_error"}, "finite"),
        ((np.zeros(2), [0, 1]), {"criterion": "squared_error", "n_classes": 2}, "n_classes is for classes"),
    ],
)
def test_errors(arguments, parameters, message):
    with pytest.raises(ValueError, match=message):
        best_split(*arguments, **parameters)


@pytest.mark.parametrize(
    ("arguments", "parameters", "message"),
    [
        ((np.zeros(2) + 1j, [0, 1]), {}, "x must hold real numbers, got complex128"),
        ((np.zeros(2), [0, 1j]), {"criterion": "squared_error"}, "y must hold real numbers"),
        ((np.zeros(2), [0, 1]), {"sample_weight": [1, 1j]}, "sample_weight must hold real numbers"),
        ((np.zeros(2), [0, 1]), {"n_classes": 2.5}, "n_classes must be an integer, got 2.5"),
        (([[None], [object()]], [0, 1]), {}, "float"),
    ],
)
def test_wrong_types(arguments, parameters, message):
    with pytest.raises(TypeError, match=message):
        best_split(*arguments, **parameters)
