"""Cross entropy on plain tensors without zero sizes, whose shapes the ops have checked. An index that is no class gives NaN.

A program has a position: the forward goes once through its classes, online (Milakov and Gimelshein, arXiv:1805.02867), the
backward once more.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .._cross_entropy import CrossEntropies, Positions
from .._tensors import merge
from ._launch import launch
from .elementwise import offset
from .gemm import gemm
from .reduce import column_sum

_MOST, _PIECE = 4096, 1024


@triton.jit
def spread(t, weight, i, inside, base, hard, t_step, INDEX: tl.constexpr, WEIGHTED: tl.constexpr):
    """q_c = w_c ((1 - smoothing) t_c + smoothing / C), of an index without what is added at it."""
    w = tl.load(weight + i, mask=inside, other=0.0) if WEIGHTED else tl.where(inside, 1.0, 0.0)
    if INDEX:
        return w * base
    return w * (hard * tl.load(t + i * t_step, mask=inside, other=0.0).to(tl.float32) + base)


@triton.jit
def forward(
    x,
    t,
    index,
    weight,
    out,
    lse,
    mass_of,
    size,
    x_step,
    t_step,
    shape,  # of the positions
    x_strides,
    t_strides,
    ignore_index,
    base,
    hard,
    INDEX: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SPREAD: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += offset(row, shape, x_strides, DIMS)
    t += offset(row, shape, t_strides, DIMS)
    target = tl.load(index + row) if INDEX else row * 0
    kept = (target != ignore_index) | (not INDEX)
    exists = (target >= 0) & (target < size) | (not INDEX)
    along = tl.arange(0, BLOCK).to(tl.int64)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    mass = tl.full((), 0.0, tl.float32)
    below = tl.full((), 0.0, tl.float32)  # the sum of q (largest - x)
    for first in range(0, tl.where(kept, size, 0), BLOCK):
        i = first + along
        inside = i < size
        v = tl.load(x + i * x_step, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, tl.max(v, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(v - shift), 0)
        if SPREAD:
            q = spread(t, weight, i, inside, base, hard, t_step, INDEX, WEIGHTED)
            # A class of an index's target that has no weight counts for nothing.
            counts = inside & (q != 0) if INDEX else inside
            distance = tl.where(v == float("-inf"), float("inf"), higher - v)
            below += tl.where((mass == 0) | (higher == largest), 0.0, mass * (higher - largest))
            below += tl.sum(tl.where(counts, q * distance, 0.0), 0)
            mass += tl.sum(q, 0)
        largest = higher
    # NaN in a row of -infinity alone; +infinity has made one of the total.
    log_sum = tl.log(tl.where(largest == float("-inf"), float("nan"), total))
    loss = mass * log_sum + below
    if INDEX:
        loss = tl.where(mass == 0, 0.0, loss)
        w = tl.load(weight + target, mask=exists, other=0.0) if WEIGHTED else 1.0
        q = hard * w
        v = tl.load(x + target * x_step, mask=exists, other=0.0).to(tl.float32)
        loss += tl.where(q == 0, 0.0, q * (largest - v + log_sum))
        loss = tl.where(exists, loss, float("nan"))
        loss = tl.where(kept, loss, 0.0)
        mass = tl.where(kept, mass + q, 0.0)
    tl.store(lse + row, tl.where(kept, largest.to(tl.float64) + log_sum.to(tl.float64), 0.0))
    tl.store(mass_of + row, mass.to(tl.float64))
    tl.store(out + row, loss.to(out.dtype.element_ty))


@triton.jit
def backward(
    x,
    t,
    to,
    index,
    weight,
    lse,
    mass_of,
    grad,
    total,
    size,
    x_step,
    t_step,
    to_step,
    shape,
    x_strides,
    t_strides,
    to_strides,
    ignore_index,
    base,
    hard,
    INDEX: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SPREAD: tl.constexpr,
    EACH: tl.constexpr,
    MEAN: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(mass e^(x - lse) - q) grad."""
    row = tl.program_id(0).to(tl.int64)
    x += offset(row, shape, x_strides, DIMS)
    t += offset(row, shape, t_strides, DIMS)
    to += offset(row, shape, to_strides, DIMS)
    target = tl.load(index + row) if INDEX else row * 0
    kept = (target != ignore_index) | (not INDEX)
    g = tl.load(grad + row) if EACH else tl.load(grad)
    if MEAN:
        g = (g.to(tl.float64) / tl.load(total)).to(tl.float32)
    # The logarithm in two parts, so that x - lse is rounded once.
    exact = tl.load(lse + row)
    high = exact.to(tl.float32)
    rest = (exact - high.to(tl.float64)).to(tl.float32)
    mass = tl.load(mass_of + row).to(tl.float32)
    q_at = tl.full((), 0.0, tl.float32)
    if INDEX:
        exists = (target >= 0) & (target < size)
        q_at += hard * (tl.load(weight + target, mask=exists, other=0.0) if WEIGHTED else 1.0)
    along = tl.arange(0, BLOCK).to(tl.int64)
    for first in range(0, size, BLOCK):
        i = first + along
        inside = i < size
        v = tl.load(x + i * x_step, mask=inside & kept, other=0.0).to(tl.float32)
        slope = mass * tl.exp(v - high - rest)
        if SPREAD:
            slope -= spread(t, weight, i, inside, base, hard, t_step, INDEX, WEIGHTED)
        if INDEX:
            slope -= tl.where(i == target, q_at, 0.0)
        result = tl.where(kept, g * slope, 0.0)
        tl.store(to + i * to_step, result.to(to.dtype.element_ty), mask=inside)


