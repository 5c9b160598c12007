"""Pooling: torch's values, indices, strides and errors, in every layout, under every transform."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import fastnn
import fastnn.functional as fF
from fastnn import _state
from fastnn.backends import cpu
from fastnn.ops import pool as ops

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


def rounds_indices():
    """torch 2.8 and earlier give the index of an adaptive maximum of bfloat16 rounded to bfloat16."""
    x = torch.zeros(1, 1, 1, 300, dtype=torch.bfloat16)
    x[..., 257] = 1
    return F.adaptive_max_pool2d(x, 1, True)[1].item() != 257


ROUNDS_INDICES = rounds_indices()


@pytest.mark.parametrize("channels_last", [False, True])
@dtypes
def test_ties_nan_and_infinities(dtype, channels_last, no_fallback):
    """The first maximum's index wins, and the last NaN's."""
    specials = ((0.0, -0.0), (math.nan,), (math.inf, -math.inf), (-math.inf,))
    # The channels of the second shape fill several vectors at once, and part of one.
    for special, shape in itertools.product(specials, ((2, 16, 15, 22), (1, 131, 7, 9))):
        x = torch.randint(-1, 2, shape).to(dtype)
        places = torch.randint(x.numel(), (900,))
        x.view(-1)[places] = torch.tensor(special, dtype=dtype).repeat(900)[:900]
        if special == (-math.inf,):
            x.fill_(-math.inf)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        for call in (CALLS[name] for name in CALLS if "max" in name):
            theirs = both(call(F, x))
            if dtype is torch.bfloat16 and ROUNDS_INDICES:
                theirs = [t.to(own.dtype) for t, own in zip(both(call(F, x.float())), theirs, strict=True)]
            for a, b in zip(both(call(fF, x)), theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        leaf = x.requires_grad_()
        assert not both(CALLS["max 3x3"](fF, leaf))[0].isnan().logical_xor(F.max_pool2d(leaf, 3, 2, 1).isnan()).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name in CALLS if "max" in name])
def test_gradients_of_maxima_are_torchs_to_the_bit(name, dtype):
    for shape in ((2, 5, 13, 17), (2, 32, 9, 8), (1, 131, 9, 8)):
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


# ---- the short way -----------------------------------------------------------------------------------------------

SIZES = {1: (3, 5, 23), 2: (2, 5, 13, 11), 3: (2, 3, 7, 6, 9)}
FIXED = ((2, None, 0), (3, 2, 1), ((3,), (2,), 1), (5, 3, 2), (1, 1, 0))


def short_calls(dims):
    for windows in (*FIXED, ((3, 2, 2)[-dims:], (1, 2, 3)[-dims:], (1, 0, 1)[-dims:])):
        for rest in ((), (2,), (1, True)):  # dilation and ceil_mode
            yield f"max_pool{dims}d", (*windows, *rest)
        for rest in ((), (True,), (True, False), *([(False, True, 7)] if dims > 1 else [])):
            yield f"avg_pool{dims}d", (*windows, *rest)
    for size in (1, 3, (4,) * dims, *([(None, 3, 2)[-dims:], (2, None, None)[:dims]] if dims > 1 else [])):
        yield f"adaptive_max_pool{dims}d", (size,)
        yield f"adaptive_avg_pool{dims}d", (size,)


def short_inputs(dims, dtype):
    x = torch.randn(SIZES[dims]).to(dtype)
    yield x
    yield x.transpose(1, -1).contiguous().transpose(1, -1)
    yield x.movedim(1, -1).contiguous().movedim(-1, 1)  # channels-last
    yield x[:, :1].expand(SIZES[dims])
    yield x[:, :1]
    yield x.movedim(1, -1).contiguous().movedim(-1, 1)[:, 1:2]
    yield x[..., ::2]
    yield x[:1, ..., :7].clone()


@pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch before 2.10 has no table")
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_short_way_is_the_long_way(dims, dtype, no_fallback, monkeypatch):
    """The same bits, strides and gradients, to the second order."""
    taken = []

    def counted(*args):
        found = cpu.tensor_pool(*args)
        taken.append(found is not None)
        return found

    def run(name, arguments, x):
        with torch.no_grad():
            plain = getattr(fF, name)(x, *arguments)
        leaf = x.detach().requires_grad_()
        y = getattr(fF, name)(leaf, *arguments)
        grad = torch.linspace(-2, 2, y.numel()).to(dtype).view(y.shape).requires_grad_()
        (first,) = torch.autograd.grad(y, leaf, grad, retain_graph=True)
        (again,) = torch.autograd.grad(y, leaf, grad, create_graph=True)
        (second,) = torch.autograd.grad(again, grad, torch.ones_like(again))
        assert torch.equal(first, again)
        return plain, y.detach(), first, second

    for name, arguments in short_calls(dims):
        for x in short_inputs(dims, dtype):
            taken.clear()
            monkeypatch.setattr(ops, "tensor_pool", counted)
            monkeypatch.setattr(ops, "tensor_pool_backward", cpu.tensor_pool_backward)
            try:
                expected = getattr(F, name)(x, *arguments)
            except RuntimeError:  # windows that this input is too small for
                continue
            short = run(name, arguments, x)
            assert taken == [True, True], (name, arguments)
            monkeypatch.setattr(ops, "tensor_pool", lambda *_: None)
            monkeypatch.setattr(ops, "tensor_pool_backward", lambda *_: None)
            for a, b in zip(short, run(name, arguments, x), strict=True):
                assert torch.equal(a, b), (name, arguments)
                assert a.stride() == b.stride(), (name, arguments, x.stride())
            assert short[0].stride() == expected.stride(), (name, arguments, x.stride())


@pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch before 2.10 has no table")
def test_what_the_short_way_leaves_alone():
    def pool(x, *windows, kind=0, dims=2):
        return cpu.tensor_pool(cpu.empty_image, kind, dims, x, windows)

    x = torch.randn(2, 3, 8, 8)
    ordinary = (2, 2, 0, 1, False, True, None)
    assert pool(x, *ordinary) is not None
    assert pool(x, 2) is not None
    for bad in ([1.0], x.long(), x[:0], x[:, :0], x.to("meta"), x.to_sparse(), torch._neg_view(x), x[0, 0], None):
        assert pool(bad, *ordinary) is None
    for windows in (
        (),
        (2, 2),
        (None,),
        ([2, 2],),
        (0,),
        (-1,),
        ((2, 2, 2),),
        (9, 2, 0, 1, False, True, None),
        (2, 0, 0, 1, False, True, None),
        (2, 2, 2, 1, False, True, None),
        (2, 2, -1, 1, False, True, None),
        (2, 2, 0, 0, False, True, None),
        (2, 2, 0, 9, False, True, None),
        (2, 2, 0, 1, 1, True, None),
        (2, 2, 0, 1, False, 2, None),
        (2, 2, 0, 1, False, True, 0),
        (2.0, 2, 0, 1, False, True, None),
        (True, 2, 0, 1, False, True, None),
        (1 << 40, 2, 0, 1, False, True, None),
        (1 << 80, 2, 0, 1, False, True, None),
    ):
        for kind in (0, 1):
            assert pool(x, *windows, kind=kind) is None, windows
    assert pool(x, *ordinary, kind=2) is None
    for dims in (-1, 0, 1, 3, 4, "2"):
        assert pool(x, *ordinary, dims=dims) is None
    leaf = x.clone().requires_grad_()
    values, codes, last = pool(leaf, *ordinary)
    assert (codes.dtype, codes.shape, last, values.requires_grad) == (torch.uint8, values.shape, False, False)
    assert pool(leaf, *ordinary, kind=1)[1] is None
    wide = pool(torch.randn(1, 1, 40, 40, requires_grad=True), 20, 1, 0, 1, False, True, None)
    assert wide[1].dtype is torch.int32

    def backward(grad, codes, size=tuple(x.shape), last=False, windows=ordinary):
        return cpu.tensor_pool_backward(cpu.empty_image, 0, size, grad, codes, last, windows)

    with torch.no_grad():
        assert backward(values, codes) is not None
        for grad in (values.long(), values[:1], values[..., :3], torch._neg_view(values)):
            assert backward(grad, codes) is None
        for wrong in (None, codes.int(), codes[:1], codes.float()):
            assert backward(values, wrong) is None
        for size in ((2, 3, 8), (2, 3, 8, 12), (2, 3, 0, 8), (2, 4, 8, 8), [2, 3, 8, 8], "wxyz"):
            assert backward(values, codes, size) is None
    assert backward(values, codes) is None  # gradients are on
    with torch.autocast("cpu", torch.bfloat16):
        assert pool(x, *ordinary) is None
    with fastnn.strict():
        assert pool(x, *ordinary) is None
    with torch.autograd.forward_ad.dual_level():
        assert pool(x, *ordinary) is None
    torch.func.vmap(lambda y: y if pool(x, *ordinary) is None else pytest.fail("under vmap"))(x)
    # Large results, codes among them, come from the allocator.
    large = torch.randn(3, 64, 80, 80).contiguous(memory_format=torch.channels_last).requires_grad_()
    values, codes, last = pool(large, 2, 1, 0, 1, False, True, None)
    assert last and values.numel() * 4 > cpu.LARGE_BYTES and codes.numel() > cpu.LARGE_BYTES
    assert values.stride() == codes.stride() == F.max_pool2d(large, 2, 1).stride()
    assert torch.equal(values, F.max_pool2d(large.detach(), 2, 1))


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
    "padding of a wide window": (lambda f: f.max_pool2d(X, 2, 1, padding=2, dilation=3), "padding"),
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
@example("max_pool1d", [1, 3], [2, 1, 2, 3], torch.float32)
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
