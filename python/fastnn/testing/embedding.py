"""Embedding, which copies, and rotary position embedding, a sum of two products."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .case import Case, Sample, register
from .inputs import Maker


def _rows(make: Maker) -> Iterator[Sample]:
    indices = torch.Generator().manual_seed(1)
    for rows, columns, shape in (
        (1, 1, ()),
        (5, 3, (0,)),
        (7, 16, (3, 5)),
        (31, 33, (17,)),
        (13, 131, (2, 3, 7)),
        (257, 5, (300,)),
    ):
        for options in ({}, {"padding_idx": 0, "scale_grad_by_freq": True}):
            which = torch.randint(rows, shape, generator=indices).to(make.device)
            yield Sample((which, make(rows, columns)), options)


register(
    Case(
        "embedding",
        F.embedding,
        _rows,
        lambda result, *_, **__: result.abs(),
        lambda *_, **__: 0,
        "fastnn.functional:embedding",
        product=False,
    )
)


def _turn(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def _each(x: torch.Tensor, table: torch.Tensor, interleaved: bool) -> torch.Tensor:
    if table.shape[-1] != x.shape[-1]:
        table = table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)
    return table.unsqueeze(1) if table.dim() == 3 and x.dim() == 4 else table


def rotary_embedding(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False
) -> torch.Tensor:
    """x · cos + turn(x) · sin, as Hugging Face's apply_rotary_pos_emb has it."""
    return x * _each(x, cos, interleaved) + _turn(x, interleaved) * _each(x, sin, interleaved)


def _turns(make: Maker) -> Iterator[Sample]:
    for shape, table in (
        ((1, 2), (1, 1)),
        ((7, 64), (7, 64)),
        ((2, 3, 5, 16), (5, 8)),
        ((2, 3, 5, 34), (2, 5, 34)),
        ((3, 2, 17, 66), (1, 17, 33)),
        ((2, 3, 1, 128), (2, 1, 1, 64)),
        ((3, 0, 8), (1, 8)),
        ((5, 11, 30), (5, 11, 30)),
    ):
        for interleaved in (False, True):
            yield Sample((make(*shape), make(*table), make(*table)), {"interleaved": interleaved})


def _of_products(
    result: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool
) -> torch.Tensor:
    turned = _turn(x, interleaved).abs() * _each(x, sin, interleaved).abs()
    return x.abs() * _each(x, cos, interleaved).abs() + turned


register(
    Case(
        "rotary_embedding",
        rotary_embedding,
        _turns,
        _of_products,
        lambda *_, **__: 2,
        "fastnn.functional:rotary_embedding",
        product=False,
    )
)
