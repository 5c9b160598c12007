"""Cross entropy on plain CUDA tensors without zero sizes, whose shapes the ops have checked. An index that is no class is
found on the device: an error at the next call that waits for it, as torch's."""

from __future__ import annotations

from torch import Tensor

from .._cross_entropy import CrossEntropies, Positions, address, operand
from ..codes import DTYPE
from . import column_sum, gemm, module, where


class _Positions(Positions):
    __slots__ = ()

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

    def losses(self, x: Tensor, losses: Tensor | None, out: Tensor | None) -> None:
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


_functions = CrossEntropies(_Positions, gemm, column_sum)
cross_entropy = _functions.cross_entropy
cross_entropy_backward = _functions.cross_entropy_backward
linear_cross_entropy = _functions.linear_cross_entropy
