"""Measures the rows of the speed table: `python bench/speed.py [row ...]`, all of them by default.

Each row writes `bench/results/<machine>/<row>.json`; `python bench/readme.py` makes README's table from those files, of all
machines side by side. A row runs in a process of its own, because the instruction set is chosen when fastnn is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"  # a folder a machine

Shape = tuple[int, ...]
Work = tuple[str, Shape]


@dataclass(frozen=True)
class Row:
    """One line of the table: what is run, and what its ratios to the fastest peer must reach, if anything (each of them;
    their geometric mean)."""

    name: str
    title: str
    work: tuple[Work, ...]
    dtype: str = "float32"
    least: float | None = None
    mean: float | None = None
    isa: str | None = None

    def met(self, measured: dict[str, Any]) -> bool | None:
        """Whether what was measured reaches what it must; None if that is nothing."""
        pairs = ((measured["least"], self.least), (measured["geometric_mean"], self.mean))
        reached = [value >= target for value, target in pairs if target is not None]
        return all(reached) if reached else None


def _each(benchmark: str, shapes: tuple[Shape, ...]) -> tuple[Work, ...]:
    return tuple((benchmark, shape) for shape in shapes)


def _squares(*sizes: int) -> tuple[Shape, ...]:
    return tuple((n, n, n) for n in sizes)


#: M×N×K, and B×M×N×K for the batched ones.
SIXTY: tuple[Work, ...] = (
    *_each("matmul", _squares(16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)),
    *_each(
        "matmul",
        tuple(
            (m, n, k)
            for m in (1, 4, 8, 16, 32, 64)
            for n, k in ((768, 768), (3072, 768), (768, 3072), (4096, 1024), (4096, 4096))
        ),
    ),
    # tall, wide, small K
    *_each("matmul", ((16384, 64, 256), (8192, 128, 512), (4096, 16, 4096))),
    *_each("matmul", ((64, 16384, 256), (128, 8192, 512), (16, 4096, 4096))),
    *_each("matmul", ((1024, 1024, 8), (4096, 4096, 16), (2048, 2048, 32), (1024, 1024, 64))),
    *_each("bmm", ((16, 64, 64, 64), (256, 64, 64, 64), (16, 128, 64, 128), (128, 128, 64, 128))),
)
assert len(SIXTY) == 60

#: C×H×W×M×K×S (filters, edge of a filter, stride): every kind of layer in ResNet-50 and AlexNet, and the pointwise ones of
#: MobileNetV2; and C×H×W×K×S for MobileNetV2's depthwise ones.
_RESNET50 = (
    (3, 224, 224, 64, 7, 2),
    (64, 56, 56, 64, 1, 1),
    (64, 56, 56, 64, 3, 1),
    (64, 56, 56, 256, 1, 1),
    (256, 56, 56, 64, 1, 1),
    (128, 56, 56, 128, 3, 2),
    (256, 56, 56, 512, 1, 2),
    (128, 28, 28, 128, 3, 1),
    (512, 28, 28, 128, 1, 1),
    (256, 14, 14, 256, 3, 1),
    (256, 14, 14, 1024, 1, 1),
    (1024, 14, 14, 256, 1, 1),
    (512, 7, 7, 512, 3, 1),
    (512, 7, 7, 2048, 1, 1),
    (2048, 7, 7, 512, 1, 1),
)
_LAYERS = (
    *_RESNET50,
    (3, 224, 224, 64, 11, 4),
    (64, 27, 27, 192, 5, 1),
    (192, 13, 13, 384, 3, 1),
    (384, 13, 13, 256, 3, 1),
    (3, 224, 224, 32, 3, 2),
    (16, 112, 112, 96, 1, 1),
    (24, 56, 56, 144, 1, 1),
    (144, 28, 28, 32, 1, 1),
    (96, 14, 14, 576, 1, 1),
    (960, 7, 7, 320, 1, 1),
)
_DEPTHWISE = (
    (32, 112, 112, 3, 1),
    (96, 112, 112, 3, 2),
    (144, 56, 56, 3, 1),
    (192, 28, 28, 3, 1),
    (576, 14, 14, 3, 1),
    (960, 7, 7, 3, 1),
)

_HUGGING_FACE = (
    ("hf_bert_base_inference", (1, 128)),
    ("hf_vit_b_16_inference", (1, 224)),
    ("hf_audio_spectrogram_inference", (1, 1024)),
)

#: B×H×L×D.
_ATTENTION = ((8, 12, 512, 64), (1, 16, 2048, 64), (1, 16, 4096, 128))


_HISTOGRAM_TREE = "histogram tree of depth 8 with its binning"
_BOOSTING = "100 boosted trees of depth 6"


def _batches(benchmark: str, layers: tuple[Shape, ...], *batches: int) -> tuple[Work, ...]:
    return tuple((benchmark, (n, *layer)) for n in batches for layer in layers)


def _pointwise(layers: tuple[Shape, ...]) -> tuple[Shape, ...]:
    return tuple(layer for layer in layers if layer[4] == 1)


def _depthwise(edge: int) -> tuple[Shape, ...]:
    """MobileNetV2's depthwise layers with filters of another edge."""
    return tuple((*maps, edge, stride) for *maps, _, stride in _DEPTHWISE)


