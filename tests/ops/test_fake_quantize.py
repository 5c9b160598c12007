"""Fake quantization: the formulas in NumPy, torch's own functions to the bit, and the gradients of both."""

import contextlib
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import fastnn
import fastnn.functional as fF
from fastnn import _state
from fastnn.backends.reference import fake_quantize as formulas
from fastnn.backends.reference.dropout import words
from fastnn.ops._random import draw_seed

from .support import FLOATS

# amx and amx-emulated have no kernels of their own for this.
pytestmark = pytest.mark.not_on("amx", "amx-emulated")
RANGES = {torch.int8: (-128, 127), torch.uint8: (0, 255), "int4": (-8, 7), "uint4": (0, 15)}
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))


def bits(x):
    """The memory as integers, so that zeros have signs and NaN equals NaN."""
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    return torch.where(x.isnan(), torch.full_like(x, math.nan), x).contiguous().view(kind)


def same_bits(a, b):
    return a.dtype is b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def spread(parameter, x, axis, group_size):
    """The scale of each element."""
    if group_size:
        return np.repeat(parameter, group_size, -1)
    axes = [] if axis is None else [a % x.ndim for a in ([axis] if isinstance(axis, int) else axis)]
    return np.broadcast_to(parameter.reshape([x.shape[d] if d in axes else 1 for d in range(x.ndim)]), x.shape)


def expected(x, scale, zero_point=None, qmin=-128, qmax=127, axis=None, group_size=None, seed=None):
    """The formula, an operation of NumPy each: the result, and what was in range."""
    wide = x.dtype is torch.float64
    kind = np.float64 if wide else np.float32
    a = x.to(torch.float64 if wide else torch.float32).numpy()
    scale = torch.as_tensor(scale, dtype=torch.float32).numpy()
    s = spread(scale, a, axis, group_size)
    z = 0 if zero_point is None else spread(torch.as_tensor(zero_point).double().numpy(), a, axis, group_size)
    with np.errstate(all="ignore"):
        y = a * spread((np.float32(1) / scale).astype(np.float32), a, axis, group_size).astype(kind)
        if seed is None:
            r = np.rint(y)
        else:
            chance = (words(seed, x.numel()).numpy() >> 8).reshape(a.shape) * kind(2**-24)
            r = np.floor(y) + (chance.astype(kind) < y - np.floor(y))
        q = r.astype(np.float64) + z
        inside = (q >= qmin) & (q <= qmax)
        d = np.where(np.isnan(q), 0, np.clip(q, qmin, qmax) - z)
        out = (d.astype(np.float32) + np.float32(0)) * s.astype(np.float32)
    return torch.from_numpy(np.asarray(out)).to(x.dtype), torch.from_numpy(np.asarray(inside))


def values(*shape, dtype=torch.float32):
    """Of all kinds: halves, ends of the range, infinities, NaN."""
    x = torch.randn(shape) * 20
    flat = x.view(-1)
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 0.25, 0.75, -0.25, 1e30, -1e30, 63.5, 63.75, -64])
    if flat.numel() > 40:
        flat[3:16] = special
    return x.to(dtype)


def layouts(x):
    yield x
    yield x.transpose(0, -1).contiguous().transpose(0, -1)
    spread = torch.full((*x.shape, 2), math.nan, dtype=x.dtype)
    spread[..., 1] = x
    yield spread[..., 1]
    if x.dim() == 4:
        yield x.contiguous(memory_format=torch.channels_last)
    yield x[:1].expand(x.shape)


#: Of x (5, 7, 12): the arguments, and the shape of the scale.
GRANULARITY = {
    "tensor": ({}, ()),
    "first": ({"axis": 0}, (5,)),
    "middle": ({"axis": 1}, (7,)),
    "last": ({"axis": -1}, (12,)),
    "token": ({"axis": (0, 1)}, (5, 7)),
    "outer and last": ({"axis": (0, 2)}, (5, 12)),
    "inner two": ({"axis": (1, 2)}, (7, 12)),
    "each": ({"axis": (0, 1, 2)}, (5, 7, 12)),
    "group of 4": ({"group_size": 4}, (5, 7, 3)),
    "group of 1": ({"group_size": 1}, (5, 7, 12)),
}


