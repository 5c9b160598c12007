"""Convolutions. Shapes are N (images) × C (channels) × the spatial sizes × M (filters) × K (the edge of a filter) × S (the
stride), with a padding of K/2; 2·N·M·C·(taps)·(positions) operations.

Both contestants are timed contiguous and channels-last; what is converted is converted before."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import fastnn

from .benchmark import Benchmark, Problem, register
from .gemm import PEAKS

_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}

Build = Callable[[tuple[int, ...], torch.dtype], Problem]


def _both_layouts(rank: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if rank not in _LAST:
        return tensors
    return (*tensors, *(tensor.contiguous(memory_format=_LAST[rank]) for tensor in tensors))


def _contestants(rank: int, ours: Callable[..., Any], theirs: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Of (x, w), called with those and with their channels-last copies."""
    found: dict[str, Callable[..., Any]] = {"fastnn": lambda x, w, *_: ours(x, w)}
    if rank in _LAST:
        found["fastnn channels_last"] = lambda *t: ours(*t[2:])
    found["torch"] = lambda x, w, *_: theirs(x, w)
    if rank in _LAST:
        found["torch channels_last"] = lambda *t: theirs(*t[2:])
    return found


def _build(rank: int, name: str, depthwise: bool = False, train: bool = False) -> Build:
    transposed = "transpose" in name

    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        n, c, *size = shape[: 2 + rank]
        *m, k, s = shape[2 + rank :]
        filters = c if depthwise else m[0]
        options: dict[str, Any] = {"stride": s, "padding": k // 2, "groups": c if depthwise else 1}
        kernel = (k,) * rank
        weight = (c, filters, *kernel) if transposed else (filters, c // options["groups"], *kernel)
        bias = torch.randn(filters).to(dtype)

        def inputs() -> tuple[torch.Tensor, ...]:
            x, w = torch.randn(n, c, *size).to(dtype), torch.randn(weight).to(dtype)
            return tuple(t.requires_grad_(train) for t in _both_layouts(rank, x, w))

        def run(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
            def once(x: torch.Tensor, w: torch.Tensor) -> Any:
                y = function(x, w, bias, **options)
                if not train:
                    return y
                return y, *torch.autograd.grad(y, (x, w), torch.ones_like(y))

            return once

        positions = math.prod(size) if transposed else math.prod((l + 2 * (k // 2) - k) // s + 1 for l in size)
        return Problem(
            inputs,
            _contestants(rank, run(getattr(fastnn.functional, name)), run(getattr(F, name))),
            2.0 * n * positions * math.prod(weight) * (3 if train else 1),
            peak=PEAKS[dtype],
        )

    return build


_SPATIAL = ("L", "HxW", "DxHxW")
_SHAPES = (
    ((8, 64, 1024, 64, 3, 1), (8, 128, 1024, 256, 5, 2)),
    ((1, 64, 56, 56, 64, 3, 1), (8, 128, 28, 28, 128, 3, 1), (1, 256, 14, 14, 1024, 1, 1), (1, 3, 224, 224, 64, 7, 2)),
    ((1, 32, 16, 28, 28, 32, 3, 1), (1, 64, 8, 14, 14, 128, 3, 2)),
)

for _rank in (1, 2, 3):
    _axes = f"NxCx{_SPATIAL[_rank - 1]}xMxKxS"
    register(Benchmark(f"conv{_rank}d", _axes, _SHAPES[_rank - 1], _build(_rank, f"conv{_rank}d")))
    register(
        Benchmark(
            f"conv_transpose{_rank}d",
            _axes,
            tuple((*shape[:-2], 4, 2) for shape in _SHAPES[_rank - 1][:2]),
            _build(_rank, f"conv_transpose{_rank}d"),
        )
    )
register(
    Benchmark(
        "conv2d_depthwise",
        "NxCxHxWxKxS",
        ((1, 128, 56, 56, 3, 1), (1, 128, 56, 56, 3, 2)),
        _build(2, "conv2d", depthwise=True),
    )
)
register(Benchmark("conv2d_train", "NxCxHxWxMxKxS", _SHAPES[1][:2], _build(2, "conv2d", train=True)))
