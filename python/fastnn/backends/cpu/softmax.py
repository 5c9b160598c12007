"""softmax and log_softmax on plain CPU tensors without zero sizes, whose shapes the ops have checked."""

from __future__ import annotations

from torch import Tensor

from ... import _cpu
from . import DTYPE, empty


def softmax(input: Tensor, dim: int, log: bool, out: Tensor | None = None) -> Tensor:
    """Along ``dim``, counted from 0; contiguous, or written to ``out``, which may be ``input``."""
    if out is None:
        out = empty(input.shape, input.dtype)
    _cpu.softmax(
        input.shape,
        DTYPE[input.dtype],
        log,
        dim,
        (input.data_ptr(), input.stride()),
        (out.data_ptr(), out.stride()),
    )
    return out


def softmax_backward(grad: Tensor, saved: Tensor, dim: int, log: bool) -> Tensor:
    """The gradient by the input, from the result ``saved``; contiguous."""
    out = empty(saved.shape, saved.dtype)
    _cpu.softmax_backward(
        saved.shape,
        DTYPE[saved.dtype],
        log,
        dim,
        (grad.data_ptr(), grad.stride()),
        (saved.data_ptr(), saved.stride()),
        (out.data_ptr(), out.stride()),
    )
    return out
