"""Embedding of N indices in a table V×D, and rotary position embedding of B×H×L×D: what is read and written, in bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import fastnn

from ..testing.embedding import rotary_embedding
from .benchmark import Benchmark, Problem, register


def _embedding(train: bool) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        rows, columns, count = shape

        def inputs() -> tuple[Any, ...]:
            weight = torch.randn(rows, columns).to(dtype).requires_grad_(train)
            return torch.randint(rows, (count,)), weight, torch.randn(count, columns).to(dtype)

        def call(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
            def forward(indices: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> Any:
                return function(indices, weight)

            def forward_and_backward(indices: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> Any:
                y = function(indices, weight)
                return (y, *torch.autograd.grad(y, weight, grad))

            return forward_and_backward if train else forward

        contestants = {"fastnn": call(fastnn.functional.embedding), "torch": call(F.embedding)}
        moved = 2.0 * count * columns + (rows * columns + count * columns if train else 0)
        return Problem(inputs, contestants, moved * dtype.itemsize, unit="B", peak="copy")

    return build


def _rotary(train: bool) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        *_, length, size = shape

        def inputs() -> tuple[Any, ...]:
            angles = torch.arange(length).unsqueeze(1) * 10_000 ** (-torch.arange(0, size, 2) / size)
            angles = torch.cat((angles, angles), -1)
            x, grad = (torch.randn(shape).to(dtype) for _ in range(2))
            return x.requires_grad_(train), angles.cos().to(dtype), angles.sin().to(dtype), grad

        def call(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
            def forward(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, grad: torch.Tensor) -> Any:
                return function(x, cos, sin)

            def forward_and_backward(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, grad: torch.Tensor) -> Any:
                y = function(x, cos, sin)
                return (y, *torch.autograd.grad(y, x, grad))

            return forward_and_backward if train else forward

        contestants = {"fastnn": call(fastnn.functional.rotary_embedding), "torch": call(rotary_embedding)}
        moved = (4.0 if train else 2.0) * torch.Size(shape).numel() * dtype.itemsize
        return Problem(inputs, contestants, moved, unit="B", peak="copy")

    return build


_TABLES = ((32_000, 768, 1024), (50_257, 768, 8192))
_HEADS = ((1, 16, 2048, 64), (1, 32, 1, 128))
for _train, _suffix in ((False, ""), (True, "_train")):
    register(Benchmark(f"embedding{_suffix}", "VxDxN", _TABLES, _embedding(_train)))
    register(Benchmark(f"rotary_embedding{_suffix}", "BxHxLxD", _HEADS, _rotary(_train)))
