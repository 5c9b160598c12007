"""`info`."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

import fastnn
from fastnn import _openmp
from fastnn._state import reset_fallbacks
from fastnn.backends import cuda


def test_is_json_and_readable():
    found = fastnn.info()
    assert json.loads(json.dumps(found)) == found
    text = str(found)
    for word in (found["version"], torch.__version__, found["instruction_sets"]["active"], "OpenMP", "linear"):
        assert word in text
    assert found["instruction_sets"]["active"] in found["instruction_sets"]["available"]
    assert set(found["ops"]) >= {"linear", "bilinear", "matmul", "mm", "bmm", "addmm", "baddbmm", "mv", "relu"}
    assert set(found["ops"]) >= {f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3)}
    assert found["ops"]["linear"]["float32"].startswith("cpu: ")
    assert found["ops"]["scaled_dot_product_attention"]["float32"].startswith("cpu: ")


def test_lists_every_op():
    listed = fastnn.info()["ops"]
    assert set(listed) == set(fastnn.functional.__all__)
    assert all(
        set(dtypes) == {"float32", "float64", "bfloat16", "float16", "int8", "float8"} for dtypes in listed.values()
    )
    with fastnn.backend("reference"):
        assert set(fastnn.info()["ops"]) == set(fastnn.functional.__all__) - {"int_mm"}


def test_one_openmp_runtime():
    """In a process of its own: scikit-learn, which other tests import, brings another."""
    program = """
import torch, fastnn
x = torch.randn(512, 512)
fastnn.matmul(x, x)  # on several threads
print(len(fastnn.info()["openmp"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "1\n", done.stdout + done.stderr
    assert fastnn.info()["openmp"] == _openmp.loaded()


def test_threads_follow_torch():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert fastnn.info()["threads"] == 1
    finally:
        torch.set_num_threads(before)
    assert fastnn.info()["threads"] == before


def test_counts_kernels_and_fallbacks():
    reset_fallbacks()
    assert fastnn.info()["fallbacks"] == []
    assert "no call went to torch" in str(fastnn.info())
    fastnn.matmul(torch.ones(2, 2, dtype=torch.int32), torch.ones(2, 2, dtype=torch.int32))
    fastnn.matmul(torch.ones(2, 2), torch.ones(2, 2))
    found = fastnn.info()
    assert [(f["op"], f["count"]) for f in found["fallbacks"]] == [("matmul", 1)]
    assert "int32" in found["fallbacks"][0]["reason"]
    assert sum(found["kernel_calls"].values()) > 0
    assert "calls that went to torch" in str(found)


def test_tells_the_backend_asked_for():
    with fastnn.backend("reference"):
        found = fastnn.info()
    assert found["backend"] == "reference"
    assert found["ops"]["linear"]["float32"] == "reference"
    assert fastnn.info()["backend"] is None


def test_tells_what_there_is_for_gpus(on_cuda):
    found = fastnn.info()
    assert found["gpu"]["devices"] == torch.cuda.device_count()
    assert {"gemm", "attention"} <= set(found["gpu"]["cuda"]["ops"]) and found["gpu"]["cuda"]["why_not"] is None
    assert "  cuda: " + ", ".join(found["gpu"]["cuda"]["ops"]) in str(found)


def test_tells_why_there_is_nothing_for_gpus(monkeypatch):
    monkeypatch.setattr(cuda, "_module", None)
    assert fastnn.info()["gpu"]["cuda"] == {"why_not": cuda.why_not(), "ops": []}
    assert f"  cuda: {cuda.why_not()}" in str(fastnn.info())
