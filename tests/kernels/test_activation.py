"""The elementwise kernels: every dtype, layout, length and instruction set, against float64."""

from __future__ import annotations

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastnn import _cpu

from .calls import (
    FLOATS,
    KIND,
    SAVES_OUTPUT,
    TORCH,
    activation,
    activation_backward,
    error_in_ulp,
    exact,
    exact_gradient,
)

LENGTHS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 255, 256, 257, 1000]
#: In units in the last place of the result: half a unit for the one rounding, and what the function adds.
BOUND = {torch.float32: 0.51, torch.float64: 4.0, torch.bfloat16: 0.502, torch.float16: 0.52}

kinds = pytest.mark.parametrize("kind", KIND)
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))


def bound(kind: str, dtype: torch.dtype) -> float:
    if dtype == torch.float32 and kind in ("silu", "sigmoid"):
        return 2.5
    if dtype == torch.float64 and kind.startswith("gelu"):
        return 300.0  # of the left tail: the reference rounds its argument too. test_math.py knows better.
    return BOUND[dtype]


def poisoned(x: torch.Tensor) -> torch.Tensor:
    """x in the middle of memory that is full of NaN."""
    base = torch.full((x.numel() + 64,), math.nan, dtype=x.dtype)
    base[32 : 32 + x.numel()] = x
    return base[32 : 32 + x.numel()]


@kinds
@dtypes
def test_values(isa, kind, dtype):
    x = torch.cat([torch.randn(3000) * 3, torch.linspace(-6, 6, 1001)]).to(dtype)
    assert error_in_ulp(activation(kind, x), exact(kind, x)) <= bound(kind, dtype)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_less_accurate_than_torch(isa, kind, dtype):
    x = torch.linspace(-5, 5, 20001).to(dtype)
    reference = exact(kind, x)
    ours = (activation(kind, x).double() - reference).abs().max()
    torchs = (TORCH[kind](x).double() - reference).abs().max()
    assert ours <= torchs * 1.01


@kinds
@dtypes
def test_gradient(isa, kind, dtype):
    x = (torch.randn(4000) * 3).to(dtype)
    grad = torch.randn(4000).to(dtype)
    saved = TORCH[kind](x) if kind in SAVES_OUTPUT else x
    got = activation_backward(kind, grad, saved)
    want = exact_gradient(kind, grad, saved)
    eps = torch.finfo(dtype).eps
    # Half a unit of the result, and of the terms that cancel in it.
    allowed = (
        eps * 0.51 * want.abs()
        + (16 * eps if dtype == torch.float64 else 3e-7 if dtype == torch.float32 else 2e-6) * grad.double().abs()
    )
    assert bool(((got.double() - want).abs() <= allowed + torch.finfo(dtype).tiny).all())


@pytest.mark.parametrize("n", LENGTHS)
@dtypes
def test_lengths(isa, n, dtype):
    """The right number of elements, the same value wherever an element lies, nothing beside them touched."""
    all_x = torch.randn(LENGTHS[-1]).to(dtype)
    for kind in ("relu", "relu6", "gelu", "tanh"):
        everything = activation(kind, all_x)
        x, out = poisoned(all_x[:n]), poisoned(torch.zeros(n, dtype=dtype))
        activation(kind, x, out)
        assert torch.equal(out, everything[:n])
        guard = out._base if out._base is not None else out
        assert bool(guard[:32].isnan().all()) and bool(guard[32 + n :].isnan().all())
    for kind in ("relu", "relu6", "silu", "sigmoid"):
        grad = torch.randn(LENGTHS[-1]).to(dtype)
        everything = activation_backward(kind, grad, all_x)
        out = poisoned(torch.zeros(n, dtype=dtype))
        activation_backward(kind, poisoned(grad[:n]), poisoned(all_x[:n]), out)
        assert torch.equal(out, everything[:n])
        assert bool(out._base[:32].isnan().all()) and bool(out._base[32 + n :].isnan().all())


