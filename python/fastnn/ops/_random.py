"""Where random masks begin: a seed from torch's own generator, from which kernels count (src/cpp/common/philox.hpp)."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_seed(device: torch.device | str = "cpu") -> Tensor:
    """An int64 scalar of 63 random bits, drawn from torch's default generator of the device.

    So torch.manual_seed repeats a mask, and whoever saves and restores the generator's state, such as
    torch.utils.checkpoint, gets it again. Tracers record the draw, not the number; torch.vmap asks for its ``randomness``.
    """
    return torch.randint((1 << 63) - 1, (), dtype=torch.int64, device=device)
