"""Batch normalization (Ioffe and Szegedy, arXiv:1502.03167), with an added residual and relu in the same pass.

Formula: (input - mean) / sqrt(var + eps) * weight + bias, for each channel. Shapes: input (N, C, ...) of two dimensions or
more, what belongs to a channel (C). In training, mean and var (biased) are those of the input over all but its channels,
and the running statistics become (1 - momentum) * running + momentum * statistic, with the unbiased variance; else the
running statistics are taken.

input in float32, float64, bfloat16 or float16, any strides; weight, bias and running statistics in its dtype, or all in
float32 beside a 16-bit input. The result has torch's strides: channels-last where the input is, else contiguous.
Statistics are sums of deviations in float32 (float64 for float64), combined in float64 in an order that depends on the
shape alone. Other dtypes and layouts go to torch. Bad input raises what torch raises: ValueError for one value a channel in
training, for eps or for one of the running statistics alone; RuntimeError for wrong sizes, dtypes and devices; TypeError
for what is no tensor or number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import Function, forward_ad

from ..backends import Kernels, cpu
from ..backends._running_statistics import move
from ..backends.cpu import norm as kernels
from ..backends.reference import norm as formulas
from ._op import Op
from ._route import (
    EAGER,
    Unsupported,
    ask_torch,
    describe,
    fall_back,
    functorch_active,
    is_dynamo_compiling,
    is_wrapped,
    route,
)

_torch_batch_norm = torch.nn.functional.batch_norm
_tensor_batch_norm = cpu.tensor_batch_norm
_tensor_batch_norm_backward = cpu.tensor_batch_norm_backward
_empty = kernels.empty_result
_kernels = Kernels("norm")

is_gradtracking = torch._C._functorch.is_gradtrackingtensor

#: What batch_norm_act takes.
KINDS = ("none", "relu")


# ---- the public functions ----------------------------------------------------------------------------------------


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As :func:`torch.nn.functional.batch_norm`. See this module for shapes, dtypes and errors."""
    return _run("batch_norm", input, running_mean, running_var, weight, bias, training, momentum, eps, False, None)


def batch_norm_or(in_torch: Callable[..., Tensor], *everything: Any) -> Tensor:
    """batch_norm with all of its arguments. What the kernels do not take ``in_torch``, a function of the same, answers:
    torch.batch_norm and torch.nn.functional.batch_norm check them differently."""

    def answer(*everything: Any) -> Tensor:
        return in_torch(*everything[:-2])

    return _run("batch_norm", *everything, False, None, answer)


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    residual: Tensor | None = None,
) -> Tensor:
    """activation(batch_norm(input, ...) + residual) in the pass over the input that writes the result.

    ``activation`` is "relu" or "none"; else ValueError. ``residual`` has the input's shape and dtype; TypeError for what is no
    Tensor.
    """
    if activation not in KINDS:
        raise ValueError(f"fastnn.batch_norm_act: activation: expected one of {', '.join(KINDS)}, got {activation!r}")
    if residual is not None and not isinstance(residual, Tensor):
        raise TypeError(f"fastnn.batch_norm_act: residual: expected a Tensor, got {type(residual).__name__}")
    relu = activation == "relu"
    return _run(
        "batch_norm_act", input, running_mean, running_var, weight, bias, training, momentum, eps, relu, residual
    )


def _run(
    op: str,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
    residual: Tensor | None,
    in_torch: Callable[..., Tensor] | None = None,
) -> Tensor:
    if not is_dynamo_compiling():
        found = _tensor_batch_norm(
            _empty, input, running_mean, running_var, weight, bias, residual, training, momentum, eps, relu
        )
        if type(found) is tuple:
            return _apply_batch_norm(input, weight, bias, residual, found, training, eps, relu)
        if found is not None:
            return found
    everything = (input, running_mean, running_var, weight, bias, training, momentum, eps, relu, residual)
    try:
        _check(input, running_mean, running_var, weight, bias, training, momentum, eps, residual)
        if input.numel() == 0:
            return ask_torch(op, "an input without elements", in_torch or _in_torch, *everything)
        where = route("batch_norm", input, running_mean, running_var, weight, bias, residual)
        given = (None, None) if training else (running_mean, running_var)
        out, mean, var = BATCH_NORM(input, *given, weight, bias, residual, eps, relu, where=where)
    except Unsupported as reason:
        return fall_back(op, reason.args[0], in_torch or _in_torch, *everything)
    if training and running_mean is not None:
        n = input.numel() / input.shape[1]
        if where == EAGER:
            _kernels.update_running(running_mean, running_var, mean, var, n / (n - 1), momentum)
        else:
            update_running(running_mean, mean, momentum)
            update_running(running_var, var * (n / (n - 1)), momentum)
    return out


