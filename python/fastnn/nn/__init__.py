"""Drop-in layers: each one is a subclass of the ``torch.nn`` class of the same name.

Constructor, parameters, ``state_dict`` and ``repr`` are torch's; only ``forward`` differs: it calls
:mod:`fastnn.functional`. ``isinstance(layer, torch.nn.Linear)`` stays true, so that code which looks for torch's
classes goes on working.

:class:`MLP` is a whole block, a :class:`torch.nn.Sequential` of linear and activation layers which runs each pair as
one fused call.
"""

from . import cross_entropy as _losses
from .activation import GELU, ReLU, ReLU6, Sigmoid, SiLU, Tanh
from .attention import MultiheadAttention
from .batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from .cross_entropy import CrossEntropyLoss
from .dot_product_attention import DotProductAttention
from .dropout import Dropout
from .embedding import Embedding
from .group_norm import GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from .layer_norm import LayerNorm, RMSNorm
from .linear import Bilinear, Linear, NonDynamicallyQuantizableLinear
from .mlp import MLP
from .pooling import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AdaptiveMaxPool3d,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
)
from .softmax import LogSoftmax, Softmax, Softmax2d, Softmin
from .transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "GELU",
    "MLP",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Bilinear",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "CrossEntropyLoss",
    "DotProductAttention",
    "Dropout",
    "Embedding",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "Linear",
    "LogSoftmax",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MultiheadAttention",
    "NonDynamicallyQuantizableLinear",
    "RMSNorm",
    "ReLU",
    "ReLU6",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softmax2d",
    "Softmin",
    "Tanh",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]

if hasattr(_losses, "LinearCrossEntropyLoss"):
    LinearCrossEntropyLoss = _losses.LinearCrossEntropyLoss
    __all__ += ["LinearCrossEntropyLoss"]
