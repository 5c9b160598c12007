"""Elementwise activation layers."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional


class ReLU(torch.nn.ReLU):
    """``max(0, x)`` elementwise, as :class:`torch.nn.ReLU`; ``(*) -> (*)``, any layout."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.relu(input, inplace=self.inplace)


class ReLU6(torch.nn.ReLU6):
    """``min(max(0, x), 6)`` elementwise, as :class:`torch.nn.ReLU6`; ``(*) -> (*)``, any layout."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.relu6(input, inplace=self.inplace)


class GELU(torch.nn.GELU):
    """``x * Phi(x)`` elementwise, as :class:`torch.nn.GELU`; ``(*) -> (*)``, any layout.

    ``approximate="tanh"`` uses ``0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`` (Hendrycks and Gimpel 2016,
    arXiv:1606.08415).
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.gelu(input, approximate=self.approximate)


class SiLU(torch.nn.SiLU):
    """``x * sigmoid(x)`` elementwise, as :class:`torch.nn.SiLU`; ``(*) -> (*)``, any layout."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.silu(input, inplace=self.inplace)


class Sigmoid(torch.nn.Sigmoid):
    """``1 / (1 + exp(-x))`` elementwise, as :class:`torch.nn.Sigmoid`; ``(*) -> (*)``, any layout."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.sigmoid(input)


class Tanh(torch.nn.Tanh):
    """``tanh(x)`` elementwise, as :class:`torch.nn.Tanh`; ``(*) -> (*)``, any layout."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.tanh(input)


def activation_name(module: torch.nn.Module) -> str | None:
    """The name under which ``functional.linear_act`` knows this layer, or None for any other module.

    Only fastnn's own classes count, by exact type: a subclass may compute something else.
    """
    kind = type(module)
    if kind is ReLU:
        # In-place relu of a linear's fresh output is that output: nobody else sees the value before it.
        return "relu"
    if kind is ReLU6:
        return "relu6"
    if kind is GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    if kind is SiLU:
        return "silu"
    if kind is Sigmoid:
        return "sigmoid"
    if kind is Tanh:
        return "tanh"
    return kind.__dict__.get("_activation_name") if "_half" in kind.__dict__ else None
