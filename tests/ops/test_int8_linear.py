"""The int8 linear layer: exact against int64 sums and float32 written out here, on every instruction set."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import fastnn
import fastnn.functional as fF
from fastnn import _cpu
from fastnn.backends import cpu

INPUTS = (torch.float32, torch.bfloat16, torch.float16)
ISAS = _cpu.available_isas()
dtypes = pytest.mark.parametrize("dtype", INPUTS, ids=lambda d: str(d).removeprefix("torch."))
EXACT = ("none", "relu", "relu6")
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def quantized(x):
    """Rows to uint8, asymmetric, as the module's docstring and fbgemm choose them: q, scales, zero points."""
    x = x.float()
    finite = torch.where(x.isfinite(), x, 0.0)
    zeros = x.new_zeros(*x.shape[:-1], 1)
    finite = torch.cat((finite, zeros), -1)
    low, high = finite.amin(-1, keepdim=True), finite.amax(-1, keepdim=True)
    steps = torch.full_like(low, 255)
    scale = high / steps - low / steps
    scale = torch.where(scale == 0, 1.0, scale.clamp(min=2.0**-126))
    zero = (-torch.round(low / scale)).clamp(0, 255)
    return static(x, scale, zero), scale, zero.long()


def static(x, scale, zero):
    y = x.float() * (torch.ones_like(scale) / scale)
    return torch.where(y.isnan(), zero.float(), y.round() + zero.float()).clamp(0, 255).long()


def expected(x, weight, scale, bias=None, input_scale=None, input_zero_point=None, activation="none"):
    if input_scale is None:
        q, sx, zero = quantized(x)
    else:
        sx = torch.tensor(float(input_scale))
        zero = torch.tensor(128 if input_zero_point is None else int(input_zero_point))
        q = static(x, sx, zero)
    sums = q @ weight.long().t() - zero * weight.long().sum(1)
    assert sums.numel() == 0 or sums.abs().max() < 2**31
    y = sums.float() * (sx * scale.float().reshape(-1))
    if bias is not None:
        y = y + bias.float()
    return ACTIVATIONS[activation](y).to(x.dtype)


def weights(n, k):
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    return weight, torch.rand(n) * 0.01 + 1e-3


def assert_same(result, want):
    assert (result.shape, result.dtype, result.is_contiguous()) == (want.shape, want.dtype, True)
    # equal_nan: an infinity times 0 in the bias; the sign of a zero has to agree as well.
    assert torch.equal(result.isnan(), want.isnan())
    assert torch.equal(result.nan_to_num(7.0), want.nan_to_num(7.0))


#: Rows × out × in: primes, and tiles ± 1 in every dimension (rows of 14 and 32, columns of 8, 16 and 32, words of 2, 4 and 64).
SHAPES = [
    *(
        (m, n, k)
        for m, n, k in ((1, 1, 1), (1, 7, 3), (2, 33, 5), (3, 31, 63), (5, 16, 65), (13, 32, 64), (14, 17, 66))
    ),
    *(
        (m, n, k)
        for m, n, k in ((15, 64, 127), (16, 65, 128), (29, 96, 130), (31, 33, 1024), (33, 15, 1027), (64, 47, 257))
    ),
]


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_exact(shape, dtype, machine, no_fallback):
    m, n, k = shape
    weight, scale = weights(n, k)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n)
    packed = fF.pack_int8_weight(weight)
    for activation in EXACT if machine in ISAS else EXACT[k % 3 : k % 3 + 1]:  # what plays a GPU is slow
        want = expected(x, weight, scale, bias, activation=activation)
        assert_same(fF.int8_linear(x, weight, scale, bias, activation=activation, packed=packed), want)
        assert_same(fF.int8_linear(x, weight, scale, bias, activation=activation), want)
    want = expected(x, weight, scale, None, 0.02, 100)
    for each in (packed, None):
        assert_same(fF.int8_linear(x, weight, scale, input_scale=0.02, input_zero_point=100, packed=each), want)
    assert_same(
        fF.int8_linear(x, weight, scale[:1], bias.to(dtype), input_scale=torch.tensor(0.02), packed=packed),
        expected(x, weight, scale[:1], bias.to(dtype), 0.02),
    )


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - set(EXACT)))
def test_other_activations(activation, machine, no_fallback):
    weight, scale = weights(37, 50)
    x = torch.randn(5, 50)
    want = expected(x, weight, scale / 10, activation=activation)
    torch.testing.assert_close(fF.int8_linear(x, weight, scale / 10, activation=activation), want, rtol=2e-6, atol=1e-7)


