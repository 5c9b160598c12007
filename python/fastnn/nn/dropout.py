"""Dropout layers."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional


class Dropout(torch.nn.Dropout):
    """Zeroes elements with probability ``p`` in training, as :class:`torch.nn.Dropout`; ``(*) -> (*)``, any layout."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.dropout(input, self.p, self.training, self.inplace)
