"""Dropout on plain CUDA tensors, whose arguments the ops have checked."""

from __future__ import annotations

import torch
from torch import Tensor

from .._matmul import MAX_DIMS
from ..codes import DTYPE
from . import module, where


def dropout(input: Tensor, seed: Tensor, p: float, out: Tensor | None = None) -> Tensor:
    """input / (1 - p) where an element is kept, else 0; ``out`` may be ``input``. The seed is read on the device."""
    if out is None:
        out = torch.empty_like(input)
    seed = seed.to(input.device)  # where it is, unless the caller drew it elsewhere
    # More dimensions than the kernel counts are copied.
    x, y = (input, out) if input.dim() <= MAX_DIMS else (input.reshape(-1), out.reshape(-1))
    module().dropout(
        x.data_ptr(),
        y.data_ptr(),
        x.shape,
        x.stride(),
        y.stride(),
        DTYPE[x.dtype],
        seed.data_ptr(),
        p,
        **where(x),
    )
    return out if y.data_ptr() == out.data_ptr() else out.copy_(y.view(out.shape))
