"""BERT: a transformer encoder in which each token looks at all others.

Source: Devlin, Chang, Lee, Toutanova 2018, "BERT: Pre-training of deep bidirectional transformers for language
understanding", arXiv:1810.04805; norms stand after the sums, as in the paper. Arguments and ``state_dict`` keys
(``embeddings.word_embeddings.weight``, ``encoder.layer.0.attention.self.query.weight``, ...) are those of Hugging Face's
``BertConfig`` and ``BertModel``. As BERT-base it has 109,482,240 parameters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import nn
from ..nn.mlp import run_layers
from .heads import join_heads, split_projections

#: What one linear layer computes, by the names of the three that it stands for.
_PROJECTIONS = ("query", "key", "value")


class BertOutput(NamedTuple):
    """What :class:`Bert` returns."""

    #: (N, L, hidden_size).
    last_hidden_state: Tensor
    #: (N, hidden_size), of the first token; None without pooling layer.
    pooler_output: Tensor | None


class BertEmbeddings(torch.nn.Module):
    """The sum of the embeddings of token, position and segment, with a norm."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        max_position_embeddings: int,
        type_vocab_size: int,
        pad_token_id: int | None,
        layer_norm_eps: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, hidden_size, padding_idx=pad_token_id)
        self.position_embeddings = nn.Embedding(max_position_embeddings, hidden_size)
        self.token_type_embeddings = nn.Embedding(type_vocab_size, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(x + self.position_embeddings(position_ids)))


