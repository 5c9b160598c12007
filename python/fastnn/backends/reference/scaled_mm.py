"""The product of 8-bit floats in plain torch, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    use_fast_accum: bool = False,
    *,
    keep: bool = False,
) -> Tensor:
    """scale_a * scale_b * (mat_a @ mat_b) + bias, scales of one element or of (M, 1) and (1, N); ``keep``: not rounded."""
    result = torch.matmul(mat_a.to(torch.float64), mat_b.to(torch.float64))
    for scale in (scale_a, scale_b):
        result = result * scale.to(torch.float64).reshape(scale.shape if scale.numel() != 1 else ())
    if bias is not None:
        result = result + bias.to(torch.float64)
    return result if keep else result.to(out_dtype)
