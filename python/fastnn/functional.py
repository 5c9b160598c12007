"""``torch.nn.functional`` and the matrix products of ``torch``, to the parameter name, on the kernels of this package."""

from .ops.activation import gelu, relu, sigmoid, silu, tanh
from .ops.batch_norm import batch_norm, batch_norm_act
from .ops.gemm import addmm, baddbmm, bilinear, bmm, int_mm, matmul, mm, mv
from .ops.linear import linear, linear_act

# The very functions of ops, not wrappers: a Python call more would be felt in small layers.
__all__ = [
    "addmm",
    "baddbmm",
    "batch_norm",
    "batch_norm_act",
    "bilinear",
    "bmm",
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
