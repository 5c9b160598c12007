"""The exponentials of attention/kernels.inl, seen through calls in which nothing else happens to them."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from fastnn import _cpu
from fastnn.backends.cpu import DTYPE

F32 = DTYPE[torch.float32]


def backward_exp(x: torch.Tensor) -> torch.Tensor:
    """One query of 1 and keys x: with 0 for the log-sum-exp, the gradient of value j is exp(x[j])."""
    n = x.numel()
    one, zero, keys, values = torch.ones(1), torch.zeros(1), x.contiguous(), torch.zeros(n)
    by_query, by_keys, by_values = torch.empty(1), torch.empty(n), torch.empty(n)

    def operand(t):
        return t.data_ptr(), (t.numel(), t.numel(), 1, 1)

    _cpu.attention_backward(
        *(F32, (1, 1, 1, 1, n, 1, 1), operand(one), operand(keys), operand(values), operand(zero), zero.data_ptr()),
        *(operand(one), operand(by_query), operand(by_keys), operand(by_values), None, 1.0, None, (None, None)),
        *(None, None),
    )
    return by_values


def forward_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """Queries x, keys 0 and 1 and values 0 and 1: exp(x) / (1 + exp(x))."""
    n = x.numel()
    zero_one, out = torch.tensor([0.0, 1.0]), torch.empty(n)
    strides = (n, n, 1, 1)
    _cpu.attention(
        *(F32, (1, 1, 1, n, 2, 1, 1), (x.data_ptr(), strides)),
        *((zero_one.data_ptr(), (2, 2, 1, 1)), (zero_one.data_ptr(), (2, 2, 1, 1)), (out.data_ptr(), strides)),
        *(None, 1.0, None, (None, None), None, None),
    )
    return out


def test_backward_exp_on_a_sample_of_all_float32(isa):
    """1.03 ulp, from 0 to where the result is subnormal; above 0, where rounding alone leads, it is 1."""
    bits = torch.arange(0x80000000, 0xC2D00000, 4999)
    x = (bits - (1 << 32)).to(torch.int32).view(torch.float32)
    exact = numpy.exp(x.numpy().astype(numpy.longdouble))
    unit = numpy.spacing(numpy.maximum(exact.astype(numpy.float32), numpy.float32(1.18e-38)))
    error = numpy.abs(backward_exp(x).numpy().astype(numpy.longdouble) - exact) / unit
    assert error.max() <= 1.03, float(x[int(error.argmax())])
    assert (backward_exp(-x) == 1).all()


def test_exp_of_what_is_excluded_is_zero(isa):
    found = backward_exp(torch.tensor([-math.inf, -1e30, -105.0, 0.0, -0.0, math.nan]))
    assert found[:5].tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert found[5].isnan()


@pytest.mark.parametrize("low, high", [(-1, 0), (-10, -1), (-80, -10), (0, 80)])
def test_forward_exp(isa, low, high):
    """The exponent is rounded as a number of base 2: with an error in proportion to it."""
    x = torch.linspace(low, high, 100_003)
    exact = torch.sigmoid(x.double())
    error = (forward_sigmoid(x).double() - exact).abs() / exact
    bound = 2.0**-24 * (4 + x.double().abs().clamp(max=80) * (1 - exact) * 2)
    assert (error <= bound).all(), float((error / bound).max())
