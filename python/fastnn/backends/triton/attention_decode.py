"""Attention of few queries, as src/cuda/attention/decode.cu: a program has 16 queries, of all heads that share the keys, and a
split of these; a second kernel adds the splits' sums up. A row's are kept with its largest score and its sum of exponentials.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _state
from .._attention import shape_of
from ._launch import ceil_div, launch
from ._scores import COUNTS, beside, biased, head_of, padded, parts_of, product, rows, soften, visible

#: Queries of a program: what tl.dot multiplies at least.
ROWS = 16
#: The longer of the two sizes, padded, at most -> (keys at a time, warps, stages), of two bytes and of four.
TILES = {64: ((64, 4, 3), (32, 4, 2)), 128: ((64, 4, 3), (32, 4, 2)), 256: ((32, 4, 2),)}
#: Two programs to each multiprocessor of an H100 or H200, whatever the device: the order of sums is given by the shape alone.
_PROGRAMS = 2 * 132
_MOST_SPLITS = 128
#: Splits that are added up at a time.
_TOGETHER = 16


@triton.jit(do_not_specialize=(*COUNTS, "begin", "end", "each", "splits"))
def decode(
    q,
    k,
    v,
    out,  # the result, or the sums of each row and split
    log_sum,  # likewise, or a row's and split's largest score and sum of exponentials
    mask,
    slopes,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    mask_strides,
    slopes_strides,
    kv_heads,  # of all batches
    heads,
    group,
    length,
    keys,
    low,
    high,
    shift,
    scale,
    tiles,  # of a head of keys
    begin,  # of the keys that any query sees
    end,
    each,  # of a split
    splits,
    WHOLE: tl.constexpr,  # there is one split
    PARTS: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
):
    index = tl.program_id(0) // tiles % kv_heads
    split = tl.program_id(0) // tiles // kv_heads
    batch, kv_head = index // (heads // group), index % (heads // group)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    there = (row < group * length)[:, None]
    row = tl.minimum(row, group * length - 1)
    i = (row % length)[:, None]
    head = (kv_head * group + row // length).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    at = q + batch.to(tl.int64) * q_strides[0] + head * q_strides[1] + i.to(tl.int64) * q_strides[2]
    queries = tl.load(at + column.to(tl.int64) * q_strides[3], mask=there & (column < HEAD), other=0.0)
    k = head_of(k, batch, kv_head, k_strides)
    v = head_of(v, batch, kv_head, v_strides)
    if mask is not None:
        mask = mask + batch.to(tl.int64) * mask_strides[0] + head * mask_strides[1]
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + batch * slopes_strides[0] + head * slopes_strides[1])

    sums = tl.zeros((ROWS, VALUE_COLUMNS), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    first = begin + split * each
    last = tl.minimum(first + each, end)
    for block in range(tl.cdiv(last - first, KEYS)):
        key = first + block * KEYS
        j = (key + tl.arange(0, KEYS))[None, :]
        their_keys = rows(k, key, last, k_strides, 0, HEAD, KEYS, COLUMNS)
        scores = scale * product(tl.zeros((ROWS, KEYS), tl.float32), queries, tl.trans(their_keys), PARTS)
        scores = biased(scores, i, j, length, keys, mask, mask_strides, slope, shift)
        scores = tl.where(visible(i, j, last, low, high), scores, float("-inf"))
        p, shrink, total, largest = soften(scores, total, largest)
        values = rows(v, key, last, v_strides, 0, VALUE, KEYS, VALUE_COLUMNS)
        sums = product(sums * shrink[:, None], p, values, PARTS)

    column = tl.arange(0, VALUE_COLUMNS)[None, :]
    inside = there & (column < VALUE)
    # Counts heads and queries of all batches.
    row = index.to(tl.int64) * group * length + row
    total, largest = total[:, None], largest[:, None]
    if WHOLE:
        sums, found = result_of(sums, total, largest)
        at = out + batch.to(tl.int64) * out_strides[0] + head * out_strides[1] + i.to(tl.int64) * out_strides[2]
        tl.store(at + column.to(tl.int64) * out_strides[3], sums.to(out.dtype.element_ty), mask=inside)
        if log_sum is not None:
            tl.store(log_sum + row[:, None], found, mask=there)
    else:
        at = row[:, None] * splits + split
        tl.store(out + at * VALUE + column, sums, mask=inside)
        tl.store(log_sum + 2 * at, largest, mask=there)
        tl.store(log_sum + 2 * at + 1, total, mask=there)


@triton.jit
def result_of(sums, total, largest):
    """A row's result and log sum exp. A query that sees nothing: the sum is 0, and so is its result."""
    nothing = total == 0
    found = tl.where(nothing, float("inf"), largest + tl.log(total))
    return tl.where(nothing, 0.0, sums / tl.where(nothing, 1.0, total)), found


