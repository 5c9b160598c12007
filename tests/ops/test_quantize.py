"""Quantization: torch's and the formulas' numbers, every granularity, bad input, tracing; the kernels' own tests are in
tests/kernels/test_quantize.py."""

import math

import pytest
import torch
from torch.library import opcheck

import fastnn
import fastnn.functional as fF
from fastnn import _state
from fastnn.backends.reference import quantize as formulas
from fastnn.ops._random import draw_seed

from .support import FLOATS

SCHEMES = tuple(formulas.STORAGE)
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
schemes = pytest.mark.parametrize("scheme", SCHEMES)


def is_float(scheme):
    return scheme not in formulas.RANGE


def assert_same(found, expected):
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if found.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        found, expected = found.float(), expected.float()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


# ---- the numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_torchs_own_numbers(axis, no_fallback):
    """torch's quantized tensors, which add zero points before they round, and its fake_quantize, which is there and back."""
    x = torch.randn(33, 130) * 4
    if axis is None:
        scale, zero_point = 0.05, 3
        theirs = torch.quantize_per_tensor(x, scale, 0, torch.qint8)
        fake = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, -128, 127)
    else:
        scale = torch.rand(x.shape[axis]) * 0.1 + 0.01
        zero_point = torch.randint(-128, 128, scale.shape)
        theirs = torch.quantize_per_channel(x, scale, torch.zeros(scale.shape), axis % 2, torch.qint8)
        fake = torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), axis % 2, -128, 127)
    assert torch.equal(fastnn.quantize(x, scale, dtype=torch.int8, axis=axis), theirs.int_repr())
    q = fastnn.quantize(x, scale, zero_point, dtype=torch.int8, axis=axis)
    assert torch.equal(fastnn.dequantize(q, scale, zero_point, axis=axis), fake)


@schemes
@dtypes
def test_there_and_back(scheme, dtype, no_fallback):
    """The error is half a step, within the range; that of a float8 half a unit in its last place."""
    x = torch.randn(6, 4, 128).to(dtype)
    for options in ({}, {"axis": 0}, {"axis": (0, 1)}, {"axis": -1}, {"group_size": 32}):
        q, scale, zero_point = fastnn.quantize_dynamic(x, dtype=scheme, symmetric=is_float(scheme), **options)
        again = fastnn.quantize(x, scale, zero_point, dtype=scheme, **options)
        assert_same(q, again)
        chosen = fF.choose_scale(x, dtype=scheme, symmetric=is_float(scheme), **options)
        assert_same(chosen[0], scale)
        assert (chosen[1] is None) == (zero_point is None) == is_float(scheme)
        back = fastnn.dequantize(q, scale, zero_point, dtype=torch.float64, from_dtype=scheme, **options)
        axes = [a % 3 for a in ([options["axis"]] if isinstance(options.get("axis"), int) else options.get("axis", ()))]
        step = formulas.spread(scale, x.shape, axes, options.get("group_size", 0)).double()
        if is_float(scheme):
            _, digits, least = formulas.FLOAT8[scheme]
            step = torch.maximum(x.double().abs() * 2.0**-digits, step * 2.0 ** (least - digits))
        assert ((back - x.double()).abs() <= step * 0.5001).all()


def test_granularities_by_hand(kernels, no_fallback):
    x = torch.tensor([[1.0, -2.0, 3.0, -4.0], [10.0, 20.0, -30.0, 40.0]])
    q, scale, zero_point = fastnn.quantize_dynamic(x)
    assert zero_point is None
    assert scale.shape == ()
    assert torch.equal(scale, torch.tensor(40.0) / 127)
    assert q.tolist() == [[3, -6, 10, -13], [32, 64, -95, 127]]
    assert fastnn.quantize_dynamic(x, axis=0)[1].tolist() == [(torch.tensor(m) / 127).item() for m in (4.0, 40.0)]
    assert fastnn.quantize_dynamic(x, axis=1)[1].shape == (4,)
    assert fastnn.quantize_dynamic(x, group_size=2)[1].shape == (2, 2)
    q, scale, zero_point = fastnn.quantize_dynamic(x, dtype=torch.uint8, symmetric=False, group_size=2)
    # Of 10 and 20 zero is the least number: lo = min(x, 0).
    assert zero_point.tolist() == [[170, 146], [0, 109]]
    assert q.tolist() == [[255, 0, 255, 0], [128, 255, 0, 255]]
    assert fastnn.quantize(x, torch.tensor([0.5]), dtype="int8").tolist() == [[2, -4, 6, -8], [20, 40, -60, 80]]


