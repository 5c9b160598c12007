"""Group norm and its derivatives in plain torch, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cpu.norm import result_format
from .layer_norm import NormalizedRows


class NormalizedGroups:
    """(N, C, ...) as rows (N, groups, C / groups * ...), normalized; everything in ``dtype``."""

    def __init__(self, input: Tensor, groups: int, eps: float, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.shape = input.shape
        self.as_rows = (input.shape[0], groups, -1)
        self.rows = NormalizedRows(input.reshape(self.as_rows), 1, eps, True, dtype)
        self.value = self.rows.value.reshape(self.shape)
        self.axes = [0, *range(2, input.dim())]

    def per_channel(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).reshape(1, -1, *[1] * (len(self.shape) - 2))

    def scale(self, weight: Tensor | None) -> Tensor | float:
        return 1.0 if weight is None else self.per_channel(weight)

    def over_images(self, x: Tensor) -> Tensor:
        """The sum for each channel."""
        return x.sum(self.axes)

    def derivative(self, direction: Tensor) -> Tensor:
        """As NormalizedRows.derivative."""
        return self.rows.derivative(direction.reshape(self.as_rows)).reshape(self.shape)

    def second_derivative(self, a: Tensor, b: Tensor) -> Tensor:
        """As NormalizedRows.second_derivative."""
        a, b = a.reshape(self.as_rows), b.reshape(self.as_rows)
        return self.rows.second_derivative(a, b).reshape(self.shape)


def group_norm(
    input: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """x^ * weight + bias, and the mean and biased variance of each group, (N, groups) in float64."""
    normal = NormalizedGroups(input, groups, eps, dtype)
    out = normal.value * normal.scale(weight)
    if bias is not None:
        out = out + normal.per_channel(bias)
    x = input.reshape(normal.as_rows).to(dtype)
    mean, var = x.mean(-1), x.var(-1, unbiased=False)
    return out.to(input.dtype).contiguous(memory_format=result_format(input)), mean.double(), var.double()


def group_norm_backward(
    grad: Tensor,
    input: Tensor,
    groups: int,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, and of weight and bias in float64."""
    normal = NormalizedGroups(input, groups, eps, dtype)
    g = grad.to(dtype)
    by_input = normal.derivative(normal.scale(weight) * g).to(input.dtype)
    by_input = by_input.contiguous(memory_format=result_format(input))
    return by_input, normal.over_images(g * normal.value).double(), normal.over_images(g).double()
