"""What ``out=`` means, once for all ops: torch's rules for its shape, dtype, aliasing and gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ._route import EAGER, PLAIN, Unsupported, is_grad_enabled

# torch's words (aten/src/ATen/native/Resize.cpp), for the programs that filter on them.
_RESIZED = (
    "An output with one or more elements was resized since it had shape {}, which does not match the required output "
    "shape {}. This behavior is deprecated, and in a future release outputs will not be resized unless they have zero "
    "elements. You can explicitly reuse an out tensor t by resizing it, inplace, to zero elements with t.resize_(0)."
)


def write_out(
    out: Tensor,
    where: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    inputs: Sequence[Tensor],
    write: Callable[[Tensor], None],
    compute: Callable[[], Tensor],
    in_place_of: Tensor | None = None,
) -> Tensor:
    """Fills ``out``: by ``write(out)`` where a kernel can write straight into it, else with ``compute()``.

    ``in_place_of`` is an input that may be ``out`` itself (the added term of addmm). Raises :class:`Unsupported` for what
    torch refuses, whose exception then tells the type.
    """
    if not isinstance(out, Tensor):
        raise Unsupported(f"out: expected a Tensor, got {type(out).__name__}")
    if is_grad_enabled() and (out.requires_grad or any(x.requires_grad for x in inputs)):
        raise Unsupported("out: results written to an out tensor have no gradient, but an argument requires one")
    if out.dtype is not dtype:
        raise Unsupported(f"out: expected dtype {dtype}, got {out.dtype}")
    if out.device != inputs[0].device or out.layout is not torch.strided:
        raise Unsupported(f"out: expected a dense tensor on {inputs[0].device}, got {out.layout} on {out.device}")
    if where != EAGER:
        result = compute()
        if out.shape != result.shape:
            out.resize_(result.shape)
        return out.copy_(result)
    if type(out) not in PLAIN:
        raise Unsupported(f"out: a tensor of type {type(out).__name__}")
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise Unsupported("out: an inference tensor, outside of inference mode")
    if tuple(out.shape) != tuple(shape):
        if out.numel():
            warnings.warn(_RESIZED.format(list(out.shape), list(shape)), UserWarning, stacklevel=4)
        out.resize_(shape)
    if has_internal_overlap(out):
        raise Unsupported("out: more than one of its elements refers to one memory location")
    aliased = out.is_neg() or any(
        may_overlap(out, x) for x in inputs if not (x is in_place_of and is_same_memory(out, x))
    )
    if aliased:
        return out.copy_(compute())
    write(out)
    if not out.is_inference():
        increment_version(out)
    return out


def has_internal_overlap(x: Tensor) -> bool:
    """True when two elements may share memory: exact for what permuting, slicing and expanding make."""
    if x.numel() < 2:
        return False
    reach = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size == 1:
            continue
        if stride < reach:
            return True
        reach = stride * (size - 1) + reach
    return False


def _extent(x: Tensor) -> tuple[int, int]:
    start = x.data_ptr()
    last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
    return start, start + (last + 1) * x.element_size()


def may_overlap(x: Tensor, y: Tensor) -> bool:
    """True when the two span a common range of memory."""
    if not x.numel() or not y.numel():
        return False
    (x_start, x_end), (y_start, y_end) = _extent(x), _extent(y)
    return x_start < y_end and y_start < x_end


def is_same_memory(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()
