"""Attention's backward: one kernel, started twice, as src/cuda/attention/backward.cu. The scores are computed a second time, so
that no sum needs atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._attention import of_mask, shape_of
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
    store_rows,
    there,
    tile,
    visible,
)
from .dropout import choice

#: As FORWARD of attention_forward.py.
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
    512: ((16, 16, 8, 1), (16, 16, 8, 1)),
}


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


@triton.jit(do_not_specialize=COUNTS)
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


def _minus(bound: int | None) -> int | None:
    return None if bound is None else -bound


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
    log_sum, seed = log_sum.contiguous(), there(seed, query)
    given, mask_strides, slopes_strides = beside(mask, slopes)
    of_head, of_value = padded(head), padded(columns)
    for tiles, tensors, (least, most) in (
        (BY_QUERIES, (query, grad, key, value, by_query, None), (low, high)),
        (BY_KEYS, (key, value, query, grad, by_key, by_value), (_minus(high), _minus(low))),
    ):
        by_keys = tiles is BY_KEYS
        rows_kept, passing, warps, stages = tile(tiles, query.dtype, max(of_head, of_value), tensors[0].shape[2])
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
            PARTS=parts_of(query.dtype),
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