def test_gelu_everywhere(machine, no_fallback):
    """Of exactly known arguments: 1 · ±1 · weight_scale."""
    y = torch.cat((torch.linspace(-9, 9, 3001), torch.tensor([1e-30, -1e-30, 100.0, -100.0, 3e38, -3e38])))
    y = y[y != 0]
    found = fF.int8_linear(
        torch.ones(1, 1), y.sign().to(torch.int8).unsqueeze(1), y.abs(), input_scale=1.0, activation="gelu"
    )[0]
    want = F.gelu(y.double())
    assert ((found - want).abs() <= 3e-7 * y.double().abs()).all()
    assert (found[y < -6] == 0).all()
    assert torch.equal(found[y > 6], y[y > 6])


def layouts(x):
    yield x
    yield x.t().contiguous().t()
    spread = torch.full((*x.shape, 3), math.nan, dtype=x.dtype) if x.is_floating_point() else x.new_zeros(*x.shape, 3)
    spread[..., 1] = x
    yield spread[..., 1]
    wide = x.new_zeros(x.shape[0], x.shape[1] + 5)
    wide[:, 3:-2] = x
    yield wide[:, 3:-2]
    yield x[:1].expand(x.shape)


@dtypes
def test_any_layout(dtype, machine, no_fallback):
    weight, scale = weights(19, 37)
    bias = torch.randn(19)
    for i, x in enumerate(layouts(torch.randn(17, 37).to(dtype))):
        for j, w in enumerate(layouts(weight)):
            if machine not in ISAS and i and j and i != j:
                continue
            want = expected(x, w, scale, bias)
            assert_same(fF.int8_linear(x, w, scale, bias), want)
            assert_same(fF.int8_linear(x, w, scale, bias, packed=fF.pack_int8_weight(w)), want)
    spread = torch.full((19, 2), math.nan)
    spread[:, 0] = bias
    assert_same(
        fF.int8_linear(x, weight, spread[:, :1].abs()[:, 0], spread[:, 0]), expected(x, weight, bias.abs(), bias)
    )
    x = torch.randn(2, 3, 37).to(dtype)
    for view in (x, x.transpose(0, 1), x[:, ::2]):
        assert_same(fF.int8_linear(view, weight, scale), expected(view, weight, scale))
    assert_same(fF.int8_linear(x[0, 0], weight, scale), expected(x[0, 0], weight, scale))


@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0), (2, 0, 5, 7)], ids=str)
def test_zero_sizes(shape, machine, no_fallback):
    *rows, n, k = shape
    weight, scale = weights(n, k)
    x, bias = torch.randn(*rows, k), torch.randn(n)
    packed = fF.pack_int8_weight(weight)
    for options in ({}, {"input_scale": 0.1, "input_zero_point": 3}):
        for each in (packed, None):
            result = fF.int8_linear(x, weight, scale, bias, packed=each, **options)
            assert result.shape == (*rows, n)
            assert torch.equal(result, bias.expand(result.shape))


