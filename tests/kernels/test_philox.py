"""The random words of dropout, and what the kernel makes of them."""

from __future__ import annotations

import math

import pytest
import torch

from fastnn import _cpu

from .calls import DTYPE, FLOATS


def philox(counter, key):
    """Philox4x32-10, as the paper writes it: one round, and a key that grows between rounds."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def word(seed, element):
    counter, low = element // 4, 0xFFFFFFFF
    return philox((counter & low, counter >> 32, 0, 0), (seed & low, seed >> 32))[element % 4]


def words(seed, first, n):
    out = torch.full((n + 2,), -7, dtype=torch.int32)
    _cpu.dropout_words(seed, first, n, out[1:].data_ptr())
    assert out[0] == out[-1] == -7
    return [v & 0xFFFFFFFF for v in out[1:-1].tolist()]


def test_known_answers():
    """Those that the authors' Random123 has for its own tests."""
    ones = 0xFFFFFFFF
    assert philox((0,) * 4, (0,) * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox((ones,) * 4, (ones,) * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert words(0, 0, 4) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed", [0, 1, 0x0123456789ABCDEF, (1 << 64) - 1])
def test_words_of_any_run(isa, seed):
    expected = [word(seed, e) for e in range(400)]
    for first in (0, 1, 2, 3, 4, 5, 63, 67):
        for n in (0, 1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65, 127, 130, 259):
            assert words(seed, first, n) == expected[first : first + n], (first, n)


@pytest.mark.parametrize("first", [(1 << 34) - 37, (1 << 34) - 3, 1 << 34, (1 << 50) + 1])
def test_counters_of_more_than_32_bits(isa, first):
    assert words(99, first, 150) == [word(99, first + i) for i in range(150)]


def dropout(x, p, seed=5, out=None):
    out = torch.empty_like(x) if out is None else out
    arguments = (x.shape, x.stride(), out.stride(), DTYPE[x.dtype], seed, p)
    _cpu.dropout(x.data_ptr(), out.data_ptr(), *arguments)
    return out


def expected(x, p, seed=5):
    kept = [word(seed, e) >= round(p * 2**32) for e in range(x.numel())]
    factor = torch.tensor(kept, dtype=torch.float64).view(x.shape) * (1 / (1 - p) if p < 1 else 0)
    return (x.double() * (factor if x.dtype is torch.float64 else factor.float().double())).to(x.dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
def test_dropout_is_a_function_of_seed_and_index(isa, dtype):
    for shape in ((), (1,), (7,), (3, 5, 67), (1031,)):
        x = torch.randn(shape).to(dtype)
        for p in (0.0, 0.1, 0.5, 0.999, 1.0):
            assert torch.equal(dropout(x, p), expected(x, p))


def test_dropout_in_any_layout(isa):
    x = torch.randn(4, 6, 33, 17)
    want = expected(x, 0.3)
    for view in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(0, 3).contiguous().transpose(0, 3),
        torch.stack((x, torch.full_like(x, math.nan)), -1)[..., 0],
    ):
        assert torch.equal(dropout(view, 0.3), want)
        spread = torch.full((*x.shape, 3), -7.0)
        dropout(view, 0.3, out=spread[..., 1])
        assert torch.equal(spread[..., 1], want)
        assert spread[..., ::2].eq(-7).all()
    rows = x[:1].expand(4, 6, 33, 17)
    assert torch.equal(dropout(rows, 0.3, out=torch.empty(x.shape)), expected(rows, 0.3))
    assert dropout(torch.empty(3, 0), 0.5).shape == (3, 0)


def test_dropout_in_place_and_threads(isa):
    x = torch.randn(300_001)
    want = dropout(x, 0.1, 11)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        assert torch.equal(dropout(x, 0.1, 11), want)
    assert torch.equal(dropout(x, 0.1, 11, out=x), want)


def test_what_is_dropped_of_the_non_finite_is_nan(isa):
    x = torch.tensor([math.inf, -math.inf, math.nan, -1.0, 0.0, 1.0]).repeat(50)
    got, want = dropout(x, 0.5), expected(x, 0.5)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    numbers = ~want.isnan()
    assert torch.equal(got[numbers].signbit(), want[numbers].signbit())


def test_bits_are_fair(isa):
    """Every bit of the words is set half of the time, and elements a word, a counter or a row apart agree in half of
    them: within 6 standard deviations."""
    n = 1 << 16
    out = torch.empty(n, dtype=torch.int32)
    for seed in (0, 1, 123456789):
        _cpu.dropout_words(seed, 0, n, out.data_ptr())
        bits = torch.stack([(out >> b) & 1 for b in range(32)]).double()
        margin = 6 * 0.5 / math.sqrt(n)
        assert (bits.mean(1) - 0.5).abs().max() < margin
        for apart in (1, 4, 64):
            same = (bits[:, apart:] == bits[:, :-apart]).double().mean(1)
            assert (same - 0.5).abs().max() < margin * 1.01


def test_bad_arguments():
    x = torch.randn(4)
    good = (x.data_ptr(), x.data_ptr(), (4,), (1,), (1,), 0, 0, 0.5)
    _cpu.dropout(*good)
    for place, value, name in (
        (0, 0, "x, out"),
        (2, (-1,), "shape"),
        (2, [4], "shape"),
        (3, (1, 1), "strides"),
        (5, 4, "dtype"),
        (7, 1.5, "p:"),
        (7, -0.1, "p:"),
        (7, math.nan, "p:"),
    ):
        with pytest.raises(ValueError, match=name):
            _cpu.dropout(*good[:place], value, *good[place + 1 :])
