"""The product of 8-bit floats: C = scale_a * scale_b * (A B) + bias.

Where the tensor cores multiply such numbers (from sm_89 on), they are given them as they are; those of sm_90 sum 128 of K with
about 14 bits and add that up in float32, unless fast sums are asked for. Elsewhere, and in the interpreter, they become float16
first, exactly: e4m3 is read as a float16 whose exponent is 8 too small, which a product puts right.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._matmul import along_k
from . import INTERPRETED
from ._launch import ceil_div, launch
from .gemm import positions_in_bands


@triton.jit
def widened(byte, E4M3: tl.constexpr):
    """The float16 of a byte's float."""
    bits = byte.to(tl.int16)
    if not E4M3:
        return (bits << 8).to(tl.float16, bitcast=True)
    magnitude = bits & 127
    half = (((bits & 128) << 8) | (magnitude << 7)).to(tl.float16, bitcast=True) * 256.0
    return tl.where(magnitude == 127, float("nan"), half).to(tl.float16)


@triton.jit
def multiply_float8(
    a,  # NATIVE: numbers; else the bytes of them, since older GPUs have no such type
    b,
    c,
    scale_a,
    scale_b,
    bias,
    m,
    n,
    k,
    a_strides,  # of the row and the column
    b_strides,
    bias_stride,
    a_step,  # to the next tile of K
    b_step,
    A_E4M3: tl.constexpr,
    B_E4M3: tl.constexpr,
    BY_ROW: tl.constexpr,  # a scale a row of A and a column of B, else one each
    NATIVE: tl.constexpr,
    FAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    row, column = positions_in_bands(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, BAND)
    along = tl.arange(0, BLOCK_K).to(tl.int64)
    row_inside, column_inside = row < m, column < n
    a_tile = a + row[:, None] * a_strides[0] + along[None, :] * a_strides[1]
    b_tile = b + along[:, None] * b_strides[0] + column[None, :] * b_strides[1]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, k, BLOCK_K):
        a_inside, b_inside = row_inside[:, None], column_inside[None, :]
        if not EVEN_K:
            inside = first + along < k
            a_inside, b_inside = a_inside & inside[None, :], b_inside & inside[:, None]
        x = tl.load(a_tile, mask=a_inside, other=0.0)
        y = tl.load(b_tile, mask=b_inside, other=0.0)
        if not NATIVE:
            sums = tl.dot(widened(x, A_E4M3), widened(y, B_E4M3), sums)
        elif FAST:
            sums = tl.dot(x, y, sums, max_num_imprecise_acc=1 << 30)
        else:
            sums = tl.dot(x, y, sums, max_num_imprecise_acc=128)
        a_tile += a_step
        b_tile += b_step

    if BY_ROW:
        sums *= tl.load(scale_a + row, mask=row_inside, other=0.0)[:, None]
        sums *= tl.load(scale_b + column, mask=column_inside, other=0.0)[None, :]
    else:
        sums *= tl.load(scale_a) * tl.load(scale_b)
    if bias is not None:
        sums += tl.load(bias + column * bias_stride, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    inside = row_inside[:, None] & column_inside[None, :]
    tl.store(c + row[:, None] * n + column[None, :], sums.to(c.dtype.element_ty), mask=inside)


# (rows, columns, K, warps, stages). Large tiles read less; small ones fill a GPU where there are few.
_LARGE, _SMALL = (128, 128, 128, 8, 3), (64, 64, 128, 4, 4)
# Of what is widened there is twice as much in the registers.
_LARGE_WIDENED, _SMALL_WIDENED = (128, 128, 64, 8, 3), (64, 64, 64, 4, 4)
_ENOUGH_TILES = 128
#: The first capability whose tensor cores multiply them.
_NATIVE = (8, 9)


def scaled_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    use_fast_accum: bool,
) -> Tensor:
    """scale_a * scale_b * (mat_a @ mat_b) + bias. Scales stay on the device, and nobody waits to know them."""
    native = not INTERPRETED and torch.cuda.get_device_capability(mat_a.device) >= _NATIVE
    c = mat_a.new_empty((mat_a.shape[0], mat_b.shape[1]), dtype=out_dtype)
    if c.numel() == 0:
        return c
    a, b = along_k(mat_a), along_k(mat_b.t()).t()
    m, n, k = *c.shape, a.shape[1]
    large, small = (_LARGE, _SMALL) if native else (_LARGE_WIDENED, _SMALL_WIDENED)
    enough = ceil_div(m, large[0]) * ceil_div(n, large[1]) >= _ENOUGH_TILES
    rows, columns, block, warps, stages = large if enough else small
    launch(
        multiply_float8,
        ceil_div(m, rows) * ceil_div(n, columns),
        c,
        a if native else a.view(torch.uint8),
        b if native else b.view(torch.uint8),
        c,
        scale_a.reshape(-1).contiguous(),
        scale_b.reshape(-1).contiguous(),
        bias,
        m,
        n,
        k,
        a.stride(),
        b.stride(),
        0 if bias is None else bias.stride(0),
        a.stride(1) * block,
        b.stride(0) * block,
        A_E4M3=a.dtype is torch.float8_e4m3fn,
        B_E4M3=b.dtype is torch.float8_e4m3fn,
        BY_ROW=scale_a.numel() != 1 or scale_b.numel() != 1,
        NATIVE=native,
        FAST=use_fast_accum,
        EVEN_K=k % block == 0,
        BLOCK_M=rows,
        BLOCK_N=columns,
        BLOCK_K=block,
        BAND=8,
        num_warps=warps,
        num_stages=stages,
    )
    return c
