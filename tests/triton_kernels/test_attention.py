"""Attention in Triton over many blocks of few rows: what is passed over, what is whole, and what is left at the edges."""

import math

import pytest
import torch

from fastnn.backends import triton
from fastnn.backends.reference import attention as formulas

pytestmark = pytest.mark.skipif(triton.why_not() is not None, reason=str(triton.why_not()))
TINY = {512: ((16, 16, 4, 1),) * 2}
LOOSE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def wide(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def in_nan(x):
    """x among NaN, with gaps between its rows and its elements."""
    memory = torch.full((*x.shape[:2], x.shape[2] + 2, x.shape[3] + 1, 2), math.nan, dtype=x.dtype)
    view = memory[:, :, 1:-1, 1:, 1]
    return view.copy_(x)


def compare(heads, kv_heads, length, keys, size, value_size, dtype=torch.float32, *, strict=1.0, **options):
    """Result, log sum exp and gradients beside float64's."""
    from fastnn.backends.triton import attention as kernels

    o = dict(mask=None, slopes=None, scale=size**-0.5, low=None, high=None, shift=0, dropout=0.0, seed=None) | options
    shapes = ((heads, length, size), (kv_heads, keys, size), (kv_heads, keys, value_size), (heads, length, value_size))
    query, key, value, grad = (in_nan(torch.randn(1, *shape).to(dtype)) for shape in shapes)
    by_mask = o["mask"] is not None and o["mask"].is_floating_point()
    out, log_sum = kernels.attention(query, key, value, *o.values(), False)
    assert torch.equal(kernels.attention_alone(query, key, value, *o.values(), False), out)
    beside, rest = list(o.values())[:2], list(o.values())[2:]
    found = (out, *kernels.attention_backward(grad, query, key, value, *beside, out, log_sum, *rest, by_mask))
    wides = [wide(x) for x in (query, key, value)]
    exact, exact_sum = formulas.attention(*wides, *map(wide, o.values()), False)
    beside = [wide(x) for x in beside]
    wanted = (exact, *formulas.attention_backward(wide(grad), *wides, *beside, None, None, *rest, by_mask))
    torch.testing.assert_close(log_sum.double(), exact_sum.double(), rtol=1e-5 * strict, atol=1e-5 * strict)
    for ours, true in zip(found, wanted, strict=True):
        loose = LOOSE[dtype] * strict
        torch.testing.assert_close(ours.double(), true, rtol=loose, atol=loose * max(1, *true.abs().flatten(), 1))


@pytest.fixture
def tiny(monkeypatch, on_triton):
    from fastnn.backends.triton import attention_backward, attention_forward

    monkeypatch.setattr(attention_forward, "FORWARD", dict(TINY))
    for name in ("BY_QUERIES", "BY_KEYS"):
        monkeypatch.setattr(attention_backward, name, dict(TINY))


@pytest.mark.parametrize(
    ("low", "high"),
    [(None, None), (None, 0), (-20, 3), (15, 40), (-70, -30), (-1, None), (60, None), (None, -64)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bounds(low, high, dtype, tiny):
    """float32 asks of each score whether it counts, the others only where some of a block do not."""
    compare(1, 1, 65, 67, 9, 5, dtype, low=low, high=high)


@pytest.mark.parametrize("lengths", [(33, 50), (48, 32)], ids=str)
def test_everything_at_once(lengths, tiny):
    length, keys = lengths
    seed = torch.tensor(2**63 - 12345)
    mask = torch.randn(1, 4, 1, keys)
    mask[..., 5] = -math.inf
    for given in (mask, torch.rand(1, 1, length, keys).mT.contiguous().mT < 0.8):
        compare(
            4, 2, length, keys, 17, 20,
            mask=given, slopes=torch.rand(1, 4), low=-30, high=9, shift=keys - length, dropout=0.3, seed=seed,
        )  # fmt: skip


@pytest.mark.parametrize("size", [65, 129, 512])
def test_tiles_of_long_rows(size, on_triton):
    compare(1, 1, 18, 17, size, 16)
    compare(1, 1, 17, 18, 3, size, torch.bfloat16, high=0)


def test_precisions(on_triton):
    for precision, strict in (("highest", 1), ("high", 100), ("medium", 10000)):
        torch.set_float32_matmul_precision(precision)
        compare(1, 1, 20, 33, 64, 64, strict=strict)


def test_the_same_bits_each_time(tiny):
    from fastnn.backends.triton import attention as kernels

    query, key, value = (torch.randn(1, 2, n, 16, dtype=torch.float16) for n in (33, 50, 50))
    rest = (None, None, 0.25, None, 0, 0, 0.1, torch.tensor(3))
    out, log_sum = kernels.attention(query, key, value, *rest, True)
    found = [
        kernels.attention_backward(out, query, key, value, *rest[:2], out, log_sum, *rest[2:], False) for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
