"""Linear layers whose weight alone is quantized, against the formula in float64 and against aten's kernels."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import fastnn
import fastnn.functional as fF
from fastnn.backends.reference import weight_only as formulas
from fastnn.backends.reference.quantize import pack

INPUTS = (torch.float32, torch.bfloat16, torch.float16)
SCHEMES = ("int8", "int4", "uint4", "float8_e4m3fn", "float8_e5m2")
EPSILON = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def make(scheme, n, k, group=None, zeros=False, seed=0):
    """The arguments after input, and the weight in float64 with the sum that its error is measured by."""
    g = torch.Generator().manual_seed(seed)
    shape = (n,) if group is None else (n, k // group)
    scale = torch.rand(shape, generator=g) + 0.5
    keywords = {"group_size": group}
    zero = None
    if scheme.startswith("float8"):
        weight = torch.randn(n, k, generator=g).to(getattr(torch, scheme))
        q = size = weight.double()
    else:
        least, most = {"int8": (-128, 127), "int4": (-8, 7), "uint4": (0, 15)}[scheme]
        q = torch.randint(least, most + 1, (n, k), generator=g)
        weight = q.to(torch.int8) if scheme == "int8" else pack(q)
        size = q.double().abs()
        if scheme != "int8":
            keywords["from_dtype"] = scheme
        if zeros:
            zero = torch.randint(least, most + 1, shape, generator=g, dtype=torch.int32)
            spread = zero.double().reshape(n, -1).repeat_interleave(group or k, 1)
            q, size = q - spread, size + spread.abs()
    by = scale.double().reshape(n, -1).repeat_interleave(group or k, 1)
    return (weight, scale, zero), keywords, q.double() * by, size.abs() * by


def check(x, arguments, keywords, w, size, bias=None, extra=0.0):
    """Float32's bound for a sum in blocks, and one rounding of the result."""
    result = fF.weight_only_linear(x, *arguments, bias, **keywords)
    assert result.dtype is x.dtype and result.shape == (*x.shape[:-1], w.shape[0]) and result.is_contiguous()
    wanted = x.double() @ w.t()
    terms = x.double().abs() @ size.t()
    if bias is not None:
        wanted, terms = wanted + bias.double(), terms + bias.double().abs()
    k = x.shape[-1]
    allowed = (8 + math.sqrt(k)) * 2**-24 * terms + (EPSILON[x.dtype] * 1.01 + extra) * wanted.abs() + 1e-30
    error = (result.double() - wanted).abs()
    assert torch.all(error <= allowed), f"{(error / allowed).max().item():g} of the bound"
    return result