def grid(shape, qmin, qmax, asymmetric):
    scale = torch.rand(shape) * 0.4 + 0.1
    return scale, torch.randint(qmin, qmax + 1, shape, dtype=torch.int32) if asymmetric else None


@dtypes
def test_formula_on_any_layout(machine, dtype, no_fallback):
    kinds = [(torch.int8, True), ("int4", False), ("int4", True)]
    for number, (kwargs, shape) in enumerate(GRANULARITY.values(), max(0, FLOATS.index(dtype) - 1)):
        # Each kind with each granularity; on Triton's interpreter, which is slow, in the course of its three dtypes.
        for kind, asymmetric in kinds[number % 3 :][:1] if machine == "triton" else kinds:
            qmin, qmax = RANGES[kind]
            scale, zero_point = grid(shape, qmin, qmax, asymmetric)
            # Each layout of x with each of the gradient, in the course of all granularities.
            grads = itertools.cycle(layouts(torch.randn(5, 7, 12).to(dtype)))
            for x in layouts(values(5, 7, 12, dtype=dtype)):
                want, inside = expected(x, scale, zero_point, qmin, qmax, **kwargs)
                found = fastnn.fake_quantize(x, scale, zero_point, dtype=kind, **kwargs)
                assert same_bits(found, want)
                assert found.stride() == torch.empty_like(x).stride()
                leaf = x.detach().requires_grad_()
                found = fastnn.fake_quantize(leaf, scale, zero_point, dtype=kind, **kwargs)
                assert same_bits(found.detach(), want)
                for grad in (next(grads), next(grads), next(grads)):
                    (by_x,) = torch.autograd.grad(found, leaf, grad, retain_graph=True)
                    assert same_bits(by_x, grad * inside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_shapes(machine, dtype, no_fallback):
    for shape in [(), (1,), (0,), (3, 0), (17,), (1031,), (63, 65), (2, 3, 127), (1, 1), (4, 513)]:
        x = values(*shape, dtype=dtype).requires_grad_()
        for kwargs, sizes in (({}, ()), ({"axis": -1}, shape[-1:]), ({"axis": 0}, shape[:1])):
            if kwargs and not shape:
                continue
            scale, zero_point = grid(sizes, 0, 255, True)
            want, inside = expected(x.detach(), scale, zero_point, 0, 255, **kwargs)
            found = fastnn.fake_quantize(x, scale, zero_point, dtype="uint8", **kwargs)
            assert same_bits(found.detach(), want)
            (by_x,) = torch.autograd.grad(found, x, torch.ones_like(found))
            assert torch.equal(by_x, inside.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_large_and_threads(dtype, no_fallback):
    x = (torch.randn(350, 3001) * 20).to(dtype).requires_grad_()
    for kwargs, sizes in (({}, ()), ({"axis": 1}, (3001,)), ({"axis": 0}, (350,))):
        scale, zero_point = grid(sizes, -128, 127, True)
        want, inside = expected(x.detach(), scale, zero_point, **kwargs)
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            learned = scale.clone().requires_grad_(), zero_point.float().requires_grad_()
            found = fastnn.fake_quantize(x, *learned, **kwargs)
            assert same_bits(found.detach(), want)
            runs.append(torch.autograd.grad(found, (x, *learned), x.detach() * 2))
            assert torch.equal(runs[-1][0], x.detach() * 2 * inside)
        for run in runs[1:]:
            assert all(same_bits(a, b) for a, b in zip(run, runs[0], strict=True))


def test_the_mask_is_a_bit_an_element():
    for n in (1, 7, 8, 9, 63, 64, 65, 1000):
        x = torch.randn(n) * 100
        args = (x, torch.tensor([0.7]), None, None, -128, 127, 1.0, False, False)
        _, mask = torch.ops.fastnn.fake_quantize(*args, True)
        assert mask.numel() == n // 8 + 8
        assert torch.equal(formulas.unpack_bits(mask, (n,)), expected(x, 0.7)[1])
        assert torch.equal(mask, formulas.pack_bits(expected(x, 0.7)[1]))
        assert torch.ops.fastnn.fake_quantize(*args, False)[1].numel() == 0


def test_what_is_kept():
    """For the gradient of x a bit an element; x itself only where the scale is learned."""
    x = torch.randn(1000, 1000, requires_grad=True)

    def kept(*args, **kwargs):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
            fastnn.fake_quantize(x, *args, **kwargs)
        return sum(saved)

    assert kept(0.1) == 125_008
    assert kept(torch.full((1000,), 0.1), axis=0) == 125_008
    assert kept(torch.tensor(0.1, requires_grad=True)) >= x.nbytes


# ---- torch's own functions ---------------------------------------------------------------------------------------


#: Numbers that torch takes: scale, zero_point, quant_min, quant_max.
AS_TORCH = [(0.1, 3, -8, 7), (0.5, 0, -128, 127), (1 / 3, 200, 0, 255), (1, 0, 0, 0), (0.0, 0, -8, 7), (-0.3, 1, -8, 7)]


def within_int64(x):
    """Without what torch converts to an integer that has no room for it, which C++ does not define; fastnn clamps it."""
    return torch.where(x.abs() < 1e15, x, torch.where(x.isnan(), x, 1))


@functools.cache
def torch_clamps():
    """Whether torch's own kernel of one scale does so, too: 2.8's does not, and takes float64 through a float32 inverse."""
    return torch.fake_quantize_per_tensor_affine(torch.tensor(1e30), 1.0, 0, -8, 7).item() == 7


@dtypes
def test_per_tensor_as_torch(machine, dtype, no_fallback):
    for scale, zero_point, qmin, qmax in AS_TORCH:
        if scale == 0 and not torch_clamps():
            continue  # everything divided by it is beyond
        forms = [(scale, zero_point)]
        for kind in (torch.int32, torch.int64):
            forms.append((torch.tensor(scale, dtype=torch.float64), torch.tensor(zero_point, dtype=kind)))
            forms.append((torch.tensor([scale], dtype=torch.float32), torch.tensor([zero_point + 1000], dtype=kind)))
        forms = itertools.cycle(forms)
        grads = itertools.cycle(layouts(values(6, 5, 17, dtype=dtype)))
        for x in (*layouts(values(6, 5, 17, dtype=dtype)), values(6, 5, 17, dtype=dtype)):
            x = x if torch_clamps() else within_int64(x)
            form = next(forms)
            leaves = [x.detach().requires_grad_() for _ in range(2)]
            ours = fF.fake_quantize_per_tensor_affine(leaves[0], *form, qmin, qmax)
            torchs = torch.fake_quantize_per_tensor_affine(leaves[1], *form, qmin, qmax)
            if dtype is torch.float64 and not torch_clamps():
                torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=0)
            else:
                assert same_bits(ours.detach(), torchs.detach())
            assert ours.stride() == torchs.stride()
            grad = next(grads)
            found, want = (
                torch.autograd.grad(y, leaf, grad)[0] for y, leaf in ((ours, leaves[0]), (torchs, leaves[1]))
            )
            assert same_bits(found, want)


@dtypes
def test_per_channel_as_torch(machine, dtype, no_fallback):
    whole = within_int64(values(4, 5, 6, 7, dtype=dtype))
    for x, axis in itertools.product(layouts(whole), range(4)):
        qmin, qmax = (-128, 127) if axis % 2 else (0, 15)
        scale, zero_point = grid((x.shape[axis],), qmin, qmax, True)
        leaves = [x.detach().requires_grad_() for _ in range(2)]
        ours = fF.fake_quantize_per_channel_affine(leaves[0], scale, zero_point, axis, qmin, qmax)
        torchs = torch.fake_quantize_per_channel_affine(leaves[1], scale, zero_point, axis, qmin, qmax)
        assert same_bits(ours.detach(), torchs.detach())
        assert ours.stride() == torchs.stride()
        grad = values(4, 5, 6, 7, dtype=dtype)
        found, want = (torch.autograd.grad(y, leaf, grad)[0] for y, leaf in ((ours, leaves[0]), (torchs, leaves[1])))
        assert same_bits(found, want)


def test_infinities_per_channel_are_clamped(no_fallback):
    x = torch.tensor([[math.inf, -math.inf, 1e30, math.nan]])
    y = fF.fake_quantize_per_channel_affine(x, torch.tensor([1.0]), torch.tensor([0], dtype=torch.int32), 0, -8, 7)
    assert y.tolist() == [[7, -8, 7, -8]]


ONE, INTS = torch.ones(3), torch.zeros(3, dtype=torch.int32)
BAD_TORCH = {
    "zero point out of range": ("tensor", (torch.randn(3), 0.1, 30, -8, 7)),
    "empty range": ("tensor", (torch.randn(3), 0.1, 3, 8, 7)),
    "integers": ("tensor", (torch.arange(3), 0.1, 0, -8, 7)),
    "zero point is no integer": ("tensor", (torch.randn(3), 0.1, 3.0, -8, 7)),
    "no tensor": ("tensor", ([1.0], 0.1, 3, -8, 7)),
    "two scales": ("tensor", (torch.randn(3), torch.ones(2), torch.zeros(1, dtype=torch.int32), -8, 7)),
    "scale requires grad": ("tensor", (torch.randn(3), torch.ones(1).requires_grad_(), INTS[:1], -8, 7)),
    "channels: long zero points": ("channel", (torch.randn(3, 4), ONE, INTS.long(), 0, -8, 7)),
    "channels: sizes": ("channel", (torch.randn(3, 4), ONE, INTS, 1, -8, 7)),
    "channels: two dimensions": ("channel", (torch.randn(3, 4), ONE.view(3, 1), INTS.view(3, 1), 0, -8, 7)),
    "channels: negative axis": ("channel", (torch.randn(3, 4), ONE, INTS, -2, -8, 7)),
    "channels: axis": ("channel", (torch.randn(3, 4), ONE, INTS, 5, -8, 7)),
    "channels: zero point out of range": ("channel", (torch.randn(3, 4), ONE, INTS + 9, 0, -8, 7)),
    "channels: none": ("channel", (torch.randn(0, 4), ONE[:0], INTS[:0], 0, -8, 7)),
    "channels: scale is a number": ("channel", (torch.randn(3, 4), 1.0, INTS, 0, -8, 7)),
    "channels: empty range": ("channel", (torch.randn(3, 4), ONE, INTS, 0, 8, 7)),
}


@pytest.mark.parametrize("name", BAD_TORCH)
def test_errors_as_torch(name):
    kind, args = BAD_TORCH[name]
    function = f"fake_quantize_per_{kind}_affine"
    with pytest.raises(Exception) as theirs:
        getattr(torch, function)(*args)
    with pytest.raises(type(theirs.value)) as ours:
        getattr(fF, function)(*args)
    assert f"fastnn.{function}" in str(ours.value)


def test_what_goes_to_torch():
    x, scale = torch.randn(3, 4), torch.rand(3) + 0.1
    _state.reset_fallbacks()
    ours = fF.fake_quantize_per_channel_affine(x, scale, torch.full((3,), 1.5), 0, -8, 7)
    assert torch.equal(ours, torch.fake_quantize_per_channel_affine(x, scale, torch.full((3,), 1.5), 0, -8, 7))
    wide = fF.fake_quantize_per_tensor_affine(x, 1e-8, 0, -(2**31), 2**31 - 1)
    assert torch.equal(wide, torch.fake_quantize_per_tensor_affine(x, 1e-8, 0, -(2**31), 2**31 - 1))
    assert len(_state.fallbacks()) == 2
    _state.reset_fallbacks()


def test_patch(no_fallback):
    x = torch.randn(3, 4, requires_grad=True)
    scale, zero_point = torch.rand(3) + 0.1, torch.tensor([1, 0, -2], dtype=torch.int32)
    with fastnn.patch():
        a = torch.fake_quantize_per_tensor_affine(x, 0.1, 3, -8, 7)
        b = torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, -8, 7)
        module = torch.ao.quantization.FakeQuantize(quant_min=-8, quant_max=7, dtype=torch.qint8)
        module.disable_observer()
        c = module(x)
    assert "fake_quantize" in type(a.grad_fn).__name__
    assert "FakeQuantize" not in type(b.grad_fn).__name__
    assert torch.equal(a, torch.fake_quantize_per_tensor_affine(x, 0.1, 3, -8, 7))
    assert torch.equal(b, torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, -8, 7))
    assert torch.equal(c, torch.fake_quantize_per_tensor_affine(x, 1.0, 0, -8, 7))


