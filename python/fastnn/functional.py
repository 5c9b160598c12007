"""``torch.nn.functional`` and the matrix products of ``torch``, to the parameter name, on the kernels of this package."""

from .ops.activation import gelu, relu, relu6, sigmoid, silu, tanh
from .ops.attention import attention, scaled_dot_product_attention
from .ops.batch_norm import batch_norm, batch_norm_act
from .ops.conv import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d
from .ops.cross_entropy import cross_entropy
from .ops.dropout import dropout
from .ops.embedding import embedding
from .ops.fake_quantize import (
    fake_quantize,
    fake_quantize_per_channel_affine,
    fake_quantize_per_tensor_affine,
)
from .ops.gemm import addmm, baddbmm, bilinear, bmm, int_mm, matmul, mm, mv
from .ops.group_norm import group_norm, instance_norm
from .ops.int8_conv import int8_conv1d, int8_conv2d, int8_conv3d
from .ops.int8_linear import int8_linear, pack_int8_weight
from .ops.layer_norm import layer_norm, rms_norm
from .ops.linear import linear, linear_act
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.multi_head_attention import multi_head_attention_forward
from .ops.pool import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    max_pool1d,
    max_pool2d,
    max_pool3d,
)
from .ops.quantize import choose_scale, dequantize, quantize, quantize_dynamic
from .ops.rotary import rotary_embedding
from .ops.scaled_mm import scaled_mm
from .ops.softmax import log_softmax, softmax, softmin
from .ops.weight_only_linear import weight_only_linear

# The very functions of ops, not wrappers: a Python call more would be felt in small layers.
__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "addmm",
    "attention",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "baddbmm",
    "batch_norm",
    "batch_norm_act",
    "bilinear",
    "bmm",
    "choose_scale",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "cross_entropy",
    "dequantize",
    "dropout",
    "embedding",
    "fake_quantize",
    "fake_quantize_per_channel_affine",
    "fake_quantize_per_tensor_affine",
    "gelu",
    "group_norm",
    "instance_norm",
    "int8_conv1d",
    "int8_conv2d",
    "int8_conv3d",
    "int8_linear",
    "int_mm",
    "layer_norm",
    "linear",
    "linear_act",
    "linear_cross_entropy",
    "log_softmax",
    "matmul",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "mm",
    "multi_head_attention_forward",
    "mv",
    "pack_int8_weight",
    "quantize",
    "quantize_dynamic",
    "relu",
    "relu6",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "scaled_mm",
    "sigmoid",
    "silu",
    "softmax",
    "softmin",
    "tanh",
    "weight_only_linear",
]