@pytest.mark.parametrize("k", [4096, 65793])
def test_nothing_saturates(k, machine, no_fallback):
    """The largest sums: vpmaddubsw would saturate at 16 bits, and one column more at 32."""
    x = torch.ones(3, k)
    x[1, 0] = -1  # a zero point in the middle
    x[2] = -1
    for value in (-128, 127) if machine in ISAS or k == 4096 else (-128,):
        weight = torch.full((5, k), value, dtype=torch.int8)
        weight[1, ::2] = -value - 1
        scale = torch.full((5,), 2.0**-7)
        for each in (fF.pack_int8_weight(weight), None):
            assert_same(fF.int8_linear(x, weight, scale, packed=each), expected(x, weight, scale))
            found = fF.int8_linear(x, weight, scale, input_scale=1 / 255, input_zero_point=0, packed=each)
            assert_same(found, expected(x, weight, scale, None, 1 / 255, 0))


def test_more_columns_are_refused():
    weight = torch.zeros(1, 65794, dtype=torch.int8)
    with pytest.raises(ValueError, match="weight: expected at most 65793 columns"):
        fF.int8_linear(torch.ones(1, 65794), weight, torch.ones(1))


@dtypes
def test_what_is_not_finite(dtype, machine, no_fallback):
    weight, scale = weights(9, 67)
    x = torch.randn(8, 67).to(dtype)
    x[0, 3] = math.nan
    x[1, 5], x[1, 66] = math.inf, -math.inf
    x[2] = math.nan
    x[3] = math.inf
    x[4] = 0
    x[5] = torch.finfo(dtype).max
    x[5, ::2] *= -1
    x[6] = torch.finfo(dtype).smallest_normal
    x[7] = -torch.finfo(dtype).smallest_normal / 4
    for options in ({}, {"input_scale": 0.01, "input_zero_point": 7}):
        want = expected(x, weight, scale, **options)
        assert_same(fF.int8_linear(x, weight, scale, **options), want)
        # A row does not change the others'.
        assert_same(fF.int8_linear(x[6:], weight, scale, **options), want[6:])


def rows_back(x, dtype=torch.float32):
    """The rows of x as the layer rounds them: times a weight of ones on the diagonal. Packed or not, the same."""
    k = x.shape[-1]
    weight = torch.eye(k, dtype=torch.int8)
    y = fF.int8_linear(x.to(dtype), weight, torch.ones(1))
    assert_same(fF.int8_linear(x.to(dtype), weight, torch.ones(1), packed=fF.pack_int8_weight(weight)), y)
    return y


def assert_nearest(y, x):
    """In float64: y is the multiple of the row's step nearest to x within the row's range; NaN is 0."""
    y, x = y.double(), x.double()
    finite = torch.where(x.isfinite(), x, 0.0)
    low, high = finite.amin(-1, keepdim=True).clamp(max=0), finite.amax(-1, keepdim=True).clamp(min=0)
    step = (high - low) / 255
    step = torch.where(step == 0, 1.0, step).clamp(min=2.0**-126)
    least = -(-low / step).round()
    exact = torch.where(x.isnan(), 0.0, x / step).clamp(least - 0.5, least + 255.5)
    steps = (y / step).round()
    # Five roundings of float32 decide which integer is nearest; the product with the scale is rounded once more.
    assert ((y - steps * step).abs() <= 6 * 2.0**-24 * y.abs()).all()
    assert ((steps - exact).abs() <= 0.5 + 5 * 2.0**-24 * exact.abs()).all()
    # The zero point itself may be a tie.
    assert ((steps >= least - 1) & (steps <= least + 256)).all()


@pytest.mark.parametrize("k", [1, 2, 7, 15, 16, 17, 31, 33, 64, 65, 127, 130, 257])
def test_rows_become_the_nearest_integers(k, machine, no_fallback):
    for m in (1, 5, 33) if machine in ISAS else (1 + k % 33,):
        # Rows of every size, of one sign, of zeros, with what is not finite; each in every layout.
        x = torch.randn(m, k) * 2.0 ** torch.randint(-60, 60, (m, 1))
        x[1::7] = x[1::7].abs()
        x[2::7] = -x[2::7].abs()
        x[3::7] = 0
        x[4::7, ::3], x[4::7, 1::5], x[4::7, 2::5] = math.nan, math.inf, -math.inf
        for view in layouts(x):
            y = rows_back(view)
            assert_nearest(y, view)
            assert (y[view.isnan()] == 0).all()
        for dtype in (torch.bfloat16, torch.float16):
            narrow = x.to(dtype)
            assert_same(rows_back(narrow, dtype), rows_back(narrow.float()).to(dtype))


