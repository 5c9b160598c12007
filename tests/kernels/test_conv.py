"""The convolution kernels: all three products on every instruction set, in every layout, against float64."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from fastnn import _cpu
from fastnn.backends import Kernels

from .calls import FLOATS, KIND, convolve, exact

PRODUCTS = ("forward", "input", "weight")
#: Primes, and the sizes of vectors and tiles plus and minus one.
EDGES = (1, 2, 3, 5, 7, 13, 15, 16, 17, 31, 33)

dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))


# Convolution has matrix products in it, so that here amx and its emulation count.
@pytest.fixture(params=_cpu.available_isas())
def isa(request, use_isa):
    use_isa(request.param)
    return request.param


def problem(n, channels, filters, groups, size, kernel, **options):
    """Shapes of x, w and y, and the options of the call."""
    options = {"stride": (1, 1, 1), "padding": (0, 0, 0), "dilation": (1, 1, 1), **options, "groups": groups}
    out = [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, k, t, p, d in zip(size, kernel, options["stride"], options["padding"], options["dilation"], strict=True)
    ]
    return (n, channels * groups, *size), (filters * groups, channels, *kernel), (n, filters * groups, *out), options


@functools.cache
def problems(count=64):
    generator = torch.Generator("cpu").manual_seed(1)

    def pick(choices, how_many=1):
        return [
            choices[i] for i in torch.randint(len(choices), (how_many,), generator=generator, device="cpu").tolist()
        ]

    found = [
        problem(1, 1, 1, 1, (1, 1, 1), (1, 1, 1)),
        problem(1, 65, 63, 1, (1, 7, 5), (1, 1, 1)),
        problem(2, 3, 17, 1, (1, 11, 13), (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3)),
        problem(2, 1, 1, 19, (1, 9, 17), (1, 3, 3), padding=(0, 1, 1)),
        problem(1, 1, 2, 5, (1, 10, 9), (1, 5, 3), stride=(1, 2, 1), padding=(0, 2, 1)),
        problem(1, 2, 3, 2, (1, 1, 67), (1, 1, 5), dilation=(1, 1, 3), padding=(0, 0, 6)),
        problem(1, 3, 4, 1, (1, 9, 8), (1, 2, 1), stride=(1, 4, 3)),
        problem(1, 130, 5, 1, (1, 3, 3), (1, 3, 3), padding=(0, 1, 1)),
        # Rows of the input's gradient come together from two phases, and from eight.
        problem(1, 33, 18, 2, (1, 6, 11), (1, 4, 4), stride=(1, 2, 2), padding=(0, 1, 1)),
        problem(2, 24, 19, 1, (1, 9, 37), (1, 3, 16), stride=(1, 2, 8), padding=(0, 1, 4)),
    ]
    while len(found) < count:
        rank = pick((1, 2, 3))[0]
        ones = [1] * (3 - rank)
        small = [size for size in EDGES if size <= (33, 17, 7)[rank - 1]]
        made = problem(
            *pick((1, 1, 2, 3)),
            *pick(EDGES),
            *pick(EDGES),
            *pick((1, 1, 1, 2, 3)),
            (*ones, *pick(small, rank)),
            (*ones, *pick((1, 2, 3), rank)),
            stride=(*ones, *pick((1, 1, 2, 3), rank)),
            padding=(*[0] * (3 - rank), *pick((0, 1, 2), rank)),
            dilation=(*ones, *pick((1, 1, 2), rank)),
        )
        if min(made[2]) > 0 and math.prod(made[2]) * math.prod(made[1][1:]) < 400_000:
            found.append(made)
    return found


def fewer(machine, cases):
    """A fourth where a GPU is played, which is slow, and fewer where Triton is interpreted, which is slower."""
    return cases[:: {"cuda": 4, "triton": 16}.get(machine, 1)]


def exactly(product, x, w, y, options):
    """In float64, by torch."""
    x, w, y = x.double(), w.double(), y.double()
    if product == "forward":
        return F.conv3d(x, w, None, **options)
    mask = [product == "input", product == "weight", False]
    stride, padding, dilation = options["stride"], options["padding"], options["dilation"]
    gradients = torch.ops.aten.convolution_backward(
        y, x, w, None, stride, padding, dilation, False, [0, 0, 0], options["groups"], mask
    )
    return gradients[PRODUCTS.index(product) - 1]


def depth(product, x, w, y):
    return {"forward": w[0].numel(), "input": w.numel() // w.shape[1], "weight": y.numel() // y.shape[1]}[product]


# ---- layouts: the same numbers, in the middle of NaN -------------------------------------------------------------


def dense(t):
    buffer = torch.full((t.numel() + 67,), math.nan, dtype=t.dtype)
    return buffer[33 : 33 + t.numel()].view(t.shape).copy_(t)


def channels_last(t):
    return dense(t.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


def reversed_dims(t):
    return dense(t.permute(4, 3, 2, 1, 0)).permute(4, 3, 2, 1, 0)


def interior(t):
    buffer = torch.full([size + 3 for size in t.shape], math.nan, dtype=t.dtype)
    return buffer[tuple(slice(2, 2 + size) for size in t.shape)].copy_(t)


def spread(t):
    buffer = torch.full([2 * size + 1 for size in t.shape], math.nan, dtype=t.dtype)
    return buffer[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t)


LAYOUTS = (dense, channels_last, reversed_dims, interior, spread)
#: A weight that is read lies densely, in one of two orders; what is more is the caller's to copy.
WEIGHTS = (dense, channels_last)


def evenly(layout):
    """Where the result's gradient meets the patches, its positions are one stride apart."""
    return layout if layout in (dense, channels_last) else channels_last


