"""Triton's interpreter made to compute what a GPU computes, where it does not.

It holds bfloat16 as the integers of their bits: products of those multiply the bits, and what is converted to bfloat16 is cut
instead of rounded (seen in Triton 3.9). What comes of comparing two scalars is spread as integers, which are no masks. And it
warns where a GPU goes on with infinities and NaN.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Builder, _Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
_cast, _dot, _splat = _Builder.cast_impl, _Builder.create_dot, _Builder.create_splat
_patch = interpreter._patch_lang
#: The interpreter changes Triton's own modules while it runs.
_one_at_a_time = threading.RLock()
#: The namespaces that see them changed, by their ids.
_patched: set[int] = set()


def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16).reshape(x.shape)


def _cast_as_a_gpu(self: Any, source: Any, to: Any) -> Any:
    types = source.dtype.scalar, to.scalar
    if types == (tl.float32, tl.bfloat16):
        return _Handle(_to_bfloat16(source.data), tl.bfloat16)
    if types == (tl.bfloat16, tl.float32):
        return _Handle(_from_bfloat16(source.data), tl.float32)
    return _cast(self, source, to)


def _dot_as_a_gpu(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    if a.dtype.scalar == tl.bfloat16:
        a, b = (_Handle(_from_bfloat16(x.data), tl.float32) for x in (a, b))
    return _dot(self, a, b, *rest)


def _splat_as_a_gpu(self: Any, to: Any, scalar: Any) -> Any:
    if scalar.data.dtype == np.bool_:
        return _Handle(np.full(to.shape, scalar.data), tl.int1)
    return _splat(self, to, scalar)


def _patch_once(function: Any) -> Any:
    """As the interpreter does it for each function that a kernel calls, at each call, which is up to half of its time."""
    if id(function.__globals__) in _patched:
        return None
    _patched.add(id(function.__globals__))
    return _patch(function)


@contextlib.contextmanager
def as_a_gpu() -> Iterator[None]:
    """Kernels that are started inside compute as on a GPU, one at a time."""
    with _one_at_a_time, np.errstate(all="ignore"):
        _Builder.cast_impl, _Builder.create_dot, _Builder.create_splat = _cast_as_a_gpu, _dot_as_a_gpu, _splat_as_a_gpu
        interpreter._patch_lang = _patch_once
        _patched.clear()
        try:
            yield
        finally:
            interpreter._patch_lang = _patch
            _Builder.cast_impl, _Builder.create_dot, _Builder.create_splat = _cast, _dot, _splat
