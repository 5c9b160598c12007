"""Matrix products and linear layers. Shapes are M×N×K, with B in front for batches; 2·M·N·K operations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import fastnn

from .benchmark import Benchmark, Problem, register

#: The unit that a dtype's products run on at best.
PEAKS = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.bfloat16: "bf16",
    torch.float16: "f32",
    torch.int8: "int8",
    torch.uint8: "int8",
    torch.float8_e4m3fn: "bf16",
}


def _product(
    ours: Callable[..., torch.Tensor], theirs: Callable[..., torch.Tensor]
) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        *batch, m, n, k = shape
        mine, peers = (torch.empty(*batch, m, n, dtype=dtype) for _ in range(2))
        return Problem(
            inputs=lambda: (torch.randn(*batch, m, k).to(dtype), torch.randn(*batch, k, n).to(dtype)),
            contestants={
                "fastnn": ours,
                "fastnn out=": lambda a, b: ours(a, b, out=mine),
                "torch": theirs,
                "torch out=": lambda a, b: theirs(a, b, out=peers),
            },
            work=2.0 * m * n * k * (batch[0] if batch else 1),
            peak=PEAKS[dtype],
        )

    return build


def _linear(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    m, n, k = shape

    def inputs() -> tuple[Any, ...]:
        return torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)

    return Problem(inputs, {"fastnn": fastnn.functional.linear, "torch": F.linear}, 2.0 * m * n * k, peak=PEAKS[dtype])


def _pair(n: int, k: int, dtype: torch.dtype) -> tuple[torch.nn.Linear, torch.nn.Linear]:
    """fastnn's layer and torch's, of the same weights."""
    torchs = torch.nn.Linear(k, n, dtype=dtype)
    return fastnn.convert(copy.deepcopy(torchs)), torchs


def _layer(packed: bool) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        m, n, k = shape
        ours, torchs = _pair(n, k, dtype)
        for parameter in (*ours.parameters(), *torchs.parameters()):
            parameter.requires_grad_(False)
        if packed:
            fastnn.prepack_(ours)
        return Problem(
            lambda: (torch.randn(m, k).to(dtype),),
            {"fastnn": ours, "torch": torchs},
            2.0 * m * n * k,
            peak=PEAKS[dtype],
        )

    return build


def _step(layer: torch.nn.Linear, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Forward, and the gradients of weight, bias and input."""
    result = layer(x)
    return result, *torch.autograd.grad(result, (layer.weight, layer.bias, x), grad)


def _train(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    m, n, k = shape
    ours, torchs = _pair(n, k, dtype)
    return Problem(
        lambda: (torch.randn(m, k).to(dtype).requires_grad_(), torch.randn(m, n).to(dtype)),
        {"fastnn": lambda x, g: _step(ours, x, g), "torch": lambda x, g: _step(torchs, x, g)},
        6.0 * m * n * k,
        peak=PEAKS[dtype],
    )


def _with_grad(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    """The forward pass alone where gradients will be asked for: what a small layer costs in training."""
    m, n, k = shape
    ours, torchs = _pair(n, k, dtype)
    return Problem(
        lambda: (torch.randn(m, k).to(dtype),),
        {"fastnn": ours, "torch": torchs},
        2.0 * m * n * k,
        peak=PEAKS[dtype],
    )


def _int_mm(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    m, n, k = shape
    peers = torch.empty(m, n, dtype=torch.int32)

    def inputs() -> tuple[Any, ...]:
        return tuple(torch.randint(-128, 128, size, dtype=torch.int8) for size in ((m, k), (k, n)))

    return Problem(
        inputs,
        {
            "fastnn": fastnn.functional.int_mm,
            "torch": torch._int_mm,
            "torch out=": lambda a, b: torch._int_mm(a, b, out=peers),
        },
        2.0 * m * n * k,
        unit="OP",
        peak="int8",
    )


def _scaled_mm(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    """Of 8-bit floats, scaled as a whole, in bfloat16; B lies column by column, as torch wants it on GPUs."""
    m, n, k = shape

    def inputs() -> tuple[Any, ...]:
        return torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype).t(), torch.tensor(0.5), torch.tensor(0.25)

    def ours(a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor) -> torch.Tensor:
        return fastnn.functional.scaled_mm(a, b, scale_a, 0, scale_b, 0)

    def theirs(a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=torch.bfloat16)

    def widened(a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor) -> torch.Tensor:
        """What programs do where that is slow."""
        return (a.to(torch.bfloat16) @ b.to(torch.bfloat16)) * (scale_a * scale_b).to(torch.bfloat16)

    return Problem(
        inputs,
        {"fastnn": ours, "torch": theirs, "torch in bfloat16": widened},
        2.0 * m * n * k,
        peak=PEAKS[dtype],
        # Rounded to bfloat16, and by the last once more before it is scaled.
        tolerance=2.0**-7,
    )


_SQUARES = tuple((n, n, n) for n in (256, 512, 1024, 2048))

register(Benchmark("matmul", "MxNxK", _SQUARES, _product(fastnn.mm, torch.mm)))
register(Benchmark("bmm", "BxMxNxK", ((64, 64, 64, 64), (64, 128, 64, 128)), _product(fastnn.bmm, torch.bmm)))
register(Benchmark("linear", "MxNxK", ((32, 1024, 1024), (128, 4096, 1024)), _linear))
register(Benchmark("linear_layer", "MxNxK", ((4, 64, 64), (32, 1024, 1024)), _layer(packed=False)))
register(Benchmark("linear_packed", "MxNxK", ((1, 4096, 4096), *_SQUARES[1:]), _layer(packed=True)))
register(Benchmark("linear_with_grad", "MxNxK", ((4, 64, 64), (32, 1024, 1024)), _with_grad))
register(Benchmark("linear_train", "MxNxK", ((32, 1024, 1024), (256, 1024, 1024)), _train))
register(Benchmark("int_mm", "MxNxK", _SQUARES, _int_mm, dtypes=(torch.int8,)))
register(Benchmark("scaled_mm", "MxNxK", _SQUARES, _scaled_mm, dtypes=(torch.float8_e4m3fn,)))
