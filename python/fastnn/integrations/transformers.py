"""Hugging Face transformers: ``attn_implementation="fastnn"``.

:func:`fastnn.convert` alone makes torch's attention fastnn's in their models, which have it unless told otherwise, and knows
their layers: linear ones, transformers' ``Conv1D``, norms, activations, embeddings. To ask for the attention by name:
``fastnn.integrations.transformers.register()`` makes the name known; models are then made, or loaded, with it::

    fastnn.integrations.transformers.register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="fastnn")

It covers the attention of all models that ask transformers for it by name (in transformers from 4.48 on; BERT asks so
from 5.0 on, and raises KeyError before), and takes grouped keys and values as they are, where transformers makes copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional

#: The name under which models ask for it.
NAME = "fastnn"

# What some models hand to an attention that computes something else; ignoring it would give other numbers.
_UNKNOWN = {
    "softcap": "scores are not capped",
    "s_aux": "there are no attention sinks",
    "cache": "there is no paged cache",
}


def register() -> None:
    """Make ``attn_implementation="fastnn"`` known to transformers, for all models in this process.

    Masks are made as for ``"sdpa"``: boolean, and none at all where ``is_causal`` says the same. Calling it again changes
    nothing.

    Raises:
        ImportError: transformers is not there, or older than 4.48, which had no such names.
    """
    try:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError as error:
        raise ImportError(f"fastnn.integrations.transformers needs transformers 4.48 or later: {error}") from error
    _set(ALL_ATTENTION_FUNCTIONS, attention_forward)
    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    except ImportError:
        return  # before 4.53 each model makes its masks itself, and gives those of "eager" to names it does not know
    _set(ALL_MASK_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _set(names: Any, function: Any) -> None:
    """For all models. The first versions had one dictionary; assigning to an item now is for one model's table alone."""
    if hasattr(type(names), "register"):
        type(names).register(NAME, function)
    else:
        names[NAME] = function


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls with the heads of one attention layer.

    Shapes: query ``(N, H, L, d)``, key ``(N, G, S, d)``, value ``(N, G, S, v)`` where G divides H; ``attention_mask`` boolean,
    True where to look, or added to the scores; ``position_bias`` added too. Returns ``(N, L, H, v)``, contiguous, and None in
    place of the weights. Without a mask, queries see the keys up to their own position if the call or else the module says
    ``is_causal``, except that a single query sees all of them.

    Raises:
        ValueError: for what changes the result and is not known here: ``softcap``, ``s_aux`` (attention sinks), a paged
            cache.
    """
    for name, meaning in _UNKNOWN.items():
        if kwargs.get(name) is not None:
            raise ValueError(f'attn_implementation="fastnn" does not take {name}: {meaning}; use "eager"')
    length, source = query.shape[2], key.shape[2]
    if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.shape[-1] > source:
        attention_mask = attention_mask[..., :source]  # made for the whole of a static cache
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_causal = length > 1 and attention_mask is None and is_causal
    if position_bias is not None:
        attention_mask = _with_bias(position_bias, attention_mask, is_causal, length, source)
        is_causal = False
    output = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous(), None


def _with_bias(bias: Tensor, mask: Tensor | None, is_causal: bool, length: int, source: int) -> Tensor:
    """The bias of T5's kind, added to the scores, and -inf where the mask or causality says not to look."""
    if is_causal:
        mask = torch.ones(length, source, dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask
