"""Features as the heads of an attention, and back."""

from __future__ import annotations

from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``(N, L, heads * d)`` as ``(N, heads, L, d)``: a view."""
    n, length, width = x.shape
    return x.view(n, length, heads, width // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """``(N, heads, L, d)`` as ``(N, L, heads * d)``: a view where the rows of the heads lie side by side."""
    return x.transpose(1, 2).flatten(2)
