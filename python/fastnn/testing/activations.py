"""The elementwise activations. Each is a handful of roundings of its argument's or its result's size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .case import Case, Sample, register
from .inputs import Maker

#: Roundings in a row: an exponential by a polynomial of degree 6 to 8, a division, two products.
_DEPTH = 8


def _anything(make: Maker) -> Iterator[Sample]:
    for shape in ((), (1,), (0,), (17,), (15, 31), (3, 5, 7), (2, 3, 64, 9), (1009,)):
        yield Sample((make(*shape),))


def _of_result(result: torch.Tensor, x: torch.Tensor, **_: str) -> torch.Tensor:
    return result.abs()


def _of_argument(result: torch.Tensor, x: torch.Tensor, **_: str) -> torch.Tensor:
    # gelu and silu multiply x by a factor near 0 or 1; where it is near 0 it comes from a sum that cancels.
    return x.abs()


def _gelu(make: Maker) -> Iterator[Sample]:
    for approximate in ("none", "tanh"):
        for sample in _anything(make):
            yield Sample(sample.args, {"approximate": approximate})


def _elementwise(name, peer, magnitude, samples=_anything, *, out=False, exact=False):  # type: ignore[no-untyped-def]
    register(
        Case(
            name,
            peer,
            samples,
            magnitude,
            lambda *_, **__: _DEPTH,
            f"fastnn.functional:{name}",
            out=out,
            exact=exact,
            product=False,
        )
    )


_elementwise("relu", F.relu, _of_result, exact=True)
_elementwise("relu6", F.relu6, _of_result, exact=True)
_elementwise("gelu", F.gelu, _of_argument, _gelu)
_elementwise("silu", F.silu, _of_argument)
_elementwise("sigmoid", torch.sigmoid, _of_result)
_elementwise("tanh", torch.tanh, _of_result)