def surroundings_are_nan(t):
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).clone()
    whole.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(math.nan)
    return bool(whole.isnan().all())


def integers(shape, dtype, low=-2, high=3):
    return torch.randint(low, high, shape).to(dtype)


@pytest.mark.parametrize("product", PRODUCTS)
@dtypes
def test_integers_come_out_exactly(machine, dtype, product):
    """Every sum is exact, so that an index that is off by one shows; what lies around input, weight and result is NaN, is
    not read into the result and not written."""
    orders = itertools.cycle(itertools.product(LAYOUTS, WEIGHTS, LAYOUTS))
    # Layouts and problems meet in other pairs in each test, since their counts have no common divisor.
    for _ in range({"forward": 0, "input": 17, "weight": 34}[product] + FLOATS.index(dtype)):
        next(orders)
    for x_shape, w_shape, y_shape, options in fewer(machine, problems()):
        x, w, y = (integers(shape, dtype) for shape in (x_shape, w_shape, y_shape))
        expected = exactly(product, x, w, y, options).to(dtype)
        for _ in range(2):
            of_x, of_w, of_y = next(orders)
            if product == "weight":
                of_w, of_y = of_y, evenly(of_y)
            laid = [of_x(x), of_w(w), of_y(y)]
            target = laid[{"forward": 2, "input": 0, "weight": 1}[product]]
            target.fill_(math.nan)
            found = convolve(product, *laid, **options)
            assert torch.equal(found, expected), (x_shape, w_shape, options, of_x, of_w, of_y)
            assert all(surroundings_are_nan(t) for t in laid)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_expanded_operands(machine, dtype, product):
    """Strides of 0: of the batch, the channels, or of everything, as the gradient of a sum."""
    for x_shape, w_shape, y_shape, options in fewer(machine, problems()[1:12]):
        for dims in ((0,), (1,), (2, 3, 4), (0, 1, 2, 3, 4)):
            x, w, y = (integers(shape, dtype) for shape in (x_shape, w_shape, y_shape))

            def expand(t, dims=dims):
                return t[tuple(slice(0, 1) if d in dims else slice(None) for d in range(5))].expand(t.shape)

            x = x if product == "input" else expand(x)
            y = y if product == "forward" else expand(y)
            expected = exactly(product, x, w, y, options).to(dtype)
            target = {"forward": y, "input": x, "weight": w}[product]
            target.fill_(math.nan)
            assert torch.equal(convolve(product, x, w, y, **options), expected), (x_shape, w_shape, options, dims)


