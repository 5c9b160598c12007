"""``torch.nn.functional`` and the matrix products of ``torch``, to the parameter name, on the kernels of this package."""

from .ops.activation import gelu, relu, sigmoid, silu, tanh
from .ops.conv import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d
from .ops.gemm import addmm, baddbmm, bilinear, bmm, int_mm, matmul, mm, mv
from .ops.linear import linear, linear_act

# The very functions of ops, not wrappers: a Python call more would be felt in small layers.
__all__ = [
    "addmm",
    "baddbmm",
    "bilinear",
    "bmm",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "gelu",
    "int_mm",
    "linear",
    "linear_act",
    "matmul",
    "mm",
    "mv",
    "relu",
    "sigmoid",
    "silu",
    "tanh",
]
