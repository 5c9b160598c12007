"""The product of 8-bit floats on plain CPU tensors, whose arguments the ops have checked."""

from __future__ import annotations

import torch
from torch import Tensor

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
    """scale_a * scale_b * (mat_a @ mat_b) + bias, summed in float32 in any case."""
    alpha, vectors = 1.0, []
    for scale in (scale_a, scale_b):
        if scale.numel() == 1:
            alpha *= float(scale)
            vectors.append(None)
        else:
            vectors.append(scale.reshape(-1).contiguous())
    row_scale, col_scale = vectors
    return product(mat_a, mat_b, dtype=out_dtype, alpha=alpha, row_scale=row_scale, col_scale=col_scale, bias=bias)
