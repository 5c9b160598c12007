"""Attention's forward: Dao, arXiv:2307.08691. A program has a block of queries of one head, and goes through the keys
online."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._attention import shape_of
from ._launch import ceil_div, launch
from ._scores import (
    COUNTS,
    beside,
    biased,
    head_of,
    kept_scores,
    mask_of,
    padded,
    parts_of,
    passing_blocks,
    product,
    rows,
    scores_of,
    slope_of,
    soften,
    store_rows,
    there,
    tile,
    visible,
)
from .attention_decode import attend_few, decodes
from .dropout import choice

#: The longer of the two sizes, padded, at most -> (rows that are kept, rows that pass, warps, stages), of two bytes and
#: of four: what fits the registers of sm_80 and sm_90, and 99 KiB of shared memory, which sm_86 and sm_89 have.
FORWARD = {
    64: ((128, 64, 8, 3), (64, 32, 4, 2)),
    128: ((128, 32, 8, 3), (64, 32, 8, 2)),
    256: ((64, 32, 8, 2), (32, 16, 8, 1)),
    512: ((32, 32, 8, 1), (16, 16, 8, 1)),
}


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
    """The keys of blocks from ``begin`` to ``end`` seen by the queries from ``first`` on."""
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
        p, shrink, total, largest = soften(scores, total, largest)
        if seed is not None:
            p = tl.where(kept_scores(seed, threshold, head_row, first, key, keys, QUERIES, KEYS), p, 0.0)
        values = rows(v, key, keys, v_strides, 0, VALUE, KEYS, VALUE_COLUMNS)
        sums = product(sums * shrink[:, None], p, values, PARTS)
    return sums, total, largest


@triton.jit(do_not_specialize=COUNTS)
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
    if decodes(query, value, seed):
        return attend_few(query, key, value, mask, slopes, scale, low, high, shift, like_query, log_sum)
    batch, heads, kv_heads, length, keys, head, columns = shape_of(query, key, value)
    out = torch.empty_like(query) if like_query else query.new_empty((batch, heads, length, columns))
    mask, mask_strides, slopes_strides = beside(mask, slopes)
    of_head, of_value = padded(head), padded(columns)
    queries, of_keys, warps, stages = tile(FORWARD, query.dtype, max(of_head, of_value), length)
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
        there(seed, query),
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
        PARTS=parts_of(query.dtype),
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
