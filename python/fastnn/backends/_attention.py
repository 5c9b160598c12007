"""How the attention of an extension module is called: what its bindings have in common, on CPUs and GPUs.

query (batch, heads, q_length, size), key and value (batch, kv_heads, k_length, size), the mask and the slopes as many
dimensions, of which each is full or 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .codes import DTYPE

_MASK = {**DTYPE, torch.bool: DTYPE[torch.uint8]}


def operand(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.stride()


def broadcast(x: Tensor) -> tuple[int, ...]:
    """Strides with which what has one of something is read again and again."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _mask(x: Tensor | None) -> tuple[Any, ...] | None:
    return None if x is None else (x.data_ptr(), broadcast(x), _MASK[x.dtype])


def _slopes(x: Tensor | None, shift: int) -> tuple[Any, ...] | None:
    return None if x is None else (x.data_ptr(), *broadcast(x), shift)


def _dropout(dropout: float, seed: Tensor | None) -> tuple[float, int] | None:
    """The seed by its address: it is read where the kernel runs, for which a host would have to wait."""
    return None if seed is None else (dropout, seed.data_ptr())


def shape_of(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    batch, heads, length, size = query.shape
    _, kv_heads, keys, value_size = value.shape
    return batch, heads, kv_heads, length, keys, size, value_size


def forward(
    function: Callable[..., None],
    out: Tensor,
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
    log_sum: Tensor | None,
    **options: Any,
) -> None:
    function(
        DTYPE[query.dtype],
        shape_of(query, key, value),
        operand(query),
        operand(key),
        operand(value),
        operand(out),
        None if log_sum is None else log_sum.data_ptr(),
        scale,
        _mask(mask),
        (low, high),
        _slopes(slopes, shift),
        _dropout(dropout, seed),
        **options,
    )


def backward(
    function: Callable[..., None],
    gradients: tuple[Tensor, Tensor, Tensor],
    by_scores: Tensor | None,
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
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, which are written to ``gradients``, and that of the mask: empty without
    ``by_scores``, which the gradient by every score is written to."""
    if by_scores is not None and not (low is None and high is None):
        # The kernel passes over what no query sees.
        by_scores.zero_()
    log_sum = log_sum.contiguous()
    function(
        DTYPE[query.dtype],
        shape_of(query, key, value),
        operand(query),
        operand(key),
        operand(value),
        operand(out),
        log_sum.data_ptr(),
        operand(grad),
        *map(operand, gradients),
        None if by_scores is None else operand(by_scores),
        scale,
        _mask(mask),
        (low, high),
        _slopes(slopes, shift),
        _dropout(dropout, seed),
        **options,
    )
    return (*gradients, of_mask(by_scores, mask, query))


def of_mask(by_scores: Tensor | None, mask: Tensor | None, query: Tensor) -> Tensor:
    """The gradient of the mask, from that by every score."""
    if by_scores is None or mask is None:
        return query.new_empty(0)
    return by_scores.sum_to_size(mask.shape).to(mask.dtype)
