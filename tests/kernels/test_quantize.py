"""The quantization kernels of each instruction set, to the bit, against the formulas in plain torch and torch's own functions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastnn import _cpu
from fastnn.backends import Kernels
from fastnn.backends._quantize import SCHEME
from fastnn.backends.reference import quantize as formulas

from .calls import FLOATS

kernels = Kernels("quantize")
# amx and amx-emulated have no kernels of their own for this.
pytestmark = pytest.mark.not_on("amx", "amx-emulated")
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
schemes = pytest.mark.parametrize("scheme", formulas.STORAGE)


def name(dtype):
    return str(dtype).removeprefix("torch.")


def bits(x):
    return x.view(torch.uint8) if x.dtype in FLOAT8 else x


def assert_same(found, expected):
    """To the bit, other than which NaN it is."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(bits(found), bits(expected), rtol=0, atol=0, equal_nan=True)


def numbers(*shape):
    x = torch.randn(shape) * 3
    x.view(-1)[::13], x.view(-1)[1::17], x.view(-1)[2::19] = math.nan, math.inf, -math.inf
    return x


def granularities(shape):
    """(axis, group_size): everything that changes which loop a kernel takes."""
    dims, k = len(shape), shape[-1]
    yield [], 0
    for g in (1, 2, 17, 32, 64, 128, k):
        if k % g == 0:
            yield [], g
    for count in range(1, dims + 1):
        for axis in itertools.combinations(range(dims), count):
            yield list(axis), 0


