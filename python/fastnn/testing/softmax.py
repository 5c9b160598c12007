"""softmax and log_softmax, along each dimension of shapes that end inside a vector, a block of sums and a row of columns."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .case import Case, Sample, register
from .inputs import Maker

_SHAPES = ((1,), (17,), (5, 33), (33, 5), (3, 1031), (1031, 3), (2, 67, 19), (3, 5, 7, 9), (1, 2053))


def _samples(make: Maker) -> Iterator[Sample]:
    for shape in _SHAPES:
        for dim in range(len(shape)):
            yield Sample((make(*shape), dim))


def _magnitude_softmax(result: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    """The rounding of x - max, which the exponential multiplies, beside those of the result."""
    return result * (1 + (x - x.amax(dim, keepdim=True)).abs())


def _magnitude_log_softmax(result: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    return 1 + result.abs()


#: The exponential, the sum of a block and the product.
_DEPTH = 16

for _name, _peer, _magnitude in (
    ("softmax", torch.softmax, _magnitude_softmax),
    ("log_softmax", torch.log_softmax, _magnitude_log_softmax),
):
    register(
        Case(
            _name,
            _peer,
            _samples,
            _magnitude,
            lambda *_, **__: _DEPTH,
            f"fastnn.functional:{_name}",
            out=True,
            exact=False,
            product=False,
        )
    )
