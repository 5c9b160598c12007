"""The convolutions and their transposes.

A result is a sum over the channels of a group and the taps of the filter, so that γ_K·(the same convolution of absolute
values) bounds its error, with K their number. Sizes are primes and the neighbours of the tiles' 14, 16 and 32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .case import Case, Sample, register
from .inputs import Maker

#: Batch (None: without one), channels of a group on either side, groups, three spatial sizes and filter sizes of which
#: an op takes the last, and the options.
_CONVS: list[tuple[int | None, int, int, int, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    (1, 1, 1, 1, (1, 1, 1), (1, 1, 1), {}),
    (2, 3, 5, 1, (3, 7, 17), (3, 3, 3), {"padding": 1}),
    (1, 16, 17, 1, (2, 5, 15), (2, 1, 3), {"stride": 2}),
    (3, 7, 4, 1, (2, 3, 11), (1, 1, 1), {}),
    (1, 2, 3, 2, (5, 6, 13), (2, 3, 3), {"dilation": 2, "padding": 2}),
    (2, 1, 1, 7, (3, 7, 8), (3, 3, 3), {"padding": 1}),
    (1, 31, 33, 1, (3, 5, 6), (1, 3, 5), {"padding": 3, "stride": 3}),
    (0, 2, 3, 1, (5, 5, 5), (3, 3, 3), {}),
    (None, 5, 2, 3, (4, 5, 9), (2, 2, 4), {"stride": 2, "padding": 1}),
    (1, 129, 13, 1, (2, 5, 7), (1, 3, 3), {"padding": (0, 1, 1)}),
]


def _finite(w: torch.Tensor) -> torch.Tensor:
    """In place and as it lies. What is not finite in the filter of a transposed convolution reaches other positions in
    fastnn, which multiplies the zeros around the input with it, than in torch, which does not."""
    (w[:1] if w.numel() and w.stride(0) == 0 else w).nan_to_num_(1.0, 1.0, 1.0)
    return w


def _samples(rank: int, transposed: bool) -> Callable[[Maker], Iterator[Sample]]:
    def samples(make: Maker) -> Iterator[Sample]:
        for number, (batch, channels, filters, groups, size, kernel, options) in enumerate(_CONVS):
            options = {name: n[3 - rank :] if isinstance(n, tuple) else n for name, n in options.items()}
            if transposed and options.get("stride", 1) > 1:
                options["output_padding"] = options["stride"] - 1
            if not transposed and number == 1:
                options["padding"] = "same"
            n = () if batch is None else (batch,)
            x = make(*n, channels * groups, *size[3 - rank :], reduced=-rank - 1)
            shape = (channels * groups, filters) if transposed else (filters * groups, channels)
            w = make(*shape, *kernel[3 - rank :], reduced=0 if transposed else 1)
            if transposed and w.is_floating_point():
                w = _finite(w)
            yield Sample((x, w) if number % 3 == 2 else (x, w, make(filters * groups)), {**options, "groups": groups})

    return samples


def _magnitude(peer: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def magnitude(result: torch.Tensor, *tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        return peer(*(tensor.abs() for tensor in tensors), **options)

    return magnitude


def _depth(transposed: bool) -> Callable[..., int]:
    def depth(x: torch.Tensor, w: torch.Tensor, *_: torch.Tensor, groups: int = 1, **__: Any) -> int:
        channels = w.shape[0] // groups if transposed else w.shape[1]
        return channels * math.prod(w.shape[2:]) + 1

    return depth


for _rank in (1, 2, 3):
    for _transposed in (False, True):
        _name = f"conv{'_transpose' if _transposed else ''}{_rank}d"
        _peer = getattr(F, _name)
        register(
            Case(
                _name,
                _peer,
                _samples(_rank, _transposed),
                _magnitude(_peer),
                _depth(_transposed),
                f"fastnn.functional:{_name}",
            )
        )
