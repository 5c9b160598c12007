"""The kernels of this package on CPU tensors: what they can run, and how they are called.

The functions here take plain, dense CPU tensors whose shapes the ops have checked. They know nothing of autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _openmp, _state
from .._matmul import MAX_DIMS, multiply, multiply_batches, product_shape, rows_of  # noqa: F401 - ops read some of these
from .._tensors import contiguous, image_strides
from ..codes import ACTIVATION, DTYPE, FLOAT, HALF, OPERAND, PRECISION, SAVES_OUTPUT, get_precision, precision  # noqa: F401 - here

# After torch: the extension finds its OpenMP symbols in torch's own runtime.
_openmp.make_global()

from ... import _cpu  # noqa: E402

#: Ops that take what was quantized, in integers or floats of eight bits.
OF_QUANTIZED = frozenset(("dequantize", "scaled_mm"))

#: Fresh memory costs more than the work: outputs above this come from the caching allocator.
LARGE_BYTES = 1 << 20

# Bound once: an attribute lookup in a module costs 30 ns, and the short ways make dozens.
_from_dlpack = torch.from_dlpack


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Contiguous uninitialised memory; large blocks come from the caching host allocator."""
    bytes = math.prod(shape) * dtype.itemsize
    if bytes >= 2**63:
        raise MemoryError(f"fastnn: cannot allocate {bytes} bytes for a result")
    if bytes > LARGE_BYTES:
        return _from_dlpack(_Capsule(_cpu.empty_dlpack(tuple(shape), DTYPE[dtype])))
    return torch.empty_strided(shape, contiguous(shape), dtype=dtype)


class _Capsule:
    """What torch.from_dlpack asks for: an object that hands over its capsule."""

    __slots__ = ("capsule",)

    def __init__(self, capsule: Any) -> None:
        self.capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


# The shortest way of small calls: C reads the tensors itself, through the table that DLPack defines for it and torch has
# since 2.10, and asks what _route.py asks. What these functions do not take they answer with None, and without the table
# that is everything. Where a gradient is wanted, the result comes in a tuple, for an autograd.Function to make it part of
# the graph.
tensor_product = _cpu.tensor_product
tensor_linear_gradients = _cpu.tensor_linear_gradients
tensor_activation = _cpu.tensor_activation
tensor_activation_backward = _cpu.tensor_activation_backward
tensor_convolution = _cpu.tensor_convolution
tensor_convolution_gradients = _cpu.tensor_convolution_gradients
tensor_inverted_residual = _cpu.tensor_inverted_residual
tensor_attention = _cpu.tensor_attention
tensor_attention_backward = _cpu.tensor_attention_backward
tensor_batch_norm = _cpu.tensor_batch_norm
tensor_batch_norm_backward = _cpu.tensor_batch_norm_backward
tensor_dropout = _cpu.tensor_dropout
tensor_embedding = _cpu.tensor_embedding
tensor_embedding_backward = _cpu.tensor_embedding_backward
tensor_rotary = _cpu.tensor_rotary
tensor_group_norm = _cpu.tensor_group_norm
tensor_int8_linear = _cpu.tensor_int8_linear
tensor_group_norm_backward = _cpu.tensor_group_norm_backward
tensor_row_norm = _cpu.tensor_row_norm
tensor_row_norm_backward = _cpu.tensor_row_norm_backward
tensor_pool = _cpu.tensor_pool
tensor_pool_backward = _cpu.tensor_pool_backward
tensor_cross_entropy = _cpu.tensor_cross_entropy
tensor_cross_entropy_backward = _cpu.tensor_cross_entropy_backward
tensor_softmax = _cpu.tensor_softmax
tensor_softmax_backward = _cpu.tensor_softmax_backward
tensor_weight_only = _cpu.tensor_weight_only
#: What tensor_product computes.
MATMUL, LINEAR, MM, BMM = range(4)
#: Whether there is such a table.
has_table: bool = hasattr(Tensor, "__dlpack_c_exchange_api__")
if has_table:
    has_table = _cpu.use_torch(
        Tensor.__dlpack_c_exchange_api__,
        Tensor,
        torch.nn.Parameter,
        {
            "plain_settings": _state.PLAIN,
            "settings": _state.settings,
            "forward_ad": torch.autograd.forward_ad,
            "dispatch_modes": torch._C._len_torch_dispatch_stack,
            "functorch_active": torch._C._are_functorch_transforms_active,
            "tracing_state": torch._C._get_tracing_state,
            "autocast_enabled": torch._C._is_any_autocast_enabled,
            "grad_enabled": torch.is_grad_enabled,
            "precision": get_precision,
            "is_neg": Tensor.is_neg,
            "is_inference": Tensor.is_inference,
            "increment_version": torch._C._increment_version,
            "float64": torch.float64,
            "uint8": torch.uint8,
            "int32": torch.int32,
            "empty": empty,
        },
    )


