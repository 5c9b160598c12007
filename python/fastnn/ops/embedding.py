"""Embedding: rows of a table by number.

Formula: out[i...] = weight[input[i...]]. input int64 or int32 of any shape, weight (V, D) in float32, float64, bfloat16 or
float16, both of any strides; out (*input.shape, D), contiguous.

The gradient of weight is dense: row r is the sum of the gradients at all places of input that hold r, in their order, in
float32 (float64 for float64) and chains of 64, rounded once; the same bits for any number of threads. It is their mean
with ``scale_grad_by_freq``, and zero for the row ``padding_idx``. ``max_norm`` changes weight in place first, by torch's own
torch.embedding_renorm_, as torch does; with ``sparse`` and a gradient to come the call is torch's.

IndexError for an index outside of 0 to V - 1, before anything is read, on a CPU; on a GPU, where nobody waits to know them,
an assertion of the device, as torch's; RuntimeError for a weight that is no matrix or an
input of another dtype; AssertionError for a padding_idx that there is no row for; TypeError for what is no tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import Function

from ..backends import Kernels, cpu
from ..backends.cpu import embedding as on_cpu
from ..backends.reference import embedding as formulas
from ._op import Op
from ._route import (
    EAGER,
    LIBRARY,
    PLAIN,
    Unsupported,
    describe,
    fall_back,
    is_compiling,
    is_dynamo_compiling,
    route,
    wants_grad,
)

_torch_embedding = torch.nn.functional.embedding
_tensor_embedding = cpu.tensor_embedding
_tensor_embedding_backward = cpu.tensor_embedding_backward
_empty = on_cpu.empty_rows
_empty_gradient = on_cpu.empty_gradient
kernels = Kernels("embedding")

#: The kernel of the gradient sorts pairs of 32-bit numbers.
_MOST = (1 << 32) - 1


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """As :func:`torch.nn.functional.embedding`. See this module for shapes, dtypes and errors."""
    if max_norm is None and not sparse and not is_dynamo_compiling():
        # The gradient's arguments are looked at where there is one; wrong ones take the long way.
        plain = padding_idx is None and scale_grad_by_freq is False
        if plain or (type(padding_idx) in _INDEX and _is_row(padding_idx, weight) and type(scale_grad_by_freq) is bool):
            found = _tensor_embedding(_empty, input, weight)
            if type(found) is tuple:
                return _apply_embedding(weight, input, _row(padding_idx, weight), scale_grad_by_freq, found)
            if found is not None:
                return found
    everything = (input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    try:
        _check(*everything)
        if sparse and wants_grad(weight):
            raise Unsupported("sparse: a gradient that is sparse")
        where = route("embedding", weight)
        where = LIBRARY if where == EAGER and _is_traced(input) else where
        if max_norm is not None:
            input = input.contiguous()
            with torch.no_grad():
                torch.embedding_renorm_(weight.detach(), input, max_norm, norm_type)
        return EMBEDDING(weight, input, _row(padding_idx, weight), scale_grad_by_freq, where=where)
    except Unsupported as reason:
        return fall_back("embedding", reason.args[0], _torch_embedding, *everything)


_INDEX = (int, type(None))


def _is_row(padding_idx: int | None, weight: Any) -> bool:
    if padding_idx is None:
        return True
    return type(weight) in PLAIN and weight.dim() == 2 and -weight.shape[0] <= padding_idx < weight.shape[0]


def _row(padding_idx: int | None, weight: Tensor) -> int:
    """The padding's row, or -1."""
    if padding_idx is None:
        return -1
    return padding_idx if padding_idx >= 0 else padding_idx + weight.shape[0]


def _is_traced(input: Tensor) -> bool:
    kind = type(input)
    if kind in PLAIN:
        return False
    if issubclass(kind, (FakeTensor, FunctionalTensor)):
        return True
    if is_compiling():
        return False
    raise Unsupported(f"input: a tensor of type {kind.__name__}, which answers torch's functions itself")


def _check(
    input: Any,
    weight: Any,
    padding_idx: Any,
    max_norm: Any,
    norm_type: Any,
    scale_grad_by_freq: Any,
    sparse: Any,
) -> None:
    for name, value in (("input", input), ("weight", weight)):
        if not isinstance(value, Tensor):
            raise Unsupported(f"{name}: expected a Tensor, got {type(value).__name__}")
        if value.is_nested or value.layout is not torch.strided:
            raise Unsupported(f"{name}: expected a dense tensor, got {describe(name, value)}")
    if input.dtype not in (torch.int64, torch.int32):
        raise Unsupported(f"input: expected dtype int64 or int32, got {describe('input', input)}")
    if input.device != weight.device:
        raise Unsupported(f"input: expected the device of weight, {weight.device}, got {input.device}")
    if weight.dim() != 2:
        raise Unsupported(f"weight: expected (V, D), got {describe('weight', weight)}")
    if padding_idx is not None:
        if isinstance(padding_idx, bool) or not isinstance(padding_idx, int):
            raise Unsupported(f"padding_idx: expected an int, got {type(padding_idx).__name__}")
        if padding_idx and not -weight.shape[0] <= padding_idx < weight.shape[0]:
            raise Unsupported(f"padding_idx: expected a row of {describe('weight', weight)}, got {padding_idx}")
    for name, value in (("scale_grad_by_freq", scale_grad_by_freq), ("sparse", sparse)):
        if not isinstance(value, bool):
            raise Unsupported(f"{name}: expected a bool, got {type(value).__name__}")
    for name, value in (("max_norm", max_norm), ("norm_type", norm_type)):
        if value is not None and not isinstance(value, (int, float)):
            raise Unsupported(f"{name}: expected a float, got {type(value).__name__}")


