"""Dropout with a given seed: which elements stay is exact, and what stays is rounded twice."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..backends.reference import dropout as formulas
from .case import Case, Sample, register
from .inputs import Maker


def dropout(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """x times a mask in x's dtype, as torch computes it; the mask is the one that fastnn's words say."""
    kept = (formulas.words(seed, x.numel()) >= round(p * 2**32)).view(x.shape)
    return x * (kept.to(x.dtype) / (1 - p) if p < 1 else torch.zeros((), dtype=x.dtype, device=x.device))


def _samples(make: Maker) -> Iterator[Sample]:
    for number, shape in enumerate(((), (1,), (0,), (17,), (15, 31), (3, 5, 7), (2, 3, 64, 9), (1031,))):
        for p in (0.5, 0.1, 1.0):
            yield Sample((make(*shape), torch.tensor(12345 + number, device=make.device), p))


register(
    Case(
        "dropout",
        dropout,
        _samples,
        lambda result, *_: result.abs(),
        lambda *_: 2,
        "fastnn.ops.dropout:masked",
        exact=False,
        product=False,
    )
)
