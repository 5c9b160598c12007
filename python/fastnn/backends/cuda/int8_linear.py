"""The int8 linear layer on plain CUDA tensors, whose arguments the ops have checked; the values of scales and zero points are
not looked at, as that would mean to wait for them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda
from .._quantize import SCHEME, address
from ..codes import ACTIVATION, DTYPE
from ..reference.int8_linear import static_scheme

_PIECE = 16


def int8_linear(
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
    kernels, where = cuda.module(), cuda.where(input)
    n, k = weight.shape
    out = input.new_empty((*input.shape[:-1], n))
    if out.numel() == 0:
        return out
    rows = input.reshape(out.numel() // n, k)
    m = rows.shape[0]
    width = -(-k // _PIECE) * _PIECE  # so that rows are copied in pieces
    q = input.new_empty((m, width), dtype=torch.uint8)
    each = input_scale is None
    if each:
        scale = input.new_empty(m, dtype=torch.float32)
        zero_point = input.new_empty(m, dtype=torch.int32)
    else:
        scale, zero_point = static_scheme(input_scale, input_zero_point)
        zero_point = zero_point.to(torch.int32)
    (kernels.quantize_dynamic if each else kernels.quantize)(
        rows.data_ptr(),
        q.data_ptr(),
        scale.data_ptr(),
        zero_point.data_ptr(),
        (m, k),
        rows.stride(),
        q.stride(),
        (int(each), 0),
        scale.numel(),
        DTYPE[input.dtype],
        SCHEME["uint8"],
        0,
        **where,
    )
    lies = (weight.data_ptr(), *weight.stride())
    sums = None
    if not kernels.int8_few_rows(q.data_ptr(), m, k, width, *lies):
        made_here = packed is not None and packed.numel() == 4 * n and packed.is_contiguous()
        sums = packed if made_here and packed.data_ptr() % 4 == 0 else pack(weight)
    weight_scale = weight_scale.to(torch.float32).contiguous()
    bias = None if bias is None else bias.contiguous()
    kernels.int8_linear(
        q.data_ptr(),
        m,
        k,
        width,
        scale.data_ptr(),
        zero_point.data_ptr(),
        each,
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
        DTYPE[input.dtype],
        **where,
    )
    return out


def packed_size(weight: Tensor) -> int:
    return 4 * weight.shape[0]


def pack(weight: Tensor) -> Tensor:
    """The sums of the weight's rows, int32, as bytes: all that the kernels want beside the weight itself."""
    sums = weight.new_empty(weight.shape[0], dtype=torch.int32)
    cuda.module().int8_row_sums(
        weight.data_ptr(), *weight.shape, *weight.stride(), sums.data_ptr(), **cuda.where(weight)
    )
    return sums.view(torch.uint8)
