"""What the int8 linear layers of GPUs have in common; the values of scales and zero points are not looked at, as that
would mean to wait for them."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from .reference.int8_linear import static_scheme

#: Bytes that are copied at a time: rows of the quantized input begin at multiples of it.
_PIECE = 16
_SUM_BYTES = 4


@dataclass(frozen=True, slots=True)
class Rows:
    """The input's rows quantized: ``q`` (M, K rounded up), and one scale and zero point for all or for ``each`` row."""

    q: Tensor
    scale: Tensor
    zero_point: Tensor
    each: bool


class Int8Linears(abc.ABC):
    """The functions of a GPU's kernels, as those of backends.cpu.int8_linear.

    All that is kept of a weight for other calls, beside the weight itself, are the sums of its rows.
    """

    @abc.abstractmethod
    def quantize(self, input: Tensor, rows: Rows) -> None:
        """Writes the codes of input (M, K), and the scales and zero points where each row has its own. What is behind K is not
        read."""

    @abc.abstractmethod
    def sums_itself(self, rows: Rows, weight: Tensor) -> bool:
        """Whether the product needs no sums of the weight's rows."""

    @abc.abstractmethod
    def row_sums(self, weight: Tensor) -> Tensor:
        """(N), int32"""

    @abc.abstractmethod
    def multiply(
        self,
        rows: Rows,
        weight: Tensor,
        sums: Tensor | None,
        weight_scale: Tensor,
        bias: Tensor | None,
        activation: str,
        out: Tensor,
    ) -> None:
        """Writes out, (..., N) contiguous, which has an element. ``sums`` is contiguous, and either int32 or their bytes;
        float32 ``weight_scale`` and ``bias`` are contiguous."""

    def int8_linear(
        self,
        input: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        input_scale: Tensor | None,
        input_zero_point: Tensor | None,
        activation: str,
        packed: Tensor | None,
    ) -> Tensor:
        """As backends.cpu.int8_linear.int8_linear. ``packed`` that is not from here is not looked at."""
        n, k = weight.shape
        out = input.new_empty((*input.shape[:-1], n))
        if out.numel() == 0:
            return out
        m = out.numel() // n
        q = input.new_empty((m, -(-k // _PIECE) * _PIECE), dtype=torch.uint8)
        each = input_scale is None
        if each:
            scale = input.new_empty(m, dtype=torch.float32)
            zero_point = input.new_empty(m, dtype=torch.int32)
        else:
            scale, zero_point = static_scheme(input_scale, input_zero_point)
            zero_point = zero_point.to(torch.int32)
        rows = Rows(q, scale, zero_point, each)
        self.quantize(input.reshape(m, k), rows)
        sums = None
        if not self.sums_itself(rows, weight):
            made_here = packed is not None and packed.numel() == _SUM_BYTES * n and packed.is_contiguous()
            sums = packed if made_here and packed.data_ptr() % _SUM_BYTES == 0 else self.row_sums(weight)
        weight_scale = weight_scale.to(torch.float32).contiguous()
        bias = None if bias is None else bias.contiguous()
        self.multiply(rows, weight, sums, weight_scale, bias, activation, out)
        return out

    def packed_size(self, weight: Tensor) -> int:
        return _SUM_BYTES * weight.shape[0]

    def pack(self, weight: Tensor) -> Tensor:
        """The sums of the weight's rows, as bytes."""
        return self.row_sums(weight).view(torch.uint8)