#: Kernels along one, two and three axes, with windows that slide and with those that do not.
DEPTHWISE = (
    problem(2, 1, 1, 16, (1, 9, 11), (1, 3, 3), padding=(0, 1, 1)),
    problem(1, 1, 1, 40, (1, 11, 10), (1, 3, 3), padding=(0, 1, 1), stride=(1, 2, 2)),
    problem(2, 1, 1, 21, (1, 10, 7), (1, 5, 5), padding=(0, 2, 2), stride=(1, 2, 2)),
    problem(1, 1, 1, 24, (1, 9, 8), (1, 7, 7), padding=(0, 3, 3)),
    problem(1, 1, 1, 8, (1, 9, 13), (1, 3, 2), padding=(0, 2, 1), dilation=(1, 2, 3), stride=(1, 1, 2)),
    problem(2, 1, 1, 12, (1, 1, 37), (1, 1, 5), padding=(0, 0, 2)),
    problem(1, 1, 1, 16, (5, 6, 7), (2, 3, 3), padding=(1, 0, 1), stride=(2, 3, 1)),
)


@pytest.mark.not_on("triton")  # which has no kernel of their own: each channel is a product, slow to interpret
@pytest.mark.parametrize("product", PRODUCTS)
@dtypes
def test_depthwise(machine, dtype, product):
    """Each channel by itself, in whole vectors of channels and not, with all that can be added; exactly."""
    for (x_shape, w_shape, y_shape, options), layout in itertools.product(DEPTHWISE, (channels_last, dense)):
        x, w, y = (layout(integers(shape, dtype)) for shape in (x_shape, w_shape, y_shape))
        w = dense(w)
        expected = exactly(product, x, w, y, options)
        out = {"forward": y, "input": x, "weight": w}[product]
        added = {}
        if product != "weight":
            bias, residual = integers((out.shape[1],), dtype), layout(integers(out.shape, dtype))
            added = {"bias": bias, "residual": residual, "activation": "relu"}
            expected = (expected + bias.double().view(-1, 1, 1, 1) + residual.double()).relu()
        out.fill_(math.nan)
        found = convolve(product, x, w, y, **options, **added)
        assert torch.equal(found.double(), expected), (x_shape, w_shape, options, layout)
        assert surroundings_are_nan(out)


@pytest.mark.parametrize("product", PRODUCTS)
@dtypes
def test_pointwise(machine, dtype, product):
    """Filters of one tap, which are a matrix product where they see every pixel, in images that follow each other and in
    those that do not; with more filters than channels and with fewer, and so many pixels that panels are packed in groups."""
    cases = [
        problem(3, 16, 40, 1, (1, 6, 8), (1, 1, 1)),
        problem(3, 24, 40, 1, (1, 6, 8), (1, 1, 1), stride=(1, 2, 2)),
        problem(3, 7, 40, 1, (1, 6, 8), (1, 1, 1)),
        problem(2, 93, 35, 1, (1, 7, 7), (1, 1, 1)),
        problem(2, 66, 33, 2, (2, 5, 3), (1, 1, 1)),
        problem(3, 71, 17, 1, (1, 31, 37), (1, 1, 1)),
        problem(2, 17, 71, 1, (1, 31, 37), (1, 1, 1)),
        problem(1, 300, 130, 1, (1, 1, 1), (1, 1, 1)),
    ]
    for x_shape, w_shape, y_shape, options in fewer(machine, cases):
        for layout in (dense, channels_last, interior):
            x, w, y = (layout(integers(shape, dtype)) for shape in (x_shape, w_shape, y_shape))
            w, y = dense(w), y if product != "weight" else evenly(layout)(y)
            expected = exactly(product, x, w, y, options)
            out = {"forward": y, "input": x, "weight": w}[product]
            added = {}
            if product != "weight":
                added = {"bias": integers((out.shape[1],), dtype), "residual": layout(integers(out.shape, dtype))}
                expected = expected + added["bias"].double().view(-1, 1, 1, 1) + added["residual"].double()
            out.fill_(math.nan)
            found = convolve(product, x, w, y, **options, **added)
            assert torch.equal(found.double(), expected.to(dtype).double()), (x_shape, w_shape, layout)
            assert surroundings_are_nan(out)


