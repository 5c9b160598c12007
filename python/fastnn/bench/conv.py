"""Convolutions. Shapes are N (images) × C (channels) × the spatial sizes × M (filters) × K (the edge of a filter) × S (the
stride), with a padding of K/2; 2·N·M·C·(taps)·(positions) operations for the result, and as many for each gradient.

fastnn and torch are each timed contiguous and channels-last, or in the one layout that a benchmark is named after; what is
converted is converted before."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import fastnn

from .benchmark import Benchmark, Problem, register
from .gemm import PEAKS

Build = Callable[[tuple[int, ...], torch.dtype], Problem]
#: What is added to a contestant's name, and the layout it stands for.
Formats = dict[str, torch.memory_format]

_CONTIGUOUS: Formats = {"": torch.contiguous_format}
_CHANNELS_LAST: Formats = {" channels_last": torch.channels_last}
_FORMATS: dict[int, Formats] = {
    1: _CONTIGUOUS,
    2: _CONTIGUOUS | _CHANNELS_LAST,
    3: _CONTIGUOUS | {" channels_last": torch.channels_last_3d},
}


class _Layer:
    """The operands of one convolution, the options of its call, and the operations it takes."""

    def __init__(self, rank: int, name: str, depthwise: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        n, c, *size = shape[: 2 + rank]
        *m, k, s = shape[2 + rank :]
        transposed = "transpose" in name
        self.dtype = dtype
        self.functions = {"fastnn": getattr(fastnn.functional, name), "torch": getattr(F, name)}
        self.filters = c if depthwise else m[0]
        self.options: dict[str, Any] = {"stride": s, "padding": k // 2, "groups": c if depthwise else 1}
        self.input = (n, c, *size)
        first, second = (c, self.filters) if transposed else (self.filters, c // self.options["groups"])
        self.weight = (first, second, *(k,) * rank)
        positions = math.prod(size) if transposed else math.prod((l + 2 * (k // 2) - k) // s + 1 for l in size)
        self.work = 2.0 * n * positions * math.prod(self.weight)

    def operands(self, formats: Formats) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Input and filters, the same numbers in each layout."""
        x, w = torch.randn(self.input).to(self.dtype), torch.randn(self.weight).to(self.dtype)
        return {form: (x.to(memory_format=f), w.to(memory_format=f)) for form, f in formats.items()}


def _forward(
    rank: int, name: str, depthwise: bool = False, train: bool = False, formats: Formats | None = None
) -> Build:
    """With `train`, the gradients of input and filters as well."""
    formats = formats or _FORMATS[rank]

    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        layer = _Layer(rank, name, depthwise, shape, dtype)
        bias = torch.randn(layer.filters).to(dtype)

        def inputs() -> tuple[Any, ...]:
            return ({form: [t.requires_grad_(train) for t in pair] for form, pair in layer.operands(formats).items()},)

        def run(who: str, form: str) -> Callable[..., Any]:
            function = layer.functions[who]

            def call(operands: dict[str, Any]) -> Any:
                x, w = operands[form]
                y = function(x, w, bias, **layer.options)
                return (y, *torch.autograd.grad(y, (x, w), torch.ones_like(y))) if train else y

            return call

        contestants = {who + form: run(who, form) for who in layer.functions for form in formats}
        return Problem(inputs, contestants, layer.work * (3 if train else 1), peak=PEAKS[dtype])

    return build


def _backward(name: str, of: tuple[int, ...], depthwise: bool = False, formats: Formats = _FORMATS[2]) -> Build:
    """The gradients alone, of the input (0 in `of`), the filters (1) or both."""

    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        layer = _Layer(2, name, depthwise, shape, dtype)

        def inputs() -> tuple[Any, ...]:
            graphs = {}
            grad = None
            for form, pair in layer.operands(formats).items():
                leaves = [pair[i].requires_grad_() for i in of]
                for who, function in layer.functions.items():
                    y = function(*pair, **layer.options)
                    grad = torch.randn(y.shape).to(dtype) if grad is None else grad
                    graphs[who + form] = (y, leaves, grad.to(memory_format=formats[form]))
            return (graphs,)

        def run(contestant: str) -> Callable[..., Any]:
            def call(graphs: dict[str, Any]) -> Any:
                y, leaves, grad = graphs[contestant]
                return torch.autograd.grad(y, leaves, grad, retain_graph=True)

            return call

        contestants = {who + form: run(who + form) for who in layer.functions for form in formats}
        return Problem(inputs, contestants, layer.work * len(of), peak=PEAKS[dtype])

    return build


_SPATIAL = ("L", "HxW", "DxHxW")
_SHAPES = (
    ((8, 64, 1024, 64, 3, 1), (8, 128, 1024, 256, 5, 2)),
    ((1, 64, 56, 56, 64, 3, 1), (8, 128, 28, 28, 128, 3, 1), (1, 256, 14, 14, 1024, 1, 1), (1, 3, 224, 224, 64, 7, 2)),
    ((1, 32, 16, 28, 28, 32, 3, 1), (1, 64, 8, 14, 14, 128, 3, 2)),
)
_DEPTHWISE_SHAPES = ((1, 128, 56, 56, 3, 1), (1, 128, 56, 56, 3, 2))

for _rank in (1, 2, 3):
    _axes = f"NxCx{_SPATIAL[_rank - 1]}xMxKxS"
    register(Benchmark(f"conv{_rank}d", _axes, _SHAPES[_rank - 1], _forward(_rank, f"conv{_rank}d")))
    register(
        Benchmark(
            f"conv_transpose{_rank}d",
            _axes,
            tuple((*shape[:-2], 4, 2) for shape in _SHAPES[_rank - 1][:2]),
            _forward(_rank, f"conv_transpose{_rank}d"),
        )
    )

_AXES, _DEPTHWISE_AXES = "NxCxHxWxMxKxS", "NxCxHxWxKxS"
_BOTH, _FILTERS = (0, 1), (1,)


def _register(name: str, build: Build, shapes: tuple[tuple[int, ...], ...], axes: str = _AXES) -> None:
    register(Benchmark(name, axes, shapes, build))


_register("conv2d_train", _forward(2, "conv2d", train=True), _SHAPES[1][:2])
_register("conv2d_depthwise", _forward(2, "conv2d", depthwise=True), _DEPTHWISE_SHAPES, _DEPTHWISE_AXES)
for _layout, _formats in (("contiguous", _CONTIGUOUS), ("channels_last", _CHANNELS_LAST)):
    _register(f"conv2d_{_layout}", _forward(2, "conv2d", formats=_formats), _SHAPES[1])
    _register(
        f"conv2d_depthwise_{_layout}",
        _forward(2, "conv2d", depthwise=True, formats=_formats),
        _DEPTHWISE_SHAPES,
        _DEPTHWISE_AXES,
    )
_register(
    "conv2d_backward_contiguous", _backward("conv2d", _BOTH, formats=_CONTIGUOUS), ((8, 256, 14, 14, 1024, 1, 1),)
)
_register("conv2d_weight_gradient", _backward("conv2d", _FILTERS), ((8, 3, 224, 224, 64, 7, 2),))
_register(
    "conv2d_depthwise_weight_gradient",
    _backward("conv2d", _FILTERS, depthwise=True),
    tuple((8, 96, 56, 56, k, 1) for k in (3, 5, 7)),
    _DEPTHWISE_AXES,
)
