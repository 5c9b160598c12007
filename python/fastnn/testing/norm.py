"""Batch normalization, in training (by the statistics of the batch) and in evaluation (by given ones); layer, rms and group
normalization."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import fastnn

from ..backends.reference import group_norm as groups
from ..backends.reference import layer_norm as rows
from ..backends.reference import norm as formulas
from .case import Case, Sample, register
from .inputs import Maker

_EPS = 1e-5
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
    """Of what is rounded: x, the terms of its mean, and the result."""
    mean, scale, bias = (_per_channel(t, x) for t in (mean, weight.abs() * (var + _EPS).rsqrt(), bias))
    return (x.abs() + mean.abs()) * scale + bias.abs()


# By the formula: torch's own float64 sums one after the other, and rounds more than what it would judge.
def _exact_by_batch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return formulas.batch_norm(x, None, None, weight, bias, None, _EPS, False)[0]


def _exact_by_given(
    x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return formulas.batch_norm(x, mean.detach(), var.detach(), weight, bias, None, _EPS, False)[0]


def _magnitude_training(
    result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    axes = [axis for axis in range(x.dim()) if axis != 1]
    return _size(x, x.abs().mean(axes), x.var(axes, unbiased=False), weight, bias)


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
        reference=_exact_by_batch,
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
        reference=_exact_by_given,
    )
)


# ---- rows: layer norm, rms norm, group norm ------------------------------------------------------------------------

_ROWS = ((1, 2), (3, 17), (5, 33), (67, 40), (2, 3, 127), (3, 2063), (1, 4100))


def _of_rows(make: Maker) -> Iterator[Sample]:
    for shape in _ROWS:
        n = shape[-1]
        yield Sample((make(*shape), make(n), make(n)))


def _of_rows_without_bias(make: Maker) -> Iterator[Sample]:
    for shape in _ROWS:
        yield Sample((make(*shape), make(shape[-1])))


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, _EPS)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return fastnn.functional.layer_norm(x, weight.shape, weight, bias, _EPS)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, _EPS)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return fastnn.functional.rms_norm(x, weight.shape, weight, _EPS)


_GROUPS = 2


def _of_groups(make: Maker) -> Iterator[Sample]:
    for shape in ((2, 4), (3, 6, 11), (2, 4, 127), (3, 10, 7, 9), (1, 2, 67, 71), (2, 4, 5, 3, 4)):
        yield Sample((make(*shape), make(shape[1]), make(shape[1])))


def _group_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.group_norm(x, _GROUPS, weight, bias, _EPS)


def group_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return fastnn.functional.group_norm(x, _GROUPS, weight, bias, _EPS)


def _exact_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return rows.row_norm(x, 1, weight, bias, _EPS, True)


def _exact_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rows.row_norm(x, 1, weight, None, _EPS, False)


def _exact_group_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return groups.group_norm(x, _GROUPS, weight, bias, _EPS)[0]


def _magnitude_layer_norm(
    result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    scale = (x.var(-1, unbiased=False, keepdim=True) + _EPS).rsqrt()
    return (x.abs() + x.abs().mean(-1, keepdim=True)) * scale * weight.abs() + bias.abs()


def _magnitude_rms_norm(result: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
    return result.abs()


def _magnitude_group_norm(
    result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    as_rows = x.reshape(x.shape[0], _GROUPS, -1)
    one = as_rows.new_ones(as_rows.shape[-1])
    size = _magnitude_layer_norm(result, as_rows, one, 0 * one).reshape(x.shape)
    return size * _per_channel(weight, x).abs() + _per_channel(bias, x).abs()


for _name, _peer, _samples, _magnitude, _reference in (
    ("layer_norm", _layer_norm, _of_rows, _magnitude_layer_norm, _exact_layer_norm),
    ("rms_norm", _rms_norm, _of_rows_without_bias, _magnitude_rms_norm, _exact_rms_norm),
    ("group_norm", _group_norm, _of_groups, _magnitude_group_norm, _exact_group_norm),
):
    register(
        Case(
            _name,
            _peer,
            _samples,
            _magnitude,
            lambda *_, **__: _DEPTH,
            f"fastnn.testing.norm:{_name}",
            exact=False,
            product=False,
            reference=_reference,
        )
    )
