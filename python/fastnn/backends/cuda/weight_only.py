"""Linear layers whose weight alone is quantized, on plain CUDA tensors, whose arguments the ops have checked."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ... import _state
from .. import cuda
from .._quantize import WEIGHT_FORMAT, address
from .._weight_only import Weight
from .._weight_only import weight_only_linear as _by
from ..codes import ACTIVATION, DTYPE


def _multiply(x: Tensor, weight: Weight, bias: Tensor | None, activation: str, out: Tensor) -> None:
    cuda.module().weight_only_linear(
        x.data_ptr(),
        *out.shape,
        x.shape[1],
        x.stride(0),
        DTYPE[x.dtype],
        weight.q.data_ptr(),
        weight.q.stride(0),
        WEIGHT_FORMAT[weight.from_dtype],
        weight.scale.data_ptr(),
        address(weight.zero_point),
        weight.groups,
        address(bias),
        DTYPE[torch.float32 if bias is None else bias.dtype],
        ACTIVATION[activation],
        out.data_ptr(),
        _state.settings().batch_invariant,
        **cuda.where(x),
    )


weight_only_linear = functools.partial(_by, _multiply)
