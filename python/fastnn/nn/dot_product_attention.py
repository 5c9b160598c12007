"""softmax(Q Kᵀ / √d + mask) V as a layer without parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional


class TorchDotProductAttention(torch.nn.Module):
    """:func:`torch.nn.functional.scaled_dot_product_attention` as a module: what :func:`fastnn.revert` makes of
    :class:`DotProductAttention`."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
    ) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal)


class DotProductAttention(TorchDotProductAttention):
    """``softmax(Q Kᵀ / √d + mask) V``, as :func:`fastnn.functional.scaled_dot_product_attention`.

    torch has the function alone. As a module in a model it is found by :func:`fastnn.convert` and :func:`fastnn.revert`.

    Shapes: query ``(N, heads, L, d)``, key ``(N, heads, S, d)``, value ``(N, heads, S, v)``, output ``(N, heads, L, v)``.
    """

    _original_class = TorchDotProductAttention

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
    ) -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal)


def is_dot_product_attention(module: torch.nn.Module) -> bool:
    """Whether it is torch's form."""
    return type(module) is TorchDotProductAttention


def dot_product_attention_class(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The fast class for a class that :func:`is_dot_product_attention` has recognised."""
    return DotProductAttention
