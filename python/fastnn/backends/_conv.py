"""What the convolutions of CPUs and GPUs have in common: the layout of results, and one and two dimensions as three."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._layout import suggest_memory_format

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def gives_channels_last(
    x: Tensor,
    w: Tensor,
    transposed: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> bool:
    """Whether torch's convolution of these gives a result in channels-last: where one of them is; in one dimension the
    weight, and in three that depends on which of its kernels torch would choose as well."""
    if x.dim() == 3:
        return not w.is_contiguous() and is_channels_last(w.unsqueeze(2))
    if not is_channels_last(x, w):
        return False
    if x.dim() == 4 or x.is_meta:
        return True
    backend = torch._C._select_conv_backend(
        x, w, None, stride, padding, dilation, transposed, [0] * len(stride), groups
    )
    return torch._C._conv_determine_backend_memory_format(x, w, backend) is torch.channels_last_3d


def is_channels_last(*tensors: Tensor) -> bool:
    return any(
        tensor.dim() > 3
        and (tensor.stride(1) == 1 or not tensor.is_contiguous())
        and suggest_memory_format(tensor) is CHANNELS_LAST[tensor.dim()]
        for tensor in tensors
    )


def result_shape(
    x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """That of the convolution of x (N, C, *spatial) with w (M, C / groups, *kernel)."""
    spatial = [
        (x.shape[2 + d] + 2 * padding[d] - dilation[d] * (w.shape[2 + d] - 1) - 1) // stride[d] + 1
        for d in range(x.dim() - 2)
    ]
    return (x.shape[0], w.shape[0], *spatial)


def five(sizes: Sequence[int], fill: int = 1) -> tuple[int, ...]:
    """Sizes or strides with the missing spatial dimensions in front of the others."""
    if len(sizes) == 4:
        return (sizes[0], sizes[1], fill, sizes[2], sizes[3])
    return (*sizes[:2], *(fill,) * (5 - len(sizes)), *sizes[2:])


def three(numbers: Sequence[int], fill: int) -> tuple[int, ...]:
    return (*(fill,) * (3 - len(numbers)), *numbers)
