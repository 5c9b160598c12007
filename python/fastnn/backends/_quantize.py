"""How the kernels of quantization are told what lies where: what their bindings have in common, on CPUs and GPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._tensors import contiguous

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
