"""Cross entropy with class indices and with probabilities, of (N, C), (C) and (N, C, ...)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

import fastnn

from .case import Case, Sample, register
from .inputs import Maker

_SHAPES = ((7,), (5, 3), (17, 33), (3, 1031), (67, 2), (2, 5, 19), (3, 7, 3, 5))


def _classes(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 1 else shape[1]


def _indices(make: Maker) -> Iterator[Sample]:
    for shape in _SHAPES:
        classes = _classes(shape)
        positions = () if len(shape) == 1 else (shape[0], *shape[2:])
        positions_in_all = max(1, torch.Size(positions).numel())
        target = torch.arange(positions_in_all, device=make.device).mul_(7).remainder_(classes).view(positions)
        for reduction in ("none", "sum"):
            for smoothing in (0.0, 0.2):
                options = {"target": target, "reduction": reduction, "label_smoothing": smoothing}
                yield Sample((make(*shape),), options)


def _probabilities(make: Maker) -> Iterator[Sample]:
    for shape in _SHAPES:
        for reduction in ("none", "sum"):
            yield Sample((make(*shape), make(*shape)), {"reduction": reduction})


def _linear(make: Maker) -> Iterator[Sample]:
    for rows, classes, features in ((5, 3, 7), (17, 65, 33), (1, 129, 5), (70, 11, 130)):
        target = torch.arange(rows, device=make.device).mul_(5).remainder_(classes)
        for reduction in ("none", "sum"):
            options = {"target": target, "reduction": reduction}
            yield Sample((make(rows, features), make(classes, features), make(classes)), options)


def _reach(result: torch.Tensor, x: torch.Tensor, per_position: torch.Tensor) -> torch.Tensor:
    """The size of what is added up for each position, ``per_position``, or for all."""
    size = per_position + 2 * x.abs().amax() + 1
    return size.expand_as(result) if result.dim() else size.sum()


def _magnitude(result: torch.Tensor, x: torch.Tensor, **options: Any) -> torch.Tensor:
    axis = 0 if x.dim() == 1 else 1
    return _reach(result, x, x.logsumexp(axis).abs())


def _magnitude_probabilities(result: torch.Tensor, x: torch.Tensor, p: torch.Tensor, **_: Any) -> torch.Tensor:
    axis = 0 if x.dim() == 1 else 1
    mass = p.abs().sum(axis)
    return _reach(result, x, x.logsumexp(axis).abs() * mass + (p.abs() * x.abs()).sum(axis) + x.abs().amax() * mass)


def _magnitude_linear(
    result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, **_: Any
) -> torch.Tensor:
    logits = F.linear(x.abs(), weight.abs(), bias.abs())
    return _reach(result, logits, logits.amax(1))


def _peer_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, target: torch.Tensor, reduction: str
) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, weight, bias), target, reduction=reduction)


def linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, target: torch.Tensor, reduction: str
) -> torch.Tensor:
    return fastnn.functional.linear_cross_entropy(x, weight, target, linear_bias=bias, reduction=reduction)


register(
    Case(
        "cross_entropy",
        F.cross_entropy,
        _indices,
        _magnitude,
        lambda *_, **__: 16,
        "fastnn.functional:cross_entropy",
        exact=False,
        product=False,
    )
)
register(
    Case(
        "cross_entropy_probabilities",
        F.cross_entropy,
        _probabilities,
        _magnitude_probabilities,
        lambda *_, **__: 16,
        "fastnn.functional:cross_entropy",
        exact=False,
        product=False,
    )
)
register(
    Case(
        "linear_cross_entropy",
        _peer_linear,
        _linear,
        _magnitude_linear,
        lambda x, *_, **__: 16 + x.shape[1],
        "fastnn.testing.cross_entropy:linear_cross_entropy",
        # In 16 bits torch rounds the logits, as fastnn does, and each by other errors of their sums.
        dtypes=(torch.float32, torch.float64),
        exact=False,
    )
)
