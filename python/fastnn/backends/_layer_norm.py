"""What layer norm and rms norm on GPUs have in common, in CUDA C++ and in Triton: how their tensors are seen as rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._matmul import MAX_DIMS
from .cpu.layer_norm import is_contiguous_result


def rows(dims: int, *tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape with the last ``dims`` dimensions as one. Where these do not lie one behind the other, or there are
    more dimensions than the kernel counts, this is a copy."""
    outer = tensors[0].shape[: tensors[0].dim() - dims]
    outer = outer if len(outer) < MAX_DIMS else (math.prod(outer),)
    n = math.prod(tensors[0].shape[tensors[0].dim() - dims :])
    return [tensor.reshape(*outer, n) for tensor in tensors]


def laid_out(result: Tensor, input: Tensor, centered: bool) -> Tensor:
    return result if is_contiguous_result(input, centered) else torch.empty_like(input).copy_(result)
