"""Whole models in int8: BERT-base, quantized dynamically.

The peers are torch in float32, with whose results all are compared, torch's own dynamic quantization and ONNX Runtime's:
rounding to 8 bits in dozens of layers, one after the other, moves results by some hundredths.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

import fastnn

from . import peers
from .benchmark import MODEL_PAUSE, Benchmark, Problem, register
from .transformers import bert, multiplications, random_tokens

#: ONNX Runtime's own int8 is half as far from float32.
_TOLERANCE = 6e-2


def _in_inference(model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(x)

    return call


def _torch_dynamic(model: torch.nn.Module) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch sends everyone to torchao
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})


def _bert_dynamic(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    n, length = shape
    ours = bert(length).eval()
    theirs = fastnn.revert(copy.deepcopy(ours))
    fastnn.quant.quantize_(ours, fastnn.quant.Int8Dynamic())
    contestants = {
        "fastnn": _in_inference(ours),
        "torch": _in_inference(theirs),
        "torch int8": _in_inference(_torch_dynamic(theirs)),
    }
    absent = {peer: why for peer, why in peers.absent(dtype).items() if peer == "onnxruntime"}
    if not absent:
        contestants["onnxruntime int8"] = peers.int8_onnxruntime(theirs)
    return Problem(
        lambda: (random_tokens(n, length, dtype),),
        contestants,
        2 * multiplications(n * length, length),
        "OP",
        peak="int8",
        absent=absent,
        tolerance=_TOLERANCE,
        pause=MODEL_PAUSE,
    )


register(Benchmark("bert_base_int8_dynamic", "NxL", ((1, 128), (8, 128)), _bert_dynamic, (torch.float32,)))
