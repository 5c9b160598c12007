"""Attention: whole and causal, with a mask that is added, and with heads that share keys."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.reference import attention as formulas
from .case import Case, Sample, register
from .inputs import Maker

#: (batch, heads, heads of keys, queries, keys, size, size of values)
_SHAPES = (
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 3, 13, 17, 8, 5),
    (1, 2, 2, 65, 63, 33, 33),
    (2, 4, 2, 31, 129, 16, 16),
    (1, 8, 2, 1, 257, 64, 64),
    (3, 2, 1, 67, 67, 80, 80),
)


def _samples(make: Maker) -> Iterator[Sample]:
    for n, h, kv, length, keys, size, value_size in _SHAPES:
        gqa = {"enable_gqa": True} if h != kv else {}
        for options in ({}, {"is_causal": True}, {"mask": True}):
            # One key alone has no gradient, beside which every error is large; and NaN times a probability of 0 is left out
            # of some sums.
            if options.get("is_causal") and (length == 1 or make.values == "special"):
                continue
            make.tensors = 0
            args = (make(n, h, length, size), make(n, kv, keys, size), make(n, kv, keys, value_size))
            if options.get("mask"):
                yield Sample((*args, make(n, 1, length, keys)), gqa)
            else:
                yield Sample(args, {**options, **gqa})


def _exact(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False, enable_gqa: bool = False
) -> Tensor:
    high = 0 if is_causal else None
    return formulas.attention(q, k, v, mask, None, 1 / math.sqrt(q.shape[-1]), None, high, 0, 0.0, None, False)[0]


def _magnitude(
    result: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """Of the sums of values, times what a rounding of the largest score does to a probability."""
    heads = q.shape[1] // k.shape[1]
    scores = q.abs() @ k.abs().repeat_interleave(heads, 1).mT / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + mask.abs()
    return _exact(q, k, v.abs(), mask, is_causal) * (1 + scores.amax(-1, keepdim=True))


def _depth(q: Tensor, *_: Tensor, **__: bool) -> int:
    """Products of bfloat16 take the probabilities in bfloat16."""
    return 16 + (2**15 if q.dtype is torch.bfloat16 else 0)


register(
    Case(
        "attention",
        F.scaled_dot_product_attention,
        _samples,
        _magnitude,
        _depth,
        "fastnn.functional:scaled_dot_product_attention",
        exact=False,
        product=False,
        reference=_exact,
    )
)