@pytest.mark.parametrize("dtype", INPUTS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_against_float64(machine, dtype, scheme, no_fallback):
    zeros = not scheme.startswith("float8")
    # Three bfloat16 of a float32 lose 2^-24 of each factor where tiles multiply.
    extra = 2**-15 if machine == "amx-emulated" and dtype is torch.float16 else 0.0
    cases = [
        (1, 37, 254, None, False),
        (3, 17, 130, None, zeros),
        (5, 5, 256, 32, zeros),
        (1, 66, 256, 64, False),
        (7, 33, 384, 128, zeros),
        (9, 34, 160, 32, False),
        (13, 19, 90, 18, zeros),  # groups that no vector fits
        (63, 35, 192, 32, zeros),
        (65, 40, 770, None, zeros),
        (70, 31, 1024, 64, zeros),
        (50, 20, 90, 10, False),
    ]
    if machine == "triton":  # its interpreter is slow: each scheme and each dtype sees all of them, not every pair
        cases = cases[(INPUTS.index(dtype) + SCHEMES.index(scheme)) % 3 :: 3]
    for m, n, k, group, with_zeros in cases:
        x = torch.randn(m, k).to(dtype)
        bias = torch.randn(n).to(dtype) if m % 2 else torch.randn(n)
        check(x, *make(scheme, n, k, group, with_zeros), bias=bias, extra=extra)


@pytest.mark.parametrize("scheme", ["int8", "int4", "uint4"])
def test_integers_are_exact(machine, scheme):
    for m, n, k, group in (
        (1, 35, 254, None),
        (6, 34, 256, 32),
        (13, 21, 128, 16),
        (66, 33, 258, None),
        (64, 66, 192, 64),
    ):
        (weight, scale, zero), keywords, _, _ = make(scheme, n, k, group, True)
        scale = torch.exp2(torch.randint(-3, 3, scale.shape).float())
        w = ((w_of(weight, scheme) - _spread(zero, n, k)) * _spread(scale, n, k)).double()
        for dtype in INPUTS:
            x = torch.randint(-4, 5, (m, k)).to(dtype)
            wanted = (x.double() @ w.t()).to(dtype)
            assert torch.equal(fF.weight_only_linear(x, weight, scale, zero, **keywords), wanted), (
                m,
                n,
                k,
                group,
                dtype,
            )


def w_of(weight, scheme):
    if scheme == "int8":
        return weight.double()
    low, high = (weight & 15).double(), (weight >> 4).double()
    q = torch.stack((low, high), -1).flatten(1)
    return torch.where(q > 7, q - 16, q) if scheme == "int4" else q


def _spread(x, n, k):
    x = x.double().reshape(n, -1)
    return x.repeat_interleave(k // x.shape[1], 1)


def test_every_byte_of_float8(machine):
    """NaN, infinities and denormals among them."""
    for name in ("float8_e4m3fn", "float8_e5m2"):
        weight = torch.arange(256, dtype=torch.uint8).repeat_interleave(2).view(256, 2)
        weight[:, 1] = 0
        weight = weight.view(getattr(torch, name))
        for dtype in INPUTS:
            for m in (1, 60):
                x = torch.ones(m, 2, dtype=dtype)
                result = fF.weight_only_linear(x, weight, torch.ones(256))
                wanted = weight[:, 0].to(torch.float32).expand(m, -1).to(dtype)
                torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True)


def test_infinities(machine):
    (weight, scale, zero), keywords, w, _ = make("uint4", 40, 128, 32, True)
    for dtype in INPUTS:
        for m in (2, 60):
            x = torch.randn(m, 128).to(dtype)
            x[0, 5], x[1, 70] = math.inf, -math.inf
            result = fF.weight_only_linear(x, weight, scale, zero, **keywords)
            assert torch.equal(result[:2].isnan(), (x.double() @ w.t())[:2].isnan())
            assert torch.equal(result[:2].isinf(), (x.double() @ w.t())[:2].isinf())
            assert result[2:].isfinite().all()


def test_any_layout(no_fallback):
    for scheme, group in (("int8", None), ("uint4", 32)):
        (weight, scale, zero), keywords, _, _ = make(scheme, 24, 64, group, True)
        spread = torch.full((24, 3 * weight.shape[1]), 77, dtype=weight.dtype)
        spread[:, 1 : 1 + weight.shape[1]] = weight
        for held in (weight, weight.t().contiguous().t(), spread[:, 1 : 1 + weight.shape[1]]):
            for x in (
                torch.randn(2, 3, 64),
                torch.randn(64),
                torch.randn(64, 5).t(),
                torch.randn(1, 64).expand(4, 64),
                torch.randn(5, 200)[:, 7:71],
                torch.randn(0, 64),
                torch.randn(2, 0, 64),
            ):
                for dtype in INPUTS:
                    result = fF.weight_only_linear(x.to(dtype), held, scale, zero.long(), **keywords)
                    torch.testing.assert_close(
                        result, fF.weight_only_linear(x.to(dtype).contiguous(), weight, scale, zero, **keywords)
                    )
                    assert result.shape == (*x.shape[:-1], 24) and result.is_contiguous()


def test_empty():
    weight, scale = torch.zeros(0, 6, dtype=torch.int8), torch.zeros(0)
    assert fF.weight_only_linear(torch.randn(3, 6), weight, scale).shape == (3, 0)
    weight, bias = torch.zeros(5, 0, dtype=torch.int8), torch.randn(5)
    result = fF.weight_only_linear(torch.randn(3, 0), weight, torch.ones(5), None, bias)
    assert torch.equal(result, bias.expand(3, 5))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "relu6"])
