"""The memory format that torch's kernels read off a tensor's strides."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format


def _suggest_memory_format(x: Tensor) -> torch.memory_format:
    order = {4: (1, 3, 2, 0), 5: (1, 4, 3, 2, 0)}.get(x.dim())
    if order is None or x.layout != torch.strided:
        return torch.contiguous_format
    from torch.fx.experimental.symbolic_shapes import guard_size_oblivious as known

    shape, strides = x.shape, x.stride()
    if known(strides[1] == 0):
        return torch.contiguous_format
    least = 0
    for d in order:
        if known(shape[d] == 0) or known(strides[d] < least) or (d == 0 and known(least == strides[1])):
            return torch.contiguous_format
        least = strides[d] * shape[d]
    return torch.channels_last if len(shape) == 4 else torch.channels_last_3d


# torch 2.6 and 2.8 have another rule in Python than in their kernels: a dimension of stride 1 counts as one of size 1.
if suggest_memory_format(torch.empty_strided((1, 2, 2, 1), (4, 1, 2, 1), device="meta")) is torch.channels_last:
    suggest_memory_format = _suggest_memory_format
