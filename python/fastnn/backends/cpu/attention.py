"""Attention on plain CPU tensors without zero sizes, whose shapes the ops have checked; see .._attention for the arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _cpu, _state
from .. import _attention
from . import DTYPE, empty, empty_like

#: The longest rows that the kernels take.
MAX_SIZE = 512


def log_sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def attention(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The result, and log sum exp of the scores for the backward; arguments as those of :func:`attention_alone`."""
    log_sum = torch.empty(query.shape[:3], dtype=log_sum_dtype(query.dtype))
    return attention_alone(query, *args, log_sum=log_sum), log_sum


def attention_alone(query: Tensor, key: Tensor, value: Tensor, *args: Any, log_sum: Tensor | None = None) -> Tensor:
    """The result; log sum exp of the scores goes to ``log_sum``. The last of the arguments is ``like_query``, whether the
    result lies as the query does."""
    *args, like_query = args
    shape = (*query.shape[:3], value.shape[3])
    out = empty_like(query) if like_query else empty(shape, query.dtype)
    _attention.forward(_cpu.attention, out, query, key, value, *args, log_sum)
    return out


def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and mask (empty without ``by_mask``, the last argument)."""
    *args, by_mask = args
    gradients = (empty_like(query), empty_like(key), empty_like(value))
    shape = (*query.shape[:3], key.shape[2])
    by_scores = empty(shape, log_sum_dtype(query.dtype)) if by_mask else None
    invariant = _state.settings().batch_invariant
    return _attention.backward(
        _cpu.attention_backward, gradients, by_scores, grad, query, key, value, *args, batch_invariant=invariant
    )


def path(dtype: torch.dtype) -> str:
    """The name of the kernel that multiplies for this dtype."""
    return _cpu.attention_path(DTYPE[dtype])
