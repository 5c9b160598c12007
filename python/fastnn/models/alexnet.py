"""AlexNet, in the form for one device.

Source: Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks", arXiv:1404.5997, which is
Krizhevsky, Sutskever, Hinton 2012 without the split over two GPUs and without response normalisation. Constructor,
``state_dict`` keys (``features.0.weight``, ``classifier.1.weight``, ...) and initialisation (torch's defaults) are
torchvision's. With 1,000 classes it has 61,100,840 parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import nn


class AlexNet(torch.nn.Module):
    """Five convolutions with ReLU, three of them followed by max pooling, and three linear layers.

    Shapes: input ``(N, 3, H, W)`` with H and W at least 63, 224 in the paper; output ``(N, num_classes)``, logits.

    Args:
        num_classes: how many logits come out.
        dropout: probability with which a feature is dropped before each of the first two linear layers.

    Example::

        model = fastnn.models.AlexNet(num_classes=10)
        logits = model(torch.randn(2, 3, 224, 224))  # (2, 10)
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(64, 192, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(192, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        # The identity at 224×224; it lets images of other sizes through.
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = torch.nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


def alexnet(**kwargs: Any) -> AlexNet:
    """An :class:`AlexNet` with random weights; the arguments are the class's."""
    return AlexNet(**kwargs)
