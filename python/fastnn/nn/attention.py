"""Multi-head attention as a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _state, functional
from ..ops.multi_head_attention import linear_or_packed, ragged_self_attention
from ..ops.packed_linear import PackedWeight
from .hooks import any_global_hook, unwatched
from .linear import NonDynamicallyQuantizableLinear, PackableWeight
from .mlp import passes


class MultiheadAttention(PackableWeight, torch.nn.MultiheadAttention):
    """Attention in several heads between linear projections, as :class:`torch.nn.MultiheadAttention`.

    Shapes: query ``(L, N, embed_dim)``, key ``(S, N, kdim)``, value ``(S, N, vdim)``, with N first under
    ``batch_first``, or without N; the result has the shape of the query, the weights ``(N, L, S)``, or ``(N, num_heads,
    L, S)`` if they are not averaged. Formula, masks and errors are those of
    :func:`fastnn.functional.multi_head_attention_forward`.

    ``need_weights=False`` is much faster: the scores of all pairs are then never held at once. Where ``query is key is
    value``, one product projects all three. With ``batch_first`` nothing is copied on the way and the result is contiguous
    (torch's is outside of its own fast path the transposed view of one). There is no such fast path here: every call
    runs the same kernels, in training and in eval mode. Nested tensors, which torch takes in its fast path alone, go to
    torch.

    :func:`fastnn.prepack_` packs ``in_proj_weight`` for self-attention, and the weight of ``out_proj``.
    """

    packed_parameter = "in_proj_weight"

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.out_proj.__class__ = NonDynamicallyQuantizableLinear

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested or key.is_nested or value.is_nested:
            _state.count_fallback("multi_head_attention_forward", "a nested tensor")
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        return self._forward(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal, None
        )

    def forward_add(
        self,
        input: Tensor,
        residual: Tensor,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Self-attention without weights, plus ``residual``: in one product where ``out_proj`` is packed."""
        return self._forward(input, input, input, key_padding_mask, False, attn_mask, True, is_causal, residual)[0]

    def _forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        in_weight, in_bias = _weight_and_bias(self, "in_proj_weight", "in_proj_bias")
        out_proj = self._modules["out_proj"]
        out_weight, out_bias = _weight_and_bias(out_proj, "weight", "bias")
        in_packed = out_packed = None
        if not torch.compiler.is_compiling():
            in_packed, out_packed = _current(self, in_weight), _current(out_proj, out_weight)
        separate = not self._qkv_same_embed_dim
        return functional.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            in_weight,
            in_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            out_weight,
            out_bias,
            self.training,
            key_padding_mask,
            need_weights,
            attn_mask,
            separate,
            self.q_proj_weight if separate else None,
            self.k_proj_weight if separate else None,
            self.v_proj_weight if separate else None,
            None,
            None,
            average_attn_weights,
            is_causal,
            batch_first=self.batch_first,
            in_proj_packed=in_packed,
            out_proj_packed=out_packed,
            residual=residual,
        )

    def forward_ragged(self, input: Tensor, lengths: list[int]) -> Tensor:
        """Self-attention of sequences one after the other, ``(sum of lengths, embed_dim)``, without dropout or weights."""
        in_weight, in_bias = _weight_and_bias(self, "in_proj_weight", "in_proj_bias")
        out_proj = self._modules["out_proj"]
        out_weight, out_bias = _weight_and_bias(out_proj, "weight", "bias")
        in_packed, out_packed = _current(self, in_weight), _current(out_proj, out_weight)
        return ragged_self_attention(
            input,
            lengths,
            self.num_heads,
            lambda x: linear_or_packed(x, in_weight, in_bias, in_packed),
            lambda heads: linear_or_packed(heads, out_weight, out_bias, out_packed),
        )


def attend_and_add(
    attention: torch.nn.Module, dropout: torch.nn.Module, input: Tensor, residual: Tensor, **masks: Any
) -> Tensor:
    """``residual + dropout(attention(input))`` of self-attention: as one where nobody looks in between."""
    if (
        type(attention) is MultiheadAttention
        and passes(dropout)
        and unwatched(attention)
        and not any_global_hook()
        and not torch.compiler.is_compiling()
    ):
        return attention.forward_add(input, residual, **masks)
    return residual + dropout(attention(input, input, input, need_weights=False, **masks)[0])


def _weight_and_bias(layer: torch.nn.Module, weight: str, bias: str) -> tuple[Tensor, Tensor | None]:
    """Of the layer's dictionary, which takes less time than its attributes; of these if they are no parameters now."""
    parameters = layer._parameters
    try:
        return parameters[weight], parameters[bias]
    except KeyError:
        return getattr(layer, weight), getattr(layer, bias)


def _current(layer: torch.nn.Module, weight: Tensor) -> PackedWeight | None:
    """The layer's packed weight, given up here if the weight has changed since."""
    packed = layer.__dict__.get("_packed_weight")
    if packed is not None and not packed.is_current(weight):
        layer.__dict__.pop("_packed_weight", None)
        return None
    return packed
