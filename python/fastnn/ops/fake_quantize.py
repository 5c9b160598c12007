"""Fake quantization (Jacob et al., CVPR 2018): what quantizing a tensor and dequantizing it leave of it, differentiable.

Formula, with r = round(x · (1 / scale)), half to even, or by chance:

    result = (clamp(r + zero_point, quant_min, quant_max) - zero_point) · scale

NaN becomes the zero point, which is 0; infinities are clamped. The gradients go straight through the rounding (Bengio et al.,
arXiv:1308.3432). Where x was in range: of x that of the result, of scale r - x / scale times it. Elsewhere: of x none, of
scale quant_min - zero_point, or quant_max - zero_point, and of zero_point -scale (learned step size: Esser et al., ICLR 2020;
Bhalgat et al., CVPR Workshops 2020). What is kept for them is a bit an element, which tells where x was in range, and x
itself only where scale or zero point are learned.

x in float32, float64, bfloat16 or float16, of any shape and strides; the result has its shape, strides and dtype. It is
computed in float32, and rounded once; float64 is divided by the scale in float64. 1 / scale is rounded to float32, and so is
the product by scale, as in torch. Sums are over pieces in float32, combined in float64 in an order that depends on the shape
alone. Which way is rounded by chance depends on the seed, drawn from ``generator`` once a call, and on the element's index in
row-major order: not on threads, instruction sets or strides.

torch._fake_quantize_learnable_per_tensor_affine computes the same, and so does the one per channel, but for the gradient of the
scale: torch's backward rounds x / scale + zero_point, and halves of the zero point upwards, its forward x / scale, and
those to even. Where the two differ its gradient is not that of what it computed, so that :func:`fastnn.patch` leaves
these functions to torch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import Kernels, cpu
from ..backends.reference import fake_quantize as formulas
from ..backends.reference.quantize import FLOAT8, RANGE
from . import _scheme
from ._op import Op
from ._random import seed_like
from ._route import (
    TRANSFORM,
    Unsupported,
    describe,
    fall_back,
    functorch_active,
    is_compiling,
    route,
    wants_grad,
)

kernels = Kernels("fake_quantize")
_torch_per_tensor = torch.fake_quantize_per_tensor_affine
_torch_per_channel = torch.fake_quantize_per_channel_affine

#: Beyond, float32 does not hold all integers and their differences.
_MOST = 1 << 22


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int | None = None,
    *,
    dtype: torch.dtype | str = torch.int8,
    quant_min: int | None = None,
    quant_max: int | None = None,
    axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
    grad_factor: float = 1.0,
) -> Tensor:
    """dequantize(quantize(x)) in x's dtype, with gradients. See this module for the formula and its derivatives.

    scale and zero_point: one number; with ``axis`` one for each index along these dimensions; with ``group_size`` one for
    so many neighbours along the last dimension: of the shape that :func:`fastnn.quantize` has. Both may be parameters. A
    zero point of floating-point numbers is rounded half to even and clamped to the range.

    dtype: int8, uint8, int4 or uint4, whose range ``quant_min`` and ``quant_max`` may narrow.
    grad_factor: what the gradients of scale and zero_point are multiplied by; Esser et al. advise 1 / √(n · quant_max) for
    n elements that share a scale.

    ValueError for a scale that is not positive, normal and finite in float32, a zero point or a range beyond that of dtype,
    unknown dtypes, and groups that do not divide; TypeError for what is no tensor or number of the kind.
    """
    op = "fake_quantize"
    _scheme.check_numbers(op, "x", x)
    name = _scheme.scheme(op, dtype)
    if name in FLOAT8:
        raise ValueError(f"fastnn.{op}: dtype: expected one of {', '.join(RANGE)}, got {name}")
    least, most = _range(op, name, quant_min, quant_max)
    axes, group = _scheme.granularity(op, x.shape, axis, group_size)
    sizes = _scheme.scale_shape(x.shape, axes, group)
    scale, zero_point = _scheme.parameters(op, scale, zero_point, name, sizes, x.device, learned=True)
    random = _scheme.check_rounding(op, rounding)
    is_number = isinstance(grad_factor, (int, float)) and not isinstance(grad_factor, bool)
    if not is_number or not -math.inf < grad_factor < math.inf:
        raise ValueError(f"fastnn.{op}: grad_factor: expected a finite number, got {grad_factor!r}")
    shape = x.shape
    if group:
        x = x.unflatten(-1, (shape[-1] // group, group))
        sizes = [*sizes, 1]
    else:
        sizes = [shape[d] if d in axes else 1 for d in range(len(shape))]
    scale = scale.reshape(sizes)
    zero_point = None if zero_point is None else zero_point.reshape(sizes)
    seed = seed_like(x, generator) if random else None
    result = _run(op, x, scale, zero_point, seed, least, most, float(grad_factor), False, False)
    return result.flatten(-2) if group else result


def _range(op: str, name: str, quant_min: Any, quant_max: Any) -> tuple[int, int]:
    least, most = RANGE[name]
    for argument, value in (("quant_min", quant_min), ("quant_max", quant_max)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"fastnn.{op}: {argument}: expected an int, got {type(value).__name__}")
        if not least <= value <= most:
            raise ValueError(f"fastnn.{op}: {argument}: expected {least} to {most} for {name}, got {value}")
    low = least if quant_min is None else quant_min
    high = most if quant_max is None else quant_max
    if low > high:
        raise ValueError(f"fastnn.{op}: quant_min: expected at most quant_max, {high}, got {low}")
    return low, high


def _run(op: str, x: Tensor, scale: Tensor, zero_point: Tensor | None, seed: Tensor | None, *rest: Any) -> Tensor:
    """Of a scale and a zero point that broadcast to x. Raises Unsupported for what ``as_torch`` is torch's own."""
    try:
        where = route(op, x, scale)
    except Unsupported as reason:
        if op != "fake_quantize":
            raise
        return fall_back(
            op, reason.args[0], lambda: formulas.fake_quantize(x, scale, zero_point, seed, *rest, False)[0]
        )
    masked = where == TRANSFORM or wants_grad(x, scale, zero_point)
    order = None if seed is not None else _order(x)
    if order is None:
        return FAKE_QUANTIZE(x, scale, zero_point, seed, *rest, masked, where=where)[0]
    # The kernel goes through elements row by row: so does it for these, seen in another order of dimensions.
    x = x.permute(order)
    scale = scale.permute(order) if scale.dim() else scale
    zero_point = zero_point.permute(order) if zero_point is not None and zero_point.dim() else zero_point
    result = FAKE_QUANTIZE(x, scale, zero_point, seed, *rest, masked, where=where)[0]
    return result.permute([order.index(d) for d in range(len(order))])


