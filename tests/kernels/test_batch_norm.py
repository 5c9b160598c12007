"""The batch norm kernels on every instruction set: dtypes, layouts, lengths, against float64."""

from __future__ import annotations

import math

import pytest
import torch

from fastnn import _cpu
from fastnn.backends.cpu import norm
from fastnn.backends.reference import norm as formulas

from .calls import FLOATS

dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
EPS = 1e-5
#: Primes, vector widths and their neighbours; below, at and above a block of 4096 in a plane and of 128 rows across, 64
#: channels of a plane and 256 across.
SHAPES = [
    (2, 3), (17, 5), (3, 15), (4, 16), (5, 17), (64, 7), (65, 8), (67, 33), (131, 65), (2, 300), (5, 520),
    (3, 7, 11), (2, 2, 15), (7, 3, 16), (4, 5, 17), (2, 3, 63), (2, 2, 4096), (1, 2, 4097), (3, 2, 2053), (70, 2, 113),
    (3, 5, 7, 9), (2, 33, 5, 3), (5, 1, 4, 4), (2, 3, 2, 3, 5), (21, 67, 14, 14), (85, 130, 7, 7),
]  # fmt: skip


def layouts(x):
    """The same numbers, laid out differently, amid NaN."""
    yield "contiguous", surrounded(x, x.shape, range(x.dim()))
    last = [0, *range(2, x.dim()), 1]
    yield "channels last", surrounded(x, [x.shape[d] for d in last], last)
    yield "reversed", surrounded(x, x.shape[::-1], range(x.dim())[::-1])
    sparse = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), math.nan, dtype=x.dtype)[..., 1::2]
    yield "sliced", sparse.copy_(x)


def surrounded(x, sizes, order):
    base = torch.full((x.numel() + 65,), math.nan, dtype=x.dtype)
    inner = base[33 : 33 + x.numel()].view(list(sizes))
    return inner.permute([list(order).index(d) for d in range(x.dim())]).copy_(x)


def close(result, exact, size, dtype, depth=16):
    """Within one rounding of the result and `depth` of what it is made of."""
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    bound = depth * unit * size + 0.51 * torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
    assert bool(((result.double() - exact).abs() <= bound).all())


def inputs(shape, dtype, offset=0.0):
    channels = shape[1]
    x = (torch.randn(shape, dtype=torch.float64) + offset).to(dtype)
    weight, bias = (torch.randn(channels, dtype=torch.float64).to(dtype) for _ in range(2))
    return x, weight, bias


def per_channel(value, x):
    return value.double().view(1, -1, *[1] * (x.dim() - 2))


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training(isa, shape, dtype):
    x, weight, bias = inputs(shape, dtype, 3.0)
    axes = [0, *range(2, len(shape))]
    exact, mean, _ = formulas.batch_norm(x.double(), None, None, weight, bias, None, EPS, False)
    var = x.double().var(axes, unbiased=False)
    scale = per_channel(weight, x).abs() / (per_channel(var, x) + EPS).sqrt()
    size = (x.double().abs() + per_channel(mean, x).abs()) * scale + per_channel(bias, x).abs()
    grad = torch.randn(shape, dtype=torch.float64).to(dtype)
    gradients = formulas.batch_norm_backward(grad.double(), x.double(), weight, mean, var, None, True, EPS, False)
    for name, laid_out in layouts(x):
        found, found_mean, found_var = norm.batch_norm(laid_out, None, None, weight, bias, None, EPS, False)
        close(found, exact, size, dtype)
        tight = 1e-13 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(found_mean, mean, rtol=tight, atol=0, msg=name)
        torch.testing.assert_close(found_var, var, rtol=tight, atol=1e-30, msg=name)
        gots = norm.batch_norm_backward(grad, laid_out, weight, mean, var, None, True, EPS, False)
        largest = (scale / scale.numel()).sum() + scale
        for got, wanted in zip(gots[:3], gradients[:3], strict=True):
            by_channel = got.dim() == 1
            terms = x.numel() / shape[1] if by_channel else 1
            reach = (grad.double().abs().amax() * (1 if by_channel else largest)) * 6 * math.sqrt(terms)
            close(got, wanted, reach, torch.float64 if by_channel and dtype == torch.float64 else dtype, 32)


