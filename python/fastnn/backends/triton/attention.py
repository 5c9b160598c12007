"""Attention on plain tensors without zero sizes, whose shapes the ops have checked; see .._attention for the arguments.

Forward: Dao, arXiv:2307.08691. A program has a block of queries of one head, and goes through the keys online. The backward is one
kernel, started twice, as src/cuda/attention/backward.cu: the scores are computed a second time, so that no sum needs atomics.
Rows of queries, keys and values are padded to powers of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._attention import broadcast, of_mask, shape_of
from ..codes import precision
from ._launch import ceil_div, launch
from .dropout import choice, keeps
from .gemm import multiply_parts

#: Arguments that grow from call to call where keys are cached: no kernel is compiled for multiples of 16 among them.
_COUNTS = ("length", "keys", "low", "high", "shift", "threshold", "blocks")


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
    begin <= b < end. From ``whole`` to ``broken`` all is to be done, for every kept row x and passing row y: low <= y - x <= high.
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


@triton.jit
def attend(
    sums,
    total,
    largest,
    queries,
    q,
    k,
    v,
    q_strides,
    k_strides,
    v_strides,
    mask,
    mask_strides,
    slope,
    seed,
    head_row,
    threshold,
    first,
    begin,
    end,
    skipped_from,  # blocks that are not gone through
    skipped,  # how many
    length,
    keys,
    low,
    high,
    shift,
    scale,
    BOUNDED: tl.constexpr,  # not every query sees every key
    PARTS: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
):
    """The keys of blocks from ``begin`` to ``end`` seen by the queries from ``first`` on: Milakov and Gimelshein,
    arXiv:1805.02867."""
    i = (first + tl.arange(0, QUERIES))[:, None]
    for block in range(begin, end - skipped):
        key = tl.where(block < skipped_from, block, block + skipped) * KEYS
        j = (key + tl.arange(0, KEYS))[None, :]
        their_keys = rows(k, key, keys, k_strides, 0, HEAD, KEYS, COLUMNS)
        scores = scale * scores_of(
            queries, q, first, length, q_strides, their_keys, k, key, keys, k_strides, PARTS, HEAD, QUERIES, KEYS, COLUMNS
        )  # fmt: skip
        scores = biased(scores, i, j, length, keys, mask, mask_strides, slope, shift)
        if BOUNDED:
            scores = tl.where(visible(i, j, keys, low, high), scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1))
        # A row that has seen nothing yet has no largest score to take off.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp(scores - base[:, None])
        shrink = tl.exp(largest - base)
        total = total * shrink + tl.sum(p, 1)
        largest = higher
        if seed is not None:
            p = tl.where(kept_scores(seed, threshold, head_row, first, key, keys, QUERIES, KEYS), p, 0.0)
        values = rows(v, key, keys, v_strides, 0, VALUE, KEYS, VALUE_COLUMNS)
        sums = product(sums * shrink[:, None], p, values, PARTS)
    return sums, total, largest


@triton.jit(do_not_specialize=_COUNTS)
def forward(
    q,
    k,
    v,
    out,
    log_sum,
    mask,
    slopes,
    seed,
    q_strides,  # of batch, head, row and column
    k_strides,
    v_strides,
    out_strides,
    mask_strides,
    slopes_strides,
    heads,
    group,  # heads of queries that share one of keys
    length,
    keys,
    low,  # query i sees key j where low <= j - i <= high; None: no bound
    high,
    shift,
    scale,
    threshold,
    kept,
    blocks,  # of queries
    PARTS: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
):
    # The last queries, which see the most keys of a causal mask, come first.
    first = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES
    index = tl.program_id(0) // blocks
    batch, head = index // heads, index % heads
    q = head_of(q, batch, head, q_strides)
    queries = rows(q, first, length, q_strides, 0, HEAD, QUERIES, COLUMNS)
    k = head_of(k, batch, head // group, k_strides)
    v = head_of(v, batch, head // group, v_strides)
    mask = mask_of(mask, mask_strides, batch, head)
    slope = slope_of(slopes, slopes_strides, batch, head)
    head_row = index.to(tl.int64) * length
    begin, whole, broken, end = passing_blocks(first, keys, low, high, PARTS, QUERIES, KEYS)

    sums = tl.zeros((QUERIES, VALUE_COLUMNS), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    # What every query sees without a question, and then what is left on both sides.
    if PARTS == 0:
        sums, total, largest = attend(
            sums, total, largest, queries, q, k, v, q_strides, k_strides, v_strides, mask, mask_strides, slope, seed, head_row,
            threshold, first, whole, broken, broken, 0, length, keys, low, high, shift, scale,
            False, PARTS, HEAD, VALUE, QUERIES, KEYS, COLUMNS, VALUE_COLUMNS,
        )  # fmt: skip
    sums, total, largest = attend(
        sums, total, largest, queries, q, k, v, q_strides, k_strides, v_strides, mask, mask_strides, slope, seed, head_row,
        threshold, first, begin, end, whole, broken - whole, length, keys, low, high, shift, scale,
        True, PARTS, HEAD, VALUE, QUERIES, KEYS, COLUMNS, VALUE_COLUMNS,
    )  # fmt: skip

    # A query that sees nothing: the sum is 0, and so is its result.
    nothing = (largest == float("-inf")) & (total == 0)
    sums *= (kept / tl.where(nothing, 1.0, total))[:, None]
    to = head_of(out, batch, head, out_strides)
    store_rows(to, first, length, out_strides, sums, VALUE, QUERIES, VALUE_COLUMNS)
    if log_sum is not None:
        i = first + tl.arange(0, QUERIES)
        found = tl.where(nothing, float("inf"), largest + tl.log(total))
        tl.store(log_sum + head_row + i, found, mask=i < length)


@triton.jit
def differentiate(
    by_x,
    by_x2,
    kept_x,
    kept_x2,
    x,
    x2,
    x_log_sum,
    x_delta,
    y,
    y2,
    x_strides,
    x2_strides,
    y_strides,
    y2_strides,
    log_sum,
    delta,
    by_scores,
    mask,
    mask_strides,
    slope,
    seed,
    head_row,
    threshold,
    first,
    begin,
    end,
    skipped_from,
    skipped,
    length,
    keys,
    low,
    high,
    shift,
    scale,
    kept,
    BY_KEYS: tl.constexpr,
    BOUNDED: tl.constexpr,
    PARTS: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    KEPT: tl.constexpr,
    PASSING: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
):
    """What blocks of passing rows from ``begin`` to ``end`` add to the gradients of the kept rows from ``first`` on."""
    at_x = (first + tl.arange(0, KEPT))[:, None]
    of_x, passing = (keys, length) if BY_KEYS else (length, keys)
    for block in range(begin, end - skipped):
        row = tl.where(block < skipped_from, block, block + skipped) * PASSING
        at_y = (row + tl.arange(0, PASSING))[None, :]
        i, j = (at_y, at_x) if BY_KEYS else (at_x, at_y)
        their_y = rows(y, row, passing, y_strides, 0, HEAD, PASSING, COLUMNS)
        scores = scale * scores_of(
            kept_x, x, first, of_x, x_strides, their_y, y, row, passing, y_strides, PARTS, HEAD, KEPT, PASSING, COLUMNS
        )  # fmt: skip
        scores = biased(scores, i, j, length, keys, mask, mask_strides, slope, shift)
        if BY_KEYS:
            # A query that there is not has seen nothing.
            its_log_sum = tl.load(log_sum + head_row + at_y, mask=at_y < length, other=float("inf"))
            its_delta = tl.load(delta + head_row + at_y, mask=at_y < length, other=0.0)
        else:
            its_log_sum, its_delta = x_log_sum, x_delta
        p = tl.exp(scores - its_log_sum)
        their_y2 = rows(y2, row, passing, y2_strides, 0, VALUE, PASSING, VALUE_COLUMNS)
        by_p = scores_of(
            kept_x2, x2, first, of_x, x2_strides, their_y2, y2, row, passing, y2_strides,
            PARTS, VALUE, KEPT, PASSING, VALUE_COLUMNS,
        )  # fmt: skip
        if BOUNDED:
            seen = visible(at_x, at_y, passing, low, high)
            p = tl.where(seen, p, 0.0)
        used = p
        if seed is not None:
            if BY_KEYS:
                stays = tl.trans(kept_scores(seed, threshold, head_row, row, first, keys, PASSING, KEPT))
            else:
                stays = kept_scores(seed, threshold, head_row, first, row, keys, KEPT, PASSING)
            used = tl.where(stays, p, 0.0)
            by_p = tl.where(stays, by_p * kept, 0.0)
        by_score = p * (by_p - its_delta)
        if by_scores is not None:
            to = by_scores + (head_row + i) * keys + j
            tl.store(to, by_score, mask=(i < length) & (j < keys))
        by_x = product(by_x, by_score, their_y, PARTS)
        if BY_KEYS:
            by_x2 = product(by_x2, used, their_y2, PARTS)
    return by_x, by_x2


@triton.jit(do_not_specialize=_COUNTS)
def backward(
    x,  # what a program keeps: of queries and their result's gradient, or of keys and values
    x2,
    y,  # what passes: the others
    y2,
    by_x,
    by_x2,  # the values' gradient
    out,
    log_sum,
    delta,  # of a query, its result times that result's gradient: written for queries, read for keys
    by_scores,  # the gradient by every score, or None
    mask,
    slopes,
    seed,
    x_strides,
    x2_strides,
    y_strides,
    y2_strides,
    by_x_strides,
    by_x2_strides,
    out_strides,
    mask_strides,
    slopes_strides,
    heads,  # of x
    group,
    length,
    keys,
    low,  # as in forward(), of passing rows less kept rows
    high,
    shift,
    scale,
    threshold,
    kept,
    blocks,  # of kept rows
    BY_KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    KEPT: tl.constexpr,
    PASSING: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
):
    """With P = exp(scores - log sum), dP = x2 y2ᵀ and dS = P (dP - delta): by_x = scale Σ dS y, and of keys by_x2 = Σ P y2."""
    block = tl.program_id(0) % blocks
    # What takes longest where the mask is causal comes first.
    first = (block if BY_KEYS else blocks - 1 - block) * KEPT
    index = tl.program_id(0) // blocks
    batch, own = index // heads, index % heads
    of_x, passing = (keys, length) if BY_KEYS else (length, keys)
    x = head_of(x, batch, own, x_strides)
    x2 = head_of(x2, batch, own, x2_strides)
    kept_x = rows(x, first, of_x, x_strides, 0, HEAD, KEPT, COLUMNS)
    kept_x2 = rows(x2, first, of_x, x2_strides, 0, VALUE, KEPT, VALUE_COLUMNS)
    begin, whole, broken, end = passing_blocks(first, passing, low, high, PARTS, KEPT, PASSING)
    x_log_sum = tl.zeros((KEPT, 1), tl.float32)
    x_delta = x_log_sum
    if not BY_KEYS:
        i = first + tl.arange(0, KEPT)
        at = index.to(tl.int64) * length + i
        result = rows(head_of(out, batch, own, out_strides), first, length, out_strides, 0, VALUE, KEPT, VALUE_COLUMNS)
        deltas = tl.sum(result.to(tl.float32) * kept_x2.to(tl.float32), 1)
        tl.store(delta + at, deltas, mask=i < length)
        x_delta = deltas[:, None]
        x_log_sum = tl.load(log_sum + at, mask=i < length, other=float("inf"))[:, None]

    sums = tl.zeros((KEPT, COLUMNS), tl.float32)
    sums2 = tl.zeros((KEPT, VALUE_COLUMNS), tl.float32)
    # All heads of queries that share these keys.
    for member in range(group if BY_KEYS else 1):
        other = own * group + member if BY_KEYS else own // group
        head = other if BY_KEYS else own
        head_row = (batch * (heads * group if BY_KEYS else heads) + head).to(tl.int64) * length
        their_y = head_of(y, batch, other, y_strides)
        their_y2 = head_of(y2, batch, other, y2_strides)
        their_mask = mask_of(mask, mask_strides, batch, head)
        slope = slope_of(slopes, slopes_strides, batch, head)
        if PARTS == 0:
            sums, sums2 = differentiate(
                sums, sums2, kept_x, kept_x2, x, x2, x_log_sum, x_delta, their_y, their_y2, x_strides, x2_strides, y_strides,
                y2_strides, log_sum, delta, by_scores, their_mask, mask_strides, slope, seed, head_row,
                threshold, first, whole, broken, broken, 0,
                length, keys, low, high, shift, scale, kept,
                BY_KEYS, False, PARTS, HEAD, VALUE, KEPT, PASSING, COLUMNS, VALUE_COLUMNS,
            )  # fmt: skip
        sums, sums2 = differentiate(
            sums, sums2, kept_x, kept_x2, x, x2, x_log_sum, x_delta, their_y, their_y2, x_strides, x2_strides, y_strides,
            y2_strides, log_sum, delta, by_scores, their_mask, mask_strides, slope, seed, head_row,
            threshold, first, begin, end, whole, broken - whole,
            length, keys, low, high, shift, scale, kept,
            BY_KEYS, True, PARTS, HEAD, VALUE, KEPT, PASSING, COLUMNS, VALUE_COLUMNS,
        )  # fmt: skip
    to = head_of(by_x, batch, own, by_x_strides)
    store_rows(to, first, of_x, by_x_strides, sums * scale, HEAD, KEPT, COLUMNS)
    if BY_KEYS:
        to = head_of(by_x2, batch, own, by_x2_strides)
        store_rows(to, first, of_x, by_x2_strides, sums2 * kept, VALUE, KEPT, VALUE_COLUMNS)


def attention(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """As backends.cpu.attention.attention."""
    log_sum = query.new_empty(query.shape[:3], dtype=torch.float32)
    return attention_alone(query, *args, log_sum=log_sum), log_sum


def attention_alone(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    low: int | None,
    high: int | None,
    shift: int,
    dropout: float,
    seed: Tensor | None,
    like_query: bool,
    log_sum: Tensor | None = None,
) -> Tensor:
    """As backends.cpu.attention.attention_alone."""
    batch, heads, kv_heads, length, keys, head, columns = shape_of(query, key, value)
    out = torch.empty_like(query) if like_query else query.new_empty((batch, heads, length, columns))
    mask, mask_strides, slopes_strides = _beside(mask, slopes)
    of_head, of_value = _padded(head), _padded(columns)
    queries, of_keys, warps, stages = _tile(FORWARD, query.dtype, max(of_head, of_value), length)
    blocks = ceil_div(length, queries)
    launch(
        forward,
        blocks * batch * heads,
        query,
        query,
        key,
        value,
        out,
        log_sum,
        mask,
        slopes,
        _there(seed, query),
        query.stride(),
        key.stride(),
        value.stride(),
        out.stride(),
        mask_strides,
        slopes_strides,
        heads,
        heads // kv_heads,
        length,
        keys,
        low,
        high,
        shift,
        scale,
        *choice(dropout),
        blocks,
        PARTS=_parts(query.dtype),
        HEAD=head,
        VALUE=columns,
        QUERIES=queries,
        KEYS=of_keys,
        COLUMNS=of_head,
        VALUE_COLUMNS=of_value,
        num_warps=warps,
        num_stages=stages,
    )
    return out


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    scale: float,
    low: int | None,
    high: int | None,
    shift: int,
    dropout: float,
    seed: Tensor | None,
    by_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As backends.cpu.attention.attention_backward."""
    batch, heads, kv_heads, length, keys, head, columns = shape_of(query, key, value)
    by_query, by_key, by_value = (torch.empty_like(x) for x in (query, key, value))
    by_scores = None
    if by_mask:
        # The kernel passes over what no query sees.
        new = query.new_empty if low is None and high is None else query.new_zeros
        by_scores = new((batch, heads, length, keys), dtype=torch.float32)
    delta = query.new_empty(query.shape[:3], dtype=torch.float32)
    log_sum, seed = log_sum.contiguous(), _there(seed, query)
    given, mask_strides, slopes_strides = _beside(mask, slopes)
    of_head, of_value = _padded(head), _padded(columns)
    for tiles, tensors, (least, most) in (
        (BY_QUERIES, (query, grad, key, value, by_query, None), (low, high)),
        (BY_KEYS, (key, value, query, grad, by_key, by_value), (_minus(high), _minus(low))),
    ):
        by_keys = tiles is BY_KEYS
        rows_kept, passing, warps, stages = _tile(tiles, query.dtype, max(of_head, of_value), tensors[0].shape[2])
        blocks = ceil_div(tensors[0].shape[2], rows_kept)
        launch(
            backward,
            blocks * batch * tensors[0].shape[1],
            query,
            *tensors,
            out,
            log_sum,
            delta,
            None if by_keys else by_scores,
            given,
            slopes,
            seed,
            *(None if x is None else x.stride() for x in (*tensors, out)),
            mask_strides,
            slopes_strides,
            tensors[0].shape[1],
            heads // kv_heads,
            length,
            keys,
            least,
            most,
            shift,
            scale,
            *choice(dropout),
            blocks,
            BY_KEYS=by_keys,
            PARTS=_parts(query.dtype),
            HEAD=head,
            VALUE=columns,
            KEPT=rows_kept,
            PASSING=passing,
            COLUMNS=of_head,
            VALUE_COLUMNS=of_value,
            num_warps=warps,
            num_stages=stages,
        )
    return by_query, by_key, by_value, of_mask(by_scores, mask, query)


