"""Full models made of fastnn's layers, under the names, arguments and ``state_dict`` keys of the standard implementations.

==============================================================  ==========================  =====================
model                                                           input                       output
==============================================================  ==========================  =====================
:class:`LeNet5`                                                 ``(N, 1, 32, 32)``          ``(N, num_classes)``
:func:`alexnet`                                                 ``(N, 3, 224, 224)``        ``(N, num_classes)``
:func:`resnet18`, :func:`resnet34`, :func:`resnet50`            ``(N, 3, 224, 224)``        ``(N, num_classes)``
:func:`mobilenet_v2`                                            ``(N, 3, 224, 224)``        ``(N, num_classes)``
:class:`M5`, raw sound                                          ``(N, 1, L)``               ``(N, n_output)``
:class:`WaveNet`, one-hot samples                               ``(N, classes, L)``         ``(N, classes, L)``
==============================================================  ==========================  =====================

Outputs are logits. Every model starts from random weights; ``load_state_dict`` takes those of the standard
implementation, and :func:`fastnn.revert` makes a model of ``torch.nn`` layers of it.
"""

from .alexnet import AlexNet, alexnet
from .lenet import LeNet5
from .m5 import M5
from .mobilenetv2 import InvertedResidual, MobileNetV2, mobilenet_v2
from .resnet import BasicBlock, Bottleneck, ResNet, resnet18, resnet34, resnet50
from .wavenet import WaveNet

__all__ = [
    "M5",
    "AlexNet",
    "BasicBlock",
    "Bottleneck",
    "InvertedResidual",
    "LeNet5",
    "MobileNetV2",
    "ResNet",
    "WaveNet",
    "alexnet",
    "mobilenet_v2",
    "resnet18",
    "resnet34",
    "resnet50",
]
