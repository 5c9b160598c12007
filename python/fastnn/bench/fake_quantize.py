"""Fake quantization to 8 bits of a matrix, per tensor and per channel (a scale a row, and one a column), against torch's own
functions: forward, and forward and backward. Learned scales against torch's learnable ones, and rounding by chance against
the expression in torch that does the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fastnn

from .benchmark import Benchmark, Problem, register

_Call = Callable[..., torch.Tensor]
_AXES = {"tensor": None, "rows": 0, "columns": 1}
_SHAPES = ((4096, 4096), (1024, 1024))


def _grid(shape: tuple[int, ...], axis: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points that leave about one element in 20 beyond the range."""
    sizes = () if axis is None else (shape[axis],)
    return torch.rand(sizes) * 0.01 + 0.01, torch.randint(-5, 5, sizes, dtype=torch.int32)


def _in_torch(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int | None) -> torch.Tensor:
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, -128, 127)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, -128, 127)


def _in_torch_learned(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int | None) -> torch.Tensor:
    if axis is None:
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale.view(1), zero_point.view(1), -128, 127, 1.0)
    return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero_point, axis, -128, 127, 1.0)


def _ours(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int | None) -> torch.Tensor:
    return fastnn.fake_quantize(x, scale, zero_point, axis=axis)


def _build(theirs: _Call, axis: int | None, train: bool, learned: bool = False) -> Any:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        def make() -> tuple[torch.Tensor, ...]:
            scale, zero_point = _grid(shape, axis)
            if learned:
                scale, zero_point = scale.requires_grad_(), zero_point.float().requires_grad_()
            x = torch.randn(shape).to(dtype)
            return x.requires_grad_(train), scale, zero_point, torch.randn(shape).to(dtype)

        def call(function: _Call) -> Any:
            def run(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, grad: torch.Tensor) -> Any:
                y = function(x, scale, zero_point, axis)
                if not train:
                    return y
                leaves = (x, scale, zero_point) if learned else (x,)
                return (y.detach(), *torch.autograd.grad(y, leaves, grad))

            return run

        passes = (5.0 if learned else 4.0) if train else 2.0
        return Problem(
            make,
            {"fastnn": call(_ours), "torch": call(theirs)},
            passes * torch.Size(shape).numel() * dtype.itemsize,
            unit="B",
            peak="copy",
            # Sums of 16 million terms, which torch adds up in float32.
            tolerance=0.05 if learned else 0.0,
        )

    return build


def _stochastic(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    def theirs(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        y = x * (1 / scale)
        below = y.floor()
        return (below + (torch.rand_like(y) < y - below)).clamp(-128, 127) * scale

    return Problem(
        lambda: (torch.randn(shape).to(dtype), torch.tensor(0.02)),
        {"fastnn": lambda x, s: fastnn.fake_quantize(x, s, rounding="stochastic"), "torch": theirs},
        2.0 * torch.Size(shape).numel() * dtype.itemsize,
        unit="B",
        peak="copy",
        # The numbers are drawn apart: results differ by up to a step.
        tolerance=0.1,
    )


# float32 alone: torch's learnable functions take nothing else, and of float64 torch rounds to float32 on the way.
_FLOAT = (torch.float32,)
for _name, _axis in _AXES.items():
    _kinds = {
        "": (_in_torch, False, False),
        "_train": (_in_torch, True, False),
        "_learned": (_in_torch_learned, True, True),
    }
    for _suffix, (_theirs, _train, _learned) in _kinds.items():
        _how = _build(_theirs, _axis, _train, _learned)
        register(Benchmark(f"fake_quantize_{_name}{_suffix}", "MxN", _SHAPES, _how, _FLOAT))
register(Benchmark("fake_quantize_stochastic", "MxN", _SHAPES, _stochastic, _FLOAT))
