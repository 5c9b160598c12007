"""Pooling: torch's values, indices, strides and errors, in every layout, under every transform."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastnn
import fastnn.functional as fF
from fastnn import _state

from .support import FLOATS, TORCH, assert_within

CALLS = {
    "max 2x2": lambda f, x: f.max_pool2d(x, 2),
    "max 3x3": lambda f, x: f.max_pool2d(x, 3, 2, 1),
    "max 3x3 dense": lambda f, x: f.max_pool2d(x, 3, 1, 1, return_indices=True),
    "max 5x2 dilated": lambda f, x: f.max_pool2d(x, (5, 2), (3, 1), (2, 1), (1, 2), True, True),
    "max 7x7 dense": lambda f, x: f.max_pool2d(x, 7, 1, 3),
    "adaptive max": lambda f, x: f.adaptive_max_pool2d(x, (3, 5), True),
    "global max": lambda f, x: f.adaptive_max_pool2d(x, 1, True),
    "avg 2x2": lambda f, x: f.avg_pool2d(x, 2),
    "avg 3x3": lambda f, x: f.avg_pool2d(x, 3, 2, 1, True, False),
    "avg 3x3 dense": lambda f, x: f.avg_pool2d(x, 3, 1, 1, divisor_override=-7),
    "adaptive avg": lambda f, x: f.adaptive_avg_pool2d(x, (None, 4)),
    "global avg": lambda f, x: f.adaptive_avg_pool2d(x, 1),
}
calls = pytest.mark.parametrize("name", CALLS)
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))


def both(result):
    return result if isinstance(result, tuple) else (result,)


def layouts(x):
    """The same numbers in memory that is NaN all around."""
    yield x
    yield x.contiguous(memory_format=torch.channels_last)
    spread = torch.full((*x.shape, 2), math.nan, dtype=x.dtype)
    spread[..., 1] = x
    yield spread[..., 1]
    wide = torch.full((x.shape[0], x.shape[1] + 2, x.shape[2] + 3, x.shape[3] + 5), math.nan, dtype=x.dtype)
    inner = wide[:, 1:-1, 1:-2, 2:-3]
    yield inner.copy_(x)
    last = torch.full((x.shape[0], x.shape[2], x.shape[3], x.shape[1] + 3), math.nan, dtype=x.dtype)
    inner = last[..., 1:-2].movedim(-1, 1)
    yield inner.copy_(x)
    yield x.transpose(0, 3).contiguous().transpose(0, 3)


def check(result, expected, x, exact):
    assert len(result) == len(expected)
    for a, b in zip(result, expected, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    if len(result) == 2:
        assert torch.equal(result[1], expected[1])
    assert_within(result[0], *exact)


@calls
@dtypes
def test_any_layout(name, dtype, no_fallback):
    call = CALLS[name]
    for shape in ((2, 5, 13, 17), (1, 33, 7, 8)):
        x = torch.randn(shape).to(dtype)
        exact = both(call(F, x.double()))[0], both(call(F, x.double().abs()))[0].abs(), 64
        for view in layouts(x):
            check(both(call(fF, view)), both(call(F, view)), x, exact)
            leaf = view.detach().requires_grad_()
            result, expected = both(call(fF, leaf)), both(call(F, leaf))
            check([t.detach() for t in result], [t.detach() for t in expected], x, exact)
            grad = torch.randn(result[0].shape).to(dtype)
            wide = view.detach().double().requires_grad_()
            for direction in (torch.ones((), dtype=dtype).expand(grad.shape), grad.mT.contiguous().mT):
                (found,) = torch.autograd.grad(result[0], leaf, direction, retain_graph=True)
                (truth,) = torch.autograd.grad(both(call(F, wide))[0], wide, direction.double())
                assert_within(found, truth, truth.abs() + direction.double().abs().max(), 64)


@calls
def test_no_batch_and_an_empty_batch(name, no_fallback):
    call = CALLS[name]
    x = torch.randn(5, 13, 17)
    for view in (x, x.movedim(0, -1).contiguous().movedim(-1, 0), torch.empty(0, 5, 13, 17)):
        for a, b in zip(both(call(fF, view)), both(call(F, view)), strict=True):
            assert a.stride() == b.stride()
            torch.testing.assert_close(a, b)
    empty = torch.empty(0, 5, 13, 17, requires_grad=True)
    both(call(fF, empty))[0].sum().backward()
    assert empty.grad.shape == empty.shape


@pytest.mark.parametrize("channels_last", [False, True])
@dtypes
def test_ties_nan_and_infinities(dtype, channels_last, no_fallback):
    """The first maximum's index wins, and the last NaN's."""
    for special in ((0.0, -0.0), (math.nan,), (math.inf, -math.inf), (-math.inf,)):
        x = torch.randint(-1, 2, (2, 16, 15, 22)).to(dtype)
        places = torch.randint(x.numel(), (900,))
        x.view(-1)[places] = torch.tensor(special, dtype=dtype).repeat(900)[:900]
        if special == (-math.inf,):
            x.fill_(-math.inf)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        for call in (CALLS[name] for name in CALLS if "max" in name):
            for a, b in zip(both(call(fF, x)), both(call(F, x)), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        leaf = x.requires_grad_()
        assert not both(CALLS["max 3x3"](fF, leaf))[0].isnan().logical_xor(F.max_pool2d(leaf, 3, 2, 1).isnan()).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name in CALLS if "max" in name])
def test_gradients_of_maxima_are_torchs_to_the_bit(name, dtype):
    for shape in ((2, 5, 13, 17), (2, 32, 9, 8)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
            ours, torchs = both(CALLS[name](fF, x))[0], both(CALLS[name](F, x))[0]
            grad = torch.randn_like(ours)
            assert torch.equal(torch.autograd.grad(ours, x, grad)[0], torch.autograd.grad(torchs, x, grad)[0])


@calls
@dtypes
def test_the_same_bits_for_any_number_of_threads(name, dtype):
    for shape, memory_format in itertools.product(
        ((3, 20, 61, 67), (1, 1, 301, 299)), (torch.contiguous_format, torch.channels_last)
    ):
        x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
        runs = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            result = both(CALLS[name](fF, x))[0]
            runs.append((result, torch.autograd.grad(result.sum(), x)[0]))
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@calls
def test_transforms(name, no_fallback):
    """vmap, grad of a sum under vmap, and jvp."""
    x = torch.randn(3, 2, 4, 9, 10)

    def ours(x):
        return both(CALLS[name](fF, x))[0]

    def torchs(x):
        return both(CALLS[name](F, x))[0]

    for dim in (0, 1, 2):
        torch.testing.assert_close(torch.vmap(ours, dim)(x), torch.vmap(torchs, dim)(x))
    gradients = [torch.func.vmap(torch.func.grad(lambda y, f=f: f(y).square().sum()))(x) for f in (ours, torchs)]
    torch.testing.assert_close(*gradients)
    tangents = [torch.func.jvp(f, (x[0],), (x[1],))[1] for f in (ours, torchs)]
    torch.testing.assert_close(*tangents)
    if "indices" in name or isinstance(CALLS[name](fF, x[0]), tuple):
        found = [torch.vmap(lambda y, m=m: CALLS[name](m, y))(x)[1] for m in (fF, F)]
        assert torch.equal(*found)


def network(f):
    def run(x):
        y, indices = f.max_pool2d(x, 3, 2, 1, return_indices=True)
        z = f.avg_pool2d(f.max_pool2d(y, 2), 3, 1, 1)
        return f.adaptive_avg_pool2d(z, (3, 2)).sum() + f.adaptive_max_pool2d(z, 1).sum(), indices

    return run


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_compile(dynamic, channels_last, no_fallback):
    torch._dynamo.reset()
    compiled = torch.compile(network(fF), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (2, 3) if dynamic else (2,):
        x = torch.randn(n, 4, 21 + n, 30)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        (result, indices), (expected, their_indices) = compiled(x), network(F)(x)
        torch.testing.assert_close(result, expected)
        assert torch.equal(indices, their_indices)
        assert indices.stride() == their_indices.stride()
        torch.testing.assert_close(torch.autograd.grad(result, x)[0], torch.autograd.grad(expected, x)[0])


@pytest.mark.skipif(TORCH < (2, 7), reason="Dim.AUTO with strict=False")
def test_export_and_meta(no_fallback):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.MaxPool2d(2), torch.nn.AdaptiveAvgPool2d(1))
    fastnn.convert(model)
    rows = torch.export.Dim("rows", min=2)
    x = torch.randn(3, 3, 8, 8)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    assert "fastnn.max_pool" in str(program.graph)
    torch.testing.assert_close(program.module()(torch.cat((x, x))), model(torch.cat((x, x))))
    for name, call in CALLS.items():
        for a, b in zip(
            both(call(fF, torch.empty(2, 3, 9, 9, device="meta"))), both(call(F, torch.empty(2, 3, 9, 9))), strict=True
        ):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), name


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kind", ["max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool"])
def test_autocast(kind, dims, no_fallback):
    x = torch.randn(2, 3, *(4,) * dims)
    with torch.autocast("cpu", torch.bfloat16):
        for value in (x, x.bfloat16(), x.half()):
            assert getattr(fF, f"{kind}{dims}d")(value, 2).dtype is getattr(F, f"{kind}{dims}d")(value, 2).dtype


def test_reference_backend():
    x = torch.randn(2, 3, 9, 10, requires_grad=True)
    for name, call in CALLS.items():
        with fastnn.backend("reference"):
            ours = both(call(fF, x))
            gradient = torch.autograd.grad(ours[0].sum(), x)
        for a, b in zip(ours, both(call(F, x)), strict=True):
            torch.testing.assert_close(a, b, msg=name)
        torch.testing.assert_close(gradient, torch.autograd.grad(both(call(F, x))[0].sum(), x))


def test_codes_that_no_pool_made():
    """They are an argument of an op that anybody may call: nonsense in, nonsense out, and no other memory touched."""
    for codes in (torch.full((2, 3, 3, 2), 255).to(torch.uint8), torch.full((2, 3, 3, 2), -5).to(torch.int32)):
        for kernel, stride, padding in (((2, 2), (2, 2), (0, 0)), ((3, 3), (2, 2), (1, 1)), ((2, 4), (2, 3), (0, 2))):
            windows = (kernel, stride, padding, (1, 1))
            torch.ops.fastnn.max_pool_backward(torch.ones(2, 3, 3, 2), codes, *windows, (2, 3, 6, 4), 2, False)
            torch.ops.fastnn.max_pool_gather(torch.ones(2, 3, 6, 4), codes, *windows, 2, False)
            torch.ops.fastnn.max_pool_indices(codes, *windows, (6, 4), False)


X = torch.randn(2, 3, 8, 8)
BAD = {
    "kernel larger than the input": (lambda f: f.max_pool2d(X, 9), "kernel_size"),
    "padding": (lambda f: f.max_pool2d(X, 2, padding=2), "padding"),
    "negative padding": (lambda f: f.avg_pool2d(X, 2, padding=-1), "padding"),
    "stride": (lambda f: f.max_pool2d(X, 2, stride=0), "stride"),
    "kernel": (lambda f: f.avg_pool2d(X, 0), "kernel_size"),
    "dilation": (lambda f: f.max_pool2d(X, 2, dilation=0), "dilation"),
    "rank": (lambda f: f.max_pool2d(X[0, 0], 2), "input"),
    "channels": (lambda f: f.max_pool2d(X[:, :0], 2), "input"),
    "numbers": (lambda f: f.max_pool2d(X, (2, 2, 2)), "kernel_size"),
    "fraction": (lambda f: f.avg_pool2d(X, 2.5), "kernel_size"),
    "ceil_mode": (lambda f: f.avg_pool2d(X, 2, ceil_mode=1), "ceil_mode"),
    "count_include_pad": (lambda f: f.avg_pool2d(X, 2, count_include_pad=2), "count_include_pad"),
    "divisor": (lambda f: f.avg_pool2d(X, 2, divisor_override=0), "divisor_override"),
    "output size": (lambda f: f.adaptive_avg_pool2d(X, (-1, 2)), "output_size"),
    "output sizes": (lambda f: f.adaptive_max_pool2d(X, (1, 2, 3)), "output_size"),
    "list": (lambda f: f.max_pool2d([1.0], 2), "input"),
    "volume": (lambda f: f.max_pool3d(X, 9), "kernel_size"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    call, named = BAD[name]
    with pytest.raises(Exception) as expected:
        call(F)
    with pytest.raises(type(expected.value), match=named) as found:
        call(fF)
    assert "fastnn." in str(found.value)


def test_what_torch_takes_goes_to_torch_and_is_counted():
    for call in (
        lambda f: f.max_pool2d(X.long(), 2),
        lambda f: f.adaptive_avg_pool2d(X, (0, 2)),
        lambda f: f.adaptive_avg_pool2d(X[:, :0], 2),
    ):
        _state.reset_fallbacks()
        torch.testing.assert_close(call(fF), call(F))
        assert len(_state.fallbacks()) == 1
    _state.reset_fallbacks()


numbers = st.one_of(st.integers(-1, 5), st.integers(1, 3), st.tuples(st.integers(0, 4), st.integers(0, 4)))
things = st.one_of(numbers, numbers, numbers, st.sampled_from((None, "x", 2.5, True, [2], (2, 3, 1), ())))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool2d", "adaptive_max_pool2d")),
    shape=st.lists(st.integers(0, 6), max_size=5),
    arguments=st.lists(things, min_size=1, max_size=4),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.int64, torch.bool)),
)
def test_anything(name, shape, arguments, dtype):
    """Whatever the arguments: torch's result, or torch's exception type."""
    x = torch.randint(0, 2, shape).to(dtype)
    if "adaptive" in name:
        arguments = arguments[:1]
    try:
        expected = both(getattr(F, name)(x, *arguments))
    except Exception as error:
        with pytest.raises(type(error)):
            getattr(fF, name)(x, *arguments)
        return
    for a, b in zip(both(getattr(fF, name)(x, *arguments)), expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, equal_nan=True, check_stride=True)
