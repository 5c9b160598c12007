"""Pooling layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional


class MaxPool1d(torch.nn.MaxPool1d):
    """Maxima over windows of ``(N, C, L)`` or ``(C, L)``, as :class:`torch.nn.MaxPool1d`."""

    def forward(self, input: Tensor) -> Any:
        return functional.max_pool1d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class MaxPool2d(torch.nn.MaxPool2d):
    """Maxima over windows of ``(N, C, H, W)`` or ``(C, H, W)``, as :class:`torch.nn.MaxPool2d`."""

    def forward(self, input: Tensor) -> Any:
        return functional.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class MaxPool3d(torch.nn.MaxPool3d):
    """Maxima over windows of ``(N, C, D, H, W)`` or ``(C, D, H, W)``, as :class:`torch.nn.MaxPool3d`."""

    def forward(self, input: Tensor) -> Any:
        return functional.max_pool3d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class AvgPool1d(torch.nn.AvgPool1d):
    """Averages over windows of ``(N, C, L)`` or ``(C, L)``, as :class:`torch.nn.AvgPool1d`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.avg_pool1d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad
        )


class AvgPool2d(torch.nn.AvgPool2d):
    """Averages over windows of ``(N, C, H, W)`` or ``(C, H, W)``, as :class:`torch.nn.AvgPool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        counted = (self.ceil_mode, self.count_include_pad, self.divisor_override)
        return functional.avg_pool2d(input, self.kernel_size, self.stride, self.padding, *counted)


class AvgPool3d(torch.nn.AvgPool3d):
    """Averages over windows of ``(N, C, D, H, W)`` or ``(C, D, H, W)``, as :class:`torch.nn.AvgPool3d`."""

    def forward(self, input: Tensor) -> Tensor:
        counted = (self.ceil_mode, self.count_include_pad, self.divisor_override)
        return functional.avg_pool3d(input, self.kernel_size, self.stride, self.padding, *counted)


class AdaptiveMaxPool1d(torch.nn.AdaptiveMaxPool1d):
    """``output_size`` maxima of ``(N, C, L)`` or ``(C, L)``, as :class:`torch.nn.AdaptiveMaxPool1d`."""

    def forward(self, input: Tensor) -> Any:
        return functional.adaptive_max_pool1d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool2d(torch.nn.AdaptiveMaxPool2d):
    """``output_size`` maxima of ``(N, C, H, W)`` or ``(C, H, W)``, as :class:`torch.nn.AdaptiveMaxPool2d`."""

    def forward(self, input: Tensor) -> Any:
        return functional.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool3d(torch.nn.AdaptiveMaxPool3d):
    """``output_size`` maxima of ``(N, C, D, H, W)`` or ``(C, D, H, W)``, as :class:`torch.nn.AdaptiveMaxPool3d`."""

    def forward(self, input: Tensor) -> Any:
        return functional.adaptive_max_pool3d(input, self.output_size, self.return_indices)


class AdaptiveAvgPool1d(torch.nn.AdaptiveAvgPool1d):
    """``output_size`` averages of ``(N, C, L)`` or ``(C, L)``, as :class:`torch.nn.AdaptiveAvgPool1d`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.adaptive_avg_pool1d(input, self.output_size)


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """``output_size`` averages of ``(N, C, H, W)`` or ``(C, H, W)``, as :class:`torch.nn.AdaptiveAvgPool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveAvgPool3d(torch.nn.AdaptiveAvgPool3d):
    """``output_size`` averages of ``(N, C, D, H, W)`` or ``(C, D, H, W)``, as :class:`torch.nn.AdaptiveAvgPool3d`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.adaptive_avg_pool3d(input, self.output_size)
