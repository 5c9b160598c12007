"""The networks of `fastnn.models` once more, in plain `torch.nn`: written from the papers' tables, not from fastnn's code.

What has no parameters is a function here, nothing happens in place, and what can be a loop over a table is one.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

# What jumps, and where a test puts smooth functions instead.
relu, max_pool1d, max_pool2d = F.relu, F.max_pool1d, F.max_pool2d


class LeNet5(nn.Module):
    def __init__(self, num_classes=10, in_channels=1):
        super().__init__()
        for number, (inputs, outputs) in enumerate([(in_channels, 6), (6, 16)], start=1):
            self.add_module(f"conv{number}", nn.Conv2d(inputs, outputs, (5, 5)))
        for number, (inputs, outputs) in enumerate([(400, 120), (120, 84), (84, num_classes)], start=1):
            self.add_module(f"fc{number}", nn.Linear(inputs, outputs))

    def forward(self, x):
        for conv in (self.conv1, self.conv2):
            x = F.avg_pool2d(conv(x).tanh(), 2, 2)
        x = x.reshape(-1, 400)
        return self.fc3(self.fc2(self.fc1(x).tanh()).tanh())


class AlexNet(nn.Module):
    # Where the convolution stands in `features`, its channels, kernel, stride, padding, and whether a pool follows.
    table = (
        ("0", 3, 64, 11, 4, 2, True),
        ("3", 64, 192, 5, 1, 2, True),
        ("6", 192, 384, 3, 1, 1, False),
        ("8", 384, 256, 3, 1, 1, False),
        ("10", 256, 256, 3, 1, 1, True),
    )

    def __init__(self, num_classes=1000, dropout=0.5, hidden=4096):
        super().__init__()
        self.dropout = dropout
        self.features = nn.ModuleDict({at: nn.Conv2d(*row) for at, *row, _ in self.table})
        self.classifier = nn.ModuleDict(
            {"1": nn.Linear(9216, hidden), "4": nn.Linear(hidden, hidden), "6": nn.Linear(hidden, num_classes)}
        )

    def forward(self, x):
        for at, *_, pooled in self.table:
            x = relu(self.features[at](x))
            if pooled:
                x = max_pool2d(x, 3, 2)
        x = F.adaptive_avg_pool2d(x, 6).flatten(1)
        for at in "14":
            x = relu(self.classifier[at](F.dropout(x, self.dropout, self.training)))
        return self.classifier["6"](x)


class ResidualBlock(nn.Module):
    """Convolutions given as rows (inputs, outputs, kernel, stride, dilation, groups), each with its norm."""

    def __init__(self, rows, shortcut, norm):
        super().__init__()
        for number, (inputs, outputs, kernel, stride, dilation, groups) in enumerate(rows, start=1):
            padding = (kernel - 1) // 2 * dilation
            conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", norm(outputs))
        if shortcut is not None:
            self.downsample = nn.Sequential(nn.Conv2d(*shortcut[:2], 1, shortcut[2], bias=False), norm(shortcut[1]))
        self.depth = len(rows)
        self.changes_shape = shortcut is not None

    def forward(self, x):
        y = x
        for number in range(1, self.depth + 1):
            y = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(y))
            if number < self.depth:
                y = relu(y)
        return relu(y + (self.downsample(x) if self.changes_shape else x))


class ResNet(nn.Module):
    def __init__(self, blocks, *, bottleneck, num_classes=1000, groups=1, width=64, dilate=(0, 0, 0), norm=None):
        super().__init__()
        norm = norm or nn.BatchNorm2d
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = norm(64)
        channels, dilation = 64, 1
        for stage, count in enumerate(blocks, start=1):
            planes = 2 ** (5 + stage)
            stride = 1 if stage == 1 else 2
            before = dilation
            if stage > 1 and dilate[stage - 2]:
                dilation, stride = 2 * dilation, 1
            out = 4 * planes if bottleneck else planes
            layer = nn.Sequential()
            for index in range(count):
                s = stride if index == 0 else 1
                d = before if index == 0 else dilation
                if bottleneck:
                    mid = planes * width // 64 * groups
                    rows = [(channels, mid, 1, 1, 1, 1), (mid, mid, 3, s, d, groups), (mid, out, 1, 1, 1, 1)]
                else:
                    rows = [(channels, out, 3, s, 1, 1), (out, out, 3, 1, 1, 1)]
                shortcut = (channels, out, s) if s != 1 or channels != out else None
                layer.append(ResidualBlock(rows, shortcut, norm))
                channels = out
            self.add_module(f"layer{stage}", layer)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x):
        x = max_pool2d(relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class MobileNetV2(nn.Module):
    # Expansion, channels, stride of each of the 17 blocks of table 2.
    table = (
        (1, 16, 1),
        *((6, 24, s) for s in (2, 1)),
        *((6, 32, s) for s in (2, 1, 1)),
        *((6, 64, s) for s in (2, 1, 1, 1)),
        *((6, 96, s) for s in (1, 1, 1)),
        *((6, 160, s) for s in (2, 1, 1)),
        (6, 320, 1),
    )

    def __init__(self, num_classes=1000, widths=None, first=32, last=1280, dropout=0.2):
        """`widths` takes the place of the 17 blocks' channels."""
        super().__init__()
        self.dropout = dropout
        self.features = nn.Sequential(self.layer(3, first, 3, 2))
        channels, self.shortcuts = first, set()
        for index, (expansion, width, stride) in enumerate(self.table, start=1):
            width = widths[index - 1] if widths else width
            hidden = channels * expansion
            parts = [] if expansion == 1 else [self.layer(channels, hidden)]
            parts += [self.layer(hidden, hidden, 3, stride, hidden)]
            parts += [nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width)]
            # A module inside, because the blocks of the standard implementation have one.
            self.features.append(nn.Sequential(OrderedDict(conv=nn.Sequential(*parts))))
            if stride == 1 and channels == width:
                self.shortcuts.add(index)
            channels = width
        self.features.append(self.layer(channels, last))
        self.classifier = nn.ModuleDict({"1": nn.Linear(last, num_classes)})

    @staticmethod
    def layer(inputs, outputs, kernel=1, stride=1, groups=1):
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, 1, groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.Hardtanh(0.0, 6.0))

    def forward(self, x):
        for index, feature in enumerate(self.features):
            x = feature(x) + x if index in self.shortcuts else feature(x)
        return self.classifier["1"](F.dropout(x.mean((2, 3)), self.dropout, self.training))


