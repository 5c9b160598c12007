"""The kernels called on tensors, and the formulas they are measured against."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastnn import _cpu, _state

#: Whether `make sanitize` runs: AddressSanitizer needs memory of its own, and turns a SIGSEGV into an abort.
UNDER_SANITIZER = "libasan" in os.environ.get("LD_PRELOAD", "")
DTYPE = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int8: 4,
    torch.uint8: 5,
    torch.int32: 6,
}
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KIND = {"relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4, "sigmoid": 5, "tanh": 6, "relu6": 7}
SAVES_OUTPUT = ("relu", "relu6", "sigmoid", "tanh")
TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu6": F.relu6,
    "exp": torch.exp,
    "erf": torch.erf,
}


def exact(kind: str, x: Tensor) -> Tensor:
    """The activation in float64, in forms that keep the accuracy of the left tail."""
    x = x.double()
    if kind == "gelu":
        return 0.5 * x * torch.erfc(-x * math.sqrt(0.5))
    if kind == "gelu_tanh":
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
    return TORCH[kind](x)


def exact_gradient(kind: str, grad: Tensor, saved: Tensor) -> Tensor:
    """grad times the derivative, in float64, from what the kernel is given."""
    grad, saved = grad.double(), saved.double()
    if kind == "relu":
        return torch.where(saved <= 0, 0.0, grad)
    if kind == "relu6":
        return torch.where((saved <= 0) | (saved >= 6), 0.0, grad)
    if kind == "sigmoid":
        return grad * saved * (1 - saved)
    if kind == "tanh":
        return grad * (1 - saved * saved)
    x = saved.detach().requires_grad_()
    return torch.autograd.grad(exact(kind, x), x, grad)[0]


def activation(kind: str, x: Tensor, out: Tensor | None = None) -> Tensor:
    out = torch.empty_like(x) if out is None else out
    _cpu.activation(KIND[kind], x.data_ptr(), out.data_ptr(), x.shape, x.stride(), out.stride(), DTYPE[x.dtype])
    return out


def activation_backward(kind: str, grad: Tensor, saved: Tensor, out: Tensor | None = None) -> Tensor:
    out = torch.empty_like(saved) if out is None else out
    _cpu.activation_backward(
        KIND[kind],
        grad.data_ptr(),
        saved.data_ptr(),
        out.data_ptr(),
        saved.shape,
        grad.stride(),
        saved.stride(),
        out.stride(),
        DTYPE[saved.dtype],
    )
    return out


def math_function(name: str, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _cpu.math_function(name, x.data_ptr(), out.data_ptr(), x.numel(), DTYPE[x.dtype])
    return out


def convolve(
    product: str,
    x: Tensor,
    w: Tensor,
    y: Tensor,
    stride=(1, 1, 1),
    padding=(0, 0, 0),
    dilation=(1, 1, 1),
    groups: int = 1,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    precision: str = "highest",
) -> Tensor:
    """One of the three products of a 3-d convolution, "forward", "input" or "weight"; returns what was written."""
    written = {"forward": y, "input": x, "weight": w}[product]
    backend = _state.settings().backend
    if backend in ("cuda", "triton"):
        torch.set_float32_matmul_precision(precision)
        options = (stride, padding, dilation, groups, bias, activation, residual)
        importlib.import_module(f"fastnn.backends.{backend}.conv").convolve(product, x, w, y, *options)
        return written
    getattr(_cpu, f"conv_{product}")(
        x.data_ptr(),
        tuple(x.shape),
        x.stride(),
        w.data_ptr(),
        tuple(w.shape),
        w.stride(),
        y.data_ptr(),
        tuple(y.shape),
        y.stride(),
        DTYPE[x.dtype],
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        ("highest", "high", "medium").index(precision),
        False,
        0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if activation is None else KIND[activation],
    )
    return written


class Capsule:
    def __init__(self, capsule):
        self.capsule = capsule

    def __dlpack__(self, **_):
        return self.capsule

    def __dlpack_device__(self):
        return (1, 0)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory of the caching allocator."""
    return torch.from_dlpack(Capsule(_cpu.empty_dlpack(shape, DTYPE[dtype])))


def ulp(reference: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit in the last place of a float64 value when it is rounded to dtype, as float64."""
    digits = 1 - int(math.log2(torch.finfo(dtype).eps))
    least = torch.finfo(dtype).smallest_normal
    exponent = torch.frexp(reference.double().abs().clamp(min=least))[1]
    return torch.ldexp(torch.ones((), dtype=torch.float64), (exponent - digits).double())


def error_in_ulp(result: Tensor, reference: Tensor, dtype: torch.dtype | None = None) -> float:
    """The largest error; a wrong NaN or infinity counts as infinite. Never hides a NaN."""
    dtype = dtype or result.dtype
    rounded = reference.to(dtype)
    same = (result == rounded) | (result.isnan() & rounded.isnan())
    error = (result.double() - reference).abs() / ulp(reference, dtype)
    error = torch.where(error.isfinite() & rounded.isfinite(), error, torch.where(same, 0.0, math.inf))
    return float(error.max()) if error.numel() else 0.0
