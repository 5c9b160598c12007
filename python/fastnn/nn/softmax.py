"""softmax layers."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional


class Softmax(torch.nn.Softmax):
    """``exp(x) / sum(exp(x))`` along ``dim``, as :class:`torch.nn.Softmax`; ``(*) -> (*)``, any layout."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    """``x - log(sum(exp(x)))`` along ``dim``, as :class:`torch.nn.LogSoftmax`; ``(*) -> (*)``, any layout."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.log_softmax(input, self.dim, _stacklevel=5)


class Softmin(torch.nn.Softmin):
    """``softmax(-x)`` along ``dim``, as :class:`torch.nn.Softmin`; ``(*) -> (*)``, any layout."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.softmin(input, self.dim, _stacklevel=5)


class Softmax2d(torch.nn.Softmax2d):
    """softmax over the channels of ``(N, C, H, W)`` or ``(C, H, W)``, as :class:`torch.nn.Softmax2d`."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() not in (3, 4):
            raise ValueError(f"Softmax2d: expected input to be 3D or 4D, got {input.dim()}D instead")
        return functional.softmax(input, -3, _stacklevel=5)
