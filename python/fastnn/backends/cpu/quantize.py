"""Quantization on plain CPU tensors, whose arguments the ops have checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ... import _cpu
from .._quantize import Compiled, Memory
from .._tensors import contiguous
from . import DTYPE, LARGE_BYTES, empty, empty_strided


class _Cached(Memory):
    """Large results come from the caching allocator."""

    def empty(self, x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return empty(shape, dtype) if dtype in DTYPE else empty_strided(shape, contiguous(shape), dtype)

    def empty_as(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.numel() * dtype.itemsize <= LARGE_BYTES:
            return torch.empty_like(x, dtype=dtype)
        strides = x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride()
        return empty_strided(x.shape, strides, dtype)


def _kernel(name: str, x: Tensor) -> Callable[..., None]:
    return getattr(_cpu, name)


_compiled = Compiled(_kernel, _Cached())
quantize = _compiled.quantize
dequantize = _compiled.dequantize
choose_scale = _compiled.choose_scale
quantize_dynamic = _compiled.quantize_dynamic
