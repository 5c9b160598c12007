"""The embedding layer."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional


class Embedding(torch.nn.Embedding):
    """Rows of a table by number, ``(*) -> (*, embedding_dim)``, as :class:`torch.nn.Embedding`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
