"""Fake quantization on plain CUDA tensors, whose arguments the ops have checked; the values of scales and zero points are not
looked at, as that would mean to wait for them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda
from .._quantize import fake_grid
from ..codes import DTYPE
from ..reference.fake_quantize import mask_bytes


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
    out = torch.empty_like(input)
    mask = input.new_empty(mask_bytes(input.numel()) if masked else 0, dtype=torch.uint8)
    grid, _kept = fake_grid(scale, zero_point, seed, quant_min, quant_max, as_torch)
    cuda.module().fake_quantize(
        input.data_ptr(),
        out.data_ptr(),
        mask.data_ptr(),
        input.shape,
        input.stride(),
        out.stride(),
        DTYPE[input.dtype],
        grid,
        **cuda.where(input),
    )
    return out, mask


def apply_mask(grad: Tensor, mask: Tensor) -> Tensor:
    """grad where the bit is set, else 0 grad."""
    out, mask = torch.empty_like(grad), mask.contiguous()
    cuda.module().fake_quantize_masked(
        grad.data_ptr(),
        out.data_ptr(),
        mask.data_ptr(),
        grad.shape,
        grad.stride(),
        out.stride(),
        DTYPE[grad.dtype],
        **cuda.where(grad),
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
    x, mask = input.contiguous(), mask.contiguous()
    out = grad.new_empty(grad.shape)
    by_scale, by_zero_point = (scale.new_empty(scale.shape, dtype=torch.float32) for _ in range(2))
    grid, _kept = fake_grid(scale, zero_point, seed, quant_min, quant_max)
    workspace = grad.new_empty(cuda.module().fake_quantize_workspace(grad.shape, grid), dtype=torch.float32)
    dense = grad.contiguous()
    cuda.module().fake_quantize_gradients(
        dense.data_ptr(),
        x.data_ptr(),
        out.data_ptr(),
        mask.data_ptr(),
        grad.shape,
        DTYPE[grad.dtype],
        grid,
        factor,
        by_scale.data_ptr(),
        by_zero_point.data_ptr(),
        workspace.data_ptr(),
        **cuda.where(grad),
    )
    return (out if grad.is_contiguous() else torch.empty_like(grad).copy_(out)), by_scale, by_zero_point
