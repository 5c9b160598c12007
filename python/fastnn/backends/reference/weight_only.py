"""Linear layers whose weight alone is quantized, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import activation as apply
from .quantize import PACKED, check_values, spread, unpack


def numbers(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    from_dtype: str,
    dtype: torch.dtype,
) -> Tensor:
    """(q - zero_point) * scale, (N, K), computed in ``dtype``; float8 weights come as the bytes they are."""
    if from_dtype in PACKED:
        weight = unpack(weight, from_dtype)
    elif from_dtype != "int8":
        weight = weight.view(getattr(torch, from_dtype))
    q = weight.to(dtype)
    if zero_point is not None:
        q = q - spread(zero_point, q.shape, [0], group_size).to(dtype)
    return q * spread(scale.to(torch.float32), q.shape, [0], group_size).to(dtype)


def weight_only_linear(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    from_dtype: str,
    activation: str,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    if not group_size:
        check_values(scale, zero_point, from_dtype)
    result = input.to(dtype) @ numbers(weight, scale, zero_point, group_size, from_dtype, dtype).t()
    if bias is not None:
        result = result + bias.to(dtype)
    return apply(activation, result).to(input.dtype)
