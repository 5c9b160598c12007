"""What the cross entropies of CPUs and GPUs have in common."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: The codes of the kernels.
REDUCTION = {"none": 0, "mean": 1, "sum": 2}


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def targets(x: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The probabilities or the indices as the kernels read them, and the weights."""
    weights = None if weight is None else weight.to(wide(x.dtype)).contiguous()
    if target.is_floating_point():
        return target, None, weights
    return None, target.to(torch.int64).contiguous(), weights


def result_shape(x: Tensor, reduction: str) -> tuple[int, ...]:
    return (x.shape[0], *x.shape[2:]) if reduction == "none" else ()


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def operand(x: Tensor | None) -> tuple[int, tuple[int, ...]] | None:
    return None if x is None else (x.data_ptr(), x.stride())


# ---- the kernels of GPUs -----------------------------------------------------------------------------------------

#: Of a slice of logits that linear_cross_entropy holds. Each slice adds to the weight's gradient once: it has to be read and
#: written for as much work as makes that cheap.
SLICE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Positions(abc.ABC):
    """Targets and statistics of positions: of those from ``first`` on, as many as the tensors that a method is given have."""

    probabilities: Tensor | None
    index: Tensor | None
    weight: Tensor | None
    ignore_index: int
    smoothing: float
    statistics: Tensor  # 2 * all of them + 1 numbers
    first: int = 0

    def total(self) -> Tensor:
        return self.statistics[-1:]

    @abc.abstractmethod
    def losses(self, x: Tensor, losses: Tensor | None, out: Tensor | None) -> None:
        """Writes those of x (N, C, ...), in float64 or in x's dtype, and the statistics but the total."""

    @abc.abstractmethod
    def gradient(self, x: Tensor, by_x: Tensor, grad: Tensor, each: bool, mean: bool) -> None:
        """Writes that by x, to by_x, which may be x: times float32 grad, a number for ``each`` position or one, over the total
        for a mean."""

    @abc.abstractmethod
    def reduce(self, losses: Tensor, mean: bool, out: Tensor) -> None:
        """Writes the total, and the sum of float64 losses, over it for a mean."""


class CrossEntropies:
    """The functions of a GPU's kernels, as those of backends.cpu.cross_entropy."""

    def __init__(
        self, positions: type[Positions], gemm: Callable[..., None], column_sum: Callable[[Tensor], Tensor]
    ) -> None:
        self._positions, self._gemm, self._column_sum = positions, gemm, column_sum

    def cross_entropy(
        self, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        """As backends.cpu.cross_entropy.cross_entropy; what a mean is divided by is not computed where there is none."""
        out = input.new_empty(result_shape(input, reduction))
        positions = input.numel() // input.shape[1]
        statistics = input.new_empty(2 * positions + 1, dtype=torch.float64)
        of = self._positions(*targets(input, target, weight), ignore_index, smoothing, statistics)
        if reduction == "none":
            of.total().zero_()
            of.losses(input, None, out)
            return out, statistics
        losses = statistics.new_empty(positions)
        of.losses(input, losses, None)
        of.reduce(losses, reduction == "mean", out)
        return out, statistics

    def cross_entropy_backward(
        self,
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
        of = self._positions(*targets(input, target, weight), ignore_index, smoothing, statistics.contiguous())
        out = input.new_empty(input.shape)
        of.gradient(input, out, grad.to(torch.float32).contiguous(), reduction == "none", reduction == "mean")
        return out

    def linear_cross_entropy(
        self,
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
        """As backends.cpu.cross_entropy.linear_cross_entropy. A slice's logits become their gradient in place, which
        goes into three sums in float32."""
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
            self._gemm(x, linear_weight.t(), logits, bias=bias)
            of = self._positions(None, index, weights, ignore_index, smoothing, statistics, first)
            of.losses(logits, losses[first:], None)
            if slope is None:
                continue
            of.gradient(logits, logits, slope[first:] if each else slope, each, False)
            more = {} if first == 0 else {"beta": 1.0}
            if by_input is not None:
                self._gemm(logits, linear_weight, by_input[first : first + step])
            if by_weight is not None:
                self._gemm(logits.t(), x, by_weight, residual=by_weight if more else None, **more)
            if by_bias is not None:
                found = self._column_sum(logits)
                by_bias.add_(found) if more else by_bias.copy_(found)
        out_dtype = torch.float32 if wide else input.dtype
        if each:
            out = losses.to(out_dtype)
        else:
            out = input.new_empty((), dtype=out_dtype)
            of = self._positions(None, index, weights, ignore_index, smoothing, statistics)
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
