"""Whole transformers: inference of BERT-base and ViT-B/16, a step of BERT's training, and GPT-2-small writing.

In inference fastnn's weights are packed before, as the peers of :mod:`fastnn.bench.peers` treat theirs as constants.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastnn

from . import peers
from .benchmark import MODEL_PAUSE, Benchmark, Problem, register
from .gemm import PEAKS

#: Twelve layers, each of which rounds some ten times: torch.compile's bfloat16, which keeps some results in float32, is this
#: far from torch's.
_TOLERANCE = {torch.bfloat16: 3e-2}

#: Of the linear layers of all three, embeddings and head left out; a multiplication each for every token.
_WEIGHTS = 12 * (4 * 768 * 768 + 2 * 768 * 3072)


def multiplications(tokens: int, keys: float) -> float:
    """Of the twelve layers, for `tokens` that look at so many keys each."""
    return tokens * (_WEIGHTS + 12 * 2 * 768 * keys)


class Hidden(torch.nn.Module):
    """A model whose first result is the last hidden state, and that alone: from one tensor to one tensor."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input: Tensor) -> Tensor:
        return self.model(input)[0]


def bert(length: int) -> torch.nn.Module:
    return Hidden(fastnn.models.bert_base(max_position_embeddings=length, add_pooling_layer=False))


def _vit(edge: int) -> torch.nn.Module:
    model = fastnn.models.vit_b_16(image_size=edge)
    # It starts at zero, and zeros are easily equal.
    torch.nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


