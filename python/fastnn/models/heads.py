"""Features as the heads of an attention, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..ops.multi_head_attention import heads_of


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``(N, L, heads * d)`` as ``(N, heads, L, d)``: a view."""
    n, length, width = x.shape
    return x.view(n, length, heads, width // heads).transpose(1, 2)


def split_projections(x: Tensor, heads: int) -> Sequence[Tensor]:
    """Queries, keys and values side by side, ``(N, L, 3 * heads * d)``, as three of ``(N, heads, L, d)``: views."""
    return heads_of(x, 3, heads, x.shape[-1] // (3 * heads), batch_first=True)


def join_heads(x: Tensor) -> Tensor:
    """``(N, heads, L, d)`` as ``(N, L, heads * d)``: a view where the rows of the heads lie side by side."""
    return x.transpose(1, 2).flatten(2)
