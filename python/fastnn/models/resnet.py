"""ResNet-18, -34 and -50.

Source: He, Zhang, Ren, Sun 2015, "Deep residual learning for image recognition", arXiv:1512.03385, table 1; in the
bottleneck block it is the 3×3 convolution that strides, as in torchvision and in the paper's later releases. Constructors,
``state_dict`` keys (``layer1.0.conv1.weight``, ``layer2.0.downsample.0.weight``, ``fc.bias``, ...) and initialisation are
torchvision's. With 1,000 classes they have 11,689,512, 21,797,672 and 25,557,032 parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import nn

Norm = Callable[[int], torch.nn.Module]


class BasicBlock(torch.nn.Module):
    """``relu(x + bn(conv3x3(relu(bn(conv3x3(x))))))``, the block of ResNet-18 and -34.

    Shapes: input ``(N, inplanes, H, W)``, output ``(N, planes, H/stride, W/stride)``, rounded up. ``downsample`` is what
    brings the input to the output's shape where the two differ.

    Raises:
        ValueError: ``groups`` or ``base_width`` is other than 1 and 64.
        NotImplementedError: ``dilation`` is other than 1. The paper and torchvision know it for bottlenecks alone.
    """

    #: Channels of the output for each of `planes`.
    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: torch.nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError(
                f"BasicBlock: groups must be 1 and base_width 64, got groups={groups}, base_width={base_width}"
            )
        if dilation != 1:
            raise NotImplementedError(f"BasicBlock: dilation must be 1, got {dilation}")
        norm = norm_layer or nn.BatchNorm2d
        self.conv1 = nn.Conv2d(inplanes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, padding=1, bias=False)
        self.bn2 = norm(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out += identity
        return self.relu(out)


class Bottleneck(torch.nn.Module):
    """Convolutions of 1×1, 3×3 and 1×1 around the shortcut, the block of ResNet-50.

    Shapes: input ``(N, inplanes, H, W)``, output ``(N, 4 planes, H/stride, W/stride)``, rounded up. Between the two
    convolutions of 1×1 there are ``planes * base_width / 64 * groups`` channels.
    """

    #: Channels of the output for each of `planes`.
    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: torch.nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
    ) -> None:
        super().__init__()
        norm = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64)) * groups
        self.conv1 = nn.Conv2d(inplanes, width, kernel_size=1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(
            width, width, kernel_size=3, stride=stride, padding=dilation, dilation=dilation, groups=groups, bias=False
        )
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, kernel_size=1, bias=False)
        self.bn3 = norm(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)
        out = self.conv3(out)
        out = self.bn3(out)
        out += identity
        return self.relu(out)


class ResNet(torch.nn.Module):
    """A 7×7 convolution and max pooling, four stages of residual blocks, the mean over each map, a linear layer.

    Shapes: input ``(N, 3, H, W)``, output ``(N, num_classes)``, logits. The stages work on 1/4, 1/8, 1/16 and 1/32 of H
    and W.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`, or a class with their constructor and ``expansion``.
        layers: how many blocks each of the four stages has.
        num_classes: how many logits come out.
        zero_init_residual: start the last norm of each block at zero, so that every block starts as the identity (Goyal
            et al. 2017, arXiv:1706.02677).
        groups, width_per_group: of the 3×3 convolutions of bottlenecks (ResNeXt, Wide ResNet).
        replace_stride_with_dilation: for each of the stages 2 to 4, whether it keeps the resolution and dilates its
            convolutions instead, as segmentation models want.
        norm_layer: makes the norm for a number of channels; batch norm by default.

    Raises:
        ValueError: ``replace_stride_with_dilation`` has not three elements, or the block refuses its arguments.

    Example::

        model = fastnn.models.resnet18(num_classes=10)
        logits = model(torch.randn(2, 3, 224, 224))  # (2, 10)
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Norm | None = None,
    ) -> None:
        super().__init__()
        dilate = (False, False, False) if replace_stride_with_dilation is None else replace_stride_with_dilation
        if len(dilate) != 3:
            raise ValueError(f"ResNet: replace_stride_with_dilation must be None or have 3 elements, got {dilate!r}")
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.groups = groups
        self.base_width = width_per_group
        # Both grow from stage to stage while the stages are made.
        self.inplanes = 64
        self.dilation = 1

        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2, dilate=dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2, dilate=dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2, dilate=dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)

        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (torch.nn.BatchNorm2d, torch.nn.GroupNorm)):
                torch.nn.init.ones_(module.weight)
                torch.nn.init.zeros_(module.bias)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, Bottleneck):
                    torch.nn.init.zeros_(module.bn3.weight)
                elif isinstance(module, BasicBlock):
                    torch.nn.init.zeros_(module.bn2.weight)

    def _make_layer(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> torch.nn.Sequential:
        """One stage. Its first block alone strides, and still has the dilation of the stage before it."""
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        downsample = None
        if stride != 1 or self.inplanes != planes * block.expansion:
            downsample = torch.nn.Sequential(
                nn.Conv2d(self.inplanes, planes * block.expansion, kernel_size=1, stride=stride, bias=False),
                self._norm_layer(planes * block.expansion),
            )
        stage = torch.nn.Sequential()
        for number in range(blocks):
            first = number == 0
            stage.append(
                block(
                    self.inplanes,
                    planes,
                    stride if first else 1,
                    downsample if first else None,
                    self.groups,
                    self.base_width,
                    first_dilation if first else self.dilation,
                    self._norm_layer,
                )
            )
            self.inplanes = planes * block.expansion
        return stage

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


def resnet18(**kwargs: Any) -> ResNet:
    """ResNet-18 with random weights: stages of 2, 2, 2, 2 basic blocks; the other arguments are :class:`ResNet`'s."""
    return ResNet(BasicBlock, [2, 2, 2, 2], **kwargs)


def resnet34(**kwargs: Any) -> ResNet:
    """ResNet-34 with random weights: stages of 3, 4, 6, 3 basic blocks; the other arguments are :class:`ResNet`'s."""
    return ResNet(BasicBlock, [3, 4, 6, 3], **kwargs)


def resnet50(**kwargs: Any) -> ResNet:
    """ResNet-50 with random weights: stages of 3, 4, 6, 3 bottlenecks; the other arguments are :class:`ResNet`'s."""
    return ResNet(Bottleneck, [3, 4, 6, 3], **kwargs)