ROWS = (
    Row(
        "gemm-float32-large",
        "float32 product, n = 1024, 2048, 4096, both operands packed in the call",
        _each("matmul", _squares(1024, 2048, 4096)),
        least=1.6,
    ),
    Row(
        "gemm-float32-prepacked",
        "float32 layer, n = 1024, 2048, 4096, weight already packed",
        _each("linear_packed", _squares(1024, 2048, 4096)),
        least=1.8,
    ),
    Row("gemm-float32-60", "float32 product, 60 shapes", SIXTY, least=1.0, mean=1.6),
    Row("gemm-bfloat16-60", "bfloat16 product, 60 shapes", SIXTY, "bfloat16", least=1.0, mean=1.8),
    Row(
        "gemm-float16",
        "float16 product, n = 256 to 1024",
        _each("matmul", _squares(256, 512, 1024)),
        "float16",
        least=2.5,
    ),
    Row(
        "gemm-int8",
        "int8 product, n = 512 to 4096, against `torch._int_mm`",
        _each("int_mm", _squares(512, 1024, 2048, 4096)),
        "int8",
        least=3.0,
    ),
    Row(
        "gemm-float8",
        "float8 product scaled to bfloat16, n = 256 to 2048, against `torch._scaled_mm` and bfloat16",
        _each("scaled_mm", _squares(256, 512, 1024, 2048)),
        "float8_e4m3fn",
    ),
    *(
        Row(
            f"int8-linear-{m}",
            f"dynamic int8 linear layer, 1024 to 4096, batch {m}, against torch's dynamic and static ones",
            (("int8_linear", (m, 4096, 1024)),),
            least=least,
        )
        for m, least in ((1, 1.2), (16, 1.8), (128, 2.5), (1024, 2.5))
    ),
    Row(
        "int8-linear-bfloat16",
        "dynamic int8 linear layer, 1024 to 4096, batch 1 to 1024, against `nn.Linear` in bfloat16",
        _each("int8_linear", tuple((m, 4096, 1024) for m in (1, 16, 128, 1024))),
        "bfloat16",
        least=1.2,
    ),
    Row(
        "int8-linear-small",
        "dynamic int8 linear layer of 64, batch 1, against torch's",
        (("int8_linear", (1, 64, 64)),),
        least=1.2,
    ),
    Row(
        "linear-train",
        "`nn.Linear` forward and backward, float32, 256–4096 wide, batch 32–1024",
        _each("linear_train", tuple((m, n, n) for n in (256, 512, 1024, 2048, 4096) for m in (32, 128, 1024))),
        mean=1.5,
    ),
    Row("linear-small", "`nn.Linear` of 64, batch 4, no gradient", _each("linear_layer", ((4, 64, 64),)), least=1.2),
    Row(
        "linear-small-grad",
        "`nn.Linear` of 64, batch 4, with gradient: forward; forward and backward",
        (*_each("linear_with_grad", ((4, 64, 64),)), *_each("linear_train", ((4, 64, 64),))),
        least=1.0,
    ),
    Row(
        "gemm-float32-avx512",
        "float32 product with `FASTNN_ISA=avx512`, n = 512 to 4096",
        _each("matmul", _squares(512, 1024, 2048, 4096)),
        least=0.95,
        isa="avx512",
    ),
    Row("relu-64mb", "relu of 64 MB, fresh output", _each("relu", ((16 << 20,),)), least=2.0),
    Row(
        "softmax",
        "softmax, 4096² and 4096×768, forward and backward, fresh output",
        (
            *_each("softmax", ((4096, 4096), (4096, 768))),
            *_each("softmax_backward", ((4096, 4096), (4096, 768))),
        ),
        least=1.5,
    ),
    Row("softmax-out", "softmax into `out`, the same", _each("softmax_out", ((4096, 4096), (4096, 768))), least=1.0),
    Row(
        "cross-entropy",
        "cross entropy of 1,024 × 32,000 and 4,096 × 1,000 logits, forward and backward",
        _each("cross_entropy", ((1024, 32000), (4096, 1000))),
        least=1.5,
    ),
    Row(
        "linear-cross-entropy",
        "linear and cross entropy, vocabulary 32,000, 1,024 tokens of 768, forward and backward",
        _each("linear_cross_entropy", ((1024, 32000, 768),)),
        least=1.5,
    ),
    Row(
        "conv-forward",
        "convolution, the layers of ResNet-50, AlexNet and MobileNetV2, batch 1 and 8",
        (*_batches("conv2d", _LAYERS, 1, 8), *_batches("conv2d_depthwise", _DEPTHWISE, 1, 8)),
        least=1.0,
        mean=1.4,
    ),
    Row(
        "conv-train",
        "the same without the depthwise ones, forward and both gradients, batch 8",
        _batches("conv2d_train", _LAYERS, 8),
        mean=1.4,
    ),
    *(
        Row(
            f"conv-bfloat16-{layout.replace('_', '-')}",
            f"bfloat16 convolution, the same layers as in float32, {words}, against torch in that layout",
            (
                *_batches(f"conv2d_{layout}", _LAYERS, 1, 8),
                *_batches(f"conv2d_depthwise_{layout}", _DEPTHWISE, 1, 8),
            ),
            "bfloat16",
            mean=mean,
        )
        for layout, words, mean in (("channels_last", "channels-last", 1.5), ("contiguous", "contiguous", 2.0))
    ),
    Row(
        "conv-depthwise",
        "depthwise 3×3 convolution, the layers of MobileNetV2, batch 1 and 8",
        _batches("conv2d_depthwise", _DEPTHWISE, 1, 8),
        least=1.5,
    ),
    *(
        Row(
            f"conv-depthwise-weight-gradient-{edge}",
            f"depthwise convolution, the layers of MobileNetV2 with {edge}×{edge} filters, batch 8, gradient of the weight",
            _batches("conv2d_depthwise_weight_gradient", _depthwise(edge), 8),
            least=least,
        )
        for edge, least in ((3, 1.5), (5, 10.0), (7, 15.0))
    ),
    Row(
        "conv-pointwise-backward",
        "1×1 convolution, the layers of ResNet-50, contiguous, batch 8, both gradients, against torch in that layout",
        _batches("conv2d_backward_contiguous", _pointwise(_RESNET50), 8),
        least=2.0,
    ),
    Row(
        "conv-first-weight-gradient",
        "7×7 convolution of 3 channels, stride 2, batch 8, gradient of the weight",
        _batches("conv2d_weight_gradient", _RESNET50[:1], 8),
        least=2.0,
    ),
    Row(
        "batch-norm",
        "batch norm in training, 32×64×56² and 32×256×14², forward",
        _each("batch_norm", ((32, 64, 56, 56), (32, 256, 14, 14))),
        least=2.5,
    ),
    Row(
        "batch-norm-relu",
        "the same, fused with relu",
        _each("batch_norm_relu", ((32, 64, 56, 56), (32, 256, 14, 14))),
        least=4.0,
    ),
    Row(
        "batch-norm-backward",
        "batch norm, backward",
        _each("batch_norm_backward", ((32, 64, 56, 56), (32, 256, 14, 14))),
        least=1.8,
    ),
    Row(
        "row-norms",
        "layer norm and rms norm, 4096² and 4096×768, forward and backward, fresh outputs",
        tuple(
            work
            for name in ("layer_norm", "layer_norm_backward", "rms_norm", "rms_norm_backward")
            for work in _each(name, ((4096, 4096), (4096, 768)))
        ),
        least=1.5,
    ),
    Row(
        "fake-quantize",
        "fake quantization to 8 bits, 4096², per tensor and per channel (rows and columns), forward",
        tuple((f"fake_quantize_{name}", (4096, 4096)) for name in ("tensor", "rows", "columns")),
        least=5.0,
    ),
    Row(
        "fake-quantize-train",
        "the same, forward and backward",
        tuple((f"fake_quantize_{name}_train", (4096, 4096)) for name in ("tensor", "rows", "columns")),
        least=3.0,
    ),
    Row(
        "fake-quantize-learned",
        "the same with learned scales and zero points, against torch's learnable ones",
        tuple((f"fake_quantize_{name}_learned", (4096, 4096)) for name in ("tensor", "rows", "columns")),
        least=3.0,
    ),
    Row(
        "max-pool",
        "max pooling 2×2 and 3×3, stride 2, forward and backward, contiguous and channels-last",
        tuple(
            (f"max_pool2d_{k}{layout}_train", (8, 64, 112, 112))
            for k in ("2x2", "3x3")
            for layout in ("", "_channels_last")
        ),
        least=2.0,
    ),
    Row(
        "attention",
        "attention, 8×12×512×64, 1×16×2048×64 and 1×16×4096×128, forward",
        _each("attention", _ATTENTION),
        least=1.8,
    ),
    Row("attention-causal", "the same, causal", _each("attention_causal", _ATTENTION), least=2.5),
    Row(
        "attention-backward",
        "the same, backward, whole and causal",
        (*_each("attention_backward", _ATTENTION), *_each("attention_causal_backward", _ATTENTION)),
        least=1.8,
    ),
    Row(
        "attention-bfloat16",
        "the same in bfloat16, forward, whole and causal",
        (*_each("attention", _ATTENTION), *_each("attention_causal", _ATTENTION)),
        "bfloat16",
        least=2.0,
    ),
    Row(
        "attention-bfloat16-backward",
        "the same in bfloat16, backward, whole and causal",
        (*_each("attention_backward", _ATTENTION), *_each("attention_causal_backward", _ATTENTION)),
        "bfloat16",
        least=2.5,
    ),
    *(
        Row(
            f"attention-decode{suffix}",
            f"decoding{words}: 32 heads, 8 of keys, a cache of 4,096, batch 1 and 8",
            _each("attention_decode", ((1, 32, 8, 4096, 128), (8, 32, 8, 4096, 128))),
            dtype,
            least=2.0,
        )
        for suffix, words, dtype in (("", "", "float32"), ("-bfloat16", " in bfloat16", "bfloat16"))
    ),
    Row(
        "resnet-inference",
        "ResNet-18 and -50, inference with `fuse=True`, batch 1 and 8",
        (*_each("resnet18_inference", ((1, 224), (8, 224))), *_each("resnet50_inference", ((1, 224), (8, 224)))),
        least=1.3,
    ),
    Row(
        "mobilenet-inference",
        "MobileNetV2, inference with `fuse=True`, batch 1 and 8",
        _each("mobilenet_v2_inference", ((1, 224), (8, 224))),
        least=1.0,
    ),
    Row(
        "cnn-inference-bfloat16",
        "ResNet-18 and -50 and MobileNetV2 in bfloat16, inference with `fuse=True`, batch 1 and 8",
        tuple((f"{name}_inference", (n, 224)) for name in ("resnet18", "resnet50", "mobilenet_v2") for n in (1, 8)),
        "bfloat16",
        least=0.9,
    ),
    Row(
        "resnet-int8",
        "ResNet-50 in static int8, batch 1 and 8, against ONNX Runtime's",
        _each("resnet50_int8", ((1, 224), (8, 224))),
        least=1.0,
    ),
    Row(
        "resnet18-train",
        "ResNet-18, forward and backward, batch 8",
        _each("resnet18_train", ((8, 224),)),
        least=1.4,
    ),
    Row(
        "resnet18-train-autocast",
        "the same under `torch.autocast` in bfloat16",
        _each("resnet18_train_autocast", ((8, 224),)),
        "bfloat16",
        least=1.4,
    ),
    Row(
        "transformer-inference",
        "BERT-base (128 tokens) and ViT-B/16, inference, batch 1 and 8",
        _each("bert_base_inference", ((1, 128), (8, 128))) + _each("vit_b_16_inference", ((1, 224), (8, 224))),
        least=1.4,
    ),
    Row(
        "transformer-inference-bfloat16",
        "the same in bfloat16",
        _each("bert_base_inference", ((1, 128), (8, 128))) + _each("vit_b_16_inference", ((1, 224), (8, 224))),
        "bfloat16",
        least=1.0,
    ),
    Row(
        "hugging-face",
        "Hugging Face's BERT-base (128 tokens), ViT-B/16 and audio spectrogram transformer (1,214 tokens), `fuse=True` and"
        " prepacked, batch 1",
        _HUGGING_FACE,
    ),
    Row("hugging-face-bfloat16", "the same in bfloat16", _HUGGING_FACE, "bfloat16"),
    Row(
        "bert-train",
        "BERT-base, forward and backward, batch 4, 128 tokens",
        _each("bert_base_train", ((4, 128),)),
        least=1.4,
    ),
    Row(
        "bert-train-autocast",
        "the same under `torch.autocast` in bfloat16",
        _each("bert_base_train_autocast", ((4, 128),)),
        "bfloat16",
        least=1.3,
    ),
    Row(
        "gpt2-writing",
        "GPT-2-small, a prompt of 256 tokens, then 64 one by one",
        _each("gpt2_writing", ((256, 64),)),
        least=1.3,
    ),
    Row(
        "bert-int8",
        "BERT-base in int8, dynamic, 128 tokens, batch 1 and 8",
        _each("bert_base_int8_dynamic", ((1, 128), (8, 128))),
        least=1.3,
    ),
    Row(
        "quantize",
        "quantization to int8 per channel (both axes) and per group of 128, 4096²",
        (
            ("quantize_per_channel_0", (4096, 4096)),
            ("quantize_per_channel_1", (4096, 4096)),
            ("quantize_groups", (4096, 4096, 128)),
        ),
        least=8.0,
    ),
    Row(
        "quantize-tensor",
        "the same per tensor",
        _each("quantize", ((4096, 4096),)),
        least=1.0,
    ),
    Row(
        "quantize-dynamic",
        "the same per token, with its scales",
        _each("quantize_per_token_dynamic", ((4096, 4096),)),
        least=8.0,
    ),
    Row(
        "quantize-stochastic",
        "stochastic rounding to int8, 4096²",
        _each("quantize_stochastic", ((4096, 4096),)),
        least=10.0,
    ),
    Row(
        "dequantize",
        "dequantization of int8, 4096², per tensor and per channel (both axes)",
        (
            ("dequantize", (4096, 4096)),
            ("dequantize_per_channel_0", (4096, 4096)),
            ("dequantize_per_channel_1", (4096, 4096)),
        ),
        least=3.0,
    ),
    Row(
        "exact-tree",
        "exact tree of depth 8, 100,000×20 and 10,000×500, one thread and two",
        _each("exact_tree", ((100_000, 20, 8, 1), (100_000, 20, 8, 2), (10_000, 500, 8, 1), (10_000, 500, 8, 2))),
        least=12,
    ),
    Row(
        "exact-tree-large",
        "exact tree of depth 8, 1,000,000×20, one thread and two",
        _each("exact_tree", ((1_000_000, 20, 8, 1), (1_000_000, 20, 8, 2))),
        least=12,
    ),
    Row(
        "exact-tree-full",
        "exact tree of full depth, 100,000×20 and 10,000×500, one thread and two",
        _each(
            "exact_tree",
            ((100_000, 20, 1000, 1), (100_000, 20, 1000, 2), (10_000, 500, 1000, 1), (10_000, 500, 1000, 2)),
        ),
        least=10,
    ),
    Row(
        "exact-tree-full-large",
        "exact tree of full depth, 1,000,000×20, one thread and two",
        _each("exact_tree", ((1_000_000, 20, 1000, 1), (1_000_000, 20, 1000, 2))),
        least=10,
    ),
    Row(
        "forest",
        "forest of 100 trees of depth 8 by histograms, 100,000×20, one job and two",
        _each("forest", ((100_000, 20, 100, 8, 1), (100_000, 20, 100, 8, 2))),
        least=2,
    ),
    Row(
        "forest-full",
        "forest of 100 trees of full depth, 100,000×20, one job and two",
        _each("forest", ((100_000, 20, 100, 1000, 1), (100_000, 20, 100, 1000, 2))),
        least=12,
    ),
    Row(
        "extra-trees",
        "extra trees, 100 of depth 8 and of full depth, 100,000×20, one job and two",
        _each("extra_trees", tuple((100_000, 20, 100, depth, jobs) for depth in (8, 1000) for jobs in (1, 2))),
    ),
    Row(
        "trees-small",
        "digits and breast cancer, single tree and forest of 100, one thread and two",
        tuple(
            (name, (threads,))
            for name in ("digits_tree", "digits_forest", "breast_cancer_tree", "breast_cancer_forest")
            for threads in (1, 2)
        ),
        least=5,
    ),
    Row(
        "binning",
        "binning of 1,000,000×20 numbers, one thread and two",
        _each("binning", ((1_000_000, 20, 1), (1_000_000, 20, 2))),
        "float64",
        least=8.0,
    ),
    *(
        Row(
            name,
            f"{words}, {', '.join(f'{rows:,}×{features}' for rows, features in shapes)}, one thread and two",
            _each(benchmark, tuple((*shape, threads) for shape in shapes for threads in (1, 2))),
            "float64",
            least=least,
        )
        for name, benchmark, words, least, shapes in (
            ("histogram-tree", "histogram_tree", _HISTOGRAM_TREE, 4.0, ((100_000, 20), (10_000, 500))),
            ("histogram-tree-large", "histogram_tree", _HISTOGRAM_TREE, 4.0, ((1_000_000, 20),)),
            (
                "binned-tree",
                "binned_tree",
                "decision tree of depth 8 on 255 bins, binning included",
                4.0,
                ((100_000, 20), (10_000, 500), (1_000_000, 20)),
            ),
            ("boosting", "boosting", _BOOSTING, 1.3, ((100_000, 20),)),
            ("boosting-large", "boosting", _BOOSTING, 1.3, ((10_000, 500), (1_000_000, 20))),
        )
    ),
    Row(
        "tree-predict",
        "prediction by 100 trees of depth 8, 100,000 rows of 20 features, one thread and two",
        _each("tree_predict", ((100_000, 20, 100, 8, 1), (100_000, 20, 100, 8, 2))),
        least=1.8,
    ),
    *(
        Row(
            f"weight-only-{name}",
            f"linear 1024 to 4096 of a weight alone quantized to int8, and to four bits in groups of 32 and 128, {rows}",
            tuple(
                (f"weight_only_{scheme}", (m, 4096, 1024)) for scheme in ("int8", "int4", "int4_128") for m in counts
            ),
            "bfloat16",
            least=least,
        )
        for name, rows, counts, least in (
            ("one-row", "one row", (1,), 1.2),
            ("rows", "16, 128 and 1024 rows", (16, 128, 1024), 4.0),
        )
    ),
)


