"""Layer normalization and rms normalization layers."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional


class LayerNorm(torch.nn.LayerNorm):
    """Layer normalization over the last dimensions, as :class:`torch.nn.LayerNorm`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """Rms normalization over the last dimensions, as :class:`torch.nn.RMSNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)
