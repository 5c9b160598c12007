"""Embedding and rotary position embedding on plain CPU tensors, whose arguments the ops have checked."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _cpu
from . import DTYPE, empty, empty_like


def empty_rows(indices: Tensor, weight: Tensor) -> Tensor:
    return empty((*indices.shape, weight.shape[1]), weight.dtype)


def empty_gradient(grad: Tensor, rows: int) -> Tensor:
    return empty((rows, grad.shape[-1]), grad.dtype)


def _raise() -> None:
    raise IndexError("index out of range in self")


def embedding(weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    """weight[indices]; the last two arguments are for the gradient. IndexError for an index that there is no row for."""
    out = empty_rows(indices, weight)
    indices = indices.contiguous()
    found = _cpu.embedding(
        DTYPE[weight.dtype],
        weight.data_ptr(),
        *weight.shape,
        *weight.stride(),
        indices.data_ptr(),
        indices.numel(),
        indices.dtype is torch.int64,
        out.data_ptr(),
    )
    return out if found else _raise()


def embedding_backward(
    grad: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    """The gradient of a weight of so many rows."""
    columns = grad.shape[-1]
    rows = grad.reshape(indices.numel(), columns)
    if columns > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    indices = indices.contiguous()
    out = empty((num_weights, columns), grad.dtype)
    found = _cpu.embedding_backward(
        DTYPE[grad.dtype],
        rows.data_ptr(),
        rows.stride(0),
        indices.data_ptr(),
        indices.numel(),
        indices.dtype is torch.int64,
        num_weights,
        columns,
        padding_idx,
        scale_grad_by_freq,
        out.data_ptr(),
    )
    return out if found else _raise()


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool) -> Tensor:
    """x (..., D) turned by cos and sin, of as many dimensions, that broadcast to (..., D) or (..., D/2)."""
    out = empty_like(x)
    if out.stride(-1) != 1 and x.shape[-1] > 1:
        out = empty(x.shape, x.dtype)
    width = cos.shape[-1]

    def operand(t: Tensor, size: int) -> tuple[int, tuple[int, ...]]:
        return t.data_ptr(), t.expand(*x.shape[:-1], size).stride()

    def dense(t: Tensor) -> Tensor:
        return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()

    x, cos, sin = dense(x), dense(cos), dense(sin)
    size = x.shape[-1]
    _cpu.rotary(
        DTYPE[x.dtype],
        DTYPE[cos.dtype],
        tuple(x.shape),
        (x.data_ptr(), x.stride()),
        (out.data_ptr(), out.stride()),
        operand(cos, width),
        operand(sin, width),
        width != size,
        interleaved,
        transposed,
    )
    return out