def test_packing_of_four_bits(kernels, no_fallback):
    x = torch.tensor([-8.0, -1.0, 7.0, 3.0])
    q = fastnn.quantize(x, 1.0, dtype=torch.int4)
    assert q.dtype is torch.uint8
    assert q.tolist() == [0xF8, 0x37]
    assert torch.equal(fastnn.dequantize(q, 1.0, from_dtype=torch.int4), x)
    assert fastnn.dequantize(q, 1.0, from_dtype="uint4").tolist() == [8, 15, 7, 3]
    assert fastnn.quantize(x, 1.0, 8, dtype="uint4").tolist() == [0x70, 0xBF]
    packed = torch.randint(0, 256, (5, 6), dtype=torch.uint8)
    for view in (packed, packed.t().contiguous().t(), packed[:, ::2], packed[1:4], packed[:1].expand(4, 6)):
        wide = torch.stack((view & 15, view >> 4), -1).flatten(-2).float()
        assert torch.equal(fastnn.dequantize(view, 0.5, from_dtype="uint4"), wide * 0.5)
    for g in (1, 3, 9, 27):
        x, scale = torch.randn(7, 54), torch.rand(7, 54 // g) + 0.1
        wide = (x.view(7, -1, g) * (1 / scale).unsqueeze(-1)).round().clamp(-8, 7).view(7, 54)
        q = fastnn.quantize(x, scale, dtype="int4", group_size=g)
        assert torch.equal(q, formulas.pack(wide))
        assert torch.equal(formulas.unpack(q, "int4").float(), wide)


@dtypes
def test_what_is_not_finite(dtype, kernels, no_fallback):
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0]).to(dtype)
    q = fastnn.quantize(x, 0.5, 7, dtype="uint8")
    assert q.tolist() == [7, 255, 0, 9]
    assert fastnn.dequantize(q, 0.5, 7).tolist() == [0, 124, -3.5, 1]
    assert fastnn.quantize(x, 0.5, dtype="int8", rounding="stochastic").tolist() == [0, 127, -128, 2]
    q = fastnn.quantize(x, 0.5, dtype=torch.float8_e4m3fn)
    assert q.float()[1:].tolist() == [448, -448, 2]
    assert q.float()[0].isnan()
    # Only what is finite has a say in the scale.
    q, scale, _ = fastnn.quantize_dynamic(x)
    assert torch.equal(scale, torch.tensor(1.0) / 127)
    assert q.tolist() == [0, 127, -128, 127]
    for nothing in (torch.zeros(4), torch.full((4,), math.nan), torch.zeros(0)):
        assert fastnn.quantize_dynamic(nothing.to(dtype))[1] == 1
    scale, zero_point = fF.choose_scale(torch.full((4,), 1e-40), dtype="uint8", symmetric=False)
    assert (scale.item(), zero_point.item()) == (2.0**-126, 0)
    largest = torch.finfo(torch.float32).max
    scale, zero_point = fF.choose_scale(torch.tensor([largest, -largest]), dtype="uint8", symmetric=False)
    assert scale.isfinite()
    assert zero_point in (127, 128)


