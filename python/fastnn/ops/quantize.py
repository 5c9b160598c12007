"""Quantization: numbers as integers, or as floats of eight bits, times a scale.

Schemes (``dtype``): int8 (-128 to 127), uint8 (0 to 255), int4 (-8 to 7), uint4 (0 to 15), float8_e4m3fn (to ±448) and
float8_e5m2 (to ±57344); torch's dtypes or their names. Integers lie in plain tensors of int8 or uint8. Those of four bits
are packed two a byte along the last dimension, whose size must be even: element 2 i in the low half, 2 i + 1 in the high.

Which elements share a scale: all (the scale has no dimensions, or one element); with ``axis``, a dimension or increasing
ones, those with the same indices along them (the scale's shape is that of x along these dimensions: ``axis=0`` per channel,
all but the last per token); with ``group_size`` g, each g neighbours along the last dimension (scale (..., K / g)). Scales are
float32 (other floats are converted), zero points int32 (int8, uint8 and int64 are taken too), of the scale's shape.

Formulas, in float32, to which x is converted first (Jacob et al., CVPR 2018; those of torch's own fake_quantize, while its
quantize_per_channel adds the zero point before it rounds, so that of a million integers a few differ)::

    integers    q = clamp(rne(x · (1 / scale)) + zero_point, qmin, qmax)
    float8      q = float8(clamp(x · (1 / scale), -max, max))
    back        x = (q - zero_point) · scale, rounded once to the result's dtype

rne rounds to nearest, halves to even, float8 likewise. Infinities saturate. NaN becomes the zero point, which is 0 when
read back; in float8 it stays NaN. With ``rounding="stochastic"`` y = x / scale becomes floor(y) + 1 with the probability
y - floor(y), else floor(y); in float8 the same holds of |y| in units of the last place of its binade. The expectation is
x. Element e, the index in row-major order, rounds up where (word >> 8) · 2⁻²⁴ is less than that probability, ``word`` being
word e % 4 of Philox4x32-10 (Salmon et al., SC 2011) with the counter e / 4 and a seed that is drawn from ``generator``
(torch's default one if None), so that the result depends on the seed alone and not on threads, strides or instruction sets.

:func:`choose_scale` and :func:`quantize_dynamic` choose the scale from the finite values::

    symmetric   scale = max |x| / qmax, no zero point (int8, int4, float8)
    else        lo = min(x, 0), hi = max(x, 0), scale = hi / (qmax - qmin) - lo / (qmax - qmin),
                zero_point = clamp(qmin - rne(lo / scale), qmin, qmax)

A scale that comes out as 0 is 1, and none is less than 2⁻¹²⁶.

x in float32, float64, bfloat16 or float16, of any strides; a result has the strides of torch.empty_like, packed ones are
contiguous. None of these functions is differentiable: results require no grad. (fake_quantize is.)

ValueError for an unknown scheme, an axis or a group_size that does not fit, a scale or zero point of another shape, a scale
that is not positive, normal and finite, a zero point out of range or with float8, an odd size where two numbers make a
byte; TypeError for what is no tensor of numbers. On a GPU nobody waits for the values in tensors of scales and zero points:
there a bad one is no error but unspecified results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import Kernels
from ..backends.cpu import FLOAT
from ..backends.reference import quantize as formulas
from ..backends.reference.quantize import FLOAT8, PACKED, STORAGE
from ._op import Op
from ._random import seed_like
from ._route import Unsupported, describe, fall_back, route
from ._scheme import check_even, check_numbers, check_rounding, granularity, parameters, scale_shape, scheme

kernels = Kernels("quantize")
_UNSIGNED = ("uint8", "uint4")


def quantize(
    input: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int | None = None,
    *,
    dtype: torch.dtype | str,
    axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The integers (or floats of eight bits) that stand for ``input``. See this module for all arguments and errors."""
    kind = scheme("quantize", dtype)
    check_numbers("quantize", "input", input)
    axes, group = granularity("quantize", input.shape, axis, group_size)
    check_even("quantize", "input", kind, input.shape)
    scale, zero_point = parameters(
        "quantize", scale, zero_point, kind, scale_shape(input.shape, axes, group), input.device
    )
    stochastic = check_rounding("quantize", rounding)
    input = input.detach() if input.requires_grad else input
    seed = None
    try:
        where = route("quantize", input, scale)
        seed = seed_like(input, generator) if stochastic else None
        return QUANTIZE(input, scale, zero_point, seed, axes, group, kind, where=where)
    except Unsupported as reason:
        seed = seed_like(input, generator) if stochastic else None
        return fall_back(
            "quantize", reason.args[0], formulas.quantize, input, scale, zero_point, seed, axes, group, kind
        )