def layouts(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    r = torch.randn(6, 10, 14, 18, generator=g).to(dtype)
    return {
        "contiguous": r,
        "transposed": r.transpose(1, 3),
        "channels_last": r.contiguous(memory_format=torch.channels_last),
        "steps": r[::2, 1:, ::3, 1::2],
        "inner step": r[..., ::2],
        "rows apart": r[:, :, :, 3:11],
        "expanded": r[:, :1, :, :].expand(6, 5, 14, 18),
        "expanded inner": r[..., :1].expand(6, 10, 14, 300),
        "permuted": r.permute(2, 0, 3, 1),
        "scalar": r[1, 2, 3, 4],
        "one element": r[:1, :1, :1, :1],
        "empty": r[:, 3:3],
        "1-d step": r.flatten()[5:2000:7],
        "9-d": r.flatten()[:1536].view(2, 2, 2, 2, 2, 2, 2, 2, 6).permute(8, 0, 7, 1, 6, 2, 5, 3, 4),
    }


@dtypes
@pytest.mark.parametrize("layout", layouts(torch.float32))
def test_layouts(isa, layout, dtype):
    x = layouts(dtype)[layout]
    want = activation("gelu", x.contiguous())
    assert torch.equal(activation("gelu", x), want)
    assert torch.equal(activation("gelu", x, torch.empty(x.shape, dtype=dtype)), want)
    base = torch.full((*x.shape, 3), math.nan, dtype=dtype)  # an output whose elements lie apart
    assert torch.equal(activation("gelu", x, base[..., 1]), want)
    assert bool(base[..., 0].isnan().all()) and bool(base[..., 2].isnan().all())
    grad = torch.randn(x.shape).to(dtype)
    gradient = activation_backward("silu", grad, x.contiguous())
    assert torch.equal(activation_backward("silu", grad, x), gradient)
    ones = torch.ones((), dtype=dtype).expand(x.shape)
    assert torch.equal(
        activation_backward("silu", ones, x, torch.empty(x.shape, dtype=dtype)),
        activation_backward("silu", ones.contiguous(), x.contiguous()),
    )


@st.composite
def views(draw):
    """A strided view of at most four dimensions, with offsets, steps and permutations."""
    sizes = draw(st.lists(st.integers(0, 9), min_size=0, max_size=4))
    base = torch.arange(math.prod(s * 3 + 3 for s in sizes), dtype=torch.float32).sin() * 3
    x = base.view([s * 3 + 3 for s in sizes])
    for d, size in enumerate(sizes):
        start, step = draw(st.integers(0, 3)), draw(st.integers(1, 3))
        x = x.narrow(d, start, size * step).unfold(d, step, step).select(-1, 0) if size else x.narrow(d, 0, 0)
    if sizes:
        x = x.permute(draw(st.permutations(range(len(sizes)))))
    if draw(st.booleans()):
        x = x.unsqueeze(0).expand(draw(st.integers(1, 3)), *x.shape)
    return x


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(views(), st.sampled_from(sorted(KIND)))
def test_any_view(x, kind):
    want = activation(kind, x.contiguous())
    assert torch.equal(activation(kind, x, torch.empty(x.shape)), want)
    strided = torch.zeros(*x.shape, 2)[..., 0] if x.dim() else torch.zeros(2)[0]
    assert torch.equal(activation(kind, x, strided), want)


@kinds
@dtypes
def test_in_place(isa, kind, dtype):
    for x in (torch.randn(1001).to(dtype), torch.randn(30, 40).to(dtype).t()[1:], torch.randn(300, 5).to(dtype)[:, 2]):
        want = activation(kind, x.contiguous())
        assert torch.equal(activation(kind, x, x), want)
    grad, saved = torch.randn(500).to(dtype), torch.randn(500).to(dtype)
    want = activation_backward(kind, grad, saved)
    assert torch.equal(activation_backward(kind, grad.clone(), saved, saved.clone()), want)
    onto_grad = grad.clone()
    assert torch.equal(activation_backward(kind, onto_grad, saved, onto_grad), want)
    onto_saved = saved.clone()
    assert torch.equal(activation_backward(kind, grad, onto_saved, onto_saved), want)


@dtypes
def test_nan_and_infinity(isa, dtype):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0] * 9, dtype=dtype)
    for kind in KIND:
        got = activation(kind, x)
        high = {"relu6": 6.0, "sigmoid": 1.0, "tanh": 1.0}.get(kind, math.inf)  # of infinity
        low = {"relu": 0.0, "relu6": 0.0, "sigmoid": 0.0, "tanh": -1.0}.get(kind, math.nan)  # of -infinity
        want = torch.tensor([math.nan, high, low], dtype=dtype)
        assert torch.equal(got[:3].isnan(), want.isnan()), kind
        assert torch.equal(got[:3].nan_to_num(nan=7), want.nan_to_num(nan=7)), kind
        assert float(got[3]) == (0.5 if kind == "sigmoid" else 0.0)
    grad = torch.ones_like(x)
    # Where relu's output is NaN the gradient passes, as in torch.
    assert activation_backward("relu", grad, activation("relu", x))[:5].tolist() == [1, 1, 0, 0, 0]
    assert activation_backward("relu6", grad, activation("relu6", x))[:5].tolist() == [1, 0, 0, 0, 0]


