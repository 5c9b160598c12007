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
:func:`gpt2`, :class:`GPT`, tokens                              ``(N, L)``                  ``(N, L, vocab_size)``
:func:`bert_base`, :class:`Bert`, tokens                        ``(N, L)``                  :class:`BertOutput`
:class:`Seq2SeqTransformer`, tokens of two sequences            ``(N, S)`` and ``(N, T)``   ``(N, T, vocabulary)``
:func:`vit_b_16`                                                ``(N, 3, 224, 224)``        ``(N, num_classes)``
==============================================================  ==========================  =====================

Outputs are logits, :class:`Bert`'s hidden states. Every model starts from random weights; ``load_state_dict`` takes
those of the standard implementation, and :func:`fastnn.revert` makes a model of ``torch.nn`` layers of it.
"""

from .alexnet import AlexNet, alexnet
from .bert import Bert, BertOutput, bert_base
from .gpt import GPT, KVCache, gpt2, gpt2_state
from .lenet import LeNet5
from .m5 import M5
from .mobilenetv2 import InvertedResidual, MobileNetV2, mobilenet_v2
from .resnet import BasicBlock, Bottleneck, ResNet, resnet18, resnet34, resnet50
from .sampling import probabilities
from .seq2seq import Seq2SeqTransformer
from .vit import ConvStemConfig, VisionTransformer, vit_b_16
from .wavenet import WaveNet

__all__ = [
    "GPT",
    "M5",
    "AlexNet",
    "BasicBlock",
    "Bert",
    "BertOutput",
    "Bottleneck",
    "ConvStemConfig",
    "InvertedResidual",
    "KVCache",
    "LeNet5",
    "MobileNetV2",
    "ResNet",
    "Seq2SeqTransformer",
    "VisionTransformer",
    "WaveNet",
    "alexnet",
    "bert_base",
    "gpt2",
    "gpt2_state",
    "mobilenet_v2",
    "probabilities",
    "resnet18",
    "resnet34",
    "resnet50",
    "vit_b_16",
]
