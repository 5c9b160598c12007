"""Group norm on plain tensors without zero sizes, whose shapes the ops have checked: norm.py's kernels, of images."""

from __future__ import annotations

from torch import Tensor

from .norm import backward, forward


def group_norm(
    input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the mean and the biased variance of each group, (N, groups) in float64."""
    out, mean, var = forward(True, groups, input, None, (None, None), weight, bias, eps, False)
    return out, mean.view(-1, groups), var.view(-1, groups)


def group_norm_backward(
    grad: Tensor, input: Tensor, groups: int, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, and of weight and bias in float64."""
    return backward(True, groups, grad, input, None, weight, mean, var, True, eps, False)[:3]