# ---- rounding by chance ------------------------------------------------------------------------------------------


@dtypes
def test_stochastic_formula(machine, dtype, no_fallback):
    for kwargs, shape in GRANULARITY.values():
        scale, zero_point = grid(shape, 0, 15, True)
        for x in layouts(values(5, 7, 12, dtype=dtype)):
            torch.manual_seed(5)
            found = fastnn.fake_quantize(x, scale, zero_point, dtype="uint4", rounding="stochastic", **kwargs)
            torch.manual_seed(5)
            want, _ = expected(x, scale, zero_point, 0, 15, seed=draw_seed(), **kwargs)
            assert same_bits(found, want)


def test_stochastic_is_unbiased_and_reproducible(no_fallback):
    x = torch.rand(1 << 18) * 4 - 2
    generator = torch.Generator().manual_seed(3)
    first = fastnn.fake_quantize(x, 0.3, rounding="stochastic", generator=generator)
    second = fastnn.fake_quantize(x, 0.3, rounding="stochastic", generator=generator)
    assert not torch.equal(first, second)
    again = fastnn.fake_quantize(x, 0.3, rounding="stochastic", generator=generator.manual_seed(3))
    assert torch.equal(first, again)
    # The error of one element has a variance of at most scale² / 4.
    for part in (x < 0, x > 0, (x > 0.1) & (x < 0.2)):
        error = (first - x)[part].double().mean().item()
        assert abs(error) < 5 * 0.15 / math.sqrt(part.sum().item())
    assert ((first - x).abs() < 0.3001).all()


