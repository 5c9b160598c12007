"""Triton kernels on CUDA tensors: what they can run. Each file has a family's kernels, and how they are called.

They are asked where there is no CUDA kernel, and under ``fastnn.backend("triton")``. The functions take plain, dense tensors
whose shapes the ops have checked, all on one device, and run on the caller's current stream without waiting for it. They
know nothing of autograd.

Triton is optional: it is imported when a kernel is first called. On a machine without a GPU its interpreter can run the same
kernels, for tests: where the variable ``TRITON_INTERPRET`` is 1 when this package is imported, the kernels take CPU tensors,
and no others.
"""

from __future__ import annotations

import importlib
import os
from importlib import metadata
from typing import Any

from torch import Tensor

from .._tensors import reason_against

#: The first version that these kernels are tested with.
NEEDED = (3, 4)
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
        *("quantize", "dequantize", "quantize_dynamic", "choose_scale"),
        *("int8_linear", "weight_only_linear", "int8_conv"),
        "split_search",
    )
)
#: The functions of Kernels() -> their file.
_FILES = {
    "product": "gemm",
    "linear": "gemm",
    "int_mm": "gemm",
    "column_sum": "reduce",
    "activation": "elementwise",
    "activation_backward": "elementwise",
}


def _installed() -> str | None:
    """None where there is a Triton to use, else what is in the way."""
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "Triton is not installed"
    if tuple(int(part) for part in version.split(".")[:2]) < NEEDED:
        return f"Triton {version} is older than {NEEDED[0]}.{NEEDED[1]}"
    return None


_missing = _installed()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def device_type() -> str:
    """Of the tensors that the kernels read: "cuda", or "cpu" where they are interpreted."""
    return "cpu" if INTERPRETED else "cuda"


def why_not() -> str | None:
    """None where kernels can run at all, else the reason why not, for people."""
    return _missing


def supports(op: str, *tensors: Tensor | None) -> str | None:
    """None when the kernels can run ``op`` on these tensors, else the reason why not, for people."""
    if _missing is not None:
        return _missing
    if op not in OPS:
        return f"no Triton kernel for {op}"
    return reason_against(op, device_type(), *tensors)


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
