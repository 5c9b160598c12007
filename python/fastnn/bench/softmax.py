"""softmax along the last dimension of a matrix: forward into fresh memory and into out, and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fastnn

from .benchmark import Benchmark, Problem, register

_Function = Callable[..., torch.Tensor]
_Build = Callable[[tuple[int, ...], torch.dtype], Problem]


def _bytes(shape: tuple[int, ...], dtype: torch.dtype, passes: int) -> float:
    return float(passes * torch.Size(shape).numel() * dtype.itemsize)


def _forward(ours: _Function, theirs: _Function) -> _Build:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        return Problem(
            lambda: (torch.randn(shape).to(dtype),),
            {"fastnn": lambda x: ours(x, -1), "torch": lambda x: theirs(x, -1)},
            _bytes(shape, dtype, 2),
            unit="B",
            peak="copy",
        )

    return build


def _into(ours: _Function, theirs: _Function) -> _Build:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        return Problem(
            lambda: (torch.randn(shape).to(dtype), torch.empty(shape, dtype=dtype)),
            {
                "fastnn": lambda x, out: ours(x, -1, out=out),
                "torch": lambda x, out: theirs(x, -1, out=out),
            },
            _bytes(shape, dtype, 2),
            unit="B",
            peak="copy",
        )

    return build


def _backward(ours: _Function, theirs: _Function) -> _Build:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        def graphs() -> tuple[Any, ...]:
            x = torch.randn(shape).to(dtype).requires_grad_()
            return x, torch.randn(shape).to(dtype), ours(x, -1), theirs(x, -1)

        def run(x: torch.Tensor, grad: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
            return torch.autograd.grad(result, x, grad, retain_graph=True)[0]

        return Problem(
            graphs,
            {
                "fastnn": lambda x, grad, mine, other: run(x, grad, mine),
                "torch": lambda x, grad, mine, other: run(x, grad, other),
            },
            _bytes(shape, dtype, 3),
            unit="B",
            peak="copy",
        )

    return build


_SHAPES = ((4096, 4096), (4096, 768))

for _name, _theirs in (("softmax", torch.softmax), ("log_softmax", torch.log_softmax)):
    _ours = getattr(fastnn.functional, _name)
    register(Benchmark(_name, "MxN", _SHAPES, _forward(_ours, _theirs)))
    register(Benchmark(f"{_name}_out", "MxN", _SHAPES, _into(_ours, _theirs)))
    register(Benchmark(f"{_name}_backward", "MxN", _SHAPES, _backward(_ours, _theirs)))