@dtypes
@pytest.mark.parametrize("sign", [1, -1])
def test_halves_of_rows_go_to_even(sign, dtype, machine, no_fallback):
    """Steps of a power of two, by which everything divides exactly: 0 to 255 of them."""
    halves = torch.arange(0.5, 128)  # 127.5 has the bits of bfloat16
    for exponent in (-6, 0, 5) if machine in ISAS else (-6,):
        x = sign * torch.cat((halves, torch.tensor([255.0, 0.0]))) * 2.0**exponent
        want = sign * torch.cat((2 * ((halves + 0.5) / 2).floor(), torch.tensor([255.0, 0.0]))) * 2.0**exponent
        assert torch.equal(rows_back(x.unsqueeze(0), dtype)[0].float(), want)


def test_rows_of_the_least_numbers(machine, no_fallback):
    """No step is below the least normal number: what is smaller than half of it is 0."""
    least = 2.0**-126
    x = torch.tensor(
        [[least, least / 2, least * 0.75, -least, 2.0**-149, 0.0], [2.0**-149, 0, 0, 0, 0, 0], [least] * 6]
    )
    want = torch.tensor([[least, 0, least, -least, 0, 0], [0.0] * 6, [least] * 6])
    assert torch.equal(rows_back(x), want)
    assert torch.equal(rows_back(255 * least * torch.tensor([[1.0, 0.5, -0.0]]))[0, :1], torch.tensor([255 * least]))


@pytest.mark.parametrize("shape", [(1, 500, 300), (130, 200, 260), (40, 1025, 129)], ids=str)
def test_threads_and_rows(shape, machine, no_fallback):
    """The bits depend neither on how many threads there are nor on how many other rows."""
    m, n, k = shape
    weight, scale = weights(n, k)
    x, bias = torch.randn(m, k), torch.randn(n)
    packed = fF.pack_int8_weight(weight)
    result = fF.int8_linear(x, weight, scale, bias, packed=packed)
    for threads in (1, 2, 3) if machine in ISAS else ():
        torch.set_num_threads(threads)
        assert torch.equal(fF.int8_linear(x, weight, scale, bias, packed=packed), result)
        assert torch.equal(fF.pack_int8_weight(weight), packed)
    assert torch.equal(fF.int8_linear(x, weight, scale, bias), result)
    for rows in (1, 15):
        assert torch.equal(fF.int8_linear(x[:rows], weight, scale, bias, packed=packed), result[:rows])


def test_large(no_fallback):
    """Many blocks of rows, results that the caching allocator makes, and panels that collide in L1."""
    for m, n, k in ((700, 600, 1024), (300, 70, 4096)):
        weight, scale = weights(n, k)
        x = torch.randn(m, k)
        result = fF.int8_linear(x, weight, scale, packed=fF.pack_int8_weight(weight))
        q, sx, zero = quantized(x)
        # float64 holds these sums exactly, and multiplies faster than int64.
        sums = (q - zero).double() @ weight.double().t()
        assert torch.equal(result, sums.float() * (sx * scale))