@pytest.mark.parametrize("product", PRODUCTS)
@dtypes
def test_within_rounding_of_float64(machine, dtype, product):
    u_sum = 2.0**-53 if dtype is torch.float64 else 2.0**-24
    u = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, u_sum)
    for x_shape, w_shape, y_shape, options in problems()[:: {"cuda": 6, "triton": 30}.get(machine, 3)]:
        x, w, y = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in (x_shape, w_shape, y_shape))
        reference = exactly(product, x, w, y, options)
        magnitude = exactly(product, x.abs(), w.abs(), y.abs(), options)
        terms = depth(product, x, w, y) + 2
        found = convolve(product, x, w, y, **options)
        bound = terms * u_sum * magnitude + 1.01 * u * reference.abs() + torch.finfo(dtype).tiny
        assert bool(((found.double() - reference).abs() <= bound).all()), (x_shape, w_shape, options)


@pytest.mark.parametrize("product", PRODUCTS)
def test_precisions_of_float32(machine, product):
    """Two parts of bfloat16 hold 16 bits, one 8: what "high" and "medium" may lose at most."""
    x_shape, w_shape, y_shape, options = problem(2, 37, 19, 1, (1, 12, 11), (1, 3, 3), padding=(0, 1, 1))
    x, w, y = (torch.randn(shape) for shape in (x_shape, w_shape, y_shape))
    tensors = dict(zip(PRODUCTS, (y, x, w), strict=True))
    reference = exactly(product, x, w, y, options)
    magnitude = exactly(product, x.abs(), w.abs(), y.abs(), options)
    terms = depth(product, x, w, y) + 2
    for precision, lost, most in (("highest", 0, 1e-6), ("high", 2.0**-15, 3e-5), ("medium", 2.0**-7, 6e-3)):
        target = torch.full_like(tensors[product], math.nan)
        operands = [target if t is tensors[product] else t for t in (x, w, y)]
        error = convolve(product, *operands, **options, precision=precision).double() - reference
        assert bool((error.abs() <= (terms * 2.0**-24 + lost) * magnitude).all()), precision
        assert error.norm() <= most * reference.norm(), precision


@pytest.mark.not_on("triton")  # whose interpreter sums as NumPy does
@pytest.mark.parametrize("channels", [16, 128, 900])
def test_float32_is_no_worse_than_torch(machine, channels):
    """'highest' is held to torch's own error against float64; the tenth is for the order of the sums."""
    torch.manual_seed(0)
    shapes = problem(2, channels, 24, 1, (1, 7, 9), (1, 3, 3), padding=(0, 1, 1))
    *shapes, options = shapes
    flat = {name: value[1:] if isinstance(value, tuple) else value for name, value in options.items()}
    squares = torch.zeros(3, 2, dtype=torch.float64)
    for _ in fewer(machine, range(3)):
        x, w, y = (torch.randn(shape) for shape in shapes)
        rest = ([0, 0], flat["groups"], [True, True, False])
        gradients = torch.ops.aten.convolution_backward(
            y[:, :, 0], x[:, :, 0], w[:, :, 0], None, flat["stride"], flat["padding"], flat["dilation"], False, *rest
        )
        torchs = (F.conv2d(x[:, :, 0], w[:, :, 0], None, **flat), *gradients[:2])
        for number, product in enumerate(PRODUCTS):
            reference = exactly(product, x, w, y, options)
            operands = [
                torch.full_like(t, math.nan) if which == product else t
                for which, t in zip(("input", "weight", "forward"), (x, w, y), strict=True)
            ]
            found = convolve(product, *operands, **options)
            squares[number, 0] += (found.double() - reference).square().sum() / reference.square().sum()
            squares[number, 1] += (
                torchs[number].double() - reference[:, :, 0]
            ).square().sum() / reference.square().sum()
    for product, (ours, theirs) in zip(PRODUCTS, squares.sqrt().tolist(), strict=True):
        assert ours <= 1.1 * theirs, (product, ours / theirs)