def test_no_elements(kernels, no_fallback):
    for shape, options in (((0, 4), {"axis": 0}), ((3, 0), {"axis": 0}), ((3, 0), {}), ((2, 0, 6), {"group_size": 3})):
        x = torch.empty(shape)
        for scheme in ("int8", "int4"):
            q, scale, _ = fastnn.quantize_dynamic(x, dtype=scheme, **options)
            assert q.shape == (shape if scheme == "int8" else (*shape[:-1], shape[-1] // 2))
            assert scale.eq(1).all()
            back = fastnn.dequantize(q, scale, from_dtype=scheme, **options)
            assert back.shape == shape


@schemes
@dtypes
def test_layouts(scheme, dtype, kernels, no_fallback):
    x = torch.randn(3, 5, 4, 6).to(dtype)
    expected, scale, zero_point = fastnn.quantize_dynamic(x, dtype=scheme, axis=1, symmetric=is_float(scheme))
    for view in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(0, 3).contiguous().transpose(0, 3),
        torch.stack((torch.full_like(x, math.nan), x), -1)[..., 1],
        torch._neg_view(-x),
    ):
        found = fastnn.quantize(view, scale, zero_point, dtype=scheme, axis=1)
        assert_same(found, expected)
        if scheme not in formulas.PACKED:
            assert found.stride() == torch.empty_like(view).stride()
            back = fastnn.dequantize(found, scale, zero_point, axis=1)
            assert back.stride() == found.stride()
            assert_same(back, fastnn.dequantize(expected, scale, zero_point, axis=1))
        for a, b in zip(
            fastnn.quantize_dynamic(view, dtype=scheme, axis=1, symmetric=is_float(scheme)),
            (expected, scale, zero_point),
            strict=True,
        ):
            assert (a is None and b is None) or assert_same(a, b) is None
    strided = torch.stack((scale, scale), -1)[:, 0]
    assert_same(fastnn.quantize(x, strided, zero_point, dtype=scheme, axis=1), expected)


def test_kinds_of_scales_and_zero_points(kernels, no_fallback):
    x, scale = torch.randn(4, 6), torch.tensor([0.5, 0.25, 1.0, 2.0])
    expected = fastnn.quantize(x, scale, torch.tensor([0, 1, 2, 3], dtype=torch.int32), dtype="uint8", axis=0)
    for kind in (torch.bfloat16, torch.float16, torch.float64):
        for whole in (torch.uint8, torch.int8, torch.int64):
            found = fastnn.quantize(x, scale.to(kind), torch.arange(4, dtype=whole), dtype="uint8", axis=0)
            assert torch.equal(found, expected)
    assert torch.equal(fastnn.quantize(x, 1, dtype="int8"), fastnn.quantize(x, torch.ones(1), dtype="int8"))


# ---- stochastic rounding -----------------------------------------------------------------------------------------


def test_the_generator_decides(kernels, no_fallback):
    x = torch.randn(64, 64)

    def call(**options):
        return fastnn.quantize(x, 0.1, dtype="int8", rounding="stochastic", **options)

    torch.manual_seed(7)
    first, second = call(), call()
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    assert torch.equal(call(), first)
    torch.manual_seed(7)
    seed = draw_seed()
    assert torch.equal(first, formulas.quantize(x, torch.tensor(0.1), None, seed, [], 0, "int8"))
    generator = torch.Generator().manual_seed(7)
    state = torch.get_rng_state()
    assert torch.equal(call(generator=generator), first)
    assert torch.equal(call(generator=generator), second)
    assert torch.equal(torch.get_rng_state(), state)
    call_to_nearest = fastnn.quantize(x, 0.1, dtype="int8")
    assert torch.equal(torch.get_rng_state(), state)
    assert (first - call_to_nearest).abs().max() == 1
    # Of the same words whatever the layout.
    torch.manual_seed(7)
    assert torch.equal(fastnn.quantize(x.t().contiguous().t(), 0.1, dtype="int8", rounding="stochastic"), first)
    torch.manual_seed(7)
    q, scale, _ = fastnn.quantize_dynamic(x, rounding="stochastic", axis=0)
    torch.manual_seed(7)
    assert torch.equal(fastnn.quantize(x, scale, dtype="int8", axis=0, rounding="stochastic"), q)


@schemes
def test_stochastic_rounding_is_unbiased(scheme, no_fallback):
    """The mean over 400 draws of each of 1000 numbers, and over all of them, within 6 standard deviations."""
    x = torch.rand(1000) * 5.9
    draws = [
        fastnn.dequantize(fastnn.quantize(x, 1.0, dtype=scheme, rounding="stochastic"), 1.0, from_dtype=scheme)
        for _ in range(400)
    ]
    draws = torch.stack(draws).double()
    step = torch.ones(1000)
    if is_float(scheme):
        _, digits, least = formulas.FLOAT8[scheme]
        step = x.clamp(min=2.0**least) * 2.0**-digits  # or less
    error = draws.mean(0) - x
    assert (error.abs() <= 6 * 0.5 * step / math.sqrt(400)).all()
    assert error.mean().abs() <= 6 * 0.5 * step.mean() / math.sqrt(400 * 1000)
    assert draws.var(0).mean() > 0.01 * step.square().mean()  # (1/6 where fractions are uniform)


# ---- gradients, tracing, backends --------------------------------------------------------------------------------


@schemes
def test_no_gradient(scheme, no_fallback):
    x, scale = torch.randn(4, 6, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    q = fastnn.quantize(x, scale, dtype=scheme)
    results = [q, fastnn.dequantize(q, scale, from_dtype=scheme)]
    results += fastnn.quantize_dynamic(x, dtype=scheme, symmetric=is_float(scheme))[:2]
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize("scheme", ["int8", "uint4", "float8_e4m3fn"])
def test_opcheck(scheme):
    ops = torch.ops.fastnn
    zero_point = None if is_float(scheme) else torch.arange(4)
    scale = torch.rand(4) + 0.1
    everything = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    # Inputs that require grad: the results do not.
    for x in (torch.randn(4, 6, requires_grad=True), torch.randn(6, 4).t()):
        scale.requires_grad_(x.requires_grad)
        q = fastnn.quantize(x, scale, zero_point, dtype=scheme, axis=0)
        for seed in (None, torch.tensor(5)):
            opcheck(ops.quantize.default, (x, scale, zero_point, seed, [0], 0, scheme))
        symmetric = is_float(scheme)
        opcheck(ops.quantize_dynamic.default, (x, None, [], 3, scheme, symmetric))
        opcheck(ops.choose_scale.default, (x, [1], 0, scheme, symmetric))
        # torch's test of schemas compares inputs by allclose, which float8 has not.
        tests = everything[1:] if is_float(scheme) else everything
        opcheck(ops.dequantize.default, (q, scale, zero_point, [0], 0, scheme, torch.bfloat16), test_utils=tests)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic, no_fallback):
    torch._dynamo.reset()

    def network(x, scale):
        q, s, zero_point = fastnn.quantize_dynamic(x * 2, dtype=torch.int4, group_size=8, symmetric=False)
        y = fastnn.dequantize(q, s, zero_point, from_dtype=torch.int4, group_size=8)
        z = fastnn.quantize(y, scale, dtype="int8", axis=0, rounding="stochastic")
        s, _ = fF.choose_scale(x, dtype=torch.float8_e5m2)
        return fastnn.dequantize(z, scale, axis=0) + s + fastnn.quantize(x, s, dtype=torch.float8_e5m2).float() + x

    compiled = torch.compile(network, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (3, 5) if dynamic else (3,):
        x, scale = torch.randn(n, 48, requires_grad=True), torch.rand(n) + 0.1
        torch.manual_seed(1)
        ours = compiled(x, scale)
        torch.manual_seed(1)
        assert torch.equal(ours, network(x, scale))
        assert torch.equal(torch.autograd.grad(ours.sum(), x)[0], torch.ones_like(x))
    with pytest.raises(ValueError, match="scale"):
        compiled(x, -scale)


def test_meta_fake_and_export(no_fallback):
    meta = torch.empty(4, 6, device="meta").t()
    q = fastnn.quantize(meta, 0.1, dtype="int8")
    assert (q.device.type, q.dtype, q.stride()) == ("meta", torch.int8, (1, 6))
    assert fastnn.quantize(meta, 0.1, dtype="int4").shape == (6, 2)
    assert [t.shape for t in fastnn.quantize_dynamic(meta, axis=0, dtype="uint8", symmetric=False)] == [
        (6, 4),
        (6,),
        (6,),
    ]
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.randn(4, 6))
        for scheme in SCHEMES:
            q = fastnn.quantize(fake, 0.1, dtype=scheme, rounding="stochastic")
            assert fastnn.dequantize(q, 0.1, from_dtype=scheme).shape == (4, 6)

    class Model(torch.nn.Module):
        def forward(self, x):
            q, scale, _ = fastnn.quantize_dynamic(x, dtype="float8_e4m3fn", axis=0)
            return fastnn.dequantize(q, scale, axis=0)

    x = torch.randn(3, 8)
    program = torch.export.export(Model(), (x,))
    assert "fastnn.quantize_dynamic" in str(program.graph)
    assert torch.equal(program.module()(x), Model()(x))


@schemes
def test_vmap(scheme, no_fallback):
    x = torch.randn(4, 3, 8)
    symmetric = is_float(scheme)
    for options, shape in (({}, ()), ({"axis": 0}, (3,)), ({"axis": (0, 1)}, (3, 8)), ({"group_size": 4}, (3, 2))):
        scale = torch.rand(4, *shape) + 0.1

        def there(x, scale, options=options):
            return fastnn.quantize(x, scale, dtype=scheme, **options)

        def back(q, scale, options=options):
            return fastnn.dequantize(q, scale, from_dtype=scheme, **options)

        for dims in ((0, 0), (0, None), (None, 0)):
            args = [a if dim == 0 else a[0] for a, dim in zip((x, scale), dims, strict=True)]
            rows = [[a[i] if dim == 0 else a for a, dim in zip(args, dims, strict=True)] for i in range(4)]
            q = torch.vmap(there, in_dims=dims)(*args)
            assert_same(q, torch.stack([there(*row) for row in rows]))
            found = torch.vmap(back, in_dims=(0, dims[1]))(q, args[1])
            assert_same(found, torch.stack([back(q[i], row[1]) for i, row in enumerate(rows)]))

        def chosen(x, options=options):
            q, scale, zero_point = fastnn.quantize_dynamic(x, dtype=scheme, symmetric=symmetric, **options)
            again = fF.choose_scale(x, dtype=scheme, symmetric=symmetric, **options)
            return (q, scale, again[0]) if symmetric else (q, scale, zero_point, *again)

        columns = zip(*(chosen(row) for row in x), strict=True)
        for a, b in zip(torch.vmap(chosen)(x), columns, strict=True):
            assert_same(a, torch.stack(b))

    def random(row):
        return fastnn.quantize(row, 0.5, dtype=scheme, rounding="stochastic")

    torch.manual_seed(3)
    same = torch.vmap(random, randomness="same")(x)
    torch.manual_seed(3)
    assert_same(same[0], random(x[0]))
    different = torch.vmap(random, randomness="different")(x[:1].expand(4, 3, 8))
    assert len({tuple(row.float().flatten().tolist()) for row in different}) > 1


def test_reference_backend(no_fallback):
    x = torch.randn(5, 8)
    for scheme in SCHEMES:
        ours = fastnn.quantize_dynamic(x, dtype=scheme, symmetric=is_float(scheme), axis=0)
        with fastnn.backend("reference"):
            theirs = fastnn.quantize_dynamic(x, dtype=scheme, symmetric=is_float(scheme), axis=0)
            assert_same(theirs[0], ours[0])
            with pytest.raises(ValueError, match="scale"):
                fastnn.quantize(x, 0.0, dtype=scheme)
    with fastnn.backend("reference"), pytest.raises(ValueError, match="zero_point"):
        fastnn.quantize(x, 1.0, 200, dtype="int8")


def test_autocast_leaves_it_alone(no_fallback):
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fastnn.quantize(x, 0.01, dtype="int8"), fastnn.quantize(x.clone(), 0.01, dtype="int8"))
        assert fastnn.dequantize(torch.ones(3, dtype=torch.int8), 0.3).dtype is torch.float32