def test_long_way(no_fallback):
    """Arguments that the short way leaves to Python give the same."""
    weight, scale = weights(12, 20)
    x, bias = torch.randn(4, 20), torch.randn(12)
    want = expected(x, weight, scale, bias, 0.03, 12)
    point = torch.tensor(12)
    for zero_point in (12, point, point.to(torch.uint8), torch.tensor([12], dtype=torch.int32)):
        for input_scale in (0.03, torch.tensor(0.03), torch.tensor([0.03])):
            assert_same(
                fF.int8_linear(x, weight, scale, bias, input_scale=input_scale, input_zero_point=zero_point), want
            )
    half = scale.to(torch.bfloat16)
    assert_same(fF.int8_linear(x, weight, half), expected(x, weight, half))
    assert_same(fF.int8_linear(x, weight, torch.tensor(0.5)), expected(x, weight, torch.tensor([0.5])))
    with fastnn.backend("reference"):
        assert_same(fF.int8_linear(x, weight, scale, bias), expected(x, weight, scale, bias))
        assert_same(fF.int8_linear(x, weight, scale, bias, input_scale=0.03, input_zero_point=12), want)


def test_packed_elsewhere(use_isa, no_fallback):
    """What was packed on one instruction set is right on all."""
    weight, scale = weights(40, 70)
    x = torch.randn(6, 70)
    want = expected(x, weight, scale)
    packed = []
    for name in ISAS:
        use_isa(name)
        packed.append(fF.pack_int8_weight(weight))
    for name in ISAS:
        use_isa(name)
        for each in (*packed, torch.zeros(7, dtype=torch.uint8), packed[0][1:]):
            assert_same(fF.int8_linear(x, weight, scale, packed=each), want)


BAD = {
    "input: expected a Tensor": (TypeError, {"input": [1.0]}),
    "input of float32, bfloat16 or float16": (TypeError, {"input": torch.ones(2, 3, dtype=torch.float64)}),
    "input to be dense": (TypeError, {"input": torch.ones(2, 3, dtype=torch.int32)}),
    "weight: expected a Tensor": (TypeError, {"weight": None}),
    "weight to be dense, of int8": (TypeError, {"weight": torch.ones(4, 3)}),
    r"weight \(N, K\)": (ValueError, {"weight": torch.ones(4, dtype=torch.int8)}),
    r"input \(..., K\) and weight": (ValueError, {"input": torch.ones(2, 4)}),
    "weight_scale: expected a Tensor": (TypeError, {"weight_scale": "a"}),
    r"weight_scale of shape \(4,\)": (ValueError, {"weight_scale": torch.ones(3)}),
    "weight_scale to be dense": (TypeError, {"weight_scale": torch.ones(4, dtype=torch.int8)}),
    "bias: expected a Tensor": (TypeError, {"bias": 1.0}),
    r"bias \(N\)": (ValueError, {"bias": torch.ones(3)}),
    "activation: expected one of": (ValueError, {"activation": "swish"}),
    "input_zero_point: expected None": (ValueError, {"input_zero_point": 3}),
    "input_zero_point: expected a Tensor or a number": (TypeError, {"input_scale": 1.0, "input_zero_point": 1.5}),
    "input_zero_point: expected 0 to 255": (ValueError, {"input_scale": 1.0, "input_zero_point": 256}),
    "input_zero_point: expected 0 to 255, got -1": (ValueError, {"input_scale": 1.0, "input_zero_point": -1}),
    r"input_scale of shape \(\)": (ValueError, {"input_scale": torch.ones(2)}),
    "packed: expected what pack_int8_weight gave": (TypeError, {"packed": torch.ones(3)}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    kind, changed = BAD[message]
    good = {"input": torch.ones(2, 3), "weight": torch.ones(4, 3, dtype=torch.int8), "weight_scale": torch.ones(4)}
    with pytest.raises(kind, match=message):
        fF.int8_linear(**{**good, **changed})


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 1e-39])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_scales(value, backend):
    x, weight = torch.ones(2, 3), torch.ones(4, 3, dtype=torch.int8)
    bad = torch.ones(4)
    bad[2] = value
    with fastnn.backend(backend):
        for scale in (bad, bad[2:3]):
            with pytest.raises(ValueError, match="scale: expected"):
                fF.int8_linear(x, weight, scale)
        with pytest.raises(ValueError, match="scale: expected"):
            fF.int8_linear(x, weight, torch.ones(4), input_scale=value)