@pytest.mark.parametrize("kind", [None, *KIND])
@dtypes
def test_bias_residual_and_activation(machine, dtype, kind):
    """activation(conv(x, w) + bias + residual), rounded once."""
    if machine == "triton" and kind not in (None, "gelu"):
        pytest.skip("slow to interpret, and the same function for all")
    x_shape, w_shape, y_shape, options = problem(2, 5, 9, 2, (1, 7, 6), (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 0))
    x, w, y = (torch.randn(shape).to(dtype) for shape in (x_shape, w_shape, y_shape))
    u = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    # Slopes of the activations are at most 1.13; gelu's and silu's own roundings are of their argument.
    loose = 1.01 * u + 60 * (2.0**-53 if dtype is torch.float64 else 2.0**-24)
    for product, out, layout in itertools.product(("forward", "input"), (y, x), (dense, channels_last, spread)):
        if (product == "forward") != (out is y):
            continue
        bias, residual = torch.randn(out.shape[1]).to(dtype), layout(torch.randn(out.shape).to(dtype))
        wide = exactly(product, x, w, y, options) + bias.double().view(-1, 1, 1, 1) + residual.double()
        magnitude = exactly(product, x.abs(), w.abs(), y.abs(), options) + bias.double().abs().view(-1, 1, 1, 1)
        expected = wide if kind is None else exact(kind, wide)
        target = layout(torch.full_like(out, math.nan))
        operands = (x, w, target) if product == "forward" else (target, w, y)
        found = convolve(product, *operands, **options, bias=bias, residual=residual, activation=kind)
        bound = loose * (magnitude + residual.double().abs()) + torch.finfo(dtype).tiny
        assert bool(((found.double() - expected).abs() <= bound).all()), (product, layout)


