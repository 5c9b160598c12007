"""Fake quantization on plain CPU tensors, whose arguments the ops have checked."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _cpu
from .._quantize import fake_grid
from . import DTYPE, empty_like

mask_bytes = _cpu.fake_mask_bytes


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
    grid, _kept = fake_grid(scale, zero_point, seed, quant_min, quant_max, as_torch, wide)
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
    grid, _kept = fake_grid(scale, zero_point, seed, quant_min, quant_max)
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
