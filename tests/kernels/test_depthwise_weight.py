"""The weight's gradient of depthwise convolutions: vectors of channels, of columns, and planes that are turned, with windows
of 3, 5 and 7 taps and without."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from .calls import FLOATS, convolve
from .test_conv import LAYOUTS, channels_last, dense, integers, interior, problem, surroundings_are_nan

dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))


def case(n, channels, size, kernel, stride=1, padding=None, dilation=1, multiplier=1):
    """Of two dimensions, or three; padded by half the kernel where nothing else is said."""
    ones = (1,) * (3 - len(size))

    def three(value, fill):
        return (fill,) * len(ones) + (value if isinstance(value, tuple) else (value,) * len(size))

    padding = tuple(k // 2 for k in kernel) if padding is None else padding
    return problem(
        n,
        1,
        multiplier,
        channels,
        (*ones, *size),
        (*ones, *kernel),
        stride=three(stride, 1),
        padding=three(padding, 0),
        dilation=three(dilation, 1),
    )


#: Channels and columns at vectors of 4, 8 and 16 plus and minus one, in maps that are turned and that are not.
SIZES = [
    (channels, size, stride)
    for (channels, size), stride in itertools.product(
        [
            (3, (9, 17)),
            (15, (7, 7)),
            (16, (6, 15)),
            (17, (14, 14)),
            (31, (7, 3)),
            (33, (5, 16)),
            (8, (11, 33)),
            (5, (2, 40)),
        ],
        (1, 2),
    )
]
CASES = {
    **{
        f"{k}x{k}, {channels} of {size[0]}x{size[1]}, stride {stride}": case(2, channels, size, (k, k), stride)
        for k in range(1, 8)
        for channels, size, stride in SIZES
        if k in (3, 5, 7) or channels in (17, 8)
    },
    "3x7": case(2, 18, (11, 19), (3, 7)),
    "7x3": case(2, 18, (11, 19), (7, 3), stride=(2, 1)),
    "1x5": case(2, 18, (9, 20), (1, 5), stride=(1, 2)),
    "5x1": case(2, 18, (9, 20), (5, 1), stride=(2, 1)),
    "9x11": case(1, 17, (15, 21), (9, 11)),
    "9x9 of 3x3": case(2, 17, (3, 3), (9, 9)),
    "11x13 of 4x5": case(2, 33, (4, 5), (11, 13)),
    "9x9 of 6x6, dilated": case(1, 16, (6, 6), (9, 9), dilation=2, padding=8),
    "7x7 of one column": case(2, 17, (2, 1), (7, 7), padding=4),
    "stride 3": case(2, 18, (13, 20), (5, 5), stride=3),
    "dilated": case(2, 18, (13, 20), (3, 3), dilation=2, padding=2),
    "dilated unevenly": case(2, 17, (17, 23), (5, 3), dilation=(2, 3), padding=(4, 3)),
    "dilated and strided": case(2, 17, (17, 23), (3, 5), stride=2, dilation=(3, 2), padding=(3, 4)),
    "dilated further than the map": case(1, 17, (4, 5), (3, 3), dilation=7, padding=7),
    "no padding": case(2, 17, (12, 18), (5, 5), padding=0),
    "more padding than taps": case(2, 17, (4, 6), (3, 3), padding=5),
    "more padding than taps, stride 2": case(2, 17, (4, 6), (5, 5), stride=2, padding=6),
    "fewer positions than taps": case(3, 20, (9, 8), (7, 7), padding=0),
    "one position": case(3, 20, (7, 7), (7, 7), padding=0),
    "a line": case(2, 17, (1, 1031), (1, 3)),
    "a column": case(2, 17, (1031, 1), (3, 1)),
    "many channels": case(9, 150, (7, 7), (3, 3)),
    "many positions": case(2, 18, (61, 57), (3, 3)),
    "two filters a channel": case(2, 17, (9, 13), (3, 3), multiplier=2),
    "deep": case(2, 17, (5, 6, 9), (3, 3, 3)),
    "deep and strided": case(2, 9, (7, 6, 11), (3, 5, 3), stride=(2, 2, 1), dilation=(1, 1, 2)),
}


def gradient(x, y, kernel, options):
    """In float64, tap by tap."""
    front = [v for p in reversed(options["padding"]) for v in (p, p)]
    x, y = F.pad(x.double(), front), y.double()
    x = x.repeat_interleave(y.shape[1] // x.shape[1], 1)
    out = torch.empty(y.shape[1], 1, *kernel, dtype=torch.float64)
    for taps in itertools.product(*map(range, kernel)):
        at = [
            slice(t * d, t * d + s * (n - 1) + 1, s)
            for t, d, s, n in zip(taps, options["dilation"], options["stride"], y.shape[2:], strict=True)
        ]
        out[(slice(None), 0, *taps)] = (x[(slice(None), slice(None), *at)] * y).sum((0, 2, 3, 4))
    return out


@pytest.mark.parametrize("name", CASES)
@dtypes
def test_integers(isa, dtype, name):
    """Exactly, in every layout, in the middle of NaN."""
    x_shape, w_shape, y_shape, options = CASES[name]
    x, y = integers(x_shape, dtype), integers(y_shape, dtype)
    expected = gradient(x, y, w_shape[2:], options).to(dtype)
    layouts = [(f, f) for f in LAYOUTS] + [(dense, channels_last), (channels_last, dense)]
    for of_x, of_y in layouts:
        for of_w in (dense, channels_last, interior):
            w = of_w(torch.zeros(w_shape, dtype=dtype)).fill_(math.nan)
            laid = (of_x(x), w, of_y(y))
            assert torch.equal(convolve("weight", *laid, **options), expected), (of_x, of_y, of_w)
            assert all(surroundings_are_nan(t) for t in laid)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)], ids=str)
def test_nothing(isa, size):
    """No image, or no position, leaves zeros."""
    for n, (h, w) in ((0, (5, 5)), (2, size)):
        x = torch.empty(n, 20, 1, h, w)
        weight = torch.full((20, 1, 1, 3, 3), math.nan)
        out = torch.empty(n, 20, 1, h, w)
        options = {"padding": (0, 1, 1), "groups": 20}
        assert not convolve("weight", x, weight, out, **options).any()


@pytest.mark.parametrize("layout", [dense, channels_last])
@pytest.mark.parametrize("size", [(7, 9), (120, 96), (1, 20011)], ids=str)
def test_long_sums(isa, size, layout):
    """Of numbers of one sign, whose rounding errors would add up in one long chain."""
    x_shape, w_shape, y_shape, options = case(4 if size[0] > 1 else 1, 18, size, (min(3, size[0]), 3))
    x, y = torch.rand(x_shape), torch.rand(y_shape)
    expected = gradient(x, y, w_shape[2:], options)
    found = convolve("weight", layout(x), torch.empty(w_shape), layout(y), **options)
    assert bool(((found.double() - expected).abs() <= 2.0**-24 * 64 * expected).all())


@pytest.mark.parametrize("layout", [dense, channels_last])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_the_number_of_threads_leaves_no_trace(isa, layout, kernel):
    threads = torch.get_num_threads()
    try:
        for shape in ((3, 33, (30, 31)), (8, 70, (7, 7)), (2, 5, (90, 64))):
            x_shape, w_shape, y_shape, options = case(*shape, (kernel, kernel))
            x, y = layout(torch.randn(x_shape)), layout(torch.randn(y_shape))
            results = []
            for number in (1, 2, 3, 2):
                torch.set_num_threads(number)
                results.append(convolve("weight", x, torch.full(w_shape, math.nan), y, **options))
            assert all(torch.equal(results[0], r) for r in results[1:])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("stride", [1, 2])
def test_what_is_not_finite_stays_with_its_taps(isa, stride):
    """An infinity at an edge makes infinities of the taps that meet it, and no NaN of the others."""
    for size in ((7, 7), (12, 20)):
        x_shape, w_shape, y_shape, options = case(1, 16, size, (5, 5), stride)
        x, y = integers(x_shape, torch.float32, low=1), integers(y_shape, torch.float32, low=1)
        x[0, 3, 0, 0, size[1] - 1] = math.inf
        x[0, 4, 0, size[0] - 1, 0] = math.inf
        expected = gradient(x, y, w_shape[2:], options)
        expected = torch.where(expected.isnan(), finite_or_infinite(x, y, w_shape, options), expected)
        found = convolve("weight", channels_last(x), torch.empty(w_shape), channels_last(y), **options)
        assert torch.equal(found, expected.float())


def finite_or_infinite(x, y, w_shape, options):
    """With the padding left out of the sums."""
    finite = gradient(x.nan_to_num(posinf=0.0), y, w_shape[2:], options)
    meets = gradient(x.isinf(), torch.ones_like(y), w_shape[2:], options)
    return torch.where(meets > 0, math.inf, finite)
