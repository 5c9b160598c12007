"""Group normalization (Wu and He, arXiv:1803.08494) and instance normalization (Ulyanov, Vedaldi and Lempitsky,
arXiv:1607.08022), which is the same with groups of one channel.

Formula: (input - mean) / sqrt(var + eps) * weight + bias, with the mean and the biased variance of each group of channels
of each image. Shapes: input (N, C, ...), of three dimensions or more for instance norm; what belongs to a channel (C). The
running statistics of instance norm become (1 - momentum) * running + momentum * statistic, that being the mean over the
images, with unbiased variances; without use_input_stats they are what is normalized with, as in batch norm.

input in float32, float64, bfloat16 or float16, any strides; weight, bias and running statistics in its dtype, or all in
float32 beside a 16-bit input. Group norm's result is channels-last where the input is, else contiguous; that of instance
norm is contiguous: both as torch's. Statistics are sums of deviations in float32 (float64 for float64), combined in float64
in an order that depends on the shape of an image alone. torch.autocast changes nothing here, as in torch on a CPU. Other
dtypes and layouts go to torch. Bad input raises what torch raises: ValueError for one value a group or channel; RuntimeError
for wrong sizes, dtypes and devices, and for channels that the groups do not divide; TypeError for what is no tensor or number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ..backends import Kernels, cpu
from ..backends.cpu import norm as batch_kernels
from ..backends.reference import group_norm as formulas
from ._op import Op
from ._route import Unsupported, ask_torch, describe, fall_back, is_dynamo_compiling, route
from .batch_norm import BATCH_NORM, check_numbers, check_per_channel, check_tensors, update_running

_torch_group_norm = torch.nn.functional.group_norm
_torch_instance_norm = torch.nn.functional.instance_norm
_tensor_group_norm = cpu.tensor_group_norm
_tensor_group_norm_backward = cpu.tensor_group_norm_backward
_empty = batch_kernels.empty_result
_kernels = Kernels("group_norm")


# ---- the public functions ----------------------------------------------------------------------------------------


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """As :func:`torch.nn.functional.group_norm`. See this module for shapes, dtypes and errors."""
    if not is_dynamo_compiling():
        found = _tensor_group_norm(_empty, input, num_groups, weight, bias, eps)
        if type(found) is tuple:
            return _apply_group_norm(input, weight, bias, found, num_groups, eps)
        if found is not None:
            return found
    return group_norm_or(_torch_group_norm, input, num_groups, weight, bias, eps)


def group_norm_or(
    in_torch: Callable[..., Tensor],
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """What the kernels do not take ``in_torch``, a function of the same arguments, answers: torch.group_norm and
    torch.nn.functional.group_norm check them differently."""
    everything = (input, num_groups, weight, bias, eps)
    try:
        per_channel = (("weight", weight), ("bias", bias))
        check_tensors(input, per_channel)
        check_numbers(eps=eps)
        if isinstance(num_groups, bool) or not isinstance(num_groups, (int, torch.SymInt)):
            raise Unsupported(f"num_groups: expected an int, got {type(num_groups).__name__}")
        if input.dim() < 2 or num_groups < 1 or input.shape[1] % num_groups:
            raise Unsupported(
                f"num_groups: expected a divisor of the channels of {describe('input', input)}, got {num_groups}"
            )
        if input.numel() == num_groups:
            raise Unsupported(f"input: expected more than 1 value a group, got {describe('input', input)}")
        check_per_channel(input, per_channel)
        if input.numel() == 0:
            return ask_torch("group_norm", "an input without elements", in_torch, *everything)
        where = route("group_norm", input, weight, bias)
        return GROUP_NORM(input, num_groups, weight, bias, float(eps), where=where)[0]
    except Unsupported as reason:
        return fall_back("group_norm", reason.args[0], in_torch, *everything)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As :func:`torch.nn.functional.instance_norm`. See this module for shapes, dtypes and errors."""
    if running_mean is None and running_var is None and use_input_stats is True and not is_dynamo_compiling():
        found = _tensor_group_norm(_empty, input, None, weight, bias, eps)
        if type(found) is tuple:
            return _apply_group_norm(input, weight, bias, found, input.shape[1], eps)
        if found is not None:
            return found
    return instance_norm_or(
        _torch_instance_norm, input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


def instance_norm_or(
    in_torch: Callable[..., Tensor],
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """As :func:`group_norm_or`."""
    everything = (input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    try:
        per_channel = (("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias))
        check_tensors(input, per_channel)
        check_numbers(momentum=momentum, eps=eps)
        if not isinstance(use_input_stats, bool):
            raise Unsupported(f"use_input_stats: expected a bool, got {type(use_input_stats).__name__}")
        if input.dim() < 2:
            raise Unsupported(f"input: expected (N, C, ...), got {describe('input', input)}")
        if (running_mean is None) != (running_var is None) or (running_mean is None and not use_input_stats):
            raise Unsupported("running_mean, running_var: expected both, or neither with use_input_stats")
        check_per_channel(input, per_channel)
        if input.numel() == 0:
            return ask_torch("instance_norm", "an input without elements", in_torch, *everything)
        images, channels = input.shape[:2]
        n = input.numel() // (images * channels)
        if use_input_stats and n == 1:
            raise Unsupported(f"input: expected more than 1 value a channel, got {describe('input', input)}")
        where = route("instance_norm", input, running_mean, running_var, weight, bias)
        # torch's result is contiguous.
        if batch_kernels.result_format(input) is not torch.contiguous_format:
            input = input.contiguous()
        if not use_input_stats:
            return BATCH_NORM(input, running_mean, running_var, weight, bias, None, float(eps), False, where=where)[0]
        out, mean, var = GROUP_NORM(input, channels, weight, bias, float(eps), where=where)
    except Unsupported as reason:
        return fall_back("instance_norm", reason.args[0], in_torch, *everything)
    if running_mean is not None:
        update_running(running_mean, mean.mean(0), momentum)
        update_running(running_var, var.mean(0) * (n / (n - 1)), momentum)
    return out


# ---- derivatives -------------------------------------------------------------------------------------------------


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What derivatives in plain torch are computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _normalized(ctx: Any, input: Tensor) -> formulas.NormalizedGroups:
    # The statistics are computed again, so that their own derivatives are part of the formula.
    return formulas.NormalizedGroups(input, ctx.groups, ctx.eps, _wide(input.dtype))


def _save(ctx: Any, args: tuple[Any, ...], result: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    input, ctx.groups, weight, bias, ctx.eps = args
    ctx.bias_dtype = None if bias is None else bias.dtype
    return input, weight, *result[1:]


class _GroupNorm(Function):
    """What the short way has computed, ``found``, made part of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        found: tuple[Tensor, Tensor, Tensor],
        groups: int,
        eps: float,
    ) -> Tensor:
        out, mean, var = found
        ctx.groups, ctx.eps = groups, eps
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(input, weight, mean, var)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        by_input, _, by_weight, by_bias, _ = _backward(ctx, grad)
        return by_input, by_weight, by_bias, None, None, None


# Function.apply asks for transforms, of which the short way knows that there are none.
_apply_group_norm = super(Function, _GroupNorm).apply


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    input, weight, mean, var = ctx.saved_tensors
    if not is_dynamo_compiling():
        found = _tensor_group_norm_backward(
            _empty, grad, input, ctx.groups, weight, mean, var, ctx.eps, ctx.bias_dtype is not None
        )
        if found is not None:
            by_input, by_weight, by_bias = found
            return by_input, None, by_weight, by_bias, None
    args = (grad, input, ctx.groups, weight, mean, var, ctx.eps)

    def in_torch() -> tuple[Tensor, ...]:
        return formulas.group_norm_backward(*args, dtype=_wide(input.dtype))

    if forward_ad._current_level >= 0:
        # Forward mode over reverse mode: torch knows how to differentiate the formula.
        found = in_torch()
    else:
        try:
            found = GROUP_NORM_BACKWARD(*args)
        except Unsupported as reason:
            found = fall_back("group_norm_backward", reason.args[0], in_torch)
    by_input, by_weight, by_bias = found
    return (
        by_input,
        None,
        None if weight is None else by_weight.to(weight.dtype),
        None if ctx.bias_dtype is None else by_bias.to(ctx.bias_dtype),
        None,
    )


def _jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
    by_input, _, by_weight, by_bias, _ = tangents
    input, weight, *_ = ctx.saved_tensors
    normal = _normalized(ctx, input)
    result = torch.zeros_like(normal.value)
    if by_input is not None:
        result = result + normal.scale(weight) * normal.derivative(by_input.to(normal.dtype))
    if by_weight is not None:
        result = result + normal.per_channel(by_weight) * normal.value
    if by_bias is not None:
        result = result + normal.per_channel(by_bias)
    return result.to(input.dtype), None, None


def _save_backward(ctx: Any, args: tuple[Any, ...], result: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    grad, input, ctx.groups, weight, _, _, ctx.eps = args
    return grad, input, weight


def _backward_twice(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """The gradients by grad, input and weight of a sum of all gradients, each times one of ``grads``.

    With D = the derivative of x^ (symmetric): grad_input = D (weight * grad), grad_weight = sum(grad x^), grad_bias =
    sum(grad), the sums over all images and places.
    """
    grad, input, weight = ctx.saved_tensors
    normal = _normalized(ctx, input)
    of_input, of_weight, of_bias = grads
    g = grad.to(normal.dtype)
    by_grad, by_input, by_weight = torch.zeros_like(g), torch.zeros_like(g), None
    if of_input is not None:
        a = of_input.to(normal.dtype)
        scale, forth = normal.scale(weight), normal.derivative(a)
        by_grad = by_grad + scale * forth
        by_input = by_input + normal.second_derivative(a, scale * g)
        by_weight = normal.over_images(g * forth)
    if of_weight is not None:
        p = normal.per_channel(of_weight)
        by_grad = by_grad + p * normal.value
        by_input = by_input + normal.derivative(p * g)
    if of_bias is not None:
        by_grad = by_grad + normal.per_channel(of_bias)
    return (
        by_grad.to(grad.dtype),
        by_input.to(input.dtype),
        None,
        None if weight is None or by_weight is None else by_weight.to(weight.dtype),
        *[None] * 3,
    )


# ---- vmap ----------------------------------------------------------------------------------------------------------


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """What is mapped over becomes more images; a weight that is mapped over itself goes behind the kernel."""
    input, groups, weight, bias, eps = args
    size = info.batch_size
    input = input.expand(size, *input.shape) if in_dims[0] is None else input.movedim(in_dims[0], 0)
    images = input.flatten(0, 1)
    if in_dims[2] is None and in_dims[3] is None:
        found = GROUP_NORM(images, groups, weight, bias, eps)
        return tuple(t.unflatten(0, (size, -1)) for t in found), (0, 0, 0)
    wide = _wide(input.dtype)

    def mapped(x: Tensor, dim: int | None) -> Tensor:
        x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.to(wide).reshape(size, 1, -1, *[1] * (input.dim() - 3))

    out, mean, var = (t.unflatten(0, (size, -1)) for t in GROUP_NORM(images.to(wide), groups, None, None, eps))
    if weight is not None:
        out = out * mapped(weight, in_dims[2])
    if bias is not None:
        out = out + mapped(bias, in_dims[3])
    return (out.to(input.dtype), mean, var), (0, 0, 0)


def _vmap_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """One call an item: each has sums of its own."""
    found = []
    for i in range(info.batch_size):
        item = (x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True))
        found.append(GROUP_NORM_BACKWARD(*item))
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True)), (0, 0, 0)


# ---- the ops -----------------------------------------------------------------------------------------------------


def _empty_result(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=batch_kernels.result_format(input))


def _fake(input: Tensor, groups: int, *_: Any) -> tuple[Tensor, ...]:
    mean = input.new_empty((input.shape[0], groups), dtype=torch.float64)
    return _empty_result(input), mean, torch.empty_like(mean)


def _fake_backward(grad: Tensor, input: Tensor, *_: Any) -> tuple[Tensor, ...]:
    by_weight = input.new_empty(input.shape[1], dtype=torch.float64)
    return _empty_result(input), by_weight, torch.empty_like(by_weight)


#: The result, and the mean and biased variance of each group, (N, groups) in float64.
GROUP_NORM = Op(
    "group_norm(Tensor input, int groups, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    kernel=_kernels.group_norm,
    reference=formulas.group_norm,
    fake=_fake,
    save=_save,
    backward=_backward,
    vmap=_vmap,
    jvp=_jvp,
)

#: The gradients of input, and of weight and bias in float64.
GROUP_NORM_BACKWARD = Op(
    "group_norm_backward(Tensor grad, Tensor input, int groups, Tensor? weight, Tensor mean, Tensor var, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    kernel=_kernels.group_norm_backward,
    reference=formulas.group_norm_backward,
    fake=_fake_backward,
    save=_save_backward,
    backward=_backward_twice,
    vmap=_vmap_backward,
    differentiable=3,
)
