"""Group norm on plain CPU tensors without zero sizes, whose shapes the ops have checked."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _cpu
from . import DTYPE
from .norm import empty_result, operand, per_channel


def group_norm(
    input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the mean and the biased variance of each group, (N, groups) in float64."""
    out = empty_result(input)
    mean = torch.empty((input.shape[0], groups), dtype=torch.float64)
    var = torch.empty_like(mean)
    _cpu.group_norm(
        input.shape,
        DTYPE[input.dtype],
        groups,
        operand(input),
        operand(out),
        per_channel(weight),
        per_channel(bias),
        mean.data_ptr(),
        var.data_ptr(),
        eps,
    )
    return out, mean, var


def group_norm_backward(
    grad: Tensor, input: Tensor, groups: int, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, and of weight and bias in float64."""
    by_input = empty_result(input)
    by_weight = torch.empty(input.shape[1], dtype=torch.float64)
    by_bias = torch.empty_like(by_weight)
    mean, var = mean.contiguous(), var.contiguous()
    _cpu.group_norm_backward(
        input.shape,
        DTYPE[input.dtype],
        groups,
        operand(grad),
        operand(input),
        operand(by_input),
        per_channel(weight),
        mean.data_ptr(),
        var.data_ptr(),
        by_weight.data_ptr(),
        by_bias.data_ptr(),
        eps,
    )
    return by_input, by_weight, by_bias
