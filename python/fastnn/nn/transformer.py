"""Encoder and decoder layers of transformers, and stacks of them (Vaswani et al. 2017, arXiv:1706.03762).

torch's encoder has ways of its own in eval mode without gradients: the whole layer as one call, and a padded batch as a
nested tensor. Neither calls the layers inside, so that replacing those would change nothing; the classes here go the one
way that torch goes in training. The feed-forward part runs its activation within the first product.

The constructors are torch's, and draw the same random numbers; what they make is then given fastnn's classes. Layers and
activations that the caller hands over stay as they are.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _state, functional
from .activation import activation_name
from .attention import MultiheadAttention, attend_and_add
from .hooks import any_global_hook, unwatched
from .mlp import fuses_activation, run_layers


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """Self-attention and two linear layers, each with a norm and a sum, as :class:`torch.nn.TransformerEncoderLayer`.

    Shapes: ``src`` and the result ``(L, N, d_model)``, with N first under ``batch_first``, or without N; ``src_mask``
    ``(L, L)`` or ``(N * nhead, L, L)``; ``src_key_padding_mask`` ``(N, L)`` or ``(L,)``. Masks and errors are those of
    :class:`MultiheadAttention`. Nested tensors go to torch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _take_over(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if src.is_nested:
            _state.count_fallback("TransformerEncoderLayer", "a nested tensor")
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if not isinstance(self.self_attn, torch.nn.MultiheadAttention):
            # An attention of somebody else's gets the masks as torch's layer hands them on.
            src_mask = _added(src_mask, src.dtype)
            src_key_padding_mask = _added(src_key_padding_mask, src.dtype)
        masks = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask, "is_causal": is_causal}
        if self.norm_first:
            src = self._attention_added(self.norm1(src), src, masks)
            return _feed_forward_added(self, self.norm2(src), src)
        src = self.norm1(self._attention_added(src, src, masks))
        return self.norm2(_feed_forward_added(self, src, src))

    def _attention_added(self, x: Tensor, residual: Tensor, masks: dict[str, Any]) -> Tensor:
        if type(self)._sa_block is not torch.nn.TransformerEncoderLayer._sa_block:  # a subclass of somebody else's
            return residual + self._sa_block(x, *masks.values())
        return attend_and_add(self.self_attn, self.dropout1, x, residual, **masks)

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(_feed_forward(self, x))


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """Self-attention, attention to the encoder's result and two linear layers, as
    :class:`torch.nn.TransformerDecoderLayer`.

    Shapes: ``tgt`` and the result ``(T, N, d_model)``, ``memory`` ``(S, N, d_model)``, with N first under ``batch_first``, or
    without N. Masks and errors are those of :class:`MultiheadAttention`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _take_over(self)

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout3(_feed_forward(self, x))


class TransformerEncoder(torch.nn.TransformerEncoder):
    """Encoder layers one after the other, as :class:`torch.nn.TransformerEncoder`; shapes as for one of them.

    No nested tensors are made of a padded batch, but what torch makes them for is done: in eval mode without gradients,
    with a ``src_key_padding_mask`` whose padding is all at the end, what is padded is not computed, and is 0 in the last
    layer's result. The layers then run on the sequences one after the other, or, where there is little padding or
    somebody looks into the layers, on as many columns as the longest sequence has. Layers that are not fastnn's run
    as torch's class runs them.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        first = self.layers[0] if len(self.layers) else None
        if not isinstance(first, TransformerEncoderLayer):
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        if not src.is_nested:
            is_causal = _is_causal(mask, is_causal, _length(src, first.self_attn))
        lengths = self._lengths(first, src, mask, src_key_padding_mask)
        if lengths is not None:
            output = self._without_padding(src, lengths)
        else:
            output = src
            for layer in self.layers:
                output = layer(
                    output, src_mask=mask, is_causal=bool(is_causal), src_key_padding_mask=src_key_padding_mask
                )
        return output if self.norm is None else self.norm(output)

    def _lengths(
        self, first: TransformerEncoderLayer, src: Tensor, mask: Tensor | None, padding: Tensor | None
    ) -> list[int] | None:
        """How long the sequences are, if torch would make a nested tensor of the batch; None if not."""
        if (
            padding is None
            or mask is not None
            or first.training
            or src.dim() != 3
            or src.is_nested
            or not getattr(self, "use_nested_tensor", False)
            or not torch.backends.mha.get_fastpath_enabled()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled()
            or padding.shape != src.shape[:2]
            or padding.is_meta
            or type(src) is not Tensor
            or (torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in first.parameters())))
        ):
            return None
        # Of a mask that is added to scores, torch takes what is not 0 for padding here.
        kept = padding.logical_not()
        lengths = kept.sum(dim=1)
        at_start = torch.arange(src.shape[1], device=kept.device) < lengths.unsqueeze(1)
        if getattr(self, "mask_check", True) and not bool((kept == at_start).all()):
            return None
        return lengths.tolist()

    def _without_padding(self, src: Tensor, lengths: list[int]) -> Tensor:
        """What the layers make of a batch of sequences of these lengths; 0 after their ends."""
        longest, total = max(lengths, default=0), sum(lengths)
        output = torch.zeros_like(src, memory_format=torch.contiguous_format)
        if not total:
            return output
        # Between the sequences a batch would make a difference; apart from each other it does not.
        little = 10 * total > 9 * longest * len(lengths) and not _state.settings().batch_invariant
        if little or not all(_runs_ragged(layer) for layer in self.layers) or any_global_hook():
            x = src[:, :longest]
            ends = torch.tensor(lengths, device=src.device).unsqueeze(1)
            padding = None
            if total < longest * len(lengths):
                padding = torch.arange(longest, device=src.device) >= ends
            for layer in self.layers:
                x = layer(x, src_key_padding_mask=padding)
            output[:, :longest] = x if padding is None else x.masked_fill(padding.unsqueeze(-1), 0.0)
            return output
        x = torch.cat([row[:length] for row, length in zip(src, lengths, strict=True)])
        for layer in self.layers:
            x = _ragged_layer(layer, x, lengths)
        for row, sequence in zip(output, x.split(lengths), strict=True):
            row[: len(sequence)] = sequence
        return output


