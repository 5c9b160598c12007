"""How pooling kernels are called, on CPUs and GPUs alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .codes import DTYPE

#: What is computed.
MAX, SCATTER, GATHER, INDICES, AVG, AVG_BACKWARD = range(6)

#: Codes pass through float32 in the kernels.
MOST_TAPS = 1 << 24


class Windows(NamedTuple):
    """Where the windows lie, one number a spatial dimension; an empty ``kernel`` means adaptive windows."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]


def taps(windows: Windows, size: Sequence[int], output: Sequence[int]) -> int:
    """How many elements a window has at most; of adaptive windows, no more than this."""
    if windows.kernel:
        return math.prod(windows.kernel)
    return math.prod([(n - 1) // o + 2 for n, o in zip(size, output, strict=True)])  # Dynamo takes no generator here


def code_dtype(windows: Windows, size: Sequence[int], output: Sequence[int]) -> torch.dtype:
    """The type of the codes that say which element of its window is the maximum."""
    return torch.uint8 if taps(windows, size, output) <= 256 else torch.int32


def by_address(
    function: Callable[..., None], where: Callable[[Tensor], dict[str, int]] = lambda tensor: {}
) -> Callable[..., None]:
    """What :class:`Pools` runs, of an extension module: its function ``pool``, and where that runs (a tensor -> further
    arguments)."""

    def run(
        job: int,
        dims: int,
        x: Tensor | None,
        x_shape: Sequence[int],
        out: Tensor,
        codes: Tensor | None,
        windows: Windows,
        dtype: torch.dtype,
        include_padding: bool = True,
        divisor: int = 0,
    ) -> None:
        function(
            job,
            dims,
            0 if x is None else x.data_ptr(),
            tuple(x_shape),
            (0,) * len(x_shape) if x is None else x.stride(),
            out.data_ptr(),
            out.shape,
            out.stride(),
            0 if codes is None else codes.data_ptr(),
            () if codes is None else codes.stride(),
            codes is not None and codes.dtype is torch.int32,
            tuple(windows.kernel),
            tuple(windows.stride),
            tuple(windows.padding),
            tuple(windows.dilation),
            include_padding,
            float(divisor),
            DTYPE[dtype],
            **where(out),
        )

    return run


class Pools:
    """The functions of a backend. ``run``: (job, dims, x, shape of x, out, codes, windows, dtype, include_padding=True,
    divisor=0); ``x`` has the shape of the pool's input, ``out`` and ``codes`` that of its output, and one of x and out
    is written. ``empty``: what memory results are given, (like, shape, dtype, channels_last) -> Tensor."""

    def __init__(
        self, run: Callable[..., None], empty: Callable[[Tensor, Sequence[int], torch.dtype, bool], Tensor]
    ) -> None:
        self._run, self._empty = run, empty

    def max_pool(
        self, x: Tensor, windows: Windows, output: Sequence[int], channels_last: bool, coded: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The maxima, and the codes of where they are."""
        dims = len(output)
        size = x.shape[x.dim() - dims :]
        shape = (*x.shape[: x.dim() - dims], *output)
        out = self._empty(x, shape, x.dtype, channels_last)
        codes = self._empty(x, shape, code_dtype(windows, size, output), channels_last) if coded else None
        if out.numel():
            self._run(MAX, dims, x, x.shape, out, codes, windows, x.dtype)
        return out, codes

    def max_pool_backward(
        self, grad: Tensor, codes: Tensor, windows: Windows, size: Sequence[int], dims: int, channels_last: bool
    ) -> Tensor:
        """The gradient of an input of shape ``size``."""
        x = self._empty(grad, size, grad.dtype, channels_last)
        if x.numel():
            self._run(SCATTER, dims, x, x.shape, grad, codes, windows, grad.dtype)
        return x

    def max_pool_gather(self, x: Tensor, codes: Tensor, windows: Windows, dims: int, channels_last: bool) -> Tensor:
        """x at the places that the codes mean."""
        out = self._empty(x, codes.shape, x.dtype, channels_last)
        if out.numel():
            self._run(GATHER, dims, x, x.shape, out, codes, windows, x.dtype)
        return out

    def max_pool_indices(self, codes: Tensor, windows: Windows, size: Sequence[int], channels_last: bool) -> Tensor:
        """The codes as positions in a plane of ``size``, int64."""
        dims = len(size)
        out = self._empty(codes, codes.shape, torch.int64, channels_last)
        if out.numel():
            shape = (*codes.shape[: codes.dim() - dims], *size)
            self._run(INDICES, dims, None, shape, out, codes, windows, torch.float32)
        return out

    def avg_pool(
        self,
        x: Tensor,
        windows: Windows,
        output: Sequence[int],
        include_padding: bool,
        divisor: int,
        channels_last: bool,
    ) -> Tensor:
        """Sums over the windows, each divided by ``divisor`` or, where that is 0, by its count of elements."""
        dims = len(output)
        out = self._empty(x, (*x.shape[: x.dim() - dims], *output), x.dtype, channels_last)
        if out.numel():
            self._run(AVG, dims, x, x.shape, out, None, windows, x.dtype, include_padding, divisor)
        return out

    def avg_pool_backward(
        self,
        grad: Tensor,
        windows: Windows,
        size: Sequence[int],
        dims: int,
        include_padding: bool,
        divisor: int,
        channels_last: bool,
    ) -> Tensor:
        x = self._empty(grad, size, grad.dtype, channels_last)
        if x.numel():
            self._run(AVG_BACKWARD, dims, x, x.shape, grad, None, windows, grad.dtype, include_padding, divisor)
        return x
