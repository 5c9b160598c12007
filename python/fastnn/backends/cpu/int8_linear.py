"""The int8 linear layer on plain CPU tensors, whose arguments the ops have checked."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _cpu
from ..reference.int8_linear import SYMMETRIC_ZERO_POINT
from . import ACTIVATION, DTYPE, empty

packed_bytes = _cpu.packed_int8_bytes


def int8_linear(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    activation: str,
    packed: Tensor | None,
) -> Tensor:
    """input (..., K), weight (N, K), weight_scale (N) or one element, bias (N); the result (..., N) is contiguous."""
    n, k = weight.shape
    out = empty((*input.shape[:-1], n), input.dtype)
    if out.numel() == 0:
        return out
    rows = input.reshape(out.numel() // n, k)
    weight_scale = weight_scale.to(torch.float32).contiguous()
    bias = None if bias is None else bias.contiguous()
    zero_point = SYMMETRIC_ZERO_POINT if input_zero_point is None else int(input_zero_point)
    _cpu.int8_linear(
        rows.data_ptr(),
        rows.shape[0],
        k,
        rows.stride(0),
        rows.stride(1),
        DTYPE[input.dtype],
        weight.data_ptr(),
        n,
        weight.stride(0),
        weight.stride(1),
        weight_scale.data_ptr(),
        weight_scale.numel() == 1,
        0 if bias is None else bias.data_ptr(),
        DTYPE[torch.float32 if bias is None else bias.dtype],
        input_scale is not None,
        1.0 if input_scale is None else float(input_scale),
        zero_point,
        ACTIVATION[activation],
        0 if packed is None else packed.data_ptr(),
        0 if packed is None else packed.numel(),
        out.data_ptr(),
    )
    return out


def packed_size(weight: Tensor) -> int:
    return packed_bytes(*map(int, weight.shape))


def pack(weight: Tensor) -> Tensor:
    """The weight (N, K) as the kernel of the active instruction set reads it, as bytes."""
    n, k = weight.shape
    packed = empty((packed_bytes(n, k),), torch.uint8)
    _cpu.pack_int8(weight.data_ptr(), n, k, weight.stride(0), weight.stride(1), packed.data_ptr())
    return packed


def make(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """What the short way asks for where a result is large."""
    return empty(shape, like.dtype)
