"""softmax and log_softmax on plain CUDA tensors without zero sizes, whose shapes the ops have checked."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._matmul import MAX_DIMS
from ..codes import DTYPE
from . import module, where


def softmax(input: Tensor, dim: int, log: bool, out: Tensor | None = None) -> Tensor:
    """Along ``dim``, counted from 0; contiguous, or written to ``out``, which may be ``input``."""
    if out is None:
        out = input.new_empty(input.shape)
    shape, dim, (x, y) = _few_dims(dim, input, out)
    module().softmax(
        shape, DTYPE[input.dtype], log, dim, (x.data_ptr(), x.stride()), (y.data_ptr(), y.stride()), **where(input)
    )
    return out if y.data_ptr() == out.data_ptr() else out.copy_(y.view(out.shape))


def softmax_backward(grad: Tensor, saved: Tensor, dim: int, log: bool) -> Tensor:
    """The gradient by the input, from the result ``saved``; contiguous."""
    out = saved.new_empty(saved.shape)
    shape, dim, tensors = _few_dims(dim, grad, saved, out)
    module().softmax_backward(
        shape, DTYPE[saved.dtype], log, dim, *((t.data_ptr(), t.stride()) for t in tensors), **where(saved)
    )
    return out


def _few_dims(dim: int, *tensors: Tensor) -> tuple[torch.Size, int, tuple[Tensor, ...]]:
    """Tensors of one shape, and its dimension ``dim``, as the kernels' loops take them; others pay for copies."""
    shape = tensors[0].shape
    if len(shape) <= MAX_DIMS:
        return shape, dim, tensors
    few = torch.Size((math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])))
    return few, 1, tuple(tensor.reshape(few) for tensor in tensors)
