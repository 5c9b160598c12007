"""The Triton kernels compile for GPUs, and their products run on tensor cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastnn.backends import triton

#: What the operands of a product are -> the types in the instruction for them.
OPERANDS = {"fp32": "bf16.bf16", "bf16": "bf16.bf16", "fp16": "f16.f16", "i8": "s8.s8", "u8": "s8.s8"}
for _type in ("fp32", "bf16", "fp16"):
    for _product in ("convolution", "convolution's weight"):
        OPERANDS[f"{_product} {_type}"] = OPERANDS[_type]
OPERANDS |= {"attention bf16": "bf16.bf16", "attention fp32": "bf16.bf16", "attention by queries fp16": "f16.f16"}
OPERANDS["attention of few queries"] = "bf16.bf16"
OPERANDS |= dict.fromkeys(("int8 linear", "int8 linear of few rows"), "s8.s8")
OPERANDS |= dict.fromkeys(("int8 convolution u8", "int8 convolution i8"), "s8.s8")
OPERANDS |= dict.fromkeys(("weight of 4 bits, few rows", "weight of 8 bits", "weight of float8"), "bf16.bf16")
#: What older tensor cores multiply as float16.
FLOAT8 = {"8-bit floats": "e4m3.e4m3", "8-bit floats e5m2": "e4m3.e5m2"}
SHARED = {80: 163 << 10, 90: 227 << 10}


@pytest.mark.skipif(triton.why_not() is not None, reason=str(triton.why_not()))
@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_compiles(arch):
    program = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, program, str(arch)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found.keys() > OPERANDS.keys() | FLOAT8.keys()
    for name, kernel in found.items():
        assert kernel["shared"] <= SHARED[arch]
        # Rows are the longest there are, and sm_86 and sm_89 have less of it.
        assert kernel["shared"] <= 99 << 10 or not name.startswith("attention"), name
        if "quantize" in name or "int8" in name or name == "choose":
            assert not kernel["fused"], "a product and a sum that are rounded once"
        operands = {**OPERANDS, **(FLOAT8 if arch >= 89 else dict.fromkeys(FLOAT8, "f16.f16"))}
        if name not in operands:
            continue
        assert any(operands[name] in instruction for instruction in kernel["tensor_cores"]), (name, kernel)
        if arch == 90 and name in ("bf16", "attention bf16"):
            assert any(instruction.startswith("wgmma") for instruction in kernel["tensor_cores"])
        assert kernel["asynchronous_copies"], name
