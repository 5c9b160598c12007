"""The formulas in plain torch: what every kernel is measured against.

Each function computes in ``dtype`` (float64 unless told) and rounds once, to the dtype of its first argument, unless
``keep=True`` asks for the unrounded result. All are differentiable, and none calls the torch function it stands for,
other than ``torch.matmul`` in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _finish(result: Tensor, like: Tensor, keep: bool) -> Tensor:
    return result if keep else result.to(like.dtype)


def matmul(a: Tensor, b: Tensor, *, dtype: torch.dtype = torch.float64, keep: bool = False) -> Tensor:
    """a @ b, with torch.matmul's rules for shapes."""
    return _finish(torch.matmul(a.to(dtype), b.to(dtype)), a, keep)


def addmm(
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    dtype: torch.dtype = torch.float64,
    keep: bool = False,
) -> Tensor:
    """beta * input + alpha * (mat1 @ mat2), with any batch dimensions. ``input`` is not read where beta is 0."""
    product = torch.matmul(mat1.to(dtype), mat2.to(dtype))
    result = alpha * product
    if beta != 0:
        result = result + beta * input.to(dtype)
    return _finish(result, mat1, keep)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    *,
    dtype: torch.dtype = torch.float64,
    keep: bool = False,
) -> Tensor:
    """activation(input @ weight.T + bias)."""
    result = torch.matmul(input.to(dtype), weight.to(dtype).t())
    if bias is not None:
        result = result + bias.to(dtype)
    return _finish(_activate(result, activation), input, keep)


def bilinear(
    input1: Tensor,
    input2: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    keep: bool = False,
) -> Tensor:
    """out[..., o] = sum over i, j of input1[..., i] * weight[o, i, j] * input2[..., j], plus bias[o]."""
    result = torch.einsum("...i,oij,...j->...o", input1.to(dtype), weight.to(dtype), input2.to(dtype))
    if bias is not None:
        result = result + bias.to(dtype)
    return _finish(result, input1, keep)


def activation(kind: str, input: Tensor, *, dtype: torch.dtype = torch.float64, keep: bool = False) -> Tensor:
    return _finish(_activate(input.to(dtype), kind), input, keep)


def int_mm(
    a: Tensor,
    b: Tensor,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """row_scale * col_scale * (a @ b) + bias; int64 without scales and bias, else float64."""
    result = torch.matmul(a.long(), b.long())
    if row_scale is None and col_scale is None and bias is None:
        return result
    result = result.double()
    if row_scale is not None:
        result = result * row_scale.double().unsqueeze(-1)
    if col_scale is not None:
        result = result * col_scale.double()
    if bias is not None:
        result = result + bias.double()
    return result


def _activate(x: Tensor, kind: str) -> Tensor:
    if kind == "none":
        return x
    if kind == "relu":
        # where() keeps NaN, as torch.relu does, and gives 0 the gradient 0.
        return torch.where(x <= 0, torch.zeros_like(x), x)
    if kind == "relu6":
        return torch.where(x <= 0, torch.zeros_like(x), torch.where(x >= 6, torch.full_like(x, 6), x))
    if kind == "gelu":
        # Hendrycks and Gimpel, Gaussian Error Linear Units (2016): x * P(X <= x), X ~ N(0, 1). erfc keeps the tail.
        return x * 0.5 * torch.erfc(-x * math.sqrt(0.5))
    if kind == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return 0.5 * x * (1 + torch.tanh(inner))
    if kind == "silu":
        return x / (1 + torch.exp(-x))
    if kind == "sigmoid":
        return 1 / (1 + torch.exp(-x))
    if kind == "tanh":
        return torch.tanh(x)
    raise ValueError(f"activation: unknown kind {kind!r}")
