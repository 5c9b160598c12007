"""Dropout in plain torch, from the same random words as the kernels: Philox4x32-10 (Salmon et al., SC 2011)."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def words(seed: Tensor, count: int) -> Tensor:
    """The 32 bits of elements 0 to count - 1, as int64: word e % 4 of counter e / 4, the key being the seed."""
    counter = torch.arange((count + 3) // 4, device=seed.device)
    seed = seed.to(torch.int64)
    c = [counter & _LOW, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
    k = [seed & _LOW, seed >> 32 & _LOW]
    for _ in range(10):
        # Products modulo 2^64 are right to the last bit, whatever their sign is taken for.
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [q >> 32 & _LOW ^ c[1] ^ k[0], q & _LOW, p >> 32 & _LOW ^ c[3] ^ k[1], p & _LOW]
        k = [k[0] + 0x9E3779B9 & _LOW, k[1] + 0xBB67AE85 & _LOW]
    return torch.stack(c, 1).flatten()[:count]


def dropout(input: Tensor, seed: Tensor, p: float, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """input * keep / (1 - p), where an element is kept whose word is no less than round(p 2^32)."""
    kept = (words(seed.to(input.device), input.numel()) >= int(p * 2**32 + 0.5)).view(input.shape)
    return (input.to(dtype) * (kept.to(dtype) * (1 / (1 - p) if p < 1 else 0.0))).to(input.dtype)
