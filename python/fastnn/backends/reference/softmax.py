"""softmax, log_softmax and their gradients in plain torch, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax(input: Tensor, dim: int, log: bool, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """exp(x - max) / Σ exp(x - max) along ``dim``, or x - max - log Σ exp(x - max)."""
    x = input.to(dtype)
    shifted = x - x.detach().amax(dim, keepdim=True)
    sums = shifted.exp().sum(dim, keepdim=True)
    result = shifted - sums.log() if log else shifted.exp() / sums
    return result.to(input.dtype)


def softmax_backward(grad: Tensor, saved: Tensor, dim: int, log: bool, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """s (g - Σ g s) for the result s, or g - exp(s) Σ g."""
    g, s = grad.to(dtype), saved.to(dtype)
    found = g - s.exp() * g.sum(dim, keepdim=True) if log else s * (g - (g * s).sum(dim, keepdim=True))
    return found.to(saved.dtype)