# ---- gradients and tracers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_gradients(activation, backend, no_fallback):
    """As if nothing were rounded, but for what a static scheme saturates."""
    weight, scale = weights(6, 20)
    x, bias = torch.randn(2, 3, 20, requires_grad=True), torch.randn(6, requires_grad=True)
    grad = torch.randn(2, 3, 6)
    with fastnn.backend(backend):
        y = fF.int8_linear(x, weight, scale, bias, activation=activation)
        found = torch.autograd.grad(y, (x, bias), grad)
        inside = x.detach().abs() < 1
        y = fF.int8_linear(x, weight, scale, bias, input_scale=1 / 127.5, input_zero_point=128, activation=activation)
        (clipped,) = torch.autograd.grad(y, x, grad)
    exact = ACTIVATIONS[activation](F.linear(x, weight * scale[:, None], bias))
    want = torch.autograd.grad(exact, (x, bias), grad)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if activation == "none" else {"rtol": 0.1, "atol": 0.05}
    torch.testing.assert_close(found, want, **tolerance)
    torch.testing.assert_close(clipped == 0, ~inside | (found[0] == 0))


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    weight, scale = weights(5, 8)
    op = torch.ops.fastnn.int8_linear.default
    packed = fF.pack_int8_weight(weight)
    x, bias = torch.randn(2, 3, 8, requires_grad=grad), torch.randn(5, requires_grad=grad)
    opcheck(op, (x, weight, scale, bias, None, None, "none", packed))
    opcheck(op, (x.to(torch.bfloat16).detach(), weight, scale[:1], None, None, None, "gelu", None))
    opcheck(op, (x, weight, scale, bias, torch.tensor(0.1), torch.tensor(3, dtype=torch.int32), "relu", None))
    opcheck(torch.ops.fastnn.pack_int8_weight.default, (weight,))


def test_compile(no_fallback):
    weight, scale = weights(33, 20)
    packed = fF.pack_int8_weight(weight)

    def layer(x, bias):
        y = fF.int8_linear(x, weight, scale, bias, activation="relu", packed=packed)
        return y + fF.int8_linear(x, weight, scale, input_scale=0.02, input_zero_point=9)

    def packs(x):
        return fF.int8_linear(x, weight, scale, packed=fF.pack_int8_weight(weight))

    x, bias = torch.randn(4, 20), torch.randn(33)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, bias), layer(x, bias))
    x.requires_grad_()
    assert torch.equal(compiled(x, bias), layer(x, bias))
    torch.testing.assert_close(*(torch.autograd.grad(f(x, bias).square().sum(), x) for f in (compiled, layer)))
    assert torch.equal(torch.compile(packs, fullgraph=True, backend="aot_eager")(x), packs(x))


def test_vmap(no_fallback):
    weight, scale = weights(6, 10)
    x = torch.randn(3, 4, 10)
    for dim in range(2):
        found = torch.vmap(lambda x: fF.int8_linear(x, weight, scale), in_dims=dim)(x)
        assert torch.equal(found, fF.int8_linear(x.movedim(dim, 0), weight, scale))
    stack = torch.stack((weight, -weight - 1, weight.flip(0)))
    found = torch.vmap(lambda x, w: fF.int8_linear(x, w, scale, activation="relu"))(x, stack)
    assert torch.equal(found, torch.stack([expected(x[i], stack[i], scale, activation="relu") for i in range(3)]))


def test_paths(use_isa):
    """Which kernel ran."""
    weight, scale = weights(6, 10)
    for name in ISAS:
        use_isa(name)
        cpu.reset_counters()
        fF.int8_linear(torch.randn(2, 10), weight, scale)
        ran = [path for path, calls in cpu.counters().items() if calls]
        assert len(ran) == 1
        assert "u8s8" in ran[0]
        assert ran[0].startswith(name)
