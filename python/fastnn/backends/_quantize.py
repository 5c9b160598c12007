"""How the kernels of quantization are told what lies where: what their bindings have in common, on CPUs and GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._tensors import contiguous
from .codes import DTYPE
from .reference.quantize import PACKED, STORAGE

#: The numbers of the schemes in src/cpp/quant/scheme.hpp.
SCHEME: dict[str, int] = {"int8": 0, "uint8": 1, "int4": 2, "uint4": 3, "float8_e4m3fn": 4, "float8_e5m2": 5}
#: Those of WeightFormat in src/cpp/quant/weight_only.hpp.
WEIGHT_FORMAT: dict[str, int] = {"int8": 0, "int4": 1, "uint4": 2, "float8_e4m3fn": 3, "float8_e5m2": 4}


def scales(scale: Tensor) -> Tensor:
    return scale.to(torch.float32).contiguous()


def zero_points(zero_point: Tensor | None) -> Tensor | None:
    if zero_point is None:
        return None
    if zero_point.dtype is torch.int64:  # what is out of range stays out of range
        zero_point = zero_point.clamp(-(1 << 31), (1 << 31) - 1)
    return zero_point.to(torch.int32).contiguous()


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def on_device(seed: Tensor | None, x: Tensor) -> Tensor | None:
    """The seed where a kernel reads it, which is where x is."""
    return None if seed is None else seed.to(x.device)


def split(strides: Sequence[int], group_size: int) -> tuple[int, ...]:
    """Strides of a tensor whose last dimension is seen as groups."""
    return (*strides[:-1], strides[-1] * group_size, strides[-1]) if group_size else tuple(strides)


def halves(strides: Sequence[int]) -> tuple[int, ...]:
    """Strides of a packed tensor, of which the last dimension is dense, in elements of four bits."""
    return (*(2 * stride for stride in strides[:-1]), 1)


def loop(shape: Sequence[int], axis: Sequence[int], group_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape, groups being one more dimension, and for each dimension the stride of the scales."""
    if group_size:
        outer = (*shape[:-1], shape[-1] // group_size)
        return (*outer, group_size), (*contiguous(outer), 0)
    strides = [0] * len(shape)
    step = 1
    for a in reversed(axis):
        strides[a] = step
        step *= max(shape[a], 1)
    return tuple(shape), tuple(strides)


def scale_shape(shape: Sequence[int], axis: Sequence[int], group_size: int) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] // group_size) if group_size else tuple(shape[a] for a in axis)


def fake_zero_points(zero_point: Tensor | None) -> Tensor | None:
    """Those of fake quantization may be learned, and are floats then."""
    if zero_point is None:
        return None
    return zero_point.to(torch.float32 if zero_point.is_floating_point() else torch.int32).contiguous()


def fake_grid(
    scale: Tensor,
    zero_point: Tensor | None,
    seed: Tensor | None,
    quant_min: int,
    quant_max: int,
    as_torch: bool = False,
    wide: bool = False,
) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
    """The arguments of fake quantization that tell the grid, and the tensors that their addresses belong to."""
    scale, zero = scales(scale), fake_zero_points(zero_point)
    kind = 0 if zero is None else 2 if zero.is_floating_point() else 1
    seed = on_device(seed, scale)
    shape = tuple(scale.shape)
    grid = (scale.data_ptr(), shape, address(zero), kind, quant_min, quant_max, as_torch, wide, address(seed))
    return grid, (scale, zero, seed)


class Memory:
    """Where results go: what torch gives on the device of ``x``, which is one of the arguments."""

    def empty(self, x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    def empty_as(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """torch.empty_like(x, dtype=dtype)"""
        return torch.empty_like(x, dtype=dtype)

    def codes(self, x: Tensor, dtype: str) -> tuple[Tensor, Sequence[int]]:
        """For x quantized, and the strides in elements."""
        if dtype not in PACKED:
            q = self.empty_as(x, STORAGE[dtype])
            return q, q.stride()
        q = self.empty(x, (*x.shape[:-1], x.shape[-1] // 2), torch.uint8)
        return q, halves(q.stride())

    def numbers(self, q: Tensor, from_dtype: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Sequence[int]]:
        """For q dequantized, q as a kernel reads it, and its strides in elements."""
        if from_dtype not in PACKED:
            return self.empty_as(q, dtype), q, q.stride()
        if q.stride(-1) != 1:
            q = q.contiguous()
        return self.empty(q, (*q.shape[:-1], 2 * q.shape[-1]), dtype), q, halves(q.stride())

    def parameters(self, x: Tensor, axis: Sequence[int], group_size: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        """For the scales of x, and the zero points: of no elements where the scheme is symmetric."""
        shape = scale_shape(x.shape, axis, group_size)
        return self.empty(x, shape, torch.float32), self.empty(x, (0,) if symmetric else shape, torch.int32)


class Compiled:
    """Quantization by an extension module, on plain tensors of its device whose arguments the ops have checked. Arguments
    are those of the formulas in backends/reference/quantize.py.

    ``kernel(name, x)``: the module's function, to be called with what all modules' functions of that name take; it runs
    where ``x`` is.
    """

    def __init__(self, kernel: Callable[[str, Tensor], Callable[..., None]], memory: Memory) -> None:
        self._kernel = kernel
        self._memory = memory

    def quantize(
        self,
        input: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        seed: Tensor | None,
        axis: Sequence[int],
        group_size: int,
        dtype: str,
    ) -> Tensor:
        q, q_strides = self._memory.codes(input, dtype)
        shape, scale_strides = loop(input.shape, axis, group_size)
        scale, zero_point, seed = scales(scale), zero_points(zero_point), on_device(seed, input)
        self._kernel("quantize", input)(
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
        )
        return q

    def dequantize(
        self,
        input: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        axis: Sequence[int],
        group_size: int,
        from_dtype: str,
        dtype: torch.dtype,
    ) -> Tensor:
        x, input, q_strides = self._memory.numbers(input, from_dtype, dtype)
        shape, scale_strides = loop(x.shape, axis, group_size)
        scale, zero_point = scales(scale), zero_points(zero_point)
        self._kernel("dequantize", input)(
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
        )
        return x

    def choose_scale(
        self, input: Tensor, axis: Sequence[int], group_size: int, dtype: str, symmetric: bool
    ) -> tuple[Tensor, Tensor]:
        """The scale, and the zero point: of no elements where the scheme is symmetric."""
        shape, scale_strides = loop(input.shape, axis, group_size)
        scale, zero_point = self._memory.parameters(input, axis, group_size, symmetric)
        self._kernel("choose_scale", input)(
            input.data_ptr(),
            scale.data_ptr(),
            0 if symmetric else zero_point.data_ptr(),
            shape,
            split(input.stride(), group_size),
            scale_strides,
            scale.numel(),
            DTYPE[input.dtype],
            SCHEME[dtype],
        )
        return scale, zero_point

    def quantize_dynamic(
        self, input: Tensor, seed: Tensor | None, axis: Sequence[int], group_size: int, dtype: str, symmetric: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, q_strides = self._memory.codes(input, dtype)
        shape, scale_strides = loop(input.shape, axis, group_size)
        scale, zero_point = self._memory.parameters(input, axis, group_size, symmetric)
        seed = on_device(seed, input)
        self._kernel("quantize_dynamic", input)(
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
        )
        return q, scale, zero_point
