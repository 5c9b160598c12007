"""The matrix product: C = activation(alpha * row_scale * col_scale * (A B) + bias + beta * residual), in batches.

A is M x K, B is K x N, C is M x N, all with any strides. float32, bfloat16 and float16 are summed in float32, int8 (A also
uint8) in int32; C is rounded once.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _matmul
from .._tensors import merge
from ..codes import precision
from ._launch import ceil_div, launch
from .elementwise import activate, offset


@triton.jit
def first_part(x):
    """As bfloat16, rounded; what rounds to infinity though it is finite is cut."""
    cut = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < 2.0**127, x, cut).to(tl.bfloat16)


@triton.jit
def multiply_parts(sums, a, b, PARTS: tl.constexpr):
    """sums + a b, of float32 as a sum of bfloat16: as src/cuda/gemm/modes.cuh does it, and for the same reasons.

    Each part is what the ones before it leave, rounded; three hold all 24 bits. Of the products those are computed whose
    parts i, j have i + j < PARTS. Tensor cores cut where float32 rounds: the products of the first parts are a sum of their
    own, begun anew for each tile; of the others the smallest come first. What an infinity leaves is NaN; it is the first parts
    that have its sign, and where their sum is not finite the others do not count.
    """
    a0 = first_part(a)
    b0 = first_part(b)
    result = tl.dot(a0, b0)
    if PARTS > 1:
        a = a - a0.to(tl.float32)
        b = b - b0.to(tl.float32)
        a1 = a.to(tl.bfloat16)
        b1 = b.to(tl.bfloat16)
        if PARTS > 2:
            a2 = (a - a1.to(tl.float32)).to(tl.bfloat16)
            b2 = (b - b1.to(tl.float32)).to(tl.bfloat16)
            others = tl.dot(a2, b0)
            others = tl.dot(a1, b1, others)
            others = tl.dot(a0, b2, others)
            others = tl.dot(a1, b0, others)
        else:
            others = tl.dot(a1, b0)
        others = tl.dot(a0, b1, others)
        result += tl.where(tl.abs(result) < float("inf"), others, 0.0)
    return sums + result


@triton.jit
def sum_products(
    sums,
    a,
    b,
    row_inside,
    column_inside,
    first,
    end,
    k,
    a_step,
    b_step,
    PARTS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sums, with those of K from ``first`` to ``end`` added, and the addresses of what comes next.

    ``a`` and ``b`` are the addresses of the first tiles; ``a_step`` and ``b_step`` lead to the next ones.
    """
    for at in range(first, end, BLOCK_K):
        a_inside, b_inside = row_inside[:, None], column_inside[None, :]
        if not EVEN_K:
            inside = at + tl.arange(0, BLOCK_K) < k
            a_inside, b_inside = a_inside & inside[None, :], b_inside & inside[:, None]
        x = tl.load(a, mask=a_inside, other=0)
        y = tl.load(b, mask=b_inside, other=0)
        if PARTS > 0:
            sums = multiply_parts(sums, x, y, PARTS)
        elif x.dtype == tl.uint8:
            # Tensor cores multiply s8 by s8: what was taken from all of A is added as often as B says.
            shifted = (x.to(tl.int16) - 128).to(tl.int8)
            sums = tl.dot(shifted, y, sums, out_dtype=tl.int32)
            sums += 128 * tl.sum(y.to(tl.int32), 0)[None, :]
        elif x.dtype == tl.int8:
            sums = tl.dot(x, y, sums, out_dtype=tl.int32)
        else:
            sums = tl.dot(x, y, sums)
        a += a_step
        b += b_step
    return sums, a, b


@triton.jit
def tile_in_bands(tile, row_tiles, column_tiles, BAND: tl.constexpr):
    """The row and the column of a tile: programs that run at the same time compute a band of a few rows of tiles, whose A
    stays in L2."""
    band = tile // (BAND * column_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    within = tile % (BAND * column_tiles)
    return band * BAND + within % height, within // height


@triton.jit
def positions_in_bands(tile, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr):
    """The rows and the columns of C of a tile, in that order."""
    row_tile, column_tile = tile_in_bands(tile, tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), BAND)
    row = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    return row, (column_tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)