def test_activations(activation):
    arguments, keywords, w, _ = make("int8", 37, 96)
    for dtype, m in ((torch.float32, 3), (torch.bfloat16, 70), (torch.float32, 70)):
        x = torch.randn(m, 96).to(dtype) / 500
        bias = torch.randn(37).to(dtype)
        plain = x.double() @ w.t() + bias.double()
        wanted = fastnn.backends.reference.activation(activation, plain)
        result = fF.weight_only_linear(x, *arguments, bias, **keywords, activation=activation)
        torch.testing.assert_close(
            result.double(), wanted, rtol=2 * EPSILON[dtype] + 2e-6, atol=1e-2 if dtype != torch.float32 else 1e-5
        )


def test_no_worse_than_aten():
    """Against float64, on the weights and inputs that aten's kernels take."""
    m, n, k, group = 9, 128, 512, 32
    x = torch.randn(m, k).bfloat16()
    (weight, scale, _), _, _, _ = make("int8", n, k)
    scale = scale.bfloat16()
    wanted = x.double() @ (weight.double() * scale.double()[:, None]).t()
    ours = (fF.weight_only_linear(x, weight, scale).double() - wanted).norm()
    assert ours <= 1.001 * (torch._weight_int8pack_mm(x, weight, scale).double() - wanted).norm()
    q = torch.randint(0, 16, (n, k), dtype=torch.int32)
    scale = (torch.rand(n, k // group) + 0.5).bfloat16()
    both = torch.stack((scale, torch.zeros_like(scale)), -1).transpose(0, 1).contiguous()
    aten = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x, torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1), group, both
    )
    wanted = x.double() @ ((q - 8).double() * _spread(scale, n, k)).t()
    eight = torch.full((n, k // group), 8)
    for rows in (slice(None), slice(0, 1)):
        ours = fF.weight_only_linear(x[rows], pack(q), scale, eight, group_size=group, from_dtype="uint4")
        error = (ours.double() - wanted[rows]).norm()
        assert error <= 1.001 * (aten[rows].double() - wanted[rows]).norm()


@pytest.mark.parametrize("gpu", ["on_cuda", "on_triton"])
def test_a_row_alone_on_a_gpu(gpu, request, no_fallback):
    """The same bits with others, where asked: no other kernel for few rows then."""
    request.getfixturevalue(gpu)
    (weight, scale, zero), keywords, _, _ = make("int4", 20, 128, 32, True)
    for dtype in INPUTS:
        x = torch.randn(20, 128).to(dtype)
        with fastnn.batch_invariant():
            all_rows = fF.weight_only_linear(x, weight, scale, zero, **keywords)
            for m in (1, 9):
                assert torch.equal(fF.weight_only_linear(x[:m], weight, scale, zero, **keywords), all_rows[:m])


def test_same_bits():
    """For any number of threads; and for any number of rows, where asked."""
    for scheme, group in (("int8", None), ("int4", 32), ("uint4", 128)):
        (weight, scale, zero), keywords, _, _ = make(scheme, 100, 256, group, True)
        for dtype in INPUTS:
            x = torch.randn(70, 256).to(dtype)
            for m in (1, 11, 70):
                found = []
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    found.append(fF.weight_only_linear(x[:m], weight, scale, zero, **keywords))
                assert torch.equal(*found)
            for z in (zero, None):
                with fastnn.batch_invariant():
                    all_rows = fF.weight_only_linear(x, weight, scale, z, **keywords)
                    for m in (1, 3, 9, 50):
                        assert torch.equal(fF.weight_only_linear(x[:m], weight, scale, z, **keywords), all_rows[:m])


def test_lowered_precision():
    arguments, keywords, w, size = make("int8", 40, 256)
    x = torch.randn(80, 256)
    torch.set_float32_matmul_precision("medium")
    check(x, arguments, keywords, w, size + 2**16 * size)  # a bfloat16's error at most


@pytest.mark.parametrize("scheme", ["int8", "int4", "float8_e4m3fn"])
def test_gradients(scheme):
    arguments, keywords, w, _ = make(scheme, 6, 32, 16)
    x, bias = torch.randn(2, 3, 32, requires_grad=True), torch.randn(6, requires_grad=True)
    for activation in ("none", "relu", "gelu"):
        y = fF.weight_only_linear(x / 10, *arguments, bias, **keywords, activation=activation)
        wide, wide_bias = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
        z = fastnn.backends.reference.activation(activation, wide / 10 @ w.t() + wide_bias)
        grad = torch.randn_like(y)
        for ours, theirs in zip(
            torch.autograd.grad(y, (x, bias), grad),
            torch.autograd.grad(z, (wide, wide_bias), grad.double()),
            strict=True,
        ):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-3)
    y = fF.weight_only_linear(x.bfloat16(), *arguments, bias.bfloat16(), **keywords)
    y.sum().backward()
    torch.testing.assert_close(x.grad, w.sum(0).float().expand_as(x), rtol=2e-2, atol=1.0)
    torch.testing.assert_close(bias.grad, torch.full((6,), 6.0))


def test_gradients_of_gradients():
    """By the formula, which alone can be computed in float64."""
    (weight, scale, zero), _, _, _ = make("int8", 4, 6)
    x, bias = (
        torch.randn(3, 6, dtype=torch.float64, requires_grad=True),
        torch.randn(4, dtype=torch.float64, requires_grad=True),
    )

    def call(x, bias):
        return formulas.weight_only_linear(x / 100, weight, scale, zero, bias, 0, "int8", "silu")

    assert gradcheck(call, (x, bias)) and gradgradcheck(call, (x, bias))
    # The kernel's own second derivative, of a loss that is not linear in the gradient.
    x = torch.randn(3, 6, requires_grad=True)
    found = []
    for function in (
        lambda x: fF.weight_only_linear(x / 100, weight, scale, activation="silu"),
        lambda x: call(x, None),
    ):
        (grad,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_library():
    for scheme, group in (("int8", 0), ("int4", 32)):
        (weight, scale, zero), _, _, _ = make(scheme, 6, 64, group or None, True)
        for grad in (False, True):
            x, bias = torch.randn(3, 64, requires_grad=grad), torch.randn(6, requires_grad=grad)
            opcheck(torch.ops.fastnn.weight_only_linear, (x, weight, scale, zero, bias, group, scheme, "relu"))
    (weight, scale, _), keywords, _, _ = make("float8_e5m2", 6, 64)
    compiled = torch.compile(
        lambda x: fF.weight_only_linear(x, weight, scale, **keywords).sin(), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(3, 64, requires_grad=True)
    torch.testing.assert_close(compiled(x), fF.weight_only_linear(x, weight, scale).sin())
    compiled(x).sum().backward()
    assert x.grad is not None


def test_transforms():
    (weight, scale, zero), keywords, _, _ = make("int4", 6, 64, 32, True)
    x = torch.randn(5, 2, 64)

    def call(x):
        return fF.weight_only_linear(x, weight, scale, zero, **keywords)

    torch.testing.assert_close(torch.vmap(call)(x), call(x))
    torch.testing.assert_close(torch.vmap(call, 1)(x), call(x).transpose(0, 1))
    scales = scale.expand(3, 6, 2) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    several = torch.vmap(lambda s: fF.weight_only_linear(x, weight, s, zero, **keywords))(scales)
    torch.testing.assert_close(several[1], 2 * call(x))
    grads = torch.func.vmap(torch.func.grad(lambda x: call(x).sum()))(x)
    torch.testing.assert_close(grads[1], torch.func.grad(lambda x: call(x).sum())(x[1]))


def test_reference_backend():
    (weight, scale, zero), keywords, w, _ = make("uint4", 6, 64, 32, True)
    x = torch.randn(5, 64)
    with fastnn.backend("reference"):
        torch.testing.assert_close(
            fF.weight_only_linear(x, weight, scale, zero, **keywords), (x.double() @ w.t()).float()
        )


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "input", {"input": torch.zeros(3, 64, dtype=torch.int32)}),
        (TypeError, "input", {"input": torch.zeros(3, 64, dtype=torch.float64)}),
        (TypeError, "input", {"input": [1.0]}),
        (ValueError, r"input .* K", {"input": torch.zeros(3, 63)}),
        (TypeError, "weight", {"weight": None}),
        (ValueError, "weight", {"weight": torch.zeros(4, 64)}),
        (ValueError, "weight", {"weight": torch.zeros(64, dtype=torch.int8)}),
        (ValueError, "from_dtype", {"weight": torch.zeros(4, 64, dtype=torch.uint8)}),
        (ValueError, "from_dtype", {"from_dtype": "int8"}),
        (TypeError, "weight", {"from_dtype": "int4"}),
        (ValueError, "scale", {"scale": torch.ones(5)}),
        (ValueError, "scale", {"group_size": 32}),
        (ValueError, "group_size", {"group_size": 24, "scale": torch.ones(4, 2)}),
        (ValueError, "group_size", {"group_size": 0}),
        (TypeError, "zero_point", {"zero_point": torch.ones(4)}),
        (ValueError, "zero_point", {"zero_point": torch.ones(3, dtype=torch.int32)}),
        (ValueError, "bias", {"bias": torch.ones(3)}),
        (TypeError, "bias", {"bias": torch.ones(4, dtype=torch.int32)}),
        (ValueError, "activation", {"activation": "swish"}),
    ],
)
def test_errors(error, match, change):
    call = {
        "input": torch.zeros(3, 64),
        "weight": torch.zeros(4, 64, dtype=torch.int8),
        "scale": torch.ones(4),
        **change,
    }
    with pytest.raises(error, match=match):
        fF.weight_only_linear(**call)
    if "zero_point" not in change:
        call.update(weight=torch.zeros(4, 64).to(torch.float8_e5m2), input=torch.zeros(3, 64), scale=torch.ones(4))
        call = {k: call[k] for k in ("input", "weight", "scale")}
        with pytest.raises(ValueError, match="zero_point"):
            fF.weight_only_linear(**call, zero_point=torch.zeros(4, dtype=torch.int32))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("rows", [1, 20])