@dtypes
@pytest.mark.parametrize("shape", [(5, 7, 3, 11), (33, 17), (2, 3, 4100)], ids=str)
def test_given_statistics(isa, shape, dtype):
    x, weight, bias = inputs(shape, dtype)
    mean, var = torch.randn(shape[1]).to(dtype), torch.rand(shape[1]).to(dtype) + 0.5
    exact, _, _ = formulas.batch_norm(x, mean, var, weight, bias, None, EPS, False, dtype=torch.float64)
    exact = formulas.batch_norm(x.double(), mean, var, weight, bias, None, EPS, False)[0]
    grad = torch.randn(shape).to(dtype)
    wanted = formulas.batch_norm_backward(grad.double(), x.double(), weight, mean, var, None, False, EPS, False)
    for _, laid_out in layouts(x):
        found, *statistics = norm.batch_norm(laid_out, mean, var, weight, bias, None, EPS, False)
        torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert torch.equal(statistics[0], mean.double())
        assert torch.equal(statistics[1], var.double())
        got = norm.batch_norm_backward(grad, laid_out, weight, *statistics, None, False, EPS, False)
        torch.testing.assert_close(got[0].double(), wanted[0], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        for one, other in zip(got[1:3], wanted[1:3], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@dtypes
@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (2, 64, 3, 3), (66, 19)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_residual_and_relu(isa, shape, dtype, training):
    x, weight, bias = inputs(shape, dtype)
    residual, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    given = (None, None) if training else (torch.randn(shape[1]), torch.rand(shape[1]) + 0.5)
    exact, mean, var = formulas.batch_norm(x.double(), *given, weight, bias, residual, EPS, True)
    for (_, one), (_, other), (_, third) in zip(layouts(x), layouts(residual), layouts(grad), strict=True):
        found, *statistics = norm.batch_norm(one, *given, weight, bias, other, EPS, True)
        torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)
        got = norm.batch_norm_backward(third, one, weight, *statistics, found, training, EPS, True)
        wanted = formulas.batch_norm_backward(
            grad.double(), x.double(), weight, mean, var, found.double(), training, EPS, True
        )
        assert torch.equal(got[3].double(), wanted[3])
        torch.testing.assert_close(got[0].double(), wanted[0], rtol=2 * torch.finfo(dtype).eps, atol=5e-6)
        for sums, others in zip(got[1:3], wanted[1:3], strict=True):
            torch.testing.assert_close(sums, others, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e6])
@pytest.mark.parametrize("channels_last", [False, True])
def test_mean_far_from_zero(isa, offset, channels_last):
    """float32 with a mean 10,000 times the deviation, and more: the numbers as they are in float32 are exact."""
    x = torch.randn(7, 5, 31, 33) + offset
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    out, mean, var = norm.batch_norm(x, None, None, None, None, None, EPS, False)
    wide = x.double()
    exact = torch.nn.functional.batch_norm(wide, None, None, None, None, True)
    torch.testing.assert_close(mean, wide.mean((0, 2, 3)), rtol=1e-9, atol=0)
    torch.testing.assert_close(var, wide.var((0, 2, 3), unbiased=False), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6)
    grad = torch.randn(7, 5, 31, 33)
    got = norm.batch_norm_backward(grad, x, None, mean, var, None, True, EPS, False)
    wanted = formulas.batch_norm_backward(grad.double(), wide, None, mean, var, None, True, EPS, False)
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=1e-3)


def test_first_elements_unlike_the_rest(isa):
    """What a block is shifted by is found on its first elements."""
    for shape, first in (((1, 2, 4000), (slice(None), slice(None), slice(0, 100))), ((60, 3), (slice(0, 2),))):
        x = torch.randn(shape)
        x[first] += 1e4
        for laid_out in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
            _, mean, var = norm.batch_norm(laid_out, None, None, None, None, None, EPS, False)
            axes = [0, *range(2, x.dim())]
            torch.testing.assert_close(mean, x.double().mean(axes), rtol=1e-6, atol=0)
            torch.testing.assert_close(var, x.double().var(axes, unbiased=False), rtol=1e-5, atol=0)


