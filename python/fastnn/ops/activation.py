"""relu, relu6, gelu, silu, sigmoid and tanh, elementwise, with their first and second derivatives.

Formulas: relu(x) = max(x, 0); relu6(x) = min(relu(x), 6); gelu(x) = x Φ(x), or with ``approximate="tanh"``
x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2 (Hendrycks and Gimpel, arXiv:1606.08415); silu(x) = x σ(x) (Elfwing et al.,
arXiv:1702.03118); sigmoid(x) = σ(x) = 1 / (1 + e⁻ˣ); tanh.

All take float32, float64, bfloat16 or float16 of any shape and strides, compute in float32 (float64 for float64), round
once, and give the dtype and the strides that torch gives. Other dtypes go to torch. The second derivative is composed of
torch's elementwise operations; it is what only a gradient of a gradient asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import increment_version

from .. import _state
from ..backends import Kernels, cpu, reference
from ._library import define
from ._out import has_internal_overlap, write_out
from ._route import (
    EAGER,
    LIBRARY,
    REFERENCE,
    TRANSFORM,
    Unsupported,
    fall_back,
    is_dynamo_compiling,
    is_grad_enabled,
    is_straight,
    needs_library,
    resolve,
    route,
    wants_grad,
)

#: What linear_act and the fused epilogues take.
KINDS = ("none", "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "relu6")

_CODE = cpu.ACTIVATION
_kernels = Kernels()
_tensor_activation = cpu.tensor_activation

_TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu6": torch.nn.functional.relu6,
}


def torch_activation(kind: str, x: Tensor) -> Tensor:
    """torch's own function of this kind."""
    return _TORCH[kind](x)


# ---- the public functions ----------------------------------------------------------------------------------------


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """max(input, 0), as :func:`torch.nn.functional.relu`; integers go to torch."""
    return _apply("relu", "relu", input, inplace, torch.nn.functional.relu, (inplace,))


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(input, 0), 6), as :func:`torch.nn.functional.relu6`; integers go to torch.

    The gradient is 0 at 0 and at 6, and passes where the input is NaN, as relu's does.
    """
    return _apply("relu6", "relu6", input, inplace, torch.nn.functional.relu6, (inplace,))


def gelu(input: Tensor, approximate: str = "none", *, out: Tensor | None = None) -> Tensor:
    """input · Φ(input), as :func:`torch.nn.functional.gelu`. ``approximate`` is "none" or "tanh"; else RuntimeError."""
    kind = _GELU.get(approximate) if isinstance(approximate, str) else None
    if kind is None:
        reason = f"approximate: expected 'none' or 'tanh', got {approximate!r}"
        return fall_back("gelu", reason, torch.nn.functional.gelu, input, approximate=approximate)
    if out is not None:
        return _apply_out("gelu", kind, input, out, torch.nn.functional.gelu, approximate=approximate)
    return _apply("gelu", kind, input, False, torch.nn.functional.gelu, (), {"approximate": approximate})


_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """input · σ(input), as :func:`torch.nn.functional.silu`."""
    return _apply("silu", "silu", input, inplace, torch.nn.functional.silu, (inplace,))


def sigmoid(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """1 / (1 + exp(-input)), as :func:`torch.sigmoid`; integers go to torch, which makes them float."""
    if out is not None:
        return _apply_out("sigmoid", "sigmoid", input, out, torch.sigmoid)
    return _apply("sigmoid", "sigmoid", input, False, torch.sigmoid)


def tanh(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The hyperbolic tangent, as :func:`torch.tanh`; integers go to torch, which makes them float."""
    if out is not None:
        return _apply_out("tanh", "tanh", input, out, torch.tanh)
    return _apply("tanh", "tanh", input, False, torch.tanh)


# ---- the way of a call -------------------------------------------------------------------------------------------