class BertSelfAttention(torch.nn.Module):
    """The heads: ``(N, L, hidden_size)`` to the same shape.

    Queries, keys and values come out of one linear layer, which is one large product instead of three. In a ``state_dict``
    it is three layers, ``query``, ``key`` and ``value``: views of the one, and loaded from three.
    """

    def __init__(self, hidden_size: int, num_attention_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention = nn.DotProductAttention()
        self.dropout = dropout

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        query, key, value = split_projections(self.qkv(x), self.num_attention_heads)
        dropout = self.dropout if self.training else 0.0
        return join_heads(self.attention(query, key, value, attention_mask, dropout))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        found = super().state_dict(*args, **kwargs)
        prefix = args[1] if len(args) > 1 else kwargs.get("prefix", "")
        for kind in ("weight", "bias"):
            parts = found.pop(f"{prefix}qkv.{kind}").chunk(3)
            for name, part in zip(_PROJECTIONS, parts, strict=True):
                found[f"{prefix}{name}.{kind}"] = part
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # torch hands the entries that are left here to the layers inside.
        for kind in ("weight", "bias"):
            names = [f"{prefix}{name}.{kind}" for name in _PROJECTIONS]
            if all(name in state_dict for name in names):
                state_dict[f"{prefix}qkv.{kind}"] = torch.cat([state_dict.pop(name) for name in names])
        super()._load_from_state_dict(state_dict, prefix, *args)


class BertResidual(torch.nn.Module):
    """``norm(dropout(dense(x)) + residual)``: the end of both sublayers."""

    def __init__(self, inputs: int, hidden_size: int, layer_norm_eps: float, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(run_layers((self.dense, self.dropout), x, residual))


class BertIntermediate(torch.nn.Module):
    """``gelu(dense(x))``."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, intermediate_size)
        self.intermediate_act_fn = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return run_layers((self.dense, self.intermediate_act_fn), x)


class BertLayer(torch.nn.Module):
    """Attention and a two-layer perceptron, each with its residual and norm."""

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        intermediate_size: int,
        layer_norm_eps: float,
        hidden_dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.attention = torch.nn.ModuleDict(
            {
                "self": BertSelfAttention(hidden_size, num_attention_heads, attention_dropout),
                "output": BertResidual(hidden_size, hidden_size, layer_norm_eps, hidden_dropout),
            }
        )
        self.intermediate = BertIntermediate(hidden_size, intermediate_size)
        self.output = BertResidual(intermediate_size, hidden_size, layer_norm_eps, hidden_dropout)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, attention_mask), x)
        return self.output(self.intermediate(x), x)


class BertPooler(torch.nn.Module):
    """``tanh(dense(x))`` of the first token."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.activation = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return run_layers((self.dense, self.activation), x[:, 0])


class Bert(torch.nn.Module):
    """Embeddings, a stack of encoder layers, and a pooling layer on the first token.

    Shapes: ``input_ids (N, L)``, integers, with L at most ``max_position_embeddings``; output :class:`BertOutput` of
    ``(N, L, hidden_size)`` and ``(N, hidden_size)``.

    Args:
        vocab_size: how many tokens there are.
        hidden_size: features of a token.
        num_hidden_layers: encoder layers.
        num_attention_heads: heads of each attention; they share the features.
        intermediate_size: features between the two linear layers of the perceptron.
        hidden_dropout_prob: probability with which embeddings and the results of the sublayers are dropped.
        attention_probs_dropout_prob: the same of attention weights.
        max_position_embeddings: the longest row of tokens.
        type_vocab_size: how many segments there are.
        layer_norm_eps: added to the variances.
        pad_token_id: the token whose embedding is zero and gets no gradient; None for none.
        add_pooling_layer: whether there is ``pooler_output``.

    Raises:
        ValueError: ``num_attention_heads`` does not divide ``hidden_size``; or, of a call, there are more tokens than
            ``max_position_embeddings``, or ``attention_mask`` has another shape than ``input_ids``.

    Example::

        model = fastnn.models.Bert().eval()
        tokens = torch.randint(30522, (2, 20))
        mask = torch.ones(2, 20, dtype=torch.bool)
        mask[1, 15:] = False  # the second row ends here
        hidden, pooled = model(tokens, mask)  # (2, 20, 768) and (2, 768)
    """

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        max_position_embeddings: int = 512,
        type_vocab_size: int = 2,
        layer_norm_eps: float = 1e-12,
        pad_token_id: int | None = 0,
        add_pooling_layer: bool = True,
    ) -> None:
        super().__init__()
        if hidden_size % num_attention_heads:
            raise ValueError(
                "Bert: num_attention_heads must divide hidden_size, got "
                f"num_attention_heads={num_attention_heads} and hidden_size={hidden_size}"
            )
        self.max_position_embeddings = max_position_embeddings
        self.embeddings = BertEmbeddings(
            vocab_size,
            hidden_size,
            max_position_embeddings,
            type_vocab_size,
            pad_token_id,
            layer_norm_eps,
            hidden_dropout_prob,
        )
        layers = (
            BertLayer(
                hidden_size,
                num_attention_heads,
                intermediate_size,
                layer_norm_eps,
                hidden_dropout_prob,
                attention_probs_dropout_prob,
            )
            for _ in range(num_hidden_layers)
        )
        self.encoder = torch.nn.ModuleDict({"layer": torch.nn.ModuleList(layers)})
        self.pooler = BertPooler(hidden_size) if add_pooling_layer else None
        for module in self.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
                torch.nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.zeros_(module.bias)
            elif isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                torch.nn.init.zeros_(module.weight[module.padding_idx])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> BertOutput:
        """The hidden states.

        Args:
            input_ids: the tokens.
            attention_mask: ``(N, L)``, true or non-zero for tokens that others may look at; all by default.
            token_type_ids: ``(N, L)``, the segment of each token; 0 by default.
            position_ids: ``(N, L)`` or ``(L,)``; from 0 by default.
        """
        if input_ids.shape[1] > self.max_position_embeddings:
            raise ValueError(
                f"Bert: input_ids must have at most {self.max_position_embeddings} tokens, got {input_ids.shape[1]}"
            )
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"Bert: attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, "
                    f"got {tuple(attention_mask.shape)}"
                )
            attention_mask = attention_mask.bool()[:, None, None, :]
        x = self.embeddings(input_ids, token_type_ids, position_ids)
        for layer in self.encoder["layer"]:
            x = layer(x, attention_mask)
        return BertOutput(x, None if self.pooler is None else self.pooler(x))


def bert_base(**kwargs: Any) -> Bert:
    """BERT-base with random weights: 12 layers and heads, 768 features; the other arguments are :class:`Bert`'s."""
    return Bert(**kwargs)
