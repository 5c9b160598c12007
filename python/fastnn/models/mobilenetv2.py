"""MobileNetV2: inverted residual blocks around depthwise convolutions.

Source: Sandler, Howard, Zhu, Zhmoginov, Chen 2018, "MobileNetV2: Inverted residuals and linear bottlenecks",
arXiv:1801.04381, table 2. Constructor, ``state_dict`` keys (``features.0.0.weight``, ``features.1.conv.0.0.weight``,
``features.18.0.weight``, ``classifier.1.weight``, ...) and initialisation are torchvision's. With 1,000 classes it has
3,504,872 parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import nn

Norm = Callable[[int], torch.nn.Module]

#: Table 2: the expansion of each block, its output channels, how many blocks, the stride of the first.
_SETTING = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(torch.nn.Module):
    """1×1 convolution to ``expand_ratio`` times the channels, depthwise 3×3, 1×1 back without an activation.

    Shapes: input ``(N, inp, H, W)``, output ``(N, oup, H/stride, W/stride)``, rounded up. The input is added where it has
    the output's shape. With ``expand_ratio=1`` there is no first convolution.

    Raises:
        ValueError: ``stride`` is neither 1 nor 2.
    """

    def __init__(self, inp: int, oup: int, stride: int, expand_ratio: int, norm_layer: Norm | None = None) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"InvertedResidual: stride must be 1 or 2, got {stride}")
        norm = norm_layer or nn.BatchNorm2d
        hidden = round(inp * expand_ratio)
        self.stride = stride
        self.use_res_connect = stride == 1 and inp == oup
        self.conv = torch.nn.Sequential()
        if expand_ratio != 1:
            self.conv.append(_conv_norm_relu6(inp, hidden, 1, norm_layer=norm))
        self.conv.append(_conv_norm_relu6(hidden, hidden, 3, stride=stride, groups=hidden, norm_layer=norm))
        self.conv.append(nn.Conv2d(hidden, oup, kernel_size=1, bias=False))
        self.conv.append(norm(oup))

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


class MobileNetV2(torch.nn.Module):
    """A 3×3 convolution, 17 inverted residual blocks, a 1×1 convolution, the mean over each map, a linear layer.

    Shapes: input ``(N, 3, H, W)``, output ``(N, num_classes)``, logits. The last maps have 1/32 of H and W.

    Args:
        num_classes: how many logits come out.
        width_mult: multiplies the channels of every layer; the last convolution has never less than 1,280.
        inverted_residual_setting: rows ``(expansion, channels, blocks, stride of the first)``; those of the paper by
            default.
        round_nearest: channels are rounded to a multiple of this.
        block: makes a block from ``(inp, oup, stride, expand_ratio, norm_layer)``; :class:`InvertedResidual` by default.
        norm_layer: makes the norm for a number of channels; batch norm by default.
        dropout: probability with which a feature is dropped before the linear layer.

    Raises:
        ValueError: ``inverted_residual_setting`` is empty or its rows have not four elements.

    Example::

        model = fastnn.models.mobilenet_v2(width_mult=0.5)
        logits = model(torch.randn(2, 3, 224, 224))  # (2, 1000)
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        inverted_residual_setting: Sequence[Sequence[int]] | None = None,
        round_nearest: int = 8,
        block: Callable[..., torch.nn.Module] | None = None,
        norm_layer: Norm | None = None,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        block = block or InvertedResidual
        norm = norm_layer or nn.BatchNorm2d
        setting = _SETTING if inverted_residual_setting is None else inverted_residual_setting
        if len(setting) == 0 or any(len(row) != 4 for row in setting):
            raise ValueError(
                f"MobileNetV2: inverted_residual_setting must be a non-empty list of rows of 4, got {setting!r}"
            )
        channels = _round_channels(32 * width_mult, round_nearest)
        self.last_channel = _round_channels(1280 * max(1.0, width_mult), round_nearest)
        self.features = torch.nn.Sequential(_conv_norm_relu6(3, channels, 3, stride=2, norm_layer=norm))
        for expansion, width, blocks, stride in setting:
            output = _round_channels(width * width_mult, round_nearest)
            for number in range(blocks):
                self.features.append(block(channels, output, stride if number == 0 else 1, expansion, norm_layer=norm))
                channels = output
        self.features.append(_conv_norm_relu6(channels, self.last_channel, 1, norm_layer=norm))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.classifier = torch.nn.Sequential(nn.Dropout(dropout), nn.Linear(self.last_channel, num_classes))

        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    torch.nn.init.zeros_(module.bias)
            elif isinstance(module, (torch.nn.BatchNorm2d, torch.nn.GroupNorm)):
                torch.nn.init.ones_(module.weight)
                torch.nn.init.zeros_(module.bias)
            elif isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, 0, 0.01)
                torch.nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


def mobilenet_v2(**kwargs: Any) -> MobileNetV2:
    """A :class:`MobileNetV2` with random weights; the arguments are the class's."""
    return MobileNetV2(**kwargs)


def _conv_norm_relu6(
    inputs: int, outputs: int, kernel_size: int, *, norm_layer: Norm, stride: int = 1, groups: int = 1
) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False),
        norm_layer(outputs),
        nn.ReLU6(inplace=True),
    )


def _round_channels(channels: float, multiple: int) -> int:
    """The nearest multiple, at least one; the next one where that would take more than a tenth away."""
    rounded = max(multiple, int(channels + multiple / 2) // multiple * multiple)
    return rounded if rounded >= 0.9 * channels else rounded + multiple