class Tagged(torch.Tensor):
    pass


def test_what_the_kernels_do_not_take_is_counted():
    _state.reset_fallbacks()
    x = torch.randn(3, 4)
    q = fastnn.quantize(x.as_subclass(Tagged), 0.1, dtype="int8")
    assert torch.equal(q.as_subclass(torch.Tensor), fastnn.quantize(x, 0.1, dtype="int8"))
    ((op, reason),) = _state.fallbacks()
    assert op == "quantize"
    assert "Tagged" in reason
    with pytest.raises(fastnn.FallbackError), fastnn.strict():
        fastnn.quantize(x.as_subclass(Tagged), 0.1, dtype="int8")
    _state.reset_fallbacks()


# ---- bad input ---------------------------------------------------------------------------------------------------

X, Q = torch.randn(4, 6), torch.ones(4, 6, dtype=torch.int8)
BAD_QUANTIZE = {
    "scale 0": ((X, 0.0), {}, ValueError, "scale.*got 0"),
    "scale below 0": ((X, torch.tensor([1.0, 1.0, 1.0, -2.0])), {"axis": 0}, ValueError, "scale.*got -2"),
    "scale NaN": ((X, math.nan), {}, ValueError, "scale.*nan"),
    "scale infinite": ((X, math.inf), {}, ValueError, "scale.*inf"),
    "scale subnormal": ((X, 1e-40), {}, ValueError, "scale"),
    "scale too large": ((X, torch.tensor(1e300, dtype=torch.float64)), {}, ValueError, "scale.*inf"),
    "scale's shape": ((X, torch.ones(3)), {"axis": 0}, ValueError, r"scale of shape \(4,\)"),
    "scale of one": ((X, torch.ones(1)), {"axis": 0}, ValueError, "scale of shape"),
    "scale text": ((X, "1"), {}, TypeError, "scale"),
    "scale integer": ((X, torch.ones(4, dtype=torch.int32)), {"axis": 0}, TypeError, "scale"),
    "zero point above": ((X, 1.0, 128), {}, ValueError, "zero_point.*128"),
    "zero point below": ((X, 1.0, -1), {"dtype": "uint8"}, ValueError, "zero_point.*-1"),
    "zero point of int4": ((X, 1.0, torch.tensor(8)), {"dtype": "int4"}, ValueError, "zero_point.*8"),
    "zero point wide": ((X, 1.0, 1 << 40), {}, ValueError, "zero_point"),
    "zero point real": ((X, 1.0, 0.5), {}, TypeError, "zero_point"),
    "zero point of reals": ((X, 1.0, torch.tensor(1.0)), {}, TypeError, "zero_point"),
    "zero point's shape": (
        (X, torch.ones(4), torch.zeros(1, dtype=torch.int32)),
        {"axis": 0},
        ValueError,
        "zero_point",
    ),
    "zero point of float8": ((X, 1.0, 0), {"dtype": "float8_e5m2"}, ValueError, "zero_point"),
    "dtype unknown": ((X, 1.0), {"dtype": "int3"}, ValueError, "dtype.*int3"),
    "dtype int32": ((X, 1.0), {"dtype": torch.int32}, ValueError, "dtype.*int32"),
    "dtype no dtype": ((X, 1.0), {"dtype": 8}, TypeError, "dtype"),
    "input of integers": ((Q, 1.0), {}, TypeError, "input.*int8"),
    "input no tensor": (([1.0], 1.0), {}, TypeError, "input"),
    "input sparse": ((X.to_sparse(), 1.0), {}, TypeError, "input"),
    "odd size": ((X[:, :5], 1.0), {"dtype": "int4"}, ValueError, "even"),
    "no dimension": ((torch.tensor(1.0), 1.0), {"dtype": "uint4"}, ValueError, "even"),
    "axis above": ((X, 1.0), {"axis": 2}, ValueError, "axis"),
    "axis below": ((X, 1.0), {"axis": -3}, ValueError, "axis"),
    "axis twice": ((X, 1.0), {"axis": (1, -1)}, ValueError, "axis"),
    "axis downwards": ((X, 1.0), {"axis": (1, 0)}, ValueError, "axis"),
    "axis text": ((X, 1.0), {"axis": "0"}, TypeError, "axis"),
    "axis bool": ((X, 1.0), {"axis": True}, TypeError, "axis"),
    "group that does not divide": ((X, 1.0), {"group_size": 4}, ValueError, "group_size.*4"),
    "group of none": ((X, 1.0), {"group_size": 0}, ValueError, "group_size"),
    "group below": ((X, 1.0), {"group_size": -2}, ValueError, "group_size"),
    "group real": ((X, 1.0), {"group_size": 2.0}, TypeError, "group_size"),
    "group bool": ((X, 1.0), {"group_size": True}, TypeError, "group_size"),
    "group and axis": ((X, 1.0), {"group_size": 2, "axis": 0}, ValueError, "axis"),
    "rounding": ((X, 1.0), {"rounding": "up"}, ValueError, "rounding.*up"),
    "rounding no text": ((X, 1.0), {"rounding": []}, ValueError, "rounding"),
}
OF_VALUES = ("scale below 0", "scale too large", "zero point of int4")
BAD_DEQUANTIZE = {
    "scale 0": ((Q, 0.0), {}, ValueError, "scale"),
    "zero point": ((Q, 1.0, 200), {}, ValueError, "zero_point"),
    "numbers": ((X, 1.0), {}, ValueError, "float32"),
    "int4 in int8": ((Q, 1.0), {"from_dtype": "int4"}, TypeError, "uint8"),
    "uint8 as int8": ((Q.byte(), 1.0), {"from_dtype": "int8"}, TypeError, "int8"),
    "from_dtype unknown": ((Q, 1.0), {"from_dtype": "int5"}, ValueError, "from_dtype.*int5"),
    "from_dtype no dtype": ((Q, 1.0), {"from_dtype": 4}, TypeError, "from_dtype"),
    "dtype": ((Q, 1.0), {"dtype": torch.int32}, ValueError, "dtype.*int32"),
    "dtype text": ((Q, 1.0), {"dtype": "float32"}, ValueError, "dtype"),
    "no dimension": ((torch.tensor(1, dtype=torch.uint8), 1.0), {"from_dtype": "int4"}, ValueError, "input"),
    "group that does not divide": ((Q, torch.ones(4, 1)), {"group_size": 5}, ValueError, "group_size"),
    "group of packed": (
        (Q.byte(), torch.ones(4, 2)),
        {"group_size": 5, "from_dtype": "int4"},
        ValueError,
        "group_size",
    ),
    "no tensor": (([1], 1.0), {}, TypeError, "input"),
}
BAD_DYNAMIC = {
    "unsigned": ((X,), {"dtype": "uint8"}, ValueError, "symmetric"),
    "float8": ((X,), {"dtype": "float8_e5m2", "symmetric": False}, ValueError, "symmetric"),
    "symmetric": ((X,), {"symmetric": 1}, TypeError, "symmetric"),
    "dtype": ((X,), {"dtype": torch.float16}, ValueError, "dtype"),
    "input": ((Q,), {}, TypeError, "input"),
    "group": ((X,), {"group_size": 5}, ValueError, "group_size"),
    "axis": ((X,), {"axis": 5}, ValueError, "axis"),
}


