"""Batch normalization and its derivatives in plain torch, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor


class Normalized:
    """x^ = (input - mean) / sqrt(var + eps), and what its derivatives are made of.

    mean and var of shape (C), or None: then they are those of the input, and depend on it. Everything is in ``dtype``.
    """

    def __init__(
        self,
        input: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> None:
        x = input.to(dtype)
        self.dtype = dtype
        self.axes = [0, *range(2, x.dim())]
        self.of_input = mean is None
        if mean is None:
            self.mean = x.mean(self.axes, keepdim=True)
            centered = x - self.mean
            self.var = (centered * centered).mean(self.axes, keepdim=True)
        else:
            self.mean, self.var = self.per_channel(mean), self.per_channel(var)
            centered = x - self.mean
        self.inverse_deviation = (self.var + eps).rsqrt()
        self.value = centered * self.inverse_deviation

    def per_channel(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).reshape(1, -1, *[1] * (len(self.axes) - 1))

    def scale(self, weight: Tensor | None) -> Tensor | float:
        return 1.0 if weight is None else self.per_channel(weight)

    def sum(self, x: Tensor) -> Tensor:
        """Over all but the channels."""
        return x.sum(self.axes, keepdim=True)

    def derivative(self, direction: Tensor) -> Tensor:
        """Of x^ by the input, times ``direction`` on either side: it is symmetric."""
        if not self.of_input:
            return self.inverse_deviation * direction
        n = self.value.numel() / self.value.shape[1]
        along = self.value * (self.sum(direction * self.value) / n)
        return self.inverse_deviation * (direction - self.sum(direction) / n - along)


def relu_gradient(grad: Tensor, out: Tensor | None) -> Tensor:
    return grad if out is None else torch.where(out <= 0, torch.zeros_like(grad), grad)


def batch_norm(
    input: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(x^ * weight + bias + residual), and the mean and biased variance used, in float64."""
    normal = Normalized(input, mean, var, eps, dtype)
    out = normal.value * normal.scale(weight)
    if bias is not None:
        out = out + normal.per_channel(bias)
    if residual is not None:
        out = out + residual.to(dtype)
    if relu:
        out = torch.where(out <= 0, torch.zeros_like(out), out)
    return out.to(input.dtype), normal.mean.reshape(-1).double(), normal.var.reshape(-1).double()


def batch_norm_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    out: Tensor | None,
    training: bool,
    eps: float,
    residual: bool,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of input, weight and bias (in float64), and residual (empty where there was none)."""
    normal = Normalized(input, None if training else mean, None if training else var, eps, dtype)
    g = relu_gradient(grad.to(dtype), out)
    by_input = normal.scale(weight) * normal.derivative(g)
    by_weight, by_bias = normal.sum(g * normal.value), normal.sum(g)
    by_residual = g.to(input.dtype) if residual else input.new_empty(0)
    return by_input.to(input.dtype), by_weight.reshape(-1).double(), by_bias.reshape(-1).double(), by_residual