def dequantize(
    input: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    from_dtype: torch.dtype | str | None = None,
) -> Tensor:
    """The numbers, of ``dtype`` (float32, float64, bfloat16 or float16), that ``input`` stands for.

    ``from_dtype`` is needed for packed numbers, "int4" or "uint4", whose bytes do not say which they are: the result is
    twice as wide then, and ``group_size`` counts its elements. See this module for the other arguments and errors.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"fastnn.dequantize: input: expected a Tensor, got {type(input).__name__}")
    if from_dtype is None:
        kind = scheme("dequantize", input.dtype, "the dtype of input")
    else:
        kind = scheme("dequantize", from_dtype, "from_dtype")
    if input.dtype is not STORAGE[kind] or input.layout is not torch.strided or input.is_nested:
        raise TypeError(
            f"fastnn.dequantize: expected {kind} in a dense tensor of {STORAGE[kind]}, got {describe('input', input)}"
        )
    if dtype not in FLOAT:
        raise ValueError(f"fastnn.dequantize: dtype: expected float32, float64, bfloat16 or float16, got {dtype}")
    shape = list(input.shape)
    if kind in PACKED:
        if not shape:
            raise ValueError(f"fastnn.dequantize: input: expected a dimension of bytes that hold {kind}, got a scalar")
        shape[-1] *= 2
    axes, group = granularity("dequantize", shape, axis, group_size)
    scale, zero_point = parameters("dequantize", scale, zero_point, kind, scale_shape(shape, axes, group), input.device)
    input = input.detach() if input.requires_grad else input
    args = (input, scale, zero_point, axes, group, kind, dtype)
    try:
        return DEQUANTIZE(*args, where=route("dequantize", input, scale))
    except Unsupported as reason:
        return fall_back("dequantize", reason.args[0], formulas.dequantize, *args)


def quantize_dynamic(
    input: Tensor,
    *,
    dtype: torch.dtype | str = torch.int8,
    axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    symmetric: bool = True,
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(q, scale, zero_point)``: :func:`quantize` with what :func:`choose_scale` chooses, in one pass where a run of
    elements that share a scale stays in the cache. The zero point is None where the scheme is symmetric."""
    kind, axes, group = _check_choice("quantize_dynamic", input, dtype, axis, group_size, symmetric)
    check_even("quantize_dynamic", "input", kind, input.shape)
    stochastic = check_rounding("quantize_dynamic", rounding)
    input = input.detach() if input.requires_grad else input
    seed = None
    try:
        where = route("quantize_dynamic", input)
        seed = seed_like(input, generator) if stochastic else None
        found = QUANTIZE_DYNAMIC(input, seed, axes, group, kind, symmetric, where=where)
    except Unsupported as reason:
        seed = seed_like(input, generator) if stochastic else None
        found = fall_back(
            "quantize_dynamic", reason.args[0], formulas.quantize_dynamic, input, seed, axes, group, kind, symmetric
        )
    q, scale, zero_point = found
    return q, scale, None if symmetric else zero_point


