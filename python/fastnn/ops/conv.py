"""Convolution in 1, 2 and 3 dimensions and its transpose.

Formula: y[n, m, o] = Σ_{c,t} weight[m, c, t] · input[n, c, o·stride − padding + t·dilation] + bias[m], with o and t over
the spatial dimensions and the input zero outside of its bounds (a cross-correlation, as torch.nn.functional.conv2d). The
transposed convolution is the gradient of this by its input.

Shapes: input (N, C, *spatial) or (C, *spatial); weight (M, C / groups, *kernel), transposed (C, M / groups, *kernel); bias
(M). float32, float64, bfloat16 or float16, one dtype for all, any strides (weights that are neither contiguous nor
channels-last are copied), accumulated in float32 (float64 for float64) and rounded once. float32 obeys
``torch.get_float32_matmul_precision()``. The zeros around an input may be multiplied as if they were part of it: an
infinity or NaN in a weight can give NaN there, in the transposed convolutions and gradients too, where torch's would not.
The result is channels-last where input or weight is, as torch's. Complex and integer tensors, sparse ones,
float64 on a GPU, and devices without a backend go to torch. Bad input raises what torch raises: RuntimeError for
shapes, dtypes and devices, TypeError for what is no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import _cpu, _state
from ..backends import Kernels, cpu, cuda, names_of
from ..backends._conv import gives_channels_last, is_channels_last, result_shape
from ..backends._tensors import channels_last_strides
from ..backends.cpu.conv import Layer
from ..backends.cuda import conv as cuda_conv
from ..backends.reference import conv as reference
from ._op import Op
from ._route import (
    PLAIN,
    Unsupported,
    autocast,
    describe,
    fall_back,
    is_any_autocast_enabled,
    is_dynamo_compiling,
    is_straight,
    resolve,
    tracing_state,
)
from .activation import activation as apply_activation

_Numbers = int | Sequence[int]

kernels = Kernels("conv")

_tensor_convolution = cpu.tensor_convolution
_tensor_convolution_gradients = cpu.tensor_convolution_gradients
_tensor_inverted_residual = cpu.tensor_inverted_residual
_empty = cpu.empty_image


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Numbers = 1,
    padding: str | _Numbers = 0,
    dilation: _Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """As :func:`torch.nn.functional.conv1d`: input (N, C, L) or (C, L), weight (M, C / groups, K). See this module."""
    return _conv("conv1d", torch.nn.functional.conv1d, 1, input, weight, bias, stride, padding, dilation, groups)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Numbers = 1,
    padding: str | _Numbers = 0,
    dilation: _Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """As :func:`torch.nn.functional.conv2d`: input (N, C, H, W) or (C, H, W), weight (M, C / groups, Kh, Kw). See this
    module."""
    return _conv("conv2d", torch.nn.functional.conv2d, 2, input, weight, bias, stride, padding, dilation, groups)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Numbers = 1,
    padding: str | _Numbers = 0,
    dilation: _Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """As :func:`torch.nn.functional.conv3d`: input (N, C, D, H, W) or (C, D, H, W), weight (M, C / groups, Kd, Kh, Kw).
    See this module."""
    return _conv("conv3d", torch.nn.functional.conv3d, 3, input, weight, bias, stride, padding, dilation, groups)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Numbers = 1,
    padding: _Numbers = 0,
    output_padding: _Numbers = 0,
    groups: int = 1,
    dilation: _Numbers = 1,
) -> Tensor:
    """As :func:`torch.nn.functional.conv_transpose1d`: input (N, C, L) or (C, L), weight (C, M / groups, K), result of
    length (L − 1)·stride − 2·padding + dilation·(K − 1) + output_padding + 1. See this module."""
    function = torch.nn.functional.conv_transpose1d
    return _transposed(
        "conv_transpose1d", function, 1, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Numbers = 1,
    padding: _Numbers = 0,
    output_padding: _Numbers = 0,
    groups: int = 1,
    dilation: _Numbers = 1,
) -> Tensor:
    """As :func:`torch.nn.functional.conv_transpose2d`; sizes as in :func:`conv_transpose1d`, in each dimension."""
    function = torch.nn.functional.conv_transpose2d
    return _transposed(
        "conv_transpose2d", function, 2, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Numbers = 1,
    padding: _Numbers = 0,
    output_padding: _Numbers = 0,
    groups: int = 1,
    dilation: _Numbers = 1,
) -> Tensor:
    """As :func:`torch.nn.functional.conv_transpose3d`; sizes as in :func:`conv_transpose1d`, in each dimension."""
    function = torch.nn.functional.conv_transpose3d
    return _transposed(
        "conv_transpose3d", function, 3, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def conv_fused(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stride: _Numbers,
    padding: str | _Numbers,
    dilation: _Numbers,
    groups: int,
    activation: str,
    residual: Tensor | None = None,
    prepared: _cpu.Prepared | None = None,
    overwrite: bool = False,
    in_place: bool = False,
) -> Tensor | None:
    """activation(conv(input, weight) + bias + residual) in one pass, without gradients; as many dimensions as weight has.

    ``prepared`` keeps what the kernels make of weight for the next call with it: a new one where weight has changed.
    ``overwrite`` says that nobody needs the residual any more: its memory may become the result's. ``in_place``, that the
    residual is added to the convolution's result in place, as ``+=`` does: whose shape and dtype it is, whatever the residual's.
    From the second call on weight may be None where ``prepared`` is given; the result is None where it is needed
    nevertheless, with nothing written.

    ``activation`` is one of linear_act's. What the kernels do not take in one pass, a residual that broadcasts
    among it, is computed one after the other.
    """
    if not is_dynamo_compiling():
        found = _tensor_convolution(
            *(_empty, input, residual, overwrite, weight, bias, stride, padding, dilation, groups),
            *(cpu.ACTIVATION[activation], prepared),
        )
        if type(found) is Tensor:
            return found
    if weight is None:
        return None
    rank = weight.dim() - 2
    one_pass = (
        input.dim() == rank + 2
        and not input.is_meta
        and not isinstance(padding, str)
        and all(type(tensor) in PLAIN for tensor in (input, residual) if tensor is not None)
        and is_straight("conv", input, weight, *(tensor for tensor in (bias, residual) if tensor is not None))
    )
    if one_pass:
        options = [
            _numbers(name, value, rank, least)
            for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
        ]
        size = [
            (input.shape[2 + d] + 2 * p - dil * (weight.shape[2 + d] - 1) - 1) // s + 1
            for d, (s, p, dil) in enumerate(zip(*options, strict=True))
        ]
        fits = input.shape[1] == weight.shape[1] * groups and all(n > 0 for n in (*size, *weight.shape))
        fits = fits and convolution.too_large(input, weight, None, *options, groups) is None
        if fits and (residual is None or list(residual.shape) == [input.shape[0], weight.shape[0], *size]):
            return kernels.forward(
                resolve(input),
                resolve(weight),
                resolve(bias),
                *options,
                groups,
                activation,
                resolve(residual),
                None if weight.is_neg() else prepared,
                overwrite,
            )
    function = (conv1d, conv2d, conv3d)[rank - 1]
    y = function(input, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        y = y.add_(residual) if in_place else y + residual
    return apply_activation(activation, y)


#: A layer of an inverted residual.
FusedLayer = Layer


def inverted_residual(
    input: Tensor,
    residual: Tensor | None,
    expand: FusedLayer | None,
    expand_stride: _Numbers,
    expand_padding: _Numbers,
    depthwise: FusedLayer,
    stride: int,
    project: FusedLayer,
    in_place: bool = False,
) -> Tensor | None:
    """A convolution to many channels, a depthwise 3 × 3 one (padding 1) and a pointwise one to few, without gradients: what
    :func:`conv_fused` computes of each, one after the other (Sandler et al. 2018, arXiv:1801.04381, figure 3d).

    In one pass where the kernels take it so, what lies between them staying in the caches: the first convolution sees few
    elements (a pointwise one, of a channels-last input, any number of channels), and there are no fewer channels than lanes
    in a vector. Else in three. None as for :func:`conv_fused`.
    """
    if not is_dynamo_compiling():
        found = _tensor_inverted_residual(
            *(_empty, input, residual, expand, expand_stride, expand_padding, depthwise, stride, project)
        )
        if found is not None:
            return found
    if any(layer is not None and layer[0] is None for layer in (expand, depthwise, project)):
        return None
    if not is_dynamo_compiling() and not cpu.has_table:
        found = _inverted_residual(
            *(input, residual, expand, expand_stride, expand_padding, depthwise, stride, project)
        )
        if found is not None:
            return found
    y = input
    if expand is not None:
        y = _one_layer(y, expand, expand_stride, expand_padding, 1)
    y = _one_layer(y, depthwise, stride, 1, depthwise[0].shape[0])
    return _one_layer(y, project, 1, 0, 1, residual, in_place)


def _inverted_residual(
    input: Tensor,
    residual: Tensor | None,
    expand: FusedLayer | None,
    expand_stride: _Numbers,
    expand_padding: _Numbers,
    depthwise: FusedLayer,
    stride: int,
    project: FusedLayer,
) -> Tensor | None:
    """The one pass, asked for as the short way asks; None where the layers are to be called one by one."""
    layers = [layer for layer in (expand, depthwise, project) if layer is not None]
    tensors = [input, *(tensor for layer in layers for tensor in layer[:2] if tensor is not None)]
    if residual is not None:
        tensors.append(residual)
    if (
        _state.settings() is not _state.PLAIN
        or is_any_autocast_enabled()
        or not is_straight("conv", *tensors)
        or any(tensor.is_neg() or tensor.numel() == 0 for tensor in tensors)
        or any(tensor.dim() != 4 for tensor in (input, *(layer[0] for layer in layers)))
        or stride not in (1, 2)
    ):
        return None
    strides = _numbers("stride", expand_stride, 2, 1)
    pads = _numbers("padding", expand_padding, 2, 0)
    hidden, size = input.shape[1], list(input.shape[2:])
    if expand is not None:
        if expand[0].shape[1] != hidden:
            return None
        hidden = expand[0].shape[0]
        size = [n + 2 * p - k for n, p, k in zip(size, pads, expand[0].shape[2:], strict=True)]
    fits = depthwise[0].shape == (hidden, 1, 3, 3) and project[0].shape[1:] == (hidden, 1, 1)
    if not fits or any(n < 0 for n in size) or not all(_is_bias(layer[1], layer[0]) for layer in layers):
        return None
    return kernels.inverted_residual(input, residual, expand, strides, pads, depthwise, stride, project)


def _is_bias(bias: Tensor | None, weight: Tensor) -> bool:
    return bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous())


activation_number = cpu.ACTIVATION.__getitem__
_ACTIVATION_NAMES = {number: name or "none" for name, number in cpu.ACTIVATION.items()}


def _one_layer(
    input: Tensor,
    layer: FusedLayer,
    stride: _Numbers,
    padding: _Numbers,
    groups: int,
    residual: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    weight, bias, activation, prepared = layer
    name = _ACTIVATION_NAMES[activation]
    return conv_fused(*(input, weight, bias, stride, padding, 1, groups, name, residual, prepared), in_place=in_place)


# ---- checks ------------------------------------------------------------------------------------------------------


def _numbers(name: str, value: Any, rank: int, least: int) -> list[int]:
    """One number for all spatial dimensions, or one for each."""
    values = list(value) if isinstance(value, (tuple, list, torch.Size)) else [value]
    if len(values) == 1:
        values *= rank
    if len(values) != rank or not all(isinstance(v, (int, torch.SymInt)) and not isinstance(v, bool) for v in values):
        raise Unsupported(f"{name}: expected an integer or {rank} of them, got {value!r}")
    if any(v < least for v in values):
        raise Unsupported(f"{name}: expected {'positive' if least else 'non-negative'} numbers, got {value!r}")
    return values


def _check(input: Any, weight: Any, bias: Any, rank: int, groups: Any, transposed: bool) -> None:
    for name, value in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor) and not (value is None and name == "bias"):
            raise Unsupported(f"{name}: expected a Tensor, got {type(value).__name__}")
        if value is not None and (value.is_nested or value.layout is not torch.strided):
            raise Unsupported(f"{name}: expected a dense tensor")
        if value is not None and value.device != input.device:
            raise Unsupported(f"{name}: expected the device of input, {input.device}, got {value.device}")
    if weight.dim() != rank + 2 or input.dim() not in (rank + 1, rank + 2):
        raise Unsupported(
            f"expected input of {rank + 1} or {rank + 2} dimensions and weight of {rank + 2}, got "
            f"{describe('input', input)}, {describe('weight', weight)}"
        )
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        raise Unsupported(f"groups: expected a positive integer, got {groups!r}")
    channels = input.shape[-rank - 1]
    expected = weight.shape[0] if transposed else weight.shape[1] * groups
    if channels != expected or weight.shape[0] % groups or weight.shape[0] == 0 or channels == 0:
        raise Unsupported(
            f"input: expected {describe('weight', weight)} with groups={groups} to match its channels, got "
            f"{describe('input', input)}"
        )
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != outputs):
        raise Unsupported(f"bias: expected one number a channel, ({outputs}), got {describe('bias', bias)}")
    if any(size == 0 for size in weight.shape):
        raise Unsupported(f"weight: expected elements, got {describe('weight', weight)}")


def _one_dtype(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    input, weight, bias = autocast(input, weight, bias)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != input.dtype:
            raise Unsupported(f"{name}: expected the dtype of input, {input.dtype}, got {value.dtype}")
    return input, weight, bias


def _conv(
    op: str,
    torch_function: Callable[..., Tensor],
    rank: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Tensor:
    if not is_dynamo_compiling() and getattr(input, "ndim", 0) == rank + 2:
        found = _tensor_convolution(
            *(_empty, input, None, False, weight, bias, stride, padding, dilation, groups, 0, None)
        )
        if type(found) is tuple:
            return _apply_convolution(input, weight, bias, found, stride, padding, dilation, groups)
        if found is not None:
            return found
    try:
        _check(input, weight, bias, rank, groups, False)
        strides = _numbers("stride", stride, rank, 1)
        dilations = _numbers("dilation", dilation, rank, 1)
        kernel = weight.shape[2:]
        x = input
        if isinstance(padding, str):
            if padding not in ("same", "valid") or (padding == "same" and any(s != 1 for s in strides)):
                raise Unsupported(f"padding: expected numbers, 'valid', or 'same' with stride 1, got {padding!r}")
            pads = [0] * rank
            if padding == "same":
                total = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
                pads = [t // 2 for t in total]
                if any(t % 2 for t in total):  # one more at the end
                    more = [n for t in reversed(total) for n in (0, t % 2)]
                    x = torch.nn.functional.pad(x, more)
        else:
            pads = _numbers("padding", padding, rank, 0)
        for d in range(rank):
            if input.shape[d - rank] == 0:
                raise Unsupported(f"input: expected spatial sizes of at least 1, got {describe('input', input)}")
            if x.shape[d - rank] + 2 * pads[d] < dilations[d] * (kernel[d] - 1) + 1:
                raise Unsupported(
                    f"weight: expected a kernel no larger than the padded input, got {describe('input', input)}, "
                    f"{describe('weight', weight)}, padding={padding!r}, dilation={dilation!r}"
                )
        x, w, b = _one_dtype(x, weight, bias)
        batched = x.dim() == rank + 2
        y = convolution(x if batched else x.unsqueeze(0), w, b, strides, pads, dilations, groups)
        return y if batched else y.squeeze(0)
    except Unsupported as reason:
        return fall_back(op, reason.args[0], torch_function, input, weight, bias, stride, padding, dilation, groups)


def _transposed(
    op: str,
    torch_function: Callable[..., Tensor],
    rank: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
) -> Tensor:
    try:
        if tracing_state() is not None:
            raise Unsupported("torch.jit.trace, in which the sizes of a result are no numbers")
        _check(input, weight, bias, rank, groups, True)
        strides = _numbers("stride", stride, rank, 1)
        pads = _numbers("padding", padding, rank, 0)
        extra = _numbers("output_padding", output_padding, rank, 0)
        dilations = _numbers("dilation", dilation, rank, 1)
        for d in range(rank):
            if extra[d] >= max(strides[d], dilations[d]):
                raise Unsupported(
                    f"output_padding: expected less than the stride or the dilation, got {output_padding!r}, "
                    f"{stride!r}, {dilation!r}"
                )
        x, w, b = _one_dtype(input, weight, bias)
        batched = x.dim() == rank + 2
        x = x if batched else x.unsqueeze(0)
        if any(e >= s for e, s in zip(extra, strides, strict=True)):
            # A convolution of which this is the transpose has as many positions more; nothing came from them.
            more = [n for e, s in zip(reversed(extra), reversed(strides), strict=True) for n in (0, e // s)]
            x = torch.nn.functional.pad(x, more)
            extra = [e % s for e, s in zip(extra, strides, strict=True)]
        size = [
            (x.shape[2 + d] - 1) * strides[d] - 2 * pads[d] + dilations[d] * (w.shape[2 + d] - 1) + extra[d] + 1
            for d in range(rank)
        ]
        if any(n < 1 for n in (*size, *input.shape[-rank:])):
            raise Unsupported(f"input: expected sizes that give a result, got {describe('input', input)} -> {size}")
        y = convolution_input(x, w, b, size, strides, pads, dilations, groups)
        return y if batched else y.squeeze(0)
    except Unsupported as reason:
        return fall_back(
            op,
            reason.args[0],
            torch_function,
            input,
            weight,
            bias,
            stride,
            padding,
            output_padding,
            groups,
            dilation,
        )


# ---- the three products of a convolution, each the derivative of the other two -----------------------------------


def _bias_gradient(grad: Tensor) -> Tensor:
    if is_straight("conv", grad):
        return kernels.channel_sum(resolve(grad))
    return grad.sum((0, *range(2, grad.dim())))


def _fake_layout(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    if not channels_last:
        return like.new_empty(shape)
    return like.new_empty_strided(shape, channels_last_strides(shape))


def _fold(x: Tensor, dim: int | None) -> Tensor:
    """The mapped dimension as part of the batch."""
    return x.movedim(dim, 0).flatten(0, 1)


def _as_groups(x: Tensor, dim: int | None, count: int) -> Tensor:
    """(N, C, ...) with the mapped dimension before C, or repeated there where there is none: (N, B · C, ...)."""
    x = x.unsqueeze(1).expand(-1, count, *x.shape[1:]) if dim is None else x.movedim(dim, 1)
    return x.flatten(1, 2)


def _as_filters(w: Tensor, dim: int | None, count: int) -> Tensor:
    """(M, ...) -> (B · M, ...)"""
    w = w.expand(count, *w.shape) if dim is None else w.movedim(dim, 0)
    return w.flatten(0, 1)


def _with_bias(y: Tensor, b: Tensor | None, dim: int | None) -> Tensor:
    """Adds a bias to (B, N, M, ...)."""
    if b is None:
        return y
    b = b.unsqueeze(0) if dim is None else b.movedim(dim, 0)
    return y + b.reshape(b.shape[0], 1, b.shape[1], *[1] * (y.dim() - 3))


# -- y from x and w


def _forward_fake(
    x: Tensor, w: Tensor, b: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    channels_last = gives_channels_last(x, w, False, stride, padding, dilation, groups)
    return _fake_layout(x, result_shape(x, w, stride, padding, dilation), channels_last)


def _forward_save(ctx: Any, args: tuple[Any, ...], y: Tensor) -> tuple[Tensor | None, ...]:
    x, w, _, *ctx.options = args
    ctx.size, ctx.kernel = list(x.shape[2:]), list(w.shape[2:])
    ctx.channels_last = is_channels_last(w)
    return x, w


def _forward_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, w = ctx.saved_tensors
    needs = ctx.needs_input_grad
    by_x = convolution_input.either(grad, w, None, ctx.size, *ctx.options) if needs[0] else None
    by_w = convolution_weight.either(grad, x, ctx.kernel, *ctx.options, ctx.channels_last) if needs[1] else None
    by_b = _bias_gradient(grad) if needs[2] else None
    return by_x, by_w, by_b, None, None, None, None


class _Convolution(Function):
    """What the short way has computed, ``found``, made part of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        found: tuple[Tensor],
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
    ) -> Tensor:
        ctx.given = (stride, padding, dilation, groups)
        ctx.save_for_backward(x, w)
        return found[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if not is_dynamo_compiling():
            found = _tensor_convolution_gradients(_empty, grad, x, w, *ctx.given, needs[0], needs[1], needs[2])
            if found is not None:
                return (*found, None, None, None, None, None)
        rank = x.dim() - 2
        *numbers, groups = ctx.given
        least = zip(("stride", "padding", "dilation"), numbers, (1, 0, 1), strict=True)
        ctx.options = [*(_numbers(name, value, rank, low) for name, value, low in least), groups]
        ctx.size, ctx.kernel = list(x.shape[2:]), list(w.shape[2:])
        ctx.channels_last = is_channels_last(w)
        return (*_forward_backward(ctx, grad)[:3], None, None, None, None, None)


# Function.apply asks for transforms, of which the short way knows that there are none.
_apply_convolution = super(Function, _Convolution).apply


def _forward_jvp(ctx: Any, x_t: Tensor | None, w_t: Tensor | None, b_t: Tensor | None, *_: None) -> Tensor:
    x, w = ctx.saved_tensors
    terms = []
    if x_t is not None:
        terms.append(convolution(x_t, w, None, *ctx.options))
    if w_t is not None:
        terms.append(convolution(x, w_t, None, *ctx.options))
    return _sum_of(terms, b_t, lambda: convolution(x, w, None, *ctx.options))


def _sum_of(terms: list[Tensor], b_t: Tensor | None, shape_of: Callable[[], Tensor]) -> Tensor:
    result = terms[0] if terms else torch.zeros_like(shape_of())
    for term in terms[1:]:
        result = result + term
    return result if b_t is None else result + b_t.reshape(-1, *[1] * (result.dim() - 2))


def _forward_vmap(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, w: Tensor, b: Tensor | None, *options: Any
) -> tuple[Tensor, int]:
    *options, groups = options
    count = info.batch_size
    if in_dims[1] is None and in_dims[0] is not None:
        y = convolution(_fold(x, in_dims[0]), w, None, *options, groups).unflatten(0, (count, -1))
    elif in_dims[1] is None:
        y = convolution(x, w, None, *options, groups).unsqueeze(0)
    else:
        y = convolution(
            _as_groups(x, in_dims[0], count), _as_filters(w, in_dims[1], count), None, *options, groups * count
        )
        y = y.unflatten(1, (count, -1)).movedim(1, 0)
    y = _with_bias(y, b, in_dims[2])
    return y.expand(count, *y.shape[1:]), 0


# -- x from y and w


def _input_fake(
    y: Tensor, w: Tensor, b: Tensor | None, size: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    channels_last = gives_channels_last(y, w, True, stride, padding, dilation, groups)
    return _fake_layout(y, (y.shape[0], w.shape[1] * groups, *size), channels_last)


def _input_save(ctx: Any, args: tuple[Any, ...], x: Tensor) -> tuple[Tensor | None, ...]:
    y, w, _, ctx.size, *ctx.options = args
    ctx.kernel = list(w.shape[2:])
    ctx.channels_last = is_channels_last(w)
    return y, w


def _input_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    y, w = ctx.saved_tensors
    needs = ctx.needs_input_grad
    by_y = convolution.either(grad, w, None, *ctx.options) if needs[0] else None
    by_w = convolution_weight.either(y, grad, ctx.kernel, *ctx.options, ctx.channels_last) if needs[1] else None
    by_b = _bias_gradient(grad) if needs[2] else None
    return by_y, by_w, by_b, None, None, None, None, None


def _input_jvp(ctx: Any, y_t: Tensor | None, w_t: Tensor | None, b_t: Tensor | None, *_: None) -> Tensor:
    y, w = ctx.saved_tensors
    terms = []
    if y_t is not None:
        terms.append(convolution_input(y_t, w, None, ctx.size, *ctx.options))
    if w_t is not None:
        terms.append(convolution_input(y, w_t, None, ctx.size, *ctx.options))
    return _sum_of(terms, b_t, lambda: convolution_input(y, w, None, ctx.size, *ctx.options))


def _input_vmap(
    info: Any, in_dims: tuple[Any, ...], y: Tensor, w: Tensor, b: Tensor | None, *options: Any
) -> tuple[Tensor, int]:
    *options, groups = options
    count = info.batch_size
    if in_dims[1] is None and in_dims[0] is not None:
        x = convolution_input(_fold(y, in_dims[0]), w, None, *options, groups).unflatten(0, (count, -1))
    elif in_dims[1] is None:
        x = convolution_input(y, w, None, *options, groups).unsqueeze(0)
    else:
        x = convolution_input(
            _as_groups(y, in_dims[0], count), _as_filters(w, in_dims[1], count), None, *options, groups * count
        )
        x = x.unflatten(1, (count, -1)).movedim(1, 0)
    x = _with_bias(x, b, in_dims[2])
    return x.expand(count, *x.shape[1:]), 0


# -- w from y and x


def _weight_fake(
    y: Tensor,
    x: Tensor,
    kernel: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    channels_last: bool,
) -> Tensor:
    return _fake_layout(x, (y.shape[1], x.shape[1] // groups, *kernel), channels_last)


def _weight_save(ctx: Any, args: tuple[Any, ...], _: Tensor) -> tuple[Tensor | None, ...]:
    y, x, ctx.kernel, *ctx.options, ctx.channels_last = args
    ctx.size = list(x.shape[2:])
    return y, x


def _weight_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    y, x = ctx.saved_tensors
    needs = ctx.needs_input_grad
    by_y = convolution.either(x, grad, None, *ctx.options) if needs[0] else None
    by_x = convolution_input.either(y, grad, None, ctx.size, *ctx.options) if needs[1] else None
    return by_y, by_x, None, None, None, None, None, None


def _weight_jvp(ctx: Any, y_t: Tensor | None, x_t: Tensor | None, *_: None) -> Tensor:
    y, x = ctx.saved_tensors
    terms = []
    if y_t is not None:
        terms.append(convolution_weight(y_t, x, ctx.kernel, *ctx.options, ctx.channels_last))
    if x_t is not None:
        terms.append(convolution_weight(y, x_t, ctx.kernel, *ctx.options, ctx.channels_last))
    return _sum_of(terms, None, lambda: convolution_weight(y, x, ctx.kernel, *ctx.options, ctx.channels_last))


def _weight_vmap(
    info: Any, in_dims: tuple[Any, ...], y: Tensor, x: Tensor, kernel: Any, *options: Any
) -> tuple[Tensor, int]:
    *options, groups, channels_last = options
    count = info.batch_size
    w = convolution_weight(
        _as_groups(y, in_dims[0], count),
        _as_groups(x, in_dims[1], count),
        kernel,
        *options,
        groups * count,
        channels_last,
    )
    return w.unflatten(0, (count, -1)), 0


class _Product(Op):
    """With a way out for backwards, whose gradients may be what the kernels do not take. ``shapes``: of x, w and y, from the
    arguments."""

    def __init__(
        self, schema: str, in_torch: Callable[..., Tensor], shapes: Callable[..., tuple[Any, ...]], **rules: Any
    ) -> None:
        super().__init__(schema, **rules)
        self._in_torch, self._shapes = in_torch, shapes

    def too_large(self, *args: Any) -> str | None:
        """None where the sizes are no reason against the kernels, else the reason, for people."""
        if "cuda" not in names_of(args[0]) or cuda.why_not() is not None:
            return None
        return cuda_conv.too_large(*self._shapes(*args))

    def __call__(self, *args: Any, where: str | None = None) -> Any:
        reason = self.too_large(*args)
        if reason is not None:
            raise Unsupported(reason)
        return super().__call__(*args, where=where)

    def either(self, *args: Any) -> Tensor:
        try:
            return self(*args)
        except Unsupported as reason:
            return fall_back(self.name, reason.args[0], self._in_torch, *args)


def _torch_forward(x: Tensor, w: Tensor, b: Tensor | None, stride: Any, padding: Any, dilation: Any, g: int) -> Tensor:
    return torch.convolution(x, w, b, stride, padding, dilation, False, [0] * len(stride), g)


def _torch_input(
    y: Tensor, w: Tensor, b: Tensor | None, size: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    extra = [
        size[d] - ((y.shape[2 + d] - 1) * stride[d] - 2 * padding[d] + dilation[d] * (w.shape[2 + d] - 1) + 1)
        for d in range(len(size))
    ]
    return torch.convolution(y, w, b, stride, padding, dilation, True, extra, groups)


def _torch_weight(
    y: Tensor,
    x: Tensor,
    kernel: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    channels_last: bool,
) -> Tensor:
    shape = (y.shape[1], x.shape[1] // groups, *kernel)
    w = x.new_zeros(1).expand(shape)
    nothing = [0] * len(stride)
    mask = [False, True, False]
    return torch.ops.aten.convolution_backward(y, x, w, None, stride, padding, dilation, False, nothing, groups, mask)[
        1
    ]


_OPTIONS = "int[] stride, int[] padding, int[] dilation, SymInt groups"

convolution = _Product(
    f"convolution(Tensor x, Tensor w, Tensor? b, {_OPTIONS}) -> Tensor",
    _torch_forward,
    lambda x, w, b, stride, padding, dilation, groups: (
        *(x.shape, w.shape, result_shape(x, w, stride, padding, dilation)),
        *(stride, padding, dilation, groups),
    ),
    kernel=kernels.forward,
    reference=reference.forward,
    fake=_forward_fake,
    save=_forward_save,
    backward=_forward_backward,
    jvp=_forward_jvp,
    vmap=_forward_vmap,
    autocast=True,
)
convolution_input = _Product(
    f"convolution_input(Tensor y, Tensor w, Tensor? b, SymInt[] size, {_OPTIONS}) -> Tensor",
    _torch_input,
    lambda y, w, b, size, *options: ((y.shape[0], w.shape[1] * options[-1], *size), w.shape, y.shape, *options),
    kernel=kernels.input,
    reference=reference.input,
    fake=_input_fake,
    save=_input_save,
    backward=_input_backward,
    jvp=_input_jvp,
    vmap=_input_vmap,
    autocast=True,
)
convolution_weight = _Product(
    f"convolution_weight(Tensor y, Tensor x, SymInt[] kernel, {_OPTIONS}, bool channels_last) -> Tensor",
    _torch_weight,
    lambda y, x, kernel, stride, padding, dilation, groups, channels_last: (
        *(x.shape, (y.shape[1], x.shape[1] // groups, *kernel), y.shape),
        *(stride, padding, dilation, groups),
    ),
    kernel=kernels.weight,
    reference=reference.weight,
    fake=_weight_fake,
    save=_weight_save,
    backward=_weight_backward,
    jvp=_weight_jvp,
    vmap=_weight_vmap,
)
