"""The pooling kernels on each instruction set and on CUDA, against the formula spelled out."""

from __future__ import annotations

import math

import pytest
import torch

from fastnn.backends import Kernels
from fastnn.backends._pool import Windows
from fastnn.backends.reference import pool as reference

from .calls import FLOATS, error_in_ulp

kernels = Kernels("pool")

dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))

#: size, kernel, stride, padding, dilation: widths around those of vectors, each way through the kernels.
WINDOWS = [
    ((9, 31), (2, 2), (2, 2), (0, 0), (1, 1)),
    ((7, 33), (3, 3), (2, 2), (1, 1), (1, 1)),
    ((8, 65), (3, 3), (1, 1), (1, 1), (1, 1)),
    ((6, 17), (2, 5), (3, 4), (1, 2), (1, 1)),
    ((9, 40), (3, 4), (1, 2), (2, 3), (2, 3)),
    ((4, 70), (2, 35), (2, 35), (0, 0), (1, 1)),
    ((7, 7), (7, 7), (1, 1), (3, 3), (1, 1)),
    ((5, 19), (5, 19), (5, 19), (0, 0), (1, 1)),
    ((18, 31), (17, 19), (2, 9), (8, 9), (1, 1)),
    ((4, 5, 18), (2, 3, 2), (2, 1, 2), (1, 1, 0), (1, 1, 1)),
    ((67,), (3,), (2,), (1,), (1,)),
]
ADAPTIVE = [
    ((9, 31), (4, 7)),
    ((17, 17), (1, 1)),
    ((5, 11, 13), (2, 1, 1)),
    ((12, 40), (3, 10)),
    ((5, 6, 7), (2, 6, 3)),
    ((9, 50), (1, 1)),
    ((70,), (3,)),
]


def calls(machine, dtype):
    """All, but a few where they are slow to interpret: of the 16-bit types, which only load and store otherwise than
    float32, two each."""
    found = list(_calls())
    few = {torch.bfloat16: (9, 15), torch.float16: (9, 14)}.get(dtype, (4, 9, 12, 15))
    return [found[i] for i in few] if machine == "triton" else found


def _calls():
    for size, *windows in WINDOWS:
        output = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, *windows, strict=True)]
        yield size, Windows(*windows), tuple(output)
    for size, output in ADAPTIVE:
        yield size, Windows((), (), (), ()), output


def inputs(size, dtype, machine, number=0):
    """In planes, and with the channels together; small integers, with NaN around. The emulation gets one number of channels
    a call, and each call all of them in the course of the three dtypes."""
    dims = len(size)
    some = (1, 37, 16)
    if machine == "cuda":
        some = some[(number + max(0, FLOATS.index(dtype) - 1)) % 3 :][:1]
    for channels in (3,) if machine == "triton" else some:
        shape = (2, channels, *size)
        base = torch.full((math.prod(shape) + 128,), math.nan, dtype=dtype)
        x = base[64:-64].view(shape).copy_(torch.randint(-9, 10, shape))
        yield x, False
        base = torch.full((math.prod(shape) + 128,), math.nan, dtype=dtype)
        yield base[64:-64].view(2, *size, channels).movedim(-1, 1).copy_(x), True
    assert dims == x.dim() - 2


@dtypes
def test_maxima(machine, dtype):
    for number, (size, windows, output) in enumerate(calls(machine, dtype)):
        for x, last in inputs(size, dtype, machine, number):
            values, codes = kernels.max_pool(x, windows, output, last)
            expected, expected_codes = reference.max_pool(x, windows, output)
            assert torch.equal(values, expected), (size, windows)
            assert torch.equal(codes, expected_codes), (size, windows)
            assert torch.equal(kernels.max_pool(x, windows, output, last, coded=False)[0], expected)
            indices = reference.max_pool_indices(codes, windows, size)
            assert torch.equal(kernels.max_pool_indices(codes, windows, size, last), indices)
            assert torch.equal(kernels.max_pool_gather(x, codes, windows, len(size), last), expected)
            grad = torch.randint(-2, 3, values.shape).to(dtype)
            back = kernels.max_pool_backward(grad, codes, windows, x.shape, len(size), last)
            assert torch.equal(back, reference.max_pool_backward(grad, codes, windows, x.shape, len(size)))


@pytest.mark.not_on("cuda", "triton")
def test_an_input_larger_than_the_caches(machine):
    """What is read of it is asked for early, and its gradient is written around the caches."""
    windows, output = Windows(*WINDOWS[2][1:]), (8, 65)
    base = torch.full((240 * 8 * 65 * 37 + 128,), math.nan)
    x = base[64:-64].view(240, 8, 65, 37).random_(-9, 10).movedim(-1, 1)
    values, codes = kernels.max_pool(x, windows, output, True)
    expected, expected_codes = reference.max_pool(x, windows, output)
    assert torch.equal(values, expected) and torch.equal(codes, expected_codes)
    back = kernels.max_pool_backward(expected, codes, windows, x.shape, 2, True)
    assert torch.equal(back, reference.max_pool_backward(expected, codes, windows, x.shape, 2))


@dtypes
def test_averages(machine, dtype):
    for number, (size, windows, output) in enumerate(calls(machine, dtype)):
        if windows.dilation and max(windows.dilation) > 1:
            continue
        for x, last in inputs(size, dtype, machine, number):
            for include, divisor in ((True, 0), (False, 0), (True, 3)):
                found = kernels.avg_pool(x, windows, output, include, divisor, last)
                exact = reference.avg_pool(x.double(), windows, output, include, divisor)
                assert error_in_ulp(found, exact) <= 1
                if divisor:
                    continue
                grad = torch.randint(-2, 3, found.shape).to(dtype)
                back = kernels.avg_pool_backward(grad, windows, x.shape, len(size), include, divisor, last)
                exact = reference.avg_pool_backward(grad.double(), windows, x.shape, len(size), include, divisor)
                scale = exact.abs().max().item() + 2
                assert (back.double() - exact).abs().max().item() <= 4 * torch.finfo(dtype).eps * scale
