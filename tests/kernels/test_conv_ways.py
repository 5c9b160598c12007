"""The ways of a convolution that only some shapes go, each asked whether it was gone: strips of patches read where they lie,
windows of depthwise filters, and lines scattered over few results."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastnn import _cpu

from .calls import FLOATS, convolve, exact
from .test_conv import LAYOUTS, WEIGHTS, channels_last, dense, exactly, integers, isa, problem, surroundings_are_nan

__all__ = ["isa"]

#: What strips are made of: first layers, runs of K that are merged into a block and cut into several, lines of one row of a
#: tile more and less, images that are read in place, rows that collide in a cache, taps apart, depth, groups.
STRIPS = {
    "first layer": problem(2, 3, 16, 1, (1, 20, 31), (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3)),
    "lines of 13": problem(1, 8, 33, 1, (1, 9, 13), (1, 3, 3), padding=(0, 1, 1)),
    "lines of 14": problem(1, 8, 31, 1, (1, 9, 14), (1, 3, 3), padding=(0, 1, 1)),
    "lines of 15": problem(1, 9, 17, 1, (1, 9, 15), (1, 3, 3), padding=(0, 1, 1)),
    "lines of 29": problem(3, 16, 16, 1, (1, 5, 29), (1, 3, 3), padding=(0, 1, 1)),
    "cut runs": problem(1, 57, 19, 1, (1, 7, 9), (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
    "many blocks": problem(1, 230, 16, 1, (1, 4, 5), (1, 3, 3), padding=(0, 1, 1)),
    "whole runs": problem(1, 32, 40, 1, (1, 8, 8), (1, 5, 5), padding=(0, 2, 2)),
    "in place": problem(2, 24, 18, 1, (1, 9, 11), (1, 1, 1), stride=(1, 2, 2)),
    "in place, taps": problem(2, 10, 18, 1, (1, 9, 11), (1, 3, 2), stride=(1, 1, 2)),
    "colliding": problem(1, 512, 16, 1, (1, 3, 33), (1, 1, 1), stride=(1, 1, 2)),
    "colliding taps": problem(1, 512, 16, 1, (1, 3, 31), (1, 1, 3), stride=(1, 1, 2), padding=(0, 0, 1)),
    "dilated": problem(1, 16, 16, 1, (1, 12, 13), (1, 3, 3), padding=(0, 2, 3), dilation=(1, 2, 3)),
    "deep": problem(2, 5, 20, 1, (7, 6, 9), (3, 2, 3), stride=(2, 1, 1), padding=(1, 1, 1)),
    "deep, in place": problem(1, 8, 16, 1, (5, 6, 7), (2, 3, 2), stride=(1, 2, 1)),
    "a line": problem(2, 12, 37, 1, (1, 1, 67), (1, 1, 5), padding=(0, 0, 4)),
    "groups": problem(2, 8, 16, 3, (1, 8, 9), (1, 3, 3), stride=(1, 2, 1), padding=(0, 1, 1)),
}
#: 3 x 3 filters of planes, at tiles of 7 and 4 positions plus and minus one.
WINDOWS = [
    (channels, size, stride, padding)
    for (channels, size), stride, padding in itertools.product(
        [(16, (7, 7)), (17, (8, 15)), (33, (2, 29)), (48, (13, 6)), (16, (1, 4)), (31, (3, 1))], (1, 2), (1, 0, 2)
    )
    if min(size) + 2 * padding >= 3
]

#: What sums over strips' lines are made of besides: several images a block, K in chunks, parts of a line, lines of odd length.
SUMMED = {
    **STRIPS,
    "whole images": problem(13, 20, 17, 1, (1, 7, 7), (1, 3, 3), padding=(0, 1, 1)),
    "chunks": problem(4, 9, 33, 1, (1, 40, 61), (1, 3, 3), padding=(0, 1, 1)),
    "long lines": problem(2, 20, 40, 1, (1, 2, 701), (1, 1, 3), padding=(0, 0, 1)),
    "one line an image": problem(3, 24, 40, 1, (1, 30, 41), (1, 1, 1)),
    "odd lines": problem(3, 16, 65, 1, (1, 5, 13), (1, 3, 3), padding=(0, 1, 1)),
    "strips of an image": problem(1, 64, 16, 1, (1, 61, 40), (1, 3, 3), padding=(0, 1, 1)),
    "one position": problem(2, 17, 16, 1, (1, 3, 3), (1, 3, 3)),
}
#: Few channels of the input (its gradient is scattered), at steps that divide the filter or not; bands of rows; lines of a
#: panel more and less; filters of one row, more than one block of K, groups, planes in depth.
FEW_CHANNELS = {
    "first layer": problem(2, 3, 16, 1, (1, 20, 31), (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3)),
    "eleven by eleven": problem(1, 3, 20, 1, (1, 40, 67), (1, 11, 11), stride=(1, 4, 4), padding=(0, 2, 2)),
    "step past the filter": problem(1, 2, 17, 1, (1, 11, 14), (1, 2, 2), stride=(1, 3, 3)),
    "padding past the filter": problem(1, 1, 16, 1, (1, 5, 9), (1, 3, 3), padding=(0, 4, 5)),
    "bands": problem(1, 5, 16, 1, (1, 130, 131), (1, 3, 5), padding=(0, 1, 2)),
    "long lines": problem(1, 8, 33, 1, (1, 2, 300), (1, 1, 5), padding=(0, 0, 1)),
    "blocks of depth": problem(1, 4, 300, 1, (1, 9, 15), (1, 3, 3), padding=(0, 1, 1)),
    "dilated": problem(1, 3, 16, 1, (1, 14, 17), (1, 3, 3), stride=(1, 2, 1), padding=(0, 2, 3), dilation=(1, 2, 3)),
    "planes": problem(2, 3, 16, 1, (4, 6, 7), (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
    "groups": problem(2, 2, 16, 3, (1, 8, 9), (1, 3, 3), stride=(1, 2, 1), padding=(0, 1, 1)),
}
#: Few filters, which see every position.
FEW_FILTERS = {
    "images": problem(2, 16, 3, 1, (1, 12, 33), (1, 3, 3), padding=(0, 1, 1)),
    "one filter": problem(1, 17, 1, 1, (1, 15, 31), (1, 5, 3), padding=(0, 2, 0)),
    "dilated": problem(1, 19, 8, 1, (1, 14, 32), (1, 3, 3), padding=(0, 2, 3), dilation=(1, 2, 3)),
    "bands": problem(1, 16, 7, 1, (1, 140, 70), (1, 9, 9), padding=(0, 4, 4)),
    "a line": problem(2, 140, 2, 1, (1, 1, 67), (1, 1, 4), padding=(0, 0, 3)),
    "groups": problem(2, 16, 4, 2, (1, 8, 9), (1, 3, 3)),
}

dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))


def window(channels, size, stride, padding, n=2):
    return problem(n, 1, 1, channels, (1, *size), (1, 3, 3), stride=(1, stride, stride), padding=(0, padding, padding))


@pytest.mark.parametrize("name", STRIPS)
@dtypes
def test_strips_of_integers(isa, dtype, name):
    """Exactly, in every layout, in the middle of NaN; the input's gradient too, whose taps run backwards."""
    x_shape, w_shape, y_shape, options = STRIPS[name]
    x, w, y = (integers(shape, dtype) for shape in (x_shape, w_shape, y_shape))
    for product in ("forward", "input"):
        expected = exactly(product, x, w, y, options).to(dtype)
        # The two layouts that networks have in all combinations, the odd ones once each.
        odd = [(layout, w_layout, layout) for layout, w_layout in zip(LAYOUTS[2:], itertools.cycle(WEIGHTS))]
        for of_x, of_w, of_y in (*itertools.product((dense, channels_last), WEIGHTS, (dense, channels_last)), *odd):
            laid = [of_x(x), of_w(w), of_y(y)]
            laid[2 if product == "forward" else 0].fill_(math.nan)
            _cpu.reset_counters()
            assert torch.equal(convolve(product, *laid, **options), expected), (product, of_x, of_w, of_y)
            assert all(surroundings_are_nan(t) for t in laid)
            if product == "forward" and dtype in (torch.float32, torch.float64) and of_x is channels_last:
                emulated = "amx" in isa and dtype is torch.float32
                assert emulated or _cpu.counters().get("strips", 0) == options["groups"], (of_x, of_w, of_y)


