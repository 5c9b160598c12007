"""GPT: a decoder-only transformer that predicts each token from those before it.

Source: Radford, Wu, Child, Luan, Amodei, Sutskever 2019, "Language models are unsupervised multitask learners" (GPT-2):
norms before the sublayers and one at the end, learned positions, gelu in its tanh form, residual projections that start
smaller by √(2 layers). The ``state_dict`` keys (``transformer.wte.weight``, ``transformer.h.0.attn.c_attn.weight``, ...)
are those of Hugging Face's ``GPT2LMHeadModel`` and of nanoGPT; the weights of its linear layers are ``(out, in)`` as in
nanoGPT, and :func:`gpt2_state` turns those of Hugging Face's ``Conv1D``. As GPT-2-small it has 124,439,808 parameters.

The model knows tokens as integers alone: characters, bytes or the pieces of any tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import nn
from ..nn.mlp import run_layers
from .heads import join_heads, split_projections
from .sampling import check_sampling, probabilities


class KVCache:
    """The keys and values of the tokens that a :class:`GPT` has seen: memory for `capacity` of them in each layer.

    Args:
        model: whose layers, heads, dtype and device it has.
        batch: how many rows of tokens.
        capacity: how many tokens a row can have; the model's ``block_size`` by default.

    Attributes:
        length: how many tokens are in it.
    """

    def __init__(self, model: GPT, batch: int, capacity: int | None = None) -> None:
        self.capacity = model.block_size if capacity is None else capacity
        self.length = 0
        self.batch = batch
        weight = model.transformer.wte.weight
        shape = (batch, model.n_head, self.capacity, model.n_embd // model.n_head)
        made = [torch.empty(shape, dtype=weight.dtype, device=weight.device) for _ in range(2 * model.n_layer)]
        self._keys, self._values = made[::2], made[1::2]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes what a layer has computed for the next tokens; all its keys and values, as views ``(N, heads, S, d)``.

        ``length`` is the model's to change, when the last layer has written.
        """
        end = self.length + key.shape[2]
        keys, values = self._keys[layer], self._values[layer]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]


class CausalSelfAttention(torch.nn.Module):
    """Queries, keys and values from one linear layer; each token looks at itself and at those before it. A ``residual`` is
    added to the result.

    Shapes: input, residual and output ``(N, L, n_embd)``.
    """

    def __init__(self, n_embd: int, n_head: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.n_head = n_head
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.attention = nn.DotProductAttention()
        self.resid_dropout = nn.Dropout(dropout)
        self.dropout = dropout

    def forward(
        self, x: Tensor, cache: KVCache | None = None, layer: int = 0, residual: Tensor | None = None
    ) -> Tensor:
        query, key, value = split_projections(self.c_attn(x), self.n_head)
        length = x.shape[1]
        mask = None
        if cache is not None:
            key, value = cache.append(layer, key, value)
            if 1 < length < key.shape[2]:
                # torch aligns is_causal's triangle with the first key; here the last query belongs to the last key.
                mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=x.device).tril(key.shape[2] - length)
        dropout = self.dropout if self.training else 0.0
        # One query sees every key.
        y = self.attention(query, key, value, mask, dropout, is_causal=mask is None and length > 1)
        return run_layers((self.c_proj, self.resid_dropout), join_heads(y), residual)


