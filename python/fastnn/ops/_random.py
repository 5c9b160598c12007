"""Where random masks begin: a seed from torch's own generator, from which kernels count (src/cpp/common/philox.hpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._route import PLAIN, is_dynamo_compiling


def draw_seed(device: torch.device | str = "cpu", generator: torch.Generator | None = None) -> Tensor:
    """An int64 scalar of 63 random bits, drawn from ``generator``, or from torch's default one of the device.

    So torch.manual_seed repeats a mask, and whoever saves and restores the generator's state, such as
    torch.utils.checkpoint, gets it again. Tracers record the draw, not the number; torch.vmap asks for its ``randomness``.
    """
    return torch.randint((1 << 63) - 1, (), dtype=torch.int64, device=device, generator=generator)


def no_seed() -> Tensor:
    """For masks that no number decides. torch draws none for these either."""
    return torch.zeros((), dtype=torch.int64)


def seed_for(input: Tensor, p: float) -> Tensor:
    """A seed for dropout with probability ``p``."""
    return input.new_zeros((), dtype=torch.int64) if p == 1 else seed_like(input)


def seed_like(input: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A seed of the input's kind: outside of its mode a fake tensor mixes with fake ones alone."""
    seed = draw_seed(input.device, generator)
    if is_dynamo_compiling() or (type(seed) in PLAIN) == (type(input) in PLAIN):
        return seed
    return input.new_empty((), dtype=torch.int64).random_(generator=generator)