# ---- derivatives -------------------------------------------------------------------------------------------------


def _gradient(grad: Tensor, indices: Tensor, rows: int, padding_idx: int, by_frequency: bool) -> Tensor:
    args = (grad, indices, rows, padding_idx, by_frequency)
    if not is_dynamo_compiling():
        found = _tensor_embedding_backward(_empty_gradient, *args)
        if found is not None:
            return found
    try:
        if not is_dynamo_compiling() and (rows > _MOST or indices.numel() > _MOST):
            raise Unsupported("more than 2^32 - 1 rows or indices")
        return EMBEDDING_BACKWARD(*args)
    except Unsupported as reason:
        return fall_back("embedding_backward", reason.args[0], formulas.embedding_backward, *args, dtype=_wide(grad))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


class _Embedding(Function):
    """What the short way has computed, ``found``, made part of the graph."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, indices: Tensor, padding_idx: int, by_frequency: bool, found: tuple[Tensor]
    ) -> Tensor:
        ctx.rows, ctx.padding_idx, ctx.by_frequency = weight.shape[0], padding_idx, by_frequency
        ctx.save_for_backward(indices)
        return found[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (indices,) = ctx.saved_tensors
        return _gradient(grad, indices, ctx.rows, ctx.padding_idx, ctx.by_frequency), None, None, None, None


# Function.apply asks for transforms, of which the short way knows that there are none.
_apply_embedding = super(Function, _Embedding).apply


def _save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> tuple[Tensor, ...]:
    weight, indices, ctx.padding_idx, ctx.by_frequency = args
    ctx.rows = weight.shape[0]
    return (indices,)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    return _gradient(grad, indices, ctx.rows, ctx.padding_idx, ctx.by_frequency), None, None, None


def _jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    (indices,) = ctx.saved_tensors
    return EMBEDDING(tangent, indices, ctx.padding_idx, ctx.by_frequency)


def _save_backward(ctx: Any, args: tuple[Any, ...], result: Tensor) -> tuple[Tensor, ...]:
    _, indices, ctx.rows, ctx.padding_idx, ctx.by_frequency = args
    return (indices,)


def _backward_twice(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The transpose of a sum of rows: each place gets its row of ``grad``, without the padding's, by its frequency."""
    (indices,) = ctx.saved_tensors
    if ctx.padding_idx >= 0:
        kept = torch.arange(ctx.rows, device=grad.device) != ctx.padding_idx
        grad = grad * kept.to(grad.dtype).unsqueeze(1)
    if ctx.by_frequency:
        grad = grad / formulas.counts(indices, ctx.rows).clamp(min=1).to(grad.dtype).unsqueeze(1)
    return EMBEDDING(grad, indices, -1, False), None, None, None, None


def _jvp_backward(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    (indices,) = ctx.saved_tensors
    return _gradient(tangent, indices, ctx.rows, ctx.padding_idx, ctx.by_frequency)


# ---- vmap --------------------------------------------------------------------------------------------------------


def _one_by_one(function: Any, info: Any, x: Tensor, dim: int | None, indices: Tensor, index_dim: int) -> Tensor:
    xs = [x] * info.batch_size if dim is None else x.unbind(dim)
    return torch.stack([function(a, b) for a, b in zip(xs, indices.unbind(index_dim), strict=True)])


def _vmap(
    info: Any, in_dims: tuple[Any, ...], weight: Tensor, indices: Tensor, padding_idx: int, by_frequency: bool
) -> tuple[Tensor, int]:
    dim, index_dim = in_dims[:2]
    if index_dim is None:
        # Tables beside each other are one table of longer rows.
        wide = weight.movedim(dim, 1)
        out = EMBEDDING(wide.flatten(1), indices, padding_idx, by_frequency)
        return out.unflatten(-1, wide.shape[1:]), indices.dim()
    return _one_by_one(
        lambda w, i: EMBEDDING(w, i, padding_idx, by_frequency), info, weight, dim, indices, index_dim
    ), 0


def _vmap_backward(
    info: Any,
    in_dims: tuple[Any, ...],
    grad: Tensor,
    indices: Tensor,
    rows: int,
    padding_idx: int,
    by_frequency: bool,
) -> tuple[Tensor, int]:
    dim, index_dim = in_dims[:2]
    rest = (rows, padding_idx, by_frequency)
    if index_dim is None:
        wide = grad.movedim(dim, -2)
        return EMBEDDING_BACKWARD(wide.flatten(-2), indices, *rest).unflatten(-1, wide.shape[-2:]), 1
    return _one_by_one(lambda g, i: EMBEDDING_BACKWARD(g, i, *rest), info, grad, dim, indices, index_dim), 0


# ---- the ops -----------------------------------------------------------------------------------------------------

EMBEDDING = Op(
    "embedding(Tensor weight, Tensor indices, SymInt padding_idx, bool scale_grad_by_freq) -> Tensor",
    kernel=kernels.embedding,
    reference=formulas.embedding,
    fake=lambda weight, indices, *_: weight.new_empty((*indices.shape, weight.shape[1])),
    save=_save,
    backward=_backward,
    vmap=_vmap,
    jvp=_jvp,
)

EMBEDDING_BACKWARD = Op(
    "embedding_backward(Tensor grad, Tensor indices, SymInt num_weights, SymInt padding_idx, bool "
    "scale_grad_by_freq) -> Tensor",
    kernel=kernels.embedding_backward,
    reference=formulas.embedding_backward,
    fake=lambda grad, indices, num_weights, *_: grad.new_empty((num_weights, grad.shape[-1])),
    save=_save_backward,
    backward=_backward_twice,
    vmap=_vmap_backward,
    jvp=_jvp_backward,
)
