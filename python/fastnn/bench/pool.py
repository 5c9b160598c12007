"""Pooling of images: what has to be read and written, in bytes, against the bandwidth of a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import fastnn

from .benchmark import Benchmark, Problem, register

Pool = Callable[[Any, torch.Tensor], torch.Tensor]


def _build(
    pool: Pool, train: bool, memory_format: torch.memory_format
) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        output = pool(F, torch.empty(shape, device="meta"))

        def inputs() -> tuple[Any, ...]:
            x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
            grad = torch.randn(output.shape).to(dtype).contiguous(memory_format=memory_format)
            return (x.requires_grad_(train), grad)

        def call(functions: Any) -> Callable[..., Any]:
            def forward(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
                return pool(functions, x)

            def forward_and_backward(x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
                y = pool(functions, x)
                return (y, *torch.autograd.grad(y, x, grad))

            return forward_and_backward if train else forward

        moved = 1.0 * dtype.itemsize * (output.numel() + torch.Size(shape).numel())
        contestants = {"fastnn": call(fastnn.functional), "torch": call(F)}
        return Problem(inputs, contestants, moved * (2 if train else 1), unit="B", peak="copy", beyond_cache=True)

    return build


_SHAPES = ((8, 64, 112, 112), (16, 512, 14, 14))

for _name, _pool in (
    ("max_pool2d_2x2", lambda f, x: f.max_pool2d(x, 2)),
    ("max_pool2d_3x3", lambda f, x: f.max_pool2d(x, 3, 2, 1)),
    ("avg_pool2d_2x2", lambda f, x: f.avg_pool2d(x, 2)),
    ("adaptive_avg_pool2d_1", lambda f, x: f.adaptive_avg_pool2d(x, 1)),
):
    for _layout, _format in (("", torch.contiguous_format), ("_channels_last", torch.channels_last)):
        for _train in (False, True):
            _full = f"{_name}{_layout}{'_train' if _train else ''}"
            register(Benchmark(_full, "NxCxHxW", _SHAPES, _build(_pool, _train, _format)))
