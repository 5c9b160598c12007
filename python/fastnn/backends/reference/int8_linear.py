"""The int8 linear layer in plain torch: sums in int64, float32 arithmetic where rounding decides."""

from __future__ import annotations

import torch
from torch import Tensor

from . import activation as activate
from .quantize import check_values, choose_scale, quantize

#: The zero point of a symmetric scheme, whose numbers are shifted to be unsigned.
SYMMETRIC_ZERO_POINT = 128


def int8_linear(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    activation: str,
    packed: Tensor | None = None,
) -> Tensor:
    """``packed`` is a copy of the weight, and not read."""
    check_values(weight_scale, None, "int8")
    if input_scale is None:
        rows = tuple(range(input.dim() - 1))
        scale, zero_point = choose_scale(input, rows, 0, "uint8", False)
        q = quantize(input, scale, zero_point, None, rows, 0, "uint8")
        scale, zero_point = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
    else:
        scale, zero_point = static_scheme(input_scale, input_zero_point)
        q = quantize(input, scale, zero_point, None, (), 0, "uint8")
    sums = (q.to(torch.int64) - zero_point.to(torch.int64)) @ weight.to(torch.int64).t()
    y = sums.to(torch.float32) * (scale * weight_scale.to(torch.float32).flatten())
    if bias is not None:
        y = y + bias.to(torch.float32)
    return activate(activation, y, dtype=torch.float32, keep=True).to(input.dtype)


def static_scheme(input_scale: Tensor, input_zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and zero point of all of the input, without dimensions."""
    if input_zero_point is None:
        input_zero_point = torch.full((), SYMMETRIC_ZERO_POINT, device=input_scale.device)
    return input_scale.to(torch.float32).reshape(()), input_zero_point.reshape(())


def saturates(input: Tensor, input_scale: Tensor, input_zero_point: Tensor | None) -> Tensor:
    """Where a static scheme gives an element the end of its range instead of the nearest number."""
    scale, zero_point = static_scheme(input_scale, input_zero_point)
    y = input.to(torch.float32) * (torch.ones_like(scale) / scale)
    q = y.round() + zero_point.to(torch.float32)
    return (q < 0) | (q > 255)
