"""The softmax kernels of every instruction set, on every layout, against float64."""

from __future__ import annotations

import math

import pytest
import torch

from fastnn import _cpu
from fastnn.backends.cpu import softmax as kernels
from fastnn.backends.reference import softmax as formulas

from .calls import FLOATS

dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
#: Of one row, of parts of a vector and of a block of sums, of parts of a block of columns.
SHAPES = [(1,), (5,), (3, 7), (17, 33), (2, 1030), (3, 5, 7), (70, 3, 2), (2, 70, 300), (3, 2500, 2), (1, 9, 1)]


def layouts(x):
    """The same numbers, laid out differently, amid NaN."""
    around = torch.full((x.numel() + 66,), math.nan, dtype=x.dtype)
    yield around[33:-33].view(x.shape).copy_(x)
    order = list(range(x.dim()))[::-1]
    yield x.permute(order).contiguous().permute(order)
    sparse = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), math.nan, dtype=x.dtype)[..., 1::2]
    yield sparse.copy_(x)


def assert_near(found, exact, size, dtype):
    """Within 16 roundings of what is computed, and one of the result."""
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    bound = 16 * unit * size + 0.51 * torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
    assert bool(((found.double() - exact).abs() <= bound).all())


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(isa, shape, dtype):
    x, grad = ((torch.randn(shape, dtype=torch.float64) * 4).to(dtype) for _ in range(2))
    for dim in range(len(shape)):
        distance = (x.double() - x.double().amax(dim, keepdim=True)).abs()
        for log in (False, True):
            exact = formulas.softmax(x.double(), dim, log)
            size = 1 + exact.abs() if log else exact * (1 + distance)
            saved = exact.to(dtype)
            wanted = formulas.softmax_backward(grad.double(), saved.double(), dim, log)
            weight = saved.double().exp() if log else saved.double().abs()
            terms = grad.double().abs() if log else (grad.double() * saved.double()).abs()
            reach = grad.double().abs() * (1 if log else weight) + 2 * weight * terms.sum(dim, keepdim=True)
            for one, other, third in zip(layouts(x), layouts(grad), layouts(saved), strict=True):
                assert_near(kernels.softmax(one, dim, log), exact, size, dtype)
                assert_near(kernels.softmax_backward(other, third, dim, log), wanted, reach, dtype)


def test_rows_that_are_not_finite(isa):
    x = torch.randn(6, 40)
    x[0, 3] = math.nan
    x[1, 20] = math.inf
    x[2] = -math.inf
    x[3, 5:30] = -math.inf
    x[4] = 3e38
    for turned in (x, x.t().contiguous()):
        dim = 1 if turned is x else 0
        for log, theirs in ((False, torch.softmax), (True, torch.log_softmax)):
            torch.testing.assert_close(kernels.softmax(turned, dim, log), theirs(turned, dim), equal_nan=True)


def test_small_probabilities_keep_their_digits(isa):
    """exp to a unit in the last place, down to subnormal results."""
    x = torch.linspace(-104, 0, 4001)
    exact = torch.softmax(x.double(), 0)
    found = kernels.softmax(x, 0, False).double()
    unit = torch.maximum(exact * 2.0**-24, torch.tensor(2.0**-150, dtype=torch.float64))
    assert ((found - exact).abs() / unit).max() < 6


@dtypes
def test_the_same_bits_for_any_number_of_threads(isa, dtype):
    for shape, dim in (((300, 700), 1), ((700, 300), 0), ((3, 200, 500), 1), ((5, 70000), 1)):
        x, grad = (torch.randn(shape).to(dtype) for _ in range(2))
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found = []
            for log in (False, True):
                y = kernels.softmax(x, dim, log)
                found += [y, kernels.softmax_backward(grad, y, dim, log)]
            runs.append(found)
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("log", [False, True])
def test_results_around_the_caches(isa, log):
    """Large enough to be written past them, with rows that begin inside a cache line."""
    x, grad = torch.randn(5000, 2503), torch.randn(5000, 2503)
    y = kernels.softmax(x, 1, log)
    rows = torch.arange(0, 5000, 501)
    torch.testing.assert_close(y[rows].double(), formulas.softmax(x[rows].double(), 1, log), rtol=2e-6, atol=1e-9)
    found = kernels.softmax_backward(grad, y, 1, log)[rows]
    wanted = formulas.softmax_backward(grad[rows].double(), y[rows].double(), 1, log)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-7)


@dtypes
def test_writes_nothing_beside_its_result(isa, dtype):
    x = torch.randn(6, 37).to(dtype)
    for strides in ((37, 1), (1, 6), (80, 2), (39, 1)):
        for dim in (0, 1):
            base = torch.full((640,), math.nan, dtype=dtype)
            out = base.as_strided(x.shape, strides, 40)  # rows, columns, or neither of them
            kernels.softmax(x, dim, False, out)
            torch.testing.assert_close(out, kernels.softmax(x, dim, False))
            out.fill_(math.nan)
            assert base.isnan().all()


@dtypes
def test_expanded(isa, dtype):
    """Operands that repeat along the dimension, or along the positions: one number is all there is of a row."""
    x, grad = torch.randn(40, 700).to(dtype), torch.randn(40, 1).to(dtype)
    for dim in (0, 1):
        for log in (False, True):
            y = kernels.softmax(x, dim, log)
            for some in (grad[:1, :1], grad, grad[:1].mT):
                dense = some.expand(40, 700).contiguous()
                found = kernels.softmax_backward(some.expand(40, 700), y, dim, log)
                assert torch.equal(found, kernels.softmax_backward(dense, y, dim, log))
                repeated = kernels.softmax(some.expand(40, 700), dim, log)
                assert torch.equal(repeated, kernels.softmax(dense, dim, log))


@dtypes
def test_in_place(isa, dtype):
    for dim in (0, 1):
        for log in (False, True):
            x = torch.randn(40, 700).to(dtype)
            expected = kernels.softmax(x, dim, log)
            assert torch.equal(kernels.softmax(x, dim, log, x), expected)


def test_bad_arguments():
    x = torch.randn(2, 3)
    operand = (x.data_ptr(), x.stride())

    def call(**changes):
        arguments = dict(shape=(2, 3), dtype=0, log=False, dim=1, x=operand, out=operand)
        return _cpu.softmax(**{**arguments, **changes})

    for changes, named in (
        (dict(dtype=5), "dtype"),
        (dict(shape=(0, 3)), "shape"),
        (dict(dim=2), "dim"),
        (dict(dim=-1), "dim"),
        (dict(x=None), "x"),
        (dict(x=(0, (3, 1))), "x"),
        (dict(out=(x.data_ptr(), (1,))), "out"),
    ):
        with pytest.raises(ValueError, match=named):
            call(**changes)
