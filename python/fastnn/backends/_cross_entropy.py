"""What the cross entropies of CPUs and GPUs have in common."""

from __future__ import annotations

import torch
from torch import Tensor

#: The codes of the kernels.
REDUCTION = {"none": 0, "mean": 1, "sum": 2}


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def targets(x: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The probabilities or the indices as the kernels read them, and the weights."""
    weights = None if weight is None else weight.to(wide(x.dtype)).contiguous()
    if target.is_floating_point():
        return target, None, weights
    return None, target.to(torch.int64).contiguous(), weights


def result_shape(x: Tensor, reduction: str) -> tuple[int, ...]:
    return (x.shape[0], *x.shape[2:]) if reduction == "none" else ()


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def operand(x: Tensor | None) -> tuple[int, tuple[int, ...]] | None:
    return None if x is None else (x.data_ptr(), x.stride())