def _apply(
    op: str,
    kind: str,
    input: Tensor,
    inplace: bool,
    torch_function: Callable[..., Tensor],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> Tensor:
    if not inplace and not is_dynamo_compiling():
        output = _tensor_activation(_CODE[kind], input, None)
        if type(output) is tuple:
            return _apply_activation(input, kind, output)
        if output is not None:
            return output
    try:
        where = _where(input)
        if inplace:
            return _in_place(kind, input, where)
        return run(kind, input, where)
    except Unsupported as reason:
        return fall_back(op, reason.args[0], torch_function, input, *args, **(kwargs or {}))


def _where(input: Tensor) -> str:
    if not isinstance(input, Tensor):
        raise Unsupported(f"input: expected a Tensor, got {type(input).__name__}")
    return route("activation", input)


def run(kind: str, input: Tensor, where: str) -> Tensor:
    """The activation of a tensor that ``where`` was found for."""
    if where == EAGER:
        if is_grad_enabled() and input.requires_grad:
            return _Activation.apply(resolve(input), kind)
        return _kernels.activation(kind, resolve(input))
    if where == LIBRARY:
        return torch.ops.fastnn.activation(input, kind)
    if where == TRANSFORM:
        return _TransformedActivation.apply(input, kind)
    return reference.activation(kind, input)


def activation(kind: str, input: Tensor) -> Tensor:
    """The activation by name, differentiable; "none" gives the input itself."""
    return input if kind == "none" else _apply(kind, kind, input, False, _TORCH[kind])


def _in_place(kind: str, input: Tensor, where: str) -> Tensor:
    if where == EAGER:
        if has_internal_overlap(input):
            raise Unsupported("input: more than one of its elements refers to one memory location")
        if input.is_inference() and not torch.is_inference_mode_enabled():
            raise Unsupported("input: an inference tensor, changed in place outside of inference mode")
        if input.is_neg():
            return input.copy_(run(kind, input, where))
        if wants_grad(input):
            if input.is_leaf:
                raise Unsupported("input: a leaf that requires grad, changed in place")
            if kind in cpu.SAVES_OUTPUT:
                return _InPlaceActivation.apply(input, kind)
            # What needs its input keeps a copy, since the input is about to be overwritten. So does torch.
            return input.copy_(run(kind, input.clone(), where))
        _kernels.activation(kind, input, input)
        if not input.is_inference():
            increment_version(input)
        return input
    return input.copy_(run(kind, input, where))


def _apply_out(
    op: str, kind: str, input: Tensor, out: Tensor, torch_function: Callable[..., Tensor], **kwargs: Any
) -> Tensor:
    if not is_dynamo_compiling():
        output = _tensor_activation(_CODE[kind], input, out)
        if output is not None:
            return output
    try:
        where = _where(input)
        return write_out(
            out,
            where,
            input.shape,
            input.dtype,
            (input,),
            lambda c: _kernels.activation(kind, resolve(input), c),
            lambda: run(kind, input, where),
            in_place_of=input,
        )
    except Unsupported as reason:
        return fall_back(op, reason.args[0], torch_function, input, out=out, **kwargs)


def activation_backward(kind: str, grad: Tensor, saved: Tensor) -> Tensor:
    """grad · f'(x), differentiable twice more. ``saved`` is f(x) for relu, relu6, sigmoid and tanh, else x."""
    if not is_dynamo_compiling():
        output = cpu.tensor_activation_backward(_CODE[kind], grad, saved)
        if output is not None:
            return output
    if is_straight("activation", grad, saved):
        return _kernels.activation_backward(kind, resolve(grad), resolve(saved))
    try:
        where = route("activation", grad, saved)
    except Unsupported as reason:
        return fall_back(f"{kind}_backward", reason.args[0], lambda: grad * _first_derivative(kind, saved))
    if where == LIBRARY:
        return torch.ops.fastnn.activation_backward(grad, saved, kind)
    if where == TRANSFORM:
        return _TransformedActivationBackward.apply(grad, saved, kind)
    if where == REFERENCE:
        return (grad.double() * _first_derivative(kind, saved.double())).to(saved.dtype)
    if wants_grad(grad, saved):
        return _ActivationBackward.apply(grad, saved, kind)
    return _kernels.activation_backward(kind, resolve(grad), resolve(saved))


# ---- derivatives -------------------------------------------------------------------------------------------------

_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


def _first_derivative(kind: str, saved: Tensor) -> Tensor:
    """f' in terms of what the forward saved."""
    if kind == "relu":
        return (saved > 0).to(saved.dtype)
    if kind == "relu6":
        return ((saved > 0) & (saved < 6)).to(saved.dtype)
    if kind == "sigmoid":
        return saved * (1 - saved)
    if kind == "tanh":
        return 1 - saved * saved
    x = saved
    if kind == "silu":
        s = torch.sigmoid(x)
        return s * (1 + x * (1 - s))
    if kind == "gelu":
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * torch.erfc(-x * math.sqrt(0.5)) + x * density
    t = torch.tanh(_SQRT_2_OVER_PI * (x + 0.044715 * x * x * x))
    slope = _SQRT_2_OVER_PI * (1 + 3 * 0.044715 * x * x)
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope


def _second_derivative(kind: str, saved: Tensor) -> Tensor:
    """The derivative of :func:`_first_derivative` by ``saved``: f'' where that is x, (f' as a function of f)' else."""
    if kind in ("relu", "relu6"):
        return torch.zeros_like(saved)
    if kind == "sigmoid":
        return 1 - 2 * saved
    if kind == "tanh":
        return -2 * saved
    x = saved
    if kind == "silu":
        s = torch.sigmoid(x)
        return s * (1 - s) * (2 + x * (1 - 2 * s))
    if kind == "gelu":
        return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi) * (2 - x * x)
    t = torch.tanh(_SQRT_2_OVER_PI * (x + 0.044715 * x * x * x))
    slope = _SQRT_2_OVER_PI * (1 + 3 * 0.044715 * x * x)
    curve = _SQRT_2_OVER_PI * 6 * 0.044715 * x
    return (1 - t * t) * (slope + 0.5 * x * curve - x * t * slope * slope)


