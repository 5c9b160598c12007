"""Dropout on plain tensors, whose arguments the ops have checked, with the CPU's mask for the same seed.

Philox is Triton's own, which counts as this package's does (src/cpp/common/philox.hpp). Four elements share the ten
rounds of one counter: what a counter gives is put side by side in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tensors import merge
from ._launch import ceil_div, launch
from .elementwise import offset

_BLOCK = 1024


@triton.jit
def keeps(seed, counter, threshold):
    """Of the elements from 4 * counter on whether they stay, in four times as many columns."""
    zero = (counter * 0).to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(seed), counter.to(tl.uint32), (counter >> 32).to(tl.uint32), zero, zero)
    even = tl.interleave(reaches(a, threshold), reaches(c, threshold))
    odd = tl.interleave(reaches(b, threshold), reaches(d, threshold))
    return tl.interleave(even, odd)


@triton.jit
def reaches(word, threshold):
    # Both without a sign, and 2^31 less, so that the threshold is an int32 whatever p is.
    return (word.to(tl.int32, bitcast=True) ^ -2147483648) >= threshold


@triton.jit(do_not_specialize=["threshold"])
def drop(
    x,
    y,
    seed,
    count,
    shape,
    x_strides,
    y_strides,
    threshold,
    scale,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    kept = keeps(seed, first // 4 + tl.arange(0, BLOCK // 4), threshold)
    i = first + tl.arange(0, BLOCK)
    inside = i < count
    value = tl.load(x + offset(i, shape, x_strides, DIMS), mask=inside, other=0.0).to(tl.float32)
    # 0 x, which keeps NaN.
    value *= tl.where(kept, scale, 0.0)
    tl.store(y + offset(i, shape, y_strides, DIMS), value.to(y.dtype.element_ty), mask=inside)


def choice(p: float) -> tuple[int, float]:
    """What :func:`keeps` takes for a threshold, and what is multiplied with an element that stays."""
    threshold = int(p * 2**32 + 0.5)
    # No word reaches 2^32.
    return (threshold - 2**31, 1 / (1 - p)) if threshold < 2**32 else (2**31 - 1, 0.0)


def dropout(input: Tensor, seed: Tensor, p: float, out: Tensor | None = None) -> Tensor:
    """input / (1 - p) where an element is kept, else 0; ``out`` may be ``input``. The seed is read on the device."""
    if out is None:
        out = torch.empty_like(input)
    count = input.numel()
    if count == 0:
        return out
    seed = seed.to(input.device)  # where it is, unless the caller drew it elsewhere
    shape, strides = merge(input.shape, input.stride(), out.stride())
    programs = ceil_div(count, _BLOCK)
    launch(drop, programs, out, input, out, seed, count, shape, *strides, *choice(p), DIMS=len(shape), BLOCK=_BLOCK)
    return out
