"""The CUDA kernels of this package on CUDA tensors: what they can run, and how they are called.

The functions here take plain, dense tensors whose shapes the ops have checked, all on one device, and run on the caller's
current stream without waiting for it. They know nothing of autograd. A build without CUDA lacks the module, and a machine
without a GPU has no tensors for it.

Tests on such a machine call :func:`use` with the same kernels compiled for the CPU (src/cuda/host_emulation/), which then
play the device for CPU tensors under ``fastnn.backend("cuda")``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _state
from .. import _matmul
from .._matmul import MAX_DIMS, rows_of
from .._tensors import reason_against
from ..codes import ACTIVATION, DTYPE, OPERAND, precision

try:
    from ... import _cuda as _module
except ImportError:
    _module = None

#: The ops that there are kernels for, as supports() knows them.
OPS = frozenset(
    (
        *("gemm", "activation", "int_mm", "scaled_mm", "dropout"),
        *("attention", "attention_backward"),
        *("conv", "convolution", "convolution_input", "convolution_weight"),
        *("pool", "max_pool", "max_pool_backward", "max_pool_gather", "avg_pool", "avg_pool_backward"),
        *("softmax", "softmax_backward"),
        *("embedding", "embedding_backward"),
        *("cross_entropy", "cross_entropy_backward", "linear_cross_entropy", "linear_cross_entropy_backward"),
        *("layer_norm", "rms_norm", "row_norm", "row_norm_backward"),
        *("batch_norm", "batch_norm_backward"),
        *("group_norm", "group_norm_backward", "instance_norm"),
        *("fake_quantize", "fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine"),
        *("fake_quantize_gradients", "fake_quantize_mask"),
        *("int8_linear", "weight_only_linear", "int8_conv"),
        *("quantize", "dequantize", "quantize_dynamic", "choose_scale"),
        "split_search",
    )
)


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


def why_not() -> str | None:
    """None where kernels can run at all, else the reason why not, for people."""
    return None if _module is not None else "this build of fastnn has no CUDA kernels"


def supports(op: str, *tensors: Tensor | None) -> str | None:
    """None when the kernels can run ``op`` on these tensors, else the reason why not, for people."""
    reason = why_not()
    if reason is not None:
        return reason
    if op not in OPS:
        return f"no CUDA kernel for {op}"
    return reason_against(op, device_type(), *tensors)


def where(tensor: Tensor) -> dict[str, int]:
    """The device of a tensor and the stream that its caller works on, as the kernels take them."""
    if not tensor.is_cuda:
        return {"device": 0, "stream": 0}
    index = tensor.device.index
    return {"device": index, "stream": torch._C._cuda_getCurrentRawStream(index)}


def gemm(a: Tensor, b: Tensor, c: Tensor, **epilogue: Any) -> None:
    """See _matmul.multiply."""
    at = where(c)
    invariant = _state.settings().batch_invariant
    scratch = _module.gemm_workspace(
        c.shape,
        a.shape[-1],
        OPERAND[a.dtype],
        precision=precision(a.dtype),
        batch_invariant=invariant,
        device=at["device"],
    )
    if scratch:
        workspace = c.new_empty(scratch, dtype=torch.uint8)
        at.update(workspace_ptr=workspace.data_ptr(), workspace_bytes=scratch)
    _matmul.multiply(_module.gemm, a, b, c, batch_invariant=invariant, **at, **epilogue)


product = functools.partial(_matmul.product, gemm)
linear = functools.partial(_matmul.linear, gemm)
int_mm = functools.partial(_matmul.int_mm, gemm)


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
