"""The product of 8-bit floats on CUDA tensors, whose arguments the ops have checked."""

from __future__ import annotations

import torch
from torch import Tensor

from .._matmul import along_k
from . import product


def scaled_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    use_fast_accum: bool,
) -> Tensor:
    """scale_a * scale_b * (mat_a @ mat_b) + bias. Scales stay on the device, and nobody waits to know them."""
    return product(
        along_k(mat_a),
        along_k(mat_b.t()).t(),
        dtype=out_dtype,
        row_scale=scale_a.reshape(-1).contiguous(),
        col_scale=scale_b.reshape(-1).contiguous(),
        row_scale_step=int(scale_a.numel() != 1),
        col_scale_step=int(scale_b.numel() != 1),
        bias=bias,
        fast_sums=use_fast_accum,
    )
