"""Dropout on plain CPU tensors, whose arguments the ops have checked."""

from __future__ import annotations

from torch import Tensor

from ... import _cpu
from . import DTYPE, empty_like


def dropout(input: Tensor, seed: Tensor, p: float, out: Tensor | None = None) -> Tensor:
    """input / (1 - p) where an element is kept, else 0; ``out`` may be ``input``."""
    if out is None:
        out = empty_like(input)
    _cpu.dropout(
        input.data_ptr(),
        out.data_ptr(),
        input.shape,
        input.stride(),
        out.stride(),
        DTYPE[input.dtype],
        int(seed) & 0xFFFFFFFFFFFFFFFF,
        p,
    )
    return out
