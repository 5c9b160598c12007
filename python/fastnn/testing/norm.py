"""Batch normalization, in training (by the statistics of the batch) and in evaluation (by given ones)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import fastnn

from .case import Case, Sample, register
from .inputs import Maker

_SHAPES = (
    (2, 3),
    (17, 5),
    (5, 33),
    (3, 7, 11),
    (2, 4, 127),
    (3, 5, 7, 9),
    (2, 65, 3, 5),
    (1, 2, 67, 71),
    (2, 3, 5, 3, 4),
)


def _training(make: Maker) -> Iterator[Sample]:
    for shape in _SHAPES:
        channels = shape[1]
        yield Sample((make(*shape), make(channels), make(channels)))


def _evaluation(make: Maker) -> Iterator[Sample]:
    for shape in _SHAPES:
        channels = shape[1]
        # A variance is not negative.
        var = make(channels).abs().add_(0.25)
        yield Sample((make(*shape), make(channels), var, make(channels), make(channels)))


def _by_batch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, None, None, weight, bias, True)


def batch_norm_by_batch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return fastnn.functional.batch_norm(x, None, None, weight, bias, True)


def _by_given(
    x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return F.batch_norm(x, mean.detach(), var.detach(), weight, bias)


def batch_norm_by_given(
    x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return fastnn.functional.batch_norm(x, mean.detach(), var.detach(), weight, bias)


def _per_channel(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return value.reshape(1, -1, *[1] * (x.dim() - 2))


def _size(
    x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Of what is rounded: x and mean are as large as their difference is exact."""
    mean, scale, bias = (_per_channel(t, x) for t in (mean, weight.abs() * (var + 1e-5).rsqrt(), bias))
    return (x.abs() + mean.abs()) * scale + bias.abs()


def _magnitude_training(
    result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    axes = [axis for axis in range(x.dim()) if axis != 1]
    mean, var = x.mean(axes), x.var(axes, unbiased=False)
    return _size(x, mean, var, weight, bias)


def _magnitude_evaluation(result: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
    return _size(*args)


#: Statistics are sums of blocks, each lane of which adds up to a few dozen deviations.
_DEPTH = 16

register(
    Case(
        "batch_norm_training",
        _by_batch,
        _training,
        _magnitude_training,
        lambda *_, **__: _DEPTH,
        "fastnn.testing.norm:batch_norm_by_batch",
        exact=False,
        product=False,
    )
)
register(
    Case(
        "batch_norm",
        _by_given,
        _evaluation,
        _magnitude_evaluation,
        lambda *_, **__: _DEPTH,
        "fastnn.testing.norm:batch_norm_by_given",
        exact=False,
        product=False,
    )
)