def why_not() -> None:
    """These kernels can run on any machine."""


def supports(op: str, *tensors: Tensor | None) -> str | None:
    """None when the kernels can run ``op`` on these tensors, else the reason why not, for people.

    ``op`` is "gemm" (and all that is made of it), "activation", "int_mm", "attention", whose masks are booleans, or one of
    OF_QUANTIZED, which checks its tensors' dtypes itself.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.layout is not torch.strided:
            return f"a tensor of layout {str(tensor.layout).removeprefix('torch.')}"
        if tensor.is_nested:
            return "a nested tensor"
        # Meta tensors have no data; ops gives them to the fake kernel, which has the same limits.
        if tensor.device.type not in ("cpu", "meta"):
            return f"a tensor on {tensor.device.type}, for which no backend is built"
        table = DTYPE if op == "int_mm" else FLOAT
        if op in OF_QUANTIZED or (op == "attention" and tensor.dtype is torch.bool):
            continue
        if tensor.dtype not in table:
            return f"dtype {str(tensor.dtype).removeprefix('torch.')}"
    return None


def empty_strided(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory without gaps, of any order of dimensions. No view: autograd refuses to change those in place
    where a Function of one's own has made them."""
    size = math.prod(shape) * dtype.itemsize
    if size <= LARGE_BYTES:
        return torch.empty_strided(shape, strides, dtype=dtype)
    return torch.empty(0, dtype=dtype).set_(empty((size,), torch.uint8).untyped_storage(), 0, shape, strides)