# ---- learned scales ----------------------------------------------------------------------------------------------


def gradients_by_definition(x, grad, scale, zero_point, qmin, qmax, axis, group_size):
    """In float64, from the definition."""
    a, g = x.double().numpy(), grad.double().numpy()
    s = spread(scale.double().numpy(), a, axis, group_size)
    z = spread(zero_point.double().numpy(), a, axis, group_size)
    y = a * (np.float32(1) / s.astype(np.float32)).astype(np.float32)
    r = np.rint(a.astype(np.float32) * (np.float32(1) / s.astype(np.float32))).astype(np.float64)
    inside = (r + z >= qmin) & (r + z <= qmax)
    by_scale = g * np.where(inside, r - y, np.clip(r, qmin - z, qmax - z))
    by_zero = g * np.where(inside, 0, -s)

    def summed(terms):
        terms = torch.from_numpy(terms)
        if group_size:
            return terms.unflatten(-1, (-1, group_size)).sum(-1)
        axes = [] if axis is None else [d % terms.dim() for d in ([axis] if isinstance(axis, int) else axis)]
        others = [d for d in range(terms.dim()) if d not in axes]
        return terms.sum(others) if others else terms

    return (torch.from_numpy(g * inside), *((summed(t), summed(np.abs(t))) for t in (by_scale, by_zero)))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