def _saved(kind: str, input: Tensor, output: Tensor) -> Tensor:
    return output if kind in cpu.SAVES_OUTPUT else input


class _Activation(Function):
    """``result`` holds the output where the short way has computed it."""

    @staticmethod
    def forward(ctx: FunctionCtx, input: Tensor, kind: str, result: tuple[Tensor] | None = None) -> Tensor:
        output = _kernels.activation(kind, input) if result is None else result[0]
        ctx.kind = kind
        ctx.save_for_backward(_saved(kind, input, output))
        return output

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        (saved,) = ctx.saved_tensors
        return activation_backward(ctx.kind, grad, saved), None, None


# Function.apply asks for transforms, of which the short way knows that there are none.
_apply_activation = super(Function, _Activation).apply


class _InPlaceActivation(Function):
    """Of the kinds whose derivative needs their output alone."""

    @staticmethod
    def forward(ctx: FunctionCtx, input: Tensor, kind: str) -> Tensor:
        ctx.kind = kind
        _kernels.activation(kind, input, input)
        ctx.mark_dirty(input)
        ctx.save_for_backward(input)
        return input

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (saved,) = ctx.saved_tensors
        return activation_backward(ctx.kind, grad, saved), None


class _ActivationBackward(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, grad: Tensor, saved: Tensor, kind: str) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(grad, saved)
        return _kernels.activation_backward(kind, resolve(grad), resolve(saved))

    @staticmethod
    def backward(ctx: FunctionCtx, grad2: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        return _backward_twice(ctx, grad2)


def _backward_twice(ctx: FunctionCtx, grad2: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    grad, saved = ctx.saved_tensors
    by_grad = activation_backward(ctx.kind, grad2, saved) if ctx.needs_input_grad[0] else None
    by_saved = grad2 * grad * _second_derivative(ctx.kind, saved) if ctx.needs_input_grad[1] else None
    return by_grad, by_saved, None


# ---- torch.func and forward mode ---------------------------------------------------------------------------------


class _TransformedActivation(Function):
    @staticmethod
    def forward(input: Tensor, kind: str) -> Tensor:
        return torch.ops.fastnn.activation(input, kind) if needs_library(input) else _on_plain(kind, input)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, ctx.kind = inputs
        saved = _saved(ctx.kind, input, output)
        ctx.save_for_backward(saved)
        ctx.save_for_forward(saved)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (saved,) = ctx.saved_tensors
        return activation_backward(ctx.kind, grad, saved), None

    @staticmethod
    def jvp(ctx: FunctionCtx, tangent: Tensor, _: None) -> Tensor:
        (saved,) = ctx.saved_tensors
        return activation_backward(ctx.kind, tangent, saved)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], input: Tensor, kind: str) -> tuple[Tensor, int | None]:
        return activation(kind, input), in_dims[0]