def empty_channels(shape: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Uninitialised memory for (N, C, *spatial), contiguous or channels-last."""
    return empty_strided(shape, image_strides(shape, channels_last), dtype)


def empty_image(like: Tensor, shape: Sequence[int], channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """What the short ways ask for where a result is large."""
    return empty_channels(shape, dtype or like.dtype, channels_last)


def empty_like(x: Tensor) -> Tensor:
    """torch.empty_like(x), with its strides."""
    if x.numel() * x.element_size() <= LARGE_BYTES:
        return torch.empty_like(x)
    if x.is_contiguous():
        return empty(x.shape, x.dtype)
    strides = torch.empty_like(x, device="meta").stride()
    return empty_strided(x.shape, strides, x.dtype)


def gemm(a: Tensor, b: Tensor, c: Tensor, *, packed: Any = None, **epilogue: Any) -> None:
    """See _matmul.gemm."""
    if packed is not None:
        epilogue["packed"] = packed
    multiply(_cpu.gemm, a, b, c, batch_invariant=_state.settings().batch_invariant, **epilogue)


def product(
    a: Tensor,
    b: Tensor,
    out: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    **epilogue: Any,
) -> Tensor:
    """alpha * (a @ b) + beta * residual, for two matrices or batches of them; batch dimensions broadcast.

    Writes to ``out``, of any strides, or to fresh contiguous memory of type ``dtype``. ``residual`` broadcasts to the
    result. ``out`` may be ``residual`` and must not share memory with ``a`` or ``b``.
    """
    shape = product_shape(a, b)
    if out is None:
        out = empty(shape, dtype or a.dtype)
    multiply_batches(gemm, a, b, out, **epilogue)
    return out


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", packed: Any = None) -> Tensor:
    """activation(input @ weight.T + bias): input (..., K), weight (N, K), bias (N,); the result is contiguous.

    ``packed``, from :func:`pack_weight`, takes the place of the weight's data.
    """
    n, k = weight.shape
    out = empty((*input.shape[:-1], n), input.dtype)
    x = input if input.dim() == 2 else rows_of(input)
    if x is None:
        return product(input, weight.t(), out, bias=bias, activation=activation, packed=packed)
    m = x.shape[0]
    x_row, x_inner = x.stride()
    w_row, w_inner = weight.stride()
    if packed is None and x_inner == 1 and w_inner == 1 and (bias is None or n < 2 or bias.stride(0) == 1):
        _cpu.linear(
            x.data_ptr(),
            m,
            k,
            x_row,
            weight.data_ptr(),
            n,
            w_row,
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            n,
            DTYPE[x.dtype],
            precision(x.dtype),
            ACTIVATION[activation],
            _state.settings().batch_invariant,
        )
    else:
        gemm(x, weight.t(), out.view(m, n), bias=bias, activation=activation, packed=packed)
    return out


def pack_weight(weight: Tensor) -> Any:
    """A weight (N, K) of linear, laid out as the kernel reads it. It does not follow later changes of the weight."""
    b = weight.detach().t()
    return _cpu.pack(b.data_ptr(), b.shape, b.stride(), DTYPE[b.dtype], precision(b.dtype))


def column_sum(x: Tensor) -> Tensor:
    """The sum over all dimensions but the last, added up in float32 or float64."""
    rows = rows_of(x)
    if rows is None:
        rows = x.reshape(-1, x.shape[-1])
    out = torch.empty_strided((rows.shape[1],), (1,), dtype=x.dtype)
    _cpu.column_sum(
        rows.data_ptr(), rows.shape[0], rows.shape[1], rows.stride(0), rows.stride(1), DTYPE[x.dtype], out.data_ptr()
    )
    return out


def activation(kind: str, x: Tensor, out: Tensor | None = None) -> Tensor:
    """Elementwise; ``out`` may be ``x``."""
    if out is None:
        out = empty_like(x)
    if x.numel():
        _cpu.activation(
            ACTIVATION[kind], x.data_ptr(), out.data_ptr(), x.shape, x.stride(), out.stride(), DTYPE[x.dtype]
        )
    return out


def activation_backward(kind: str, grad: Tensor, saved: Tensor, out: Tensor | None = None) -> Tensor:
    """grad times the derivative; ``saved`` is the output for the kinds in SAVES_OUTPUT, else the input."""
    if out is None:
        out = empty_like(saved)
    if saved.numel():
        _cpu.activation_backward(
            ACTIVATION[kind],
            grad.data_ptr(),
            saved.data_ptr(),
            out.data_ptr(),
            saved.shape,
            grad.stride(),
            saved.stride(),
            out.stride(),
            DTYPE[saved.dtype],
        )
    return out


def int_mm(
    a: Tensor,
    b: Tensor,
    dtype: torch.dtype,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    return product(a, b, dtype=dtype, row_scale=row_scale, col_scale=col_scale, bias=bias)


# ---- what the extension says of itself ---------------------------------------------------------------------------

isa = _cpu.isa
available_isas = _cpu.available_isas
set_isa = _cpu.set_isa
cpu_features = _cpu.cpu_features
counters = _cpu.counters
reset_counters = _cpu.reset_counters
max_threads = _cpu.max_threads
peak_flops = _cpu.peak_flops
empty_cache = _cpu.empty_cache
allocator_stats = _cpu.allocator_stats
set_cache_limit = _cpu.set_cache_limit


def gemm_path(dtype: torch.dtype, out_dtype: torch.dtype | None = None) -> str:
    """The name of the kernel that multiplies matrices of this dtype, under the present float32 precision."""
    if out_dtype is None:
        out_dtype = dtype if dtype in FLOAT else torch.int32
    return _cpu.gemm_path(OPERAND[dtype], DTYPE[out_dtype], precision(dtype))
