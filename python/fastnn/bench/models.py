"""Whole models: inference with everything fused, and a step of training, contiguous and channels-last.

In inference the peers are torch's eager mode and those of :mod:`fastnn.bench.peers`."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch

import fastnn

from ..quant import Int8Static, quantize_
from . import peers
from .benchmark import MODEL_PAUSE, Benchmark, Problem, register
from .gemm import PEAKS

#: Multiplications for an image of 224 × 224, as published.
_MULTIPLICATIONS = {"resnet18": 1.814e9, "resnet50": 4.089e9, "mobilenet_v2": 0.301e9}
_FORMATS = {"": torch.contiguous_format, " channels_last": torch.channels_last}
#: Layers are folded into each other before or after rounding, and each of 18 or 50 rounds its result: torch.compile's
#: bfloat16 is a hundredth away from torch's.
_TOLERANCE = {torch.bfloat16: 3e-2}


def _variants(name: str, dtype: torch.dtype, fuse: bool) -> dict[str, torch.nn.Module]:
    """torch's model and fastnn's from the same parameters, in both layouts."""
    theirs = fastnn.revert(getattr(fastnn.models, name)()).to(dtype)
    found = {}
    for form, layout in _FORMATS.items():
        found["torch" + form] = copy.deepcopy(theirs).to(memory_format=layout)
        found["fastnn" + form] = fastnn.convert(copy.deepcopy(theirs).to(memory_format=layout), fuse=fuse)
    return found


def _inference(name: str) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        n, edge = shape
        models = {label: model.eval() for label, model in _variants(name, dtype, True).items()}

        def run(label: str, layout: torch.memory_format) -> Callable[[torch.Tensor], torch.Tensor]:
            def call(x: torch.Tensor) -> torch.Tensor:
                with torch.inference_mode():
                    return models[label](x.contiguous(memory_format=layout))

            return call

        contestants = {
            who + form: run(who + form, layout) for who in ("fastnn", "torch") for form, layout in _FORMATS.items()
        }
        return Problem(
            lambda: (torch.randn(n, 3, edge, edge).to(dtype),),
            contestants | peers.contestants(models["torch"], dtype),
            2 * n * _MULTIPLICATIONS[name] * (edge / 224) ** 2,
            peak=PEAKS[dtype],
            absent=peers.absent(dtype),
            tolerance=_TOLERANCE.get(dtype),
            pause=MODEL_PAUSE,
        )

    return build


def _step(name: str, autocast: bool = False) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    """Forward, loss and backward; the optimizer is torch's for both. With `autocast` the parameters are float32, and the
    dtype is that of `torch.autocast`."""

    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        n, edge = shape
        kept = torch.float32 if autocast else dtype
        models = {label: model.train() for label, model in _variants(name, kept, False).items()}

        def run(label: str, layout: torch.memory_format) -> Callable[..., Any]:
            model = models[label]

            def call(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
                model.zero_grad(set_to_none=True)
                with torch.autocast("cpu", dtype) if autocast else contextlib.nullcontext():
                    logits = model(x.contiguous(memory_format=layout))
                loss = torch.nn.functional.cross_entropy(logits.float(), target)
                loss.backward()
                return loss.detach()

            return call

        contestants = {
            who + form: run(who + form, layout) for who in ("fastnn", "torch") for form, layout in _FORMATS.items()
        }
        return Problem(
            lambda: (torch.randn(n, 3, edge, edge).to(kept), torch.randint(1000, (n,))),
            contestants,
            6 * n * _MULTIPLICATIONS[name] * (edge / 224) ** 2,
            peak=PEAKS[dtype],
        )

    return build


def _int8_inference(name: str) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    """Static int8, calibrated with the same data; torch in float32 for scale."""

    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        n, edge = shape
        model = fastnn.revert(getattr(fastnn.models, name)()).eval()
        data = [torch.randn(n, 3, edge, edge) for _ in range(2)]
        models = {
            "fastnn": quantize_(copy.deepcopy(model), Int8Static(data)),
            "torch": model.to(memory_format=torch.channels_last),
        }

        def run(label: str) -> Callable[[torch.Tensor], torch.Tensor]:
            def call(x: torch.Tensor) -> torch.Tensor:
                with torch.inference_mode():
                    return models[label](x)

            return call

        absent = {peer: why for peer, why in peers.absent(dtype).items() if peer == "onnxruntime"}
        others = (
            {}
            if absent
            else {
                "onnxruntime": peers.int8_onnxruntime(
                    copy.deepcopy(model).to(memory_format=torch.contiguous_format), data
                )
            }
        )
        return Problem(
            lambda: (torch.randn(n, 3, edge, edge),),
            {"fastnn": run("fastnn"), **others, "torch": run("torch")},
            2 * n * _MULTIPLICATIONS[name] * (edge / 224) ** 2,
            peak="int8",
            absent=absent,
            tolerance=0.2,
            pause=MODEL_PAUSE,
        )

    return build


_SHAPES = ((1, 224), (8, 224))
for _name in ("resnet18", "resnet50", "mobilenet_v2"):
    register(Benchmark(f"{_name}_inference", "NxEDGE", _SHAPES, _inference(_name), (torch.float32, torch.bfloat16)))
register(Benchmark("resnet50_int8", "NxEDGE", _SHAPES, _int8_inference("resnet50"), (torch.float32,)))
register(Benchmark("resnet18_train", "NxEDGE", ((8, 224),), _step("resnet18"), (torch.float32,)))
register(
    Benchmark("resnet18_train_autocast", "NxEDGE", ((8, 224),), _step("resnet18", autocast=True), (torch.bfloat16,))
)
