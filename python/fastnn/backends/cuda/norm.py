"""Batch normalization on plain CUDA tensors without zero sizes, whose shapes the ops have checked."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from .._matmul import MAX_DIMS
from ..codes import DTYPE
from ..cpu.norm import result_format
from . import module, where


def empty_result(x: Tensor) -> Tensor:
    """With the strides of torch's result for x."""
    return torch.empty_like(x, memory_format=result_format(x))


def operands(of_images: bool, *tensors: Tensor | None) -> tuple[torch.Size, tuple[Any, ...], list[Tensor | None]]:
    """The shape, (address, strides) of each tensor as the kernels take them, and what holds the memory meanwhile.

    Where the places of a tensor do not follow each other it is copied: to lie as the last one but one, which is a result.
    ``of_images``: whether statistics are of an image, and not of all.
    """
    result = tensors[-2]
    shape = result.shape
    first = 2 if of_images or shape[1] == 1 or result.stride(1) != 1 else 0
    kept = [x if x is None or _follow(x, first) else torch.empty_like(result).copy_(x) for x in tensors]
    if len(shape) > MAX_DIMS:
        shape = torch.Size((*shape[:2], math.prod(shape[2:])))
        kept = [None if x is None else x.view(shape) for x in kept]
    return shape, tuple(None if x is None else (x.data_ptr(), x.stride()) for x in kept), kept


def _follow(x: Tensor, first: int) -> bool:
    """Whether the dimensions from ``first`` on, without the channels, are as good as one."""
    axes = [d for d in range(first, x.dim()) if d != 1 and x.shape[d] != 1]
    return all(x.stride(a) == x.stride(b) * x.shape[b] for a, b in itertools.pairwise(axes))


def per_channel(x: Tensor | None) -> tuple[Any, ...] | None:
    return None if x is None else (x.data_ptr(), x.stride(0), DTYPE[x.dtype])


class Workspace:
    """Memory of as many bytes as a kernel asks for, on the device of a tensor."""

    def __init__(self, on: Tensor) -> None:
        self._on = on

    def __call__(self, size: int) -> int:
        self._memory = self._on.new_empty(size // 8, dtype=torch.float64)
        return self._memory.data_ptr()


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
    found_mean = input.new_empty(input.shape[1], dtype=torch.float64)
    found_var = torch.empty_like(found_mean)
    shape, lie, _keep = operands(False, input, residual, out, None)
    module().norm(
        shape,
        DTYPE[input.dtype],
        0,
        lie,
        *(per_channel(x) for x in (weight, bias, mean, var)),
        found_mean.data_ptr(),
        found_var.data_ptr(),
        eps,
        relu,
        Workspace(input),
        **where(input),
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
    by_weight = input.new_empty(input.shape[1], dtype=torch.float64)
    by_bias = torch.empty_like(by_weight)
    mean, var = mean.contiguous(), var.contiguous()
    shape, lie, _keep = operands(False, grad, input, out, by_input, by_residual if residual else None)
    module().norm_backward(
        shape,
        DTYPE[input.dtype],
        0,
        lie,
        per_channel(weight),
        *(x.data_ptr() for x in (mean, var, by_weight, by_bias)),
        training,
        eps,
        Workspace(input),
        **where(input),
    )
    return by_input, by_weight, by_bias, by_residual


def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, factor: float, momentum: float
) -> None:
    """running = (1 - momentum) * running + momentum * statistic of both, of float64 statistics, the variance times
    ``factor``."""
    module().update_running(
        per_channel(running_mean),
        per_channel(running_var),
        running_mean.shape[0],
        mean.data_ptr(),
        var.data_ptr(),
        factor,
        momentum,
        **where(mean),
    )
    # What autograd has saved it knows to be changed.
    for running in (running_mean, running_var):
        if not running.is_inference():
            torch.autograd.graph.increment_version(running)