@triton.jit(do_not_specialize=("length", "splits"))
def combine(
    sums,
    softmax,
    out,
    log_sum,
    out_strides,
    heads,
    length,
    splits,
    VALUE: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Row ``program_id(0)`` of all heads and batches. Splits of which it sees no key are left out."""
    row = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, SPLITS)
    most = tl.max(tl.load(softmax + 2 * (row * splits + every), mask=every < splits, other=float("-inf")), 0)
    column = tl.arange(0, VALUE_COLUMNS)
    result = tl.zeros((VALUE_COLUMNS,), tl.float32)
    total = tl.zeros((1,), tl.float32)
    for first in range(0, splits, TOGETHER):
        split = first + tl.arange(0, TOGETHER)
        at = row * splits + split
        exponentials = tl.load(softmax + 2 * at + 1, mask=split < splits, other=0.0)
        seen = exponentials != 0
        weight = tl.where(seen, tl.exp(tl.load(softmax + 2 * at, mask=seen, other=0.0) - most), 0.0)
        total += tl.sum(weight * exponentials, 0)
        inside = seen[:, None] & (column < VALUE)[None, :]
        result += tl.sum(
            weight[:, None] * tl.load(sums + at[:, None] * VALUE + column[None, :], mask=inside, other=0.0), 0
        )
    result, found = result_of(result, total, most)
    at = out + row // length // heads * out_strides[0] + row // length % heads * out_strides[1]
    at += row % length * out_strides[2] + column.to(tl.int64) * out_strides[3]
    tl.store(at, result.to(out.dtype.element_ty), mask=column < VALUE)
    if log_sum is not None:
        tl.store(log_sum + row + tl.arange(0, 1), found)


def decodes(query: Tensor, value: Tensor, seed: Tensor | None) -> bool:
    """Whether it is few queries, without dropout, and rows that there are registers for."""
    longest = 128 if query.dtype is torch.float32 else 256
    return query.shape[2] <= ROWS and seed is None and max(query.shape[3], value.shape[3]) <= longest


def attend_few(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    low: int | None,
    high: int | None,
    shift: int,
    like_query: bool,
    log_sum: Tensor | None,
) -> Tensor:
    """As attention_alone(), where decodes() says so."""
    batch, heads, kv_heads, length, keys, head, columns = shape_of(query, key, value)
    group = heads // kv_heads
    out = torch.empty_like(query) if like_query else query.new_empty((batch, heads, length, columns))
    mask, mask_strides, slopes_strides = beside(mask, slopes)
    of_head, of_value = padded(head), padded(columns)
    at_a_time, warps, stages = TILES[max(of_head, of_value, 64)][query.dtype is torch.float32]
    tiles = ceil_div(group * length, ROWS)
    begin = max(low or 0, 0)
    end = max(keys if high is None else min(length + high, keys), begin)
    wanted = _PROGRAMS // ((1 if _state.settings().batch_invariant else batch) * kv_heads * tiles)
    each = max(ceil_div(ceil_div(end - begin, min(max(wanted, 1), _MOST_SPLITS)), 64), 1) * 64
    splits = max(ceil_div(end - begin, each), 1)
    to, softmax = out, log_sum
    if splits > 1:
        rows_of_all = batch * heads * length * splits
        to, softmax = query.new_empty((columns + 2) * rows_of_all, dtype=torch.float32).split(
            (columns * rows_of_all, 2 * rows_of_all)
        )
    launch(
        decode,
        tiles * batch * kv_heads * splits,
        query,
        query,
        key,
        value,
        to,
        softmax,
        mask,
        slopes,
        query.stride(),
        key.stride(),
        value.stride(),
        out.stride(),
        mask_strides,
        slopes_strides,
        batch * kv_heads,
        heads,
        group,
        length,
        keys,
        low,
        high,
        shift,
        scale,
        tiles,
        begin,
        end,
        each,
        splits,
        WHOLE=splits == 1,
        PARTS=parts_of(query.dtype),
        HEAD=head,
        VALUE=columns,
        ROWS=ROWS,
        KEYS=at_a_time,
        COLUMNS=of_head,
        VALUE_COLUMNS=of_value,
        num_warps=warps,
        num_stages=stages,
    )
    if splits > 1:
        launch(
            combine,
            batch * heads * length,
            query,
            to,
            softmax,
            out,
            log_sum,
            out.stride(),
            heads,
            length,
            splits,
            VALUE=columns,
            VALUE_COLUMNS=of_value,
            SPLITS=triton.next_power_of_2(splits),
            TOGETHER=_TOGETHER,
        )
    return out
