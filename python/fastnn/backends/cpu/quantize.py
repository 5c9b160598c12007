"""Quantization on plain CPU tensors, whose arguments the ops have checked. Arguments are those of the formulas in
backends/reference/quantize.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _cpu
from ..reference.quantize import PACKED, STORAGE
from . import DTYPE, LARGE_BYTES, _contiguous, empty, empty_strided

#: The numbers of the schemes in src/cpp/quant/scheme.hpp.
SCHEME: dict[str, int] = {"int8": 0, "uint8": 1, "int4": 2, "uint4": 3, "float8_e4m3fn": 4, "float8_e5m2": 5}


def _empty_as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """torch.empty_like(x, dtype=dtype), large ones from the caching allocator."""
    if x.numel() * dtype.itemsize <= LARGE_BYTES:
        return torch.empty_like(x, dtype=dtype)
    strides = x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride()
    return empty_strided(x.shape, strides, dtype)


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return empty(shape, dtype) if dtype in DTYPE else empty_strided(shape, _contiguous(shape), dtype)


def _scales(scale: Tensor) -> Tensor:
    return scale.to(torch.float32).contiguous()


def _zero_points(zero_point: Tensor | None) -> Tensor | None:
    if zero_point is None:
        return None
    if zero_point.dtype is torch.int64:  # what is out of range stays out of range
        zero_point = zero_point.clamp(-(1 << 31), (1 << 31) - 1)
    return zero_point.to(torch.int32).contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _split(strides: Sequence[int], group_size: int) -> tuple[int, ...]:
    """Strides of a tensor whose last dimension is seen as groups."""
    return (*strides[:-1], strides[-1] * group_size, strides[-1]) if group_size else tuple(strides)


def _halves(strides: Sequence[int]) -> tuple[int, ...]:
    """Strides of a packed tensor, of which the last dimension is dense, in elements of four bits."""
    return (*(2 * stride for stride in strides[:-1]), 1)


def _loop(shape: Sequence[int], axis: Sequence[int], group_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape, groups being one more dimension, and for each dimension the stride of the scales."""
    if group_size:
        outer = (*shape[:-1], shape[-1] // group_size)
        return (*outer, group_size), (*_contiguous(outer), 0)
    strides = [0] * len(shape)
    step = 1
    for a in reversed(axis):
        strides[a] = step
        step *= max(shape[a], 1)
    return tuple(shape), tuple(strides)


def _scale_shape(shape: Sequence[int], axis: Sequence[int], group_size: int) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] // group_size) if group_size else tuple(shape[a] for a in axis)


def _result(input: Tensor, dtype: str) -> tuple[Tensor, Sequence[int]]:
    """Memory for the quantized input, and its strides in elements."""
    if dtype not in PACKED:
        q = _empty_as(input, STORAGE[dtype])
        return q, q.stride()
    q = _empty((*input.shape[:-1], input.shape[-1] // 2), torch.uint8)
    return q, _halves(q.stride())


def quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    seed: Tensor | None,
    axis: Sequence[int],
    group_size: int,
    dtype: str,
) -> Tensor:
    q, q_strides = _result(input, dtype)
    shape, scale_strides = _loop(input.shape, axis, group_size)
    scale, zero_point = _scales(scale), _zero_points(zero_point)
    _cpu.quantize(
        input.data_ptr(),
        q.data_ptr(),
        scale.data_ptr(),
        _address(zero_point),
        shape,
        _split(input.stride(), group_size),
        _split(q_strides, group_size),
        scale_strides,
        scale.numel(),
        DTYPE[input.dtype],
        SCHEME[dtype],
        seed is not None,
        0 if seed is None else int(seed) & 0xFFFFFFFFFFFFFFFF,
    )
    return q


def dequantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: Sequence[int],
    group_size: int,
    from_dtype: str,
    dtype: torch.dtype,
) -> Tensor:
    if from_dtype in PACKED:
        if input.stride(-1) != 1:
            input = input.contiguous()
        x = _empty((*input.shape[:-1], 2 * input.shape[-1]), dtype)
        q_strides = _halves(input.stride())
    else:
        x = _empty_as(input, dtype)
        q_strides = input.stride()
    shape, scale_strides = _loop(x.shape, axis, group_size)
    scale, zero_point = _scales(scale), _zero_points(zero_point)
    _cpu.dequantize(
        input.data_ptr(),
        x.data_ptr(),
        scale.data_ptr(),
        _address(zero_point),
        shape,
        _split(q_strides, group_size),
        _split(x.stride(), group_size),
        scale_strides,
        scale.numel(),
        SCHEME[from_dtype],
        DTYPE[dtype],
    )
    return x


def choose_scale(
    input: Tensor, axis: Sequence[int], group_size: int, dtype: str, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """The scale, and the zero point: of no elements where the scheme is symmetric."""
    shape, scale_strides = _loop(input.shape, axis, group_size)
    scale, zero_point = _parameters(input, axis, group_size, symmetric)
    _cpu.choose_scale(
        input.data_ptr(),
        scale.data_ptr(),
        0 if symmetric else zero_point.data_ptr(),
        shape,
        _split(input.stride(), group_size),
        scale_strides,
        scale.numel(),
        DTYPE[input.dtype],
        SCHEME[dtype],
        symmetric,
    )
    return scale, zero_point


def quantize_dynamic(
    input: Tensor, seed: Tensor | None, axis: Sequence[int], group_size: int, dtype: str, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    q, q_strides = _result(input, dtype)
    shape, scale_strides = _loop(input.shape, axis, group_size)
    scale, zero_point = _parameters(input, axis, group_size, symmetric)
    _cpu.quantize_dynamic(
        input.data_ptr(),
        q.data_ptr(),
        scale.data_ptr(),
        0 if symmetric else zero_point.data_ptr(),
        shape,
        _split(input.stride(), group_size),
        _split(q_strides, group_size),
        scale_strides,
        scale.numel(),
        DTYPE[input.dtype],
        SCHEME[dtype],
        symmetric,
        seed is not None,
        0 if seed is None else int(seed) & 0xFFFFFFFFFFFFFFFF,
    )
    return q, scale, zero_point


def _parameters(input: Tensor, axis: Sequence[int], group_size: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    shape = _scale_shape(input.shape, axis, group_size)
    return _empty(shape, torch.float32), torch.empty((0,) if symmetric else shape, dtype=torch.int32)
