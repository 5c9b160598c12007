"""Batch normalization in training, an input N×C×H×W, contiguous and channels-last for fastnn and for torch; layer norm and
rms norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import fastnn

from .benchmark import Benchmark, Problem, register

_FORMATS = {"": torch.contiguous_format, " channels-last": torch.channels_last}


def _train(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> Any:
        return function(x, mean, var, weight, bias, True)

    return call


def _then_relu(*args: Any) -> torch.Tensor:
    return F.relu(F.batch_norm(*args))


def _forward(
    ours: Callable[..., torch.Tensor], theirs: Callable[..., torch.Tensor]
) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        inputs = _Inputs(shape, dtype)
        contestants = {}
        for name, function in (("fastnn", _train(ours)), ("torch", _train(theirs))):
            for form in _FORMATS:
                contestants[name + form] = lambda *sets, form=form, function=function: function(*sets[0][form])
        return Problem(lambda: (inputs(),), contestants, 2.0 * inputs.nbytes, unit="B", peak="copy")

    return build


def _backward(
    ours: Callable[..., torch.Tensor], theirs: Callable[..., torch.Tensor]
) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        inputs = _Inputs(shape, dtype)

        def run(graph: dict[str, Any], name: str) -> tuple[torch.Tensor, ...]:
            result, leaves, grad = graph[name]
            return torch.autograd.grad(result, leaves, grad, retain_graph=True)

        def graphs() -> tuple[dict[str, Any]]:
            made = {}
            grad = torch.randn(shape).to(dtype)
            for form, (x, weight, bias, _, _) in inputs().items():
                leaves = tuple(t.requires_grad_() for t in (x, weight, bias))
                for name, function in (("fastnn", ours), ("torch", theirs)):
                    result = function(x, None, None, weight, bias, True)
                    made[name + form] = (result, leaves, grad.to(memory_format=_FORMATS[form]))
            return (made,)

        contestants = {
            name + form: lambda graph, name=name + form: run(graph, name)
            for name in ("fastnn", "torch")
            for form in _FORMATS
        }
        return Problem(graphs, contestants, 3.0 * inputs.nbytes, unit="B", peak="copy")

    return build


class _Inputs:
    """Makes x, weight, bias, running mean and variance, the same numbers in each format."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.nbytes = torch.Size(shape).numel() * dtype.itemsize

    def __call__(self) -> dict[str, tuple[torch.Tensor, ...]]:
        channels = self.shape[1]
        x = torch.randn(self.shape).to(self.dtype)
        rest = tuple(torch.rand(channels).to(self.dtype) for _ in range(4))
        return {form: (x.to(memory_format=format), *rest) for form, format in _FORMATS.items()}


_SHAPES = ((32, 64, 56, 56), (32, 256, 14, 14))
_ours, _fused = fastnn.functional.batch_norm, fastnn.functional.batch_norm_act

register(Benchmark("batch_norm", "NxCxHxW", _SHAPES, _forward(_ours, F.batch_norm)))
register(Benchmark("batch_norm_relu", "NxCxHxW", _SHAPES, _forward(_fused, _then_relu)))
register(Benchmark("batch_norm_backward", "NxCxHxW", _SHAPES, _backward(_ours, F.batch_norm)))
# torch rounds between the two, so that in 16 bits its relu has other zeros.
_WIDE = (torch.float32, torch.float64)
register(Benchmark("batch_norm_relu_backward", "NxCxHxW", _SHAPES, _backward(_fused, _then_relu), _WIDE))


# ---- rows ----------------------------------------------------------------------------------------------------------


def _call(f: Any, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    if name == "layer_norm":
        return f.layer_norm(x, weight.shape, weight, bias)
    return f.rms_norm(x, weight.shape, weight)


def _rows(name: str) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        def inputs() -> tuple[torch.Tensor, ...]:
            return tuple(torch.randn(s).to(dtype) for s in (shape, shape[1:], shape[1:]))

        contestants = {
            "fastnn": lambda *args: _call(fastnn.functional, name, *args),
            "torch": lambda *args: _call(F, name, *args),
        }
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        return Problem(inputs, contestants, 2.0 * nbytes, unit="B", peak="copy")

    return build


def _rows_backward(name: str) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        def graphs() -> tuple[dict[str, Any]]:
            made = {}
            x, weight, bias, grad = (torch.randn(s).to(dtype) for s in (shape, shape[1:], shape[1:], shape))
            leaves = tuple(t.requires_grad_() for t in ((x, weight, bias) if name == "layer_norm" else (x, weight)))
            for contestant, f in (("fastnn", fastnn.functional), ("torch", F)):
                made[contestant] = (_call(f, name, x, weight, bias), leaves, grad)
            return (made,)

        def run(graph: dict[str, Any], contestant: str) -> tuple[torch.Tensor, ...]:
            result, leaves, grad = graph[contestant]
            return torch.autograd.grad(result, leaves, grad, retain_graph=True)

        contestants = {c: lambda graph, c=c: run(graph, c) for c in ("fastnn", "torch")}
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        return Problem(graphs, contestants, 3.0 * nbytes, unit="B", peak="copy")

    return build


_ROWS = ((4096, 4096), (4096, 768))
for _name in ("layer_norm", "rms_norm"):
    register(Benchmark(_name, "MxN", _ROWS, _rows(_name)))
    register(Benchmark(f"{_name}_backward", "MxN", _ROWS, _rows_backward(_name)))
