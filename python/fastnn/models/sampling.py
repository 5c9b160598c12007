"""Choosing the next token from logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError for numbers that name no distribution."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(
            f"temperature must be finite and greater than 0, got {temperature!r}; for the likeliest token, do_sample=False"
        )
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be an integer of at least 1, got {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be greater than 0 and at most 1, got {top_p!r}")


def probabilities(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution that the next token is drawn from: softmax(logits / temperature), cut off and normalized again.

    Shapes: ``(..., vocabulary)`` for both. It is computed in float32, in float64 for float64 logits.

    Args:
        logits: any float dtype.
        temperature: below 1 likely tokens become likelier still.
        top_k: only the k likeliest tokens stay, and those as likely as the last of them (Fan, Lewis, Dauphin 2018,
            arXiv:1805.04833).
        top_p: of those, only the smallest set of likeliest tokens stays whose probabilities sum to at least p (nucleus
            sampling: Holtzman et al. 2019, arXiv:1904.09751); one at least. Of tokens that are equally likely the first
            stay.

    Raises:
        TypeError: ``logits`` is no tensor.
        ValueError: ``temperature`` is not above 0, ``top_k`` is below 1, or ``top_p`` is not in (0, 1].
    """
    check_sampling(temperature, top_k, top_p)
    if not isinstance(logits, Tensor):
        raise TypeError(f"probabilities: logits must be a Tensor, got {type(logits).__name__}")
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    # The likeliest becomes 0 first: divided by little, more than one would be infinite.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(logits.dtype).tiny)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    found = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = found.sort(dim=-1, descending=True, stable=True)
        # A token goes when those before it reach p without it: the likeliest has none before it, and stays.
        gone = ordered.cumsum(-1) - ordered >= top_p
        gone[..., 0] = False
        found = found.masked_fill(torch.zeros_like(gone).scatter(-1, order, gone), 0.0)
        found = found / found.sum(-1, keepdim=True)
    return found
