"""Fake quantization on plain CPU tensors, whose arguments the ops have checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _cpu
from . import DTYPE, empty_like

mask_bytes = _cpu.fake_mask_bytes


def _grid(
    scale: Tensor,
    zero_point: Tensor | None,
    seed: Tensor | None,
    quant_min: int,
    quant_max: int,
    as_torch: bool = False,
    wide: bool = False,
) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
    """The kernels' arguments, and the tensors that their addresses belong to."""
    scale = scale.to(torch.float32).contiguous()
    zero, kind = None, 0
    if zero_point is not None:
        kind = 2 if zero_point.is_floating_point() else 1
        zero = zero_point.to(torch.float32 if kind == 2 else torch.int32).contiguous()
    address = 0 if zero is None else zero.data_ptr()
    drawn = 0 if seed is None else int(seed) & 0xFFFFFFFFFFFFFFFF
    shape = tuple(scale.shape)
    grid = (scale.data_ptr(), shape, address, kind, quant_min, quant_max, as_torch, wide, seed is not None, drawn)
    return grid, (scale, zero)


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
    out = empty_like(input)
    mask = torch.empty(mask_bytes(input.numel()) if masked else 0, dtype=torch.uint8)
    grid, _kept = _grid(scale, zero_point, seed, quant_min, quant_max, as_torch, wide)
    _cpu.fake_quantize(
        input.data_ptr(),
        out.data_ptr(),
        mask.data_ptr(),
        input.shape,
        input.stride(),
        out.stride(),
        DTYPE[input.dtype],
        grid,
    )
    return out, mask


def apply_mask(grad: Tensor, mask: Tensor) -> Tensor:
    """grad where the bit is set, else 0 grad."""
    out = empty_like(grad)
    _cpu.fake_quantize_masked(
        grad.data_ptr(),
        out.data_ptr(),
        mask.contiguous().data_ptr(),
        grad.shape,
        grad.stride(),
        out.stride(),
        DTYPE[grad.dtype],
    )
    return out


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
    out, mask = empty_like(grad), mask.contiguous()
    by_scale, by_zero_point = (torch.empty(scale.shape, dtype=torch.float32) for _ in range(2))
    grid, _kept = _grid(scale, zero_point, seed, quant_min, quant_max)
    _cpu.fake_quantize_gradients(
        grad.data_ptr(),
        input.data_ptr(),
        out.data_ptr(),
        mask.data_ptr(),
        input.shape,
        grad.stride(),
        input.stride(),
        out.stride(),
        DTYPE[input.dtype],
        grid,
        factor,
        by_scale.data_ptr(),
        by_zero_point.data_ptr(),
    )
    return out, by_scale, by_zero_point
