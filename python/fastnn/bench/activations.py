"""The elementwise activations; the shape is the count of elements, each read once and written once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

import fastnn

from .benchmark import Benchmark, Problem, register


def _elementwise(
    ours: Callable[..., torch.Tensor], theirs: Callable[..., torch.Tensor]
) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        (n,) = shape
        return Problem(
            lambda: (torch.randn(n).to(dtype),),
            {"fastnn": ours, "torch": theirs},
            2.0 * n * dtype.itemsize,
            unit="B",
            peak="copy",
            beyond_cache=True,
        )

    return build


# 64 MB of float32, and one that stays in the cache of a core.
_SIZES = ((16 << 20,), (64 << 10,))

for _name, _theirs in (
    ("relu", F.relu),
    ("relu6", F.relu6),
    ("gelu", F.gelu),
    ("silu", F.silu),
    ("sigmoid", torch.sigmoid),
    ("tanh", torch.tanh),
):
    register(Benchmark(_name, "N", _SIZES, _elementwise(getattr(fastnn.functional, _name), _theirs)))