@dtypes
def test_what_is_not_finite_stays_where_it_belongs(machine, dtype):
    """An infinity makes infinities of the results that see it, and a NaN NaN; the others are as without it."""
    x_shape, w_shape, y_shape, options = problem(2, 40, 20, 1, (1, 9, 8), (1, 3, 3), padding=(0, 1, 1))
    x, w = integers(x_shape, dtype), integers(w_shape, dtype, low=1, high=3)
    y = torch.zeros(y_shape, dtype=dtype)
    for place, value in (((0, 3, 0, 4, 4), math.inf), ((1, 39, 0, 0, 7), -math.inf), ((1, 0, 0, 8, 0), math.nan)):
        x[place] = value
    expected = exactly("forward", x, w, y, options)
    assert not expected.isfinite().all()
    found = convolve("forward", x, w, y, **options)
    torch.testing.assert_close(found, expected.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_the_largest_numbers_do_not_overflow_in_parts(machine):
    """Rounding the largest float32 to bfloat16 would make an infinity of it."""
    x, w = torch.zeros(1, 33, 1, 5, 5), torch.zeros(17, 33, 1, 3, 3)
    x[0, 7, 0, 2, 2], w[:, 7, 0, 1, 1] = torch.finfo(torch.float32).max, 1.0
    y = convolve("forward", x, w, torch.empty(1, 17, 1, 3, 3))
    assert torch.equal(y[:, :, 0, 1, 1], torch.full((1, 17), torch.finfo(torch.float32).max))
    assert y.count_nonzero() == 17


@dtypes
def test_sizes_of_zero(machine, dtype):
    def empty(*shape):
        return torch.full(shape, math.nan, dtype=dtype)

    convolve("forward", empty(0, 3, 1, 5, 5), empty(4, 3, 1, 3, 3), empty(0, 4, 1, 3, 3))
    convolve("input", empty(0, 3, 1, 5, 5), empty(4, 3, 1, 3, 3), empty(0, 4, 1, 3, 3))
    # A sum of nothing.
    for strides in ((36, 9, 9, 3, 1), (1, 2, 3, 5, 7)):
        y = torch.empty_strided((0, 4, 1, 3, 3), strides, dtype=dtype)
        w = convolve("weight", empty(0, 3, 1, 5, 5), empty(4, 3, 1, 3, 3), y)
        assert torch.equal(w, torch.zeros_like(w))


@dtypes
def test_channel_sum(kernels, dtype):
    """The gradient of a bias, in every layout."""
    channel_sum = Kernels("conv").channel_sum
    for shape in (
        (2, 3, 1, 5, 7),
        (1, 1, 1, 1, 1),
        (3, 17, 2, 4, 3),
        (2, 5, 1, 1, 9),
        (2, 4, 1, 6, 1),
        (0, 3, 1, 2, 2),
    ):
        y = integers(shape, dtype)
        expected = y.double().sum((0, 2, 3, 4)).to(dtype)
        for layout in LAYOUTS:
            assert torch.equal(channel_sum(layout(y)), expected), (shape, layout)
        assert torch.equal(
            channel_sum(torch.ones((), dtype=dtype).expand(shape)).double(),
            torch.full((shape[1],), float(y[:, 0].numel()), dtype=torch.float64),
        )
    y = torch.randn(3, 5, 1, 61, 67).to(dtype)
    exact_sum = y.double().sum((0, 2, 3, 4))
    u = {torch.float64: 2.0**-48, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    # In float32 over blocks of 64 numbers, then in float64.
    bound = 1.01 * u * exact_sum.abs() + 64 * min(u, 2.0**-24) * y.double().abs().sum((0, 2, 3, 4))
    for layout in LAYOUTS:
        assert bool(((channel_sum(layout(y)).double() - exact_sum).abs() <= bound).all()), layout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 0}, "groups"),
        ({"groups": 2}, "groups"),
        ({"stride": (1, 0, 1)}, "stride"),
        ({"dilation": (1, 1, -1)}, "stride, padding, dilation"),
        ({"padding": (0, -1, 0)}, "stride, padding, dilation"),
        ({"padding": (0, 1, 0)}, "y"),
        ({"y": (2, 4, 1, 3, 4)}, "y"),
        ({"y": (1, 4, 1, 3, 3)}, "y"),
        ({"y": (2, 5, 1, 3, 3)}, "groups"),
        ({"x": (2, 2, 1, 5, 5)}, "groups"),
        ({"w": (4, 3, 1, 9, 3)}, "y"),
        ({"w": (4, 3, 1, 0, 3)}, "y"),
        ({"x": (2, 3, 5, 5)}, "x"),
        ({"dtype": torch.int8}, "dtype"),
    ],
)
@pytest.mark.parametrize("product", PRODUCTS)
def test_bad_arguments(kernels, product, change, message):
    shapes = {"x": (2, 3, 1, 5, 5), "w": (4, 3, 1, 3, 3), "y": (2, 4, 1, 3, 3)}
    if kernels == "cuda" and len(change.get("x", shapes["x"])) < 5:
        pytest.skip("called on tensors, whose missing dimensions are added")
    options = dict(change)
    dtype = options.pop("dtype", torch.float32)
    tensors = [torch.zeros(options.pop(name, shape), dtype=dtype) for name, shape in shapes.items()]
    with pytest.raises(ValueError, match=message):
        convolve(product, *tensors, **options)