@triton.jit
def multiply(
    a,
    b,
    c,
    residual,
    bias,
    row_scale,
    col_scale,
    m,
    n,
    k,
    a_strides,  # of the row and the column
    b_strides,
    c_strides,
    residual_strides,
    bias_stride,
    a_step,  # to the next tile of K
    b_step,
    batch,  # the shape, and each tensor's strides
    a_batch,
    b_batch,
    c_batch,
    residual_batch,
    alpha,
    beta,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,  # bfloat16 a number of float32; 0: of other types
    GROUP: tl.constexpr,  # so much of K is summed, then added to the others
    DIMS: tl.constexpr,  # of the batch
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
    at = (tl.program_id(0) // tiles).to(tl.int64)
    row, column = positions_in_bands(tl.program_id(0) % tiles, m, n, BLOCK_M, BLOCK_N, BAND)
    along = tl.arange(0, BLOCK_K).to(tl.int64)
    row_inside = row < m
    column_inside = column < n

    a += offset(at, batch, a_batch, DIMS)
    b += offset(at, batch, b_batch, DIMS)
    a_tile = a + row[:, None] * a_strides[0] + along[None, :] * a_strides[1]
    b_tile = b + along[:, None] * b_strides[0] + column[None, :] * b_strides[1]
    INTEGERS: tl.constexpr = a.dtype.element_ty.is_int()
    ZERO: tl.constexpr = tl.int32 if INTEGERS else tl.float32
    sums = tl.zeros((BLOCK_M, BLOCK_N), ZERO)
    if PARTS > 0:
        a_next, b_next = a_tile, b_tile
        for first in range(0, k, GROUP):
            group = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            end = tl.minimum(first + GROUP, k)
            group, a_next, b_next = sum_products(
                group, a_next, b_next, row_inside, column_inside, first, end, k, a_step, b_step, PARTS, EVEN_K, BLOCK_K
            )
            sums += group
        # An operand was not finite, or a part or a product left float32's range: then as float32 has it, without tensor
        # cores (tl.dot would take half a minute to compile).
        finite = (tl.abs(sums) < float("inf")).to(tl.int32)
        if tl.min(tl.min(finite, 1), 0) == 0:
            sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            a_column = a + row * a_strides[0]
            b_row = b + column * b_strides[1]
            for _ in range(k):
                x = tl.load(a_column, mask=row_inside, other=0.0)
                y = tl.load(b_row, mask=column_inside, other=0.0)
                sums += x[:, None] * y[None, :]
                a_column += a_strides[1]
                b_row += b_strides[0]
    else:
        sums, _, _ = sum_products(
            sums, a_tile, b_tile, row_inside, column_inside, 0, k, k, a_step, b_step, 0, EVEN_K, BLOCK_K
        )

    inside = row_inside[:, None] & column_inside[None, :]
    to = c + offset(at, batch, c_batch, DIMS) + row[:, None] * c_strides[0] + column[None, :] * c_strides[1]
    if c.dtype.element_ty == tl.int32:
        tl.store(to, sums, mask=inside)
    else:
        x = sums.to(tl.float32) * alpha
        if row_scale is not None:
            x *= tl.load(row_scale + row, mask=row_inside, other=0.0)[:, None]
        if col_scale is not None:
            x *= tl.load(col_scale + column, mask=column_inside, other=0.0)[None, :]
        if bias is not None:
            x += tl.load(bias + column * bias_stride, mask=column_inside, other=0.0).to(tl.float32)[None, :]
        if residual is not None:
            start = residual + offset(at, batch, residual_batch, DIMS)
            source = start + row[:, None] * residual_strides[0] + column[None, :] * residual_strides[1]
            x += beta * tl.load(source, mask=inside, other=0.0).to(tl.float32)
        tl.store(to, activate(x, ACTIVATION).to(c.dtype.element_ty), mask=inside)


# (rows, columns, warps, stages). Large tiles read less; small ones fill a GPU where there are few.
_LARGE, _SMALL = (128, 128, 8, 3), (64, 64, 4, 4)
# Of float32 in parts a tile has four sets of sums, which have to fit into the registers.
_LARGE_PARTS = (128, 64, 8, 3)
_ENOUGH_TILES = 128
_BLOCK_K = {torch.float32: 32, torch.bfloat16: 32, torch.float16: 32, torch.int8: 64, torch.uint8: 64}
_GROUP = 512


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
) -> None:
    """See _matmul.multiply."""
    if c.numel() == 0:
        return
    if beta == 0:
        residual = None
    m, n, k = *c.shape[-2:], a.shape[-1]
    beside = c if residual is None else residual
    batch, strides = merge(c.shape[:-2], *(tensor.stride()[:-2] for tensor in (a, b, c, beside)))
    batches = c.numel() // (m * n)
    parts = 3 - precision(a.dtype) if a.dtype is torch.float32 else 0
    large = _LARGE_PARTS if parts else _LARGE
    enough = ceil_div(m, large[0]) * ceil_div(n, large[1]) * batches >= _ENOUGH_TILES
    rows, columns, warps, stages = large if enough else _SMALL
    block = _BLOCK_K[a.dtype]
    launch(
        multiply,
        ceil_div(m, rows) * ceil_div(n, columns) * batches,
        c,
        a,
        b,
        c,
        residual,
        bias,
        row_scale,
        col_scale,
        m,
        n,
        k,
        a.stride()[-2:],
        b.stride()[-2:],
        c.stride()[-2:],
        beside.stride()[-2:],
        1 if bias is None else bias.stride(0),
        a.stride(-1) * block,
        b.stride(-2) * block,
        batch,
        *strides,
        float(alpha),
        float(beta),
        ACTIVATION=activation or "none",
        PARTS=parts,
        GROUP=_GROUP,
        DIMS=len(batch),
        EVEN_K=k % block == 0,
        BLOCK_M=rows,
        BLOCK_N=columns,
        BLOCK_K=block,
        BAND=8,
        num_warps=warps,
        num_stages=stages,
    )


product = functools.partial(_matmul.product, gemm)
linear = functools.partial(_matmul.linear, gemm)
int_mm = functools.partial(_matmul.int_mm, gemm)
