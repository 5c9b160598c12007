"""Quantization on plain CUDA tensors, whose arguments the ops have checked; the values of scales and zero points are not
looked at, as that would mean to wait for them."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from .. import cuda
from .._quantize import Compiled, Memory


def _kernel(name: str, x: Tensor) -> Callable[..., None]:
    return functools.partial(getattr(cuda.module(), name), **cuda.where(x))


_compiled = Compiled(_kernel, Memory())
quantize = _compiled.quantize
dequantize = _compiled.dequantize
choose_scale = _compiled.choose_scale
quantize_dynamic = _compiled.quantize_dynamic
