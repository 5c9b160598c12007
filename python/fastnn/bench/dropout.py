"""Dropout in training with p = 0.1; the shape is the count of elements, each read once and written once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import fastnn

from .benchmark import Benchmark, Problem, register

#: The masks are drawn apart, so that of the results little more than shape, dtype and size can be compared: two with
#: p = 0.1 differ by about √0.2 of it. tests/ops/test_dropout.py says which elements stay.
_APART = 2.0


def _forward(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    return lambda x, grad: function(x, 0.1)


def _forward_and_backward(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def call(x: torch.Tensor, grad: torch.Tensor) -> Any:
        y = function(x, 0.1)
        return (y, *torch.autograd.grad(y, x, grad))

    return call


def _build(train: bool) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        (n,) = shape
        call = _forward_and_backward if train else _forward
        return Problem(
            lambda: (torch.randn(n).to(dtype).requires_grad_(train), torch.randn(n).to(dtype)),
            {"fastnn": call(fastnn.functional.dropout), "torch": call(F.dropout)},
            (4.0 if train else 2.0) * n * dtype.itemsize,
            unit="B",
            peak="copy",
            tolerance=_APART,
        )

    return build


_SIZES = ((4096 * 768,), (8 * 128 * 768,))
register(Benchmark("dropout", "N", _SIZES, _build(False)))
register(Benchmark("dropout_train", "N", _SIZES, _build(True)))
