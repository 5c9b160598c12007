"""What the kernels of GPUs have in common, in CUDA C++ and in Triton: which tensors they take, and how those lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: The ops that are given statistics in float64 beside their tensors, the first of which decides.
WITH_STATISTICS = ("batch_norm_backward", "group_norm_backward", "cross_entropy_backward")
FLOAT = (torch.float32, torch.bfloat16, torch.float16)
_BYTES = (torch.int8, torch.uint8)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
#: What some ops take beside these.
_BESIDE: dict[str, tuple[torch.dtype, ...]] = {
    "int_mm": _BYTES,
    "scaled_mm": _FLOAT8,
    "quantize": (torch.float64,),
    "quantize_dynamic": (torch.float64,),
    "choose_scale": (torch.float64,),
    "int8_linear": (torch.float64,),  # scales
    "weight_only_linear": (torch.float64,),  # likewise
    "dequantize": (torch.float64, *_BYTES, *_FLOAT8),
}


def reason_against(op: str, device: str, *tensors: Tensor | None) -> str | None:
    """None when kernels that read memory of ``device`` can take these tensors, else the reason why not, for people."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.layout is not torch.strided:
            return f"a tensor of layout {str(tensor.layout).removeprefix('torch.')}"
        if tensor.is_nested:
            return "a nested tensor"
        if tensor.device.type not in (device, "meta"):
            return f"a tensor on {tensor.device.type}, which a kernel for {device} cannot read"
        if op.startswith("attention") and tensor.dtype is torch.bool:
            continue  # a mask
        if op in WITH_STATISTICS and tensor.dtype is torch.float64 and tensor is not tensors[0]:
            continue  # the mean or the variance
        if tensor.dtype not in FLOAT and tensor.dtype not in _BESIDE.get(op, ()):
            return f"dtype {str(tensor.dtype).removeprefix('torch.')} on a GPU"
    return None


def contiguous(shape: Sequence[int]) -> list[int]:
    """The strides of a contiguous tensor."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        strides[i - 1] = strides[i] * max(shape[i], 1)
    return strides


def merge(shape: Sequence[int], *strides: Sequence[int]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The shape and each tensor's strides, with dimensions whose elements follow each other in all tensors made one.

    At least one dimension is left.
    """
    kept: list[list[int]] = []  # of a dimension its size, and its stride in each tensor
    for size, *steps in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if kept and all(outer == step * size for outer, step in zip(kept[-1][1:], steps, strict=True)):
            kept[-1] = [kept[-1][0] * size, *steps]
        else:
            kept.append([size, *steps])
    merged = list(zip(*(kept or [[1] * (1 + len(strides))]), strict=True))
    return merged[0], merged[1:]


def image_strides(shape: Sequence[int], channels_last: bool) -> Sequence[int]:
    return channels_last_strides(shape) if channels_last else contiguous(shape)


def channels_last_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of (N, C, *spatial) with C fastest."""
    n, c, *spatial = shape
    outer, *inner = contiguous((n, *spatial, c))
    return (outer, 1, *inner[:-1])


def new_image(like: Tensor, shape: Sequence[int], channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory beside ``like``'s for (N, C, *spatial), contiguous or channels-last."""
    return like.new_empty_strided(shape, image_strides(shape, channels_last), dtype=dtype or like.dtype)
