"""The transformers of `fastnn.models` once more, in plain `torch.nn`: written from the papers' formulas, not from fastnn's code.

Attention is its formula, with the weights of all pairs at once; everything else without parameters is a function.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


def heads_of(x, heads):
    return torch.stack(x.chunk(heads, dim=-1), dim=1)


def attend(q, k, v, heads, visible=None, dropout=0.0):
    """q, k and v with all heads side by side; `visible` says which key a query may look at."""
    q, k, v = (heads_of(x, heads) for x in (q, k, v))
    scores = torch.einsum("nhld,nhsd->nhls", q, k) / math.sqrt(q.shape[-1])
    if visible is not None:
        scores = torch.where(visible, scores, -torch.inf)
    weights = F.dropout(torch.softmax(scores, -1), dropout)
    return torch.cat(torch.einsum("nhls,nhsd->nhld", weights, v).unbind(1), dim=-1)


def earlier(length, device=None):
    """(L, L), true where the key does not come after the query."""
    at = torch.arange(length)
    return at[None, :] <= at[:, None]


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def norm(layer, x):
    """Layer norm as written: not the kernel that torch has for it."""
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + layer.eps) * layer.weight
    return scaled if layer.bias is None else scaled + layer.bias


class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd, dropout=0.0, bias=True, tie_weights=True):
        super().__init__()
        self.heads, self.dropout = n_head, dropout
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(vocab_size, n_embd)
        self.transformer.wpe = nn.Embedding(block_size, n_embd)
        self.transformer.h = nn.ModuleList()
        for _ in range(n_layer):
            block = nn.Module()
            block.ln_1 = nn.LayerNorm(n_embd, bias=bias)
            block.attn = nn.ModuleDict(
                {"c_attn": nn.Linear(n_embd, 3 * n_embd, bias), "c_proj": nn.Linear(n_embd, n_embd, bias)}
            )
            block.ln_2 = nn.LayerNorm(n_embd, bias=bias)
            block.mlp = nn.ModuleDict(
                {"c_fc": nn.Linear(n_embd, 4 * n_embd, bias), "c_proj": nn.Linear(4 * n_embd, n_embd, bias)}
            )
            self.transformer.h.append(block)
        self.transformer.ln_f = nn.LayerNorm(n_embd, bias=bias)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        if tie_weights:
            self.lm_head.weight = self.transformer.wte.weight

    def drop(self, x):
        return F.dropout(x, self.dropout, self.training)

    def forward(self, tokens):
        length = tokens.shape[1]
        x = self.drop(self.transformer.wte.weight[tokens] + self.transformer.wpe.weight[:length])
        for block in self.transformer.h:
            q, k, v = block.attn["c_attn"](norm(block.ln_1, x)).split(x.shape[-1], dim=-1)
            y = attend(q, k, v, self.heads, earlier(length), self.dropout if self.training else 0.0)
            x = x + self.drop(block.attn["c_proj"](y))
            x = x + self.drop(block.mlp["c_proj"](gelu_tanh(block.mlp["c_fc"](norm(block.ln_2, x)))))
        return self.lm_head(norm(self.transformer.ln_f, x))


class Bert(nn.Module):
    def __init__(self, vocab, width, layers, heads, inner, positions=512, types=2, pad=0, pooled=True):
        super().__init__()
        self.heads, self.pooled = heads, pooled
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(vocab, width, padding_idx=pad),
                "position_embeddings": nn.Embedding(positions, width),
                "token_type_embeddings": nn.Embedding(types, width),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )

        def end(inputs):
            return nn.ModuleDict({"dense": nn.Linear(inputs, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

        def layer():
            projections = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
            return nn.ModuleDict(
                {
                    "attention": nn.ModuleDict({"self": projections, "output": end(width)}),
                    "intermediate": nn.ModuleDict({"dense": nn.Linear(width, inner)}),
                    "output": end(inner),
                }
            )

        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layer() for _ in range(layers))})
        if pooled:
            self.pooler = nn.ModuleDict({"dense": nn.Linear(width, width)})

    def forward(self, tokens, mask=None, types=None, positions=None):
        at = torch.arange(tokens.shape[1]) if positions is None else positions
        types = torch.zeros_like(tokens) if types is None else types
        words = F.embedding(tokens, *self.embeddings["word_embeddings"].parameters(), self.padding())
        x = words + self.embeddings["position_embeddings"](at) + self.embeddings["token_type_embeddings"](types)
        x = norm(self.embeddings["LayerNorm"], x)
        visible = None if mask is None else mask[:, None, None, :] != 0
        for layer in self.encoder["layer"]:
            parts = layer["attention"]["self"]
            y = attend(*(parts[name](x) for name in ("query", "key", "value")), self.heads, visible)
            end = layer["attention"]["output"]
            x = norm(end["LayerNorm"], x + end["dense"](y))
            y = gelu(layer["intermediate"]["dense"](x))
            x = norm(layer["output"]["LayerNorm"], x + layer["output"]["dense"](y))
        return x, self.pooler["dense"](x[:, 0]).tanh() if self.pooled else None

    def padding(self):
        return self.embeddings["word_embeddings"].padding_idx


class Packed(nn.Module):
    """The parameters of `nn.MultiheadAttention` and its formula."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) / math.sqrt(width))
        self.in_proj_bias = nn.Parameter(torch.randn(3 * width) / 10)
        self.out_proj = nn.Linear(width, width)

    def forward(self, target, source, visible=None):
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (x @ w.T + b for x, w, b in zip((target, source, source), weights, biases, strict=True))
        return self.out_proj(attend(q, k, v, self.heads, visible))