@pytest.mark.parametrize("name", SUMMED)
@dtypes
def test_sums_over_strips_of_integers(isa, dtype, name):
    """The weight's gradient, exactly, in every layout, in the middle of NaN."""
    x_shape, w_shape, y_shape, options = SUMMED[name]
    x, w, y = (integers(shape, dtype) for shape in (x_shape, w_shape, y_shape))
    expected = exactly("weight", x, w, y, options).to(dtype)
    odd = [(layout, dense, dense) for layout in LAYOUTS[2:]]
    for of_x, of_w, of_y in (*itertools.product((dense, channels_last), WEIGHTS, (dense, channels_last)), *odd):
        laid = [of_x(x), of_w(w).fill_(math.nan), of_y(y)]
        _cpu.reset_counters()
        assert torch.equal(convolve("weight", *laid, **options), expected), (of_x, of_w, of_y)
        assert all(surroundings_are_nan(t) for t in laid)
        if "amx" not in isa and of_x is channels_last:
            assert _cpu.counters().get("strips transposed", 0) == options["groups"], (of_x, of_w, of_y)


@pytest.mark.parametrize("kind", [None, "relu", "gelu"])
@dtypes
def test_what_strips_end_with(isa, dtype, kind):
    """activation(conv(x, w) + bias + residual), rounded once, whether done on registers (relu) or after (gelu)."""
    x_shape, w_shape, y_shape, options = problem(2, 9, 35, 1, (1, 9, 30), (1, 3, 3), padding=(0, 1, 1))
    x, w = torch.randn(x_shape).to(dtype), torch.randn(w_shape).to(dtype)
    u = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    u_sum = 2.0**-53 if dtype is torch.float64 else 2.0**-24
    bias, residual = torch.randn(35).to(dtype), torch.randn(y_shape).to(dtype)
    wide = exactly("forward", x, w, residual, options) + bias.double().view(-1, 1, 1, 1) + residual.double()
    magnitude = exactly("forward", x.abs(), w.abs(), residual, options) + wide.abs() + 10
    expected = wide if kind is None else exact(kind, wide)
    for of_x, of_y in itertools.product((dense, channels_last), repeat=2):
        target = of_y(torch.full_like(residual, math.nan))
        found = convolve("forward", of_x(x), w, target, **options, bias=bias, residual=of_y(residual), activation=kind)
        assert bool(((found.double() - expected).abs() <= (1.01 * u + 100 * u_sum) * magnitude).all()), (of_x, of_y)