@dtypes
def test_the_corners_of_relu6(isa, dtype):
    """Nothing of the gradient passes at 0 and at 6, all of it next to them on the inside."""
    x = torch.tensor([0.0, 6.0, 6.5, -1.0, 3.0] * 9, dtype=dtype)
    x = torch.cat((x, torch.nextafter(x, torch.full_like(x, 3.0))))
    grad = torch.arange(1, 91).to(dtype)
    found = activation_backward("relu6", grad, activation("relu6", x))
    leaf = x.clone().requires_grad_()
    assert torch.equal(found, torch.autograd.grad(F.relu6(leaf), leaf, grad)[0])
    assert torch.equal(found != 0, torch.tensor([0, 0, 0, 0, 1] * 9 + [1, 1, 0, 0, 1] * 9).bool())


@pytest.mark.parametrize("dtype", [dtype for dtype in FLOATS if dtype.itemsize == 2])
def test_every_16_bit_value_is_rounded_once(isa, dtype):
    """All 65,536 inputs: within a 50th of a unit of correctly rounded, overflow and subnormals included. Every float32 is in
    test_math.py."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    x = x[x.isfinite()]
    for kind in KIND:
        assert error_in_ulp(activation(kind, x), exact(kind, x).nan_to_num(nan=0.0)) <= BOUND[dtype], kind


@pytest.mark.parametrize("offset", [0, 1, 5])
def test_large(offset):
    """Above the caches the result is written around them; also to addresses that are not aligned."""
    n = 9_500_003
    x = torch.randn(n + offset)[offset:]
    out = torch.full((n + 8,), math.nan)[offset : offset + n]
    activation("relu", x, out)
    assert torch.equal(out, torch.relu(x))
    grad = torch.randn(n)
    assert torch.equal(activation_backward("relu", grad, x, out), torch.where(x <= 0, 0.0, grad))


def test_one_and_two_threads_give_the_same_bits(isa):
    x = torch.randn(701, 1009)
    before = torch.get_num_threads()
    try:
        for kind in KIND:
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(activation(kind, x))
                results.append(activation(kind, x.t()).t())
            assert all(torch.equal(r, results[0]) for r in results[1:])
    finally:
        torch.set_num_threads(before)


def test_sixteen_threads_at_once():
    x = torch.randn(200_000)
    want = activation("gelu", x)
    results: list[bool] = []

    def work():
        results.extend(torch.equal(activation("gelu", x), want) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 80 and all(results)


def test_dense(isa):
    x = torch.randn(1003)
    for kind, code in KIND.items():
        out = torch.empty_like(x)
        _cpu.activation_dense(code, x.data_ptr(), out.data_ptr(), x.numel(), 0)
        assert torch.equal(out, activation(kind, x))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 8, 8, (1,), (1,), (1,), 0), "kind"),
        ((8, 8, 8, (1,), (1,), (1,), 0), "kind"),
        ((1, 8, 8, (1,), (1,), (1,), 4), "dtype"),
        ((1, 8, 8, (1,), (1,), (1,), -1), "dtype"),
        ((1, 0, 8, (1,), (1,), (1,), 0), "x"),
        ((1, 8, 0, (1,), (1,), (1,), 0), "out"),
        ((1, 8, 8, (1, 2), (1,), (1,), 0), "strides"),
        ((1, 8, 8, (-1,), (1,), (1,), 0), "shape"),
        ((1, 8, 8, [1], (1,), (1,), 0), "shape"),
        ((1, 8, 8, (1,) * 65, (1,) * 65, (1,) * 65, 0), "shape"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        _cpu.activation(*arguments)