class VisionTransformer(nn.Module):
    def __init__(self, image, patch, layers, heads, width, inner, classes=1000, representation=None, stem=None):
        super().__init__()
        self.patch = patch
        if stem is None:
            self.conv_proj = nn.Conv2d(3, width, patch, patch)
        else:
            rows = [3, *(channels for channels, _, _ in stem)]
            self.conv_proj = nn.ModuleDict()
            for number, (channels, kernel, stride) in enumerate(stem):
                conv = nn.Conv2d(rows[number], channels, kernel, stride, kernel // 2, bias=False)
                self.conv_proj[f"conv_bn_relu_{number}"] = nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())
            self.conv_proj["conv_last"] = nn.Conv2d(rows[-1], width, 1)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.encoder = nn.Module()
        self.encoder.pos_embedding = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) / 10)
        self.encoder.layers = nn.ModuleDict()
        for number in range(layers):
            block = nn.ModuleDict({"ln_1": nn.LayerNorm(width, eps=1e-6), "self_attention": Packed(width, heads)})
            block["ln_2"] = nn.LayerNorm(width, eps=1e-6)
            block["mlp"] = nn.ModuleDict({"0": nn.Linear(width, inner), "3": nn.Linear(inner, width)})
            self.encoder.layers[f"encoder_layer_{number}"] = block
        self.encoder.ln = nn.LayerNorm(width, eps=1e-6)
        self.heads = nn.ModuleDict()
        if representation:
            self.heads["pre_logits"] = nn.Linear(width, representation)
        self.heads["head"] = nn.Linear(representation or width, classes)

    def patches(self, x):
        """The convolution as what it is: a linear layer on each patch."""
        if isinstance(self.conv_proj, nn.ModuleDict):
            for name in self.conv_proj:
                x = self.conv_proj[name](x)
            return x.flatten(2).mT
        columns = F.unfold(x, self.patch, stride=self.patch)
        return columns.mT @ self.conv_proj.weight.flatten(1).T + self.conv_proj.bias

    def forward(self, x):
        patches = self.patches(x)
        x = torch.cat([self.class_token.repeat(len(x), 1, 1), patches], 1) + self.encoder.pos_embedding
        for block in self.encoder.layers.values():
            y = norm(block["ln_1"], x)
            x = x + block["self_attention"](y, y)
            x = x + block["mlp"]["3"](gelu(block["mlp"]["0"](norm(block["ln_2"], x))))
        x = norm(self.encoder.ln, x[:, 0])
        if "pre_logits" in self.heads:
            x = self.heads["pre_logits"](x).tanh()
        return self.heads["head"](x)


class Seq2Seq(nn.Module):
    def __init__(self, encoders, decoders, width, heads, sources, targets, inner, maxlen, activation, norm_first=False):
        super().__init__()
        self.activation, self.norm_first = activation, norm_first

        def layer(attentions):
            found = nn.ModuleDict({name: Packed(width, heads) for name in attentions})
            found["linear1"], found["linear2"] = nn.Linear(width, inner), nn.Linear(inner, width)
            for number in range(len(attentions) + 1):
                found[f"norm{number + 1}"] = nn.LayerNorm(width)
            return found

        def stack(count, *attentions):
            layers = nn.ModuleList(layer(attentions) for _ in range(count))
            return nn.ModuleDict({"layers": layers, "norm": nn.LayerNorm(width)})

        both = {"encoder": stack(encoders, "self_attn"), "decoder": stack(decoders, "self_attn", "multihead_attn")}
        self.transformer = nn.ModuleDict(both)
        self.generator = nn.Linear(width, targets)
        self.src_tok_emb = nn.ModuleDict({"embedding": nn.Embedding(sources, width)})
        self.tgt_tok_emb = nn.ModuleDict({"embedding": nn.Embedding(targets, width)})
        table = torch.zeros(maxlen, 1, width)
        for t in range(maxlen):
            for feature in range(width):
                angle = t / 10000 ** (feature // 2 * 2 / width)
                table[t, 0, feature] = math.cos(angle) if feature % 2 else math.sin(angle)
        self.positional_encoding = nn.Module()
        self.positional_encoding.register_buffer("pos_embedding", table)

    def embedded(self, table, tokens):
        x = table["embedding"].weight[tokens] * math.sqrt(table["embedding"].weight.shape[1])
        return x + self.positional_encoding.pos_embedding[: tokens.shape[1]].transpose(0, 1)

    def through(self, stack, x, sublayers):
        for layer in stack["layers"]:
            steps = [lambda y, layer=layer, call=call: call(layer, y) for call in sublayers]
            steps.append(lambda y, layer=layer: layer["linear2"](self.activation(layer["linear1"](y))))
            for number, step in enumerate(steps, start=1):
                normed = layer[f"norm{number}"]
                x = x + step(norm(normed, x)) if self.norm_first else norm(normed, x + step(x))
        return norm(stack["norm"], x)

    def forward(self, src, tgt, src_pad=None, tgt_pad=None):
        seen = None if src_pad is None else ~src_pad[:, None, None, :]
        before = earlier(tgt.shape[1])
        before = before if tgt_pad is None else before & ~tgt_pad[:, None, None, :]
        encoder = [lambda layer, y: layer["self_attn"](y, y, seen)]
        memory = self.through(self.transformer["encoder"], self.embedded(self.src_tok_emb, src), encoder)
        decoder = [
            lambda layer, y: layer["self_attn"](y, y, before),
            lambda layer, y: layer["multihead_attn"](y, memory, seen),
        ]
        return self.generator(self.through(self.transformer["decoder"], self.embedded(self.tgt_tok_emb, tgt), decoder))
