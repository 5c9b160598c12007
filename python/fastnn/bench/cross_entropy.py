"""Cross entropy of N rows of C logits, and of a linear layer's N×C logits from K features, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import fastnn

from .benchmark import Benchmark, Problem, register

_Function = Callable[..., torch.Tensor]


def _train(function: _Function) -> Callable[..., tuple[torch.Tensor, ...]]:
    def call(*args: Any) -> tuple[torch.Tensor, ...]:
        leaves = [t for t in args if t.requires_grad]
        loss = function(*args)
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    return call


def _cross_entropy(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    rows, classes = shape
    return Problem(
        lambda: (torch.randn(shape).to(dtype).requires_grad_(), torch.randint(classes, (rows,))),
        {"fastnn": _train(fastnn.functional.cross_entropy), "torch": _train(F.cross_entropy)},
        3.0 * rows * classes * dtype.itemsize,
        unit="B",
        peak="copy",
    )


def _in_two(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


def _linear_cross_entropy(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    rows, classes, features = shape

    def inputs() -> tuple[Any, ...]:
        x = torch.randn(rows, features).to(dtype).requires_grad_()
        weight = (torch.randn(classes, features) / features**0.5).to(dtype).requires_grad_()
        return x, weight, torch.randint(classes, (rows,))

    contestants = {"fastnn": _train(fastnn.functional.linear_cross_entropy), "torch": _train(_in_two)}
    if hasattr(F, "linear_cross_entropy"):
        chunks = torch.nn.LinearCrossEntropyOptions()
        contestants["torch chunked"] = _train(lambda *args: F.linear_cross_entropy(*args, options=chunks))
    return Problem(inputs, contestants, 6.0 * rows * classes * features)


register(Benchmark("cross_entropy", "NxC", ((1024, 32000), (4096, 1000), (64, 10)), _cross_entropy))
register(Benchmark("linear_cross_entropy", "NxCxK", ((1024, 32000, 768),), _linear_cross_entropy))
