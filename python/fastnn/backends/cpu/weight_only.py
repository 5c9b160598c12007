"""Linear layers whose weight alone is quantized, on plain CPU tensors, whose arguments the ops have checked."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import _cpu, _state
from .._quantize import WEIGHT_FORMAT
from . import ACTIVATION, DTYPE, empty, precision

#: What a weight of integers holds, by the op's argument from_dtype.
INTEGERS: dict[torch.dtype | str | None, int] = {None: 0, "int4": 1, "uint4": 2}
# Which torch does not have from its first version on that this package runs with.
INTEGERS |= {getattr(torch, name): INTEGERS[name] for name in ("int4", "uint4") if hasattr(torch, name)}


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
    out = empty((*input.shape[:-1], n), input.dtype)
    m = math.prod(input.shape[:-1])
    x = input if input.dim() == 2 else input.reshape(m, k)
    if k > 1 and x.stride(1) != 1:
        x = x.contiguous()
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        weight = weight.contiguous()
    scale = scale.to(torch.float32).contiguous()
    if zero_point is not None:
        zero_point = zero_point.to(torch.int32).contiguous()
    if bias is not None:
        if bias.dtype is not input.dtype:
            bias = bias.to(torch.float32)
        bias = bias.contiguous()
    _cpu.weight_only_linear(
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
        0 if zero_point is None else zero_point.data_ptr(),
        k // group_size if group_size else 1,
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPE[bias.dtype],
        ACTIVATION[activation],
        out.data_ptr(),
        precision(x.dtype),
        _state.settings().batch_invariant,
    )
    return out
