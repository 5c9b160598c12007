"""The int8 linear layer: rows of the input become integers, one launch; the second multiplies them, takes the zero
points from the sums, and does the rest. Both are the CPU's to the bit.

Tensor cores multiply s8 by s8: codes are kept less 128, and so are their zero points.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._int8_linear import Int8Linears, Rows
from .._tensors import merge
from ._launch import ceil_div, launch
from .elementwise import activate, offset
from .gemm import positions_in_bands
from .quantize import encode, grid_of


@triton.jit
def quantize_rows(
    x,
    q,  # bytes
    scale,
    zero_point,
    rows,
    columns,
    x_strides,
    q_row,
    EACH: tl.constexpr,  # row has its own scale and zero point, which are chosen here
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_inside = row < rows
    line = x + row[:, None] * x_strides[0]
    if EACH:
        low = tl.zeros((ROWS,), tl.float32)
        high = tl.zeros((ROWS,), tl.float32)
        for at in range(0, columns, BLOCK):
            column = (at + tl.arange(0, BLOCK)).to(tl.int64)
            inside = row_inside[:, None] & (column < columns)[None, :]
            value = tl.load(line + column[None, :] * x_strides[1], mask=inside, other=0.0).to(tl.float32)
            value = tl.where(tl.abs(value) < float("inf"), value, 0.0)
            low = tl.minimum(low, tl.min(value, 1))
            high = tl.maximum(high, tl.max(value, 1))
        step, zero = grid_of(low, high, 0.0, 255.0, False)
        tl.store(scale + row, step, mask=row_inside)
        tl.store(zero_point + row, zero.to(tl.int32), mask=row_inside)
    else:
        step = tl.load(scale) + tl.zeros((ROWS,), tl.float32)
        zero = tl.load(zero_point).to(tl.float32) + tl.zeros((ROWS,), tl.float32)
    for at in range(0, columns, BLOCK):
        column = (at + tl.arange(0, BLOCK)).to(tl.int64)
        inside = row_inside[:, None] & (column < columns)[None, :]
        value = tl.load(line + column[None, :] * x_strides[1], mask=inside, other=0.0).to(tl.float32)
        code = encode(value, step[:, None], zero[:, None], value, 0.0, 255.0, 0, 0, False) - 128
        tl.store(q + row[:, None] * q_row + column[None, :], code.to(tl.int8), mask=inside)


@triton.jit
def sum_rows(
    x, sums, rows, columns, row_stride, shape, strides, DIMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Of int8, whose other dimensions are ``columns`` elements."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.int32)
    for at in range(0, columns, BLOCK):
        column = (at + tl.arange(0, BLOCK)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        place = row[:, None] * row_stride + offset(column, shape, strides, DIMS)[None, :]
        total += tl.sum(tl.load(x + place, mask=inside, other=0).to(tl.int32), 1)
    tl.store(sums + row, total, mask=row < rows)


@triton.jit
def multiply(
    q,
    weight,
    out,
    scale,
    zero_point,
    weight_scale,
    sums,  # of the weight's rows; None: they are summed here
    bias,
    m,
    n,
    k,
    q_row,
    weight_strides,
    scale_step,  # 0 where all rows have one
    weight_scale_step,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    row, column = positions_in_bands(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, BAND)
    along = tl.arange(0, BLOCK_K).to(tl.int64)
    row_inside = row < m
    column_inside = column < n
    a = q + row[:, None] * q_row + along[None, :]
    b = weight + along[:, None] * weight_strides[1] + column[None, :] * weight_strides[0]
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    weights = tl.zeros((BLOCK_N,), tl.int32)
    for at in range(0, k, BLOCK_K):
        a_inside, b_inside = row_inside[:, None], column_inside[None, :]
        if not EVEN_K:
            inside = at + along < k
            a_inside, b_inside = a_inside & inside[None, :], b_inside & inside[:, None]
        x = tl.load(a, mask=a_inside, other=0)
        y = tl.load(b, mask=b_inside, other=0)
        products = tl.dot(x, y, products, out_dtype=tl.int32)
        if sums is None:
            weights += tl.sum(y.to(tl.int32), 0)
        a += BLOCK_K
        b += BLOCK_K * weight_strides[1]
    if sums is not None:
        weights = tl.load(sums + column, mask=column_inside, other=0)
    zero = tl.load(zero_point + row * scale_step, mask=row_inside, other=0) - 128
    by_row = tl.load(scale + row * scale_step, mask=row_inside, other=0.0)
    by_column = tl.load(weight_scale + column * weight_scale_step, mask=column_inside, other=0.0)
    exact = products - zero[:, None] * weights[None, :]
    y = exact.to(tl.float32) * (by_row[:, None] * by_column[None, :])
    if bias is not None:
        y += tl.load(bias + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    to = out + row[:, None] * n + column[None, :]
    tl.store(to, activate(y, ACTIVATION).to(out.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


#: Up to so many rows the weight's bytes are all that takes time: narrow tiles read them.
_FEW_ROWS = 16
# (rows, columns, warps, stages), as of matrix products.
_LARGE, _SMALL, _FEW = (128, 128, 8, 3), (64, 64, 4, 4), (16, 32, 4, 4)
_ENOUGH_TILES = 128
_BLOCK_K = 128
#: Elements of a tile that is not multiplied, and the most columns of one.
_ELEMENTS, _COLUMNS = 4096, 1024


def _tile(rows: int, columns: int) -> tuple[int, int]:
    """Its sizes."""
    block = min(max(triton.next_power_of_2(columns), 16), _COLUMNS)
    return min(_ELEMENTS // block, 32, triton.next_power_of_2(rows)), block


def row_sums(x: Tensor) -> Tensor:
    """Of int8, any strides: over all but the first dimension, int32."""
    rows, columns = x.shape[0], x[:1].numel()
    sums = x.new_empty(rows, dtype=torch.int32)
    if rows == 0:
        return sums
    shape, (strides,) = merge(x.shape[1:], x.stride()[1:])
    height, block = _tile(rows, columns)
    launch(
        sum_rows,
        ceil_div(rows, height),
        x,
        x,
        sums,
        rows,
        columns,
        x.stride(0),
        shape,
        strides,
        DIMS=len(shape),
        ROWS=height,
        BLOCK=block,
    )
    return sums


class _Layers(Int8Linears):
    def quantize(self, input: Tensor, rows: Rows) -> None:
        height, block = _tile(*input.shape)
        launch(
            quantize_rows,
            ceil_div(input.shape[0], height),
            input,
            input,
            rows.q.view(torch.int8),
            rows.scale,
            rows.zero_point,
            *input.shape,
            input.stride(),
            rows.q.stride(0),
            EACH=rows.each,
            ROWS=height,
            BLOCK=block,
            enable_fp_fusion=False,
        )

    def sums_itself(self, rows: Rows, weight: Tensor) -> bool:
        return rows.q.shape[0] <= _FEW_ROWS

    def row_sums(self, weight: Tensor) -> Tensor:
        return row_sums(weight)

    def multiply(
        self,
        rows: Rows,
        weight: Tensor,
        sums: Tensor | None,
        weight_scale: Tensor,
        bias: Tensor | None,
        activation: str,
        out: Tensor,
    ) -> None:
        m, (n, k) = rows.q.shape[0], weight.shape
        enough = ceil_div(m, _LARGE[0]) * ceil_div(n, _LARGE[1]) >= _ENOUGH_TILES
        height, width, warps, stages = _FEW if m <= _FEW_ROWS else _LARGE if enough else _SMALL
        launch(
            multiply,
            ceil_div(m, height) * ceil_div(n, width),
            out,
            rows.q.view(torch.int8),
            weight,
            out,
            rows.scale,
            rows.zero_point,
            weight_scale,
            None if sums is None else sums.view(torch.int32),
            bias,
            m,
            n,
            k,
            rows.q.stride(0),
            weight.stride(),
            int(rows.each),
            int(weight_scale.numel() > 1),
            ACTIVATION=activation,
            EVEN_K=k % _BLOCK_K == 0,
            BLOCK_M=height,
            BLOCK_N=width,
            BLOCK_K=_BLOCK_K,
            BAND=8,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=False,
        )


_layers = _Layers()
int8_linear = _layers.int8_linear
packed_size = _layers.packed_size
pack = _layers.pack
