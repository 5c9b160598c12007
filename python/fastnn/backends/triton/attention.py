"""Attention on plain tensors without zero sizes, whose shapes the ops have checked; see .._attention for the arguments.

Rows of queries, keys and values are padded to powers of two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention_backward import attention_backward
from .attention_forward import attention_alone

__all__ = ["attention", "attention_alone", "attention_backward"]


def attention(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """As backends.cpu.attention.attention."""
    log_sum = query.new_empty(query.shape[:3], dtype=torch.float32)
    return attention_alone(query, *args, log_sum=log_sum), log_sum
