"""Group norm on plain CUDA tensors without zero sizes, whose shapes the ops have checked."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codes import DTYPE
from . import module, where
from .norm import Workspace, empty_result, operands, per_channel


def group_norm(
    input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the mean and the biased variance of each group, (N, groups) in float64."""
    out = empty_result(input)
    mean = input.new_empty((input.shape[0], groups), dtype=torch.float64)
    var = torch.empty_like(mean)
    shape, lie, _keep = operands(True, input, None, out, None)
    module().norm(
        shape,
        DTYPE[input.dtype],
        groups,
        lie,
        per_channel(weight),
        per_channel(bias),
        None,
        None,
        mean.data_ptr(),
        var.data_ptr(),
        eps,
        False,
        Workspace(input),
        **where(input),
    )
    return out, mean, var


def group_norm_backward(
    grad: Tensor, input: Tensor, groups: int, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, and of weight and bias in float64."""
    by_input = empty_result(input)
    by_weight = input.new_empty(input.shape[1], dtype=torch.float64)
    by_bias = torch.empty_like(by_weight)
    mean, var = mean.contiguous(), var.contiguous()
    shape, lie, _keep = operands(True, grad, input, None, by_input, None)
    module().norm_backward(
        shape,
        DTYPE[input.dtype],
        groups,
        lie,
        per_channel(weight),
        *(x.data_ptr() for x in (mean, var, by_weight, by_bias)),
        True,
        eps,
        Workspace(input),
        **where(input),
    )
    return by_input, by_weight, by_bias
