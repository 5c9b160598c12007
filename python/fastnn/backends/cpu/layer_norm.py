"""Layer norm and rms norm on plain CPU tensors without zero sizes, whose shapes the ops have checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _cpu
from ..._layout import suggest_memory_format
from . import DTYPE, empty, empty_like


def empty_contiguous(x: Tensor) -> Tensor:
    """What the short way asks for where a result is large."""
    return empty(x.shape, x.dtype)


def _rms_norm_is_a_chain() -> bool:
    x = torch.ones(2, 2, device="cpu").t()
    return torch.nn.functional.rms_norm(x, (2,)).stride() == x.stride()


#: In torch 2.8 and before, rms norm is a chain of elementwise operations, whose result is laid out as the input.
RMS_NORM_IS_A_CHAIN = _rms_norm_is_a_chain()


def is_contiguous_result(x: Tensor, centered: bool) -> bool:
    """Whether torch's result is: that of rms norm alone is not, where the input is channels-last."""
    return centered or (not RMS_NORM_IS_A_CHAIN and suggest_memory_format(x) is torch.contiguous_format)


def _empty_result(x: Tensor, centered: bool) -> Tensor:
    return empty_contiguous(x) if is_contiguous_result(x, centered) else empty_like(x)


def _operand(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.stride()


def _columns(x: Tensor | None) -> tuple[tuple[Any, ...] | None, Tensor | None]:
    """What the kernel is given, and what holds its memory meanwhile."""
    if x is None:
        return None, None
    x = x.contiguous()
    return (x.data_ptr(), 1, DTYPE[x.dtype]), x


def row_norm(
    input: Tensor, dims: int, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool
) -> Tensor:
    """Over the last ``dims`` dimensions. The result has torch's strides."""
    out = _empty_result(input, centered)
    (scale, _keep), (shift, _keep_too) = _columns(weight), _columns(bias)
    _cpu.row_norm(
        input.shape,
        DTYPE[input.dtype],
        dims,
        _operand(input),
        _operand(out),
        scale,
        shift,
        eps,
        centered,
    )
    return out


def row_norm_backward(
    grad: Tensor, input: Tensor, dims: int, weight: Tensor | None, eps: float, centered: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, and of weight and bias in float64 (empty where there is none)."""
    by_input = _empty_result(input, centered)
    shape = input.shape[input.dim() - dims :]
    by_weight = torch.empty(shape if weight is not None else (0,), dtype=torch.float64)
    by_bias = torch.empty(shape if bias else (0,), dtype=torch.float64)
    scale, _keep = _columns(weight)
    _cpu.row_norm_backward(
        input.shape,
        DTYPE[input.dtype],
        dims,
        _operand(grad),
        _operand(input),
        _operand(by_input),
        scale,
        None if weight is None else by_weight.data_ptr(),
        by_bias.data_ptr() if bias else None,
        eps,
        centered,
    )
    return by_input, by_weight, by_bias