def test_learned_scale_and_zero_point(machine, dtype, no_fallback):
    for kwargs, shape in GRANULARITY.values():
        check_learned(dtype, kwargs, shape)


def check_learned(dtype, kwargs, shape):
    granularity = {"axis": None, "group_size": None, **kwargs}
    scale = (torch.rand(shape) * 0.4 + 0.1).requires_grad_()
    zero_point = torch.randint(-3, 4, shape).float().requires_grad_()
    for x in layouts((torch.randn(5, 7, 12) * 3).to(dtype)):
        x = x.detach().requires_grad_()
        y = fastnn.fake_quantize(x, scale, zero_point, dtype="int4", grad_factor=0.5, **kwargs)
        grad = torch.randn(5, 7, 12).to(dtype)
        found = torch.autograd.grad(y, (x, scale, zero_point), grad)
        by_x, *others = gradients_by_definition(
            x.detach(), grad, scale.detach(), zero_point.detach(), -8, 7, **granularity
        )
        assert torch.equal(found[0].double(), by_x)
        for ours, (want, size) in zip(found[1:], others, strict=True):
            assert ours.shape == shape
            assert ours.dtype is torch.float32
            assert ((ours.double() - want * 0.5).abs() <= 1e-5 * (size + 1)).all()


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_learned_as_torch(axis, kernels, no_fallback):
    """Away from halves: there torch's forward and backward round apart."""
    x = torch.randn(70, 300) * 3
    sizes = () if axis is None else (x.shape[axis],)
    scale, zero_point = torch.rand(sizes) * 0.4 + 0.1, torch.randint(-3, 4, sizes).float()
    grad = torch.randn(x.shape)
    results = []
    for ours in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
        one = [leaves[0], *(leaf.view(-1) for leaf in leaves[1:])]
        if ours:
            y = fastnn.fake_quantize(*leaves, dtype="int4", axis=axis, grad_factor=0.125)
        elif axis is None:
            y = torch._fake_quantize_learnable_per_tensor_affine(*one, -8, 7, 0.125)
        else:
            y = torch._fake_quantize_learnable_per_channel_affine(*one, axis, -8, 7, 0.125)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, grad)))
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    assert same_bits(results[0][0], results[1][0])