class _TransformedActivationBackward(Function):
    @staticmethod
    def forward(grad: Tensor, saved: Tensor, kind: str) -> Tensor:
        if needs_library(grad, saved):
            return torch.ops.fastnn.activation_backward(grad, saved, kind)
        return _backward_on_plain(grad, saved, kind)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, saved, ctx.kind = inputs
        ctx.save_for_backward(grad, saved)
        ctx.save_for_forward(grad, saved)

    @staticmethod
    def backward(ctx: FunctionCtx, grad2: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        return _backward_twice(ctx, grad2)

    @staticmethod
    def jvp(ctx: FunctionCtx, grad_t: Tensor | None, saved_t: Tensor | None, _: None) -> Tensor:
        grad, saved = ctx.saved_tensors
        result = 0 if grad_t is None else activation_backward(ctx.kind, grad_t, saved)
        if saved_t is not None:
            result = result + saved_t * grad * _second_derivative(ctx.kind, saved)
        return result

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None, None], grad: Tensor, saved: Tensor, kind: str
    ) -> tuple[Tensor, int]:
        return _vmap_backward(info, in_dims, grad, saved, kind)


# ---- torch.library -----------------------------------------------------------------------------------------------


def _on_plain(kind: str, input: Tensor) -> Tensor:
    if _state.settings().backend == "reference":
        return reference.activation(kind, input)
    return _kernels.activation(kind, resolve(input))


def _backward_on_plain(grad: Tensor, saved: Tensor, kind: str) -> Tensor:
    return _kernels.activation_backward(kind, resolve(grad), resolve(saved))


def _vmap_backward(
    info: Any, in_dims: tuple[int | None, int | None, None], grad: Tensor, saved: Tensor, kind: str
) -> tuple[Tensor, int]:
    sides = []
    for tensor, dim in zip((grad, saved), in_dims[:2], strict=True):
        moved = tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)
        sides.append(moved.expand(info.batch_size, *moved.shape[1:]))
    return activation_backward(kind, *sides), 0


def _setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, ctx.kind = inputs
    ctx.save_for_backward(_saved(ctx.kind, input, output))


def _setup_context_backward(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, saved, ctx.kind = inputs
    ctx.save_for_backward(grad, saved)


def check_kind(op: str, kind: Any) -> None:
    if kind not in KINDS:
        raise ValueError(f"fastnn.{op}: activation: expected one of {', '.join(KINDS)}, got {kind!r}")


define(
    "activation(Tensor input, str kind) -> Tensor",
    impl=lambda input, kind: _on_plain(kind, input),
    fake=lambda input, kind: torch.empty_like(input),
    setup_context=_setup_context,
    backward=_Activation.backward,
    vmap=lambda info, in_dims, input, kind: (torch.ops.fastnn.activation(input, kind), in_dims[0]),
    autocast=False,
)
define(
    "activation_backward(Tensor grad, Tensor saved, str kind) -> Tensor",
    impl=_backward_on_plain,
    fake=lambda grad, saved, kind: torch.empty_like(saved),
    setup_context=_setup_context_backward,
    backward=_backward_twice,
    vmap=_vmap_backward,
    autocast=False,
)
