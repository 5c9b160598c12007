"""How numbers are quantized, as the arguments of an op say it: the scheme (int8 to float8), which elements share a scale, and
the scale and zero point themselves. Checked here once for all ops of quantization.

ValueError and TypeError name the argument, its value and what was expected. What depends on the values in ``scale`` and
``zero_point`` is told by the kernels, which read them: nothing here looks at data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.reference.quantize import FLOAT8, PACKED, RANGE, STORAGE
from ._route import describe

_INTEGER = (torch.int32, torch.int8, torch.uint8, torch.int64)
#: For check_number.
SCALES = (2.0**-126, torch.finfo(torch.float32).max, "a positive, normal, finite number")
_NUMBER = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def scheme(op: str, dtype: Any, name: str = "dtype") -> str:
    """The name of a scheme: that of a torch dtype, or the string itself."""
    if not isinstance(dtype, (torch.dtype, str)):
        raise TypeError(f"fastnn.{op}: {name}: expected a torch.dtype or its name, got {type(dtype).__name__}")
    found = str(dtype).removeprefix("torch.")
    if found not in STORAGE:
        raise ValueError(f"fastnn.{op}: {name}: expected one of {', '.join(STORAGE)}, got {found}")
    return found


def check_numbers(op: str, name: str, value: Any) -> None:
    """Whether this is a dense tensor of floating-point numbers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"fastnn.{op}: {name}: expected a Tensor, got {type(value).__name__}")
    if value.is_nested or value.layout is not torch.strided or value.dtype not in _NUMBER:
        raise TypeError(
            f"fastnn.{op}: expected {name} to be dense, of float32, float64, bfloat16 or float16, got {describe(name, value)}"
        )


def granularity(op: str, shape: Sequence[int], axis: Any, group_size: Any) -> tuple[list[int], int]:
    """The dimensions along which each index has a scale of its own, increasing, and the size of a group, or 0."""
    dims = len(shape)
    if group_size is not None:
        if axis is not None:
            raise ValueError(f"fastnn.{op}: axis: expected None where there is a group_size, got {axis!r}")
        if isinstance(group_size, bool) or not isinstance(group_size, (int, torch.SymInt)):
            raise TypeError(f"fastnn.{op}: group_size: expected an int, got {type(group_size).__name__}")
        if group_size < 1 or not dims or shape[-1] % group_size:
            raise ValueError(
                f"fastnn.{op}: group_size: expected a divisor of the last dimension of {tuple(shape)}, got {group_size}"
            )
        return [], group_size
    if axis is None:
        return [], 0
    axes = [axis] if isinstance(axis, int) else axis
    if not isinstance(axes, (tuple, list)) or any(isinstance(a, bool) or not isinstance(a, int) for a in axes):
        raise TypeError(f"fastnn.{op}: axis: expected an int or a tuple of ints, got {axis!r}")
    if any(not -dims <= a < dims for a in axes):
        raise ValueError(f"fastnn.{op}: axis: expected dimensions of {tuple(shape)}, got {axis!r}")
    axes = [a % dims for a in axes]
    if sorted(set(axes)) != axes:
        raise ValueError(f"fastnn.{op}: axis: expected dimensions in increasing order, got {axis!r}")
    return axes, 0


def scale_shape(shape: Sequence[int], axis: Sequence[int], group_size: int) -> list[int]:
    if group_size:
        return [*shape[:-1], shape[-1] // group_size]
    return [shape[a] for a in axis]


def parameters(
    op: str,
    scale: Any,
    zero_point: Any,
    dtype: str,
    shape: Sequence[int],
    device: torch.device,
    learned: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The scale and the zero point as tensors of this shape (of one element where it is ()), numbers included.

    With ``learned`` they keep their gradients, and zero points may be of floating-point numbers.
    """
    check_number(op, "scale", scale, *SCALES)
    scale = parameter(op, "scale", scale, shape, device, learned=learned)
    if zero_point is not None and dtype in FLOAT8:
        raise ValueError(f"fastnn.{op}: zero_point: expected None, as {dtype} has none")
    if zero_point is not None:
        least, most = RANGE[dtype]
        check_number(op, "zero_point", zero_point, least, most, f"{least} to {most} for {dtype}")
        zero_point = parameter(op, "zero_point", zero_point, shape, device, integer=True, learned=learned)
    return scale, zero_point


def check_number(op: str, name: str, value: Any, least: float, most: float, expected: str) -> None:
    """Of Python's numbers, which cost no wait for a GPU. Kernels of CPUs check those in tensors."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not least <= value <= most:
        raise ValueError(f"fastnn.{op}: {name}: expected {expected}, got {value}")


def parameter(
    op: str,
    name: str,
    value: Any,
    shape: Sequence[int],
    device: torch.device,
    *,
    integer: bool = False,
    learned: bool = False,
) -> Tensor:
    """A scale, or with ``integer`` a zero point, as :func:`parameters` has them."""
    dtypes, dtype = (_INTEGER, torch.int32) if integer else (_NUMBER, torch.float32)
    if integer and learned:
        dtypes += _NUMBER
    if not isinstance(value, Tensor):
        kinds = (int, float) if dtype.is_floating_point else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise TypeError(f"fastnn.{op}: {name}: expected a Tensor or a number, got {type(value).__name__}")
        if not dtype.is_floating_point and not -(2**31) <= value < 2**31:
            raise ValueError(f"fastnn.{op}: {name}: expected 32 bits, got {value}")
        value = torch.full((), value, dtype=dtype, device=device)  # which, unlike torch.tensor, does not wait for a GPU
    if value.dtype not in dtypes or value.is_nested or value.layout is not torch.strided:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"fastnn.{op}: expected {name} to be dense, of one of {names}, got {describe(name, value)}")
    if value.device != device:
        raise ValueError(f"fastnn.{op}: {name}: expected the device {device}, got {value.device}")
    one = not shape and value.dim() == 1 and value.shape[0] == 1
    if list(value.shape) != list(shape) and not one:
        raise ValueError(f"fastnn.{op}: expected {name} of shape {tuple(shape)}, got {describe(name, value)}")
    return value if learned or not value.requires_grad else value.detach()


def check_even(op: str, name: str, dtype: str, shape: Sequence[int]) -> None:
    if dtype in PACKED and (not shape or shape[-1] % 2):
        raise ValueError(
            f"fastnn.{op}: {name}: expected an even size of the last dimension, as a byte holds two numbers of {dtype}, "
            f"got {tuple(shape)}"
        )


def check_rounding(op: str, rounding: Any) -> bool:
    """Whether it is stochastic."""
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"fastnn.{op}: rounding: expected nearest or stochastic, got {rounding!r}")
    return rounding == "stochastic"
