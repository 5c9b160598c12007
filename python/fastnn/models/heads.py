"""Features as the heads of an attention, and back."""

from __future__ import annotations

from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``(N, L, heads * d)`` as ``(N, heads, L, d)``: a view."""
    n, length, width = x.shape
    return x.view(n, length, heads, width // heads).transpose(1, 2)


def split_projections(x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values side by side, ``(N, L, 3 * heads * d)``, as three of ``(N, heads, L, d)``: views."""
    n, length, width = x.shape
    parts = x.view(n, length, 3, heads, width // (3 * heads))
    if x.requires_grad:
        # Unbound where they lie next to each other: the gradient is then one stack, in the order of memory.
        query, key, value = parts.unbind(2)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def join_heads(x: Tensor) -> Tensor:
    """``(N, heads, L, d)`` as ``(N, L, heads * d)``: a view where the rows of the heads lie side by side."""
    return x.transpose(1, 2).flatten(2)