def test_values_of_rows_scales_are_looked_at(rows, backend):
    x = torch.randn(rows, 64)
    with fastnn.backend(backend):
        for value in (0.0, -1.0, math.nan, math.inf, 1e-39):
            scale = torch.ones(37)
            scale[35] = value
            with pytest.raises(ValueError, match="scale: expected positive, normal, finite numbers, got"):
                fF.weight_only_linear(x, torch.zeros(37, 64, dtype=torch.int8), scale)
        for scheme, bad in (("int8", -129), ("int4", 8), ("uint4", -1), ("uint4", 16)):
            (weight, scale, zero), keywords, _, _ = make(scheme, 37, 64, zeros=True)
            zero[36] = bad
            with pytest.raises(ValueError, match="zero_point: expected .* to .*, got " + str(bad)):
                fF.weight_only_linear(x, weight, scale, zero, **keywords)
        # Those of groups are the caller's business, and no crash.
        (weight, scale, zero), keywords, _, _ = make("uint4", 37, 64, 32, zeros=True)
        zero[3, 1], scale[4, 0] = 99, math.nan
        y = fF.weight_only_linear(x, weight, scale, zero, **keywords)
        assert y[:, 4].isnan().all() and y[:, 5:].isfinite().all()


def test_tensors_of_other_devices_are_refused():
    good = {"weight": torch.zeros(4, 64, dtype=torch.int8), "scale": torch.ones(4), "bias": torch.ones(4)}
    good["zero_point"] = torch.zeros(4, dtype=torch.int32)
    for name, value in good.items():
        with pytest.raises(ValueError, match=f"{name}: expected the device"):
            fF.weight_only_linear(torch.zeros(3, 64), **{**good, name: value.to("meta")})


def test_finetuning_an_adapter():
    """Gradients pass through the frozen layer to what is trained before it."""
    (weight, scale, _), keywords, _, _ = make("int4", 16, 32, 32)
    torch.manual_seed(0)
    down, up = torch.nn.Linear(32, 4), torch.nn.Linear(4, 32)
    x, wanted = torch.randn(64, 32), torch.randn(64, 16)
    optimizer = torch.optim.Adam([*down.parameters(), *up.parameters()], lr=1e-2)
    losses = []
    for _ in range(30):
        y = fF.weight_only_linear(x + up(down(x)), weight, scale / 20, **keywords)
        loss = (y - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
