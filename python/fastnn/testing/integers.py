"""Quantization to integers, and the layers that compute with them.

What is judged is the formula in real numbers. Its roundings to integers make steps of what is otherwise continuous: a number
that lies within its own rounding errors of the middle between two integers may become either (`Case.ties`), any other the
nearest. Of small integers with scales that are powers of two everything is exact, and halves go to even.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Case, Sample, register
from .gemm import ACTIVATIONS
from .inputs import Maker

_ENDS = {torch.int8: (-128, 127), torch.uint8: (0, 255)}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

#: The roundings of a float32 number that becomes an integer: that of a float64 input, the inverse, the product, the scale.
_STEPS = 5 * 2.0**-24


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _near(y: Tensor, error: Tensor) -> Tensor:
    """1 where errors of this size decide which integer is nearest to y, else 0."""
    return ((y - y.floor() - 0.5).abs() <= error).to(y.dtype)


def _scale(make: Maker, *shape: int) -> Tensor:
    """From 0.01 to 0.1; powers of two among small integers, of which some are in the middle then."""
    if make.values == "integer":
        return (2.0 ** (torch.arange(math.prod(shape)) % 3 - 1)).reshape(shape).to(make.device)
    numbers = torch.Generator().manual_seed(math.prod(shape))
    return (torch.rand(shape, generator=numbers) * 0.09 + 0.01).to(make.device)


def _number(make: Maker, value: float) -> Tensor:
    return torch.tensor(value, device=make.device)


def _along(values: Tensor | None, x: Tensor, axis: int | Sequence[int] | None, group_size: int | None) -> Tensor | int:
    """A scale or zero point, so that it broadcasts to x."""
    if values is None:
        return 0
    if group_size:
        return values.repeat_interleave(group_size, -1)
    if axis is None:
        return values
    axes = [a % x.dim() for a in ([axis] if isinstance(axis, int) else axis)]
    return values.reshape([size if d in axes else 1 for d, size in enumerate(x.shape)])


# ---- quantize and dequantize -------------------------------------------------------------------------------------

#: Shape, axis and group size.
_GRAINS: list[tuple[tuple[int, ...], int | tuple[int, ...] | None, int | None]] = [
    ((), None, None),
    ((1,), 0, None),
    ((17,), None, None),
    ((0, 5), 1, None),
    ((15, 31), 0, None),
    ((31, 66), -1, None),
    ((3, 5, 67), (0, 1), None),
    ((2, 7, 3, 10), 1, None),
    ((5, 96), None, 32),
    ((3, 129), None, 43),
    ((1031,), None, None),
]


def _places(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    dtype: torch.dtype,
    axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
) -> Tensor:
    """x in steps of its scale, not rounded yet; NaN is 0."""
    y = _wide(x) * _along(1.0 / scale, x, axis, group_size)
    return torch.where(y.isnan(), 0.0, y)


def _rounded(x: Tensor, scale: Tensor, zero_point: Tensor | None = None, **options: Any) -> Tensor:
    shift = _along(zero_point, x, options.get("axis"), options.get("group_size"))
    return (_places(x, scale, **options).round() + shift).clamp(*_ENDS[options["dtype"]])


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None = None, **options: Any) -> Tensor:
    """clamp(round(x · (1 / scale)) + zero_point) by torch's own functions, one after the other."""
    return _rounded(x, scale, zero_point, **options).to(options["dtype"])


def _quantize_ties(
    result: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None = None, **options: Any
) -> Tensor:
    y = _places(x, scale, **options)
    return _near(y, _STEPS * y.abs())


def dequantize(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    from_dtype: str | None = None,
) -> Tensor:
    """(q - zero_point) · scale by torch's own functions; of four bits the first number of a byte is its low half."""
    if from_dtype is not None:
        halves = torch.stack((q & 15, q >> 4), -1).flatten(-2).to(torch.int64)
        q = torch.where(halves > 7, halves - 16, halves) if from_dtype == "int4" else halves
    shifted = q.to(scale.dtype) - _along(zero_point, q, axis, group_size)
    return shifted * _along(scale, q, axis, group_size)