#: Attention with a ``forward_ragged``, by exact type. fastnn.quant adds its own.
RAGGED: tuple[type[torch.nn.Module], ...] = (MultiheadAttention,)


def _runs_ragged(layer: torch.nn.Module) -> bool:
    """Whether nobody can tell in which shape the layer runs, and nothing in it needs to know."""
    if type(layer) is not TransformerEncoderLayer or layer.training:
        return False
    attention = layer.self_attn
    return (
        type(attention) in RAGGED
        and attention._qkv_same_embed_dim
        and attention.bias_k is None
        and not attention.add_zero_attn
        and all(unwatched(module) and not module.training for module in layer.modules())
    )


def _ragged_layer(layer: TransformerEncoderLayer, x: Tensor, lengths: list[int]) -> Tensor:
    """An encoder layer on sequences one after the other, without dropout."""
    if layer.norm_first:
        x = x + layer.self_attn.forward_ragged(layer.norm1(x), lengths)
        return _feed_forward_added(layer, layer.norm2(x), x)
    x = layer.norm1(x + layer.self_attn.forward_ragged(x, lengths))
    return layer.norm2(_feed_forward_added(layer, x, x))


class TransformerDecoder(torch.nn.TransformerDecoder):
    """Decoder layers one after the other, as :class:`torch.nn.TransformerDecoder`; shapes as for one of them."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        if tgt_is_causal is None:
            tgt_is_causal = _is_causal(tgt_mask, None, _length(tgt, self.layers[0].self_attn))
        return super().forward(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            tgt_is_causal,
            memory_is_causal,
        )


class Transformer(torch.nn.Transformer):
    """An encoder and a decoder, as :class:`torch.nn.Transformer`.

    Shapes: ``src`` ``(S, N, d_model)``, ``tgt`` and the result ``(T, N, d_model)``, with N first under ``batch_first``, or
    without N. Masks and errors are those of :class:`MultiheadAttention`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Those of torch's exact class are the constructor's own, unless they were handed over.
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.nn.Module)]
        for part in (self.encoder, self.decoder):
            if not any(part is value for value in given):
                _take_over(part)


#: Functions that take the place of an activation, and the names under which linear_act knows them.
_ACTIVATIONS: tuple[tuple[Callable[[Tensor], Tensor], str], ...] = (
    (F.relu, "relu"),
    (torch.relu, "relu"),
    (functional.relu, "relu"),
    (F.gelu, "gelu"),
    (functional.gelu, "gelu"),
    (F.silu, "silu"),
    (functional.silu, "silu"),
)


def _take_over(module: torch.nn.Module) -> None:
    """Gives what torch's constructor has made fastnn's classes of the same names, as :func:`fastnn.convert` would."""
    kind = type(module)
    fast = getattr(sys.modules[__package__], kind.__name__, None)
    if kind.__module__.startswith("torch.nn.modules.") and fast is not None and issubclass(fast, kind):
        module.__class__ = fast
    for name, child in module.named_children():
        if name != "activation":  # the caller's
            _take_over(child)


def _feed_forward_added(layer: TransformerEncoderLayer, x: Tensor, residual: Tensor) -> Tensor:
    """``residual + dropout2(feed_forward(x))``: the sum within the last product where that can be."""
    if type(layer)._ff_block is not TransformerEncoderLayer._ff_block:  # a subclass of somebody else's
        return residual + layer._ff_block(x)
    return run_layers((layer.dropout, layer.linear2, layer.dropout2), _activated(layer, x), residual)


def _feed_forward(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """``linear2(dropout(activation(linear1(x))))``."""
    return layer.linear2(layer.dropout(_activated(layer, x)))


def _activated(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """``activation(linear1(x))``, as one product where nobody looks between them."""
    activation, linear = layer.activation, layer.linear1
    function = None
    for known, named in _ACTIVATIONS:  # Dynamo before torch 2.7 does not know next(..., None)
        if activation is known:
            function = named
            break
    name = function
    if name is None and isinstance(activation, torch.nn.Module) and unwatched(activation):
        name = activation_name(activation)
    if name is not None and fuses_activation(linear) and unwatched(linear) and not any_global_hook():
        return linear.forward_act(x, name)
    if function is not None:
        return getattr(functional, function)(linear(x))
    return activation(linear(x))


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _length(src: Tensor, attention: torch.nn.Module) -> int:
    return src.shape[0] if src.dim() == 2 or not attention.batch_first else src.shape[1]


def _is_causal(mask: Tensor | None, given: bool | None, size: int) -> bool:
    """What the caller says, or else whether the mask is the causal one; under a tracer, which cannot look, False."""
    if given is not None or mask is None:
        return bool(given)
    if torch.compiler.is_compiling() or mask.is_meta or mask.shape != (size, size):
        return False
    if mask.dtype == torch.bool:
        causal = torch.ones_like(mask).triu(1)
    else:
        causal = torch.full_like(mask, -math.inf).triu(1)
    return bool((mask == causal).all())
