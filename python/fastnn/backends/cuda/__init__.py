"""The CUDA kernels of this package on CUDA tensors: what they can run, and how they are called.

The functions here take plain, dense tensors whose shapes the ops have checked, all on one device, and run on the caller's
current stream without waiting for it. They know nothing of autograd. A build without CUDA lacks the module, and a machine
without a GPU has no tensors for it.

Tests on such a machine call :func:`use` with the same kernels compiled for the CPU (src/cuda/host_emulation/), which then
play the device for CPU tensors under ``fastnn.backend("cuda")``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._matmul import MAX_DIMS, multiply, multiply_batches, product_shape, rows_of
from ..codes import ACTIVATION, DTYPE

try:
    from ... import _cuda as _module
except ImportError:
    _module = None

FLOAT = (torch.float32, torch.bfloat16, torch.float16)
#: The ops that there are kernels for, as supports() knows them.
OPS = frozenset(
    (
        *("gemm", "activation", "int_mm"),
        *("attention", "attention_backward"),
        *("softmax", "softmax_backward"),
        *("layer_norm", "rms_norm", "row_norm", "row_norm_backward"),
    )
)
#: The longest rows of attention.
MAX_SIZE = 128


def use(module: Any) -> None:
    """From now on the kernels are those of ``module``; None: there are none."""
    global _module
    _module = module


def module() -> Any:
    """The extension module, or None where this build has none."""
    return _module


def device_type() -> str:
    """Of the tensors that the kernels read: "cuda", or "cpu" where that plays the device."""
    return "cpu" if _module is not None and _module.emulated else "cuda"


def supports(op: str, *tensors: Tensor | None) -> str | None:
    """None when the kernels can run ``op`` on these tensors, else the reason why not, for people."""
    if _module is None:
        return "this build of fastnn has no CUDA kernels"
    if op not in OPS:
        return f"no CUDA kernel for {op}"
    attention = op.startswith("attention")
    if attention and any(tensor is not None and tensor.shape[-1] > MAX_SIZE for tensor in tensors[:3]):
        return f"rows longer than {MAX_SIZE} on CUDA"
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.layout is not torch.strided:
            return f"a tensor of layout {str(tensor.layout).removeprefix('torch.')}"
        if tensor.is_nested:
            return "a nested tensor"
        if tensor.device.type not in (device_type(), "meta"):
            return f"a tensor on {tensor.device.type}, which a CUDA kernel cannot read"
        if attention and tensor.dtype is torch.bool:
            continue  # a mask
        if tensor.dtype not in FLOAT and not (op == "int_mm" and tensor.dtype in (torch.int8, torch.uint8)):
            return f"dtype {str(tensor.dtype).removeprefix('torch.')} on CUDA"
    return None


def where(tensor: Tensor) -> dict[str, int]:
    """The device of a tensor and the stream that its caller works on, as the kernels take them."""
    if not tensor.is_cuda:
        return {"device": 0, "stream": 0}
    index = tensor.device.index
    return {"device": index, "stream": torch._C._cuda_getCurrentRawStream(index)}


def gemm(a: Tensor, b: Tensor, c: Tensor, **epilogue: Any) -> None:
    """See _matmul.multiply."""
    multiply(_module.gemm, a, b, c, **where(c), **epilogue)


def product(
    a: Tensor, b: Tensor, out: Tensor | None = None, *, dtype: torch.dtype | None = None, **epilogue: Any
) -> Tensor:
    """alpha * (a @ b) + beta * residual, as backends.cpu.product."""
    shape = product_shape(a, b)
    if out is None:
        out = a.new_empty(shape, dtype=dtype or a.dtype)
    multiply_batches(gemm, a, b, out, **epilogue)
    return out


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """activation(input @ weight.T + bias), as backends.cpu.linear."""
    out = input.new_empty((*input.shape[:-1], weight.shape[0]))
    rows = rows_of(input)
    if rows is None:
        return product(input, weight.t(), out, bias=bias, activation=activation)
    gemm(rows, weight.t(), out.view(rows.shape[0], weight.shape[0]), bias=bias, activation=activation)
    return out


def int_mm(
    a: Tensor,
    b: Tensor,
    dtype: torch.dtype,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    return product(a, b, dtype=dtype, row_scale=row_scale, col_scale=col_scale, bias=bias)


def column_sum(x: Tensor) -> Tensor:
    """The sum over all dimensions but the last, added up in float32."""
    rows = rows_of(x)
    if rows is None:
        rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty(rows.shape[1])
    workspace = x.new_empty(_module.column_sum_workspace(*rows.shape), dtype=torch.float32)
    _module.column_sum(
        rows.data_ptr(),
        *rows.shape,
        *rows.stride(),
        DTYPE[x.dtype],
        out.data_ptr(),
        workspace.data_ptr(),
        **where(x),
    )
    return out


def activation(kind: str, x: Tensor, out: Tensor | None = None) -> Tensor:
    """Elementwise; ``out`` may be ``x``."""
    if out is None:
        out = torch.empty_like(x)
    shape, (x, y) = _few_dims(x, out)
    _module.activation(
        ACTIVATION[kind], x.data_ptr(), y.data_ptr(), shape, x.stride(), y.stride(), DTYPE[x.dtype], **where(x)
    )
    return _written(out, y)


def activation_backward(kind: str, grad: Tensor, saved: Tensor, out: Tensor | None = None) -> Tensor:
    """grad times the derivative; ``saved`` is the output for the kinds in SAVES_OUTPUT, else the input."""
    if out is None:
        out = torch.empty_like(saved)
    shape, (grad, saved, y) = _few_dims(grad, saved, out)
    _module.activation_backward(
        ACTIVATION[kind],
        grad.data_ptr(),
        saved.data_ptr(),
        y.data_ptr(),
        shape,
        grad.stride(),
        saved.stride(),
        y.stride(),
        DTYPE[saved.dtype],
        **where(saved),
    )
    return _written(out, y)


def _few_dims(*tensors: Tensor) -> tuple[Sequence[int], Sequence[Tensor]]:
    """Tensors of one shape as the kernels' loops take them: nobody has met nine dimensions; those who do pay for copies."""
    if tensors[0].dim() <= MAX_DIMS:
        return tensors[0].shape, tensors
    count = math.prod(tensors[0].shape)
    return torch.Size((count,)), [tensor.reshape(count) for tensor in tensors]


def _written(out: Tensor, y: Tensor) -> Tensor:
    return out if y.data_ptr() == out.data_ptr() else out.copy_(y.view(out.shape))
