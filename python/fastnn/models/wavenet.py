"""WaveNet: dilated causal convolutions that predict each sample of a sound from those before it.

Source: van den Oord et al. 2016, "WaveNet: A generative model for raw audio", arXiv:1609.03499, figures 3 and 4. The paper
has no official code; the arguments, their defaults and the ``state_dict`` keys (``start_conv``, ``filter_convs.N``,
``gate_convs.N``, ``residual_convs.N``, ``skip_convs.N``, ``end_conv_1``, ``end_conv_2``) are those of the PyTorch
implementation that is used most, vincentherrmann/pytorch-wavenet.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import nn


class WaveNet(torch.nn.Module):
    """Gated units on dilated causal convolutions, with residual and skip connections.

    For the input ``h`` of each layer, ``z = tanh(W_filter * h) ⊙ sigmoid(W_gate * h)``; the next layer gets
    ``h + W_residual z``, and the sum of all ``W_skip z`` goes through ReLU, 1×1, ReLU, 1×1. In each block the dilation
    is 1, 2, 4, ..., ``2**(layers - 1)``.

    Shapes: input ``(N, classes, L)``, one-hot (of mu-law companded samples in the paper); output ``(N, classes, L)``:
    at t the logits of sample t + 1, which depend on samples up to t alone. Before the first sample there is silence:
    zeros.

    Args:
        layers: layers of a block.
        blocks: how often the dilation starts again from 1.
        dilation_channels: channels of the filter and of the gate.
        residual_channels: channels from layer to layer.
        skip_channels: channels of the sum over all layers.
        end_channels: channels between the last two convolutions.
        classes: how many values a sample can have.
        kernel_size: of the dilated convolutions.
        bias: whether the convolutions have a bias; the last two always do.

    Example::

        model = fastnn.models.WaveNet(layers=8, blocks=2)
        samples = torch.randint(256, (2, 4000))
        logits = model(torch.nn.functional.one_hot(samples, 256).mT.float())  # (2, 256, 4000)
        loss = torch.nn.functional.cross_entropy(logits[:, :, :-1], samples[:, 1:])
    """

    def __init__(
        self,
        layers: int = 10,
        blocks: int = 4,
        dilation_channels: int = 32,
        residual_channels: int = 32,
        skip_channels: int = 256,
        end_channels: int = 256,
        classes: int = 256,
        kernel_size: int = 2,
        bias: bool = False,
    ) -> None:
        super().__init__()
        dilations = [2**layer for layer in range(layers)] * blocks
        #: How many samples, the present one among them, an output depends on.
        self.receptive_field = 1 + (kernel_size - 1) * sum(dilations)
        self.start_conv = nn.Conv1d(classes, residual_channels, kernel_size=1, bias=bias)
        self.filter_convs = torch.nn.ModuleList()
        self.gate_convs = torch.nn.ModuleList()
        self.residual_convs = torch.nn.ModuleList()
        self.skip_convs = torch.nn.ModuleList()
        for dilation in dilations:
            for convs in (self.filter_convs, self.gate_convs):
                convs.append(nn.Conv1d(residual_channels, dilation_channels, kernel_size, dilation=dilation, bias=bias))
            self.residual_convs.append(nn.Conv1d(dilation_channels, residual_channels, kernel_size=1, bias=bias))
            self.skip_convs.append(nn.Conv1d(dilation_channels, skip_channels, kernel_size=1, bias=bias))
        self.end_conv_1 = nn.Conv1d(skip_channels, end_channels, kernel_size=1)
        self.end_conv_2 = nn.Conv1d(end_channels, classes, kernel_size=1)
        self.tanh = nn.Tanh()
        self.sigmoid = nn.Sigmoid()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.start_conv(x)
        skip = None
        for filter_conv, gate_conv, residual_conv, skip_conv in zip(
            self.filter_convs, self.gate_convs, self.residual_convs, self.skip_convs, strict=True
        ):
            # Zeros on the left alone: no output sees a later input, and the length stays.
            padding = (filter_conv.kernel_size[0] - 1) * filter_conv.dilation[0]
            padded = F.pad(x, (padding, 0))
            z = self.tanh(filter_conv(padded)) * self.sigmoid(gate_conv(padded))
            if skip is None:
                skip = skip_conv(z)
            else:
                skip += skip_conv(z)
            # Nobody uses the last layer's; that layer has the convolution because state dicts have its weight.
            x = x + residual_conv(z)
        x = self.relu(skip)
        x = self.relu(self.end_conv_1(x))
        return self.end_conv_2(x)