def choose_scale(
    input: Tensor,
    *,
    dtype: torch.dtype | str = torch.int8,
    axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    symmetric: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``(scale, zero_point)``, float32 and int32, which fit the finite values of ``input``. The zero point is None where the
    scheme is symmetric."""
    kind, axes, group = _check_choice("choose_scale", input, dtype, axis, group_size, symmetric)
    input = input.detach() if input.requires_grad else input
    args = (input, axes, group, kind, symmetric)
    try:
        scale, zero_point = CHOOSE_SCALE(*args, where=route("choose_scale", input))
    except Unsupported as reason:
        scale, zero_point = fall_back("choose_scale", reason.args[0], formulas.choose_scale, *args)
    return scale, None if symmetric else zero_point


def _check_choice(
    op: str, input: Any, dtype: Any, axis: Any, group_size: Any, symmetric: Any
) -> tuple[str, list[int], int]:
    kind = scheme(op, dtype)
    check_numbers(op, "input", input)
    if not isinstance(symmetric, bool):
        raise TypeError(f"fastnn.{op}: symmetric: expected a bool, got {type(symmetric).__name__}")
    if symmetric and kind in _UNSIGNED:
        raise ValueError(f"fastnn.{op}: symmetric: expected False for {kind}, which has no negative numbers")
    if not symmetric and kind in FLOAT8:
        raise ValueError(f"fastnn.{op}: symmetric: expected True for {kind}, which has no zero point")
    return kind, *granularity(op, input.shape, axis, group_size)


# ---- tensors without data, vmap ----------------------------------------------------------------------------------


def _fake_quantize(input: Tensor, kind: str) -> Tensor:
    if kind in PACKED:
        return input.new_empty((*input.shape[:-1], input.shape[-1] // 2), dtype=torch.uint8)
    return torch.empty_like(input, dtype=STORAGE[kind])


def _fake_dequantize(
    input: Tensor, scale: Tensor, zero_point: Tensor | None, axis: Any, group_size: int, kind: str, dtype: torch.dtype
) -> Tensor:
    if kind in PACKED:
        return input.new_empty((*input.shape[:-1], input.shape[-1] * 2), dtype=dtype)
    return torch.empty_like(input, dtype=dtype)


def _fake_choose_scale(
    input: Tensor, axis: list[int], group_size: int, kind: str, symmetric: bool
) -> tuple[Tensor, Tensor]:
    shape = scale_shape(input.shape, axis, group_size)
    zero_point = input.new_empty((0,) if symmetric else shape, dtype=torch.int32)
    return input.new_empty(shape, dtype=torch.float32), zero_point


def _in_front(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _batched(
    info: Any, in_dims: tuple[Any, ...], input: Tensor, scale: Tensor, zero_point: Tensor | None, axis: Any, group: int
) -> tuple[Tensor, Tensor, Tensor | None, list[int]]:
    """A batch as one more dimension, along which there are scales of its own where there have to be."""
    n = info.batch_size
    input = _in_front(input, in_dims[0], n)
    axis = [a + 1 for a in axis]
    if not group and in_dims[1] is None and in_dims[2] is None:
        return input, scale, zero_point, axis
    front = [_in_front(x, dim, n) for x, dim in zip((scale, zero_point), in_dims[1:3], strict=True) if x is not None]
    if not group:
        front = front if axis else [x.reshape(n) for x in front]
        axis = [0, *axis]
    return input, front[0], front[1] if zero_point is not None else None, axis


def _vmap_quantize(
    info: Any,
    in_dims: tuple[Any, ...],
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    seed: Tensor | None,
    axis: Any,
    group_size: int,
    kind: str,
) -> tuple[Tensor, int]:
    if seed is None:
        input, scale, zero_point, axis = _batched(info, in_dims, input, scale, zero_point, axis, group_size)
        return QUANTIZE(input, scale, zero_point, None, axis, group_size, kind), 0
    # Each has indices of its own, from 0 on.
    rows = _one_by_one(info, in_dims, input, scale, zero_point, seed)
    return torch.stack([QUANTIZE(*row, axis, group_size, kind) for row in rows]), 0


def _one_by_one(info: Any, in_dims: tuple[Any, ...], *tensors: Tensor | None) -> Any:
    columns = [
        [x] * info.batch_size if dim is None or x is None else x.unbind(dim)
        for x, dim in zip(tensors, in_dims, strict=False)
    ]
    return zip(*columns, strict=True)


def _vmap_dequantize(
    info: Any,
    in_dims: tuple[Any, ...],
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: Any,
    group_size: int,
    kind: str,
    dtype: torch.dtype,
) -> tuple[Tensor, int]:
    input, scale, zero_point, axis = _batched(info, in_dims, input, scale, zero_point, axis, group_size)
    return DEQUANTIZE(input, scale, zero_point, axis, group_size, kind, dtype), 0


def _vmap_quantize_dynamic(
    info: Any,
    in_dims: tuple[Any, ...],
    input: Tensor,
    seed: Tensor | None,
    axis: Any,
    group_size: int,
    kind: str,
    symmetric: bool,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    out_dims = (0, 0, None if symmetric else 0)
    if seed is None:
        input = _in_front(input, in_dims[0], info.batch_size)
        axis = [] if group_size else [0, *(a + 1 for a in axis)]
        return QUANTIZE_DYNAMIC(input, None, axis, group_size, kind, symmetric), out_dims
    rows = _one_by_one(info, in_dims, input, seed)
    q, scale, zero_point = zip(
        *(QUANTIZE_DYNAMIC(*row, axis, group_size, kind, symmetric) for row in rows), strict=True
    )
    return (
        torch.stack(q),
        torch.stack(scale),
        zero_point[0] if symmetric else torch.stack(zero_point),
    ), out_dims


def _vmap_choose_scale(
    info: Any, in_dims: tuple[Any, ...], input: Tensor, axis: Any, group_size: int, kind: str, symmetric: bool
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    input = _in_front(input, in_dims[0], info.batch_size)
    axis = [] if group_size else [0, *(a + 1 for a in axis)]
    return CHOOSE_SCALE(input, axis, group_size, kind, symmetric), (0, None if symmetric else 0)


# ---- the ops -----------------------------------------------------------------------------------------------------
# They are given detached tensors: nothing is saved, and backward is never asked for a gradient that is one.


def _save(ctx: Any, args: tuple[Any, ...], result: Any) -> tuple[Tensor, ...]:
    ctx.count = len(args)
    return ()


def _backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    return (None,) * ctx.count


QUANTIZE = Op(
    "quantize(Tensor input, Tensor scale, Tensor? zero_point, Tensor? seed, int[] axis, SymInt group_size, str dtype) "
    "-> Tensor",
    kernel=kernels.quantize,
    reference=formulas.quantize,
    fake=lambda input, scale, zero_point, seed, axis, group_size, dtype: _fake_quantize(input, dtype),
    save=_save,
    backward=_backward,
    vmap=_vmap_quantize,
    differentiable=0,
)

DEQUANTIZE = Op(
    "dequantize(Tensor input, Tensor scale, Tensor? zero_point, int[] axis, SymInt group_size, str from_dtype, "
    "ScalarType dtype) -> Tensor",
    kernel=kernels.dequantize,
    reference=formulas.dequantize,
    fake=_fake_dequantize,
    save=_save,
    backward=_backward,
    vmap=_vmap_dequantize,
    differentiable=0,
)

QUANTIZE_DYNAMIC = Op(
    "quantize_dynamic(Tensor input, Tensor? seed, int[] axis, SymInt group_size, str dtype, bool symmetric) "
    "-> (Tensor, Tensor, Tensor)",
    kernel=kernels.quantize_dynamic,
    reference=formulas.quantize_dynamic,
    fake=lambda input, seed, *rest: (_fake_quantize(input, rest[2]), *_fake_choose_scale(input, *rest)),
    save=_save,
    backward=_backward,
    vmap=_vmap_quantize_dynamic,
    differentiable=0,
)

CHOOSE_SCALE = Op(
    "choose_scale(Tensor input, int[] axis, SymInt group_size, str dtype, bool symmetric) -> (Tensor, Tensor)",
    kernel=kernels.choose_scale,
    reference=formulas.choose_scale,
    fake=_fake_choose_scale,
    save=_save,
    backward=_backward,
    vmap=_vmap_choose_scale,
    differentiable=0,
)
