"""The error of the functions in isa/math.hpp, in units in the last place of the exact result."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from fastnn import _cpu

from .calls import TORCH, error_in_ulp, exact, math_function

#: Stated in isa/math.hpp. silu and sigmoid, in float32 lanes, are as accurate as torch's.
BOUND = {"exp": 0.501, "tanh": 0.501, "erf": 0.503, "gelu": 0.503, "gelu_tanh": 0.501, "sigmoid": 2.5, "silu": 2.5}
ALL = 1 << 32


@pytest.mark.parametrize("name", ["exp", "erf", "sigmoid"])
def test_every_float32(name):
    error, where = _cpu.largest_ulp_error(name)
    assert error <= BOUND[name], f"{error} ulp at {where}"


@pytest.mark.parametrize("name", ["tanh"])
def test_every_float32_of_an_odd_function(name):
    """Every positive float32, NaN included; the bits of f(-x) are those of -f(x) on a sample of all."""
    error, where = _cpu.largest_ulp_error(name, 0, ALL // 2)
    assert error <= BOUND[name], f"{error} ulp at {where}"
    x = torch.arange(0, 0x7F800001, 409, dtype=torch.int32).view(torch.float32)
    assert torch.equal(math_function(name, -x).view(torch.int32), (-math_function(name, x)).view(torch.int32))


@pytest.mark.parametrize("name", BOUND)
def test_a_sample_of_all_float32(isa, name):
    step = 4999
    error, where = _cpu.largest_ulp_error(name, 0, ALL // step, step)
    assert error <= BOUND[name], f"{error} ulp at {where}"


@pytest.mark.parametrize("name", BOUND)
def test_float32_is_no_less_accurate_than_torch(isa, name):
    for low, high in ((-87, -20), (-20, -5), (-5, -1), (-1, 0), (0, 1), (1, 5), (5, 80)):
        x = torch.linspace(low, high, 1 << 16)
        reference = exact(name, x)
        ours = (math_function(name, x).double() - reference).abs()
        torchs = (TORCH[name](x).double() - reference).abs()
        assert ours.max() <= torchs.max() * 1.02 + 2e-45, (name, low, high)
        # In ulp too, where torch does not lose everything to cancellation.
        e = (ours / reference.abs().clamp(min=2e-38)).max()
        t = (torchs / reference.abs().clamp(min=2e-38)).max()
        assert e <= t * 1.02, (name, low, high)


INF, NAN = math.inf, math.nan
# Pairs of x and f(x). silu and gelu of -infinity are -infinity times 0, which is NaN, in torch as well.
LIKE_SILU = [(INF, INF), (-INF, NAN), (0.0, 0.0), (-0.0, -0.0), (3e38, 3e38), (-3e38, -0.0), (NAN, NAN)]
SPECIAL = {
    "exp": [(INF, INF), (-INF, 0.0), (0.0, 1.0), (-0.0, 1.0), (1e-45, 1.0), (1e4, INF), (-1e4, 0.0), (NAN, NAN)],
    "erf": [(INF, 1.0), (-INF, -1.0), (0.0, 0.0), (-0.0, -0.0), (1e30, 1.0), (-1e30, -1.0), (NAN, NAN)],
    "tanh": [(INF, 1.0), (-INF, -1.0), (0.0, 0.0), (-0.0, -0.0), (1e-45, 1e-45), (-1e30, -1.0), (NAN, NAN)],
    "sigmoid": [(INF, 1.0), (-INF, 0.0), (0.0, 0.5), (-0.0, 0.5), (3e38, 1.0), (-3e38, 0.0), (NAN, NAN)],
    "silu": LIKE_SILU,
    "gelu": LIKE_SILU,
    "gelu_tanh": LIKE_SILU,
    "relu6": [(INF, 6.0), (-INF, 0.0), (0.0, 0.0), (6.0, 6.0), (1e-45, 1e-45), (-3e38, 0.0), (NAN, NAN)],
    "relu": [(INF, INF), (-INF, 0.0), (0.0, 0.0), (1e-45, 1e-45), (-3e38, 0.0), (NAN, NAN)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_values(isa, name, dtype):
    x, want = torch.tensor(SPECIAL[name], dtype=dtype).unbind(1)
    got = math_function(name, x.contiguous())
    torch.testing.assert_close(got, want, rtol=1e-15, atol=0, equal_nan=True)
    numbers = ~want.isnan()
    assert torch.equal(got[numbers].signbit(), want[numbers].signbit())


# Without a fused multiply-add the square in gelu's exponent is rounded, and exp magnifies that.
BOUND64 = {"exp": 1.5, "tanh": 3, "erf": 1.5, "sigmoid": 3, "silu": 3.5, "gelu": 9}
mpmath.mp.prec = 200
ORACLE = {
    "exp": mpmath.exp,
    "tanh": mpmath.tanh,
    "erf": mpmath.erf,
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
    "gelu": lambda x: x * mpmath.erfc(-x / mpmath.sqrt(2)) / 2,
    "gelu_tanh": lambda x: x * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + 0.044715 * x**3))) / 2,
}


@pytest.mark.parametrize("name", BOUND64)
def test_float64(isa, name):
    """Against 60-digit arithmetic. The subnormal results of the tails are left out."""
    points = torch.cat([torch.randn(400, dtype=torch.float64) * 3, torch.linspace(-37, 37, 401, dtype=torch.float64)])
    small = torch.logspace(-300, 0, 100, dtype=torch.float64)
    x = torch.cat([points, small, -small, torch.linspace(-700, 700, 101, dtype=torch.float64)])
    if name == "gelu":
        x = x[x > -37]
    values = [ORACLE[name](mpmath.mpf(v)) for v in x.tolist()]
    want = torch.tensor([float(v) for v in values], dtype=torch.float64)
    got = math_function(name, x)
    unit = torch.nextafter(want.abs(), torch.tensor(math.inf, dtype=torch.float64)) - want.abs()
    error = [
        float(abs(mpmath.mpf(g) - v) / u)
        for g, v, u in zip(got.tolist(), values, unit.tolist(), strict=True)
        if abs(v) > 1e-300
    ]
    assert max(error) <= (800 if isa == "portable" and name == "gelu" else BOUND64[name])


def test_float64_gelu_tanh(isa):
    """The exponent's own rounding is magnified by up to its size, as in torch's formula."""
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    values = [ORACLE["gelu_tanh"](mpmath.mpf(v)) for v in x.tolist()]
    reference = torch.tensor([float(v) for v in values], dtype=torch.float64)
    assert error_in_ulp(math_function("gelu_tanh", x), reference) < 100
    ours = (math_function("gelu_tanh", x) - reference).abs().max()
    assert ours <= (TORCH["gelu_tanh"](x) - reference).abs().max() * 1.1


def test_bad_arguments():
    with pytest.raises(ValueError, match="function"):
        _cpu.math_function("cosh", 0, 0, 0, 0)
    with pytest.raises(ValueError, match="dtype"):
        _cpu.math_function("exp", 0, 0, 0, 2)
