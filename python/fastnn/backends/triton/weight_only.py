"""Linear layers whose weight alone is quantized: its bytes become numbers in registers, as the left operand of the product.

As src/cuda/quant/weight_only.cu has it: q - zero point is exact in 16 bits, and a scale multiplies the sum of a block of its
group. What is multiplied in float32 has its parts, of which the weight is one where its scale comes afterwards; where
groups are no multiple of 32 the weight is scaled first, and has parts of its own.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _state
from .._weight_only import STEP, Weight
from .._weight_only import weight_only_linear as _by
from ..codes import precision
from ..reference.quantize import PACKED
from ._launch import ceil_div, launch
from .elementwise import activate
from .gemm import positions_in_bands
from .quantize import decode, decoding


@triton.jit
def split(x):
    """Three bfloat16 that add up to a float32: each what the ones before it leave, rounded. What is not finite has one.

    The largest number does not become infinite by rounding.
    """
    LARGEST: tl.constexpr = 3.3895313892515355e38  # of bfloat16
    finite = tl.abs(x) < float("inf")
    first = tl.where(finite, tl.minimum(tl.maximum(x, -LARGEST), LARGEST), x).to(tl.bfloat16)
    rest = tl.where(finite, x - first.to(tl.float32), 0.0)
    second = rest.to(tl.bfloat16)
    return first, second, (rest - second.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def finite_of(x):
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x.to(tl.float32), 0.0).to(tl.bfloat16)


@triton.jit
def multiply_block(w, x, PARTS: tl.constexpr, SCALED: tl.constexpr):
    """w x, of float32 w. x is of 16 bits where PARTS is 0, else float32 as so many bfloat16; w is one of them,
    or has parts itself where it is ``SCALED``.

    Tensor cores cut where float32 rounds: the sums of first parts and of others are added in float32. What is not finite is
    multiplied with first parts alone, of which a 0 is one.
    """
    if PARTS == 0:
        products = tl.dot(w.to(x.dtype), x)
    elif not SCALED:
        x0, x1, x2 = split(x)
        products = tl.dot(w.to(tl.bfloat16), x0)
        if PARTS > 1:
            w0 = finite_of(w)
            if PARTS > 2:
                others = tl.dot(w0, x2)
                others = tl.dot(w0, x1, others)
            else:
                others = tl.dot(w0, x1)
            products += others
    else:
        w0, w1, w2 = split(w)
        x0, x1, x2 = split(x)
        products = tl.dot(w0, x0)
        if PARTS > 1:
            w0 = finite_of(w0)
            x0 = finite_of(x0)
            if PARTS > 2:
                others = tl.dot(w0, x2)
                others = tl.dot(w2, x0, others)
                others = tl.dot(w1, x1, others)
                others = tl.dot(w0, x1, others)
            else:
                others = tl.dot(w0, x1)
            others = tl.dot(w1, x0, others)
            products += others
    return products


@triton.jit
def multiply(
    x,
    weight,  # bytes
    out,
    scale,
    zero_point,
    bias,
    m,
    n,
    k,
    x_row,
    weight_row,
    group,
    groups,
    PACKED: tl.constexpr,
    SIGN: tl.constexpr,  # as quantize.decode() has these
    DIGITS: tl.constexpr,
    BIAS: tl.constexpr,
    LARGEST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
    SCALED: tl.constexpr,  # before it is multiplied: a block is not one of a group
    GROUPED: tl.constexpr,  # rows of the weight have several scales
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    row, column = positions_in_bands(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, BAND)
    row_inside = row < m
    column_inside = column < n
    EACH: tl.constexpr = 2 if PACKED else 1  # elements of a byte
    along = tl.arange(0, BLOCK_K)
    along_bytes = tl.arange(0, BLOCK_K // EACH)
    a = weight + column[:, None] * weight_row + along_bytes[None, :]
    b = x + row[:, None] * x_row + along[None, :]
    of_column = column * groups
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for at in range(0, k, BLOCK_K):
        a_inside, b_inside = column_inside[:, None], row_inside[:, None]
        if not EVEN_K:
            a_inside = a_inside & (at + along_bytes * EACH < k)[None, :]
            b_inside = b_inside & (at + along < k)[None, :]
        code = tl.load(a, mask=a_inside, other=0).to(tl.int32)
        if PACKED:
            code = tl.interleave(code & 15, code >> 4)
        right = tl.load(b, mask=b_inside, other=0.0)
        zero = 0.0
        if SCALED:
            # Beyond the last element those of the last group: x is 0 there.
            level = of_column[:, None] + (tl.minimum(at + along, k - 1) // group)[None, :]
            if zero_point is not None:
                zero = tl.load(zero_point + level, mask=column_inside[:, None], other=0).to(tl.float32)
            left = decode(code, zero, SIGN, DIGITS, BIAS, LARGEST)
            left *= tl.load(scale + level, mask=column_inside[:, None], other=0.0)
        else:
            level = of_column + at // group if GROUPED else of_column
            if zero_point is not None:
                zero = tl.load(zero_point + level, mask=column_inside, other=0).to(tl.float32)[:, None]
            left = decode(code, zero, SIGN, DIGITS, BIAS, LARGEST)
        products = multiply_block(left, tl.trans(right), PARTS, SCALED)
        if GROUPED and not SCALED:
            products *= tl.load(scale + level, mask=column_inside, other=0.0)[:, None]
        sums += products
        a += BLOCK_K // EACH
        b += BLOCK_K
    if not GROUPED:
        sums *= tl.load(scale + column, mask=column_inside, other=0.0)[:, None]
    if bias is not None:
        sums += tl.load(bias + column, mask=column_inside, other=0.0).to(tl.float32)[:, None]
    to = out + row[None, :] * n + column[:, None]
    tl.store(to, activate(sums, ACTIVATION).to(out.dtype.element_ty), mask=column_inside[:, None] & row_inside[None, :])


#: Up to so many rows the weight's bytes are all that takes time: narrow tiles read them.
_FEW_ROWS = 16
# (rows, columns, warps, stages), as of matrix products, and the most of K in a step.
_LARGE, _SMALL, _FEW = (128, 128, 8, 3), (64, 64, 4, 3), (16, 32, 4, 4)
# Of float32 in parts, and where the weight has some: what they are made from has to fit into the registers.
_LARGE_PARTS, _SCALED = (64, 128, 8, 3), (32, 64, 4, 3)
_ENOUGH_TILES = 128
_BLOCK_K, _PARTS_BLOCK_K, _FEW_BLOCK_K = 64, 32, 128


def _multiply(x: Tensor, weight: Weight, bias: Tensor | None, activation: str, out: Tensor) -> None:
    (m, n), k = out.shape, x.shape[1]
    group = k // weight.groups
    scaled = weight.groups > 1 and group % STEP != 0
    # Where a row's bits may not depend on how many others there are, few are as many.
    few = m <= _FEW_ROWS and not _state.settings().batch_invariant
    parts = 0
    if x.dtype is torch.float32:
        parts = 3 if few else 3 - precision(x.dtype)
    large = _LARGE_PARTS if parts else _LARGE
    enough = ceil_div(m, large[0]) * ceil_div(n, large[1]) >= _ENOUGH_TILES
    rows, columns, warps, stages = _FEW if few else _SCALED if scaled else large if enough else _SMALL
    block = _FEW_BLOCK_K if few else _PARTS_BLOCK_K if parts else _BLOCK_K
    if scaled:
        block = STEP
    elif weight.groups > 1:
        block = min(block, group & -group)  # the largest power of two that divides it
    launch(
        multiply,
        ceil_div(m, rows) * ceil_div(n, columns),
        out,
        x,
        weight.q.view(torch.uint8),
        out,
        weight.scale,
        weight.zero_point,
        bias,
        m,
        n,
        k,
        x.stride(0),
        weight.q.stride(0),
        group,
        weight.groups,
        PACKED=weight.from_dtype in PACKED,
        **decoding(weight.from_dtype),
        ACTIVATION=activation,
        PARTS=parts,
        SCALED=scaled,
        GROUPED=weight.groups > 1,
        EVEN_K=k % block == 0,
        BLOCK_M=rows,
        BLOCK_N=columns,
        BLOCK_K=block,
        BAND=8,
        num_warps=warps,
        num_stages=stages,
    )


weight_only_linear = functools.partial(_by, _multiply)