def test_squares_beyond_float32(isa):
    for channels_last in (False, True):
        x = torch.randn(4, 3, 5, 5) * 1e25
        x[:, 1] = torch.randn(4, 5, 5)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        out, mean, var = norm.batch_norm(x, None, None, None, None, None, EPS, False)
        torch.testing.assert_close(var, x.double().var((0, 2, 3), unbiased=False), rtol=1e-5, atol=0)
        torch.testing.assert_close(mean, x.double().mean((0, 2, 3)), rtol=1e-5, atol=0)
        exact = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_nan_and_infinity_stay_in_their_channel(isa):
    for value in (math.nan, math.inf, -math.inf):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(3, 20, 4, 5).contiguous(memory_format=memory_format)
            clean = norm.batch_norm(x, None, None, None, None, None, EPS, True)[0]
            x[1, 7, 2, 2] = value
            out = norm.batch_norm(x, None, None, None, None, None, EPS, True)[0]
            assert out[:, 7].isnan().all()
            others = [c for c in range(20) if c != 7]
            assert torch.equal(out[:, others], clean[:, others])


@dtypes
def test_the_same_bits_for_any_number_of_threads(isa, dtype):
    """Large enough for several threads, few and many channels, both formats, whole channels a thread and not."""
    for shape in ((8, 3, 120, 131), (16, 64, 31, 33), (4000, 40), (40, 2000), (3, 300, 30, 30)):
        x = torch.randn(shape).to(dtype)
        grad = torch.randn(shape).to(dtype)
        formats = [x] if x.dim() == 2 else [x, x.contiguous(memory_format=torch.channels_last)]
        for one in formats:
            runs = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                out, mean, var = norm.batch_norm(one, None, None, None, None, None, EPS, True)
                back = norm.batch_norm_backward(grad, one, None, mean, var, out, True, EPS, False)
                given = norm.batch_norm_backward(grad, one, None, mean, var, None, False, EPS, True)
                runs.append((out, mean, var, *back, *given))
            for run in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_results_around_the_caches(isa, channels_last):
    """Large enough to be written past them, from several threads."""
    shape = (10, 96, 55, 64)
    x, weight, bias = inputs(shape, torch.float32)
    grad = torch.randn(shape)
    if channels_last:
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    found, mean, var = norm.batch_norm(x, None, None, weight, bias, None, EPS, True)
    exact = formulas.batch_norm(x.double(), None, None, weight, bias, None, EPS, True)
    torch.testing.assert_close(found.double(), exact[0], rtol=1e-6, atol=1e-6)
    got = norm.batch_norm_backward(grad, x, weight, mean, var, found, True, EPS, True)
    wanted = formulas.batch_norm_backward(grad.double(), x.double(), weight, mean, var, found.double(), True, EPS, True)
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=1e-6, atol=1e-5)
    assert torch.equal(got[3].double(), wanted[3])


def test_writes_nothing_beside_its_result(isa):
    x = torch.randn(3, 5, 7, 9)
    for strides in ((315, 63, 9, 1), (315, 1, 45, 5)):
        base = torch.full((945 + 64,), math.nan)
        out = base[32:-32].as_strided(x.shape, strides, 32)
        statistics = torch.empty(2, 5, dtype=torch.float64)
        _cpu.batch_norm(
            x.shape, 0, (x.data_ptr(), x.stride()), None, (out.data_ptr(), strides), None, None, None, None,
            statistics[0].data_ptr(), statistics[1].data_ptr(), EPS, False,
        )  # fmt: skip
        assert out.isfinite().all()
        assert base[:32].isnan().all()
        assert base[-32:].isnan().all()


def test_bad_arguments():
    x = torch.randn(2, 3)
    operand, number = (x.data_ptr(), x.stride()), torch.zeros(3, dtype=torch.float64).data_ptr()

    def call(**changes):
        arguments = {
            **dict(shape=(2, 3), dtype=0, x=operand, residual=None, out=operand, weight=None, bias=None),
            **dict(given_mean=None, given_var=None, mean=number, var=number, eps=EPS, relu=False),
        }
        return _cpu.batch_norm(**{**arguments, **changes})

    for changes, named in (
        (dict(dtype=5), "dtype"),
        (dict(shape=(3,)), "shape"),
        (dict(shape=(0, 3)), "shape"),
        (dict(shape=[2, 3]), "shape"),
        (dict(x=None), "x"),
        (dict(x=(0, (3, 1))), "x"),
        (dict(out=(x.data_ptr(), (1,))), "out"),
        (dict(residual=3), "residual"),
        (dict(weight=(x.data_ptr(), 1, 9)), "weight"),
        (dict(weight=x.data_ptr()), "weight"),
        (dict(given_mean=(x.data_ptr(), 1, 0)), "given_mean"),
        (dict(mean=0), "mean"),
    ):
        with pytest.raises(ValueError, match=named):
            call(**changes)
