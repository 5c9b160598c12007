"""Layer norm and rms norm on plain CUDA tensors without zero sizes, whose shapes the ops have checked."""

from __future__ import annotations

import torch
from torch import Tensor

from .._layer_norm import laid_out, rows
from ..codes import DTYPE
from . import module, where


def row_norm(
    input: Tensor, dims: int, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool
) -> Tensor:
    """Over the last ``dims`` dimensions. The result has torch's strides."""
    out = input.new_empty(input.shape)
    x, y = rows(dims, input, out)
    (scale, shift), code, _keep = _parameters(input.dtype, weight, bias)
    module().row_norm(
        x.shape,
        DTYPE[x.dtype],
        (x.data_ptr(), x.stride()),
        (y.data_ptr(), y.stride()),
        scale,
        shift,
        code,
        eps,
        centered,
        **where(input),
    )
    return laid_out(out, input, centered)


def row_norm_backward(
    grad: Tensor, input: Tensor, dims: int, weight: Tensor | None, eps: float, centered: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, and of weight and bias in float64 (empty where there is none)."""
    by_input = input.new_empty(input.shape)
    shape = input.shape[input.dim() - dims :]
    by_weight = input.new_empty(shape if weight is not None else (0,), dtype=torch.float64)
    by_bias = input.new_empty(shape if bias else (0,), dtype=torch.float64)
    g, x, y = rows(dims, grad, input, by_input)
    (scale, _), code, _keep = _parameters(input.dtype, weight, None)
    wanted = weight is not None or bias
    n = x.shape[-1]
    workspace = input.new_empty(
        module().row_norm_workspace(input.numel() // n, n) if wanted else 0, dtype=torch.float32
    )
    module().row_norm_backward(
        x.shape,
        DTYPE[x.dtype],
        *((t.data_ptr(), t.stride()) for t in (g, x, y)),
        scale,
        code,
        eps,
        centered,
        by_weight.data_ptr() if weight is not None else 0,
        by_bias.data_ptr() if bias else 0,
        workspace.data_ptr() if wanted else 0,
        **where(input),
    )
    return laid_out(by_input, input, centered), by_weight, by_bias


def _parameters(dtype: torch.dtype, *parameters: Tensor | None) -> tuple[list[int], int, list[Tensor | None]]:
    """Addresses, 0 where there is none; the code of their dtype; and what holds their memory meanwhile."""
    held = [None if p is None else p.contiguous() for p in parameters]
    code = next((DTYPE[p.dtype] for p in held if p is not None), DTYPE[dtype])
    return [0 if p is None else p.data_ptr() for p in held], code, held
