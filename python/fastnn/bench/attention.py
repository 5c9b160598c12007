"""Attention. Shapes are B (batch) × H (heads) × L (queries and keys) × D (the size of a head); 4·B·H·L²·D operations
forward, half of them causal, and 10·B·H·L²·D backward. Decoding: B × H × K (heads of keys) × S (keys) × D, one query a
sequence; it reads 2·B·K·S·D elements.

fastnn and torch are each timed with heads before the length in memory, as a cache is, and after it, as a layer makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastnn

from .benchmark import Benchmark, Problem, register
from .gemm import PEAKS

_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "fastnn": fastnn.functional.scaled_dot_product_attention,
    "torch": F.scaled_dot_product_attention,
}
_FORMS = ("", " length-first")


def _make(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """query, key and value in each form, of the same numbers."""
    plain = [torch.randn(shape).to(dtype) for _ in range(3)]
    return {"": plain, _FORMS[1]: [x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain]}


def _forward(causal: bool) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        b, h, length, size = shape

        def run(who: str, form: str) -> Callable[..., Any]:
            return lambda made: _FUNCTIONS[who](*made[form], is_causal=causal)

        contestants = {who + form: run(who, form) for who in _FUNCTIONS for form in _FORMS}
        work = 4.0 * b * h * length**2 * size / (2 if causal else 1)
        return Problem(lambda: (_make(shape, dtype),), contestants, work, peak=PEAKS[dtype])

    return build


def _backward(causal: bool) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        b, h, length, size = shape

        def graphs() -> tuple[dict[str, Any]]:
            found = {}
            grad = torch.randn(shape).to(dtype)
            for form, tensors in _make(shape, dtype).items():
                leaves = [x.requires_grad_() for x in tensors]
                for who, function in _FUNCTIONS.items():
                    result = function(*leaves, is_causal=causal)
                    found[who + form] = (result, leaves, torch.empty_like(result).copy_(grad))
            return (found,)

        def run(name: str) -> Callable[..., Any]:
            def call(made: dict[str, Any]) -> tuple[Tensor, ...]:
                result, leaves, grad = made[name]
                return torch.autograd.grad(result, leaves, grad, retain_graph=True)

            return call

        contestants = {who + form: run(who + form) for who in _FUNCTIONS for form in _FORMS}
        work = 10.0 * b * h * length**2 * size / (2 if causal else 1)
        return Problem(graphs, contestants, work, peak=PEAKS[dtype])

    return build


def _decode(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    b, h, kv, keys, size = shape

    def inputs() -> tuple[Tensor, ...]:
        cache = torch.randn(2, b, kv, keys, size).to(dtype)
        return torch.randn(b, h, 1, size).to(dtype), cache[0], cache[1]

    def run(who: str) -> Callable[..., Tensor]:
        return lambda q, k, v: _FUNCTIONS[who](q, k, v, enable_gqa=True)

    nbytes = 2.0 * b * kv * keys * size * dtype.itemsize
    return Problem(inputs, {who: run(who) for who in _FUNCTIONS}, nbytes, unit="B", peak="copy", beyond_cache=True)


_SHAPES = ((8, 12, 512, 64), (1, 16, 2048, 64), (1, 16, 4096, 128))

register(Benchmark("attention", "BxHxLxD", _SHAPES, _forward(False)))
register(Benchmark("attention_causal", "BxHxLxD", _SHAPES, _forward(True)))
register(Benchmark("attention_backward", "BxHxLxD", _SHAPES, _backward(False)))
register(Benchmark("attention_causal_backward", "BxHxLxD", _SHAPES, _backward(True)))
register(Benchmark("attention_decode", "BxHxKxSxD", ((1, 32, 8, 4096, 128), (8, 32, 8, 4096, 128)), _decode))
