"""A batch norm folded into the filters before it (w · γ / √(σ² + ε), and a bias to match; Jacob et al. 2018, arXiv:1712.05877,
section 3.2)."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


def fold_batch_norm(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    layout: torch.memory_format,
) -> tuple[Tensor, Tensor]:
    """The filters and bias that do what the convolution and the batch norm after it do, computed in float64."""
    scale = (var.detach().double() + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma.detach()
    shift = -mean.detach().double() if bias is None else bias.detach() - mean.detach().double()
    shift = shift * scale if beta is None else shift * scale + beta.detach()
    # Filter by filter: all of them in float64 would be twice their memory more.
    filters = empty_filters(weight, layout)
    for source, factor, target in zip(weight.detach(), scale, filters, strict=True):
        target.copy_(source.double() * factor)
    return filters, shift.to(weight.dtype)


def empty_filters(like: Tensor, layout: torch.memory_format) -> Tensor:
    """torch.empty_like, in memory that goes back to the system with the tensor: malloc would keep it."""
    if not like.is_cpu or like.numel() == 0:
        return torch.empty_like(like, memory_format=layout)
    strides = torch.empty_like(like, device="meta", memory_format=layout).stride()
    memory = mmap.mmap(-1, like.numel() * like.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, strides)
