"""Attention on plain CUDA tensors without zero sizes, whose shapes the ops have checked; see .._attention for the
arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _state
from .. import _attention
from ..codes import DTYPE
from . import module, where


def attention(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """As backends.cpu.attention.attention."""
    log_sum = query.new_empty(query.shape[:3], dtype=torch.float32)
    return attention_alone(query, *args, log_sum=log_sum), log_sum


def attention_alone(query: Tensor, key: Tensor, value: Tensor, *args: Any, log_sum: Tensor | None = None) -> Tensor:
    """As backends.cpu.attention.attention_alone."""
    *args, like_query = args
    _, _, _, low, high, _, _, seed = args
    out = torch.empty_like(query) if like_query else query.new_empty((*query.shape[:3], value.shape[3]))
    invariant = _state.settings().batch_invariant
    # Of few queries the keys are split, and the splits' sums kept until all are there.
    shape = _attention.shape_of(query, key, value)
    wanted = module().attention_workspace(DTYPE[query.dtype], shape, (low, high), invariant) if seed is None else 0
    workspace = query.new_empty(wanted, dtype=torch.float32)
    _attention.forward(
        module().attention,
        out,
        query,
        key,
        value,
        *args,
        log_sum,
        workspace=workspace.data_ptr(),
        batch_invariant=invariant,
        **where(query),
    )
    return out


def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As backends.cpu.attention.attention_backward."""
    *args, by_mask = args
    gradients = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
    by_scores = query.new_empty((*query.shape[:3], key.shape[2]), dtype=torch.float32) if by_mask else None
    # A query's result times its gradient, which both passes need.
    workspace = query.new_empty(query.shape[:3], dtype=torch.float32)
    return _attention.backward(
        module().attention_backward,
        gradients,
        by_scores,
        grad,
        query,
        key,
        value,
        *args,
        workspace=workspace.data_ptr(),
        **where(query),
    )
