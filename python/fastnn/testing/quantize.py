"""Fake quantization and the linear layer of quantized weights. Scales are powers of two: then no number is so near to
the middle between two integers that float64 rounds it to another one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .case import Case, Sample, register
from .inputs import Maker


def weight_only_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x times the numbers that integers stand for, one scale a row, as torch computes it; they have no gradients."""
    scale = scale.detach()
    shifted = weight if zero_point is None else weight - zero_point.unsqueeze(1)
    return F.linear(x, (shifted * scale.unsqueeze(1)).to(x.dtype), bias)


def _fake_samples(make: Maker) -> Iterator[Sample]:
    for shape in ((), (1,), (0,), (17,), (15, 31), (3, 5, 7), (2, 3, 64, 9), (1031,)):
        for scale, zero_point, least, most in ((0.25, 3, -8, 7), (0.03125, 0, -128, 127), (0.5, 200, 0, 255)):
            yield Sample((make(*shape), scale, zero_point, least, most))


def _linear_samples(make: Maker) -> Iterator[Sample]:
    for m, n, k in ((1, 1, 1), (1, 17, 31), (3, 64, 65), (17, 33, 127), (0, 5, 7), (129, 65, 300)):
        numbers = torch.Generator().manual_seed(n)
        weight = torch.randint(-128, 128, (n, k), generator=numbers, dtype=torch.int8).to(make.device)
        scale = (2.0 ** torch.randint(-9, -5, (n,), generator=numbers)).to(make.device)
        yield Sample((make(m, k), weight, scale, None, make(n)))
        yield Sample((make(m, k), weight, scale, None, None))


def _size(
    result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, *rest: object
) -> torch.Tensor:
    bias = rest[1] if len(rest) > 1 else None
    return weight_only_linear(
        *(x.abs(), weight.abs(), scale, None, bias.abs() if isinstance(bias, torch.Tensor) else None)
    )


register(
    Case(
        "fake_quantize_per_tensor_affine",
        torch.fake_quantize_per_tensor_affine,
        _fake_samples,
        lambda result, *_: result.abs(),
        lambda *_: 2,
        "fastnn.functional:fake_quantize_per_tensor_affine",
        product=False,
    )
)
register(
    Case(
        "weight_only_linear",
        weight_only_linear,
        _linear_samples,
        _size,
        lambda x, *_: x.shape[-1] + 2,
        "fastnn.functional:weight_only_linear",
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
    )
)