@triton.jit
def sum_losses(
    losses,
    index,
    weight,
    out,
    total,
    positions,
    ignore_index,
    INDEX: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """By one program, in order."""
    loss = tl.zeros((BLOCK,), tl.float64)
    weights = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, positions, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < positions
        loss += tl.load(losses + i, mask=inside, other=0.0)
        if INDEX:
            target = tl.load(index + i, mask=inside, other=0)
            inside = inside & (target != ignore_index)
            if WEIGHTED:
                weights += tl.load(weight + target, mask=inside & (target >= 0), other=0.0).to(tl.float64)
            else:
                weights += tl.where(inside, 1.0, 0.0)
        else:
            weights += tl.where(inside, 1.0, 0.0)
    sums = tl.sum(loss, 0)
    every = tl.sum(weights, 0)
    tl.store(total, every)
    tl.store(out, (sums / every if MEAN else sums).to(tl.float32).to(out.dtype.element_ty))


class _Positions(Positions):
    __slots__ = ()

    def _run(self, kernel: Any, x: Tensor, more: tuple[Tensor, ...], others: tuple[Any, ...], **options: Any) -> None:
        """``more``: tensors like x that follow it and the probabilities."""
        tensors = (x, x if self.probabilities is None else self.probabilities, *more)
        size = x.shape[1]
        rests = ((sizes[0], *sizes[2:]) for sizes in (x.shape, *(tensor.stride() for tensor in tensors)))
        shape, strides = merge(*rests)
        block = min(triton.next_power_of_2(size), _MOST)
        launch(
            *(kernel, x.numel() // size, x, *tensors, *others, size, *(tensor.stride(1) for tensor in tensors)),
            *(shape, *strides, self.ignore_index, self.smoothing / size, 1 - self.smoothing),
            INDEX=self.index is not None,
            WEIGHTED=self.weight is not None,
            SPREAD=self.smoothing != 0 or self.index is None,
            DIMS=len(shape),
            BLOCK=block,
            num_warps=4 if block < 2048 else 8,
            **options,
        )

    def _operands(self) -> tuple[Tensor, ...]:
        """The indices and the weights, where there are none any tensor; lse and the masses."""
        lse, mass = self.statistics[:-1].chunk(2)
        index = lse if self.index is None else self.index[self.first :]
        return index, lse if self.weight is None else self.weight, lse[self.first :], mass[self.first :]

    def losses(self, x: Tensor, losses: Tensor | None, out: Tensor | None) -> None:
        index, weight, lse, mass = self._operands()
        self._run(forward, x, (), (index, weight, out if losses is None else losses, lse, mass))

    def gradient(self, x: Tensor, by_x: Tensor, grad: Tensor, each: bool, mean: bool) -> None:
        others = (*self._operands(), grad, self.total())
        self._run(backward, x, (by_x,), others, EACH=each, MEAN=mean)

    def reduce(self, losses: Tensor, mean: bool, out: Tensor) -> None:
        index, weight, *_ = self._operands()
        launch(
            *(sum_losses, 1, losses, losses, index, weight, out, self.total(), losses.numel(), self.ignore_index),
            INDEX=self.index is not None,
            WEIGHTED=self.weight is not None,
            MEAN=mean,
            BLOCK=_PIECE,
        )


_functions = CrossEntropies(_Positions, gemm, column_sum)
cross_entropy = _functions.cross_entropy
cross_entropy_backward = _functions.cross_entropy_backward
linear_cross_entropy = _functions.linear_cross_entropy
