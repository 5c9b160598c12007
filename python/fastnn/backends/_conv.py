"""What the convolutions of CPUs and GPUs have in common: the layout of results, one and two dimensions as three, and how
kernels of GPUs are called: x (N, C, *spatial), w (M, C / groups, *kernel), y (N, M, *out), 1 to 3 spatial dimensions, all of
one dtype and any strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _state
from .._layout import suggest_memory_format
from ._tensors import new_image
from .codes import ACTIVATION, DTYPE, precision

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


def arguments(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> tuple[Any, ...]:
    """What the compiled kernels take of a convolution; the bias is contiguous."""
    return (
        x.data_ptr(),
        five(x.shape),
        five(x.stride()),
        w.data_ptr(),
        five(w.shape),
        five(w.stride()),
        y.data_ptr(),
        five(y.shape),
        five(y.stride()),
        DTYPE[x.dtype],
        three(stride, 1),
        three(padding, 0),
        three(dilation, 1),
        groups,
        precision(x.dtype),
        _state.settings().batch_invariant,
        0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        ACTIVATION[activation],
    )


class Convolutions:
    """The functions of a GPU's kernels: ``convolve`` writes one of the tensors, "forward" y, "input" x or "weight" w, from the
    other two; ``column_sum`` sums all dimensions but the last."""

    def __init__(self, convolve: Callable[..., None], column_sum: Callable[[Tensor], Tensor]) -> None:
        self._convolve, self._column_sum = convolve, column_sum

    def forward(
        self,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        activation: str = "none",
        residual: Tensor | None = None,
        prepared: Any = None,
        overwrite: bool = False,
    ) -> Tensor:
        """activation(conv(x, w) + bias + residual); the residual has the result's shape. Nothing is kept of w for other calls
        in ``prepared``, nor is the residual overwritten."""
        channels_last = gives_channels_last(x, w, False, stride, padding, dilation, groups)
        y = new_image(x, result_shape(x, w, stride, padding, dilation), channels_last)
        if residual is not None and residual.stride() != y.stride():
            residual = torch.empty_like(y).copy_(residual)
        self._convolve("forward", x, w, y, stride, padding, dilation, groups, bias, activation, residual)
        return y

    def inverted_residual(self, *args: Any) -> None:
        """There is no kernel of three layers in one pass: the layers are called one by one."""

    def input(
        self,
        y: Tensor,
        w: Tensor,
        bias: Tensor | None,
        size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        """The gradient of x, of the spatial sizes ``size``, from that of y; with ``bias``, the transposed convolution."""
        channels_last = gives_channels_last(y, w, True, stride, padding, dilation, groups)
        x = new_image(y, (y.shape[0], w.shape[1] * groups, *size), channels_last)
        self._convolve("input", x, w, y, stride, padding, dilation, groups, bias)
        return x

    def weight(
        self,
        y: Tensor,
        x: Tensor,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        channels_last: bool,
    ) -> Tensor:
        """The gradient of w from that of y."""
        w = new_image(x, (y.shape[1], x.shape[1] // groups, *kernel), channels_last)
        self._convolve("weight", x, w, y, stride, padding, dilation, groups)
        return w

    def channel_sum(self, y: Tensor) -> Tensor:
        """The sum over all but dimension 1: the gradient of the bias."""
        return self._column_sum(y.movedim(1, -1))
