"""linear, and linear_act: a linear layer with its activation fused into the product's epilogue.

Formula: activation(input @ weightᵀ + bias). Shapes: input (..., in), weight (out, in), bias (out), result (..., out),
contiguous. float32, float64, bfloat16 or float16, one dtype for all, any strides, accumulated in float32 (float64 for
float64) and rounded once. float32 obeys ``torch.get_float32_matmul_precision()``. What else torch takes (a vector as
weight, a bias that broadcasts, integers, sparse weights, float64 on a GPU, devices without a backend) goes to torch. Bad
input raises what torch raises: RuntimeError for shapes, dtypes and devices, TypeError for what is no tensor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from .. import _state
from ..backends import Kernels, cpu, reference
from . import _route
from ._library import define
from ._out import write_out
from ._route import (
    LIBRARY,
    REFERENCE,
    TRANSFORM,
    Unsupported,
    autocast,
    describe,
    fall_back,
    resolve,
    route,
    wants_grad,
)
from .activation import activation as apply_activation
from .activation import activation_backward, check_kind, torch_activation
from .gemm import kernel_product, product

_torch_linear = torch.nn.functional.linear

_settings = _state.settings
_is_dynamo_compiling = _route.is_dynamo_compiling
_tensor_product = cpu.tensor_product
_kernels = Kernels()


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """input @ weightᵀ + bias, as :func:`torch.nn.functional.linear`. See this module for shapes, dtypes and errors."""
    if not _is_dynamo_compiling():
        output = _tensor_product(cpu.LINEAR, input, weight, bias, 0, out)
        if type(output) is tuple:
            return _apply_linear(input, weight, bias, "none", output)
        if output is not None:
            return output
    if out is not None:
        return _linear_out(input, weight, bias, out)
    return _linear(input, weight, bias, "none")


def linear_act(input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """activation(input @ weightᵀ + bias) in one pass over the result.

    ``activation`` is "none", "relu", "relu6", "gelu", "gelu_tanh", "silu", "sigmoid" or "tanh"; else ValueError. Where
    a gradient is wanted, gelu and silu, whose derivatives need their input, run in two passes.
    """
    check_kind("linear_act", activation)
    if not _is_dynamo_compiling():
        output = _tensor_product(cpu.LINEAR, input, weight, bias, cpu.ACTIVATION[activation], None)
        if type(output) is tuple:
            return _apply_linear(input, weight, bias, activation, output)
        if output is not None:
            return output
    return _linear(input, weight, bias, activation)


def _check(input: Any, weight: Any, bias: Any) -> None:
    for name, value in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor) and not (value is None and name == "bias"):
            raise Unsupported(f"{name}: expected a Tensor, got {type(value).__name__}")
        if value is not None and value.is_nested:
            raise Unsupported(f"{name}: a nested tensor")
    if input.dim() < 1 or weight.dim() != 2 or input.shape[-1] != weight.shape[1]:
        raise Unsupported(
            "expected input (..., in_features) and weight (out_features, in_features), got "
            f"{describe('input', input)}, {describe('weight', weight)}"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise Unsupported(
            f"bias: expected (out_features), got {describe('bias', bias)} for {describe('weight', weight)}"
        )
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.device != input.device:
            raise Unsupported(f"{name}: expected the device of input, {input.device}, got {value.device}")


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    op = "linear" if activation == "none" else "linear_act"
    try:
        _check(input, weight, bias)
        input, weight, bias = autocast(input, weight, bias)
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None and value.dtype != input.dtype:
                raise Unsupported(f"{name}: expected the dtype of input, {input.dtype}, got {value.dtype}")
        where = route("gemm", input, weight, bias)
    except Unsupported as reason:
        return fall_back(op, reason.args[0], _in_torch, input, weight, bias, activation)
    if where == REFERENCE:
        return reference.linear(input, weight, bias, activation)
    if where == TRANSFORM:
        vector = input.dim() == 1
        result = product(input.unsqueeze(0) if vector else input, weight.t(), where)
        result = result.squeeze(0) if vector else result
        return apply_activation(activation, result if bias is None else result + bias)
    needs_grad = wants_grad(input, weight, bias)
    if needs_grad and not _fuses_with_grad(activation):
        return apply_activation(activation, _linear(input, weight, bias, "none"))
    if where == LIBRARY:
        return torch.ops.fastnn.linear(input, weight, bias, activation)
    input, weight, bias = resolve(input), resolve(weight), resolve(bias)
    if needs_grad:
        return _Linear.apply(input, weight, bias, activation)
    return _kernels.linear(input, weight, bias, activation)


def _linear_out(input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    try:
        _check(input, weight, bias)
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None and value.dtype != input.dtype:
                raise Unsupported(f"{name}: expected the dtype of input, {input.dtype}, got {value.dtype}")
        return write_out(
            out,
            route("gemm", input, weight, bias),
            (*input.shape[:-1], weight.shape[0]),
            input.dtype,
            [tensor for tensor in (input, weight, bias) if tensor is not None],
            lambda c: (
                _kernels.product(resolve(input), resolve(weight).t(), c, bias=resolve(bias))
                if input.dim() > 1
                else _kernels.product(
                    resolve(input).unsqueeze(0), resolve(weight).t(), c.unsqueeze(0), bias=resolve(bias)
                )
            ),
            lambda: _linear(input, weight, bias, "none"),
        )
    except Unsupported as reason:
        return fall_back("linear", reason.args[0], _torch_linear, input, weight, bias, out=out)


def _in_torch(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return torch_activation(activation, _torch_linear(input, weight, bias))


def _fuses_with_grad(activation: str) -> bool:
    """The backward of these needs the output alone, which is at hand."""
    return activation == "none" or activation in cpu.SAVES_OUTPUT


# ---- autograd ----------------------------------------------------------------------------------------------------


class _Linear(Function):
    """``result`` holds the output where the short way has computed it."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        result: tuple[Tensor] | None = None,
    ) -> Tensor:
        output = _kernels.linear(input, weight, bias, activation) if result is None else result[0]
        by_input, by_weight = ctx.needs_input_grad[:2]
        ctx.activation = activation
        ctx.save_for_backward(
            input if by_weight else None,
            weight if by_input else None,
            None if activation == "none" else output,
        )
        return output

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, output = ctx.saved_tensors
        if output is not None:
            grad = activation_backward(ctx.activation, grad, output)
        return (*_gradients(ctx.needs_input_grad, grad, input, weight), None)


