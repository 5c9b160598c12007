"""Layer norm and rms norm: accuracy far from zero, layouts, mixed dtypes, derivatives, tracing, threads."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jvp, vmap
from torch.library import opcheck

import fastnn
import fastnn.functional as fF
from fastnn import _cpu, _state
from fastnn.testing.inputs import poisoned, surroundings_intact

from .support import FLOATS

EPS = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2, torch.float16: 2e-3}


#: Before torch 2.8 rms norm made float32 of 16 bits and a weight in float32: torch's still.
WIDENS = F.rms_norm(torch.ones(1, 1, dtype=torch.bfloat16), (1,), torch.ones(1)).dtype is torch.float32


def call(f, name, x, shape, weight, bias, eps=1e-5):
    if name == "layer_norm":
        return f.layer_norm(x, shape, weight, bias, eps)
    return f.rms_norm(x, shape, weight, eps)


def with_gradients(f, name, x, weight, bias, direction, dtype=None):
    leaves = [x, weight, bias] if name == "layer_norm" else [x, weight]
    leaves = [t.detach() if dtype is None else t.detach().to(dtype) for t in leaves]
    leaves = [t.requires_grad_() for t in leaves]
    y = call(f, name, leaves[0], tuple(weight.shape), leaves[1], leaves[2] if len(leaves) > 2 else None)
    return y, *torch.autograd.grad(y, leaves, direction.to(y.dtype))


def assert_close(found, exact, rtol):
    for ours, wanted in zip(found, exact, strict=True):
        atol = rtol * max(wanted.abs().max().item(), 1e-3) if wanted.numel() else 0
        torch.testing.assert_close(ours.double(), wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_against_float64(name, dtype, machine, no_fallback):
    """Rows of every remainder, fewer and more of them than are taken together or cut into chunks."""
    shapes = [(5, 3), (3, 5, 17), (67, 33), (130, 64), (3, 129), (20, 2063), (1, 4100), (1100, 9)]
    if machine == "triton":  # many programs are slow in the interpreter
        shapes = [(5, 3), (3, 5, 17), (67, 33), (3, 129), (2, 4099)]
    if machine == "cuda":  # on either side of what a group of threads holds
        shapes += [(3, 257), (2, 1032), (3, 8200)] if dtype is torch.bfloat16 else [(2, 8201)]
    for shape in shapes:
        x, direction = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        weight, bias = torch.randn(shape[-1]).to(dtype), torch.randn(shape[-1]).to(dtype)
        found = with_gradients(fF, name, x, weight, bias, direction)
        exact = with_gradients(F, name, x, weight, bias, direction, torch.float64)
        assert_close(found, exact, EPS[dtype] * 4)


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_a_mean_far_from_zero(offset, machine, no_fallback):
    """The squares of the elements would leave nothing of their deviations."""
    for n in (7, 768, 5000):
        x = torch.randn(9, n) + offset
        x[0, : n // 2] += 3  # an eighth that is unlike the rest
        weight, bias = torch.randn(n), torch.randn(n)
        direction = torch.randn(9, n)
        found = with_gradients(fF, "layer_norm", x, weight, bias, direction)
        exact = with_gradients(F, "layer_norm", x, weight, bias, direction, torch.float64)
        assert_close(found, exact, 2e-6)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_extremes(name, machine, no_fallback):
    weight, bias = torch.randn(33), torch.randn(33)
    for size in (1e-25, 1e25, 1e37):
        x = torch.randn(4, 33) * size
        direction = torch.randn(4, 33)
        y = call(fF, name, x, (33,), weight, bias, 0.0)
        exact = call(F, name, x.double(), (33,), weight.double(), bias.double(), 0.0)
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
        leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
        (call(fF, name, leaf, (33,), weight, bias, 1e-30) * direction).sum().backward()
        (call(F, name, wide, (33,), weight.double(), bias.double(), 1e-30) * direction).sum().backward()
        if size < 1e37:  # there the gradient is subnormal
            torch.testing.assert_close(leaf.grad.double() * size, wide.grad * size, rtol=1e-4, atol=1e-4)
    for value in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(3, 33)
        x[1, 5] = value
        ours, torchs = (call(f, name, x, (33,), weight, bias) for f in (fF, F))
        torch.testing.assert_close(ours, torchs, equal_nan=True)
        assert ours[1].isnan().any()
        assert ours[::2].isfinite().all()


def layouts():
    r = torch.randn
    yield r(3, 4, 5), 1
    yield r(4, 3, 5).transpose(0, 1), 1
    yield r(5, 4, 3).transpose(0, 2), 1
    yield r(5, 4, 3).transpose(0, 2), 2
    yield r(2, 3, 4, 6).to(memory_format=torch.channels_last), 1
    yield r(2, 3, 4, 6).to(memory_format=torch.channels_last), 3
    yield r(2, 6, 7, 3).permute(0, 2, 3, 1), 1
    yield r(70, 6, 2, 3).permute(0, 2, 3, 1), 1
    yield r(6, 10)[::2, ::2], 1
    yield r(5).expand(3, 4, 5), 1
    yield r(4, 1).expand(4, 5), 1
    yield r(2, 3, 4, 5, 2).to(memory_format=torch.channels_last_3d), 2
    yield r(2, 1, 4, 5), 2
    yield r(7), 1
    yield r(200, 5).t(), 1
    yield torch._neg_view(r(2, 3, 4)), 1


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_strides_are_torchs(name, machine, no_fallback):
    for x, dims in layouts():
        weight, bias = torch.randn(x.shape[-dims:]), torch.randn(x.shape[-dims:])
        if dims > 1:
            weight = weight.transpose(-1, -2).contiguous().transpose(-1, -2)
        for direction in (
            torch.randn(x.shape),
            torch.randn(()).expand(x.shape),
            torch.randn(x.shape[::-1]).permute(*range(x.dim())[::-1]),
        ):
            found = with_gradients(fF, name, x, weight, bias, direction)
            torchs = with_gradients(F, name, x, weight, bias, direction)
            exact = with_gradients(F, name, x, weight, bias, direction, torch.float64)
            assert found[0].stride() == torchs[0].stride(), (x.shape, x.stride())
            assert_close(found, exact, 2e-5)
        meta = call(fF, name, x.to("meta"), tuple(weight.shape), weight.to("meta"), bias.to("meta"))
        assert (meta.shape, meta.stride(), meta.is_meta) == (found[0].shape, found[0].stride(), True)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
def test_nothing_around_the_operands_is_read_or_written(dtype):
    for rows, n in ((3, 17), (5, 40), (1, 129)):
        operands = [poisoned(shape, dtype) for shape in ((rows, n), (n,), (n,), (rows, n), (rows, n))]
        x, weight, bias, out, grad_x = operands
        for t in (x, weight, bias):
            t.normal_()
        code = (2, 3)[dtype is torch.float16] if dtype.itemsize == 2 else int(dtype is torch.float64)
        columns = [(t.data_ptr(), 1, code) for t in (weight, bias)]
        at = {id(t): (t.data_ptr(), t.stride()) for t in operands}
        _cpu.row_norm((rows, n), code, 1, at[id(x)], at[id(out)], *columns, 1e-5, True)
        sums = [poisoned((n,), torch.float64) for _ in range(2)]
        pointers = [t.data_ptr() for t in sums]
        _cpu.row_norm_backward(
            (rows, n), code, 1, at[id(x)], at[id(x)], at[id(grad_x)], columns[0], *pointers, 1e-5, True
        )
        assert all(surroundings_intact(t) and t.isfinite().all() for t in (*operands, *sums))
        exact = F.layer_norm(x.double(), (n,), weight.double(), bias.double())
        torch.testing.assert_close(out.double(), exact, rtol=EPS[dtype], atol=EPS[dtype] * 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_float32_parameters_with_16_bit_input(name, dtype):
    _state.reset_fallbacks()
    x, direction = torch.randn(5, 6, 40).to(dtype), torch.randn(5, 6, 40).to(dtype)
    weight, bias = torch.randn(40), torch.randn(40)
    found = with_gradients(fF, name, x, weight, bias, direction)
    torchs = with_gradients(F, name, x, weight, bias, direction)
    for ours, wanted in zip(found, torchs, strict=True):
        assert ours.dtype is wanted.dtype
    assert_close(found, with_gradients(F, name, x, weight, bias, direction, torch.float64), EPS[dtype])
    assert [op for op, _ in _state.fallbacks()] == (["rms_norm"] if WIDENS and name == "rms_norm" else [])


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
def test_rms_norm_without_eps(dtype, no_fallback):
    """What is added then decides everything where the input is as small."""
    x = torch.full((2, 8), 2e-4).to(dtype)
    for options in ({}, {"eps": None}):
        torch.testing.assert_close(fF.rms_norm(x, (8,), **options), F.rms_norm(x, (8,), **options))
    layer = fastnn.nn.RMSNorm(8, dtype=dtype)
    torch.testing.assert_close(layer(x), F.rms_norm(x, (8,)))
    x.requires_grad_()
    torch.testing.assert_close(fF.rms_norm(x, (8,)).detach(), F.rms_norm(x, (8,)).detach())


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("shape", [(4096, 40), (300, 700), (20, 9000), (63, 2048), (64, 2048)])
def test_any_number_of_threads_gives_the_same_bits(name, shape):
    x, direction = torch.randn(shape), torch.randn(shape)
    weight, bias = torch.randn(shape[-1]), torch.randn(shape[-1])
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append(with_gradients(fF, name, x, weight, bias, direction))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_large_results(name, no_fallback):
    """Those that the caching allocator makes, in float32 and around the caches."""
    x, direction = torch.randn(1030, 2050), torch.randn(1030, 2050)
    weight, bias = torch.randn(2050), torch.randn(2050)
    found = with_gradients(fF, name, x, weight, bias, direction)
    assert_close(found, with_gradients(F, name, x, weight, bias, direction, torch.float64), 4e-6)


def test_gradients_of_some(no_fallback):
    x, weight, bias = torch.randn(4, 6), torch.randn(6), torch.randn(6)
    for wanted in ("x", "weight", "bias", "none"):
        for f in (fF, F):
            leaves = {"x": x.clone(), "weight": weight.clone(), "bias": bias.clone()}
            if wanted != "none":
                leaves[wanted].requires_grad_()
            y = f.layer_norm(leaves["x"], (6,), leaves["weight"], leaves["bias"])
            assert y.requires_grad == (wanted != "none")
            if wanted != "none":
                y.cumsum(0).square().sum().backward()
                if f is fF:
                    mine = leaves[wanted].grad
                else:
                    torch.testing.assert_close(mine, leaves[wanted].grad, rtol=1e-5, atol=1e-5)
    alone = bias.clone().requires_grad_()
    fF.layer_norm(x, (6,), None, alone).sum().backward()
    torch.testing.assert_close(alone.grad, torch.full((6,), 4.0))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_no_elements(shape, no_fallback):
    for name in ("layer_norm", "rms_norm"):
        x, weight = torch.empty(shape, requires_grad=True), torch.ones(3, requires_grad=True)
        y, torchs = (call(f, name, x, (3,), weight, None) for f in (fF, F))
        assert (y.shape, y.stride(), y.requires_grad) == (torchs.shape, torchs.stride(), True)
        y.sum().backward()
        assert not weight.grad.any()


BAD = [
    (torch.randn(2, 3), (4,), None),
    (torch.randn(2, 3), (), None),
    (torch.randn(2, 3), (5, 2, 3), None),
    (torch.randn(2, 3), (3,), torch.randn(4)),
    (torch.randn(2, 3), (3,), torch.randn(1, 3)),
    (torch.randint(0, 3, (2, 3)), (3,), None),
    ("x", (3,), None),
    (torch.randn(2, 3), "3", None),
    (torch.randn(2, 3), (3,), 1.0),
]


@pytest.mark.parametrize("index", range(len(BAD)))
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_bad_input(name, index):
    x, shape, weight = BAD[index]
    with pytest.raises(Exception) as theirs:
        call(F, name, x, shape, weight, None)
    with pytest.raises(type(theirs.value)) as ours:
        call(fF, name, x, shape, weight, None)
    assert type(ours.value) is type(theirs.value)
    if not isinstance(theirs.value, NotImplementedError):
        assert f"fastnn.{name}: " in str(ours.value)


def test_mixed_dtypes_are_torchs_errors():
    x = torch.randn(2, 3)
    for weight, bias in ((torch.float64, torch.float64), (torch.float32, torch.bfloat16)):
        with pytest.raises(RuntimeError, match=r"fastnn\.layer_norm: .*expected dtype"):
            fF.layer_norm(x, (3,), torch.ones(3, dtype=weight), torch.ones(3, dtype=bias))


def test_other_dtypes_go_to_torch():
    _state.reset_fallbacks()
    x = torch.randn(2, 3, dtype=torch.complex64)
    torch.testing.assert_close(fF.rms_norm(x, (3,)), F.rms_norm(x, (3,)))
    assert list(_state.fallbacks()) == [("rms_norm", "input: dtype complex64")]


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_derivatives(name, no_fallback):
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2, 5), (2, 5), (2, 5)))

    def f(x, weight, bias):
        return call(fF, name, x, (2, 5), weight, bias, 1e-3)

    inputs = (x, weight, bias) if name == "layer_norm" else (x, weight)
    run = f if name == "layer_norm" else lambda x, weight: f(x, weight, None)
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True, check_batched_grad=False)
    assert torch.autograd.gradgradcheck(run, inputs, check_fwd_over_rev=True)
    bare = (x,)
    assert torch.autograd.gradgradcheck(lambda x: call(fF, name, x, (2, 5), None, None), bare)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_transforms(name, no_fallback):
    x, weight, bias = torch.randn(4, 3, 5), torch.randn(4, 5), torch.randn(4, 5)
    for in_dims, args in (
        ((0, None, None), (x, weight[0], bias[0])),
        ((0, 0, 0), (x, weight, bias)),
        ((None, 0, None), (x[0], weight, bias[0])),
        ((1, None, None), (x, weight[0], bias[0])),
        ((2, None, None), (x.permute(0, 2, 1), weight[0], bias[0])),
    ):
        found, wanted = (vmap(lambda *a, f=f: call(f, name, a[0], (5,), a[1], a[2]), in_dims)(*args) for f in (fF, F))
        torch.testing.assert_close(found, wanted)

    def loss(f):
        return lambda w, b, x: call(f, name, x, (5,), w, b).square().cumsum(0).sum()

    per_sample = [vmap(grad(loss(f), (0, 1, 2) if name == "layer_norm" else (0, 2)), (None, None, 0)) for f in (fF, F)]
    for ours, torchs in zip(*(f(weight[0], bias[0], x) for f in per_sample), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)
    tangents = torch.randn(5), torch.randn(5), torch.randn(4, 3, 5)
    primals = (weight[0], bias[0], x)
    ours, torchs = (jvp(loss(f), primals, tangents) for f in (fF, F))
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_torch_library_and_compile(name, no_fallback):
    centered = name == "layer_norm"
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((3, 4, 5), (5,), (5,)))
    opcheck(torch.ops.fastnn.row_norm.default, (x, 1, weight, bias if centered else None, 1e-5, centered))
    opcheck(
        torch.ops.fastnn.row_norm_backward.default,
        (x.detach().cos().requires_grad_(), x, 1, weight, 1e-5, centered, centered),
    )

    def run(f):
        return lambda x, w, b: call(f, name, x, (5,), w, b if centered else None).sigmoid()

    compiled = torch.compile(run(fF), backend="aot_eager", fullgraph=True)
    leaves = (x, weight, bias) if centered else (x, weight)
    results = []
    for f in (compiled, run(F)):
        y = f(x, weight, bias)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_autocast_is_torchs():
    """torch casts nothing here on a CPU."""
    _state.reset_fallbacks()
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias = torch.randn(3, 8).to(dtype), torch.randn(8), torch.randn(8)
        with torch.autocast("cpu"):
            for name in ("layer_norm", "rms_norm"):
                ours, torchs = (call(f, name, x, (8,), weight, bias) for f in (fF, F))
                assert ours.dtype is torchs.dtype
                assert ours.dtype is dtype or (WIDENS and name == "rms_norm")
                torch.testing.assert_close(ours, torchs)
    assert [op for op, _ in _state.fallbacks()] == ["rms_norm"] * WIDENS


def test_patch_and_convert():
    x = torch.randn(3, 8)
    model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.RMSNorm(8), torch.nn.LayerNorm(8, bias=False))
    expected = model(x)
    with fastnn.patch():
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(torch.layer_norm(x, (8,), cudnn_enable=True), F.layer_norm(x, (8,)))
    fastnn.convert(model, strict=True)
    assert [type(m) for m in model] == [fastnn.nn.LayerNorm, fastnn.nn.RMSNorm, fastnn.nn.LayerNorm]
    torch.testing.assert_close(model(x), expected)
    fastnn.revert(model)
    assert [type(m) for m in model] == [torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.LayerNorm]