@pytest.mark.parametrize("name", BAD_QUANTIZE)
def test_bad_arguments_of_quantize(name, kernels):
    args, kwargs, error, named = BAD_QUANTIZE[name]
    if kernels == "cuda" and name in OF_VALUES:
        pytest.skip("on a GPU nobody waits for the values in a tensor")
    with pytest.raises(error, match=named):
        fastnn.quantize(*args, **{"dtype": "int8", **kwargs})


@pytest.mark.parametrize("name", BAD_DEQUANTIZE)
def test_bad_arguments_of_dequantize(name):
    args, kwargs, error, named = BAD_DEQUANTIZE[name]
    with pytest.raises(error, match=named):
        fastnn.dequantize(*args, **kwargs)


@pytest.mark.parametrize("name", BAD_DYNAMIC)
def test_bad_arguments_of_a_choice(name):
    args, kwargs, error, named = BAD_DYNAMIC[name]
    for function in (fastnn.quantize_dynamic, fF.choose_scale):
        with pytest.raises(error, match=named):
            function(*args, **kwargs)
    with pytest.raises(ValueError, match="even"):
        fastnn.quantize_dynamic(X[:, :5], dtype="int4")
    with pytest.raises(ValueError, match="rounding"):
        fastnn.quantize_dynamic(X, rounding=None)
