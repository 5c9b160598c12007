"""Maximum and average pooling over one, two or three dimensions, with fixed or adaptive windows, and their gradients.

The input is (N, C, *in) or (C, *in) in any strides, float32, float64, bfloat16 or float16; the result has the dtype and the
strides that torch gives. Output o of a dimension reads the elements o·stride − padding + k·dilation for k = 0 … kernel − 1,
as far as they exist; adaptive windows read ⌊o·in/out⌋ to ⌈(o+1)·in/out⌉ − 1. A maximum is the first of its window (in C
order), or its last NaN if there is one; an average is the window's sum, in float32 (float64 for float64), over its size.

The maxima come with codes, the number of the tap in its window, in one byte where the window has at most 256: the indices
that torch gives, eight bytes each, are made of them only where they are asked for. What gathers from the input by the codes
and what scatters to it are each other's gradient; so are the average and its gradient, up to a factor that each has.

Gradients are summed in the order of the outputs, in float32 or float64, and rounded once. Raises torch's exceptions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..backends import Kernels
from ..backends._pool import MOST_TAPS, Windows, code_dtype, taps
from ..backends._tensors import channels_last_strides
from ..backends.cpu import empty_image, tensor_pool, tensor_pool_backward
from ..backends.reference import pool as reference
from ._op import Op, Result
from ._route import (
    EAGER,
    TRANSFORM,
    Unsupported,
    describe,
    fall_back,
    is_autocast_enabled,
    is_dynamo_compiling,
    route,
    wants_grad,
)

F = torch.nn.functional
kernels = Kernels("pool")

#: What tensor_pool computes.
MAXIMUM, AVERAGE = range(2)

# ---- the public functions ----------------------------------------------------------------------------------------


def max_pool1d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Maxima of (N, C, L) or (C, L), as :func:`torch.nn.functional.max_pool1d`; with their indices where asked."""
    return _max_pool(1, F.max_pool1d, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Maxima of (N, C, H, W) or (C, H, W), as :func:`torch.nn.functional.max_pool2d`; with their indices where asked."""
    return _max_pool(2, F.max_pool2d, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool3d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Maxima of (N, C, D, H, W) or (C, D, H, W), as :func:`torch.nn.functional.max_pool3d`; with their indices where
    asked."""
    return _max_pool(3, F.max_pool3d, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def avg_pool1d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """Averages of (N, C, L) or (C, L), as :func:`torch.nn.functional.avg_pool1d`."""
    return _avg_pool(1, F.avg_pool1d, input, kernel_size, stride, padding, ceil_mode, count_include_pad)


def avg_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Averages of (N, C, H, W) or (C, H, W), as :func:`torch.nn.functional.avg_pool2d`."""
    arguments = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return _avg_pool(2, F.avg_pool2d, input, *arguments)


def avg_pool3d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Averages of (N, C, D, H, W) or (C, D, H, W), as :func:`torch.nn.functional.avg_pool3d`."""
    arguments = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return _avg_pool(3, F.avg_pool3d, input, *arguments)


def adaptive_max_pool1d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Maxima of (N, C, L) or (C, L), ``output_size`` of them, as :func:`torch.nn.functional.adaptive_max_pool1d`."""
    return _adaptive_max_pool(1, F.adaptive_max_pool1d, input, output_size, return_indices)


def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Maxima of (N, C, H, W) or (C, H, W), as :func:`torch.nn.functional.adaptive_max_pool2d`."""
    return _adaptive_max_pool(2, F.adaptive_max_pool2d, input, output_size, return_indices)


def adaptive_max_pool3d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Maxima of (N, C, D, H, W) or (C, D, H, W), as :func:`torch.nn.functional.adaptive_max_pool3d`."""
    return _adaptive_max_pool(3, F.adaptive_max_pool3d, input, output_size, return_indices)


def adaptive_avg_pool1d(input: Tensor, output_size: Any) -> Tensor:
    """Averages of (N, C, L) or (C, L), ``output_size`` of them, as :func:`torch.nn.functional.adaptive_avg_pool1d`."""
    return _adaptive_avg_pool(1, F.adaptive_avg_pool1d, input, output_size)


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """Averages of (N, C, H, W) or (C, H, W), as :func:`torch.nn.functional.adaptive_avg_pool2d`."""
    return _adaptive_avg_pool(2, F.adaptive_avg_pool2d, input, output_size)


def adaptive_avg_pool3d(input: Tensor, output_size: Any) -> Tensor:
    """Averages of (N, C, D, H, W) or (C, D, H, W), as :func:`torch.nn.functional.adaptive_avg_pool3d`."""
    return _adaptive_avg_pool(3, F.adaptive_avg_pool3d, input, output_size)


# ---- arguments ---------------------------------------------------------------------------------------------------


def _check_input(dims: int, input: Any) -> Tensor:
    if not isinstance(input, Tensor):
        raise Unsupported(f"input: expected a Tensor, got {type(input).__name__}")
    if input.layout is not torch.strided or input.is_nested:
        raise Unsupported("input: expected a dense tensor")
    if input.dim() not in (dims + 1, dims + 2):
        raise Unsupported(f"{describe('input', input)}: expected {dims + 1} or {dims + 2} dimensions")
    if 0 in input.shape[input.dim() - dims - 1 :]:
        raise Unsupported(f"{describe('input', input)}: only its batch may be of size 0")
    return input


def _numbers(name: str, value: Any, dims: int) -> tuple[int, ...]:
    """One number a dimension, from a number or a sequence of one or as many."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) for n in values):
        raise Unsupported(f"{describe(name, value)}: expected integers")
    if len(values) not in (1, dims):
        raise Unsupported(f"{name}: expected an integer or {dims} of them, got {len(values)}")
    return values if len(values) == dims else values * dims


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise Unsupported(f"{describe(name, value)}: expected True or False")


def _read_windows(dims: int, input: Tensor, *arguments: Any) -> tuple[Windows, tuple[int, ...]]:
    """The windows that kernel_size, stride, padding, dilation and ceil_mode mean, and the size of the output."""
    size = tuple(input.shape[input.dim() - dims :])
    if is_dynamo_compiling():
        return _windows_of(dims, size, *arguments)
    try:
        return _known_windows(dims, size, *arguments)
    except TypeError:  # lists and symbolic sizes
        return _windows_of(dims, size, *arguments)


def _windows_of(
    dims: int, sizes: tuple[int, ...], kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any
) -> tuple[Windows, tuple[int, ...]]:
    kernel = _numbers("kernel_size", kernel_size, dims)
    unset = stride is None or (isinstance(stride, (tuple, list)) and len(stride) == 0)
    steps = kernel if unset else _numbers("stride", stride, dims)
    around = _numbers("padding", padding, dims)
    apart = _numbers("dilation", dilation, dims)
    _check_bool("ceil_mode", ceil_mode)
    output = []
    for n, k, s, p, d in zip(sizes, kernel, steps, around, apart, strict=True):
        if k < 1:
            raise Unsupported("kernel_size: expected integers above 0")
        if s < 1:
            raise Unsupported("stride: expected integers above 0")
        if d < 1:
            raise Unsupported("dilation: expected integers above 0")
        reach = d * (k - 1) + 1
        if p < 0 or p > k // 2:
            raise Unsupported("padding: expected at least 0 and at most half of kernel_size")
        if n + 2 * p < reach:
            raise Unsupported("kernel_size: expected a window no larger than the padded input")
        if d > n:
            raise Unsupported("dilation: larger than the input, so that a window may have no element")
        room = n + 2 * p - reach
        size = (room + s - 1 if ceil_mode else room) // s + 1
        # No window begins in the padding on the right.
        output.append(size - 1 if ceil_mode and (size - 1) * s >= n + p else size)
    windows = Windows(kernel, steps, around, apart)
    if taps(windows, (), ()) > MOST_TAPS:
        raise Unsupported("kernel_size: a window of more than 2^24 elements")
    return windows, tuple(output)


# Reading the same arguments again and again would take longer than a small pool.
_known_windows = functools.lru_cache(maxsize=1024, typed=True)(_windows_of)

_ADAPTIVE = Windows((), (), (), ())


def _read_output_size(size: Sequence[Any], output_size: Any) -> tuple[int, ...]:
    dims = len(size)
    if output_size is None:
        raise Unsupported("output_size: expected an integer, or one or None for each dimension, got None")
    if dims > 1:
        sizes = output_size if isinstance(output_size, (tuple, list)) else (output_size,) * dims
        if len(sizes) != dims:
            raise Unsupported(f"output_size: expected {dims} sizes, got {len(sizes)}")
        output_size = tuple(n if o is None else o for n, o in zip(size, sizes, strict=True))
    output = _numbers("output_size", output_size, dims)
    if any(o < 1 for o in output):
        raise Unsupported("output_size: expected integers above 0")
    if taps(_ADAPTIVE, size, output) > MOST_TAPS:
        raise Unsupported("output_size: a window of more than 2^24 elements")
    return output


def _is_channels_last(x: Tensor, dims: int) -> bool:
    """Whether torch takes the strides for channels-last ones; it sees one dimension as the second of two."""
    if x.dim() != dims + 2 or (x.shape[1] > 1 and x.stride(-1) == 1):
        return False
    shape, strides = tuple(x.shape), x.stride()
    if dims == 1:
        shape, strides = (*shape[:2], 1, shape[2]), (*strides[:2], shape[2] * strides[2], strides[2])
    return _like_channels_last(shape, strides)


def _like_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """The rule of c10/core/MemoryFormat.h."""
    if strides[1] == 0:
        return False
    least = 0
    for d in (1, *range(len(shape) - 1, 1, -1), 0):
        if shape[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * shape[d] if shape[d] > 1 else strides[d]
    return True


def _widened(input: Tensor) -> Tensor:
    """For what torch.autocast("cpu") computes in float32."""
    halves = (torch.bfloat16, torch.float16)
    return input.float() if is_autocast_enabled("cpu") and input.is_cpu and input.dtype in halves else input


# ---- the way of a call -------------------------------------------------------------------------------------------


def _short(kind: int, dims: int, input: Any, windows: tuple[Any, ...]) -> Tensor | None:
    """The whole call in C, where nothing is unusual about it; else None. ``windows`` is the arguments that say where they
    are: of fixed ones from kernel_size to dilation, ceil_mode, count_include_pad and divisor_override."""
    if is_dynamo_compiling():
        return None
    found = tensor_pool(empty_image, kind, dims, input, windows)
    return _apply_pool(input, found, kind, windows) if type(found) is tuple else found


def _max_pool(
    dims: int,
    torch_function: Callable[..., Any],
    input: Any,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: Any,
    return_indices: Any,
) -> Any:
    if return_indices is False:
        found = _short(MAXIMUM, dims, input, (kernel_size, stride, padding, dilation, ceil_mode, True, None))
        if found is not None:
            return found
    windows_arguments = (kernel_size, stride, padding, dilation, ceil_mode)
    arguments = (*windows_arguments, return_indices)
    try:
        x = _check_input(dims, input)
        windows, output = _read_windows(dims, x, *windows_arguments)
        if dims == 3 and not return_indices:
            x = _widened(x)
        if dims == 3 and x.dim() == 4 and _like_channels_last((1, *x.shape), (x.numel(), *x.stride())):
            # Here alone torch looks at the strides of what has no batch.
            batch = x.movedim(0, -1).unsqueeze(0).movedim(-1, 1)
            found = _max_pool(dims, torch_function, batch, *arguments)
            return tuple(t.squeeze(0) for t in found) if return_indices else found.squeeze(0)
        # Without gradient and indices torch has another kernel in one dimension.
        keeps = dims > 1 or return_indices or wants_grad(x) or route("pool", x) == TRANSFORM
        return _maxima(x, windows, output, keeps and _is_channels_last(x, dims), bool(return_indices))
    except Unsupported as reason:
        return fall_back(f"max_pool{dims}d", reason.args[0], torch_function, input, *arguments)


def _adaptive_max_pool(
    dims: int, torch_function: Callable[..., Any], input: Any, output_size: Any, return_indices: Any
) -> Any:
    if return_indices is False:
        found = _short(MAXIMUM, dims, input, (output_size,))
        if found is not None:
            return found
    try:
        x = _check_input(dims, input)
        output = _read_output_size(x.shape[x.dim() - dims :], output_size)
        if dims == 3:
            x = _widened(x)
        return _maxima(x, _ADAPTIVE, output, dims < 3 and _is_channels_last(x, dims), bool(return_indices))
    except Unsupported as reason:
        name = f"adaptive_max_pool{dims}d"
        return fall_back(name, reason.args[0], torch_function, input, output_size, return_indices)


def _maxima(
    x: Tensor, windows: Windows, output: tuple[int, ...], channels_last: bool, return_indices: bool
) -> Tensor | tuple[Tensor, Tensor]:
    where = route("pool", x)
    if where == EAGER and not return_indices and not wants_grad(x):
        return kernels.max_pool(_plain(x), windows, output, channels_last, coded=False)[0]
    values, codes = max_pool(x, *windows, output, channels_last, where=where)
    if not return_indices:
        return values
    size = x.shape[x.dim() - len(output) :]
    return values, max_pool_indices(codes, *windows, size, channels_last, where=where)


def _avg_pool(
    dims: int,
    torch_function: Callable[..., Any],
    input: Any,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: Any,
    count_include_pad: Any,
    *divisor_override: Any,
) -> Tensor:
    divisor = divisor_override[0] if divisor_override else None
    found = _short(AVERAGE, dims, input, (kernel_size, stride, padding, 1, ceil_mode, count_include_pad, divisor))
    if found is not None:
        return found
    try:
        x = _check_input(dims, input)
        windows, output = _read_windows(dims, x, kernel_size, stride, padding, 1, ceil_mode)
        _check_bool("count_include_pad", count_include_pad)
        if divisor is not None and (not isinstance(divisor, int) or isinstance(divisor, bool) or divisor == 0):
            raise Unsupported(f"{describe('divisor_override', divisor)}: expected an integer other than 0")
        if dims == 3:
            x = _widened(x)
        channels_last = dims < 3 and _is_channels_last(x, dims)
        where = route("pool", x)
        return avg_pool(x, *windows, output, count_include_pad, divisor or 0, channels_last, where=where)
    except Unsupported as reason:
        arguments = (kernel_size, stride, padding, ceil_mode, count_include_pad, *divisor_override)
        return fall_back(f"avg_pool{dims}d", reason.args[0], torch_function, input, *arguments)


def _adaptive_avg_pool(dims: int, torch_function: Callable[..., Any], input: Any, output_size: Any) -> Tensor:
    found = _short(AVERAGE, dims, input, (output_size,))
    if found is not None:
        return found
    try:
        x = _check_input(dims, input)
        output = _read_output_size(x.shape[x.dim() - dims :], output_size)
        if dims == 3:
            x = _widened(x)
        # One average of a whole volume is torch.mean's.
        keeps = dims < 3 or all(o == 1 for o in output)
        channels_last = keeps and _is_channels_last(x, dims)
        return avg_pool(x, *_ADAPTIVE, output, True, 0, channels_last, where=route("pool", x))
    except Unsupported as reason:
        return fall_back(f"adaptive_avg_pool{dims}d", reason.args[0], torch_function, input, output_size)


def _plain(x: Tensor) -> Tensor:
    return x.resolve_neg() if x.is_neg() else x


def _derivative(op: Op, *args: Any) -> Any:
    """A linear op on a gradient or a tangent."""
    try:
        return op(*args)
    except Unsupported as reason:
        return fall_back(op.name, reason.args[0], op.reference, *args)


class _Pool(Function):
    """What the short way has computed, ``found``, made part of the graph."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, found: tuple[Tensor, Tensor | None, bool], kind: int, windows: tuple[Any, ...]
    ) -> Tensor:
        out, codes, ctx.channels_last = found
        ctx.kind, ctx.windows, ctx.size = kind, windows, input.shape
        ctx.save_for_backward(codes)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (codes,) = ctx.saved_tensors
        kind, arguments, size, last = ctx.kind, ctx.windows, ctx.size, ctx.channels_last
        if not is_dynamo_compiling():
            found = tensor_pool_backward(empty_image, kind, size, grad, codes, last, arguments)
            if found is not None:
                return found, None, None, None
        dims = len(size) - 2
        windows = _ADAPTIVE if len(arguments) == 1 else _windows_of(dims, size[2:], *arguments[:5])[0]
        if kind == MAXIMUM:
            found = _derivative(max_pool_backward, grad, codes, *windows, size, dims, last)
        else:
            counted = (True, 0) if len(arguments) == 1 else (arguments[5], arguments[6] or 0)
            found = _derivative(avg_pool_backward, grad, *windows, size, dims, *counted, last)
        return found, None, None, None


# Function.apply asks for transforms, of which the short way knows that there are none.
_apply_pool = super(Function, _Pool).apply


# ---- the ops -----------------------------------------------------------------------------------------------------


def _fake(x: Tensor, shape: Sequence[Any], channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    if channels_last:
        return x.new_empty_strided(shape, channels_last_strides(shape), dtype=dtype or x.dtype)
    return x.new_empty(shape, dtype=dtype or x.dtype)


def _output_shape(x: Tensor, output: Sequence[Any]) -> tuple[Any, ...]:
    return (*x.shape[: x.dim() - len(output)], *output)


def _fold(batch: int, dim: int | None, x: Tensor, rank: int) -> Tensor:
    """The mapped dimension of a tensor of ``rank`` otherwise, made part of its batch or the batch."""
    x = x.expand(batch, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1) if rank == 2 else x


def _unfold(result: Tensor, batch: int, rank: int) -> Tensor:
    return result.unflatten(0, (batch, -1 if result.shape[0] else 0)) if rank == 2 else result


def _fold_all(
    op: Op, info: Any, in_dims: Sequence[int | None], tensors: int, dims: int, args: Sequence[Any], size_at: int | None
) -> tuple[Result, Any]:
    """vmap of an op whose first ``tensors`` arguments are tensors, with or without a batch, by a larger batch. Argument
    ``size_at`` is the shape of the result."""
    batch, found = info.batch_size, list(args)
    lead = args[0].dim() - (in_dims[0] is not None) - dims  # 1, or 2 with a batch
    for i in range(tensors):
        found[i] = _fold(batch, in_dims[i], args[i], lead)
    if size_at is not None:
        size = tuple(args[size_at])
        found[size_at] = (batch * size[0], *size[1:]) if lead == 2 else (batch, *size)
    result = _derivative(op, *found)
    if isinstance(result, Tensor):
        return _unfold(result, batch, lead), 0
    return tuple(_unfold(r, batch, lead) for r in result), (0,) * len(result)


# max_pool: (values, codes)


def _max_fake(
    x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, output: Any, channels_last: bool
) -> Result:
    shape, size = _output_shape(x, output), x.shape[x.dim() - len(output) :]
    codes = code_dtype(Windows(kernel, stride, padding, dilation), size, output)
    return _fake(x, shape, channels_last), _fake(x, shape, channels_last, codes)


def _max_save(ctx: Any, args: tuple[Any, ...], result: Any) -> tuple[Tensor, ...]:
    x, *windows, output, channels_last = args
    ctx.windows, ctx.size, ctx.dims, ctx.channels_last = tuple(windows), tuple(x.shape), len(output), channels_last
    return (result[1],)


def _max_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    (codes,) = ctx.saved_tensors
    found = _derivative(max_pool_backward, grad, codes, *ctx.windows, ctx.size, ctx.dims, ctx.channels_last)
    return (found, *(None,) * 6)


def _max_jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, None]:
    (codes,) = ctx.saved_tensors
    return _derivative(max_pool_gather, tangent, codes, *ctx.windows, ctx.dims, ctx.channels_last), None


max_pool = Op(
    "max_pool(Tensor x, SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt[] output, "
    "bool channels_last) -> (Tensor, Tensor)",
    kernel=lambda x, k, s, p, d, output, channels_last: kernels.max_pool(x, Windows(k, s, p, d), output, channels_last),
    reference=lambda x, k, s, p, d, output, channels_last: reference.max_pool(x, Windows(k, s, p, d), output),
    fake=_max_fake,
    save=_max_save,
    backward=_max_backward,
    jvp=_max_jvp,
    vmap=lambda info, in_dims, *args: _fold_all(max_pool, info, in_dims, 1, len(args[5]), args, None),
)


# max_pool_indices: of codes


def _no_gradient(ctx: Any, *_: Any) -> tuple[None, ...]:
    return (None,) * 7


max_pool_indices = Op(
    "max_pool_indices(Tensor codes, SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt[] size, "
    "bool channels_last) -> Tensor",
    kernel=lambda codes, k, s, p, d, size, last: kernels.max_pool_indices(codes, Windows(k, s, p, d), size, last),
    reference=lambda codes, k, s, p, d, size, last: reference.max_pool_indices(codes, Windows(k, s, p, d), size),
    fake=lambda codes, k, s, p, d, size, last: _fake(codes, codes.shape, last, torch.int64),
    save=lambda ctx, args, result: (),
    backward=_no_gradient,
    jvp=lambda ctx, *_: None,
    vmap=lambda info, in_dims, *args: _fold_all(max_pool_indices, info, in_dims, 1, len(args[5]), args, None),
    differentiable=0,
    of_integers=True,
)


# max_pool_backward and max_pool_gather


def _scatter_save(ctx: Any, args: tuple[Any, ...], result: Any) -> tuple[Tensor, ...]:
    _, codes, *windows, size, dims, channels_last = args
    ctx.windows, ctx.size, ctx.dims, ctx.channels_last = tuple(windows), tuple(size), dims, channels_last
    return (codes,)


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (codes,) = ctx.saved_tensors
    return (_derivative(max_pool_gather, grad, codes, *ctx.windows, ctx.dims, ctx.channels_last), *(None,) * 8)


def _scatter_jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    (codes,) = ctx.saved_tensors
    return _derivative(max_pool_backward, tangent, codes, *ctx.windows, ctx.size, ctx.dims, ctx.channels_last)


max_pool_backward = Op(
    "max_pool_backward(Tensor grad, Tensor codes, SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "SymInt[] size, int dims, bool channels_last) -> Tensor",
    kernel=lambda g, codes, k, s, p, d, size, dims, last: kernels.max_pool_backward(
        g, codes, Windows(k, s, p, d), size, dims, last
    ),
    reference=lambda g, codes, k, s, p, d, size, dims, last: reference.max_pool_backward(
        g, codes, Windows(k, s, p, d), size, dims
    ),
    fake=lambda g, codes, k, s, p, d, size, dims, last: _fake(g, size, last),
    save=_scatter_save,
    backward=_scatter_backward,
    jvp=_scatter_jvp,
    vmap=lambda info, in_dims, *args: _fold_all(max_pool_backward, info, in_dims, 2, args[7], args, 6),
)


def _gather_save(ctx: Any, args: tuple[Any, ...], result: Any) -> tuple[Tensor, ...]:
    x, codes, *windows, dims, channels_last = args
    ctx.windows, ctx.size, ctx.dims, ctx.channels_last = tuple(windows), tuple(x.shape), dims, channels_last
    return (codes,)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (codes,) = ctx.saved_tensors
    found = _derivative(max_pool_backward, grad, codes, *ctx.windows, ctx.size, ctx.dims, ctx.channels_last)
    return (found, *(None,) * 7)


def _gather_jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    (codes,) = ctx.saved_tensors
    return _derivative(max_pool_gather, tangent, codes, *ctx.windows, ctx.dims, ctx.channels_last)


max_pool_gather = Op(
    "max_pool_gather(Tensor x, Tensor codes, SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation, int dims, "
    "bool channels_last) -> Tensor",
    kernel=lambda x, codes, k, s, p, d, dims, last: kernels.max_pool_gather(x, codes, Windows(k, s, p, d), dims, last),
    reference=lambda x, codes, k, s, p, d, dims, last: reference.max_pool_gather(x, codes, Windows(k, s, p, d), dims),
    fake=lambda x, codes, k, s, p, d, dims, last: _fake(x, codes.shape, last),
    save=_gather_save,
    backward=_gather_backward,
    jvp=_gather_jvp,
    vmap=lambda info, in_dims, *args: _fold_all(max_pool_gather, info, in_dims, 2, args[6], args, None),
)


# avg_pool and its gradient


def _avg_save(ctx: Any, args: tuple[Any, ...], result: Any) -> tuple[Tensor, ...]:
    x, *windows, output, include_padding, divisor, channels_last = args
    ctx.windows, ctx.size, ctx.output = tuple(windows), tuple(x.shape), tuple(output)
    ctx.rest = (include_padding, divisor, channels_last)
    return ()


def _avg_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    found = _derivative(avg_pool_backward, grad, *ctx.windows, ctx.size, len(ctx.output), *ctx.rest)
    return (found, *(None,) * 8)


def _avg_jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    return _derivative(avg_pool, tangent, *ctx.windows, ctx.output, *ctx.rest)


avg_pool = Op(
    "avg_pool(Tensor x, SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt[] output, "
    "bool include_padding, int divisor, bool channels_last) -> Tensor",
    kernel=lambda x, k, s, p, d, output, pads, divisor, last: kernels.avg_pool(
        x, Windows(k, s, p, d), output, pads, divisor, last
    ),
    reference=lambda x, k, s, p, d, output, pads, divisor, last: reference.avg_pool(
        x, Windows(k, s, p, d), output, pads, divisor
    ),
    fake=lambda x, k, s, p, d, output, pads, divisor, last: _fake(x, _output_shape(x, output), last),
    save=_avg_save,
    backward=_avg_backward,
    jvp=_avg_jvp,
    vmap=lambda info, in_dims, *args: _fold_all(avg_pool, info, in_dims, 1, len(args[5]), args, None),
)


def _avg_backward_save(ctx: Any, args: tuple[Any, ...], result: Any) -> tuple[Tensor, ...]:
    grad, *windows, size, dims, include_padding, divisor, channels_last = args
    ctx.windows, ctx.size, ctx.output = tuple(windows), tuple(size), tuple(grad.shape[grad.dim() - dims :])
    ctx.rest = (include_padding, divisor, channels_last)
    return ()


def _avg_backward_jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    return _derivative(avg_pool_backward, tangent, *ctx.windows, ctx.size, len(ctx.output), *ctx.rest)


avg_pool_backward = Op(
    "avg_pool_backward(Tensor grad, SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt[] size, "
    "int dims, bool include_padding, int divisor, bool channels_last) -> Tensor",
    kernel=lambda g, k, s, p, d, size, dims, pads, divisor, last: kernels.avg_pool_backward(
        g, Windows(k, s, p, d), size, dims, pads, divisor, last
    ),
    reference=lambda g, k, s, p, d, size, dims, pads, divisor, last: reference.avg_pool_backward(
        g, Windows(k, s, p, d), size, dims, pads, divisor
    ),
    fake=lambda g, k, s, p, d, size, dims, pads, divisor, last: _fake(g, size, last),
    save=_avg_backward_save,
    backward=lambda ctx, grad: (_avg_jvp(ctx, grad), *(None,) * 9),
    jvp=_avg_backward_jvp,
    vmap=lambda info, in_dims, *args: _fold_all(avg_pool_backward, info, in_dims, 1, args[6], args, 5),
)
