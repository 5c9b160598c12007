"""The activations and their derivatives, in float32, of tensors of any strides."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tensors import merge
from ._launch import ceil_div, launch

_BLOCK = 1024


@triton.jit
def tanh(x):
    # Near 0 the formula of exponentials would lose what its two halves have in common (polynomial: Cephes, tanhf).
    z = x * x
    near = -5.70498872745e-3 * z + 2.06390887954e-2
    near = (near * z - 5.37397155531e-2) * z + 1.33314422036e-1
    near = (near * z - 3.33332819422e-1) * z * x + x
    size = tl.abs(x)
    far = 1 - 2 / (tl.exp(2 * size) + 1)
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def activate(x, KIND: tl.constexpr):
    if KIND == "relu":
        return tl.where((x > 0) | (x != x), x, 0.0)
    elif KIND == "relu6":
        return tl.where(x != x, x, tl.minimum(tl.maximum(x, 0.0), 6.0))
    elif KIND == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.70710678118654752))
    elif KIND == "gelu_tanh":
        return 0.5 * x * (1 + tanh(0.79788456080286536 * (x + 0.044715 * x * x * x)))
    elif KIND == "silu":
        return x / (1 + tl.exp(-x))
    elif KIND == "sigmoid":
        return sigmoid(x)
    elif KIND == "tanh":
        return tanh(x)
    else:
        return x


@triton.jit
def activate_backward(gradient, saved, KIND: tl.constexpr):
    """The gradient times the derivative; ``saved`` is the output for the kinds in codes.SAVES_OUTPUT, else the input."""
    if KIND == "relu":
        return tl.where((saved > 0) | (saved != saved), gradient, 0.0)
    elif KIND == "relu6":
        return tl.where(((saved > 0) & (saved < 6)) | (saved != saved), gradient, 0.0)
    elif KIND == "sigmoid":
        return gradient * (saved * (1 - saved))
    elif KIND == "tanh":
        return gradient * (1 - saved * saved)
    elif KIND == "gelu":
        density = 0.39894228040143268 * tl.exp(-0.5 * saved * saved)
        return gradient * (0.5 * (1 + tl.erf(saved * 0.70710678118654752)) + saved * density)
    elif KIND == "gelu_tanh":
        t = tanh(0.79788456080286536 * (saved + 0.044715 * saved * saved * saved))
        slope = 0.79788456080286536 * (1 + 0.134145 * saved * saved)
        return gradient * (0.5 * (1 + t) + 0.5 * saved * (1 - t * t) * slope)
    elif KIND == "silu":
        s = sigmoid(saved)
        return gradient * (s * (1 + saved * (1 - s)))
    else:
        return gradient


@triton.jit
def offset(i, shape, strides, DIMS: tl.constexpr):
    """Of the i-th element, in elements."""
    at = i * 0
    rest = i
    for d in tl.static_range(DIMS):
        if d < DIMS - 1:
            at += rest % shape[DIMS - 1 - d] * strides[DIMS - 1 - d]
            rest = rest // shape[DIMS - 1 - d]
        else:
            at += rest * strides[0]
    return at


@triton.jit
def each(
    x,
    saved,
    y,
    count,
    shape,
    x_strides,
    saved_strides,
    y_strides,
    KIND: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = activate(x), or activate_backward(x, saved) where something is saved."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    value = tl.load(x + offset(i, shape, x_strides, DIMS), mask=inside, other=0.0).to(tl.float32)
    if saved is not None:
        at = tl.load(saved + offset(i, shape, saved_strides, DIMS), mask=inside, other=0.0).to(tl.float32)
        result = activate_backward(value, at, KIND)
    else:
        result = activate(value, KIND)
    tl.store(y + offset(i, shape, y_strides, DIMS), result.to(y.dtype.element_ty), mask=inside)


def activation(kind: str, x: Tensor, out: Tensor | None = None) -> Tensor:
    """Elementwise; ``out`` may be ``x``."""
    if out is None:
        out = torch.empty_like(x)
    _run(kind, x, None, out)
    return out


def activation_backward(kind: str, grad: Tensor, saved: Tensor, out: Tensor | None = None) -> Tensor:
    """grad times the derivative; ``saved`` is the output for the kinds in SAVES_OUTPUT, else the input."""
    if out is None:
        out = torch.empty_like(saved)
    _run(kind, grad, saved, out)
    return out


def _run(kind: str, x: Tensor, saved: Tensor | None, out: Tensor) -> None:
    count = out.numel()
    if count == 0:
        return
    beside = x if saved is None else saved
    shape, strides = merge(out.shape, x.stride(), beside.stride(), out.stride())
    programs = ceil_div(count, _BLOCK)
    launch(each, programs, out, x, saved, out, count, shape, *strides, KIND=kind, DIMS=len(shape), BLOCK=_BLOCK)
