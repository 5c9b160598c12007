"""Cross entropy on plain CPU tensors without zero sizes, whose shapes the ops have checked."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _cpu, _state
from .._cross_entropy import REDUCTION, address, operand, result_shape, targets
from .._cross_entropy import wide as wide_dtype
from . import DTYPE, empty, precision


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, smoothing: float
) -> tuple[Tensor, Tensor]:
    """input (N, C, ...); the losses, and in float64 the log-sum-exp and the sum of the weights of every position and what a
    mean is divided by."""
    probabilities, index, weights = targets(input, target, weight)
    out = torch.empty(result_shape(input, reduction), dtype=input.dtype)
    positions = input.numel() // input.shape[1]
    statistics = torch.empty(2 * positions + 1, dtype=torch.float64)
    _cpu.cross_entropy(
        input.shape,
        DTYPE[input.dtype],
        operand(input),
        operand(probabilities),
        address(index),
        address(weights),
        ignore_index,
        smoothing,
        REDUCTION[reduction],
        out.data_ptr(),
        statistics.data_ptr(),
    )
    return out, statistics


def cross_entropy_backward(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    ignore_index: int,
    reduction: str,
    smoothing: float,
) -> Tensor:
    """The gradient by the input; contiguous."""
    probabilities, index, weights = targets(input, target, weight)
    wide = grad.to(torch.float64).contiguous()
    statistics = statistics.contiguous()
    out = empty(input.shape, input.dtype)
    _cpu.cross_entropy_backward(
        input.shape,
        DTYPE[input.dtype],
        operand(input),
        operand(probabilities),
        address(index),
        address(weights),
        ignore_index,
        smoothing,
        REDUCTION[reduction],
        statistics.data_ptr(),
        wide.data_ptr(),
        operand(out),
    )
    return out


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    wide: bool = False,
    *,
    grad: Tensor | None = None,
    wanted: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[Tensor, list[Tensor | None]]:
    """input (N, K), linear_weight (C, K), bias (C), target (N) of indices: the losses, in float32 if ``wide``; and,
    where ``grad``, the gradient by them, is given, those gradients by input, linear_weight and bias that are
    ``wanted``."""
    dtype, sums = input.dtype, wide_dtype(input.dtype)
    result = torch.float32 if wide else dtype
    _, index, weights = targets(input, target, weight)
    rows, features = input.shape
    classes = linear_weight.shape[0]
    out = torch.empty((rows,) if reduction == "none" else (), dtype=result)
    by_input = empty((rows, features), sums) if wanted[0] else None
    by_weight = empty((classes, features), sums) if wanted[1] else None
    by_bias = empty((classes,), sums) if wanted[2] else None
    scale = None if grad is None else grad.to(torch.float64).contiguous()
    _cpu.linear_cross_entropy(
        (rows, classes, features),
        DTYPE[dtype],
        operand(input),
        operand(linear_weight),
        None if bias is None else (bias.data_ptr(), bias.stride(0)),
        address(index),
        address(weights),
        ignore_index,
        smoothing,
        REDUCTION[reduction],
        precision(dtype),
        _state.settings().batch_invariant,
        out.data_ptr(),
        DTYPE[result],
        address(scale),
        address(by_input),
        address(by_weight),
        address(by_bias),
    )
    # Sums are kept in float32 where the dtype is narrower.
    found = [None if g is None else g.to(dtype) for g in (by_input, by_weight, by_bias)]
    return out, found