def _quantize_samples(make: Maker) -> Iterator[Sample]:
    numbers = torch.Generator().manual_seed(2)
    for shape, axis, group in _GRAINS:
        x = make(*shape)
        for dtype, (least, most) in _ENDS.items():
            scale, zero_point = _parameters(make, shape, axis, group, least, most, numbers)
            options = {"dtype": dtype, "axis": axis, "group_size": group}
            yield Sample((x, scale), options)
            yield Sample((x, scale, zero_point), options)


def _dequantize_samples(make: Maker) -> Iterator[Sample]:
    numbers = torch.Generator().manual_seed(3)
    for shape, axis, group in _GRAINS:
        ranges = {"int8": (-128, 127), "uint8": (0, 255)}
        if shape and shape[-1] % 2 == 0:
            ranges |= {"int4": (-8, 7), "uint4": (0, 15)}
        for name, (least, most) in ranges.items():
            scale, zero_point = _parameters(make, shape, axis, group, least, most, numbers)
            options: dict[str, Any] = {"dtype": make.dtype, "axis": axis, "group_size": group}
            if name.endswith("4"):
                options["from_dtype"] = name
                q = make(*shape[:-1], shape[-1] // 2, dtype=torch.uint8)
            else:
                q = make(*shape, dtype=getattr(torch, name))
            yield Sample((q, scale), options)
            yield Sample((q, scale, zero_point), options)


def _parameters(
    make: Maker,
    shape: tuple[int, ...],
    axis: int | tuple[int, ...] | None,
    group: int | None,
    least: int,
    most: int,
    numbers: torch.Generator,
) -> tuple[Tensor, Tensor]:
    axes = () if axis is None else (axis,) if isinstance(axis, int) else axis
    size = (*shape[:-1], shape[-1] // group) if group else tuple(shape[a] for a in axes)
    zero_point = torch.randint(least, most + 1, size, generator=numbers, dtype=torch.int32)
    return _scale(make, *size), zero_point.to(make.device)


register(
    Case(
        "quantize",
        quantize,
        _quantize_samples,
        lambda result, *_, **__: torch.zeros_like(result),
        lambda *_, **__: 0,
        "fastnn:quantize",
        dtypes=(*_FLOATS, torch.float64),
        differentiable=False,
        product=False,
        reference=_rounded,
        ties=_quantize_ties,
    )
)
register(
    Case(
        "dequantize",
        lambda *args, **options: dequantize(*args, **options).to(options["dtype"]),
        _dequantize_samples,
        lambda result, *_, **__: result.abs(),
        lambda *_, **__: 1,
        "fastnn:dequantize",
        dtypes=_FLOATS,
        differentiable=False,
        product=False,
        reference=dequantize,
    )
)

# ---- the linear layer --------------------------------------------------------------------------------------------

#: Rows, outputs, inputs.
_LAYERS = [(1, 1, 1), (1, 17, 31), (2, 33, 5), (5, 16, 65), (14, 31, 64), (17, 65, 127), (33, 15, 1027), (65, 33, 66)]


class _Straight(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradient: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def _codes(x: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x in steps of its scale, not rounded yet; its integers less their zero point; the scale; where it saturates."""
    x = _wide(x)
    if scale is None:
        finite = torch.where(x.isfinite(), x, 0.0)
        low, high = finite.amin(-1, keepdim=True).clamp(max=0), finite.amax(-1, keepdim=True).clamp(min=0)
        scale = high / 255 - low / 255
        scale = torch.where(scale == 0, 1.0, scale)
        zero_point = (-(low / scale).round()).clamp(0, 255)
    elif zero_point is None:
        zero_point = torch.tensor(128)
    y = x * (1.0 / scale)
    y = torch.where(y.isnan(), 0.0, y)
    whole = y.round() + zero_point
    return y, whole.clamp(0, 255) - zero_point, scale, (whole < 0) | (whole > 255)


def _sums(x: Tensor, weight: Tensor, weight_scale: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
    """The layer without bias and activation: sums of integers, exact in float64, times both scales."""
    _, q, scale, _ = _codes(x, scale, zero_point)
    sums = q.double() @ weight.double().t()
    return sums.to(q.dtype) * (scale * weight_scale)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(x̂ · ŵᵀ + bias) by torch's own functions, where x̂ is x rounded to 8 bits and ŵ an int8 weight with
    its scales."""
    with torch.no_grad():
        y = _sums(x, weight, weight_scale, input_scale, input_zero_point)
        y = y if bias is None else y + bias
    if x.requires_grad:
        # As if nothing were rounded; nothing flows to what a fixed scale cuts off.
        wide = x.to(y.dtype)
        if input_scale is not None:
            wide = torch.where(_codes(x.detach(), input_scale, input_zero_point)[3], wide.detach(), wide)
        numbers = weight * weight_scale.detach().unsqueeze(-1)
        y = _Straight.apply(y, F.linear(wide, numbers, None if bias is None else bias.to(y.dtype)))
    return ACTIVATIONS[activation][0](y.to(x.dtype))


def _int8_magnitude(
    result: Tensor, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    y = _sums(x, weight, weight_scale, options.get("input_scale"), options.get("input_zero_point"))
    size = y.abs() if bias is None else y.abs() + bias.abs()
    return ACTIVATIONS[options["activation"]][1] * size + size + result.abs()


def _int8_ties(
    result: Tensor, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    y, _, scale, _ = _codes(x, options.get("input_scale"), options.get("input_zero_point"))
    steps = _near(y, _STEPS * y.abs()) @ weight.abs().to(y.dtype).t()
    return ACTIVATIONS[options["activation"]][1] * steps * scale * weight_scale


def _int8_samples(make: Maker) -> Iterator[Sample]:
    names = list(ACTIVATIONS)
    for number, (m, n, k) in enumerate(_LAYERS + _LAYERS[1:]):
        x = make(*((3, m, k) if number % 5 == 4 else (m, k)))
        weight, weight_scale = make(n, k, dtype=torch.int8), _scale(make, n) / 16
        options: dict[str, Any] = {"activation": names[number % len(names)]}
        if number % 3 == 1:
            options |= {"input_scale": _number(make, 0.0173), "input_zero_point": _number(make, 101)}
        elif number % 3 == 2:
            options |= {"input_scale": _number(make, 0.0291)}
        yield Sample((x, weight, weight_scale, make(n)) if number % 4 else (x, weight, weight_scale), options)


register(
    Case(
        "int8_linear",
        int8_linear,
        _int8_samples,
        _int8_magnitude,
        # sigmoid, tanh and silu are computed to 2^-20, 16 roundings of float32.
        lambda *_, activation, **__: 24 if activation in ("sigmoid", "tanh", "silu") else 8,
        "fastnn.functional:int8_linear",
        dtypes=_FLOATS,
        exact=False,
        product=False,
        ties=_int8_ties,
    )
)

# ---- the convolution ---------------------------------------------------------------------------------------------

#: Batch, channels and filters of a group, groups, three spatial sizes and filter sizes of which an op takes the last, and the
#: options.
_CONVS: list[tuple[int, int, int, int, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    (1, 1, 1, 1, (1, 1, 1), (1, 1, 1), {}),
    (2, 3, 5, 1, (3, 7, 17), (3, 3, 3), {"padding": 1}),
    (1, 16, 17, 1, (2, 5, 15), (2, 1, 3), {"stride": 2}),
    (1, 2, 3, 2, (5, 6, 13), (2, 3, 3), {"dilation": 2, "padding": 2}),
    (2, 1, 1, 7, (3, 7, 8), (3, 3, 3), {"padding": 1}),
    (1, 31, 33, 1, (3, 5, 6), (1, 3, 5), {"padding": 3, "stride": 3}),
    (0, 2, 3, 1, (5, 5, 5), (3, 3, 3), {}),
    (1, 64, 13, 1, (2, 5, 7), (1, 3, 3), {"padding": 1}),
]


def _terms(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor,
    input_zero_point: Tensor,
    output_scale: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_zero_point: Tensor | None = None,
    **options: Any,
) -> list[Tensor]:
    """What is added up: the convolution, whose sums of integers are exact in float64, the bias, the residual."""
    channels = (-1, *(1,) * (x.dim() - 2))
    geometry = {name: options[name] for name in ("stride", "padding", "dilation", "groups") if name in options}
    convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    sums = convolve(x.double() - input_zero_point, weight.double(), **geometry).to(weight_scale.dtype)
    inverse = 1.0 if output_scale is None else 1.0 / output_scale
    terms = [sums * (input_scale * weight_scale * inverse).reshape(channels)]
    if bias is not None:
        terms.append((bias.to(sums.dtype) * inverse).reshape(channels).expand_as(sums))
    if residual is not None:
        difference = residual.to(torch.int64) - residual_zero_point
        terms.append(difference.to(sums.dtype) * (residual_scale * inverse))
    return terms


def _before_rounding(*args: Any, activation: str, **options: Any) -> Tensor:
    terms = _terms(*args, **options)
    v = sum(terms[1:], start=terms[0])
    if activation != "none":
        v = v.clamp(min=0)
    if activation == "relu6":
        scale = options.get("output_scale")
        v = torch.minimum(v, v.new_tensor(6.0) / (1.0 if scale is None else scale))
    return v


def _int8_conv(*args: Any, dtype: torch.dtype, output_zero_point: Tensor | None = None, **options: Any) -> Tensor:
    v = _before_rounding(*args, **options)
    if dtype.is_floating_point:
        return v
    v = torch.where(v.isnan(), 0.0, v)
    return (v.round() + output_zero_point).clamp(*_ENDS[dtype])


def int8_conv(*args: Any, **options: Any) -> Tensor:
    """activation(conv(x̂, ŵ) + bias + residual), rounded to the result's dtype, by torch's own functions."""
    return _int8_conv(*args, **options).to(options["dtype"])


def _conv_size(result: Tensor, *args: Any, **options: Any) -> Tensor:
    options = {name: value for name, value in options.items() if name != "activation"}
    return sum(term.abs() for term in _terms(*args, **options))


def _conv_ties(result: Tensor, *args: Any, **options: Any) -> Tensor:
    if options["dtype"].is_floating_point:
        return torch.zeros_like(result)
    return _near(_before_rounding(*args, **options), 2 * _STEPS * _conv_size(result, *args, **options))


def _conv_samples(rank: int) -> Callable[[Maker], Iterator[Sample]]:
    def samples(make: Maker) -> Iterator[Sample]:
        for number, (batch, channels, filters, groups, size, kernel, geometry) in enumerate(_CONVS):
            # The scales of small integers are powers of two, so that everything is exact.
            exact = make.values == "integer"
            integers = (torch.uint8, torch.int8)
            x = make(batch, channels * groups, *size[3 - rank :], dtype=integers[number % 2])
            weight = make(filters * groups, channels, *kernel[3 - rank :], dtype=torch.int8)
            weight_scale = _scale(make, *(() if number % 4 == 3 else (filters * groups,))) / 16
            zero_point = _number(make, (3, -2)[number % 2] if exact else (131, -7)[number % 2])
            options = {**geometry, "groups": groups, "activation": ("none", "relu", "relu6")[number % 3]}
            options |= {"input_scale": _number(make, 0.25 if exact else 0.0173), "input_zero_point": zero_point}
            args = (x, weight, weight_scale, make(filters * groups)) if number % 5 else (x, weight, weight_scale)
            yield Sample(args, {**options, "dtype": make.dtype})
            result = _before_rounding(*args, **options)
            options["residual"] = make(*result.shape, dtype=integers[number // 2 % 2])
            options["residual_scale"] = _number(make, 0.5 if exact else 0.0411)
            options["residual_zero_point"] = _number(make, 1)
            for dtype in integers:
                scale = _number(make, 0.125 if exact else 0.0377)
                zero_point = _number(make, -5 if dtype == torch.int8 else 100)
                yield Sample(args, {**options, "dtype": dtype, "output_scale": scale, "output_zero_point": zero_point})

    return samples


for _rank in (1, 2, 3):
    register(
        Case(
            f"int8_conv{_rank}d",
            int8_conv,
            _conv_samples(_rank),
            _conv_size,
            lambda *_, **__: 8,
            f"fastnn.functional:int8_conv{_rank}d",
            dtypes=(torch.float32, torch.bfloat16),
            differentiable=False,
            product=False,
            reference=_int8_conv,
            ties=_conv_ties,
        )
    )
