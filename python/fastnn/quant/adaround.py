"""Rounding weights by what they do: each up or down so that the layer's results change least, not the weights.

To second order, exchanging the weights w of one output by the rounded ŵ costs the loss (ŵ - w)ᵀ H (ŵ - w), where H =
E[x xᵀ] of the layer's inputs (Nagel, Amjad, van Baalen, Louizos, Blankevoort 2020, "Up or down? Adaptive rounding for
post-training quantization", ICML, arXiv:2004.10568, section 3). AdaRound relaxes the choice and descends its gradient
for thousands of steps. Here the same quadratic form is brought down directly, in two closed steps that need no random
numbers and no rate:

1. Column by column, the error of each is made good by the columns that are not rounded yet, by the inverse of H (Frantar,
   Ashkboos, Hoefler, Alistarh 2023, "GPTQ", ICLR, arXiv:2210.17323). Inputs with the largest moment go first.
2. Sweeps over the columns: each weight becomes the integer that is best while all others stay (coordinate descent:
   Behdin et al. 2023, "QuantEase", arXiv:2309.01885), which no step can make worse, until none changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.reference.quantize import PACKED, RANGE, STORAGE, pack
from ..ops.quantize import quantize
from .links import CONV
from .modules import Quantized, relative_error

#: Of the mean of H's diagonal, added to it: few batches leave directions of which H knows nothing.
DAMPING = 0.01
#: Columns whose effect on all others is summed up before it is added.
_BLOCK = 64
_SWEEPS = 10
#: The scales that are tried are the given ones times 1, 0.99, ...
_SHRINK = tuple(1 - step / 100 for step in range(1, 61))


class Moments:
    """The sum of x xᵀ over all that a layer multiplies its weights with, group by group: a forward hook."""

    def __init__(self) -> None:
        #: (groups, K, K) in float64; None before the first call.
        self.total: Tensor | None = None

    def __call__(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        input = args[0] if args else next(iter(kwargs.values()))
        for rows in _rows_of(layer, input.detach()):
            product = (rows.mT @ rows).double()
            self.total = product if self.total is None else self.total.add_(product)


def _rows_of(layer: torch.nn.Module, input: Tensor) -> Iterator[Tensor]:
    """What each output is a product of, as (groups, rows, K) tensors in float32."""
    input = input.float()
    if type(layer) not in CONV:
        yield input.reshape(1, -1, input.shape[-1])
        return
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    input = F.pad(input, layer._reversed_padding_repeated_twice, mode=mode)
    if len(kernel) == 1:
        input, kernel, stride, dilation = input.unsqueeze(-2), (1, *kernel), (1, *stride), (1, *dilation)
    if input.dim() == 3:
        input = input.unsqueeze(0)
    # A patch takes as much memory as its filter: a few images at a time.
    images = max(1, 2**24 // (input[:1].numel() * kernel[0] * kernel[1] + 1))
    for some in input.split(images):
        patches = F.unfold(some, kernel, dilation, 0, stride)
        by_group = patches.unflatten(1, (layer.groups, -1))
        yield by_group.permute(1, 0, 3, 2).flatten(1, 2)


def round_weights(
    weight: Tensor,
    moment: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    quant_min: int,
    quant_max: int,
    damping: float = DAMPING,
) -> Tensor:
    """The integers whose products with a layer's inputs are nearest to the weights' products, on the grid of given scales.

    Args:
        weight: ``(N, K)``, a row for each output: a linear layer's, or a convolution's with all dimensions but the first in
            one. A layer of G groups has N / G rows for each of them, one group after the other.
        moment: E[x xᵀ], or any multiple of it, of what the rows are multiplied with: ``(K, K)``, or ``(G, K, K)``.
        scale: broadcasts to ``(N, K)``; a weight is ``(q - zero_point) * scale``.
        zero_point: the same, integers; None stands for 0.
        quant_min, quant_max: the range of the integers.
        damping: this share of the mean of the moment's diagonal is added to it.

    Returns:
        ``(N, K)`` int32. No single one of them can be exchanged for a better integer if the sweeps (at most 10) came to
        rest; the error is never above that of rounding column by column.

    Raises:
        ValueError: shapes that do not fit, a moment that is not finite, ``quant_min > quant_max`` or a negative ``damping``.

    Computed in float64, on the weight's device: O(N K²) for each of the sweeps, and O(K³) once.
    """
    moment = moment.detach().double()
    moment = moment.unsqueeze(0) if moment.dim() == 2 else moment
    groups, columns = moment.shape[0], weight.shape[-1]
    if weight.dim() != 2 or moment.shape != (groups, columns, columns) or groups == 0 or weight.shape[0] % groups:
        raise ValueError(
            f"round_weights: moment must be (K, K) or (G, K, K) for a weight of shape (N, K), got {tuple(moment.shape)} for "
            f"{tuple(weight.shape)}"
        )
    if not moment.isfinite().all():
        raise ValueError("round_weights: moment has values that are not finite")
    if quant_min > quant_max:
        raise ValueError(f"round_weights: quant_min must not be above quant_max, got {quant_min} and {quant_max}")
    if not damping >= 0:
        raise ValueError(f"round_weights: damping must not be negative, got {damping}")
    shift = torch.zeros_like(scale) if zero_point is None else zero_point

    def columns_first(x: Tensor) -> Tensor:
        """(N, K) as (groups, K, N / groups): what is done to a column is done to neighbours in memory."""
        return x.detach().double().expand(weight.shape).unflatten(0, (groups, -1)).mT.contiguous()

    w, s, zero = columns_first(weight), columns_first(scale), columns_first(shift)
    if w.numel() == 0:
        return torch.zeros(weight.shape, dtype=torch.int32, device=weight.device)
    diagonal = moment.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    # Inputs that were never anything but 0 leave each weight to itself.
    added = torch.where(mean > 0, damping * mean, 1.0)
    moment = moment + torch.diag_embed(added.expand_as(diagonal))
    order = diagonal.argsort(dim=1, descending=True, stable=True).unsqueeze(2)
    w, s, zero = (x.gather(1, order.expand_as(x)) for x in (w, s, zero))
    moment = moment.gather(1, order.expand_as(moment)).gather(2, order.mT.expand_as(moment))
    least, most = quant_min - zero, quant_max - zero

    q = _column_by_column(w, moment, s, least, most)
    _sweep(q, w, moment, s, least, most)
    q += zero
    back = torch.empty_like(q).scatter_(1, order.expand_as(q), q)
    return back.mT.reshape(weight.shape).to(torch.int32)


def _column_by_column(w: Tensor, moment: Tensor, s: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """Step 1 for (groups, K, N) weights, in units of the scale and without zero points."""
    upper = _inverse_factor(moment)
    w, q = w.clone(), torch.empty_like(w)
    columns = w.shape[1]
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.empty_like(w[:, start:end])
        for j in range(start, end):
            q[:, j] = (w[:, j] / s[:, j]).round().clamp(least[:, j], most[:, j])
            errors[:, j - start] = (w[:, j] - q[:, j] * s[:, j]) / upper[:, j, j, None]
            w[:, j + 1 : end] -= upper[:, j, j + 1 : end, None] * errors[:, None, j - start]
        w[:, end:] -= upper[:, start:end, end:].mT @ errors
    return q


def _inverse_factor(moment: Tensor) -> Tensor:
    """U, upper triangular, with UᵀU = the inverse of the moment."""
    lower, failed = torch.linalg.cholesky_ex(moment)
    while failed.any():
        # Sums of rounded products can have eigenvalues below zero; without damping they may be zero.
        moment = moment + torch.diag_embed(
            moment.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(moment.shape[:2]) * DAMPING
        )
        lower, failed = torch.linalg.cholesky_ex(moment)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def _sweep(q: Tensor, w: Tensor, moment: Tensor, s: Tensor, least: Tensor, most: Tensor) -> None:
    """Step 2, in place."""
    columns = w.shape[1]
    # Half the gradient by each weight.
    slope = moment @ (q * s - w)
    for _ in range(_SWEEPS):
        before = q.clone()
        for start in range(0, columns, _BLOCK):
            end = min(start + _BLOCK, columns)
            mine = slope[:, start:end].clone()
            steps = torch.empty_like(mine)
            for j in range(start, end):
                best = q[:, j] - mine[:, j - start] / (moment[:, j, j, None] * s[:, j])
                best = best.round_().clamp_(least[:, j], most[:, j])
                steps[:, j - start] = (best - q[:, j]) * s[:, j]
                q[:, j] = best
                mine += moment[:, start:end, j, None] * steps[:, None, j - start]
            slope += moment[:, :, start:end] @ steps
        if torch.equal(q, before):
            return


def search_scale(weight: Tensor, scale: Tensor, zero_point: Tensor | None, *, quant_min: int, quant_max: int) -> Tensor:
    """The scales, of 0.4, 0.41, ... 1 times the given ones, with which rounding to the nearest has the least squared error.

    Clipping the few largest weights can cost less than a coarse grid costs all others (Banner, Nahshan, Soudry 2019, NeurIPS,
    arXiv:1810.05723). ``weight`` is ``(N, K)``; ``scale`` and ``zero_point`` are ``(N, G)``, one for each of the G runs of
    K / G neighbours in a row. Of equal errors the widest scale.
    """
    runs = weight.detach().float().unflatten(1, (scale.shape[1], -1))
    zero = torch.zeros_like(scale) if zero_point is None else zero_point
    least, most = (quant_min - zero).unsqueeze(2), (quant_max - zero).unsqueeze(2)

    def error(tried: Tensor) -> Tensor:
        tried = tried.unsqueeze(2)
        return (runs / tried).round_().clamp_(least, most).mul_(tried).sub_(runs).square_().sum(2)

    best, lowest = scale, error(scale)
    for factor in _SHRINK:
        tried = scale * factor
        found = error(tried)
        best, lowest = torch.where(found < lowest, tried, best), torch.minimum(found, lowest)
    return best


def refine(quantized: Quantized, weight: Tensor, moment: Tensor | None) -> None:
    """Gives a layer the best scales for its weight, and integers by rounding to the nearest, or by the moment if there
    is one."""
    rows = quantized.as_rows(weight.detach().float())
    name = quantized.weight_dtype
    least, most = RANGE[name]
    scale, zero = (
        None if part is None else part.view(len(rows), -1)
        for part in (quantized.weight_scale, getattr(quantized, "weight_zero_point", None))
    )
    scale = search_scale(rows, scale, zero, quant_min=least, quant_max=most)
    # All-zero rows have a scale of their own choice, which must stay a normal number.
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    size = rows.shape[1] // scale.shape[1]
    if moment is None:
        q = quantize(rows, scale, zero, dtype=name, group_size=size)
    else:
        beyond = rows.shape[1] - moment.shape[-1]
        moment = F.pad(moment, (0, beyond, 0, beyond))
        by_weight = [None if part is None else part.repeat_interleave(size, 1) for part in (scale, zero)]
        q = round_weights(rows, moment, *by_weight, quant_min=least, quant_max=most)
        q = pack(q) if name in PACKED else q.to(STORAGE[name])
    # Into memory of the same strides: the kernels read filters as they lie.
    quantized.weight = torch.empty_like(quantized.codes).copy_(q.view(quantized.codes.shape))
    quantized.weight_scale = scale.view(quantized.weight_scale.shape)
    quantized.weight_error = relative_error(weight.detach(), quantized.dequantized_weight())


__all__ = ["round_weights"]
