"""Attention and its derivatives in plain torch, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout import words


class Probabilities:
    """softmax(scale Q Kᵀ + bias), and what its derivatives are made of, in ``dtype``.

    Attributes:
        value: (batch, heads, q_length, k_length); 0 throughout for a query that sees nothing.
        kept: what dropout multiplies them with, 0 or 1 / (1 - dropout), or 1 for all.
        log_sum: (batch, heads, q_length): log sum exp of the scores; infinity for a query that sees nothing.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        slopes: Tensor | None,
        scale: float,
        low: int | None,
        high: int | None,
        shift: int,
        dropout: float,
        seed: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.dtype, self.scale = dtype, scale
        self.groups = query.shape[1] // key.shape[1]
        self.query, self.key = query.to(dtype), self.per_query_head(key)
        scores = scale * self.of(self.query, self.key)
        length, keys = scores.shape[-2:]
        distance = torch.arange(keys, device=scores.device) - torch.arange(length, device=scores.device).unsqueeze(-1)
        if slopes is not None:
            scores = scores - slopes.to(dtype)[..., None, None] * (distance - shift).abs()
        if mask is not None and mask.dtype is not torch.bool:
            scores = scores + mask.to(dtype)
        visible = None if mask is None or mask.dtype is not torch.bool else mask
        for bound in (None if low is None else distance >= low, None if high is None else distance <= high):
            if bound is not None:
                visible = bound if visible is None else visible & bound
        if visible is not None:
            scores = torch.where(visible, scores, -torch.inf)
        largest = scores.detach().amax(-1, keepdim=True)
        largest = torch.where(largest == -torch.inf, 0, largest)
        exponential = (scores - largest).exp()
        total = exponential.sum(-1, keepdim=True)
        nothing = total == 0
        self.value = exponential / torch.where(nothing, 1, total)
        self.log_sum = torch.where(nothing, torch.inf, largest + total.log()).squeeze(-1)
        self.kept: Tensor | float = 1.0
        if dropout > 0:
            assert seed is not None
            # Each row begins with a block of its own.
            row = (keys + 3) // 4 * 4
            found = words(seed.to(scores.device), scores.numel() // keys * row).view(*scores.shape[:-1], row)[
                ..., :keys
            ]
            drops = found < int(dropout * 2**32 + 0.5)
            self.kept = (~drops).to(dtype) * (1 / (1 - dropout) if dropout < 1 else 0.0)

    def per_query_head(self, x: Tensor) -> Tensor:
        """Of keys or values: those that each head of the query reads."""
        x = x.to(self.dtype)
        return x if self.groups == 1 else x.repeat_interleave(self.groups, 1)

    def per_kv_head(self, x: Tensor) -> Tensor:
        """The sums over the heads of the query that share a head of the keys."""
        return x if self.groups == 1 else x.reshape(x.shape[0], -1, self.groups, *x.shape[2:]).sum(2)

    @staticmethod
    def of(a: Tensor, b: Tensor) -> Tensor:
        """a bᵀ: of two that lie along different lengths, a matrix as the scores are."""
        return a @ b.transpose(-2, -1)

    def derivative(self, direction: Tensor) -> Tensor:
        """Of the probabilities by the scores, times ``direction`` on either side: it is symmetric."""
        along = self.value * direction
        return along - self.value * along.sum(-1, keepdim=True)


def attention(
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
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The result, and log sum exp of the scores."""
    p = Probabilities(query, key, mask, slopes, scale, low, high, shift, dropout, seed, dtype)
    out = ((p.value * p.kept) @ p.per_query_head(value)).to(query.dtype)
    if like_query:
        out = torch.empty_like(query).copy_(out)
    return out, p.log_sum.to(torch.float64 if query.dtype is torch.float64 else torch.float32)


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
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and mask (empty without ``by_mask``)."""
    p = Probabilities(query, key, mask, slopes, scale, low, high, shift, dropout, seed, dtype)
    g = grad.to(dtype)
    by_scores = p.derivative(p.of(g, p.per_query_head(value)) * p.kept)
    by_query = scale * by_scores @ p.key
    by_key = p.per_kv_head(scale * by_scores.transpose(-2, -1) @ p.query)
    by_value = p.per_kv_head((p.value * p.kept).transpose(-2, -1) @ g)
    by_bias = by_scores.sum_to_size(mask.shape).to(mask.dtype) if by_mask and mask is not None else query.new_empty(0)
    return by_query.to(query.dtype), by_key.to(key.dtype), by_value.to(value.dtype), by_bias
