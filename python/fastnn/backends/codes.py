"""The numbers by which the extension modules know dtypes, activations and precisions."""

from __future__ import annotations

import torch

DTYPE: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int8: 4,
    torch.uint8: 5,
    torch.int32: 6,
}
FLOAT: dict[torch.dtype, int] = {dtype: code for dtype, code in DTYPE.items() if dtype.is_floating_point}
#: What products take as operands beside these, and nothing else does.
FLOAT8: dict[torch.dtype, int] = {torch.float8_e4m3fn: 7, torch.float8_e5m2: 8}
OPERAND: dict[torch.dtype, int] = {**DTYPE, **FLOAT8}
HALF = (torch.bfloat16, torch.float16)
ACTIVATION: dict[str | None, int] = {
    None: 0,
    "none": 0,
    "relu": 1,
    "gelu": 2,
    "gelu_tanh": 3,
    "silu": 4,
    "sigmoid": 5,
    "tanh": 6,
    "relu6": 7,
}
PRECISION: dict[str, int] = {"highest": 0, "high": 1, "medium": 2}

#: What the backward of an activation is given: its output for these, its input for the others.
SAVES_OUTPUT = frozenset(("relu", "relu6", "sigmoid", "tanh"))

get_precision = torch._C._get_float32_matmul_precision


def precision(dtype: torch.dtype) -> int:
    """The code of torch.get_float32_matmul_precision(), which is obeyed for float32."""
    return PRECISION[get_precision()] if dtype is torch.float32 else 0
