"""What attention's kernels are made of: rows of a head, their products, and what becomes of scores."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._attention import broadcast
from ..codes import precision
from .dropout import keeps
from .gemm import multiply_parts

#: Arguments that grow from call to call where keys are cached: no kernel is compiled for multiples of 16 among them.
COUNTS = ("length", "keys", "low", "high", "shift", "threshold", "blocks")


@triton.jit
def product(sums, a, b, PARTS: tl.constexpr):
    """sums + a b. What was computed in float32 is rounded to the other's type, or comes in parts."""
    if PARTS > 0:
        return multiply_parts(sums, a.to(tl.float32), b.to(tl.float32), PARTS)
    else:
        return tl.dot(a.to(b.dtype), b, sums)


@triton.jit
def rows(x, first, length, strides, column, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows from ``first`` on of one head, and of their SIZE columns those from ``column`` on, (ROWS, COLUMNS); what there is
    not is 0."""
    row = tl.arange(0, ROWS)
    at = tl.arange(0, COLUMNS)
    x += first.to(tl.int64) * strides[2]
    x += row[:, None].to(tl.int64) * strides[2] + (column + at)[None, :].to(tl.int64) * strides[3]
    inside = (first + row < length)[:, None]
    if SIZE % COLUMNS != 0:
        inside = inside & (column + at < SIZE)[None, :]
    return tl.load(x, mask=inside, other=0.0)


@triton.jit
def scores_of(
    kept,
    x,
    first,
    length,
    x_strides,
    passing,
    y,
    row,
    their_length,
    y_strides,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    KEPT: tl.constexpr,
    PASSING: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x yᵀ of kept and passing rows, which are held; long ones of float32, for whose parts there are no registers, are read
    again, some columns at a time."""
    CHUNK: tl.constexpr = 64
    sums = tl.zeros((KEPT, PASSING), tl.float32)
    if PARTS > 0 and COLUMNS > CHUNK:
        for column in range(0, SIZE, CHUNK):
            a = rows(x, first, length, x_strides, column, SIZE, KEPT, CHUNK)
            b = rows(y, row, their_length, y_strides, column, SIZE, PASSING, CHUNK)
            sums = product(sums, a, tl.trans(b), PARTS)
    else:
        sums = product(sums, kept, tl.trans(passing), PARTS)
    return sums


@triton.jit
def store_rows(x, first, length, strides, values, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at = x + first.to(tl.int64) * strides[2]
    at += row[:, None].to(tl.int64) * strides[2] + column[None, :].to(tl.int64) * strides[3]
    inside = (first + row < length)[:, None] & (column < SIZE)[None, :]
    tl.store(at, values.to(x.dtype.element_ty), mask=inside)


@triton.jit
def head_of(x, batch, head, strides):
    return x + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def passing_blocks(first, length, low, high, PARTS: tl.constexpr, KEPT: tl.constexpr, PASSING: tl.constexpr):
    """Of the ``length`` rows that pass KEPT rows from ``first`` on, in blocks: those of which anything is to be done are
    begin <= b < end. From ``whole`` to ``broken`` all is to be done, for every kept row x and passing row y: low <= y -
    x <= high.
    """
    last = first + KEPT - 1
    begin = 0
    whole = 0
    limit = length
    broken = length // PASSING
    if low is not None:
        begin = tl.maximum(first + low, 0) // PASSING
        whole = tl.cdiv(tl.maximum(last + low, 0), PASSING)
    if high is not None:
        limit = tl.minimum(tl.maximum(last + high + 1, 0), length)
        broken = tl.minimum(tl.maximum(first + high + 1, 0), length) // PASSING
    end = tl.maximum(tl.cdiv(limit, PASSING), begin)
    whole = tl.minimum(tl.maximum(whole, begin), end)
    # Products in parts take so long that nobody notices a comparison beside them, but their code twice to compile.
    broken = tl.minimum(tl.maximum(broken, whole), end) if PARTS == 0 else whole
    return begin, whole, broken, end


@triton.jit
def visible(x, y, passing, low, high):
    """Whether kept row x has to do with passing row y, of which there are ``passing``."""
    seen = y < passing
    if low is not None:
        seen = seen & (y - x >= low)
    if high is not None:
        seen = seen & (y - x <= high)
    return seen


@triton.jit
def biased(scores, i, j, length, keys, mask, mask_strides, slope, shift):
    """The scores with what is added to them. i and j: of query and key, along one dimension each. -infinity: not seen."""
    if mask is not None:
        at = mask + i.to(tl.int64) * mask_strides[2] + j.to(tl.int64) * mask_strides[3]
        given = tl.load(at, mask=(i < length) & (j < keys), other=0)
        if mask.dtype.element_ty == tl.uint8:
            scores += tl.where(given != 0, 0.0, float("-inf"))
        else:
            scores += given.to(tl.float32)
    if slope is not None:
        scores -= slope * tl.abs(i + shift - j).to(tl.float32)
    return scores


@triton.jit
def soften(scores, total, largest):
    """Exponentials of the scores, less the largest so far, and what sums of earlier ones are to be multiplied with; the total
    and the largest: Milakov and Gimelshein, arXiv:1805.02867."""
    higher = tl.maximum(largest, tl.max(scores, 1))
    # A row that has seen nothing yet has no largest score to take off.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp(scores - base[:, None])
    shrink = tl.exp(largest - base)
    return p, shrink, total * shrink + tl.sum(p, 1), higher


@triton.jit
def slope_of(slopes, slopes_strides, batch, head):
    if slopes is not None:
        return tl.load(slopes + batch * slopes_strides[0] + head * slopes_strides[1])
    else:
        return None


@triton.jit
def mask_of(mask, mask_strides, batch, head):
    if mask is not None:
        return head_of(mask, batch, head, mask_strides)
    else:
        return None


@triton.jit
def kept_scores(seed, threshold, head_row, query, key, keys, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Whether dropout leaves a probability, (QUERIES, KEYS), from a query and a key (a multiple of 4) on. Each row of scores
    begins with a counter of its own."""
    row = head_row + query + tl.arange(0, QUERIES)
    counter = row[:, None] * tl.cdiv(keys, 4) + (key // 4 + tl.arange(0, KEYS // 4))[None, :]
    return keeps(seed, counter, threshold)


#: What tl.dot multiplies at least.
_LEAST = 16


def tile(
    tiles: dict[int, tuple[tuple[int, int, int, int], ...]], dtype: torch.dtype, columns: int, rows: int
) -> tuple[int, int, int, int]:
    """Fewer rows are kept where there are no more."""
    kept, *others = tiles[max(columns, min(tiles))][dtype is torch.float32]
    return min(kept, max(triton.next_power_of_2(rows), _LEAST)), *others


def padded(size: int) -> int:
    return max(triton.next_power_of_2(size), _LEAST)


def parts_of(dtype: torch.dtype) -> int:
    """bfloat16 a number of float32."""
    return 3 - precision(dtype) if dtype is torch.float32 else 0


def there(seed: Tensor | None, query: Tensor) -> Tensor | None:
    """Where the kernel reads it, if the caller drew it elsewhere."""
    return None if seed is None else seed.to(query.device)


def beside(mask: Tensor | None, slopes: Tensor | None) -> tuple[Any, ...]:
    """The mask, of booleans their bytes, and how mask and slopes are read again and again where they have one of something."""
    if mask is not None and mask.dtype is torch.bool:
        mask = mask.view(torch.uint8)
    return mask, *(None if x is None else broadcast(x) for x in (mask, slopes))
