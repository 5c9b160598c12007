"""Layer norm, rms norm and their derivatives in plain torch, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._layout import suggest_memory_format


class NormalizedRows:
    """x^ = (input - mean) / sqrt(var + eps) over the last ``dims`` dimensions, and what its derivatives are made of.

    Where it is not ``centered``, mean is 0 and var the mean of the squares. Everything is in ``dtype``.
    """

    def __init__(self, input: Tensor, dims: int, eps: float, centered: bool, dtype: torch.dtype) -> None:
        x = input.to(dtype)
        self.dtype = dtype
        self.centered = centered
        self.axes = list(range(x.dim() - dims, x.dim()))
        self.lead = list(range(x.dim() - dims))
        if centered:
            x = x - self.mean(x)
        self.inverse_deviation = (self.mean(x * x) + eps).rsqrt()
        self.value = x * self.inverse_deviation

    def mean(self, x: Tensor) -> Tensor:
        """Of each row."""
        return x.mean(self.axes, keepdim=True)

    def over_rows(self, x: Tensor) -> Tensor:
        """The sum of all rows."""
        return x.sum(self.lead) if self.lead else x

    def derivative(self, direction: Tensor) -> Tensor:
        """Of x^ by the input, times ``direction`` on either side: it is symmetric."""
        along = self.value * self.mean(direction * self.value)
        if self.centered:
            direction = direction - self.mean(direction)
        return self.inverse_deviation * (direction - along)

    def second_derivative(self, a: Tensor, b: Tensor) -> Tensor:
        """The gradient by the input of the sum, over everything, of a times derivative(b).

        With r = 1 / sqrt(var + eps), which changes with the input by -r² x^ / n.
        """
        r, x = self.inverse_deviation, self.value
        a_x, b_x = self.mean(a * x), self.mean(b * x)
        left = self.mean(a * b) - a_x * b_x
        if self.centered:
            left = left - self.mean(a) * self.mean(b)
        return -r * (r * x * left + self.derivative(a) * b_x + self.derivative(b) * a_x)


def row_norm(
    input: Tensor,
    dims: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """x^ * weight + bias."""
    out = NormalizedRows(input, dims, eps, centered, dtype).value
    if weight is not None:
        out = out * weight.to(dtype)
    if bias is not None:
        out = out + bias.to(dtype)
    return _laid_out(out.to(input.dtype), input, centered)


def _laid_out(result: Tensor, input: Tensor, centered: bool) -> Tensor:
    """Contiguous; but rms norm keeps its input's channels-last."""
    if centered or suggest_memory_format(input) is torch.contiguous_format:
        return result.contiguous()
    return result


def row_norm_backward(
    grad: Tensor,
    input: Tensor,
    dims: int,
    weight: Tensor | None,
    eps: float,
    centered: bool,
    bias: bool,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, and of weight and bias in float64 (empty where there is none)."""
    rows = NormalizedRows(input, dims, eps, centered, dtype)
    g = grad.to(dtype)
    by_input = rows.derivative(g if weight is None else g * weight.to(dtype)).to(input.dtype)
    none = input.new_empty(0, dtype=torch.float64)
    by_weight = none if weight is None else rows.over_rows(g * rows.value).double()
    by_bias = rows.over_rows(g).double() if bias else none.clone()
    return _laid_out(by_input, input, centered), by_weight, by_bias