@pytest.mark.parametrize(
    "product, name", [("input", name) for name in FEW_CHANNELS] + [("forward", name) for name in FEW_FILTERS]
)
@dtypes
def test_scattered_integers(isa, dtype, product, name):
    """Exactly, in every layout, in the middle of NaN."""
    x_shape, w_shape, y_shape, options = (FEW_CHANNELS if product == "input" else FEW_FILTERS)[name]
    x, w, y = (integers(shape, dtype) for shape in (x_shape, w_shape, y_shape))
    expected = exactly(product, x, w, y, options).to(dtype)
    for of_x, of_w, of_y in [*itertools.product(LAYOUTS, WEIGHTS, (dense, channels_last)), (dense, dense, LAYOUTS[-1])]:
        laid = [of_x(x), of_w(w), of_y(y)]
        laid[2 if product == "forward" else 0].fill_(math.nan)
        _cpu.reset_counters()
        assert torch.equal(convolve(product, *laid, **options), expected), (of_x, of_w, of_y)
        assert all(surroundings_are_nan(t) for t in laid)
        if "amx" not in isa:
            assert _cpu.counters().get("scatter", 0) == options["groups"]


@pytest.mark.parametrize("kind", [None, "relu", "gelu"])
@dtypes
def test_what_scattering_ends_with(isa, dtype, kind):
    x_shape, w_shape, y_shape, options = problem(2, 24, 5, 1, (1, 9, 37), (1, 3, 3), padding=(0, 1, 1))
    x, w = torch.randn(x_shape).to(dtype), torch.randn(w_shape).to(dtype)
    bias, residual = torch.randn(5).to(dtype), torch.randn(y_shape).to(dtype)
    wide = exactly("forward", x, w, residual, options) + bias.double().view(-1, 1, 1, 1) + residual.double()
    magnitude = exactly("forward", x.abs(), w.abs(), residual, options) + wide.abs() + 10
    expected = wide if kind is None else exact(kind, wide)
    u = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    u_sum = 2.0**-53 if dtype is torch.float64 else 2.0**-24
    for layout in (dense, channels_last):
        target = layout(torch.full_like(residual, math.nan))
        found = convolve(
            "forward", layout(x), w, target, **options, bias=bias, residual=layout(residual), activation=kind
        )
        assert bool(((found.double() - expected).abs() <= (1.01 * u + 100 * u_sum) * magnitude).all()), layout


