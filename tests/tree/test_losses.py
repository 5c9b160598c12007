"""Gradients and hessians against scikit-learn's, to the bit: float64 inside, rounded to float32 once."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn._loss.loss import HalfBinomialLoss, HalfPoissonLoss, HalfSquaredError

from fastnn import _cpu
from fastnn.tree._losses import gradients


def rows(n, positive=False):
    rng = np.random.default_rng(0)
    raw = np.asfortranarray(rng.standard_normal((n, 1)) * rng.choice([0.1, 1, 10, 40, 400], size=(n, 1)))
    special = [-37, np.nextafter(-37, 0), -38, 37, 800, -800, np.inf, -np.inf, np.nan, 0]
    raw[: len(special), 0] = special[:n]
    return (rng.random(n) > 0.5).astype(np.float64), raw, rng.random(n) * 5


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", [HalfBinomialLoss, HalfSquaredError, HalfPoissonLoss])
@pytest.mark.parametrize("n", [1, 10, 100_003])
def test_scikit_learns_bits(isa, loss, weighted, n):
    y, raw, weight = rows(n)
    weight = weight if weighted else None
    loss = loss(sample_weight=weight)
    expected = loss.init_gradient_and_hessian(n_samples=n, dtype=np.float32, order="F")
    got = loss.init_gradient_and_hessian(n_samples=n, dtype=np.float32, order="F")
    more = {"y_true": y, "raw_prediction": raw, "sample_weight": weight, "gradient_out": expected[0]}
    if loss.constant_hessian:
        loss.gradient(**more)
    else:
        loss.gradient_hessian(**more, hessian_out=expected[1])
    gradients(loss, y, raw, weight, got[0], None if loss.constant_hessian else got[1], 2)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_arguments_that_cannot_be():
    for wrong in (
        ("hinge", 8, 8, 0, 8, 0, 1),
        ("half_binomial", 0, 8, 0, 8, 0, 1),
        ("half_binomial", 8, 8, 0, 8, 0, -1),
    ):
        with pytest.raises(ValueError, match="loss_gradients"):
            _cpu.loss_gradients(*wrong)