#: The longer of the two sizes, padded, at most -> (rows that are kept, rows that pass, warps, stages), of two bytes and of four:
#: what fits the registers of sm_80 and sm_90, and 114 KiB of shared memory.
FORWARD = {
    64: ((128, 64, 8, 3), (64, 32, 4, 2)),
    128: ((128, 32, 8, 3), (64, 32, 8, 2)),
    256: ((64, 32, 8, 2), (32, 16, 8, 1)),
    512: ((32, 32, 8, 1), (16, 16, 8, 1)),
}
BY_QUERIES = {
    64: ((64, 32, 4, 2), (32, 32, 4, 2)),
    128: ((64, 32, 4, 2), (32, 32, 8, 2)),
    256: ((64, 16, 8, 1), (16, 16, 8, 1)),
    512: ((32, 16, 8, 1), (16, 16, 8, 1)),
}
BY_KEYS = {
    64: ((64, 32, 4, 2), (32, 32, 4, 2)),
    128: ((64, 32, 8, 2), (32, 32, 8, 2)),
    256: ((32, 32, 8, 1), (16, 16, 8, 1)),
    512: ((32, 16, 8, 1), (16, 16, 8, 1)),
}
#: What tl.dot multiplies at least.
_LEAST = 16


def _tile(
    tiles: dict[int, tuple[tuple[int, int, int, int], ...]], dtype: torch.dtype, columns: int, rows: int
) -> tuple[int, int, int, int]:
    """Fewer rows are kept where there are no more."""
    kept, *others = tiles[max(columns, min(tiles))][dtype is torch.float32]
    return min(kept, max(triton.next_power_of_2(rows), _LEAST)), *others


def _minus(bound: int | None) -> int | None:
    return None if bound is None else -bound


def _padded(size: int) -> int:
    return max(triton.next_power_of_2(size), _LEAST)


def _parts(dtype: torch.dtype) -> int:
    """bfloat16 a number of float32."""
    return 3 - precision(dtype) if dtype is torch.float32 else 0


def _there(seed: Tensor | None, query: Tensor) -> Tensor | None:
    """Where the kernel reads it, if the caller drew it elsewhere."""
    return None if seed is None else seed.to(query.device)


def _beside(mask: Tensor | None, slopes: Tensor | None) -> tuple[Any, ...]:
    """The mask, of booleans their bytes, and how mask and slopes are read again and again where they have one of something."""
    if mask is not None and mask.dtype is torch.bool:
        mask = mask.view(torch.uint8)
    return mask, *(None if x is None else broadcast(x) for x in (mask, slopes))