def _in_torch(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
    residual: Tensor | None,
) -> Tensor:
    result = _torch_batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        result = result + residual
    return torch.relu(result) if relu else result


def _check(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    training: Any,
    momentum: Any,
    eps: Any,
    residual: Any,
) -> None:
    per_channel = (("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias))
    check_tensors(input, (*per_channel, ("residual", residual)))
    if not isinstance(training, bool):
        raise Unsupported(f"training: expected a bool, got {type(training).__name__}")
    check_numbers(momentum=momentum, eps=eps)
    if input.dim() < 2:
        raise Unsupported(f"input: expected (N, C, ...), got {describe('input', input)}")
    if running_mean is None or running_var is None:
        if running_mean is not running_var:
            raise Unsupported("running_mean, running_var: expected both or neither")
        if not training:
            raise Unsupported("running_mean, running_var: expected tensors where training is False, got None")
    check_per_channel(input, per_channel)
    if residual is not None and (
        residual.shape != input.shape or residual.dtype is not input.dtype or residual.device != input.device
    ):
        raise Unsupported(
            f"residual: expected what input has, got {describe('residual', residual)} for {describe('input', input)}"
        )
    if training:
        if eps <= 0:
            raise Unsupported(f"eps: expected more than 0 in training, got {eps}")
        if input.numel() == input.shape[1]:
            raise Unsupported(
                f"input: expected more than 1 value a channel in training, got {describe('input', input)}"
            )


Named = tuple[tuple[str, Any], ...]


def check_tensors(input: Any, others: Named) -> None:
    """Raises Unsupported for an input that is no tensor, and for others that are neither tensor nor None."""
    for name, value in (("input", input), *others):
        if not isinstance(value, Tensor) and (value is not None or name == "input"):
            raise Unsupported(f"{name}: expected a Tensor, got {type(value).__name__}")
        if value is not None and value.is_nested:
            raise Unsupported(f"{name}: a nested tensor")


def check_numbers(**numbers: Any) -> None:
    """Raises Unsupported for what is no number."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise Unsupported(f"{name}: expected a float, got {type(value).__name__}")


def check_per_channel(input: Tensor, per_channel: Named) -> None:
    """Raises Unsupported where what is given for each channel has not the shape, dtype and device that it must have."""
    dtype = input.dtype
    for name, value in per_channel:
        if value is None:
            continue
        if value.dim() != 1 or value.shape[0] != input.shape[1]:
            raise Unsupported(f"{name}: expected (C), got {describe(name, value)} for {describe('input', input)}")
        if value.device != input.device:
            raise Unsupported(f"{name}: expected the device of input, {input.device}, got {value.device}")
        if value.dtype is not dtype:
            if dtype is not input.dtype or value.dtype is not torch.float32 or input.dtype not in cpu.HALF:
                raise Unsupported(f"{name}: expected dtype {dtype}, got {value.dtype} for {describe('input', input)}")
            dtype = torch.float32
    # The first of them decides whether all are in float32.
    for name, value in per_channel:
        if value is not None and value.dtype is not dtype:
            raise Unsupported(f"{name}: expected dtype {dtype} as the others, got {value.dtype}")
    for name, value in per_channel:
        if name.startswith("running") and value is not None and value.requires_grad:
            raise Unsupported(f"{name}: requires grad, but there is no gradient by it")


def update_running(running: Tensor, statistic: Tensor, momentum: float) -> None:
    """running = (1 - momentum) * running + momentum * statistic, rounded once."""
    level = contextlib.nullcontext()
    if functorch_active() and not is_wrapped(running):
        # As torch's own, below the transforms that take gradients: what is captured may not be changed at their level.
        while is_gradtracking(statistic):
            statistic = torch._C._functorch.get_unwrapped(statistic)
        if not is_wrapped(statistic):
            level = temporarily_clear_interpreter_stack()
    with level, torch.no_grad():
        move(running, statistic, momentum)


# ---- derivatives -------------------------------------------------------------------------------------------------


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What derivatives in plain torch are computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _normalized(ctx: Any, input: Tensor, mean: Tensor, var: Tensor) -> formulas.Normalized:
    # In training the statistics are computed again, so that their own derivatives are part of the formula.
    given = (None, None) if ctx.training else (mean, var)
    return formulas.Normalized(input, *given, ctx.eps, _wide(input.dtype))


def _save(ctx: Any, args: tuple[Any, ...], result: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    input, given_mean, _, weight, bias, residual, ctx.eps, ctx.relu = args
    out, mean, var = result
    ctx.training = given_mean is None
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.residual = residual is not None
    return input, weight, mean, var, out if ctx.relu else None


class _BatchNorm(Function):
    """What the short way has computed, ``found``, made part of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        found: tuple[Tensor, Tensor, Tensor],
        training: bool,
        eps: float,
        relu: bool,
    ) -> Tensor:
        out, mean, var = found
        ctx.training, ctx.eps, ctx.relu = training, eps, relu
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.residual = residual is not None
        ctx.save_for_backward(input, weight, mean, var, out if relu else None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        by_input, _, _, by_weight, by_bias, by_residual, _, _ = _backward(ctx, grad)
        return by_input, by_weight, by_bias, by_residual, None, None, None, None


# Function.apply asks for transforms, of which the short way knows that there are none.
_apply_batch_norm = super(Function, _BatchNorm).apply


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    input, weight, mean, var, out = ctx.saved_tensors
    if not is_dynamo_compiling():
        found = _tensor_batch_norm_backward(
            *(_empty, grad, input, weight, mean, var, out, ctx.training, ctx.eps),
            *(ctx.bias_dtype is not None, ctx.residual),
        )
        if found is not None:
            by_input, by_weight, by_bias, by_residual = found
            return by_input, None, None, by_weight, by_bias, by_residual, None, None
    args = (grad, input, weight, mean, var, out, ctx.training, ctx.eps, ctx.residual)
    if forward_ad._current_level >= 0:
        # Forward mode over reverse mode: torch knows how to differentiate the formula.
        found = formulas.batch_norm_backward(*args, dtype=_wide(input.dtype))
    else:
        try:
            found = BATCH_NORM_BACKWARD(*args)
        except Unsupported as reason:
            found = fall_back(
                "batch_norm_backward",
                reason.args[0],
                lambda: formulas.batch_norm_backward(*args, dtype=_wide(input.dtype)),
            )
    by_input, by_weight, by_bias, by_residual = found
    return (
        by_input,
        None,
        None,
        None if weight is None else by_weight.to(weight.dtype),
        None if ctx.bias_dtype is None else by_bias.to(ctx.bias_dtype),
        by_residual if ctx.residual else None,
        None,
        None,
    )


def _jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
    by_input, _, _, by_weight, by_bias, by_residual, *_ = tangents
    input, weight, mean, var, out = ctx.saved_tensors
    normal = _normalized(ctx, input, mean, var)
    result = torch.zeros_like(normal.value)
    if by_input is not None:
        result = result + normal.scale(weight) * normal.derivative(by_input.to(normal.dtype))
    if by_weight is not None:
        result = result + normal.per_channel(by_weight) * normal.value
    if by_bias is not None:
        result = result + normal.per_channel(by_bias)
    if by_residual is not None:
        result = result + by_residual.to(normal.dtype)
    return formulas.relu_gradient(result, out).to(input.dtype), None, None


def _save_backward(ctx: Any, args: tuple[Any, ...], result: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    *tensors, ctx.training, ctx.eps, ctx.residual = args
    return tuple(tensors)


def _backward_twice(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """The gradients by grad, input and weight of a sum of all gradients, each times one of ``grads``.

    With D = the derivative of x^ (symmetric), g = grad behind the relu and r = 1 / sqrt(var + eps): grad_input =
    weight * D g, grad_weight = sum(g x^), grad_bias = sum(g), grad_residual = g. Where the statistics are the input's, r
    changes with it by -r² x^ / n.
    """
    grad, input, weight, mean, var, out = ctx.saved_tensors
    normal = _normalized(ctx, input, mean, var)
    dtype = normal.dtype
    of_input, of_weight, of_bias, of_residual = grads
    g = formulas.relu_gradient(grad.to(dtype), out)
    scale = normal.scale(weight)
    by_grad, by_input, by_weight = torch.zeros_like(g), torch.zeros_like(g), None
    if of_input is not None:
        a = of_input.to(dtype)
        forth, back = normal.derivative(a), normal.derivative(g)
        by_grad = by_grad + scale * forth
        by_weight = normal.sum(a * back)
        if ctx.training:
            n = g.numel() / g.shape[1]
            r, x = normal.inverse_deviation, normal.value
            a_x, g_x = normal.sum(a * x), normal.sum(g * x)
            left = normal.sum(a * g) - normal.sum(a) * normal.sum(g) / n - a_x * g_x / n
            by_input = by_input - scale * (r / n) * (r * x * left + forth * g_x + back * a_x)
    if of_weight is not None:
        p = normal.per_channel(of_weight)
        by_grad = by_grad + p * normal.value
        by_input = by_input + p * normal.derivative(g)
    if of_bias is not None:
        by_grad = by_grad + normal.per_channel(of_bias)
    if of_residual is not None and ctx.residual:
        by_grad = by_grad + of_residual.to(dtype)
    return (
        formulas.relu_gradient(by_grad, out).to(grad.dtype),
        by_input.to(input.dtype),
        None if weight is None or by_weight is None else by_weight.reshape(-1).to(weight.dtype),
        *[None] * 6,
    )


# ---- vmap: what is mapped over becomes more channels -------------------------------------------------------------


def _more_channels(x: Tensor | None, dim: int | None, size: int, channel_axis: int) -> Tensor | None:
    if x is None:
        return None
    if dim is None:
        x = x.unsqueeze(channel_axis).expand(*x.shape[:channel_axis], size, *x.shape[channel_axis:])
    else:
        x = x.movedim(dim, channel_axis)
    return x.flatten(channel_axis, channel_axis + 1)


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    size = info.batch_size
    axes = (1, 0, 0, 0, 0, 1)
    tensors = [_more_channels(x, dim, size, axis) for x, dim, axis in zip(args, in_dims, axes, strict=False)]
    out, mean, var = BATCH_NORM(*tensors, *args[6:])
    return (out.unflatten(1, (size, -1)), mean.unflatten(0, (size, -1)), var.unflatten(0, (size, -1))), (1, 0, 0)


def _vmap_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    size = info.batch_size
    axes = (1, 1, 0, 0, 0, 1)
    tensors = [_more_channels(x, dim, size, axis) for x, dim, axis in zip(args, in_dims, axes, strict=False)]
    by_input, by_weight, by_bias, by_residual = BATCH_NORM_BACKWARD(*tensors, *args[6:])
    residual = args[8]
    return (
        by_input.unflatten(1, (size, -1)),
        by_weight.unflatten(0, (size, -1)),
        by_bias.unflatten(0, (size, -1)),
        by_residual.unflatten(1, (size, -1)) if residual else by_residual,
    ), (1, 0, 0, 1 if residual else None)


# ---- the ops -----------------------------------------------------------------------------------------------------


def _empty_result(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=kernels.result_format(input))


def _fake(input: Tensor, *_: Any) -> tuple[Tensor, ...]:
    statistic = input.new_empty(input.shape[1], dtype=torch.float64)
    return _empty_result(input), statistic, torch.empty_like(statistic)


def _fake_backward(grad: Tensor, input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    residual = args[-1]
    statistic = input.new_empty(input.shape[1], dtype=torch.float64)
    by_residual = _empty_result(input) if residual else input.new_empty(0)
    return _empty_result(input), statistic, torch.empty_like(statistic), by_residual


#: The result, and the mean and biased variance it was computed with in float64: those of the input where none are given.
BATCH_NORM = Op(
    "batch_norm(Tensor input, Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
    "bool relu) -> (Tensor, Tensor, Tensor)",
    kernel=_kernels.batch_norm,
    reference=formulas.batch_norm,
    fake=_fake,
    save=_save,
    backward=_backward,
    vmap=_vmap,
    jvp=_jvp,
)

#: The gradients of input, weight and bias (in float64), and residual; that is empty where there was none.
BATCH_NORM_BACKWARD = Op(
    "batch_norm_backward(Tensor grad, Tensor input, Tensor? weight, Tensor mean, Tensor var, Tensor? out, bool training, "
    "float eps, bool residual) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_kernels.batch_norm_backward,
    reference=formulas.batch_norm_backward,
    fake=_fake_backward,
    save=_save_backward,
    backward=_backward_twice,
    vmap=_vmap_backward,
    differentiable=4,
)
