"""Cross entropy on plain CUDA tensors without zero sizes, whose shapes the ops have checked. An index that is no class is
found on the device: an error at the next call that waits for it, as torch's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._cross_entropy import address, operand, result_shape, targets
from ..codes import DTYPE
from . import column_sum, gemm, module, where

#: Of a slice of logits that linear_cross_entropy holds. Each slice adds to the weight's gradient once: it has to be read and
#: written for as much work as makes that cheap.
SLICE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class _Positions:
    """Targets and statistics of positions: of a slice of them where ``first`` and ``count`` say so."""

    probabilities: Tensor | None
    index: Tensor | None
    weight: Tensor | None
    ignore_index: int
    smoothing: float
    statistics: Tensor  # 2 * all of them + 1 numbers
    first: int = 0

    def arguments(self) -> tuple[object, ...]:
        return (
            operand(self.probabilities),
            0 if self.index is None else self.index.data_ptr() + self.first * self.index.element_size(),
            address(self.weight),
            self.ignore_index,
            self.smoothing,
            self.statistics.data_ptr() + self.first * self.statistics.element_size(),
            self.statistics.numel() // 2,
        )

    def total(self) -> Tensor:
        return self.statistics[-1:]

    def losses(self, x: Tensor, losses: Tensor | None, out: Tensor | None) -> None:
        """Those of x, in float64 or in x's dtype, and the statistics."""
        module().cross_entropy(
            x.shape, DTYPE[x.dtype], operand(x), *self.arguments(), address(losses), address(out), **where(x)
        )

    def gradient(self, x: Tensor, by_x: Tensor, grad: Tensor, each: bool, mean: bool) -> None:
        total = address(self.total()) if mean else 0
        module().cross_entropy_backward(
            *(x.shape, DTYPE[x.dtype], operand(x), operand(by_x)),
            *(*self.arguments(), grad.data_ptr(), each, total),
            **where(x),
        )

    def reduce(self, losses: Tensor, mean: bool, out: Tensor) -> None:
        workspace = losses.new_empty(module().loss_sum_workspace(losses.numel()))
        module().loss_sum(
            *(losses.data_ptr(), losses.numel(), address(self.index), address(self.weight), self.ignore_index, mean),
            *(out.data_ptr(), DTYPE[out.dtype], self.total().data_ptr(), workspace.data_ptr()),
            **where(losses),
        )


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, smoothing: float
) -> tuple[Tensor, Tensor]:
    """As backends.cpu.cross_entropy.cross_entropy; what a mean is divided by is not computed where there is none."""
    out = input.new_empty(result_shape(input, reduction))
    positions = input.numel() // input.shape[1]
    statistics = input.new_empty(2 * positions + 1, dtype=torch.float64)
    of = _Positions(*targets(input, target, weight), ignore_index, smoothing, statistics)
    if reduction == "none":
        of.total().zero_()
        of.losses(input, None, out)
        return out, statistics
    losses = statistics.new_empty(positions)
    of.losses(input, losses, None)
    of.reduce(losses, reduction == "mean", out)
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
    of = _Positions(*targets(input, target, weight), ignore_index, smoothing, statistics.contiguous())
    out = input.new_empty(input.shape)
    of.gradient(input, out, grad.to(torch.float32).contiguous(), reduction == "none", reduction == "mean")
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
    """As backends.cpu.cross_entropy.linear_cross_entropy. A slice's logits become their gradient in place, which goes into three
    sums in float32."""
    rows, features = input.shape
    classes = linear_weight.shape[0]
    each = reduction == "none"
    statistics = input.new_empty(2 * rows + 1, dtype=torch.float64)
    losses = statistics.new_empty(rows)
    _, index, weights = targets(input, target, weight)

    def sums(shape: tuple[int, ...], of: int) -> Tensor | None:
        return input.new_empty(shape, dtype=torch.float32) if grad is not None and wanted[of] else None

    by_input, by_weight, by_bias = sums((rows, features), 0), sums((classes, features), 1), sums((classes,), 2)
    # Where the losses are reduced all gradients have one factor, by which the sums are multiplied in the end: before, it
    # would make zeros of many a number of 16 bits.
    slope = None
    if grad is not None:
        slope = grad.to(torch.float32).contiguous() if each else input.new_ones((), dtype=torch.float32)
    step = max(1, SLICE_BYTES // (classes * input.element_size()))
    held = input.new_empty((min(step, rows), classes))
    for first in range(0, rows, step):
        x = input[first : first + step]
        logits = held[: x.shape[0]]
        gemm(x, linear_weight.t(), logits, bias=bias)
        of = _Positions(None, index, weights, ignore_index, smoothing, statistics, first)
        of.losses(logits, losses[first:], None)
        if slope is None:
            continue
        of.gradient(logits, logits, slope[first:] if each else slope, each, False)
        more = {} if first == 0 else {"beta": 1.0}
        if by_input is not None:
            gemm(logits, linear_weight, by_input[first : first + step])
        if by_weight is not None:
            gemm(logits.t(), x, by_weight, residual=by_weight if more else None, **more)
        if by_bias is not None:
            found = column_sum(logits)
            by_bias.add_(found) if more else by_bias.copy_(found)
    out_dtype = torch.float32 if wide else input.dtype
    if each:
        out = losses.to(out_dtype)
    else:
        out = input.new_empty((), dtype=out_dtype)
        of = _Positions(None, index, weights, ignore_index, smoothing, statistics)
        of.reduce(losses, reduction == "mean", out)
    found = [by_input, by_weight, by_bias]
    if grad is None:
        return out, found
    if each:
        return out, [None if g is None else g.to(input.dtype) for g in found]
    factor = grad.to(torch.float64)
    if reduction == "mean":
        factor = factor / of.total()[0]
    factor = factor.to(torch.float32)
    return out, [None if g is None else torch.mul(g, factor, out=_narrow(g, input.dtype)) for g in found]


def _narrow(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the sums go in the end: themselves, or memory of another dtype."""
    return sums if sums.dtype is dtype else torch.empty_like(sums, dtype=dtype)
