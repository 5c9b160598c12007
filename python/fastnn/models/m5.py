"""M5: a convolutional network on the raw samples of a sound.

Source: Dai, Dai, Qu, Li, Das 2016, "Very deep convolutional neural networks for raw waveforms", arXiv:1610.00087, table 1.
The arguments, their defaults and the ``state_dict`` keys (``conv1.weight``, ``bn1.running_mean``, ``fc1.bias``, ...) are
those of PyTorch's tutorial on speech commands, which takes larger steps and fewer channels than the paper: 26,915
parameters with 35 classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import nn


class M5(torch.nn.Module):
    """Four convolutions, each with batch norm, ReLU and max pooling by 4, the mean over time, a linear layer.

    The first kernel is 80 samples long, about that of a band-pass filter at 8 kHz; the others are of 3.

    Shapes: input ``(N, n_input, L)``, output ``(N, n_output)``, logits. L is at least 6,848 with
    the default stride of 16, so that a second at 8 kHz is enough, and 1,772 with the paper's stride of 4.

    Args:
        n_input: channels of the sound.
        n_output: how many logits come out.
        stride: of the first convolution; 4 in the paper.
        n_channel: channels of the first two convolutions; the last two have twice as many.

    Example::

        model = fastnn.models.M5(n_output=10)
        logits = model(torch.randn(2, 1, 16000))  # (2, 10)
    """

    def __init__(self, n_input: int = 1, n_output: int = 35, stride: int = 16, n_channel: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(n_input, n_channel, kernel_size=80, stride=stride)
        self.bn1 = nn.BatchNorm1d(n_channel)
        self.pool1 = nn.MaxPool1d(4)
        self.conv2 = nn.Conv1d(n_channel, n_channel, kernel_size=3)
        self.bn2 = nn.BatchNorm1d(n_channel)
        self.pool2 = nn.MaxPool1d(4)
        self.conv3 = nn.Conv1d(n_channel, 2 * n_channel, kernel_size=3)
        self.bn3 = nn.BatchNorm1d(2 * n_channel)
        self.pool3 = nn.MaxPool1d(4)
        self.conv4 = nn.Conv1d(2 * n_channel, 2 * n_channel, kernel_size=3)
        self.bn4 = nn.BatchNorm1d(2 * n_channel)
        self.pool4 = nn.MaxPool1d(4)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool1d(1)
        self.fc1 = nn.Linear(2 * n_channel, n_output)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu(self.bn1(self.conv1(x))))
        x = self.pool2(self.relu(self.bn2(self.conv2(x))))
        x = self.pool3(self.relu(self.bn3(self.conv3(x))))
        x = self.pool4(self.relu(self.bn4(self.conv4(x))))
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc1(x)
