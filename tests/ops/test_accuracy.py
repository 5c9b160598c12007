"""Numbers: against float64, bit for bit on small integers, in every layout."""

import collections
import functools
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastnn
import fastnn.functional as fF
from fastnn import _cpu
from fastnn.backends import reference

from .support import FLOATS, assert_within, integers

# Primes, and the sizes of tiles and vectors plus and minus one.
EDGES = (1, 2, 3, 7, 13, 15, 16, 17, 31, 33, 63, 65, 97, 127, 129)


def shapes(seed, count):
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(EDGES), (count, 3), generator=generator, device="cpu")
    return [tuple(EDGES[i] for i in row) for row in picks.tolist()]


def fewer(machine, cases):
    """Every seventh for Triton's interpreter, which is slow."""
    return list(cases)[::7] if machine == "triton" else cases


@pytest.mark.parametrize("dtype", FLOATS)
def test_integers_come_out_exactly(machine, dtype, no_fallback):
    """All sums are exact in every dtype here, so that an index that is off by one shows."""
    for m, n, k in fewer(machine, [(130, 70, 300), *shapes(1, 40), (1, 300, 5), (300, 1, 5), (4, 64, 1)]):
        low, high = (-1, 2) if dtype is torch.bfloat16 and k > 60 else (-2, 3)
        a, b = integers(m, k, dtype=dtype, low=low, high=high), integers(k, n, dtype=dtype, low=low, high=high)
        exact = a.double() @ b.double()
        if exact.abs().max() > (256 if dtype is torch.bfloat16 else 2048):
            continue  # not a number of this dtype
        assert torch.equal(fastnn.mm(a, b).double(), exact), (m, n, k)
        w = b.t().contiguous()
        bias = integers(n, dtype=dtype)
        assert torch.equal(fF.linear(a, w, bias).double(), (exact + bias.double()).to(dtype).double()), (m, n, k)
        assert torch.equal(fF.linear_act(a, w, None, "relu").double(), exact.clamp(min=0)), (m, n, k)


@pytest.mark.parametrize("dtype", FLOATS)
def test_within_rounding_of_float64(machine, dtype, no_fallback):
    for m, n, k in fewer(machine, [(33, 65, 700), *shapes(2, 12)]):
        a, b = torch.randn(m, k, dtype=torch.float64).to(dtype), torch.randn(k, n, dtype=torch.float64).to(dtype)
        exact, magnitude = reference.matmul(a, b, keep=True), reference.matmul(a.abs(), b.abs(), keep=True)
        assert_within(fastnn.mm(a, b), exact, magnitude, terms=k + 2)