def _order(x: Tensor) -> list[int] | None:
    """An order of dimensions in which x is contiguous, where that is not its own."""
    if x.is_contiguous():
        return None
    dims = x.dim()
    if is_compiling():
        # Strides may be symbols, which have no order: the usual ones are asked for.
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(dims)
        return [0, *range(2, dims), 1] if last is not None and x.is_contiguous(memory_format=last) else None
    strides = x.stride()
    order = sorted(range(dims), key=lambda d: -strides[d])
    return order if x.permute(order).is_contiguous() else None


# ---- torch's own functions ---------------------------------------------------------------------------------------


def fake_quantize_per_tensor_affine(
    input: Tensor, scale: float | Tensor, zero_point: int | Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """As :func:`torch.fake_quantize_per_tensor_affine`, to the bit. Scales are not checked, and NaN becomes ``quant_min``."""
    try:
        _check_as_torch(input, quant_min, quant_max)
        grid = _one_grid(input, scale, zero_point, quant_min, quant_max)
        return _run("fake_quantize_per_tensor_affine", input, *grid, None, quant_min, quant_max, 1.0, True, False)
    except Unsupported as reason:
        return fall_back(
            "fake_quantize_per_tensor_affine",
            reason.args[0],
            *(_torch_per_tensor, input, scale, zero_point, quant_min, quant_max),
        )


def fake_quantize_per_channel_affine(
    input: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int
) -> Tensor:
    """As :func:`torch.fake_quantize_per_channel_affine`, to the bit.

    But for numbers beyond int64 (infinity is one), whose conversion C++ leaves undefined: torch on x86 makes ``quant_min`` of
    both infinities, and here they are clamped to either end, as torch does per tensor. Scales are not checked, and NaN
    becomes ``quant_min``.
    """
    try:
        _check_as_torch(input, quant_min, quant_max)
        _check_channels(input, scale, zero_point, axis, quant_min, quant_max)
        sizes = [input.shape[d] if d == axis else 1 for d in range(input.dim())]
        return _run(
            "fake_quantize_per_channel_affine",
            *(input, scale.reshape(sizes), zero_point.reshape(sizes), None, quant_min, quant_max, 1.0, True, True),
        )
    except Unsupported as reason:
        return fall_back(
            "fake_quantize_per_channel_affine",
            reason.args[0],
            *(_torch_per_channel, input, scale, zero_point, axis, quant_min, quant_max),
        )


def _check_as_torch(input: Any, quant_min: Any, quant_max: Any) -> None:
    if not isinstance(input, Tensor):
        raise Unsupported(f"input: expected a Tensor, got {type(input).__name__}")
    if input.is_nested:
        raise Unsupported("input: a nested tensor")
    if input.dtype not in cpu.FLOAT:
        raise Unsupported(f"input: dtype {str(input.dtype).removeprefix('torch.')}")
    for name, value in (("quant_min", quant_min), ("quant_max", quant_max)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise Unsupported(f"{name}: expected an int, got {type(value).__name__}")
        if not -_MOST <= value <= _MOST:
            raise Unsupported(f"{name}: expected {-_MOST} to {_MOST}, got {value}")
    if quant_min > quant_max:
        raise Unsupported(f"quant_min: expected at most quant_max, {quant_max}, got {quant_min}")


def _one_grid(input: Tensor, scale: Any, zero_point: Any, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    """Two numbers, or two tensors of one element each."""
    if isinstance(scale, Tensor) and isinstance(zero_point, Tensor):
        if scale.numel() != 1 or zero_point.numel() != 1:
            raise Unsupported(
                f"scale, zero_point: expected one element, got {describe('scale', scale)}, "
                f"{describe('zero_point', zero_point)}"
            )
        if scale.requires_grad or zero_point.requires_grad:
            raise Unsupported("scale: requires grad, which this function has none for")
        if not scale.is_floating_point() or zero_point.dtype not in (torch.int32, torch.int64):
            raise Unsupported(
                f"scale, zero_point: expected floating-point numbers and int32, got {scale.dtype} and {zero_point.dtype}"
            )
        return scale.to(torch.float32).reshape(()), zero_point.to(torch.int32).reshape(())
    if (
        not isinstance(scale, (int, float))
        or isinstance(scale, bool)
        or not isinstance(zero_point, int)
        or isinstance(zero_point, bool)
    ):
        raise Unsupported(
            f"scale, zero_point: expected two numbers or two tensors, got {type(scale).__name__} and "
            f"{type(zero_point).__name__}"
        )
    if not quant_min <= zero_point <= quant_max:
        raise Unsupported(f"zero_point: expected {quant_min} to {quant_max}, got {zero_point}")
    return (
        torch.full((), scale, dtype=torch.float32, device=input.device),
        torch.full((), zero_point, dtype=torch.int32, device=input.device),
    )


def _check_channels(input: Tensor, scale: Any, zero_point: Any, axis: Any, quant_min: int, quant_max: int) -> None:
    if isinstance(axis, bool) or not isinstance(axis, int) or not 0 <= axis < input.dim():
        raise Unsupported(f"axis: expected 0 to {input.dim() - 1}, got {axis!r}")
    for name, value, dtype in (("scale", scale, torch.float32), ("zero_point", zero_point, torch.int32)):
        if not isinstance(value, Tensor):
            raise Unsupported(f"{name}: expected a Tensor, got {type(value).__name__}")
        if value.dtype is not dtype or value.dim() != 1 or value.shape[0] != input.shape[axis]:
            raise Unsupported(f"expected {name} ({input.shape[axis]}) {dtype}, got {describe(name, value)}")
        if value.requires_grad:
            raise Unsupported(f"{name}: requires grad, which this function has none for")
    if not input.shape[axis]:
        raise Unsupported("input: no channels")
    # What traces has no numbers yet.
    if not is_compiling() and not functorch_active() and type(zero_point) is Tensor and not zero_point.is_meta:
        least, most = (int(end) for end in torch.aminmax(zero_point))
        if least < quant_min or most > quant_max:
            raise Unsupported(f"zero_point: expected {quant_min} to {quant_max}, got {least} to {most}")


# ---- derivatives -------------------------------------------------------------------------------------------------


def _save(ctx: Any, args: tuple[Any, ...], result: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    input, scale, zero_point, seed, ctx.quant_min, ctx.quant_max, ctx.factor, *_ = args
    ctx.learned = ctx.needs_input_grad[1] or ctx.needs_input_grad[2] or forward_ad._current_level >= 0
    ctx.scale_dtype = scale.dtype
    ctx.zero_dtype = zero_point.dtype if ctx.needs_input_grad[2] else None
    return (result[1], input, scale, zero_point, seed) if ctx.learned else (result[1],)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    mask, *learned = ctx.saved_tensors
    if not ctx.learned:
        return apply_mask(grad, mask), *[None] * 9
    input, scale, zero_point, seed = learned
    args = (grad, input, mask, scale, zero_point, seed, ctx.quant_min, ctx.quant_max, ctx.factor)
    try:
        by_input, by_scale, by_zero_point = FAKE_QUANTIZE_GRADIENTS(*args)
    except Unsupported as reason:
        by_input, by_scale, by_zero_point = fall_back(
            "fake_quantize_backward", reason.args[0], formulas.gradients, *args
        )
    return (
        by_input,
        by_scale.to(ctx.scale_dtype),
        None if ctx.zero_dtype is None else by_zero_point.to(ctx.zero_dtype),
        *[None] * 7,
    )


def apply_mask(grad: Tensor, mask: Tensor) -> Tensor:
    """grad where the bit of the mask is set, else 0 times it."""
    try:
        return FAKE_QUANTIZE_MASK(grad, mask)
    except Unsupported as reason:
        return fall_back("fake_quantize_backward", reason.args[0], formulas.apply_mask, grad, mask)


def _jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
    mask, input, scale, zero_point, seed = ctx.saved_tensors
    found = formulas.coefficients(input, mask, scale, zero_point, seed, ctx.quant_min, ctx.quant_max)
    result = torch.zeros_like(found[0])
    for tangent, coefficient, factor in zip(tangents[:3], found, (1.0, ctx.factor, ctx.factor), strict=True):
        if tangent is not None:
            result = result + tangent.to(coefficient.dtype) * coefficient * factor
    return result.to(input.dtype), None


def _save_gradients(ctx: Any, args: tuple[Any, ...], result: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    *tensors, ctx.quant_min, ctx.quant_max, ctx.factor = args
    return tuple(tensors)


def _backward_twice(
    ctx: Any, of_input: Tensor | None, of_scale: Tensor | None, of_zero_point: Tensor | None
) -> tuple[Any, ...]:
    """The gradients by grad, input and scale of a sum of all gradients, each times one of these.

    With c = r - x / scale in range the derivatives of c by x and scale are -1 / scale and x / scale²; outside it is constant.
    """
    grad, input, mask, scale, zero_point, seed = ctx.saved_tensors
    # Differentiable themselves.
    inside, by_scale, by_zero = formulas.coefficients(
        input, mask, scale, zero_point, seed, ctx.quant_min, ctx.quant_max
    )
    wide, s = inside.dtype, scale.to(inside.dtype)
    g = grad.to(wide)
    by_grad, by_input, sums = torch.zeros_like(g), torch.zeros_like(g), torch.zeros_like(g)
    if of_input is not None:
        by_grad = by_grad + of_input.to(wide) * inside
    if of_scale is not None:
        b = of_scale.to(wide) * ctx.factor
        x = torch.where(inside > 0, input.to(wide), 0.0)
        by_grad = by_grad + b * by_scale
        by_input = by_input - b * g * inside / s
        sums = sums + b * g * inside * x / (s * s)
    if of_zero_point is not None:
        c = of_zero_point.to(wide) * ctx.factor
        by_grad = by_grad + c * by_zero
        sums = sums - c * g * (by_zero != 0).to(wide)
    return (
        by_grad.to(grad.dtype),
        by_input.to(input.dtype),
        None,
        formulas.reduce_to(sums, scale.shape).to(scale.dtype),
        *[None] * 5,
    )


def _mask_twice(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (mask,) = ctx.saved_tensors
    return apply_mask(grad, mask), None


# ---- vmap: one sample at a time, each with bits of its own ---------------------------------------------------------


def _samples(info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> list[list[Any]]:
    parts = [
        arg.unbind(dim) if isinstance(arg, Tensor) and dim is not None else [arg] * info.batch_size
        for arg, dim in zip(args, in_dims, strict=True)
    ]
    return [list(sample) for sample in zip(*parts, strict=True)]


def _vmap_many(op: str) -> Any:
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        found = [globals()[op](*sample) for sample in _samples(info, in_dims, args)]
        stacked = tuple(torch.stack(parts) for parts in zip(*found, strict=True))
        return stacked, (0,) * len(stacked)

    return vmap


def _vmap_mask(info: Any, in_dims: tuple[Any, ...], grad: Tensor, mask: Tensor) -> tuple[Tensor, int]:
    return torch.stack([apply_mask(*sample) for sample in _samples(info, in_dims, (grad, mask))]), 0


# ---- the ops -----------------------------------------------------------------------------------------------------


def _fake(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    # In a traced graph sizes may be symbols.
    count = formulas.mask_bytes(input.numel()) if rest[-1] else 0
    return torch.empty_like(input), input.new_empty((count,), dtype=torch.uint8)


def _fake_gradients(grad: Tensor, input: Tensor, mask: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    sums = [scale.new_empty(scale.shape, dtype=torch.float32) for _ in range(2)]
    return torch.empty_like(grad), *sums


#: The result, and the bits of what was in range: none unless ``masked``. scale and zero_point broadcast to input. With
#: ``as_torch`` nothing is checked, and NaN becomes quant_min; with ``wide`` products of float64 stay it.
FAKE_QUANTIZE = Op(
    "fake_quantize(Tensor input, Tensor scale, Tensor? zero_point, Tensor? seed, int quant_min, int quant_max, "
    "float factor, bool as_torch, bool wide, bool masked) -> (Tensor, Tensor)",
    kernel=kernels.fake_quantize,
    reference=formulas.fake_quantize,
    fake=_fake,
    save=_save,
    backward=_backward,
    vmap=_vmap_many("FAKE_QUANTIZE"),
    jvp=_jvp,
)

#: The gradient that goes straight through: linear, and its own transpose.
FAKE_QUANTIZE_MASK = Op(
    "fake_quantize_mask(Tensor grad, Tensor mask) -> Tensor",
    kernel=kernels.apply_mask,
    reference=formulas.apply_mask,
    fake=lambda grad, mask: torch.empty_like(grad),
    save=lambda ctx, args, result: (args[1],),
    backward=_mask_twice,
    vmap=_vmap_mask,
    jvp=lambda ctx, tangent, *_: apply_mask(tangent, *ctx.saved_tensors),
)

#: The gradients of input, and of scale and zero_point in float32.
FAKE_QUANTIZE_GRADIENTS = Op(
    "fake_quantize_gradients(Tensor grad, Tensor input, Tensor mask, Tensor scale, Tensor? zero_point, Tensor? seed, "
    "int quant_min, int quant_max, float factor) -> (Tensor, Tensor, Tensor)",
    kernel=kernels.gradients,
    reference=formulas.gradients,
    fake=_fake_gradients,
    save=_save_gradients,
    backward=_backward_twice,
    vmap=_vmap_many("FAKE_QUANTIZE_GRADIENTS"),
    differentiable=3,
)
