"""Embedding and rotary position embedding in plain torch, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor


def _checked(indices: Tensor, rows: int) -> Tensor:
    if bool(((indices < 0) | (indices >= rows)).any()):
        raise IndexError("index out of range in self")
    return indices.long()


def embedding(weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    """weight[indices], whose gradient leaves the padding's row out, and is a mean with ``scale_grad_by_freq``."""
    indices = _checked(indices, weight.shape[0])
    if padding_idx >= 0:
        weight = torch.where((torch.arange(weight.shape[0]) == padding_idx).unsqueeze(1), weight.detach(), weight)
    if scale_grad_by_freq:
        frequency = counts(indices, weight.shape[0]).clamp(min=1).to(weight.dtype).unsqueeze(1)
        weight = weight.detach() + (weight - weight.detach()) / frequency
    return weight[indices]


def counts(indices: Tensor, rows: int) -> Tensor:
    """How often each row is asked for, as int64."""
    return torch.zeros(rows, dtype=torch.int64).index_add(
        0, indices.reshape(-1).long(), torch.ones(()).long().expand(indices.numel())
    )


def embedding_backward(
    grad: Tensor,
    indices: Tensor,
    num_weights: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Row r is the sum of the gradients of all places that hold r, or their mean; zero for the padding."""
    flat = _checked(indices, num_weights).reshape(-1)
    rows = grad.to(dtype).reshape(flat.numel(), grad.shape[-1])
    total = rows.new_zeros(num_weights, grad.shape[-1]).index_add(0, flat, rows)
    if scale_grad_by_freq:
        total = total / counts(flat, num_weights).clamp(min=1).to(dtype).unsqueeze(1)
    if padding_idx >= 0:
        total = total * (torch.arange(num_weights) != padding_idx).to(dtype).unsqueeze(1)
    return total.to(grad.dtype)


def turned(x: Tensor, interleaved: bool) -> Tensor:
    """(a, b) -> (-b, a) of the pairs of the last dimension: Hugging Face's rotate_half, or GPT-J's rotate_every_two."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def each(table: Tensor, size: int, interleaved: bool) -> Tensor:
    """cos or sin with a number for each element, from one with a number for each pair."""
    if table.shape[-1] == size:
        return table
    return table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    transposed: bool,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """x cos + turned(x) sin, or the transpose of that: x cos - turned(x sin)."""
    wide = x.to(dtype)
    c, s = (each(t.to(dtype), x.shape[-1], interleaved) for t in (cos, sin))
    result = wide * c - turned(wide * s, interleaved) if transposed else wide * c + turned(wide, interleaved) * s
    return result.to(x.dtype)
