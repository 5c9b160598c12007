"""Batch normalization on plain CPU tensors without zero sizes, whose shapes the ops have checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _cpu
from ..._layout import suggest_memory_format
from .._running_statistics import update_running as update_running
from . import DTYPE, empty_channels

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def result_format(x: Tensor) -> torch.memory_format:
    """That of torch's batch norm of x: channels-last where x is, else contiguous."""
    if x.dim() not in _LAST or (x.is_contiguous() and not x.is_contiguous(memory_format=_LAST[x.dim()])):
        return torch.contiguous_format
    return suggest_memory_format(x)


def empty_result(x: Tensor) -> Tensor:
    return empty_channels(x.shape, x.dtype, result_format(x) is not torch.contiguous_format)


def operand(x: Tensor | None) -> tuple[Any, ...] | None:
    return None if x is None else (x.data_ptr(), x.stride())


def per_channel(x: Tensor | None) -> tuple[Any, ...] | None:
    return None if x is None else (x.data_ptr(), x.stride(0), DTYPE[x.dtype])


def batch_norm(
    input: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the mean and the biased variance that it was computed with, in float64."""
    out = empty_result(input)
    found_mean = torch.empty_strided((input.shape[1],), (1,), dtype=torch.float64)
    found_var = torch.empty_like(found_mean)
    _cpu.batch_norm(
        input.shape,
        DTYPE[input.dtype],
        operand(input),
        operand(residual),
        operand(out),
        per_channel(weight),
        per_channel(bias),
        per_channel(mean),
        per_channel(var),
        found_mean.data_ptr(),
        found_var.data_ptr(),
        eps,
        relu,
    )
    return out, found_mean, found_var


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of input, weight and bias (in float64), and residual (empty where there was none)."""
    by_input = empty_result(input)
    by_residual = empty_result(input) if residual else input.new_empty(0)
    by_weight = torch.empty_strided((input.shape[1],), (1,), dtype=torch.float64)
    by_bias = torch.empty_strided((input.shape[1],), (1,), dtype=torch.float64)
    _cpu.batch_norm_backward(
        input.shape,
        DTYPE[input.dtype],
        operand(grad),
        operand(input),
        operand(out),
        operand(by_input),
        operand(by_residual) if residual else None,
        per_channel(weight),
        mean.data_ptr(),
        var.data_ptr(),
        by_weight.data_ptr(),
        by_bias.data_ptr(),
        training,
        eps,
    )
    return by_input, by_weight, by_bias, by_residual
