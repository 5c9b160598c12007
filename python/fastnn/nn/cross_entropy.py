"""Cross entropy losses."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Cross entropy of logits ``(N, C)``, ``(C)`` or ``(N, C, ...)``, as :class:`torch.nn.CrossEntropyLoss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


if hasattr(torch.nn, "LinearCrossEntropyLoss"):  # since torch 2.13

    class LinearCrossEntropyLoss(torch.nn.LinearCrossEntropyLoss):
        """Cross entropy of a linear layer's result, as :class:`torch.nn.LinearCrossEntropyLoss`; the logits are never held
        whole, whatever ``options`` says."""

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            sizes = (self.num_classes, *self.out_features)
            bias = self.linear.bias
            return functional.linear_cross_entropy(
                input,
                self.linear.weight.reshape((*sizes, self.linear.in_features)),
                target,
                linear_bias=None if bias is None else bias.reshape(sizes),
                weight=self.weight,
                reduction=self.reduction,
                ignore_index=self.ignore_index,
                label_smoothing=self.label_smoothing,
                options=self.options,
            )
