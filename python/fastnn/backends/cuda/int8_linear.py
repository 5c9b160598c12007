"""The int8 linear layer on plain CUDA tensors, whose arguments the ops have checked."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda
from .._int8_linear import Int8Linears, Rows
from .._quantize import SCHEME, address
from ..codes import ACTIVATION, DTYPE


class _Layers(Int8Linears):
    def quantize(self, input: Tensor, rows: Rows) -> None:
        kernels = cuda.module()
        (kernels.quantize_dynamic if rows.each else kernels.quantize)(
            input.data_ptr(),
            rows.q.data_ptr(),
            rows.scale.data_ptr(),
            rows.zero_point.data_ptr(),
            tuple(input.shape),
            input.stride(),
            rows.q.stride(),
            (int(rows.each), 0),
            rows.scale.numel(),
            DTYPE[input.dtype],
            SCHEME["uint8"],
            0,
            **cuda.where(input),
        )

    def sums_itself(self, rows: Rows, weight: Tensor) -> bool:
        m, width = rows.q.shape
        return cuda.module().int8_few_rows(
            rows.q.data_ptr(), m, weight.shape[1], width, weight.data_ptr(), *weight.stride()
        )

    def row_sums(self, weight: Tensor) -> Tensor:
        sums = weight.new_empty(weight.shape[0], dtype=torch.int32)
        cuda.module().int8_row_sums(
            weight.data_ptr(), *weight.shape, *weight.stride(), sums.data_ptr(), **cuda.where(weight)
        )
        return sums

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
        (m, width), (n, k) = rows.q.shape, weight.shape
        cuda.module().int8_linear(
            rows.q.data_ptr(),
            m,
            k,
            width,
            rows.scale.data_ptr(),
            rows.zero_point.data_ptr(),
            rows.each,
            weight.data_ptr(),
            n,
            *weight.stride(),
            address(sums),
            weight_scale.data_ptr(),
            weight_scale.numel() == 1,
            address(bias),
            DTYPE[torch.float32 if bias is None else bias.dtype],
            ACTIVATION[activation],
            out.data_ptr(),
            DTYPE[out.dtype],
            **cuda.where(out),
        )


_layers = _Layers()
int8_linear = _layers.int8_linear
packed_size = _layers.packed_size
pack = _layers.pack