def inference(
    make: Callable[..., torch.nn.Module],
    inputs: Callable[..., Tensor],
    count: Callable[[tuple[int, ...]], float],
    fuse: bool = False,
) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    """A model that ``make`` makes of the shape's numbers after the first, converted, fused if asked for, and packed, against torch's and the peers'.

    ``inputs`` makes one of shape and dtype; ``count`` tells the multiplications.
    """

    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        ours = fastnn.convert(make(*shape[1:]).eval().to(dtype), fuse=fuse)
        theirs = fastnn.revert(copy.deepcopy(ours))
        fastnn.prepack_(ours)

        def run(model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
            def call(x: Tensor) -> Tensor:
                with torch.inference_mode():
                    return model(x)

            return call

        return Problem(
            lambda: (inputs(*shape, dtype),),
            {"fastnn": run(ours), "torch": run(theirs)} | peers.contestants(theirs, dtype, channels_last=False),
            2 * count(shape),
            peak=PEAKS[dtype],
            absent=peers.absent(dtype),
            tolerance=_TOLERANCE.get(dtype, 1e-4),
            pause=MODEL_PAUSE,
        )

    return build


def random_tokens(n: int, length: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(1, 30522, (n, length))


def images(n: int, edge: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, 3, edge, edge).to(dtype)


def patches(edge: int) -> int:
    return (edge // 16) ** 2 + 1


def _step(autocast: bool = False) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    """Forward, loss of a classifier and backward; the optimizer is torch's for both. Nothing is dropped, so that the losses can
    be compared. With `autocast` the parameters are float32, and the dtype is that of `torch.autocast`."""

    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        n, length = shape
        kept = torch.float32 if autocast else dtype
        ours = fastnn.models.bert_base(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).to(kept)
        head = fastnn.nn.Linear(768, 2, dtype=kept)
        theirs, their_head = fastnn.revert(copy.deepcopy(ours)), fastnn.revert(copy.deepcopy(head))

        def run(model: torch.nn.Module, last: torch.nn.Module) -> Callable[..., Any]:
            def call(tokens: Tensor, target: Tensor) -> Tensor:
                model.zero_grad(set_to_none=True)
                last.zero_grad(set_to_none=True)
                with torch.autocast("cpu", dtype) if autocast else contextlib.nullcontext():
                    logits = last(model(tokens).pooler_output)
                loss = F.cross_entropy(logits.float(), target)
                loss.backward()
                return loss.detach()

            return call

        return Problem(
            lambda: (random_tokens(n, length, dtype), torch.randint(2, (n,))),
            {"fastnn": run(ours, head), "torch": run(theirs, their_head)},
            6 * multiplications(n * length, length),
            peak=PEAKS[dtype],
            tolerance=1e-4 if kept == dtype else _TOLERANCE[dtype],
        )

    return build


class _StaticGPT(torch.nn.Module):
    """torch's GPT in the form that torch.compile is quickest with: tensors of one size, whatever is in the cache."""

    def __init__(self, model: torch.nn.Module, capacity: int) -> None:
        super().__init__()
        self.model = model
        self.capacity = capacity

    def caches(self) -> list[Tensor]:
        model = self.model
        shape = (1, model.n_head, self.capacity, model.n_embd // model.n_head)
        return [torch.zeros(shape) for _ in range(2 * model.n_layer)]

    def forward(self, tokens: Tensor, positions: Tensor, caches: list[Tensor]) -> Tensor:
        parts = self.model.transformer
        x = parts["wte"](tokens) + parts["wpe"](positions)
        visible = torch.arange(self.capacity) <= positions[:, None]
        for layer, block in enumerate(parts["h"]):
            qkv = block.attn.c_attn(block.ln_1(x)).unflatten(-1, (3, self.model.n_head, -1))
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            keys, values = caches[2 * layer : 2 * layer + 2]
            keys.index_copy_(2, positions, key)
            values.index_copy_(2, positions, value)
            y = F.scaled_dot_product_attention(query, keys, values, visible)
            x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        return self.model.lm_head(parts["ln_f"](x[:, -1]))


def _writing(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    """A prompt, then one token after the other. The tokens are given, since by chance two may be equally likely; the
    likeliest is looked for all the same."""
    prompt, new = shape
    ours = fastnn.models.gpt2().eval().to(dtype)
    theirs = fastnn.revert(copy.deepcopy(ours))
    fastnn.prepack_(ours)
    static = _StaticGPT(theirs, prompt + new)

    def run(model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
        def call(tokens: Tensor) -> Tensor:
            with torch.inference_mode():
                cache = fastnn.models.KVCache(model, 1, prompt + new)
                logits = model(tokens[:, :prompt], cache, logits_to_keep=1)[:, -1]
                for position in range(prompt, prompt + new):
                    logits.argmax(-1)
                    logits = model(tokens[:, position : position + 1], cache)[:, -1]
                return logits

        return call

    def compiled() -> Callable[[Tensor], Tensor]:
        torch.compiler.reset()
        step = torch.compile(static, fullgraph=True, dynamic=False, options={"freezing": True})
        every = torch.arange(prompt + new)

        def call(tokens: Tensor) -> Tensor:
            with torch.inference_mode():
                caches = static.caches()
                logits = step(tokens[:, :prompt].contiguous(), every[:prompt], caches)
                for position in range(prompt, prompt + new):
                    logits.argmax(-1)
                    at = slice(position, position + 1)
                    logits = step(tokens[:, at].contiguous(), every[at].clone(), caches)
                return logits

        return call

    head = 50257 * 768
    return Problem(
        lambda: (torch.randint(50257, (1, prompt + new)),),
        {"fastnn": run(ours), "torch": run(theirs), "torch.compile": compiled()},
        2 * (multiplications(prompt + new, (prompt + new) / 2) + (new + 1) * head),
        peak=PEAKS[dtype],
        tolerance=1e-4,
    )


_FLOATS = (torch.float32, torch.bfloat16)
register(
    Benchmark(
        "bert_base_inference",
        "NxL",
        ((1, 128), (8, 128)),
        inference(bert, random_tokens, lambda shape: multiplications(shape[0] * shape[1], shape[1])),
        _FLOATS,
    )
)
register(
    Benchmark(
        "vit_b_16_inference",
        "NxEDGE",
        ((1, 224), (8, 224)),
        inference(
            _vit,
            images,
            lambda shape: (
                multiplications(shape[0] * patches(shape[1]), patches(shape[1])) + shape[0] * 3 * 768 * shape[1] ** 2
            ),
        ),
        _FLOATS,
    )
)
register(Benchmark("bert_base_train", "NxL", ((4, 128),), _step(), (torch.float32,)))
register(Benchmark("bert_base_train_autocast", "NxL", ((4, 128),), _step(autocast=True), (torch.bfloat16,)))
register(Benchmark("gpt2_writing", "PROMPTxNEW", ((256, 64),), _writing, (torch.float32,)))
