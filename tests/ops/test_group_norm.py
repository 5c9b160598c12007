"""Group norm and instance norm: accuracy, layouts, running statistics, derivatives, tracing, threads."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jvp, vmap
from torch.library import opcheck

import fastnn
import fastnn.functional as fF
from fastnn.backends import cpu
from fastnn.ops import group_norm as ops

from .support import FLOATS

HAS_TABLE = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
EPS = {torch.float32: 4e-6, torch.float64: 4e-14, torch.bfloat16: 8e-2, torch.float16: 8e-3}


def with_gradients(f, x, groups, weight, bias, direction, dtype=None):
    leaves = [t.detach() if dtype is None else t.detach().to(dtype) for t in (x, weight, bias)]
    leaves = [t.requires_grad_() for t in leaves]
    if groups is None:
        y = f.instance_norm(leaves[0], weight=leaves[1], bias=leaves[2])
    else:
        y = f.group_norm(leaves[0], groups, leaves[1], leaves[2])
    return y, *torch.autograd.grad(y, leaves, direction.to(y.dtype))


def assert_close(found, exact, rtol):
    for ours, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=rtol, atol=rtol * max(wanted.abs().max().item(), 1))


SHAPES = [((2, 6, 7), 3), ((3, 4, 5, 9), 2), ((1, 64, 13, 17), 4), ((2, 66, 3, 3), 66), ((5, 12), 3), ((1, 8, 4100), 1)]
FEW = [((2, 6, 7), 3), ((3, 4, 5, 9), 2), ((1, 66, 9, 8), 3), ((5, 12), 3), ((1, 2, 4100), 1)]


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_against_float64(last, dtype, machine, no_fallback):
    for shape, groups in FEW if machine == "triton" else SHAPES:  # many programs are slow in the interpreter
        if last and len(shape) != 4:
            continue
        x, direction = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        if last:
            x = x.to(memory_format=torch.channels_last)
        weight, bias = torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype)
        for of in (groups, None) if len(shape) > 2 else (groups,):
            found = with_gradients(fF, x, of, weight, bias, direction)
            exact = with_gradients(F, x, of, weight, bias, direction, torch.float64)
            assert_close(found, exact, EPS[dtype])


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_a_mean_far_from_zero(last, machine, no_fallback):
    x = torch.randn(2, 12, 19, 23) + 1e4
    x[:, ::3] += 3
    x = x.to(memory_format=torch.channels_last) if last else x
    weight, bias, direction = torch.randn(12), torch.randn(12), torch.randn(x.shape)
    for groups in (3, 12):
        found = with_gradients(fF, x, groups, weight, bias, direction)
        exact = with_gradients(F, x, groups, weight, bias, direction, torch.float64)
        assert_close(found, exact, 4e-6)


def test_squares_beyond_float32(machine, no_fallback):
    for size in (1e25, 1e37):
        for shape in ((2, 6, 7, 5), (2, 6)):
            x = torch.randn(shape) * size
            for one in (x, x.to(memory_format=torch.channels_last) if len(shape) == 4 else x):
                y, exact = fF.group_norm(one, 2), F.group_norm(one.double(), 2)
                torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


def layouts():
    r = torch.randn
    yield r(2, 6, 4, 5)
    yield r(2, 6, 4, 5).to(memory_format=torch.channels_last)
    yield r(2, 6, 3, 5, 2).to(memory_format=torch.channels_last_3d)
    yield r(2, 6, 4, 5)[..., ::2]
    yield r(2, 4, 5, 6).permute(0, 3, 2, 1)
    yield r(6, 2, 4, 5).transpose(0, 1)
    yield r(2, 4, 6).transpose(1, 2)
    yield r(1, 6, 4, 5).expand(3, 6, 4, 5)
    yield r(4, 1, 5).expand(4, 6, 5)
    yield r(2, 4, 6, 6).permute(0, 3, 1, 2)[:, :, :, ::2]
    yield r(2, 12, 4, 3)[:, ::2]
    yield r(4, 5, 6, 2).permute(1, 2, 0, 3)
    yield r(2, 6, 3, 2, 2, 2)
    yield torch._neg_view(r(2, 6, 4))


def test_strides_are_torchs(machine, no_fallback):
    for x in layouts():
        weight, bias = torch.randn(12)[::2], torch.randn(6)
        directions = torch.randn(x.shape), torch.randn(()).expand(x.shape)
        # Each with the other in turn for Triton's interpreter, which is slow.
        each = zip((2, None), directions, strict=True) if machine == "triton" else product((2, 6, 1, None), directions)
        for groups, direction in each:
            found = with_gradients(fF, x, groups, weight, bias, direction)
            torchs = with_gradients(F, x, groups, weight.contiguous(), bias, direction)
            exact = with_gradients(F, x, groups, weight, bias, direction, torch.float64)
            assert found[0].stride() == torchs[0].stride(), (x.shape, x.stride(), groups)
            assert_close(found, exact, 4e-5)
        meta = fF.group_norm(x.to("meta"), 2)
        assert (meta.shape, meta.is_meta) == (x.shape, True)


@pytest.mark.parametrize("shape", [(1, 6), (2, 6), (3, 1, 1), (2, 6, 1, 1)])
def test_strides_of_planes_of_one(shape):
    x = torch.randn(shape)
    if x.numel() > 1:
        ours, torchs = fF.group_norm(x, 1), F.group_norm(x, 1)
        assert ours.stride() == torchs.stride()
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters_with_16_bit_input(dtype, machine, no_fallback):
    x, direction = torch.randn(3, 6, 40).to(dtype), torch.randn(3, 6, 40).to(dtype)
    weight, bias = torch.randn(6), torch.randn(6)
    for groups in (2, None):
        found = with_gradients(fF, x, groups, weight, bias, direction)
        torchs = with_gradients(F, x, groups, weight, bias, direction)
        assert [t.dtype for t in found] == [t.dtype for t in torchs]
        assert_close(found, with_gradients(F, x, groups, weight, bias, direction, torch.float64), EPS[dtype] / 2)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0])
@pytest.mark.parametrize("use_input_stats", [True, False])
def test_running_statistics(use_input_stats, momentum, dtype, machine, no_fallback):
    x = (torch.randn(4, 5, 7, 3) * 3 + 2).to(dtype)
    ours = torch.randn(5).to(dtype), (torch.rand(5) + 0.5).to(dtype)
    wide = [t.double() for t in ours]
    y = fF.instance_norm(x, *ours, use_input_stats=use_input_stats, momentum=momentum)
    exact = F.instance_norm(x.double(), *wide, use_input_stats=use_input_stats, momentum=momentum)
    rtol = 8 * torch.finfo(dtype).eps
    for mine, wanted in ((y, exact), *zip(ours, wide, strict=True)):
        torch.testing.assert_close(mine.double(), wanted, rtol=rtol, atol=4 * rtol)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", [(1, 32, 61, 67), (5, 16, 40, 40), (40, 64, 3, 3)])
def test_any_number_of_threads_or_images_gives_the_same_bits(shape, last):
    x, direction = torch.randn(shape), torch.randn(shape)
    if last:
        x = x.to(memory_format=torch.channels_last)
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append(with_gradients(fF, x, 8, weight, bias, direction))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    first = with_gradients(fF, x[:1], 8, weight, bias, direction[:1])
    assert all(torch.equal(a[:1], b) for a, b in zip(found[0][:2], first[:2], strict=True))


BAD = [
    ((torch.randn(2, 7, 3), 2), {}),
    ((torch.randn(2, 6, 3), 0), {}),
    ((torch.randn(2, 6, 3), 2.0), {}),
    ((torch.randn(6), 2), {}),
    ((torch.randn(1, 6), 6), {}),
    ((torch.randn(2, 6, 3), 2), {"weight": torch.ones(5)}),
    ((torch.randn(2, 6, 3), 2), {"weight": torch.ones(6, dtype=torch.float64)}),
    ((torch.randint(0, 3, (2, 6, 3)), 2), {}),
    (("x", 2), {}),
]


@pytest.mark.parametrize("index", range(len(BAD)))
def test_bad_input(index):
    args, kwargs = BAD[index]
    with pytest.raises(Exception) as theirs:
        F.group_norm(*args, **kwargs)
    with pytest.raises(type(theirs.value)) as ours:
        fF.group_norm(*args, **kwargs)
    assert type(ours.value) is type(theirs.value)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"input": torch.randn(2, 6, 1)},
        {"input": torch.randn(2, 6, 3), "use_input_stats": False},
        {"input": torch.randn(2, 6, 3), "weight": torch.ones(5)},
        {"input": torch.randn(2, 6, 3), "running_mean": torch.ones(5), "running_var": torch.ones(5)},
        {"input": torch.randn(6)},
    ],
)
def test_bad_input_of_instance_norm(kwargs):
    with pytest.raises(Exception) as theirs:
        F.instance_norm(**kwargs)
    with pytest.raises(type(theirs.value)) as ours:
        fF.instance_norm(**kwargs)
    assert type(ours.value) is type(theirs.value)
    assert "fastnn.instance_norm: " in str(ours.value)


def test_derivatives(no_fallback):
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4, 3), (4,), (4,)))
    for f in (
        lambda x, w, b: fF.group_norm(x, 2, w, b, 1e-3),
        lambda x, w, b: fF.instance_norm(x, weight=w, bias=b, eps=1e-3),
    ):
        assert torch.autograd.gradcheck(f, (x, weight, bias), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, (x, weight, bias), check_fwd_over_rev=True)
    assert torch.autograd.gradgradcheck(lambda x: fF.group_norm(x, 2), (x,))


def test_transforms(no_fallback):
    x, weight, bias = torch.randn(4, 2, 6, 5), torch.randn(4, 6), torch.randn(4, 6)
    for in_dims, args in (
        ((0, None, None), (x, weight[0], bias[0])),
        ((0, 0, 0), (x, weight, bias)),
        ((None, 0, None), (x[0], weight, bias[0])),
        ((1, None, None), (x, weight[0], bias[0])),
    ):
        found, wanted = (vmap(lambda *a, f=f: f.group_norm(a[0], 3, *a[1:]), in_dims)(*args) for f in (fF, F))
        torch.testing.assert_close(found, wanted)

    def loss(f):
        return lambda w, b, x: f.group_norm(x, 3, w, b).square().cumsum(1).sum()

    per_sample = (vmap(grad(loss(f), (0, 1, 2)), (None, None, 0))(weight[0], bias[0], x) for f in (fF, F))
    for ours, torchs in zip(*per_sample, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)
    tangents = torch.randn(6), torch.randn(6), torch.randn(4, 2, 6, 5)[0]
    for ours, torchs in zip(*(jvp(loss(f), (weight[0], bias[0], x[0]), tangents) for f in (fF, F)), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


def test_torch_library_and_compile(no_fallback):
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((3, 4, 5), (4,), (4,)))
    opcheck(torch.ops.fastnn.group_norm.default, (x, 2, weight, bias, 1e-5))
    mean, var = torch.randn(3, 2, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64)
    direction = torch.randn(3, 4, 5, requires_grad=True)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    args = (direction, x, 2, weight, mean, var, 1e-5)
    opcheck(torch.ops.fastnn.group_norm_backward.default, args, test_utils=tests)
    running = torch.zeros(4), torch.ones(4)

    def run(f):
        def call(x, w, b, mean, var):
            return f.group_norm(x, 2, w, b).sigmoid() + f.instance_norm(x, mean, var, w, b)

        return call

    results = []
    for f in (torch.compile(run(fF), backend="aot_eager", fullgraph=True), run(F)):
        held = [t.clone() for t in running]
        y = f(x, weight, bias, *held)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight, bias)), *held))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 6, 3), (2, 6, 0)])
def test_no_elements(shape, no_fallback):
    x, weight = torch.empty(shape, requires_grad=True), torch.ones(6, requires_grad=True)
    y, torchs = fF.group_norm(x, 2, weight), F.group_norm(x, 2, weight)
    assert (y.shape, y.stride(), y.requires_grad) == (torchs.shape, torchs.stride(), True)


def test_patch_and_convert():
    x = torch.randn(2, 6, 5, 4)
    layers = torch.nn.GroupNorm(3, 6), torch.nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
    model = torch.nn.Sequential(*layers, torch.nn.InstanceNorm2d(6))
    expected = model(x)
    state = [t.clone() for t in model.state_dict().values()]
    model[1].reset_running_stats()
    with fastnn.patch():
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(torch.group_norm(x, 3), F.group_norm(x, 3))
    model[1].reset_running_stats()
    fastnn.convert(model, strict=True)
    kinds = [fastnn.nn.GroupNorm, fastnn.nn.InstanceNorm2d, fastnn.nn.InstanceNorm2d]
    assert [type(m) for m in model] == kinds
    torch.testing.assert_close(model(x), expected)
    for ours, wanted in zip(model.state_dict().values(), state, strict=True):
        torch.testing.assert_close(ours, wanted)
    model.eval()
    ours = model(x)
    torch.testing.assert_close(ours, fastnn.revert(model)(x))


def both_ways(monkeypatch, function, leaves, direction):
    """Result and gradients by the short way and by the long one; whether each took the ways that it should."""
    found = []
    for way in ("short", "long"):
        with monkeypatch.context() as patched:
            if way == "long":
                patched.setattr(ops, "_tensor_group_norm", lambda *_: None)
                patched.setattr(ops, "_tensor_group_norm_backward", lambda *_: None)
            y = function()
            found.append((y, *torch.autograd.grad(y, leaves, direction)))
    return found


@pytest.mark.skipif(not HAS_TABLE, reason="torch before 2.10 has no table")
def test_the_short_way_gives_what_the_long_one_gives(monkeypatch, no_fallback):
    for dtype in FLOATS:
        for x in layouts():
            x = x.to(dtype).requires_grad_()
            half = dtype in (torch.bfloat16, torch.float16)
            for given in (dtype, torch.float32) if half else (dtype,):
                weight, bias = (
                    torch.randn(12).to(given)[::2].requires_grad_(),
                    torch.randn(6).to(given).requires_grad_(),
                )
                direction = torch.randn(x.shape).to(dtype)
                for groups in (2, 6, None):
                    for w, b in ((None, None), (weight, None), (weight, bias)):

                        def call(x=x, groups=groups, w=w, b=b):
                            if groups is None:
                                return fF.instance_norm(x, weight=w, bias=b)
                            return fF.group_norm(x, groups, w, b)

                        leaves = [t for t in (x, w, b) if t is not None]
                        short, long = both_ways(monkeypatch, call, leaves, direction)
                        for one, other in zip(short, long, strict=True):
                            assert torch.equal(one, other)
                            assert one.stride() == other.stride()
                        with torch.no_grad():
                            assert torch.equal(call(), long[0])


@pytest.mark.skipif(not HAS_TABLE, reason="torch before 2.10 has no table")
def test_what_the_short_way_takes():
    def short(x, groups=2, weight=None, bias=None, eps=1e-5):
        return cpu.tensor_group_norm(ops._empty, x, groups, weight, bias, eps)

    x, weight = torch.randn(2, 6, 5), torch.randn(6)
    assert torch.equal(short(x), fF.group_norm(x, 2))
    assert type(short(x.clone().requires_grad_())) is tuple
    assert type(short(x, 2, weight.clone().requires_grad_())) is tuple
    for bad in (x.long(), x[0, 0], x[:0], x.to("meta"), torch._neg_view(x), [1.0], None):
        assert short(bad) is None
    for groups in (0, -1, 4, 7, 2**70, True, 2.0, "2"):
        assert short(x, groups) is None
    for bad in (torch.randn(5), torch.randn(1, 6), weight.double(), weight.bfloat16(), torch._neg_view(weight), 1.0):
        assert short(x, 2, bad) is None
        assert short(x, 2, weight, bad) is None
    assert short(x, 2, None, None, 1) is None
    assert short(torch.randn(1, 6, 1), 6) is None  # one value a group
    assert short(torch.randn(2, 6, 1), 6) is not None
    assert short(torch.randn(2, 6, 1), None) is None  # ... a channel
    assert short(x.transpose(0, 1), None) is None  # whose result would not be contiguous
    with fastnn.backend("reference"):
        assert short(x) is None

    _, mean, var = short(x.clone().requires_grad_())

    def gradient(grad=x, x=x, groups=2, weight=None, mean=mean, var=var, eps=1e-5, by_bias=False):
        with torch.no_grad():
            return cpu.tensor_group_norm_backward(ops._empty, grad, x, groups, weight, mean, var, eps, by_bias)

    assert gradient()[1:] == (None, None)
    assert cpu.tensor_group_norm_backward(ops._empty, x, x, 2, None, mean, var, 1e-5, False) is None
    for bad in (
        dict(grad=x[:, :, :4]),
        dict(grad=x.double()),
        dict(groups=3),
        dict(weight=torch.randn(5)),
        dict(by_bias=True),  # of which dtype?
        dict(mean=mean.float()),
        dict(var=var[:1]),
        dict(mean=mean.t().contiguous().t()),
        dict(eps=1),
    ):
        assert gradient(**bad) is None
