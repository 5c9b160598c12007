"""LeNet-5: the first convolutional network that read handwriting in practice.

Source: LeCun, Bottou, Bengio, Haffner 1998, "Gradient-based learning applied to document recognition", figure 2. As in
today's implementations every map of the second convolution sees all six maps of the first, subsampling is a plain
average, and the last layer is linear. The names (``conv1``, ``conv2``, ``fc1``, ``fc2``, ``fc3``) are those of
PyTorch's tutorials; with one input channel and ten classes it has 61,706 parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import nn


class LeNet5(torch.nn.Module):
    """Two convolutions of 5×5, each with tanh and a 2×2 average, and three linear layers of 120, 84 and num_classes.

    Shapes: input ``(N, in_channels, 32, 32)``, output ``(N, num_classes)``, logits.

    Args:
        num_classes: how many logits come out.
        in_channels: how many channels an image has.

    Example::

        model = fastnn.models.LeNet5()
        logits = model(torch.randn(4, 1, 32, 32))  # (4, 10)
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.pool = nn.AvgPool2d(2)
        self.tanh = nn.Tanh()
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.tanh(self.conv1(x)))
        x = self.pool(self.tanh(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = self.tanh(self.fc1(x))
        x = self.tanh(self.fc2(x))
        return self.fc3(x)