class M5(nn.Module):
    def __init__(self, n_input=1, n_output=35, stride=16, n_channel=32):
        super().__init__()
        widths = [n_input, n_channel, n_channel, 2 * n_channel, 2 * n_channel]
        for number in range(1, 5):
            kernel, step = (80, stride) if number == 1 else (3, 1)
            self.add_module(f"conv{number}", nn.Conv1d(widths[number - 1], widths[number], kernel, step))
            self.add_module(f"bn{number}", nn.BatchNorm1d(widths[number]))
        self.fc1 = nn.Linear(widths[-1], n_output)

    def forward(self, x):
        for number in range(1, 5):
            x = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(x))
            x = max_pool1d(relu(x), 4)
        return self.fc1(x.mean(2))


class WaveNet(nn.Module):
    def __init__(
        self, dilations, kernel_size, dilation_channels, residual_channels, skip_channels, end_channels, classes, bias
    ):
        super().__init__()
        self.dilations = dilations
        self.start_conv = nn.Conv1d(classes, residual_channels, 1, bias=bias)
        for name, inputs, outputs, kernel in (
            ("filter", residual_channels, dilation_channels, kernel_size),
            ("gate", residual_channels, dilation_channels, kernel_size),
            ("residual", dilation_channels, residual_channels, 1),
            ("skip", dilation_channels, skip_channels, 1),
        ):
            convs = [nn.Conv1d(inputs, outputs, kernel, bias=bias) for _ in dilations]
            self.add_module(f"{name}_convs", nn.ModuleList(convs))
        self.end_conv_1 = nn.Conv1d(skip_channels, end_channels, 1)
        self.end_conv_2 = nn.Conv1d(end_channels, classes, 1)

    @staticmethod
    def causal(x, conv, dilation):
        """The dilated convolution as what it is: a sum over taps of the signal shifted to the right."""
        taps, length = conv.kernel_size[0], x.shape[2]
        total = 0 if conv.bias is None else conv.bias[:, None]
        for tap in range(taps):
            shift = (taps - 1 - tap) * dilation
            total = total + conv.weight[:, :, tap] @ F.pad(x, (shift, 0))[:, :, :length]
        return total

    def forward(self, x):
        x, total = self.start_conv(x), 0
        for index, dilation in enumerate(self.dilations):
            gate = torch.sigmoid(self.causal(x, self.gate_convs[index], dilation))
            z = torch.tanh(self.causal(x, self.filter_convs[index], dilation)) * gate
            total = total + self.skip_convs[index](z)
            x = x + self.residual_convs[index](z)
        return self.end_conv_2(relu(self.end_conv_1(relu(total))))
