"""Convolution layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import functional


class _Convolution:
    """What the three have in common: torch's forward, with the function that computes exchanged."""

    _function: Callable[..., Tensor]

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            # reflect, replicate and circular padding are made in memory, as torch makes them.
            input = torch.nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return self._function(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class Conv1d(_Convolution, torch.nn.Conv1d):
    """1-d convolution, as :class:`torch.nn.Conv1d`: input ``(N, C, L)`` or ``(C, L)``, weight ``(M, C / groups, K)``.

    Dtypes, precision and errors are those of :func:`fastnn.functional.conv1d`.
    """

    _function = staticmethod(functional.conv1d)


class Conv2d(_Convolution, torch.nn.Conv2d):
    """2-d convolution, as :class:`torch.nn.Conv2d`: input ``(N, C, H, W)`` or ``(C, H, W)``, weight
    ``(M, C / groups, Kh, Kw)``.

    Dtypes, precision and errors are those of :func:`fastnn.functional.conv2d`.
    """

    _function = staticmethod(functional.conv2d)


class Conv3d(_Convolution, torch.nn.Conv3d):
    """3-d convolution, as :class:`torch.nn.Conv3d`: input ``(N, C, D, H, W)`` or ``(C, D, H, W)``, weight
    ``(M, C / groups, Kd, Kh, Kw)``.

    Dtypes, precision and errors are those of :func:`fastnn.functional.conv3d`.
    """

    _function = staticmethod(functional.conv3d)


class _Transposed:
    _function: Callable[..., Tensor]
    _rank: int

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        if self.padding_mode != "zeros":
            raise ValueError(f"padding_mode: only zeros for {type(self).__name__}, got {self.padding_mode!r}")
        extra = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, self._rank, self.dilation
        )
        return self._function(
            input, self.weight, self.bias, self.stride, self.padding, extra, self.groups, self.dilation
        )


class ConvTranspose1d(_Transposed, torch.nn.ConvTranspose1d):
    """The transpose of a 1-d convolution, as :class:`torch.nn.ConvTranspose1d`: weight ``(C, M / groups, K)``."""

    _function = staticmethod(functional.conv_transpose1d)
    _rank = 1


class ConvTranspose2d(_Transposed, torch.nn.ConvTranspose2d):
    """The transpose of a 2-d convolution, as :class:`torch.nn.ConvTranspose2d`: weight ``(C, M / groups, Kh, Kw)``."""

    _function = staticmethod(functional.conv_transpose2d)
    _rank = 2


class ConvTranspose3d(_Transposed, torch.nn.ConvTranspose3d):
    """The transpose of a 3-d convolution, as :class:`torch.nn.ConvTranspose3d`: weight ``(C, M / groups, Kd, Kh, Kw)``."""

    _function = staticmethod(functional.conv_transpose3d)
    _rank = 3