# Function.apply asks for transforms, of which the short way knows that there are none.
_apply_linear = super(Function, _Linear).apply


def _gradients(
    needs: tuple[bool, ...], grad: Tensor, input: Tensor | None, weight: Tensor | None
) -> tuple[Tensor | None, ...]:
    """grad @ weight, gradᵀ @ input and the sum of grad over rows, each only where it is needed."""
    if not _is_dynamo_compiling():
        gradients = cpu.tensor_linear_gradients(grad, input, weight, *needs[:3])
        if gradients is not None:
            return (*gradients, None)
    by_input = by_weight = by_bias = None
    if needs[0]:
        by_input = kernel_product(grad, weight) if grad.dim() > 1 else kernel_product(grad.unsqueeze(0), weight)[0]
    if needs[1] or needs[2]:
        rows = grad if grad.dim() == 2 else grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1])
        if needs[1]:
            if input.dim() != 2:
                input = input.reshape(rows.shape[0], input.shape[-1])
            by_weight = kernel_product(rows.t(), input)
        if needs[2]:
            by_bias = _column_sum(rows)
    return by_input, by_weight, by_bias, None


def _column_sum(rows: Tensor) -> Tensor:
    if _route.is_straight("gemm", rows):
        return _kernels.column_sum(resolve(rows))
    # Traced, mapped or differentiated again: a sum that every tracer knows.
    return rows.sum(0)


# ---- torch.library -----------------------------------------------------------------------------------------------


def _on_plain(input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    if _settings().backend == "reference":
        return reference.linear(input, weight, bias, activation)
    return _kernels.linear(resolve(input), resolve(weight), resolve(bias), activation)


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    torch._check(
        input.shape[-1] == weight.shape[1], lambda: f"fastnn::linear: {tuple(input.shape)} and {tuple(weight.shape)}"
    )
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, ctx.activation = inputs
    by_input, by_weight = ctx.needs_input_grad[:2]
    # gelu and silu come here only from code that calls torch.ops itself: their input is computed again.
    again = not _fuses_with_grad(ctx.activation)
    ctx.save_for_backward(
        input if by_weight or again else None,
        weight if by_input or again else None,
        bias if again else None,
        output if ctx.activation != "none" and not again else None,
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias, output = ctx.saved_tensors
    if ctx.activation != "none":
        saved = output if output is not None else _linear(input, weight, bias, "none")
        grad = activation_backward(ctx.activation, grad, saved)
    # The dispatcher drops arguments that equal their defaults.
    return _gradients((*ctx.needs_input_grad, False)[:3], grad, input, weight)


def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
) -> tuple[Tensor, int]:
    x = input if in_dims[0] is None else input.movedim(in_dims[0], 0)
    if in_dims[1] is None and (bias is None or in_dims[2] is None):
        if in_dims[0] is None:
            return torch.ops.fastnn.linear(x, weight, bias, activation).expand(info.batch_size, -1), 0
        return torch.ops.fastnn.linear(x, weight, bias, activation), 0
    # One weight or bias for each element: every operand gets the mapped dimension, and x at least one row.
    x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x
    vector = x.dim() == 2
    x = x.unsqueeze(1) if vector else x
    w = weight if in_dims[1] is None else weight.movedim(in_dims[1], 0)
    if in_dims[1] is not None:
        for _ in range(x.dim() - w.dim()):
            w = w.unsqueeze(1)
    result = product(x, w.mT)
    if bias is not None:
        if in_dims[2] is not None:
            bias = bias.movedim(in_dims[2], 0)
            for _ in range(result.dim() - bias.dim()):
                bias = bias.unsqueeze(1)
        result = result + bias
    result = apply_activation(activation, result)
    return (result.squeeze(1) if vector else result), 0


define(
    "linear(Tensor input, Tensor weight, Tensor? bias=None, str activation='none') -> Tensor",
    impl=_on_plain,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=_vmap,
    autocast=True,
)
