"""Convolution of 8-bit images: sums in int64 and float32 arithmetic by NumPy, written from the formula, bit for bit."""

import itertools

import numpy
import pytest
import torch
from torch.library import opcheck

import fastnn
import fastnn.functional as fF

every_machine = pytest.mark.not_on("amx")
RESULTS = (torch.float32, torch.bfloat16, torch.uint8, torch.int8)
ACTIVATIONS = ("none", "relu", "relu6")


def images(*shape, dtype=torch.uint8, channels_last=True):
    low, high = (0, 256) if dtype is torch.uint8 else (-128, 128)
    x = torch.randint(low, high, shape).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x


def filters(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def sums(x, w, zero, stride, padding, dilation, groups):
    """In int64, tap by tap."""
    rank = x.dim() - 2
    stride, padding, dilation = ((v,) * rank if isinstance(v, int) else v for v in (stride, padding, dilation))
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, w.shape[2:], strict=True)]
        ends = [(n // 2, n - n // 2) for n in total]
    else:
        ends = [(p, p) for p in padding]
    x = torch.nn.functional.pad(x.long() - zero, [p for both in reversed(ends) for p in both])
    size = [
        (n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], w.shape[2:], stride, dilation, strict=True)
    ]
    per = w.shape[0] // groups
    out = torch.zeros(x.shape[0], w.shape[0], *size, dtype=torch.int64)
    for tap in itertools.product(*map(range, w.shape[2:])):
        steps = [
            slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, s, n in zip(tap, dilation, stride, size, strict=True)
        ]
        seen = x[(..., *steps)]
        for g in range(groups):
            some = seen[:, g * w.shape[1] : (g + 1) * w.shape[1]]
            taken = w[(slice(g * per, (g + 1) * per), slice(None), *tap)].long()
            out[:, g * per : (g + 1) * per] += torch.einsum("mc,nc...->nm...", taken, some)
    return out


def expected(x, w, weight_scale, bias=None, stride=1, padding=0, dilation=1, groups=1, **options):
    f = numpy.float32
    exact = sums(x, w, options.get("input_zero_point", 0), stride, padding, dilation, groups)
    columns = (-1, *(1,) * (x.dim() - 2))
    dtype = options.get("dtype", torch.float32)
    inverse = f(1) / f(options["output_scale"]) if "output_scale" in options else f(1)
    scale = f(options["input_scale"]) * numpy.asarray(weight_scale, dtype=f) * inverse
    scale = numpy.broadcast_to(scale, w.shape[:1]).reshape(columns)
    shift = numpy.zeros(w.shape[0], f) if bias is None else bias.numpy() * inverse
    v = exact.numpy().astype(f) * scale + shift.reshape(columns)
    if "residual" in options:
        difference = options["residual"].long() - options["residual_zero_point"]
        v = v + difference.numpy().astype(f) * (f(options["residual_scale"]) * inverse)
    activation = options.get("activation", "none")
    if activation != "none":
        v = numpy.maximum(v, f(0))
    if activation == "relu6":
        v = numpy.minimum(v, f(6) * inverse)
    v = torch.from_numpy(v)
    if dtype.is_floating_point:
        return v.to(dtype)
    info = torch.iinfo(dtype)
    return (v.double().round() + options["output_zero_point"]).clamp(info.min, info.max).to(dtype)


def scales(m):
    return torch.rand(m) * 0.01 + 0.001


def check(x, w, *args, **options):
    weight_scale, *rest = args or (scales(w.shape[0]),)
    function = (fF.int8_conv1d, fF.int8_conv2d, fF.int8_conv3d)[x.dim() - 3]
    y = function(x, w, weight_scale, *rest, **options)

    def on_cpu(value):
        return value.cpu() if isinstance(value, torch.Tensor) else value

    options = {name: on_cpu(value) for name, value in options.items()}
    with torch.device("cpu"):
        correct = expected(*map(on_cpu, (x, w, weight_scale, *rest)), **options).to(y.device)
    assert y.dtype is correct.dtype and y.shape == correct.shape
    assert torch.equal(y, correct)
    assert y.numel() == 0 or y.shape[1] == 1 or y.stride(1) == 1
    return y


# N, C, size, M, kernel, stride, padding, dilation, groups
SHAPES = [
    (1, 64, (7, 7), 32, (1, 1), 1, 0, 1, 1),
    (2, 64, (7, 7), 33, (1, 1), 1, 0, 1, 1),  # images go on evenly
    (1, 5, (13, 11), 31, (1, 1), 1, 0, 1, 1),  # channels padded
    (2, 128, (9, 10), 65, (1, 1), 2, 0, 1, 1),
    (2, 3, (23, 17), 34, (7, 7), 2, 3, 1, 1),  # a first layer
    (1, 3, (8, 6), 16, (3, 3), 1, 1, 1, 1),
    (1, 4, (9, 15), 8, (3, 3), 1, 1, 1, 1),
    (2, 64, (15, 14), 64, (3, 3), 1, 1, 1, 1),
    (1, 16, (11, 9), 17, (3, 3), 2, 1, 1, 1),
    (1, 12, (10, 12), 40, (3, 2), (1, 2), (2, 0), (2, 3), 1),
    (1, 128, (6, 5), 24, (5, 5), 1, 2, 1, 1),  # several blocks of K
    (1, 640, (4, 4), 10, (3, 3), 1, 1, 1, 1),
    (2, 24, (7, 9), 12, (3, 3), 1, 1, 1, 2),
    (1, 20, (6, 6), 40, (3, 3), 1, 1, 1, 20),  # two filters a channel
    (2, 16, (5, 7), 16, (3, 3), 1, 1, 1, 16),  # depthwise
    (1, 37, (9, 8), 37, (3, 3), 2, 1, 1, 37),
    (1, 35, (11, 6), 35, (5, 3), 1, (4, 2), (2, 1), 35),
    (1, 1, (8, 8), 1, (3, 3), 1, 1, 1, 1),
    (3, 1, (7, 5), 18, (3, 3), 1, 0, 1, 1),
    (1, 256, (1, 1), 100, (1, 1), 1, 0, 1, 1),  # a linear layer
    (1, 8, (3, 3), 6, (3, 3), 1, 4, 1, 1),  # positions that see nothing but padding
    (2, 16, (9, 7), 33, (2, 4), 1, "same", (3, 1), 1),  # more at the end than at the beginning
    (1, 3, (6, 5), 7, (2, 3), 1, "same", 1, 1),
    (2, 19, (7, 8), 19, (4, 2), 1, "same", 1, 19),
    (1, 12, (8, 9), 10, (2, 3), (1, 2), "valid", 1, 2),
]


@every_machine
@pytest.mark.parametrize("n,c,size,m,kernel,stride,padding,dilation,groups", SHAPES)
def test_shapes(n, c, size, m, kernel, stride, padding, dilation, groups, machine, no_fallback):
    if machine in ("cuda", "triton") and c * m > 10_000:
        pytest.skip("what plays a GPU is slow")
    x, w = images(n, c, *size), filters(m, c // groups, *kernel)
    where = (scales(m), torch.randn(m), stride, padding, dilation, groups)
    y = check(x, w, *where, input_scale=0.02, input_zero_point=113)
    if machine.startswith("amx") and c * kernel[0] > 1000:
        return  # the emulation of tiles is slow
    requantized = dict(output_scale=0.13, output_zero_point=77, dtype=torch.uint8)
    if machine not in ("cuda", "triton"):
        check(x, w, *where, input_scale=0.02, input_zero_point=5, **requantized)
    residual = images(*y.shape)
    check(
        *(x, w, *where), input_scale=0.02, input_zero_point=200, **requantized, activation="relu",
        residual=residual, residual_scale=0.07, residual_zero_point=31,
    )  # fmt: skip


@every_machine
@pytest.mark.parametrize("dtype", RESULTS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("groups", [1, 20])
def test_results(dtype, activation, groups, machine):
    types = list(itertools.product((torch.uint8, torch.int8), (None, torch.uint8, torch.int8)))
    if machine in ("cuda", "triton"):  # slow: each of them with each dtype and with each activation, not every three
        types = types[(RESULTS.index(dtype) + ACTIVATIONS.index(activation)) % 3 :: 3]
    for input_type, residual_type in types:
        x, w = images(2, 20, 6, 7, dtype=input_type), filters(20, 20 // groups, 3, 3)
        options = dict(
            input_scale=0.05, input_zero_point=-3 if input_type is torch.int8 else 129, activation=activation
        )
        if not dtype.is_floating_point:
            options.update(output_scale=0.21, output_zero_point=-7 if dtype is torch.int8 else 9)
        if residual_type is not None:
            residual = images(2, 20, 6, 7, dtype=residual_type)
            options.update(residual=residual, residual_scale=0.3, residual_zero_point=11)
        check(x, w, scales(20), torch.randn(20), 1, 1, 1, groups, dtype=dtype, **options)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
def test_enough_pixels_for_the_largest_tiles_on_a_gpu(dtype, on_cuda, no_fallback):
    """An odd number of them, and of filters, with an edge."""
    x, w = images(1, 16, 113, 111, dtype=dtype), filters(17, 16, 1, 2)
    check(x, w, scales(17), None, 1, (0, 1), input_scale=0.1, input_zero_point=40)


@every_machine
def test_sums_that_saturate_16_bits(machine):
    x = torch.full((1, 64, 5, 5), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    for value in (-128, 127):
        w = torch.full((40, 64, 3, 3), value, dtype=torch.int8)
        y = fF.int8_conv2d(x, w, 1.0, padding=1, input_scale=1.0)
        assert torch.equal(y.long(), sums(x, w, 0, 1, 1, 1, 1))
        y = fF.int8_conv2d(x, w[:64, :1].repeat(2, 1, 1, 1)[:64], 1.0, padding=1, groups=64, input_scale=1.0)
        assert torch.equal(y.long(), sums(x, w[:64, :1].repeat(2, 1, 1, 1)[:64], 0, 1, 1, 1, 64))


@every_machine
def test_rounds_half_to_even(machine):
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for m, groups in ((1, 1), (17, 1)):
        w = torch.ones(m, 1, 1, 1, dtype=torch.int8)
        options = dict(input_scale=0.5, output_scale=1.0, output_zero_point=3, dtype=torch.uint8)
        y = fF.int8_conv2d(x, w, 1.0, groups=groups, **options)
        halves = (x.double() / 2).round() + 3
        assert torch.equal(y.double(), halves.expand(y.shape))


@every_machine
def test_results_out_of_range_and_nan(machine):
    x, w = images(1, 8, 4, 5), filters(6, 8, 1, 1)
    bias = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 0])
    options = dict(input_scale=1.0, output_scale=1e-3, dtype=torch.uint8)
    y = fF.int8_conv2d(x, w, 1.0, bias, output_zero_point=50, **options)
    assert [y[0, i].unique().tolist() for i in range(5)] == [[255], [0], [50], [255], [0]]
    y = fF.int8_conv2d(x, w, 1.0, bias, output_zero_point=50, activation="relu", **options)
    assert [y[0, i].unique().tolist() for i in range(5)] == [[255], [50], [50], [255], [50]]


@every_machine
@pytest.mark.parametrize("c,groups", [(8, 1), (24, 1), (24, 24), (3, 1)])
def test_layouts(c, groups, machine):
    x, w = images(2, c, 8, 9), filters(24, c // groups, 3, 3)
    rest = (scales(24), None, 1, 1, 1, groups)
    y = check(x, w, *rest, input_scale=0.1, input_zero_point=40)
    wide = images(2, c + 5, 12, 18)
    wide[:, 2 : c + 2, 2:10, ::2] = x
    for other in (x.contiguous(), wide[:, 2 : c + 2, 2:10, ::2], x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(fF.int8_conv2d(other, w, *rest, input_scale=0.1, input_zero_point=40), y)
    one = x[:1].expand(2, -1, -1, -1)
    same = fF.int8_conv2d(one, w, *rest, input_scale=0.1, input_zero_point=40)
    assert torch.equal(same[1], y[0]) and torch.equal(same[0], y[0])
    last = w.contiguous(memory_format=torch.channels_last)
    reversed_twice = w.flip(0).as_strided(w.shape, w.stride()).clone().flip(0)
    for other in (last, reversed_twice, torch.stack((w, w), -1)[..., 1]):
        assert torch.equal(fF.int8_conv2d(x, other, *rest, input_scale=0.1, input_zero_point=40), y)
    residual = images(*y.shape)
    options = dict(input_scale=0.1, input_zero_point=40, residual_scale=0.5, residual_zero_point=9)
    assert torch.equal(
        fF.int8_conv2d(x, w, *rest, **options, residual=residual),
        fF.int8_conv2d(x, w, *rest, **options, residual=residual.contiguous()),
    )


@every_machine
def test_one_dimension(machine):
    for n, c, length, m, k, stride, padding, dilation, groups in (
        (2, 12, 19, 20, 5, 2, 2, 1, 1),
        (1, 7, 30, 5, 3, 1, 4, 2, 1),
        (3, 16, 11, 16, 3, 1, 1, 1, 16),
        (1, 64, 40, 48, 1, 1, 0, 1, 1),
    ):
        where = (scales(m), torch.randn(m), stride, padding, dilation, groups)
        check(images(n, c, length), filters(m, c // groups, k), *where, input_scale=0.1, input_zero_point=99)


@every_machine
def test_three_dimensions(machine):
    for n, c, size, m, kernel, stride, padding, dilation, groups in (
        (2, 12, (5, 6, 7), 20, (3, 3, 3), 1, 1, 1, 1),
        (1, 3, (7, 9, 8), 33, (3, 2, 4), (1, 2, 2), (1, 1, 0), 1, 1),  # a first layer
        (1, 64, (4, 5, 3), 40, (1, 1, 1), 1, 0, 1, 1),
        (2, 32, (4, 4, 7), 36, (1, 1, 1), 2, 0, 1, 1),
        (1, 8, (6, 5, 9), 12, (2, 3, 2), (2, 1, 1), (0, 2, 1), (3, 2, 1), 2),
        (2, 19, (4, 6, 5), 19, (3, 3, 3), (1, 2, 1), 1, 1, 19),  # depthwise
    ):
        x, w = images(n, c, *size).contiguous(memory_format=torch.channels_last_3d), filters(m, c // groups, *kernel)
        where = (scales(m), torch.randn(m), stride, padding, dilation, groups)
        y = check(x, w, *where, input_scale=0.1, input_zero_point=99)
        check(
            *(x.contiguous(), w, *where), input_scale=0.1, input_zero_point=3, output_scale=0.3, output_zero_point=11,
            dtype=torch.uint8, activation="relu", residual=images(*y.shape), residual_scale=0.2, residual_zero_point=140,
        )  # fmt: skip


@every_machine
@pytest.mark.parametrize("zero,activation", [(0, "none"), (255, "none"), (131, "relu"), (7, "relu6")])
def test_results_far_out_of_range(zero, activation, machine):
    """Integers of 16 bits would not hold them, those of 32 do; or would not either."""
    x, w, residual = images(3, 8, 5, 9), filters(67, 8, 1, 1), images(3, 67, 5, 9)
    for size in (3e2, 4e4, 1e6, 1e8, 1e12) if machine not in ("cuda", "triton") else (4e4, 1e12):
        check(
            *(x, w, torch.full((67,), size / 1e5), torch.randn(67) * size), input_scale=1.0, input_zero_point=128,
            output_scale=1.0, output_zero_point=zero, dtype=torch.uint8, activation=activation, residual=residual,
            residual_scale=1 + size / 256, residual_zero_point=100,
        )  # fmt: skip


def test_no_images():
    y = fF.int8_conv2d(images(0, 4, 5, 5), filters(6, 4, 3, 3), 1.0, input_scale=1.0)
    assert y.shape == (0, 6, 3, 3)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads):
    x, w = images(2, 32, 20, 21), filters(70, 32, 3, 3)
    options = dict(padding=1, input_scale=0.1, input_zero_point=17)
    y = fF.int8_conv2d(x, w, 0.01, **options)
    torch.set_num_threads(threads)
    assert torch.equal(fF.int8_conv2d(x, w, 0.01, **options), y)


def test_the_reference_is_the_formula():
    x, w, residual = images(2, 6, 7, 8), filters(9, 6, 3, 3), images(2, 9, 7, 8, dtype=torch.int8)
    rest = (scales(9), torch.randn(9), 1, 1)
    options = dict(input_scale=0.1, input_zero_point=40, activation="relu6", residual_scale=0.3, residual_zero_point=-9)
    for more in ({}, dict(output_scale=0.05, output_zero_point=3, dtype=torch.uint8)):
        with fastnn.backend("reference"):
            y = fF.int8_conv2d(x, w, *rest, residual=residual, **options, **more)
        assert torch.equal(y, expected(x, w, *rest, residual=residual, **options, **more))


def arguments():
    x, w = images(2, 8, 6, 5), filters(12, 8, 3, 3)
    scalar = torch.tensor
    whole = torch.int32
    return (
        *(x, w, scales(12), torch.randn(12), scalar(0.1), scalar(30, dtype=whole), scalar(0.2), scalar(9, dtype=whole)),
        *(images(2, 12, 6, 5), scalar(0.3), scalar(4, dtype=whole), [1, 1], [1, 1], [1, 1], 1, "relu", torch.uint8),
    )


def test_opcheck():
    opcheck(torch.ops.fastnn.int8_conv.default, arguments())


def test_compile():
    x, w = images(2, 8, 6, 5), filters(12, 8, 3, 3)

    def function(x, scale):
        return fF.int8_conv2d(x, w, scale, padding=1, input_scale=0.1, input_zero_point=3, activation="relu")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    scale = scales(12)
    assert torch.equal(compiled(x, scale), function(x, scale))


def test_vmap():
    x, w = torch.stack([images(2, 8, 6, 5) for _ in range(3)]), filters(12, 8, 3, 3)
    options = dict(padding=1, input_scale=0.1, input_zero_point=3)
    y = torch.func.vmap(lambda x: fF.int8_conv2d(x, w, 0.1, **options))(x)
    assert torch.equal(y, torch.stack([fF.int8_conv2d(one, w, 0.1, **options) for one in x]))
    ws = torch.stack([filters(12, 8, 3, 3) for _ in range(3)])
    y = torch.func.vmap(lambda w: fF.int8_conv2d(x[0], w, 0.1, **options))(ws)
    assert torch.equal(y, torch.stack([fF.int8_conv2d(x[0], one, 0.1, **options) for one in ws]))


@pytest.mark.parametrize(
    "error,match,change",
    [
        (TypeError, "input", dict(input=torch.rand(1, 4, 5, 5))),
        (TypeError, "input", dict(input=[1])),
        (ValueError, "input", dict(input=torch.zeros(4, 5, 5, dtype=torch.uint8))),
        (TypeError, "weight", dict(weight=torch.zeros(6, 4, 3, 3, dtype=torch.uint8))),
        (ValueError, "weight", dict(weight=torch.zeros(6, 5, 3, 3, dtype=torch.int8))),
        (ValueError, "weight", dict(weight=torch.zeros(6, 4, 0, 3, dtype=torch.int8))),
        (ValueError, "input", dict(weight=torch.zeros(6, 4, 6, 3, dtype=torch.int8))),
        (ValueError, "weight_scale", dict(weight_scale=torch.ones(5))),
        (ValueError, "weight_scale", dict(weight_scale=0.0)),
        (ValueError, "weight_scale", dict(weight_scale=torch.tensor([1, 1, -1, 1, 1, 1.0]))),
        (ValueError, "input_scale", dict(input_scale=float("nan"))),
        (TypeError, "input_scale", dict(input_scale="1")),
        (ValueError, "input_zero_point", dict(input_zero_point=256)),
        (ValueError, "input_zero_point", dict(input_zero_point=-1)),
        (ValueError, "bias", dict(bias=torch.ones(5))),
        (TypeError, "bias", dict(bias=torch.ones(6, dtype=torch.int32))),
        (ValueError, "output_scale", dict(dtype=torch.uint8)),
        (ValueError, "output_scale", dict(output_scale=1.0)),
        (ValueError, "output_scale", dict(output_scale=torch.inf, dtype=torch.uint8)),
        (ValueError, "output_zero_point", dict(output_scale=1.0, dtype=torch.int8, output_zero_point=128)),
        (ValueError, "dtype", dict(dtype=torch.float64)),
        (ValueError, "dtype", dict(dtype="int4")),
        (ValueError, "activation", dict(activation="gelu")),
        (ValueError, "stride", dict(stride=0)),
        (ValueError, "padding", dict(padding=(1, 2, 3))),
        (ValueError, "padding", dict(padding="same", stride=2)),
        (ValueError, "padding", dict(padding="full")),
        (ValueError, "groups", dict(groups=4)),
        (ValueError, "residual", dict(residual=torch.zeros(1, 6, 3, 4, dtype=torch.uint8), residual_scale=1.0)),
        (TypeError, "residual", dict(residual=torch.zeros(1, 6, 3, 3), residual_scale=1.0)),
        (ValueError, "residual_scale", dict(residual=torch.zeros(1, 6, 3, 3, dtype=torch.uint8))),
    ],
)
def test_bad_input(error, match, change):
    call = dict(input=images(1, 4, 5, 5), weight=filters(6, 4, 3, 3), weight_scale=1.0, input_scale=0.1)
    with pytest.raises(error, match=match):
        fF.int8_conv2d(**{**call, **change})


def test_filters_too_long_for_int32():
    x, w = torch.zeros(1, 65794, 1, 1, dtype=torch.uint8), torch.zeros(1, 65794, 1, 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="65793"):
        fF.int8_conv2d(x, w, 1.0, input_scale=1.0)
    x, w = torch.full((1, 65793, 1, 1), 255, dtype=torch.uint8), torch.full((1, 65793, 1, 1), -128, dtype=torch.int8)
    assert fF.int8_conv2d(x, w, 1.0, input_scale=1.0).item() == numpy.float32(-128 * 255 * 65793)
