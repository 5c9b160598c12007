"""Quantization on plain CUDA tensors, whose arguments the ops have checked. Arguments are those of the formulas in
backends/reference/quantize.py; the values of scales and zero points are not looked at, as that would mean to wait for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import cuda
from .._quantize import SCHEME, address, halves, loop, scale_shape, scales, split, zero_points
from ..codes import DTYPE
from ..reference.quantize import PACKED, STORAGE


def _result(input: Tensor, dtype: str) -> tuple[Tensor, Sequence[int]]:
    """Memory for the quantized input, and its strides in elements."""
    if dtype not in PACKED:
        q = torch.empty_like(input, dtype=STORAGE[dtype])
        return q, q.stride()
    q = input.new_empty((*input.shape[:-1], input.shape[-1] // 2), dtype=torch.uint8)
    return q, halves(q.stride())


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
    shape, scale_strides = loop(input.shape, axis, group_size)
    scale, zero_point = scales(scale), zero_points(zero_point)
    seed = None if seed is None else seed.to(input.device)
    cuda.module().quantize(
        input.data_ptr(),
        q.data_ptr(),
        scale.data_ptr(),
        address(zero_point),
        shape,
        split(input.stride(), group_size),
        split(q_strides, group_size),
        scale_strides,
        scale.numel(),
        DTYPE[input.dtype],
        SCHEME[dtype],
        address(seed),
        **cuda.where(input),
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
        x = input.new_empty((*input.shape[:-1], 2 * input.shape[-1]), dtype=dtype)
        q_strides = halves(input.stride())
    else:
        x = torch.empty_like(input, dtype=dtype)
        q_strides = input.stride()
    shape, scale_strides = loop(x.shape, axis, group_size)
    scale, zero_point = scales(scale), zero_points(zero_point)
    cuda.module().dequantize(
        input.data_ptr(),
        x.data_ptr(),
        scale.data_ptr(),
        address(zero_point),
        shape,
        split(q_strides, group_size),
        split(x.stride(), group_size),
        scale_strides,
        scale.numel(),
        SCHEME[from_dtype],
        DTYPE[dtype],
        **cuda.where(input),
    )
    return x


def choose_scale(
    input: Tensor, axis: Sequence[int], group_size: int, dtype: str, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """The scale, and the zero point: of no elements where the scheme is symmetric."""
    shape, scale_strides = loop(input.shape, axis, group_size)
    scale, zero_point = _parameters(input, axis, group_size, symmetric)
    cuda.module().choose_scale(
        input.data_ptr(),
        scale.data_ptr(),
        0 if symmetric else zero_point.data_ptr(),
        shape,
        split(input.stride(), group_size),
        scale_strides,
        scale.numel(),
        DTYPE[input.dtype],
        SCHEME[dtype],
        **cuda.where(input),
    )
    return scale, zero_point


def quantize_dynamic(
    input: Tensor, seed: Tensor | None, axis: Sequence[int], group_size: int, dtype: str, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    q, q_strides = _result(input, dtype)
    shape, scale_strides = loop(input.shape, axis, group_size)
    scale, zero_point = _parameters(input, axis, group_size, symmetric)
    seed = None if seed is None else seed.to(input.device)
    cuda.module().quantize_dynamic(
        input.data_ptr(),
        q.data_ptr(),
        scale.data_ptr(),
        0 if symmetric else zero_point.data_ptr(),
        shape,
        split(input.stride(), group_size),
        split(q_strides, group_size),
        scale_strides,
        scale.numel(),
        DTYPE[input.dtype],
        SCHEME[dtype],
        address(seed),
        **cuda.where(input),
    )
    return q, scale, zero_point


def _parameters(input: Tensor, axis: Sequence[int], group_size: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    shape = scale_shape(input.shape, axis, group_size)
    zero_point = input.new_empty((0,) if symmetric else shape, dtype=torch.int32)
    return input.new_empty(shape, dtype=torch.float32), zero_point
