"""What the linear layers of GPUs have in common whose weight alone is quantized."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Elements of 16 bits in a step of the tiles, which a group's scale has to be good for.
STEP = 32


@dataclass(frozen=True, slots=True)
class Weight:
    """(N, K), or as packed bytes (N, K / 2), whose rows lie dense; contiguous scales and zero points (N, ``groups``)."""

    q: Tensor
    from_dtype: str
    scale: Tensor  # float32
    zero_point: Tensor | None  # int32
    groups: int


#: Writes out (M, N), contiguous, from x (M, K), whose rows lie dense: of float32 where a group is no multiple of STEP.
#: The bias is contiguous.
Multiply = Callable[[Tensor, Weight, Tensor | None, str, Tensor], None]


def weight_only_linear(
    multiply: Multiply,
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    from_dtype: str,
    activation: str,
) -> Tensor:
    """As backends.cpu.weight_only.weight_only_linear."""
    n, k = weight.shape[0], input.shape[-1]
    m = math.prod(input.shape[:-1])
    x = input if input.dim() == 2 else input.reshape(m, k)
    if k > 1 and x.stride(1) != 1:
        x = x.contiguous()
    if group_size % STEP:  # such groups are multiplied in float32
        x = x.to(torch.float32)
    out = x.new_empty((*input.shape[:-1], n))
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        weight = weight.contiguous()
    scale = scale.to(torch.float32).contiguous()
    if zero_point is not None:
        zero_point = zero_point.to(torch.int32).contiguous()
    bias = None if bias is None else bias.contiguous()
    groups = max(k // group_size, 1) if group_size else 1
    if out.numel():
        multiply(x, Weight(weight, from_dtype, scale, zero_point, groups), bias, activation, out.view(m, n))
    return out.to(input.dtype)