def measure(row: Row, seconds: float) -> dict[str, Any]:
    """Runs one row in this process."""
    import torch
    from rich.console import Console

    from fastnn import bench
    from fastnn.bench import machine, table

    console = Console(width=200)
    results = []
    for benchmark, shape in row.work:
        results += bench.run(benchmark, [shape], [getattr(torch, row.dtype)], seconds=seconds)
    described = machine.describe()
    table.show(results, described, console)
    ratios = [result.ratio[0] for result in results]
    measured = {
        "least": min(ratios),
        "geometric_mean": table.geometric_mean(ratios),
        "largest": max(ratios),
        "share_of_peak": max((result.share for result in results if result.share is not None), default=None),
        "peak_kind": results[0].peak_kind,
    }
    return {
        "row": row.name,
        "title": row.title,
        "target": {"least": row.least, "geometric_mean": row.mean},
        "measured": measured,
        "met": row.met(measured),
        "machine": described,
        "results": [result.to_dict() for result in results],
    }


def machine_name(described: dict[str, Any]) -> str:
    """Of the folder with a machine's results: "zen-5-2-threads"."""
    return "-".join(f"{described['microarchitecture']} {described['threads']} threads".lower().split())


def main() -> int:
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", nargs="*", help=", ".join(names))
    parser.add_argument("--seconds", type=float, default=0.3, help="for each shape (default: 0.3)")
    parser.add_argument("--here", action="store_true", help="in this process, as it was started: one row")
    options = parser.parse_args()
    unknown = set(options.row) - set(names)
    if unknown:
        parser.error(f"no row named {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    chosen = [row for row in ROWS if not options.row or row.name in options.row]
    if options.here:
        for row in chosen:
            found = measure(row, options.seconds)
            folder = RESULTS / machine_name(found["machine"])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{row.name}.json").write_text(json.dumps(found, indent=1) + "\n")
        return 0
    failed = 0
    for row in chosen:
        print(f"\n{row.name}", flush=True)
        environment = dict(os.environ)
        if row.isa:
            environment["FASTNN_ISA"] = row.isa
        command = [sys.executable, __file__, row.name, "--here", "--seconds", str(options.seconds)]
        failed += subprocess.run(command, env=environment).returncode != 0
    print_summary(chosen)
    return 1 if failed else 0


def print_summary(rows: tuple[Row, ...] | list[Row]) -> None:
    """Target beside measured, of each row whose results of this machine are on disk."""
    from fastnn.bench import machine

    folder = RESULTS / machine_name(machine.describe())
    print(f"\n{'row':<34}{'least':>8}{'target':>8}{'mean':>8}{'target':>8}{'of peak':>9}  met")
    for row in rows:
        path = folder / f"{row.name}.json"
        if not path.exists():
            print(f"{row.name:<34}  not measured")
            continue
        found = json.loads(path.read_text())
        measured = found["measured"]
        share = "" if measured["share_of_peak"] is None else f"{measured['share_of_peak']:.0%}"
        met = {True: "yes", False: "no", None: "–"}[row.met(measured)]
        print(
            f"{row.name:<34}{measured['least']:>8.2f}{row.least or '–':>8}{measured['geometric_mean']:>8.2f}"
            f"{row.mean or '–':>8}{share:>9}  {met}"
        )


if __name__ == "__main__":
    sys.exit(main())