class MLP(torch.nn.Module):
    """A linear layer to four times the width, gelu in its tanh form, and one back, to which a ``residual`` is added."""

    def __init__(self, n_embd: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
        self.act = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * n_embd, n_embd, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return run_layers((self.c_fc, self.act, self.c_proj, self.dropout), x, residual)


class Block(torch.nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, n_embd: int, n_head: int, dropout: float, bias: bool, eps: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd, eps=eps, bias=bias)
        self.attn = CausalSelfAttention(n_embd, n_head, dropout, bias)
        self.ln_2 = nn.LayerNorm(n_embd, eps=eps, bias=bias)
        self.mlp = MLP(n_embd, dropout, bias)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        x = self.attn(self.ln_1(x), cache, layer, residual=x)
        return self.mlp(self.ln_2(x), residual=x)


class GPT(torch.nn.Module):
    """Token and position embeddings, blocks of attention and a two-layer perceptron, a norm, a linear layer to logits.

    Shapes: tokens ``(N, L)``, integers, with L at most ``block_size``; output ``(N, L, vocab_size)``: at t the logits of
    token t + 1.

    Args:
        vocab_size: how many tokens there are.
        block_size: how many tokens the model can look at.
        n_layer: blocks.
        n_head: heads of each attention; they share the ``n_embd`` features.
        n_embd: features of a token.
        dropout: probability with which embeddings, attention weights and the results of the sublayers are dropped.
        bias: whether linear layers and norms have a bias (the last linear layer never has one).
        tie_weights: whether the last linear layer's weight is that of the token embedding.
        layer_norm_eps: added to the variances.

    Raises:
        ValueError: ``n_head`` does not divide ``n_embd``; or, of a call, there are more tokens than ``block_size``, or
            than the cache has room for.

    Example::

        model = fastnn.models.GPT(vocab_size=100, block_size=128, n_layer=4, n_head=4, n_embd=128)
        tokens = torch.randint(100, (2, 129))
        logits = model(tokens[:, :-1])  # (2, 128, 100)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        more = model.eval().generate(tokens[:, :5], 20, top_k=10)  # (2, 25)
    """

    def __init__(
        self,
        vocab_size: int = 50257,
        block_size: int = 1024,
        n_layer: int = 12,
        n_head: int = 12,
        n_embd: int = 768,
        dropout: float = 0.1,
        bias: bool = True,
        tie_weights: bool = True,
        layer_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"GPT: n_head must divide n_embd, got n_head={n_head} and n_embd={n_embd}")
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.n_layer = n_layer
        self.n_head = n_head
        self.n_embd = n_embd
        self.transformer = torch.nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "drop": nn.Dropout(dropout),
                "h": torch.nn.ModuleList(Block(n_embd, n_head, dropout, bias, layer_norm_eps) for _ in range(n_layer)),
                "ln_f": nn.LayerNorm(n_embd, eps=layer_norm_eps, bias=bias),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        for name, module in self.named_modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
                # The sum over all residual layers starts with the same deviation for any number of them.
                small = 1 / math.sqrt(2 * n_layer) if name.endswith("c_proj") else 1.0
                torch.nn.init.normal_(module.weight, std=0.02 * small)
                if getattr(module, "bias", None) is not None:
                    torch.nn.init.zeros_(module.bias)
        if tie_weights:
            self.lm_head.weight = self.transformer.wte.weight

    def forward(self, tokens: Tensor, cache: KVCache | None = None, *, logits_to_keep: int = 0) -> Tensor:
        """The logits of the tokens that follow.

        Args:
            tokens: with a cache, those after the ones that are in it.
            cache: keeps these tokens' keys and values. A call under which gradients are recorded cannot use one.
            logits_to_keep: of how many tokens at the end the logits are wanted; 0, or more than there are, stands for all.

        Raises ValueError for a negative ``logits_to_keep``, for more tokens than there is room for, and for other rows than
        the cache has.
        """
        if logits_to_keep < 0:
            raise ValueError(f"GPT: logits_to_keep must not be negative, got {logits_to_keep}")
        past = 0 if cache is None else cache.length
        if cache is not None and tokens.shape[0] != cache.batch:
            raise ValueError(f"GPT: tokens has {tokens.shape[0]} rows, for a cache of {cache.batch}")
        end = past + tokens.shape[1]
        room = self.block_size if cache is None else min(self.block_size, cache.capacity)
        if end > room:
            raise ValueError(
                f"GPT: tokens must be at most {room} with those before them, got {past} + {tokens.shape[1]}"
            )
        positions = torch.arange(past, end, device=tokens.device)
        parts = self.transformer
        x = parts["drop"](parts["wte"](tokens) + parts["wpe"](positions))
        for layer, block in enumerate(parts["h"]):
            x = block(x, cache, layer)
        if cache is not None:
            cache.length = end
        if logits_to_keep:
            x = x[:, -logits_to_keep:]
        return self.lm_head(parts["ln_f"](x))

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Continues each row of tokens by ``max_new_tokens``; ``(N, L)`` becomes ``(N, L + max_new_tokens)``.

        Each new token is predicted from the last ``block_size`` tokens before it. Call it in eval mode, or dropout
        disturbs the predictions.

        Args:
            tokens: one at least in each row.
            max_new_tokens: 0 or more.
            do_sample: draw from :func:`probabilities`; otherwise the likeliest token is taken, of several the first.
            temperature, top_k, top_p: of the distribution, see :func:`probabilities`.
            generator: where the random numbers come from, torch's default one by default.
            use_cache: keep keys and values of the tokens seen, as long as they are not more than ``block_size``. Without
                it, or beyond, each token costs a pass over all that it is predicted from.

        Raises:
            ValueError: ``tokens`` is not of shape ``(N, L)`` with L at least 1, ``max_new_tokens`` is negative, or a
                number names no distribution.
        """
        if tokens.dim() != 2 or tokens.shape[1] < 1:
            raise ValueError(f"generate: tokens must have the shape (N, L), L at least 1, got {tuple(tokens.shape)}")
        if max_new_tokens < 0:
            raise ValueError(f"generate: max_new_tokens must not be negative, got {max_new_tokens}")
        check_sampling(temperature, top_k, top_p)
        start = tokens.shape[1]
        found = tokens.new_empty((tokens.shape[0], start + max_new_tokens))
        found[:, :start] = tokens
        cache = None
        if use_cache and start <= self.block_size:
            cache = KVCache(self, tokens.shape[0], min(start + max_new_tokens, self.block_size))
        for end in range(start, start + max_new_tokens):
            # Positions are absolute: once the window moves, every token of it gets another.
            if end > self.block_size:
                cache = None
            seen = max(0, end - self.block_size) if cache is None else cache.length
            logits = self(found[:, seen:end], cache, logits_to_keep=1)[:, -1]
            if do_sample:
                drawn = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
                found[:, end] = torch.multinomial(drawn, 1, generator=generator)[:, 0]
            else:
                found[:, end] = logits.argmax(-1)
        return found


def gpt2(**kwargs: Any) -> GPT:
    """GPT-2-small with random weights: 12 layers and heads, 768 features; the other arguments are :class:`GPT`'s."""
    return GPT(**kwargs)


#: The layers that Hugging Face holds as ``Conv1D``.
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def gpt2_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The ``state_dict`` of Hugging Face's ``GPT2LMHeadModel`` as one that :class:`GPT` loads.

    Its ``Conv1D`` layers keep their weights as ``(in, out)``; here they are turned. The buffers of its causal masks, which
    old checkpoints have, are left out.
    """
    return {
        name: value.t().contiguous() if name.endswith(_CONV1D) else value
        for name, value in state.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