def parameters(shape, axis, group, scheme):
    size = [*shape[:-1], shape[-1] // group] if group else [shape[a] for a in axis]
    scale = torch.rand(size) * 0.1 + 0.01
    if scheme not in formulas.RANGE:
        return scale, None
    least, most = formulas.RANGE[scheme]
    return scale, torch.randint(least, most + 1, size)


def layouts(x):
    yield x
    yield x.transpose(0, -1).contiguous().transpose(0, -1)
    yield torch.stack((torch.full_like(x, 6e4), x), -1)[..., 1]
    if x.dim() == 4:
        yield x.contiguous(memory_format=torch.channels_last)
    yield x[:1].expand(x.shape)


SHAPES = ((2,), (62,), (3, 34), (5, 7, 66), (2, 129, 6), (3, 1, 640), (1, 2062), (4, 3, 6, 128))


def cases():
    """Each granularity of each shape in one dtype and one layout, and in the course of them in all."""
    for s, shape in enumerate(SHAPES):
        views = [list(layouts(numbers(*shape).to(dtype))) for dtype in FLOATS]
        for i, (axis, group) in enumerate(granularities(shape)):
            of_dtype = views[(i + s) % 4]
            yield i, of_dtype[i // 4 % len(of_dtype)], axis, group


def some_cases(machine):
    """As many as there is time for: the devices that the CPU plays are slow."""
    if machine == "triton":
        return [case for case in cases() if case[1].numel() < 2000][1::5]
    return list(cases())[:: 3 if machine == "cuda" else 1]


@schemes
def test_every_granularity_and_layout(machine, scheme):
    for _ in range(1 if machine == "triton" else 2):
        for i, x, axis, group in some_cases(machine):
            scale, zero_point = parameters(x.shape, axis, group, scheme)
            shift = zero_point if i % 2 else None
            args = (scale, shift, (None, torch.tensor(99 - i))[i // 2 % 2], axis, group, scheme)
            q = kernels.quantize(x, *args)
            assert_same(q, formulas.quantize(x, *args))
            if scheme not in formulas.PACKED and 0 not in x.stride():
                assert q.stride() == torch.empty_like(x).stride()
            back = (scale, shift, axis, group, scheme, FLOATS[i % 4])
            assert_same(kernels.dequantize(q, *back), formulas.dequantize(q, *back))


@schemes
def test_scales_of_every_granularity(machine, scheme):
    for i, x, axis, group in some_cases(machine):
        for symmetric in (True, False):
            if (scheme.startswith("u") and symmetric) or (scheme not in formulas.RANGE and not symmetric):
                continue
            args = (axis, group, scheme, symmetric)
            expected = formulas.choose_scale(x, *args)
            for found, one in zip(kernels.choose_scale(x, *args), expected, strict=True):
                assert_same(found, one)
            seed = (None, torch.tensor(3))[i % 2]
            found = kernels.quantize_dynamic(x, seed, *args)
            for a, b in zip(found, formulas.quantize_dynamic(x, seed, *args), strict=True):
                assert_same(a, b)


@pytest.mark.parametrize("dtype", FLOAT8, ids=name)
def test_every_float8(machine, dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    back = kernels.dequantize(codes, torch.ones(()), None, [], 0, name(dtype), torch.float32)
    assert_same(back, codes.float())
    assert torch.equal(back.signbit(), codes.float().signbit())
    # Every number, every point half way between two, and their neighbours.
    finite = codes.float()[codes.float().isfinite()].unique()
    middle = (finite[1:] + finite[:-1]) / 2
    points = torch.cat((finite, middle, torch.tensor([1e-45, 1e-39, -1e-45, 0.0, -0.0])))
    points = torch.cat((points, *(torch.nextafter(points, torch.tensor(to)) for to in (math.inf, -math.inf))))
    points = torch.cat((points, torch.randn(1000) * 10.0 ** torch.randint(-8, 5, (1000,))))
    largest = torch.finfo(dtype).max
    found = kernels.quantize(points, torch.ones(()), None, None, [], 0, name(dtype))
    assert_same(found, points.clamp(-largest, largest).to(dtype))
    for value in (math.inf, -math.inf, 1e30, math.nan, -math.nan):
        found = kernels.quantize(torch.tensor([value]), torch.ones(()), None, None, [], 0, name(dtype))
        assert_same(found.float(), torch.tensor([value]).clamp(-largest, largest))


@pytest.mark.parametrize("axis", [0, 1])
def test_as_torch_rounds(machine, axis):
    """torch's own fake_quantize is quantize and dequantize. Products that fall half way between integers are among these."""
    x = torch.cat((torch.randn(67, 130), torch.arange(-65.0, 65).expand(3, 130) / 8))
    scale, zero_point = 2.0 ** -torch.randint(0, 7, (x.shape[axis],)), torch.randint(0, 256, (x.shape[axis],))
    scale[::3] *= 1.37
    q = kernels.quantize(x, scale, zero_point, None, [axis], 0, "uint8")
    back = kernels.dequantize(q, scale, zero_point, [axis], 0, "uint8", torch.float32)
    assert torch.equal(back, torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), axis, 0, 255))


def test_denormal_numbers_flushed_or_not(isa):
    """torch.set_flush_denormal is no reason for other results where numbers are normal."""
    x = torch.tensor([0.0, 2**-6, 2**-9, 1.5 * 2**-9, 3.0, 448.0])
    codes = torch.arange(256, dtype=torch.uint8)
    for dtype in FLOAT8:
        args = (torch.ones(()), None, None, [], 0, name(dtype))
        back = (torch.ones(()), None, [], 0, name(dtype), torch.float32)
        expected = kernels.quantize(x, *args), kernels.dequantize(codes.view(dtype), *back)
        if not torch.set_flush_denormal(True):
            pytest.skip("this CPU does not flush")
        try:
            found = kernels.quantize(x, *args), kernels.dequantize(codes.view(dtype), *back)
        finally:
            torch.set_flush_denormal(False)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)


def test_the_extremes_of_a_scale(machine):
    for scale in (2.0**-126, 1.0, torch.finfo(torch.float32).max):
        x = torch.tensor([0.0, 2**-126, -1.0, 1.0, 3e38, -3e38, math.inf, -math.inf, math.nan]).repeat(9)
        for scheme in ("int8", "uint8", "int4", "float8_e5m2"):
            args = (torch.tensor(scale), None, None, [], 0, scheme)
            even = x[:-1] if len(x) % 2 else x
            assert_same(kernels.quantize(even, *args), formulas.quantize(even, *args))


@pytest.mark.parametrize("scheme", ["int8", "int4", "float8_e4m3fn"])
def test_threads_and_large_results(isa, scheme):
    x = torch.randn(259, 2048)
    scale = torch.rand(259, 16) * 0.1 + 0.01
    for seed in (None, torch.tensor(5)):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            q = kernels.quantize(x, scale, None, seed, [], 128, scheme)
            back = kernels.dequantize(q, scale, None, [], 128, scheme, torch.float32)
            results.append((q, back, *kernels.quantize_dynamic(x, seed, [0], 0, scheme, True)))
            results[-1] += tuple(kernels.choose_scale(x, [1], 0, scheme, True))
        for run in results[1:]:
            for a, b in zip(run, results[0], strict=True):
                assert_same(a, b)
        if seed is None:
            assert_same(results[0][0], formulas.quantize(x, scale, None, None, [], 128, scheme))


@pytest.mark.parametrize("scheme", ["int8", "uint4", "float8_e5m2"])
def test_long_rows_of_scales(isa, scheme):
    """Rows of scales longer than a chunk: threads begin at any element of a row."""
    for columns in (2048, 2050, 3140, 5122):
        x = torch.randn(57, columns)
        scale, zero_point = parameters(x.shape, [1], 0, scheme)
        for view in (x, x[:, :-2]):
            part = scale[: view.shape[1]], None if zero_point is None else zero_point[: view.shape[1]]
            for threads in (1, 3):
                torch.set_num_threads(threads)
                q = kernels.quantize(view, *part, None, [1], 0, scheme)
                assert_same(q, formulas.quantize(view, *part, None, [1], 0, scheme))
                back = kernels.dequantize(q, *part, [1], 0, scheme, torch.float32)
                assert_same(back, formulas.dequantize(q, *part, [1], 0, scheme, torch.float32))


def test_around_the_caches(isa):
    """More than the last cache holds: results are written around it, from any first address on."""
    x = torch.randn((8 << 20) + 200)
    for start in (0, 67):
        view = x[start:]
        q = kernels.quantize(view, torch.tensor(0.125), None, None, [], 0, "int8")
        assert torch.equal(q, (view * 8).round().clamp(-128, 127).to(torch.int8))
        back = kernels.dequantize(q[start:], torch.tensor(0.5), None, [], 0, "int8", torch.float32)
        assert torch.equal(back, q[start:].float() * 0.5)


def test_nothing_beyond_is_written(isa):
    for n in (2, 30, 62, 64, 66, 126, 130, 1022, 1026, 4098):
        for scheme, offset, step in itertools.product(formulas.STORAGE, (0, 1, 5), (1, 3)):
            packed = scheme in formulas.PACKED
            if packed and step != 1:
                continue
            x = torch.randn(n)
            scale = torch.full((), 0.05)
            count = n // 2 if packed else n * step
            memory = torch.full((count + 200,), 77, dtype=torch.uint8)
            out = memory[offset + 64 : offset + 64 + count]
            shape, strides = (n,), (step,)
            code = SCHEME[scheme]
            _cpu.quantize(x.data_ptr(), out.data_ptr(), scale.data_ptr(), 0, shape, (1,), strides, (0,), 1, 0, code, 0)
            wanted = bits(formulas.quantize(x, scale, None, None, [], 0, scheme)).view(torch.uint8)
            assert torch.equal(out[::step], wanted)
            memory[offset + 64 : offset + 64 + count : step] = 77
            assert memory.eq(77).all()
            spread = torch.full((n * 2 + 64,), 5.0)
            place = spread[offset + 16 :]
            _cpu.dequantize(
                wanted.data_ptr(), place.data_ptr(), scale.data_ptr(), 0, shape, (1,), (2,), (0,), 1, code, 0
            )
            held = wanted if packed else wanted.view(formulas.STORAGE[scheme])
            assert_same(place[: 2 * n : 2], formulas.dequantize(held, scale, None, [], 0, scheme, torch.float32))
            place[: 2 * n : 2] = 5
            assert spread.eq(5).all()


@pytest.mark.not_on("amx", "amx-emulated", "triton")
@pytest.mark.parametrize("scheme", ["int8", "uint4", "float8_e4m3fn", "float8_e5m2"])
def test_stochastic_rounding_is_fair(machine, scheme):
    """The mean of n roundings is within 6 standard deviations of the number; both neighbours occur, and no other."""
    n = 1 << 14
    for value in (0.3, 1.75, 2.0625, 5.999, 0.004):
        if scheme == "int8":
            value = -value
        x = torch.full((n,), value)
        zero_point = torch.tensor(3) if scheme == "uint4" else None
        q = kernels.quantize(x, torch.ones(()), zero_point, torch.tensor(17), [], 0, scheme)
        back = kernels.dequantize(q, torch.ones(()), zero_point, [], 0, scheme, torch.float64)
        low, high = back.min(), back.max()
        assert low <= value <= high
        assert back.unique().numel() <= 2
        p = (value - low) / (high - low) if high > low else torch.tensor(0.0)
        deviation = (high - low) * torch.sqrt(p * (1 - p) / n)
        assert (back.mean() - x.double().mean()).abs() <= 6 * deviation + 1e-12


def test_bad_arguments():
    x, q, scale, zero = torch.randn(4, 6), torch.empty(4, 6), torch.ones(4), torch.zeros(4, dtype=torch.int32)
    good = [x.data_ptr(), q.data_ptr(), scale.data_ptr(), zero.data_ptr(), (4, 6), (6, 1), (6, 1), (1, 0), 4, 0, 0, 0]
    _cpu.quantize(*good)
    for place, value, named in (
        (0, 0, "x, q"),
        (1, 0, "x, q"),
        (2, 0, "scale"),
        (4, (4, -6), "shape"),
        (4, [4, 6], "shape"),
        (5, (6,), "x_strides"),
        (6, (6,), "q_strides"),
        (7, (1,), "scale_strides"),
        (7, (-1, 0), "scale_strides"),
        (7, (2, 0), "scales"),
        (8, 3, "scales"),
        (9, 4, "dtype"),
        (10, 6, "scheme"),
    ):
        with pytest.raises(ValueError, match=named):
            _cpu.quantize(*good[:place], value, *good[place + 1 :])
    for shape, strides in (((3, 3), (3, 1)), ((4, 6), (7, 1)), ((4, 6), (6, 2)), ((4, 3), (3, 1))):
        with pytest.raises(ValueError, match="byte"):
            _cpu.quantize(*good[:4], shape, (6, 1), strides, (1, 0), 4, 0, SCHEME["int4"], 0)
    with pytest.raises(ValueError, match="byte"):
        _cpu.dequantize(*good[:4], (3, 3), (3, 1), (3, 1), (1, 0), 4, SCHEME["uint4"], 0)
    for value in (0.0, -1.0, math.nan, math.inf, 1e-39):
        with pytest.raises(ValueError, match="scale"):
            kernels.quantize(x, torch.tensor([1.0, 1.0, value, 1.0]), None, None, [0], 0, "int8")
        with pytest.raises(ValueError, match="scale"):
            kernels.dequantize(x.to(torch.int8), torch.tensor(value), None, [], 0, "int8", torch.float32)
    for value, scheme in ((128, "int8"), (-1, "uint8"), (8, "int4"), (16, "uint4"), (1 << 32, "int8")):
        with pytest.raises(ValueError, match="zero_point"):
            kernels.quantize(x, torch.tensor(1.0), torch.tensor(value), None, [], 0, scheme)