@pytest.mark.parametrize("kind", ["relu", "relu6", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_act_is_the_formula(machine, dtype, kind, no_fallback):
    x, w, b = (torch.randn(s).to(dtype) for s in ((9, 17), (33, 17), (33,)))
    exact = reference.linear(x, w, b, kind, keep=True)
    magnitude = reference.linear(x.abs(), w.abs(), b.abs(), keep=True)  # slopes are at most 1.13
    assert_within(fF.linear_act(x, w, b, kind), exact, magnitude, terms=30)


def pairs(m, n, k):
    """Operands of several kinds, by name."""
    yield "normal", torch.randn(m, k), torch.randn(k, n)
    yield "uniform", torch.rand(m, k), torch.rand(k, n)
    scales = torch.logspace(-8, 8, k)[torch.randperm(k)][:, None]
    yield "scaled", torch.randn(m, k) * torch.logspace(-10, 10, m)[:, None], torch.randn(k, n) * scales
    half, other = torch.randn(m, k // 2), torch.randn(k // 2, n)
    yield "cancelling", torch.cat((half, -half * (1 + 1e-4 * torch.randn(m, k // 2))), 1), torch.cat((other, other))
    # The rows of a Hilbert matrix, in any order: nearly parallel.
    i, j = torch.arange(1, m + 1)[:, None], torch.randperm(k) + 1
    yield "ill-conditioned", 1 / (i + j).float(), torch.randn(k, n)


def test_gelu_at_the_end_of_a_product(machine, no_fallback):
    """Of exactly known arguments, 1 · x: it is no further from float64 than torch's own, and on CPUs keeps the left tail."""
    x = torch.cat((torch.linspace(-7, 7, 20011), torch.tensor([0.0, 1e-30, -1e-30, 100.0, -100.0, 3e38, -3e38])))
    found = fF.linear_act(torch.ones(5, 1), x.unsqueeze(1), None, "gelu")
    exact = torch.nn.functional.gelu(x.double())
    error, torchs = (found - exact).abs(), (torch.nn.functional.gelu(x) - exact).abs()
    scale = x.double().abs() + 1e-38
    assert (error / scale).max() <= max(0.5 * (torchs / scale).max(), 2**-23)
    assert (error <= 1.1 * torch.finfo(torch.float32).eps * exact.abs())[:, x > 0].all()
    tail = (x < 0) & (x > -5.5)
    assert machine in ("cuda", "triton") or (error <= 3e-5 * exact.abs())[:, tail].all()
    assert torch.equal(found[:, x > 6], x[x > 6].expand(5, -1))
    assert found[:, x == -100].abs().max() <= 1e-38
    ends = fF.linear_act(torch.ones(5, 1), torch.tensor([[torch.inf], [-torch.inf], [torch.nan]]), None, "gelu")
    assert (ends[:, 0] == torch.inf).all() and ends[:, 1:].isnan().all()


@functools.cache
def torchs_products(m, n, k, turns):
    """By kind and turn: the exact product, |A| |B|, and torch's errors where B lies in rows and where it lies in columns."""
    torch.manual_seed(0)
    found = {}
    for turn in range(turns):
        for name, a, b in pairs(m, n, k):
            exact, magnitude = a.double() @ b.double(), a.double().abs() @ b.double().abs()
            errors = [((a @ y).double() - exact) / magnitude for y in (b, b.t().contiguous().t())]
            found[name, turn] = exact, magnitude, [error.square().sum() for error in errors]
    return found


@pytest.mark.parametrize("k", [1024, 8192, 65536])
def test_float32_is_no_worse_than_torch(machine, k, no_fallback):
    """'highest' is held to torch's own error, relative to |A| |B|. Both are far below the bound of the formula; the tenth
    is for the order of the sums, which is another on each instruction set."""
    emulated = machine in ("cuda", "triton")  # a GPU is slow to play: few results, and none of the longest sums
    for m, n in ((16, 32),) if emulated else ((80, 96), (4, 96), (1, 96)):
        if emulated and k > (8192 if machine == "cuda" else 1024):
            break
        squares = collections.defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        turns = 1 if m > 4 or k > 8192 else 6
        known = torchs_products(m, n, k, turns)  # the same for every machine
        torch.manual_seed(0)
        for turn in range(turns):
            for name, a, b in pairs(m, n, k):
                exact, magnitude, torchs = known[name, turn]
                for y, square in zip((b, b.t().contiguous().t()), torchs, strict=True):
                    error = (fastnn.mm(a, y).double() - exact) / magnitude
                    squares[name, y.stride()] += torch.stack((error.square().sum(), square))
        for what, (ours, torchs) in squares.items():
            assert ours.sqrt() <= 1.1 * torchs.sqrt(), (m, n, what, float((ours / torchs).sqrt()))


def test_precision_is_obeyed(no_fallback):
    a, b = torch.randn(128, 512), torch.randn(512, 128)
    exact = a.double() @ b.double()
    scale = torch.linalg.vector_norm(exact)
    for precision, most in (("highest", 1e-6), ("high", 1e-4), ("medium", 1e-2)):
        torch.set_float32_matmul_precision(precision)
        error = torch.linalg.vector_norm(fastnn.mm(a, b).double() - exact) / scale
        assert error <= most, precision


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite(machine, dtype):
    x = torch.randn(5, 40, dtype=torch.float64).to(dtype)
    w = torch.eye(40, dtype=dtype)
    x[0, 0], x[1, 1], x[2, 2], x[3, 3] = float("inf"), float("-inf"), float("nan"), torch.finfo(dtype).max
    exact = x.double() @ w.double()
    result = fastnn.mm(x, w).double()
    torch.testing.assert_close(result, exact, equal_nan=True, rtol=1e-2, atol=1e-2)


def layouts(x):
    """The same numbers, laid out in every way."""
    *batch, rows, columns = x.shape
    yield x
    yield x.mT.contiguous().mT
    big = torch.full((*batch, 2 * rows, 3 * columns), float("nan"), dtype=x.dtype)
    big[..., ::2, ::3] = x
    yield big[..., ::2, ::3]
    flat = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype)
    flat[1:] = x.reshape(-1)
    yield flat[1:].view(x.shape)
    padded = torch.full((*batch, rows, columns + 5), float("nan"), dtype=x.dtype)
    padded[..., 2:-3] = x
    yield padded[..., 2:-3]


@pytest.mark.parametrize("dtype", FLOATS)
def test_layouts(machine, dtype, no_fallback):
    a, b = integers(13, 18, dtype=dtype, low=-2, high=3), integers(18, 7, dtype=dtype, low=-2, high=3)
    exact = a.double() @ b.double()
    for x, y in fewer(machine, itertools.product(layouts(a), layouts(b))):
        assert torch.equal(fastnn.mm(x, y).double(), exact)
        assert torch.equal(fF.linear(x, y.t()).double(), exact)
    for c in layouts(torch.zeros(13, 7, dtype=dtype)):
        fastnn.mm(a, b, out=c)
        assert torch.equal(c.double(), exact)
    row, column = a[:1].expand(13, 18), b[:, :1].expand(18, 7)
    assert torch.equal(fastnn.mm(row, column).double(), row.double() @ column.double())


def test_an_out_leaves_its_surroundings_alone(machine):
    around = torch.full((40, 40), 7.0)
    fastnn.mm(integers(17, 5), integers(5, 19), out=around[3:20, 4:23])
    around[3:20, 4:23] = 7
    assert (around == 7).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_batches(machine, dtype, no_fallback):
    cases = [
        ((2, 3, 5, 4), (2, 3, 4, 6)),
        ((2, 1, 5, 4), (3, 4, 6)),
        ((3, 5, 4), (4, 6)),
        ((5, 4), (3, 4, 6)),
        ((4,), (3, 4, 6)),
        ((2, 3, 5, 4), (4,)),
        ((0, 5, 4), (4, 6)),
        ((2, 5, 0), (0, 6)),
        ((2, 0, 4), (2, 4, 6)),
        ((1, 1, 1, 1, 2, 1, 3, 5, 4), (1, 1, 1, 1, 1, 2, 3, 4, 6)),
        ((2,) * 9 + (3, 4), (4, 2)),
    ]
    for s, t in cases:
        a, b = integers(*s, dtype=dtype, low=-2, high=3), integers(*t, dtype=dtype, low=-2, high=3)
        result = fastnn.matmul(a, b)
        exact = torch.matmul(a.double(), b.double())
        assert torch.equal(result.double(), exact), (s, t)
        assert result.stride() == torch.matmul(a, b).stride()
    a = integers(6, 2, 5, 4, dtype=dtype).permute(1, 0, 2, 3)
    b = integers(4, 6, dtype=dtype).expand(2, 6, 4, 6)
    assert torch.equal(fastnn.matmul(a, b).double(), a.double() @ b.double())


def test_addmm_reads_no_nan_where_beta_is_zero(machine):
    a, b = integers(5, 4), integers(4, 6)
    nan = torch.full((6,), float("nan"))
    assert torch.equal(fastnn.addmm(nan, a, b, beta=0, alpha=2), 2 * (a @ b))
    assert torch.equal(fastnn.addmm(nan, torch.ones(5, 0), torch.ones(0, 6), beta=0), torch.zeros(5, 6))
    c = integers(5, 6)
    expected = c * 3 + 2 * (a @ b)
    fastnn.addmm(c, a, b, beta=3, alpha=2, out=c)
    assert torch.equal(c, expected)


@pytest.mark.parametrize("a_dtype", [torch.int8, torch.uint8])
def test_int_mm(machine, a_dtype):
    for m, n, k in fewer(machine, [(5, 6, 0), *shapes(3, 20), (1, 1, 4000)]):
        low = 0 if a_dtype is torch.uint8 else -128
        a = torch.randint(low, low + 256, (m, k)).to(a_dtype)
        b = torch.randint(-128, 128, (k, n)).to(torch.int8)
        exact = reference.int_mm(a, b)
        result = fastnn.int_mm(a, b)
        assert result.dtype is torch.int32
        assert torch.equal(result.long(), exact), (m, n, k)
        assert torch.equal(fastnn.int_mm(a, b.t().contiguous().t()).long(), exact)
    rows, columns, bias = torch.rand(m), torch.rand(n), torch.randn(n)
    scaled = fastnn.int_mm(a, b, out_dtype=torch.float32, row_scale=rows, col_scale=columns, bias=bias)
    exact = reference.int_mm(a, b, rows, columns, bias)
    torch.testing.assert_close(scaled.double(), exact, rtol=1e-6, atol=1e-6 * exact.abs().max().item())
    a, b = a.expand(3, m, k), b
    assert torch.equal(fastnn.int_mm(a, b).long(), reference.int_mm(a, b))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_matmul(data):
    """Shapes, strides and dtypes at random: the numbers, shape, strides and dtype of torch."""
    dtype = data.draw(st.sampled_from(FLOATS))
    m, n, k = (data.draw(st.integers(0, 20)) for _ in range(3))
    batch = data.draw(st.lists(st.integers(0, 3), max_size=3))

    def operand(rows, columns):
        own = [1 if data.draw(st.booleans()) else size for size in batch]
        own = own[data.draw(st.integers(0, len(own))) :]
        x = integers(*own, rows, columns, dtype=dtype, low=-2, high=3)
        order = data.draw(st.permutations(range(x.dim())))
        back = [order.index(i) for i in range(x.dim())]
        x = x.permute(order).contiguous().permute(back)
        if data.draw(st.booleans()):
            x = torch.stack((x, x), dim=-1)[..., 0]
        return x

    a, b = operand(m, k), operand(k, n)
    result, expected = fastnn.matmul(a, b), torch.matmul(a, b)
    assert (result.shape, result.stride(), result.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert torch.equal(result.double(), torch.matmul(a.double(), b.double()))


def test_large_results_come_from_the_caching_allocator(no_fallback):
    x, w = torch.randn(2100, 16), torch.randn(1000, 16)
    fF.linear(x, w)
    before = _cpu.allocator_stats()
    result = fF.linear(x, w)
    after = _cpu.allocator_stats()
    assert after["hits"] + after["misses"] > before["hits"] + before["misses"]
    torch.testing.assert_close(result, torch.nn.functional.linear(x, w))
    y = result.view(2100, 10, 10, 10).contiguous(memory_format=torch.channels_last)
    z = fF.gelu(y)
    assert z.stride() == y.stride()
    torch.testing.assert_close(z, torch.nn.functional.gelu(y))
    fastnn.empty_cache()