def test_learned_stochastic(kernels, no_fallback):
    """The same words in the backward: r is what was taken, so that out - x = scale (r - x / scale) where in range."""
    x = torch.randn(40, 70, requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    y = fastnn.fake_quantize(x, scale, rounding="stochastic")
    (by_scale,) = torch.autograd.grad(y.sum(), scale)
    torch.testing.assert_close(by_scale, ((y - x) / scale).sum().detach(), rtol=1e-4, atol=1e-3)


def test_gradgradcheck(no_fallback):
    x = torch.tensor([0.31, -0.52, 5.2, -7.7, 0.93, 2.24], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    assert gradgradcheck(lambda x: fastnn.fake_quantize(x, 0.5, dtype="int4"), (x,))
    y = fastnn.fake_quantize(x, scale, dtype="int4")
    by_x, by_scale = torch.autograd.grad(y, (x, scale), torch.ones_like(y), create_graph=True)
    # In range r - x / scale: its derivative by x is -1 / scale, and by scale x / scale².
    inside = torch.tensor([1.0, 1, 0, 0, 1, 1], dtype=torch.float64)
    second = torch.autograd.grad(by_scale, (x, scale), retain_graph=True)
    torch.testing.assert_close(second[0], -inside / 0.5)
    torch.testing.assert_close(second[1], (inside * x.detach() / 0.25).sum().float())
    assert torch.equal(by_x, inside)


def test_gradcheck_between_the_steps(no_fallback):
    """Where no rounding changes: of a scale alone the derivative is r or the end of the range... with x straight through."""
    x = torch.tensor([9.0, -9.0, 8.0], dtype=torch.float64)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    # All are clamped: the result is scale times a constant.
    assert gradcheck(lambda s: fastnn.fake_quantize(x, s, dtype="int4").sum(), (scale,), eps=1e-2, atol=1e-3)


# ---- tracing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic, no_fallback):
    torch._dynamo.reset()
    scale = torch.full((8,), 0.1)

    def network(x, learned):
        y = fastnn.fake_quantize(x.sin(), scale, axis=1)
        y = fastnn.fake_quantize(y, learned, dtype="int4", group_size=4)
        return fF.fake_quantize_per_tensor_affine(y, 0.05, 1, -8, 7).exp()

    compiled = torch.compile(network, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    # With symbols as strides there is more to find out where the channels are last.
    first = torch.channels_last if dynamic else torch.contiguous_format
    for n, layout in ((3, first), (5 if dynamic else 3, torch.channels_last)):
        x = torch.randn(n, 8, 6, 8).contiguous(memory_format=layout).requires_grad_()
        learned = torch.full((n, 8, 6, 2), 0.2, requires_grad=True)
        ours, again = compiled(x, learned), network(x, learned)
        assert torch.equal(ours, again)
        assert ours.stride() == again.stride()
        gradients = [torch.autograd.grad(y.sum(), (x, learned)) for y in (ours, again)]
        for found, want in zip(*gradients, strict=True):
            torch.testing.assert_close(found, want)
    if dynamic:
        return
    stochastic = torch.compile(
        lambda x: fastnn.fake_quantize(x, 0.1, rounding="stochastic"), fullgraph=True, backend="aot_eager"
    )
    torch.manual_seed(2)
    ours = stochastic(torch.ones(40) * 0.35)
    assert not torch.equal(ours, stochastic(torch.ones(40) * 0.35))


def test_opcheck():
    x = torch.randn(3, 4, requires_grad=True)
    scale, zero_point = torch.rand(1, 4) + 0.1, torch.zeros(1, 4, dtype=torch.int32)
    rest = (-8, 7, 1.0, False, False)
    seed = torch.tensor(3)
    for args in (
        (x, scale, zero_point, None, *rest, True),
        (x.detach(), scale, None, None, *rest, False),
        (x, scale.clone().requires_grad_(), zero_point.float().requires_grad_(), seed, *rest, True),
        (x.detach().t().requires_grad_(), scale[:, :1], None, None, *rest, True),
    ):
        opcheck(torch.ops.fastnn.fake_quantize.default, args)
    mask = torch.ops.fastnn.fake_quantize(x.detach(), scale, None, None, *rest, True)[1]
    opcheck(torch.ops.fastnn.fake_quantize_mask.default, (x, mask))
    grad = torch.randn(3, 4, requires_grad=True)
    args = (grad, x, mask, scale, None, None, -8, 7, 1.0)
    opcheck(torch.ops.fastnn.fake_quantize_gradients.default, args)


def test_vmap_and_forward_mode(no_fallback):
    x, scales = torch.randn(4, 3, 5), torch.rand(4) + 0.1
    found = torch.vmap(lambda row, s: fastnn.fake_quantize(row, s))(x, scales)
    want = torch.stack([fastnn.fake_quantize(row, s) for row, s in zip(x, scales, strict=True)])
    assert torch.equal(found, want)

    def loss(row, s):
        return fastnn.fake_quantize(row, s, dtype="int4").square().sum()

    found = torch.vmap(torch.func.grad(loss, (0, 1)))(x, scales)
    for i in range(4):
        leaves = x[i].clone().requires_grad_(), scales[i].clone().requires_grad_()
        for ours, want in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            torch.testing.assert_close(ours[i], want)
    tangents = torch.randn(3, 5), torch.tensor(2.0)
    _, along = torch.func.jvp(loss, (x[0], scales[0]), tangents)
    back = torch.func.grad(loss, (0, 1))(x[0], scales[0])
    torch.testing.assert_close(along, sum((g * t).sum() for g, t in zip(back, tangents, strict=True)))
    leaf = x.clone().requires_grad_()
    y = fastnn.fake_quantize(leaf, 0.3)
    (batch,) = torch.autograd.grad(y, leaf, torch.randn(2, 4, 3, 5), is_grads_batched=True)
    assert batch.shape == (2, 4, 3, 5)
    _state.reset_fallbacks()  # a batch of gradients is torch's


def test_reference_backend(no_fallback):
    for kwargs, shape in GRANULARITY.values():
        check_reference(kwargs, shape)


def check_reference(kwargs, shape):
    runs = []
    for backend in (None, "reference"):
        torch.manual_seed(1)
        x = values(5, 7, 12).requires_grad_()
        scale = (torch.rand(shape) * 0.4 + 0.1).requires_grad_()
        zero_point = torch.randint(-3, 4, shape).float().requires_grad_()
        torch.manual_seed(4)
        with fastnn.backend(backend) if backend else contextlib.nullcontext():
            for rounding in ("nearest", "stochastic"):
                y = fastnn.fake_quantize(
                    x, scale, zero_point, dtype="int4", rounding=rounding, grad_factor=2.0, **kwargs
                )
                runs.append((y.detach(), *torch.autograd.grad(y, (x, scale, zero_point), torch.ones_like(y))))
    for i in range(2):
        assert same_bits(runs[i][0], runs[2 + i][0])
        for found, want in zip(runs[i][1:], runs[2 + i][1:], strict=True):
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_meta_and_fake(no_fallback):
    meta = fastnn.fake_quantize(torch.empty(4, 3, device="meta").t(), torch.empty(3, device="meta"), axis=0)
    assert (meta.device.type, meta.stride()) == ("meta", (1, 3))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.randn(3, 4))
        assert fastnn.fake_quantize(fake, 0.1).shape == (3, 4)


# ---- bad arguments -----------------------------------------------------------------------------------------------

X = torch.randn(4, 6)
BAD = {
    "x": (TypeError, "x", ([1.0], 0.1), {}),
    "integers": (TypeError, "x", (X.long(), 0.1), {}),
    "scale 0": (ValueError, "scale.*0", (X, 0.0), {}),
    "scale negative": (ValueError, "scale.*-0.5", (X, -0.5), {}),
    "scale NaN": (ValueError, "scale", (X, math.nan), {}),
    "scale infinite": (ValueError, "scale.*inf", (X, math.inf), {}),
    "scale subnormal": (ValueError, "scale", (X, 1e-39), {}),
    "one scale of many": (ValueError, "scale.*-3", (X, torch.tensor([1, 2, -3, 1.0])), {"axis": 0}),
    "one scale of columns": (ValueError, "scale.*-3", (X, torch.tensor([1, 2, -3, 1, 1, 1.0])), {"axis": 1}),
    "scale's shape": (ValueError, "scale", (X, torch.ones(3)), {"axis": 0}),
    "scale text": (TypeError, "scale", (X, "0.1"), {}),
    "zero point low": (ValueError, "zero_point.*-129", (X, 0.1, -129), {}),
    "zero point high": (ValueError, "zero_point.*16", (X, 0.1, 16), {"dtype": "uint4"}),
    "no zero point in range": (ValueError, "zero_point.*1 to 5", (X, 0.1), {"quant_min": 1, "quant_max": 5}),
    "zero point NaN": (ValueError, "zero_point", (X, 0.1, torch.tensor(math.nan)), {}),
    "zero point's shape": (ValueError, "zero_point", (X, torch.ones(4), INTS), {"axis": 0}),
    "dtype": (ValueError, "dtype", (X, 0.1), {"dtype": torch.int16}),
    "dtype float8": (ValueError, "dtype", (X, 0.1), {"dtype": torch.float8_e4m3fn}),
    "axis": (ValueError, "axis", (X, 0.1), {"axis": 2}),
    "axis and groups": (ValueError, "axis", (X, 0.1), {"axis": 0, "group_size": 2}),
    "group": (ValueError, "group_size", (X, 0.1), {"group_size": 4}),
    "range": (ValueError, "quant_min", (X, 0.1), {"quant_min": 5, "quant_max": 4}),
    "beyond dtype": (ValueError, "quant_max", (X, 0.1), {"quant_max": 128}),
    "quant_min": (TypeError, "quant_min", (X, 0.1), {"quant_min": 1.0}),
    "rounding": (ValueError, "rounding", (X, 0.1), {"rounding": "up"}),
    "grad_factor": (ValueError, "grad_factor", (X, 0.1), {"grad_factor": math.nan}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    error, named, args, kwargs = BAD[name]
    with pytest.raises(error, match=named) as raised:
        fastnn.fake_quantize(*args, **kwargs)
    assert "fake_quantize" in str(raised.value)
