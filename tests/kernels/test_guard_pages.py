"""Embedding, rotary position embedding, dropout, quantization, quantized weights and int8 convolution on memory that ends,
or begins, where nothing may be read."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal

import pytest
import torch

from fastnn import _cpu
from fastnn.backends._quantize import SCHEME
from fastnn.backends.cpu import dropout as dropout_kernels
from fastnn.backends.cpu import embedding as kernels
from fastnn.backends.cpu.weight_only import weight_only_linear
from fastnn.backends.reference import quantize as formulas
from fastnn.backends.reference.weight_only import weight_only_linear as formula
from fastnn.functional import int8_conv2d

from .calls import DTYPE, FLOATS, UNDER_SANITIZER

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PAGE = mmap.PAGESIZE


@pytest.fixture
def walled():
    """Copies a contiguous tensor to where the page before, or the one behind, cannot be read: a touch ends the process."""
    maps = []

    def place(x, at_end):
        size = max(-(-x.nbytes // PAGE), 1) * PAGE
        start = libc.mmap(None, size + 2 * PAGE, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        assert start not in (None, ctypes.c_void_p(-1).value)
        maps.append((start, size + 2 * PAGE))
        for wall in (start, start + PAGE + size):
            assert libc.mprotect(wall, PAGE, 0) == 0
        begin = start + PAGE + (size - x.nbytes if at_end else 0)
        memory = (ctypes.c_char * x.nbytes).from_address(begin)
        return torch.frombuffer(memory, dtype=x.dtype).view(x.shape).copy_(x)

    yield place
    for start, size in maps:
        libc.munmap(start, size)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("at_end", [False, True], ids=["begin", "end"])
def test_nothing_beyond_is_touched(isa, dtype, at_end, walled):
    for columns in (2, 6, 34, 126, 130):
        table = walled(torch.randn(5, columns).to(dtype), at_end)
        indices = walled(torch.tensor([4, 0, 4, 2, 1, 3, 0]), at_end)
        rows = kernels.embedding(table, indices, -1, False)
        assert torch.equal(rows, table[indices])
        grad = walled(rows, at_end)
        found = kernels.embedding_backward(grad, indices.int(), 5, -1, True)
        torch.testing.assert_close(found, table, rtol=1e-6, atol=0)
        for width in (columns, columns // 2):
            cos, sin = (walled(torch.randn(5, width).to(dtype), at_end) for _ in range(2))
            for interleaved in (False, True):
                turned = kernels.rotary(table, cos, sin, interleaved, False)
                wide = kernels.rotary(table.double(), cos.double(), sin.double(), interleaved, False)
                torch.testing.assert_close(turned, wide.to(dtype))
        same = table.clone()
        dropped = dropout_kernels.dropout(table, torch.tensor(3), 0.5, walled(same, at_end))
        assert torch.equal(dropped, dropout_kernels.dropout(same, torch.tensor(3), 0.5))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("at_end", [False, True], ids=["begin", "end"])
def test_quantized_weights_are_not_read_beyond(isa, dtype, at_end, walled):
    for scheme, n, k, group in (("int8", 5, 77, 0), ("int8", 33, 130, 0), ("int4", 7, 58, 0), ("uint4", 35, 96, 32)):
        columns = k if scheme == "int8" else k // 2
        weight = torch.randint(0, 256, (n, columns), dtype=torch.uint8)
        weight = weight.view(torch.int8) if scheme == "int8" else weight
        shape = (n, k // group) if group else (n,)
        scale, zero = torch.rand(shape) + 0.5, torch.randint(0, 8, shape, dtype=torch.int32)
        for m in (1, 2, 3, 8, 9, 33):
            x, bias = torch.randn(m, k).to(dtype), torch.randn(n)
            plain = (x, weight, scale, zero, bias)
            found = weight_only_linear(*(walled(t, at_end) for t in plain), group, scheme, "none")
            wanted = formula(*plain, group, scheme, "none")
            torch.testing.assert_close(found, wanted, rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=0.1)


@pytest.mark.parametrize("at_end", [False, True], ids=["begin", "end"])
def test_int8_convolution_touches_nothing_beyond(isa, at_end, walled):
    for c, m, k, groups in ((4, 20, 1, 1), (3, 17, 3, 1), (64, 33, 1, 1), (64, 8, 3, 1), (21, 21, 3, 21), (6, 4, 3, 2)):
        x, residual = torch.randint(256, (2, 5, 7, c)).byte(), torch.randint(256, (2, 5, 7, m)).byte()
        w, bias = torch.randint(-128, 128, (m, c // groups, k, k)).to(torch.int8), torch.randn(m)
        options = dict(padding=k // 2, groups=groups, input_scale=0.1, input_zero_point=7, residual_scale=0.5)
        options |= dict(output_scale=0.3, output_zero_point=9, dtype=torch.uint8)
        expected, found = (
            int8_conv2d(
                *(place(x).permute(0, 3, 1, 2), place(w), place(torch.ones(m)), place(bias)),
                **options,
                residual=place(residual).permute(0, 3, 1, 2),
            )
            for place in (torch.clone, lambda t: walled(t, at_end))
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("at_end", [False, True], ids=["begin", "end"])
def test_quantization_touches_nothing_beyond(isa, dtype, at_end, walled):
    for columns in (2, 66, 190, 1030):
        x = walled(torch.randn(3, columns).to(dtype), at_end)
        for scheme, code in SCHEME.items():
            for axis, per_row, per_column in ((0, 1, 0), (1, 0, 1)):
                scale = walled(torch.rand(x.shape[axis]) + 0.1, at_end)
                zero_point = walled(torch.zeros(x.shape[axis], dtype=torch.int32), at_end)
                shift = zero_point if scheme in formulas.RANGE else None
                expected = formulas.quantize(x, scale, shift, None, [axis], 0, scheme)
                q = walled(torch.zeros(expected.shape, dtype=torch.uint8), at_end)
                parameters = (scale.data_ptr(), zero_point.data_ptr(), tuple(x.shape))
                rest = (x.stride(), x.stride(), (per_row, per_column), len(scale))
                _cpu.quantize(x.data_ptr(), q.data_ptr(), *parameters, *rest, DTYPE[dtype], code, 0)
                assert torch.equal(q, expected.view(torch.uint8))
                back = walled(torch.zeros(3, columns, dtype=dtype), at_end)
                _cpu.dequantize(q.data_ptr(), back.data_ptr(), *parameters, *rest, code, DTYPE[dtype])
                assert torch.equal(back, formulas.dequantize(expected, scale, shift, [axis], 0, scheme, dtype))
                found = walled(torch.zeros(len(scale)), at_end)
                if scheme in ("uint8", "int4"):
                    found_zero = walled(zero_point, at_end)
                    _cpu.quantize_dynamic(
                        x.data_ptr(), q.data_ptr(), found.data_ptr(), found_zero.data_ptr(), *parameters[2:], *rest,
                        DTYPE[dtype], code, 0,
                    )  # fmt: skip
                    assert torch.equal(found, formulas.choose_scale(x, [axis], 0, scheme, False)[0])


def test_the_wall_is_there(walled):
    """A child that reads one element further dies of it."""
    x = walled(torch.ones(3), True)
    child = os.fork()
    if not child:
        faulthandler.disable()
        ctypes.string_at(x.data_ptr(), 13)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == (signal.SIGABRT if UNDER_SANITIZER else signal.SIGSEGV)