@pytest.mark.parametrize("product", ["forward", "input", "weight"])
def test_threads_do_not_change_a_bit(isa, product):
    threads = torch.get_num_threads()
    cases = [STRIPS["first layer"], STRIPS["cut runs"], STRIPS["deep"], window(33, (9, 15), 1, 1)]
    if product == "weight":
        cases += [SUMMED["chunks"], SUMMED["one line an image"], SUMMED["whole images"]]
    elif product == "input":
        cases += [FEW_CHANNELS["bands"], FEW_CHANNELS["eleven by eleven"]]
    else:
        cases += [FEW_FILTERS["bands"]]
    target = {"input": 0, "weight": 1, "forward": 2}[product]
    try:
        for x_shape, w_shape, y_shape, options in cases:
            x, w, y = (channels_last(torch.randn(shape)) for shape in (x_shape, w_shape, y_shape))
            operands = [x, w.contiguous(), y]
            results = []
            for number in (1, 2, 3, 5):
                torch.set_num_threads(number)
                operands[target] = torch.full_like(operands[target], math.nan)
                results.append(convolve(product, *operands, **options))
            assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("where", [(0, 0), (4, 17), (8, 29)], ids=str)
def test_what_is_not_finite_stays_in_its_strip(isa, where):
    """An infinity makes infinities of the results that see it, and of no others."""
    for x_shape, w_shape, y_shape, options in (
        problem(1, 16, 16, 1, (1, 9, 30), (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
        window(16, (9, 30), 1, 1, n=1),
    ):
        x, w = integers(x_shape, torch.float32), integers(w_shape, torch.float32, low=1, high=3)
        x[0, 3, 0, where[0], where[1]] = math.inf
        y = torch.full(y_shape, math.nan)
        expected = exactly("forward", x, w, y, options).float()
        assert not expected.isfinite().all()
        for layout in (dense, channels_last):
            found = convolve("forward", layout(x), w, layout(y), **options)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@dtypes
def test_windows_of_integers(isa, dtype):
    """Forward, and the input's gradient, which at stride 1 is a window whose taps run backwards."""
    for channels, size, stride, padding in WINDOWS:
        x_shape, w_shape, y_shape, options = window(channels, size, stride, padding)
        x, w, y = (integers(shape, dtype) for shape in (x_shape, w_shape, y_shape))
        for product, of_w in itertools.product(("forward", "input"), (dense, reversed_filters)):
            laid = [channels_last(x), of_w(w), channels_last(y)]
            laid[2 if product == "forward" else 0].fill_(math.nan)
            expected = exactly(product, x, w, y, options).to(dtype)
            _cpu.reset_counters()
            assert torch.equal(convolve(product, *laid, **options), expected), (channels, size, stride, padding)
            assert all(surroundings_are_nan(t) for t in laid)
            if product == "forward":
                assert _cpu.counters().get("depthwise window", 0) == 1


def reversed_filters(w):
    return dense(w.transpose(3, 4)).transpose(3, 4)


@dtypes
def test_narrow_planes_are_turned(isa, dtype):
    """Contiguous ones, forward and the input's gradient, in the middle of NaN: windows, other filters, steps."""
    for kernel, stride, padding in ((3, 1, 1), (3, 2, 1), (5, 1, 2), (2, 1, 0)):
        x_shape, w_shape, y_shape, options = problem(
            3, 1, 1, 67, (1, 4, 2), (1, kernel, kernel), stride=(1, stride, stride), padding=(0, padding, padding)
        )
        x, w, y = (integers(shape, dtype) for shape in (x_shape, w_shape, y_shape))
        for product in ("forward", "input"):
            laid = [dense(x), dense(w), dense(y)]
            laid[2 if product == "forward" else 0].fill_(math.nan)
            expected = exactly(product, x, w, y, options).to(dtype)
            _cpu.reset_counters()
            assert torch.equal(convolve(product, *laid, **options), expected), (kernel, stride, product)
            assert all(surroundings_are_nan(t) for t in laid)
            assert _cpu.counters()["depthwise turned"] == 1


@pytest.mark.parametrize("kind", [None, "relu", "gelu"])
@dtypes
def test_what_windows_end_with(isa, dtype, kind):
    u = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    u_sum = 2.0**-53 if dtype is torch.float64 else 2.0**-24
    for stride in (1, 2):
        x_shape, w_shape, y_shape, options = window(37, (9, 16), stride, 1)
        x, w, bias = (torch.randn(shape).to(dtype) for shape in (x_shape, w_shape, (37,)))
        y = torch.full(y_shape, math.nan, dtype=dtype)
        wide = exactly("forward", x, w, y, options) + bias.double().view(-1, 1, 1, 1)
        magnitude = exactly("forward", x.abs(), w.abs(), y, options) + bias.double().abs().view(-1, 1, 1, 1) + 1
        expected = wide if kind is None else exact(kind, wide)
        found = convolve("forward", channels_last(x), w, channels_last(y), **options, bias=bias, activation=kind)
        assert bool(((found.double() - expected).abs() <= (1.01 * u + 100 * u_sum) * magnitude).all())
