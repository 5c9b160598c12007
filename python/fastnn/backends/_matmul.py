"""How the matrix product of an extension module is called: what its bindings have in common, on CPUs and GPUs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .codes import ACTIVATION, DTYPE, FLOAT8, OPERAND, precision

#: The most dimensions the kernel's loops take.
MAX_DIMS = 8


def multiply(
    function: Callable[..., None],
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    **options: Any,
) -> None:
    """c = activation(alpha * row_scale * col_scale * (a @ b) + bias + beta * residual), rounded once.

    ``a`` (..., M, K), ``b`` (..., K, N), ``c`` and ``residual`` (..., M, N), any strides, batch dimensions equal (expand
    them); ``bias`` (N,). ``function`` is the one of an extension module; ``options`` are its own.
    """
    dtype = a.dtype
    if residual is not None:
        options.update(beta=beta, residual_ptr=residual.data_ptr(), residual_strides=residual.stride())
    if bias is not None:
        options.update(bias_ptr=bias.data_ptr(), bias_axis=2, bias_stride=bias.stride(0))
        if dtype in FLOAT8:
            options["bias_dtype"] = DTYPE[bias.dtype]
    if activation is not None:
        options["activation"] = ACTIVATION[activation]
    if row_scale is not None:
        options["row_scale_ptr"] = row_scale.data_ptr()
    if col_scale is not None:
        options["col_scale_ptr"] = col_scale.data_ptr()
    function(
        a.data_ptr(),
        a.shape,
        a.stride(),
        OPERAND[dtype],
        b.data_ptr(),
        b.shape,
        b.stride(),
        OPERAND[b.dtype],
        c.data_ptr(),
        c.shape,
        c.stride(),
        DTYPE[c.dtype],
        precision=precision(dtype),
        alpha=alpha,
        **options,
    )


def rows_of(x: Tensor) -> Tensor | None:
    """x with all but its last dimension folded into one, or None where that would need a copy."""
    try:
        return x.view(math.prod(x.shape[:-1]), x.shape[-1])
    except RuntimeError:
        return None


def along_k(x: Tensor) -> Tensor:
    """x (extent, K), a copy where K runs across: tensor cores read 8-bit numbers along it, and so do fast copies."""
    return x if x.stride(1) == 1 or x.stride(0) != 1 or x.shape[1] == 1 else x.contiguous()


def product_shape(a: Tensor, b: Tensor) -> Sequence[int]:
    """That of a @ b, for two matrices or batches of them; batch dimensions broadcast."""
    if a.dim() == 2 and b.dim() == 2:
        return (a.shape[0], b.shape[1])
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return (*batch, a.shape[-2], b.shape[-1])


def multiply_batches(
    gemm: Callable[..., None], a: Tensor, b: Tensor, c: Tensor, residual: Tensor | None = None, **epilogue: Any
) -> None:
    """``gemm`` of operands that broadcast to c's batch dimensions; ``residual`` broadcasts to c."""
    if residual is not None:
        residual = residual.expand(c.shape)
    if c.dim() > 2:
        a, b, c, residual = _fold_batch(a, b, c, residual, c.shape)
    gemm(a, b, c, residual=residual, **epilogue)


def product(
    gemm: Callable[..., None],
    a: Tensor,
    b: Tensor,
    out: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    **epilogue: Any,
) -> Tensor:
    """alpha * (a @ b) + beta * residual, as backends.cpu.product, by a GPU's ``gemm``."""
    if out is None:
        out = a.new_empty(product_shape(a, b), dtype=dtype or a.dtype)
    multiply_batches(gemm, a, b, out, **epilogue)
    return out


def linear(
    gemm: Callable[..., None], input: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none"
) -> Tensor:
    """activation(input @ weight.T + bias), as backends.cpu.linear."""
    out = input.new_empty((*input.shape[:-1], weight.shape[0]))
    rows = rows_of(input)
    if rows is None:
        return product(gemm, input, weight.t(), out, bias=bias, activation=activation)
    gemm(rows, weight.t(), out.view(rows.shape[0], weight.shape[0]), bias=bias, activation=activation)
    return out


def int_mm(
    gemm: Callable[..., None],
    a: Tensor,
    b: Tensor,
    dtype: torch.dtype,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    return product(gemm, a, b, dtype=dtype, row_scale=row_scale, col_scale=col_scale, bias=bias)


def _fold_batch(
    a: Tensor, b: Tensor, c: Tensor, residual: Tensor | None, shape: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One matrix product where every batch shares b and the rows of a lie evenly, else batches of equal shape."""
    batch_dims = len(shape) - 2
    shared = b.dim() == 2 or not any(
        stride for stride, size in zip(b.stride()[:-2], b.shape[:-2], strict=True) if size != 1
    )
    if shared and a.shape[:-2] == shape[:-2] and c.numel():
        rows = (rows_of(a), rows_of(c), None if residual is None else rows_of(residual))
        if rows[0] is not None and rows[1] is not None and (residual is None) == (rows[2] is None):
            return rows[0], b[(0,) * (b.dim() - 2)], rows[1], rows[2]
    a = a.expand(*shape[:-2], *a.shape[-2:])
    b = b.expand(*shape[:-2], *b.shape[-2:])
    if batch_dims + 2 <= MAX_DIMS:
        return a, b, c, residual
    # Nobody has met nine dimensions; those that do pay for a copy where the first of them do not fold by themselves.
    extra = batch_dims + 2 - MAX_DIMS

    def fewer(x: Tensor, read: bool) -> Tensor:
        folded = (math.prod(x.shape[: extra + 1]), *x.shape[extra + 1 :])
        return x.reshape(folded) if read else x.view(folded)

    return fewer(a, True), fewer(b, True), fewer(c, False), None if residual is None else fewer(residual, True)
