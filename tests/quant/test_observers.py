"""The observers, against numpy on all values at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastnn.quant import MSE, Int8Static, MinMax, MovingAverage, Observer, Percentile, quantize_

OBSERVERS = [MinMax, MovingAverage, Percentile, MSE]


def batches():
    torch.manual_seed(1)
    # Of several magnitudes, so that bins are merged on the way; skewed, with outliers.
    found = [torch.randn(37, 11) * scale + shift for scale, shift in [(0.01, 0.0), (1.0, 0.5), (0.3, -0.2), (2.0, 1.0)]]
    found[1][3, 4] = 40.0
    return found


def observed(observer, data):
    for x in data:
        observer.observe(x)
    return observer.range()


def test_minmax():
    data = batches()
    values = torch.cat(data)
    assert observed(MinMax(), data) == (values.min().item(), values.max().item())


def test_moving_average():
    lo = hi = None
    for x in batches():
        ends = x.min().item(), x.max().item()
        lo, hi = ends if lo is None else (lo + 0.25 * (ends[0] - lo), hi + 0.25 * (ends[1] - hi))
    assert observed(MovingAverage(0.25), batches()) == pytest.approx((lo, hi))


@pytest.mark.parametrize("percentile", [99.99, 99.0, 90.0, 50.0, 100.0])
def test_percentile(percentile):
    data = batches()
    values = torch.cat(data).numpy().astype(np.float64)
    outside = (100 - percentile) / 2
    expected = np.percentile(values, [outside, 100 - outside], method="inverted_cdf")
    near = (
        np.percentile(values, [max(outside - 0.1, 0), min(outside + 0.1, 100)]),
        np.percentile(values, [max(100 - outside - 0.1, 0), min(100 - outside + 0.1, 100)]),
    )
    width = 64 / 4096  # the largest value is below 2^6
    for found, end, (low, high) in zip(observed(Percentile(percentile), data), expected, near, strict=True):
        found_inside = min(low, end) - width <= found <= max(high, end) + width
        assert found_inside, (found, end)


def quantization_error(values, lo, hi):
    scale = (hi - lo) / 255
    zero = np.clip(np.round(-lo / scale), 0, 255)
    return ((np.clip(np.round(values / scale) + zero, 0, 255) - zero) * scale - values).__pow__(2).mean()


def test_mse_is_nearly_the_best_range():
    data = batches()
    values = torch.cat(data).numpy().astype(np.float64).ravel()
    found = quantization_error(values, *observed(MSE(), data))
    lo, hi = values.min(), values.max()
    everything = [
        quantization_error(values, lo * a, hi * b) for a in np.linspace(0.02, 1, 50) for b in np.linspace(0.02, 1, 50)
    ]
    assert found <= 1.05 * min(everything)
    assert found <= quantization_error(values, lo, hi)
    # Many values and few far ones: those are clipped.
    values = torch.randn(20_000)
    values[0] = 30.0
    found = observed(MSE(levels=16), [values])
    assert found[1] < 10


@pytest.mark.parametrize("kind", [Percentile, MSE])
def test_order_of_the_batches_does_not_matter(kind):
    assert observed(kind(), batches()) == observed(kind(), batches()[::-1])


@pytest.mark.parametrize("kind", OBSERVERS)
def test_any_values(kind):
    assert observed(kind(), [torch.rand(5) + 1])[0] == 0.0
    assert observed(kind(), [-torch.rand(5) - 1])[1] == 0.0
    assert observed(kind(), [torch.zeros(3)]) == (0.0, 0.0)
    strange = torch.tensor([torch.nan, torch.inf, -torch.inf, 2.0, -1.0])
    lo, hi = observed(kind(), [strange, torch.empty(0), torch.tensor([1.5], dtype=torch.bfloat16)])
    assert -1.0 <= lo <= 0.0 <= hi <= 2.0
    lo, hi = observed(kind(), [torch.tensor([1e-38, 3e38, -3e38])])
    assert np.isfinite([lo, hi]).all()
    with pytest.raises(ValueError, match=f"{kind.__name__}: no finite value was observed"):
        observed(kind(), [torch.empty(0, 3), torch.tensor(torch.nan)])


def test_bad_arguments():
    for momentum in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match=r"MovingAverage: momentum must be in \(0, 1\]"):
            MovingAverage(momentum)
    for percentile in (0.0, 100.1):
        with pytest.raises(ValueError, match=r"Percentile: percentile must be in \(0, 100\]"):
            Percentile(percentile)


def test_names_and_makers_in_a_calibration():
    x = torch.randn(500, 16)
    x[0, 0] = 50.0
    scales = {}
    for observer in ("minmax", "moving_average", "percentile", "mse", lambda: Percentile(90.0)):
        layer = quantize_(torch.nn.Linear(16, 4), Int8Static([x], observer))
        scales[str(observer)] = layer.input_scale.item()
    assert scales["minmax"] == scales["moving_average"] > scales["percentile"] > scales.popitem()[1]
    assert scales["mse"] < scales["minmax"]


def test_an_observer_of_ones_own():
    class Fixed(Observer):
        def _see(self, values):
            pass

        def _range(self):
            return -1.0, 1.55

    layer = quantize_(torch.nn.Linear(16, 4), Int8Static([torch.randn(2, 16)], Fixed))
    assert layer.input_scale.item() == pytest.approx(0.01)
    assert layer.input_zero_point.item() == 100
