"""The encoder-decoder transformer, from one sequence of tokens to another.

Source: Vaswani et al. 2017, "Attention is all you need", arXiv:1706.03762: sinusoidal positions (section 3.5), embeddings
times √features (3.4), norms after the sums. Arguments and ``state_dict`` keys (``transformer.encoder.layers.0...``,
``generator.weight``, ``src_tok_emb.embedding.weight``, ``tgt_tok_emb.embedding.weight``,
``positional_encoding.pos_embedding``) are those of PyTorch's tutorial on translation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import functional, nn
from ..nn.hooks import any_global_hook, unwatched
from .heads import join_heads, split_heads, split_projections


class PositionalEncoding(torch.nn.Module):
    """Adds sin(t / 10000^(2i/d)) and cos(t / 10000^(2i/d)) to features 2i and 2i + 1 of the token at t.

    Shapes: input and output ``(N, L, emb_size)``.
    """

    def __init__(self, emb_size: int, dropout: float, maxlen: int = 5000) -> None:
        super().__init__()
        rates = torch.exp(torch.arange(0, emb_size, 2) * (-math.log(10000.0) / emb_size))
        angles = torch.arange(maxlen)[:, None] * rates
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :emb_size]
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("pos_embedding", table[:, None].contiguous())

    def forward(self, token_embedding: Tensor, start: int = 0) -> Tensor:
        """``start``: the place of the first token."""
        end = start + token_embedding.shape[1]
        return self.dropout(token_embedding + self.pos_embedding[start:end, 0])


class TokenEmbedding(torch.nn.Module):
    """The embedding, times √emb_size."""

    def __init__(self, vocab_size: int, emb_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, emb_size)
        self.scale = math.sqrt(emb_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens) * self.scale


class _LayerCache:
    """What a decoder layer keeps between tokens: keys and values of the memory, and of the target so far."""

    def __init__(self, layer: nn.TransformerDecoderLayer, memory: Tensor, capacity: int) -> None:
        attention = layer.multihead_attn
        size = attention.embed_dim
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        both = functional.linear(memory, weight[size:], None if bias is None else bias[size:])
        self.memory = [split_heads(part, attention.num_heads) for part in both.chunk(2, dim=-1)]
        self.capacity = capacity
        self.target: list[Tensor] = []

    def append(self, at: int, *added: Tensor) -> list[Tensor]:
        """Writes the key and the value of the token at this place; all up to there, ``(N, heads, at + 1, d)``."""
        if not self.target:
            n, heads, _, size = added[0].shape
            self.target = [x.new_empty((n, heads, self.capacity, size)) for x in added]
        for kept, x in zip(self.target, added, strict=True):
            kept[:, :, at : at + 1] = x
        return [kept[:, :, : at + 1] for kept in self.target]


def _next_features(
    layer: nn.TransformerDecoderLayer, x: Tensor, cache: _LayerCache, at: int, mask: Tensor | None
) -> Tensor:
    """What the layer makes of the one token at this place, ``(N, 1, emb_size)``, without dropout."""

    def attend_target(x: Tensor) -> Tensor:
        attention = layer.self_attn
        projected = functional.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = split_projections(projected, attention.num_heads)
        found = functional.scaled_dot_product_attention(query, *cache.append(at, key, value))
        return attention.out_proj(join_heads(found))

    def attend_memory(x: Tensor) -> Tensor:
        attention = layer.multihead_attn
        size, bias = attention.embed_dim, attention.in_proj_bias
        query = functional.linear(x, attention.in_proj_weight[:size], None if bias is None else bias[:size])
        found = functional.scaled_dot_product_attention(
            split_heads(query, attention.num_heads), *cache.memory, attn_mask=mask
        )
        return attention.out_proj(join_heads(found))

    if layer.norm_first:
        x = x + attend_target(layer.norm1(x))
        x = x + attend_memory(layer.norm2(x))
        return x + layer._ff_block(layer.norm3(x))
    x = layer.norm1(x + attend_target(x))
    x = layer.norm2(x + attend_memory(x))
    return layer.norm3(x + layer._ff_block(x))


class Seq2SeqTransformer(torch.nn.Module):
    """Embeddings and positions of both sequences, ``nn.Transformer``, a linear layer to logits.

    Shapes: ``src (N, S)`` and ``tgt (N, T)``, integers; output ``(N, T, tgt_vocab_size)``: at t the logits of target token
    t + 1, from the whole source and target tokens up to t.

    Args:
        num_encoder_layers, num_decoder_layers: how many of each.
        emb_size: features of a token.
        nhead: heads of each attention; they share the features.
        src_vocab_size, tgt_vocab_size: how many tokens each language has.
        dim_feedforward: features between the two linear layers of a layer's perceptron.
        dropout: probability with which embeddings, attention weights and the results of the sublayers are dropped.
        maxlen: the longest sequence.
        activation: of that perceptron, "relu" or "gelu" or a function.
        norm_first: norms before the sublayers instead of after the sums.

    Raises:
        ValueError: of a call, a sequence is longer than ``maxlen``.

    Example::

        model = fastnn.models.Seq2SeqTransformer(2, 2, 64, 4, src_vocab_size=30, tgt_vocab_size=20)
        src, tgt = torch.randint(30, (8, 12)), torch.randint(20, (8, 10))
        logits = model(src, tgt[:, :-1])  # (8, 9, 20)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tgt[:, 1:].flatten())
        translated = model.eval().greedy_decode(src, 10, start_symbol=1, end_symbol=2)
    """

    def __init__(
        self,
        num_encoder_layers: int,
        num_decoder_layers: int,
        emb_size: int,
        nhead: int,
        src_vocab_size: int,
        tgt_vocab_size: int,
        dim_feedforward: int = 512,
        dropout: float = 0.1,
        maxlen: int = 5000,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        norm_first: bool = False,
    ) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            emb_size, nhead, dim_feedforward, dropout, activation, batch_first=True, norm_first=norm_first
        )
        norm = nn.LayerNorm(emb_size)
        self.transformer = nn.Transformer(
            d_model=emb_size,
            nhead=nhead,
            num_decoder_layers=num_decoder_layers,
            dim_feedforward=dim_feedforward,
            dropout=dropout,
            activation=activation,
            # Padding stays in its place: nested tensors would warn that they are a prototype.
            custom_encoder=nn.TransformerEncoder(layer, num_encoder_layers, norm, enable_nested_tensor=False),
            batch_first=True,
            norm_first=norm_first,
        )
        self.generator = nn.Linear(emb_size, tgt_vocab_size)
        self.src_tok_emb = TokenEmbedding(src_vocab_size, emb_size)
        self.tgt_tok_emb = TokenEmbedding(tgt_vocab_size, emb_size)
        self.positional_encoding = PositionalEncoding(emb_size, dropout, maxlen)
        self.maxlen = maxlen
        for parameter in self.parameters():
            if parameter.dim() > 1:
                torch.nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_padding_mask: Tensor | None = None,
        tgt_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """The logits.

        Args:
            src, tgt: the tokens of both sequences.
            src_padding_mask, tgt_padding_mask: ``(N, S)`` and ``(N, T)``, booleans, true for tokens that none looks at.
        """
        memory = self.encode(src, src_padding_mask)
        return self.generator(self.decode(tgt, memory, src_padding_mask, tgt_padding_mask))

    def encode(self, src: Tensor, src_padding_mask: Tensor | None = None) -> Tensor:
        """What the decoder looks at: ``(N, S, emb_size)``."""
        self._check("src", src)
        x = self.positional_encoding(self.src_tok_emb(src))
        return self.transformer.encoder(x, src_key_padding_mask=src_padding_mask)

    def decode(
        self,
        tgt: Tensor,
        memory: Tensor,
        src_padding_mask: Tensor | None = None,
        tgt_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """The decoder's features ``(N, T, emb_size)``, which :attr:`generator` makes logits of."""
        self._check("tgt", tgt)
        length = tgt.shape[1]
        x = self.positional_encoding(self.tgt_tok_emb(tgt))
        later = torch.ones(length, length, dtype=torch.bool, device=tgt.device).triu(1)
        return self.transformer.decoder(
            x,
            memory,
            tgt_mask=later,
            tgt_is_causal=True,
            tgt_key_padding_mask=tgt_padding_mask,
            memory_key_padding_mask=src_padding_mask,
        )

    def _check(self, name: str, tokens: Tensor) -> None:
        if tokens.shape[1] > self.maxlen:
            raise ValueError(
                f"Seq2SeqTransformer: {name} must have at most {self.maxlen} tokens, got {tokens.shape[1]}"
            )

    @torch.no_grad()
    def greedy_decode(
        self,
        src: Tensor,
        max_len: int,
        start_symbol: int,
        end_symbol: int | None = None,
        src_padding_mask: Tensor | None = None,
        *,
        use_cache: bool = True,
    ) -> Tensor:
        """The likeliest next token, again and again: ``(N, T)`` with the start symbol in front, T at most ``max_len``.

        It ends when every row has the end symbol; after its own a row has nothing but end symbols. Call it in eval mode, or
        dropout disturbs the predictions. Raises ValueError for a ``max_len`` below 1, and where it is reached with more
        tokens than ``maxlen``.

        use_cache: keep the decoder's keys and values, so that a token costs a pass over itself alone. Without it, in
        training mode, and where a layer of the decoder has hooks or is not fastnn's, each token costs a pass over all.
        """
        if max_len < 1:
            raise ValueError(f"greedy_decode: max_len must be at least 1, got {max_len}")
        memory = self.encode(src, src_padding_mask)
        found = torch.full((src.shape[0], 1), start_symbol, dtype=torch.long, device=src.device)
        ended = torch.zeros(src.shape[0], dtype=torch.bool, device=src.device)
        caches = None
        if use_cache and max_len > 1 and self._keeps_keys():
            layers = self.transformer.decoder.layers
            caches = [_LayerCache(layer, memory, min(max_len - 1, self.maxlen)) for layer in layers]
        while found.shape[1] < max_len and not ended.all():
            if caches is None:
                features = self.decode(found, memory, src_padding_mask)
            else:
                features = self._decode_last(found, caches, src_padding_mask)
            chosen = self.generator(features[:, -1]).argmax(-1)
            if end_symbol is not None:
                chosen = chosen.masked_fill(ended, end_symbol)
                ended = chosen == end_symbol
            found = torch.cat([found, chosen[:, None]], dim=1)
        return found

    def _decode_last(self, tgt: Tensor, caches: list[_LayerCache], src_padding_mask: Tensor | None) -> Tensor:
        """:meth:`decode`'s features of the last token of ``tgt``, of which the caches know all others."""
        self._check("tgt", tgt)
        at = tgt.shape[1] - 1
        x = self.positional_encoding(self.tgt_tok_emb(tgt[:, at:]), at)
        mask = src_padding_mask
        if mask is not None:
            mask = (mask.logical_not() if mask.dtype is torch.bool else mask)[:, None, None]
        decoder = self.transformer.decoder
        for layer, cache in zip(decoder.layers, caches, strict=True):
            x = _next_features(layer, x, cache, at, mask)
        return x if decoder.norm is None else decoder.norm(x)

    def _keeps_keys(self) -> bool:
        """Whether the decoder's layers are as they were made, so that going around their calls changes nothing."""
        decoder = self.transformer.decoder
        return (
            type(decoder) is nn.TransformerDecoder
            and not any_global_hook()
            and all(
                type(layer) is nn.TransformerDecoderLayer
                and type(layer.self_attn) is type(layer.multihead_attn) is nn.MultiheadAttention
                and all("in_proj_weight" in part._parameters for part in (layer.self_attn, layer.multihead_attn))
                for layer in decoder.layers
            )
            and all(unwatched(module) and not module.training for module in decoder.modules())
        )
