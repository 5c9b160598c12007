"""Pooling. A maximum is one of its inputs, exactly; an average rounds once for each element of its window."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .case import FLOATS, Case, Sample, register
from .inputs import Maker

#: Spatial sizes around the widths of vectors, and windows (kernel, stride, padding) that overlap, tile and leave gaps.
_SIZES = {1: ((5,), (17,), (67,)), 2: ((5, 3), (8, 17), (13, 33)), 3: ((3, 5, 4), (4, 7, 17))}
_WINDOWS = ((2, 2, 0), (3, 2, 1), (3, 1, 1), (2, 3, 1))


def _fixed(dims: int) -> Callable[[Maker], Iterator[Sample]]:
    def samples(make: Maker) -> Iterator[Sample]:
        for size in _SIZES[dims]:
            for kernel, stride, padding in _WINDOWS:
                arguments = {"stride": stride, "padding": padding}
                yield Sample((make(2, 3, *size), kernel), {**arguments, "ceil_mode": True})
            yield Sample((make(17, *size), min(size)), {})
        yield Sample((make(0, 3, *_SIZES[dims][0]), 2), {})

    return samples


def _adaptive(dims: int) -> Callable[[Maker], Iterator[Sample]]:
    def samples(make: Maker) -> Iterator[Sample]:
        for size in _SIZES[dims]:
            for output in (1, 2, 3, 7):
                yield Sample((make(2, 3, *size), output), {})
            yield Sample((make(17, *size), 1), {})

    return samples


def _of_result(result: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return result.abs()


def _elements(x: torch.Tensor, *_: Any, **__: Any) -> int:
    return math.prod(x.shape[1:])


def _register_all() -> None:
    for dims in (1, 2, 3):
        for name, samples in ((f"max_pool{dims}d", _fixed(dims)), (f"adaptive_max_pool{dims}d", _adaptive(dims))):
            peer = getattr(F, name)
            register(
                Case(name, peer, samples, _of_result, lambda *_, **__: 0, f"fastnn.functional:{name}", product=False)
            )
        for name, samples in ((f"avg_pool{dims}d", _fixed(dims)), (f"adaptive_avg_pool{dims}d", _adaptive(dims))):
            peer = getattr(F, name)

            def of_sum(
                result: torch.Tensor, x: torch.Tensor, *args: Any, _peer: Any = peer, **kwargs: Any
            ) -> torch.Tensor:
                return _peer(x.abs(), *args, **kwargs)

            register(
                Case(
                    name,
                    peer,
                    samples,
                    of_sum,
                    _elements,
                    f"fastnn.functional:{name}",
                    # torch has no kernel of avg_pool3d for the half types to compare with.
                    dtypes=FLOATS[:2] if name == "avg_pool3d" else FLOATS,
                    exact=False,
                    product=False,
                )
            )


_register_all()
