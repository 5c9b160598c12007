"""Quantization in plain torch: the formulas of fastnn.ops.quantize, in float32 where rounding decides.

Arguments are those of the ops in ``torch.ops.fastnn``: ``axis`` increasing dimensions, none of them negative; ``group_size`` 0
where there are no groups; ``dtype`` the name of a scheme (a key of RANGE or FLOAT8); ``seed`` an int64 scalar where rounding
is stochastic, else None.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dropout import words

#: The least and the largest integer of a scheme.
RANGE: dict[str, tuple[int, int]] = {"int8": (-128, 127), "uint8": (0, 255), "int4": (-8, 7), "uint4": (0, 15)}
#: The largest number of a scheme, its digits behind the leading one, and the exponent of its least normal number.
FLOAT8: dict[str, tuple[float, int, int]] = {"float8_e4m3fn": (448.0, 3, -6), "float8_e5m2": (57344.0, 2, -14)}
#: Those of which a byte holds two.
PACKED = ("int4", "uint4")
#: The dtype of the tensor that holds a scheme's numbers.
STORAGE: dict[str, torch.dtype] = {
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int4": torch.uint8,
    "uint4": torch.uint8,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}

_LEAST_SCALE = 2.0**-126


def pack(values: Tensor) -> Tensor:
    """(..., K) integers from -8 to 15 as (..., K / 2) bytes: element 2 i in the low half of byte i, 2 i + 1 in the high."""
    nibbles = values.to(torch.int16) & 15
    return (nibbles[..., ::2] | nibbles[..., 1::2] << 4).to(torch.uint8)


def unpack(packed: Tensor, dtype: str) -> Tensor:
    """The int8 numbers (..., 2 K) in the bytes (..., K): -8 to 7 of "int4", 0 to 15 of "uint4"."""
    nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).to(torch.int8)
    return (nibbles ^ 8) - 8 if dtype == "int4" else nibbles


def spread(scale: Tensor, shape: Sequence[int], axis: Sequence[int], group_size: int) -> Tensor:
    """A scale (or zero point), seen so that it broadcasts to ``shape``, the shape of what is quantized."""
    if group_size:
        return scale.unsqueeze(-1).expand(*scale.shape, group_size).reshape(shape)
    return scale.reshape([shape[d] if d in axis else 1 for d in range(len(shape))])


def check_values(scale: Tensor, zero_point: Tensor | None, dtype: str) -> None:
    """ValueError for a scale that is not positive, normal and finite, and for a zero point out of the scheme's range."""
    if torch.compiler.is_compiling():
        return
    scale = scale.to(torch.float32).flatten()
    bad = scale[~((scale >= _LEAST_SCALE) & (scale < torch.inf))]
    if bad.numel():
        raise ValueError(f"scale: expected positive, normal, finite numbers, got {bad[0].item():g}")
    if zero_point is not None:
        least, most = RANGE[dtype]
        zero_point = zero_point.flatten()
        bad = zero_point[(zero_point < least) | (zero_point > most)]
        if bad.numel():
            raise ValueError(f"zero_point: expected {least} to {most} for {dtype}, got {bad[0].item()}")


def _uniform(seed: Tensor, like: Tensor) -> Tensor:
    """A number from 0 to 1 - 2^-24 for each element, by its index in row-major order."""
    bits = words(seed.to(like.device), like.numel()) >> 8
    return (bits.to(torch.float32) * 2.0**-24).view(like.shape)


def whole(y: Tensor, seed: Tensor | None) -> Tensor:
    """y rounded: to the nearest integer, halves to even; or up with the probability of what it is above its floor."""
    if seed is None:
        return y.round()
    floor = y.floor()
    return floor + (_uniform(seed, y) < y - floor).to(y.dtype)


def quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    seed: Tensor | None,
    axis: Sequence[int],
    group_size: int,
    dtype: str,
) -> Tensor:
    check_values(scale, zero_point, dtype)
    scale = scale.to(torch.float32)
    inverse = torch.ones_like(scale) / scale
    y = input.to(torch.float32) * spread(inverse, input.shape, axis, group_size)
    if dtype in FLOAT8:
        return _to_float8(y, seed, dtype)
    least, most = RANGE[dtype]
    q = whole(torch.where(y.isnan(), 0.0, y), seed)
    if zero_point is not None:
        q = q + spread(zero_point, input.shape, axis, group_size).to(torch.float32)
    q = q.clamp(least, most)
    return pack(q) if dtype in PACKED else q.to(STORAGE[dtype])


def _to_float8(y: Tensor, seed: Tensor | None, dtype: str) -> Tensor:
    """Magnitudes are counted in units of the last place of their binade, and the count is rounded to an integer."""
    largest, digits, least_exponent = FLOAT8[dtype]
    magnitude = torch.where(y.isnan(), 0.0, y.abs()).clamp(max=largest)
    exponent = (torch.frexp(magnitude).exponent - 1).clamp(min=least_exponent) - digits
    count = whole(torch.ldexp(magnitude, -exponent), seed)
    rounded = torch.ldexp(count, exponent).copysign(y)
    return torch.where(y.isnan(), y, rounded).to(STORAGE[dtype])


def dequantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: Sequence[int],
    group_size: int,
    from_dtype: str,
    dtype: torch.dtype,
) -> Tensor:
    check_values(scale, zero_point, from_dtype)
    q = (unpack(input, from_dtype) if from_dtype in PACKED else input).to(torch.float32)
    if zero_point is not None:
        q = q - spread(zero_point, q.shape, axis, group_size).to(torch.float32)
    return (q * spread(scale.to(torch.float32), q.shape, axis, group_size)).to(dtype)


def choose_scale(
    input: Tensor, axis: Sequence[int], group_size: int, dtype: str, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """The scale, and the zero point: of no elements where the scheme is symmetric."""
    x = input.to(torch.float32)
    if group_size:
        x = x.unflatten(-1, (input.shape[-1] // group_size, group_size))
        axis = range(input.dim())
    x = torch.where(x.isfinite(), x, 0.0)
    shared = [d for d in range(x.dim()) if d not in axis]
    if not shared:
        least, most = x.clamp(max=0), x.clamp(min=0)
    elif 0 in [x.shape[d] for d in shared]:
        least = most = x.new_zeros([x.shape[d] for d in axis])
    else:
        least, most = x.amin(shared).clamp(max=0), x.amax(shared).clamp(min=0)
    low, high = (-FLOAT8[dtype][0], FLOAT8[dtype][0]) if dtype in FLOAT8 else RANGE[dtype]
    # Tensors, so that the quotients are those of float32 numbers.
    if symmetric:
        scale = torch.maximum(most, -least) / torch.full_like(most, high)
    else:
        steps = torch.full_like(most, high - low)
        scale = most / steps - least / steps
    scale = torch.where(scale == 0, 1.0, scale).clamp(min=_LEAST_SCALE)
    if symmetric:
        return scale, torch.empty(0, dtype=torch.int32, device=x.device)
    return scale, (low - (least / scale).round()).clamp(low, high).to(torch.int32)


def quantize_dynamic(
    input: Tensor, seed: Tensor | None, axis: Sequence[int], group_size: int, dtype: str, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    scale, zero_point = choose_scale(input, axis, group_size, dtype, symmetric)
    shift = None if symmetric else zero_point
    return quantize(input, scale, shift, seed, axis, group_size, dtype), scale, zero_point
