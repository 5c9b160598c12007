"""Cross entropy and its gradient in plain torch, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor


class Weighted:
    """q, the weights of every position's classes, and what the loss is made of: Σ q (lse - x).

    input (N, C, ...); q_c = w_c ((1 - smoothing) t_c + smoothing / C), with t the target's probabilities or 1 at its index,
    and 0 for all classes of a position whose index is ``ignore_index``. Everything is in ``dtype``.
    """

    def __init__(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        smoothing: float,
        dtype: torch.dtype,
    ) -> None:
        self.x = input.to(dtype)
        classes = input.shape[1]
        self.w = torch.ones((), dtype=dtype, device=input.device)
        if weight is not None:
            self.w = weight.to(dtype).view(1, -1, *[1] * (input.dim() - 2))
        self.hard = (1 - smoothing) * self.w
        if target.is_floating_point():
            kept = None
            t = target.to(dtype)
            total = float(input.numel() // classes)
        else:
            index = target.to(torch.int64)
            kept = index != ignore_index
            index = torch.where(kept, index, torch.zeros_like(index)).unsqueeze(1)
            t = (torch.arange(classes, device=index.device).view(1, -1, *[1] * (input.dim() - 2)) == index).to(dtype)
            kept = kept.unsqueeze(1)
            total = (t * self.w).masked_fill(~kept, 0).sum()
        self.q = self.hard * t + (smoothing / classes) * self.w
        if kept is not None:
            self.q = self.q.masked_fill(~kept, 0)
        self.kept = kept
        self.mass = self.q.sum(1, keepdim=True)
        self.reduction = reduction
        self.total = total

    def lse(self) -> Tensor:
        return self.x.logsumexp(1, keepdim=True)

    def losses(self) -> Tensor:
        """One a position."""
        below = self.q * (self.lse() - self.x)
        # A class without weight whose logit is -inf counts for nothing where its target is an index.
        if self.kept is not None:
            below = torch.where(self.q == 0, torch.zeros_like(below), below)
        return below.sum(1)

    def reduced(self, losses: Tensor) -> Tensor:
        if self.reduction == "none":
            return losses
        return losses.sum() if self.reduction == "sum" else losses.sum() / self.total

    def per_position(self, grad: Tensor) -> Tensor:
        """The gradient by each position's loss, of shape (N, 1, ...) or ()."""
        g = grad.to(self.x.dtype)
        if self.reduction == "none":
            return g.unsqueeze(1)
        return g if self.reduction == "sum" else g / self.total


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The losses, and in float64 the log-sum-exp and the sum of the weights of every position and what a mean is divided
    by."""
    of = Weighted(input, target, weight, ignore_index, reduction, smoothing, dtype)
    total = torch.as_tensor(of.total, dtype=torch.float64).reshape(1)
    statistics = torch.cat([of.lse().double().flatten(), of.mass.expand_as(of.lse()).double().flatten(), total])
    return of.reduced(of.losses()).to(input.dtype), statistics.detach()


def cross_entropy_backward(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """r (mass softmax(x) - q), with r the gradient by the position's loss."""
    of = Weighted(input, target, weight, ignore_index, reduction, smoothing, dtype)
    return (of.per_position(grad) * (of.mass * of.x.softmax(1) - of.q)).to(input.dtype).contiguous()


def by_probabilities(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient by the target's probabilities: r (1 - smoothing) w (lse - x)."""
    of = Weighted(input, target, weight, ignore_index, reduction, smoothing, dtype)
    return (of.per_position(grad) * of.hard * (of.lse() - of.x)).to(target.dtype)
