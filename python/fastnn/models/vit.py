"""ViT: a transformer encoder on the patches of an image.

Source: Dosovitskiy et al. 2020, "An image is worth 16x16 words: Transformers for image recognition at scale",
arXiv:2010.11929, table 1; the convolutional stem is that of Xiao et al. 2021, arXiv:2106.14881. Constructor, ``state_dict``
keys (``conv_proj.weight``, ``encoder.layers.encoder_layer_0.self_attention.in_proj_weight``, ``heads.head.weight``, ...) and
initialisation are torchvision's. With 1,000 classes ViT-B/16 has 86,567,656 parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import nn
from ..nn.attention import attend_and_add
from ..nn.mlp import run_layers

Norm = Callable[[int], torch.nn.Module]

_NORM = partial(nn.LayerNorm, eps=1e-6)


class ConvStemConfig(NamedTuple):
    """One convolution of a stem that takes the place of the patches' one, with norm and activation."""

    out_channels: int
    kernel_size: int
    stride: int
    norm_layer: Norm = nn.BatchNorm2d
    activation_layer: Callable[[], torch.nn.Module] = nn.ReLU


class EncoderBlock(torch.nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``. Shapes: input and output ``(N, L, hidden_dim)``."""

    def __init__(
        self,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        dropout: float,
        attention_dropout: float,
        norm_layer: Norm,
    ) -> None:
        super().__init__()
        self.ln_1 = norm_layer(hidden_dim)
        self.self_attention = nn.MultiheadAttention(hidden_dim, num_heads, dropout=attention_dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.ln_2 = norm_layer(hidden_dim)
        self.mlp = torch.nn.Sequential(
            nn.Linear(hidden_dim, mlp_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(mlp_dim, hidden_dim),
            nn.Dropout(dropout),
        )
        for layer in (self.mlp[0], self.mlp[3]):
            torch.nn.init.xavier_uniform_(layer.weight)
            torch.nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = attend_and_add(self.self_attention, self.dropout, self.ln_1(x), x)
        return run_layers(self.mlp, self.ln_2(x), x)


class Encoder(torch.nn.Module):
    """Learned positions, the blocks, a norm."""

    def __init__(
        self,
        seq_length: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        dropout: float,
        attention_dropout: float,
        norm_layer: Norm,
    ) -> None:
        super().__init__()
        self.pos_embedding = torch.nn.Parameter(torch.empty(1, seq_length, hidden_dim).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)
        self.layers = torch.nn.Sequential()
        for number in range(num_layers):
            block = EncoderBlock(num_heads, hidden_dim, mlp_dim, dropout, attention_dropout, norm_layer)
            self.layers.add_module(f"encoder_layer_{number}", block)
        self.ln = norm_layer(hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(self.layers(self.dropout(x + self.pos_embedding)))


class VisionTransformer(torch.nn.Module):
    """Patches as tokens, a token for the class before them, a transformer encoder, a linear layer on the class's token.

    Shapes: input ``(N, 3, image_size, image_size)``, output ``(N, num_classes)``, logits.

    Args:
        image_size: height and width of an image.
        patch_size: height and width of a patch; it divides ``image_size``.
        num_layers: encoder blocks.
        num_heads: heads of each attention; they share the features.
        hidden_dim: features of a token.
        mlp_dim: features between the two linear layers of a block's perceptron.
        dropout: probability with which embeddings and the results of the sublayers are dropped.
        attention_dropout: the same of attention weights.
        num_classes: how many logits come out.
        representation_size: features of a linear layer with tanh before the last one; none by default.
        norm_layer: makes the norm for a number of features; layer norm with an epsilon of 1e-6 by default.
        conv_stem_configs: convolutions in the place of the one that makes the patches; their strides multiply to
            ``patch_size``.

    Raises:
        ValueError: ``image_size`` is no multiple of ``patch_size``; or, of a call, the image has another size.

    Example::

        model = fastnn.models.vit_b_16(num_classes=10)
        logits = model(torch.randn(2, 3, 224, 224))  # (2, 10)
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        num_classes: int = 1000,
        representation_size: int | None = None,
        norm_layer: Norm = _NORM,
        conv_stem_configs: Sequence[ConvStemConfig] | None = None,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"VisionTransformer: patch_size must divide image_size, got {patch_size=} and {image_size=}"
            )
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_dim = hidden_dim
        if conv_stem_configs is None:
            self.conv_proj = nn.Conv2d(3, hidden_dim, kernel_size=patch_size, stride=patch_size)
            last = self.conv_proj
        else:
            self.conv_proj, last = _stem(conv_stem_configs, hidden_dim)
        self.class_token = torch.nn.Parameter(torch.zeros(1, 1, hidden_dim))
        tokens = (image_size // patch_size) ** 2 + 1
        self.encoder = Encoder(
            tokens, num_layers, num_heads, hidden_dim, mlp_dim, dropout, attention_dropout, norm_layer
        )
        self.heads = torch.nn.Sequential()
        if representation_size is None:
            self.heads.add_module("head", nn.Linear(hidden_dim, num_classes))
        else:
            self.heads.add_module("pre_logits", nn.Linear(hidden_dim, representation_size))
            self.heads.add_module("act", nn.Tanh())
            self.heads.add_module("head", nn.Linear(representation_size, num_classes))
            _truncated_normal(self.heads.pre_logits, 1 / math.sqrt(hidden_dim))
        if conv_stem_configs is None:
            _truncated_normal(last, 1 / math.sqrt(3 * patch_size**2))
        else:
            torch.nn.init.normal_(last.weight, std=math.sqrt(2.0 / last.out_channels))
            torch.nn.init.zeros_(last.bias)
        torch.nn.init.zeros_(self.heads.head.weight)
        torch.nn.init.zeros_(self.heads.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        if (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"VisionTransformer: images must be {self.image_size}×{self.image_size}, got {height}×{width}"
            )
        # (N, hidden_dim, rows, columns) to (N, patches, hidden_dim)
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(n, -1, -1), x], dim=1)
        return run_layers(self.heads, self.encoder(x)[:, 0])


def _stem(configs: Sequence[ConvStemConfig], hidden_dim: int) -> tuple[torch.nn.Sequential, torch.nn.Module]:
    """Convolutions of 3×3 or so, each with norm and activation, and a 1×1 one to the features; and that one."""
    stem, channels = torch.nn.Sequential(), 3
    for number, config in enumerate(configs):
        layers = torch.nn.Sequential(
            nn.Conv2d(
                channels,
                config.out_channels,
                config.kernel_size,
                config.stride,
                (config.kernel_size - 1) // 2,
                bias=False,
            ),
            config.norm_layer(config.out_channels),
            config.activation_layer(),
        )
        stem.add_module(f"conv_bn_relu_{number}", layers)
        channels = config.out_channels
    last = nn.Conv2d(channels, hidden_dim, kernel_size=1)
    stem.add_module("conv_last", last)
    return stem, last


def _truncated_normal(layer: torch.nn.Module, deviation: float) -> None:
    torch.nn.init.trunc_normal_(layer.weight, std=deviation)
    torch.nn.init.zeros_(layer.bias)


def vit_b_16(**kwargs: Any) -> VisionTransformer:
    """ViT-B/16 with random weights: 12 layers and heads, 768 features; the other arguments are the class's."""
    arguments = dict(image_size=224, patch_size=16, num_layers=12, num_heads=12, hidden_dim=768, mlp_dim=3072)
    return VisionTransformer(**arguments | kwargs)
