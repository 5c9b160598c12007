"""Attention on plain CPU tensors without zero sizes, whose shapes the ops have checked.

query (batch, heads, q_length, size), key and value (batch, kv_heads, k_length, size), the mask and the slopes as many
dimensions, of which each is full or 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _cpu, _state
from . import DTYPE, empty, empty_like

_MASK = {**DTYPE, torch.bool: DTYPE[torch.uint8]}
#: The longest rows that the kernels take.
MAX_SIZE = 512


def log_sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _operand(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.stride()


def _broadcast(x: Tensor) -> tuple[int, ...]:
    """Strides with which what has one of something is read again and again."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _mask(x: Tensor | None) -> tuple[Any, ...] | None:
    return None if x is None else (x.data_ptr(), _broadcast(x), _MASK[x.dtype])


def _slopes(x: Tensor | None, shift: int) -> tuple[Any, ...] | None:
    return None if x is None else (x.data_ptr(), *_broadcast(x), shift)


def _dropout(dropout: float, seed: Tensor | None) -> tuple[float, int] | None:
    return None if seed is None else (dropout, int(seed) & 0xFFFFFFFFFFFFFFFF)


def _shape(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    batch, heads, length, size = query.shape
    _, kv_heads, keys, value_size = value.shape
    return batch, heads, kv_heads, length, keys, size, value_size


def attention(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The result, and log sum exp of the scores for the backward; arguments as those of :func:`attention_alone`."""
    log_sum = torch.empty(query.shape[:3], dtype=log_sum_dtype(query.dtype))
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
    """The result; log sum exp of the scores goes to ``log_sum``."""
    shape = _shape(query, key, value)
    dtype = query.dtype
    out = empty_like(query) if like_query else empty((*shape[:2], shape[3], shape[6]), dtype)
    _cpu.attention(
        DTYPE[dtype],
        shape,
        (query.data_ptr(), query.stride()),
        (key.data_ptr(), key.stride()),
        (value.data_ptr(), value.stride()),
        (out.data_ptr(), out.stride()),
        None if log_sum is None else log_sum.data_ptr(),
        scale,
        _mask(mask),
        (low, high),
        _slopes(slopes, shift),
        _dropout(dropout, seed),
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
    """The gradients of query, key, value and mask (empty without ``by_mask``)."""
    shape = _shape(query, key, value)
    log_sum = log_sum.contiguous()
    by_query, by_key, by_value = empty_like(query), empty_like(key), empty_like(value)
    by_scores = empty((*shape[:2], *shape[3:5]), log_sum.dtype) if by_mask else None
    if by_scores is not None and not (low is None and high is None):
        # The kernel passes over what no query sees.
        by_scores.zero_()
    _cpu.attention_backward(
        DTYPE[query.dtype],
        shape,
        _operand(query),
        _operand(key),
        _operand(value),
        _operand(out),
        log_sum.data_ptr(),
        _operand(grad),
        _operand(by_query),
        _operand(by_key),
        _operand(by_value),
        None if by_scores is None else _operand(by_scores),
        scale,
        _mask(mask),
        (low, high),
        _slopes(slopes, shift),
        _dropout(dropout, seed),
        _state.settings().batch_invariant,
    )
    if by_scores is None or mask is None:
        return by_query, by_key, by_value, query.new_empty(0)
    return by_query, by_key, by_value, by_scores.sum_to_size(mask.shape).to(mask.dtype)


def path(dtype: torch.dtype) -> str:
    """The name of the kernel that multiplies for this dtype."""
    return _cpu.attention_path(DTYPE[dtype])