def test_a_weight_that_is_not_dense_is_refused():
    x, w = torch.zeros(1, 4, 1, 5, 5), torch.zeros(6, 4, 1, 3, 3)
    for odd in (w[:3].transpose(1, 2).contiguous().transpose(1, 2)[..., ::2], w[::2]):
        out = (5 - odd.shape[3] + 1, 5 - odd.shape[4] + 1)
        with pytest.raises(ValueError, match="w: expected dense filters"):
            convolve("forward", x, odd, torch.zeros(1, 3, 1, *out))
    with pytest.raises(ValueError, match="evenly"):
        convolve("weight", x, w[:3].contiguous(), torch.zeros(1, 3, 1, 3, 9)[..., ::2][..., :3])


# ---- square filters in float32, which Winograd's algorithm computes where there are enough of them -----------------

#: Taps in each direction, and the step from a position to the next.
WAYS = {"3x3": (3, 1), "3x3 by two": (3, 2), "5x5": (5, 1)}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def square(way, n, channels, filters, height, width, less=(0, 0)):
    """``less`` than the padding that keeps the size."""
    taps, step = way
    padding = 0, taps // 2 - less[0], taps // 2 - less[1]
    return problem(
        *(n, channels, filters, 1, (1, height, width), (1, taps, taps)), padding=padding, stride=(1, step, step)
    )


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(
    "shape", [(1, 64, 64, 18, 24), (2, 61, 63, 21, 25), (3, 79, 95, 31, 13), (1, 64, 96, 9, 67)], ids=str
)
@pytest.mark.parametrize("way", ["3x3", "5x5"])
def test_square_filters(isa, way, shape, last):
    for less in ((0, 0), (1, -1), (1, 0)):
        check_square(*square(WAYS[way], *shape, less), last)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_square_filters_at_every_second_position(isa, last):
    check_square(*square(WAYS["3x3 by two"], 4, 128, 128, 32, 48), last)
    check_square(*square(WAYS["3x3 by two"], 4, 128, 128, 33, 48, (1, -2)), last)
    check_square(*square(WAYS["3x3 by two"], 4, 159, 127, 46, 64), last)


def check_square(x_shape, w_shape, y_shape, options, last):
    x, w, y = (torch.randn(shape) for shape in (x_shape, w_shape, y_shape))
    if last:
        x, w, y = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, w, y))
    x[..., : x_shape[3] // 2, :] = 0  # results beside this are sums of nothing, and exactly zero
    _cpu.reset_counters()
    taps = w_shape[4] ** 2
    found = convolve("forward", x, w, torch.full_like(y, math.nan), **options)
    assert _cpu.counters()["winograd"] == 1
    expected = exactly("forward", x, w, y, options)
    magnitude = exactly("forward", x.abs(), w.abs(), y, options)
    assert bool(((found.double() - expected).abs() <= taps * x.shape[1] * 2.0**-24 * magnitude).all())
    if (taps, options["stride"][2]) != (9, 1):  # gradients of the others are computed otherwise
        return
    found = convolve("input", torch.full_like(x, math.nan), w, y, **options)
    assert _cpu.counters()["winograd"] == 2
    expected = exactly("input", x, w, y, options)
    magnitude = exactly("input", x, w.abs(), y.abs(), options)
    assert bool(((found.double() - expected).abs() <= taps * y.shape[1] * 2.0**-24 * magnitude).all())


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_square_filters_of_many_channels(isa, last):
    """More transformed tiles than are kept at once, and more filters than each thread reads anew for every tile."""
    check_square(*square(WAYS["3x3"], 1, 512, 64, 34, 33), last)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", [(1, 128, 128, 18, 24), (2, 127, 159, 21, 25)], ids=str)
def test_gradient_of_square_filters(isa, shape, last):
    """The latter in more than one block of tiles."""
    for less in ((0, 0), (1, -1)):
        *shapes, options = square(WAYS["3x3"], *shape, less)
        x, w, y = (torch.randn(s) for s in shapes)
        if last:
            x, w, y = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, w, y))
        _cpu.reset_counters()
        found = convolve("weight", x, torch.full_like(w, math.nan), y, **options)
        assert _cpu.counters()["winograd"] == 1
        expected = exactly("weight", x, w, y, options)
        magnitude = exactly("weight", x.abs(), w, y.abs(), options)
        assert (found.double() - expected).norm() <= 2.0**-21 * expected.norm()
        assert bool(((found.double() - expected).abs() <= 2.0**-20 * magnitude).all())


