"""Linear layers whose weight alone is quantized, on plain CUDA tensors, whose arguments the ops have checked."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import _state
from .. import cuda
from .._quantize import WEIGHT_FORMAT, address
from ..codes import ACTIVATION, DTYPE

#: Elements of 16 bits in a step of the tiles, which a group's scale has to be good for.
_STEP = 32


def weight_only_linear(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    from_dtype: str,
    activation: str,
) -> Tensor:
    n, k = weight.shape[0], input.shape[-1]
    m = math.prod(input.shape[:-1])
    x = input if input.dim() == 2 else input.reshape(m, k)
    if k > 1 and x.stride(1) != 1:
        x = x.contiguous()
    if group_size % _STEP:  # such groups are multiplied in float32
        x = x.to(torch.float32)
    out = x.new_empty((*input.shape[:-1], n))
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        weight = weight.contiguous()
    scale = scale.to(torch.float32).contiguous()
    if zero_point is not None:
        zero_point = zero_point.to(torch.int32).contiguous()
    bias = None if bias is None else bias.contiguous()
    cuda.module().weight_only_linear(
        x.data_ptr(),
        m,
        n,
        k,
        x.stride(0),
        DTYPE[x.dtype],
        weight.data_ptr(),
        weight.stride(0),
        WEIGHT_FORMAT[from_dtype],
        scale.data_ptr(),
        address(zero_point),
        max(k // group_size, 1) if group_size else 1,
        address(bias),
        DTYPE[torch.float32 if bias is None else bias.dtype],
        ACTIVATION[activation],
        out.data_ptr(),
        _state.settings().batch_invariant,
        **cuda.where(input),
    )
    return out.to(input.dtype)
