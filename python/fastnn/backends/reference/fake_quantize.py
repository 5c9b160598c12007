"""Fake quantization in plain torch: the formulas of fastnn.ops.fake_quantize, differentiable as they are.

Roundings let gradients straight through: y + (round(y) - y), the difference being a constant, has the value of round(y),
exactly, and the derivative of y. Everything else follows from the chain rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .quantize import whole


def mask_bytes(count: int) -> int:
    """As src/cpp/quant/fake_quantize.hpp has it: a bit an element, and what may be read beyond them."""
    return count // 8 + 8


def pack_bits(inside: Tensor) -> Tensor:
    """Booleans as bits: element e, in row-major order, is bit e % 8 of byte e / 8. What is beyond them is 0."""
    count = inside.numel()
    bits = torch.zeros(mask_bytes(count) * 8, dtype=torch.uint8, device=inside.device)
    bits[:count] = inside.flatten()
    places = torch.arange(8, dtype=torch.uint8, device=inside.device)
    return (bits.view(-1, 8) << places).sum(1, dtype=torch.uint8)


def unpack_bits(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """The booleans in a mask of this shape."""
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask.unsqueeze(-1) >> places & 1).bool()
    return bits.flatten()[: torch.Size(shape).numel()].view(shape)


def _straight(y: Tensor, rounded: Tensor) -> Tensor:
    """The value of ``rounded``, with the derivative of y. Infinities are their own roundings."""
    step = rounded.detach() - y.detach()
    return y + torch.where(step.isfinite(), step, 0.0)


def _with_factor(parameter: Tensor, factor: float) -> Tensor:
    """The same number, whose gradient is multiplied by the factor."""
    return parameter.detach() + (parameter - parameter.detach()) * factor


def _grid(
    scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scale and its inverse, and the range with the zero point taken away; each is rounded to float32."""
    scale = scale.to(torch.float32)
    inverse = torch.ones_like(scale) / scale
    zero = torch.zeros_like(scale) if zero_point is None else zero_point.to(torch.float32)
    if zero_point is not None and zero_point.is_floating_point():
        zero = zero + (zero.round().clamp(quant_min, quant_max) - zero).detach()
    return scale.to(dtype), inverse.to(dtype), (quant_min - zero).to(dtype), (quant_max - zero).to(dtype)


def _levels(
    x: Tensor, inverse: Tensor, low: Tensor, high: Tensor, seed: Tensor | None, as_torch: bool
) -> tuple[Tensor, Tensor]:
    """x / scale rounded, and that clamped."""
    finite = x.isfinite()
    # Of infinities nothing depends on the scale, and 0 times one is no 0.
    y = torch.where(finite, x, 0.0) * inverse + torch.where(finite, 0.0, x * inverse).detach()
    r = _straight(y, whole(y, seed))
    number = torch.where(r.isnan(), low if as_torch else torch.zeros_like(low), r)
    # maximum() and minimum() would share a gradient where both are equal.
    return r, torch.where(number < low, low, torch.where(number > high, high, number))


def fake_quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    seed: Tensor | None,
    quant_min: int,
    quant_max: int,
    factor: float,
    as_torch: bool,
    wide: bool,
    masked: bool,
) -> tuple[Tensor, Tensor]:
    """The result, and the mask (of no elements where none is asked for)."""
    dtype = torch.float64 if input.dtype is torch.float64 else torch.float32
    if zero_point is not None and zero_point.is_floating_point():
        zero_point = _with_factor(zero_point, factor)
    given, inverse, low, high = _grid(_with_factor(scale, factor), zero_point, quant_min, quant_max, dtype)
    r, d = _levels(input.to(dtype), inverse, low, high, seed, as_torch)
    # Adding 0 makes +0 of -0, as the way over integers does.
    product = (d + 0.0) * given
    result = product if wide else product.to(torch.float32)
    inside = (r == d).detach()
    mask = pack_bits(inside) if masked else torch.empty(0, dtype=torch.uint8, device=input.device)
    return result.to(input.dtype), mask


def apply_mask(grad: Tensor, mask: Tensor) -> Tensor:
    """grad where the bit is set, else 0 grad."""
    return grad * unpack_bits(mask, grad.shape).to(grad.dtype)


def reduce_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The sum of what shares an element of this shape, which broadcasts to that of x."""
    return x.sum_to_size(tuple(shape))


def coefficients(
    input: Tensor,
    mask: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    seed: Tensor | None,
    quant_min: int,
    quant_max: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives of the result by input, scale and zero point, an element each; differentiable by input and scale."""
    dtype = torch.float64 if input.dtype is torch.float64 else torch.float32
    given, inverse, low, high = _grid(scale, zero_point, quant_min, quant_max, dtype)
    x = input.to(dtype)
    inside = unpack_bits(mask, input.shape)
    r, d = _levels(x.detach(), inverse.detach(), low.detach(), high.detach(), seed, False)
    by_scale = torch.where(inside, d - torch.where(inside, x, 0.0) * inverse, d)
    by_zero = torch.where(inside | r.isnan(), 0.0, -given)
    return inside.to(dtype), by_scale, by_zero


def gradients(
    grad: Tensor,
    input: Tensor,
    mask: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    seed: Tensor | None,
    quant_min: int,
    quant_max: int,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, scale and zero point; these two in float32 and of scale's shape."""
    inside, by_scale, by_zero = coefficients(input, mask, scale, zero_point, seed, quant_min, quant_max)
    g = grad.to(inside.dtype)
    sums = [(reduce_to(g * c, scale.shape) * factor).to(torch.float32) for c in (by_scale, by_zero)]
    return (g * inside).to(grad.dtype), *sums