@ways
def test_small_numbers_beside_large_ones_keep_their_digits(isa, way):
    """A tile that mixed the two would round the small ones as if they were large."""
    *shapes, options = square(way, 4, 128, 128, 48, 48)
    x, w, y = (torch.randn(s) for s in shapes)
    x[..., 11, :] *= 1e6
    _cpu.reset_counters()
    found = convolve("forward", x, w, torch.empty_like(y), **options)
    assert _cpu.counters()["winograd refused"] == 1
    expected = exactly("forward", x, w, y, options)
    magnitude = exactly("forward", x.abs(), w.abs(), y, options)
    assert bool(((found.double() - expected).abs() <= way[0] ** 2 * 128 * 2.0**-24 * magnitude).all())


def test_taps_that_meet_nothing_have_no_gradient(isa):
    """Their tiles have inputs and gradients, but not where these taps meet them."""
    *shapes, options = square(WAYS["3x3"], 1, 160, 160, 48, 48)
    x, w, y = (torch.randn(s) for s in shapes)
    y[..., 1:, :] = 0
    _cpu.reset_counters()
    found = convolve("weight", x, torch.full_like(w, math.nan), y, **options)
    assert _cpu.counters()["winograd refused"] == 1
    assert bool((found[..., 0, :] == 0).all())
    assert bool((found[..., 1:, :] != 0).all())


@pytest.mark.parametrize("channels", [64, 320])
@pytest.mark.parametrize("kind", ["normal", "relu", "scaled", "cancelling"])
@ways
def test_square_filters_are_no_worse_than_torch(way, channels, kind):
    *shapes, options = square(way, 2, channels, 64, 40, 40)
    squares, gradients = torch.zeros(2, 2, dtype=torch.float64)
    for _ in range(3):
        x, w, y = (torch.randn(s) for s in shapes)
        if kind == "relu":
            x = x.relu()
        elif kind == "scaled":
            x = x * torch.randn_like(x).exp()
        elif kind == "cancelling":
            half = channels // 2
            x[:, half:] = x[:, :half] * (1 + 1e-3 * torch.randn_like(x[:, :half]))
            w[:, half:] = -w[:, :half]
        expected = exactly("forward", x, w, y, options)
        ours = convolve("forward", x, w, torch.empty_like(y), **options)
        theirs = F.conv2d(x[:, :, 0], w[:, :, 0], padding=way[0] // 2, stride=way[1])[:, :, None]
        for i, result in enumerate((ours, theirs)):
            squares[i] += (result.double() - expected).square().sum() / expected.square().sum()
        if kind != "cancelling":  # channels against each other, which do not meet here
            expected = exactly("weight", x, w, y, options)
            ours = convolve("weight", x, torch.empty_like(w), y, **options)
            leaf = w[:, :, 0].clone().requires_grad_()
            result = F.conv2d(x[:, :, 0], leaf, padding=way[0] // 2, stride=way[1])
            (theirs,) = torch.autograd.grad(result, leaf, y[:, :, 0])
            for i, result in enumerate((ours, theirs[:, :, None])):
                gradients[i] += (result.double() - expected).square().sum() / expected.square().sum()
    assert squares[0].sqrt() <= 1.1 * squares[1].sqrt(), (squares[0] / squares[1]).sqrt()
    assert gradients[0].sqrt() <= 1.1 * gradients[1].sqrt(), (gradients[0] / gradients[1]).sqrt()
