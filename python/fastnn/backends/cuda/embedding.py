"""Embedding on plain CUDA tensors, whose arguments the ops have checked. An index that there is no row for is found on the
device: an error at the next call that waits for it, as torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codes import DTYPE
from . import module, where


def embedding(weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    """weight[indices]; the last two arguments are for the gradient."""
    out = weight.new_empty((*indices.shape, weight.shape[1]))
    indices = indices.contiguous()
    module().embedding(
        DTYPE[weight.dtype],
        weight.data_ptr(),
        *weight.shape,
        *weight.stride(),
        indices.data_ptr(),
        indices.numel(),
        indices.dtype is torch.int64,
        out.data_ptr(),
        **where(weight),
    )
    return out


def embedding_backward(
    grad: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    """The gradient of a weight of so many rows."""
    columns = grad.shape[-1]
    rows = grad.reshape(indices.numel(), columns)
    indices = indices.contiguous()
    out = grad.new_empty((num_weights, columns))
    workspace = grad.new_empty(module().embedding_workspace(indices.numel(), columns), dtype=torch.uint8)
    module().embedding_backward(
        DTYPE[grad.dtype],
        rows.data_ptr(),
        *rows.stride(),
        indices.data_ptr(),
        indices.numel(),
        indices.dtype is torch.int64,
        num_weights,
        columns,
        padding_idx,
        scale_grad_by_freq,
        out.data_ptr(),
        workspace.data_ptr(),
        **where(grad),
    )
    return out
