"""bench/gpu.py, with the CPU in the place of a GPU."""

import json
import sys
from pathlib import Path

import pytest
import torch

from fastnn import bench
from fastnn.bench import gpu
from fastnn.testing import verify_all

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import gpu as script


def test_every_row_is_a_benchmark():
    for row in script.ROWS:
        the = bench.benchmark(row.benchmark)
        assert row.dtype in the.dtypes
        assert all(len(shape) == len(the.axes.split("x")) for shape in row.shapes)


def test_a_row_is_measured_on_the_kernels_it_names(emulation, on_cuda):
    cpu = torch.device("cpu")
    small = script.Row("gemm", "matmul", torch.bfloat16, ((33, 17, 65),), share=0.9)
    without = script.Row("tree", "boosting", torch.float64, ((500, 20, 1),))
    found = [script.measure(small, "cuda", cpu, 0.01), script.measure(without, "cuda", cpu, 0.01)]
    (result,) = found[0]["results"]
    assert result["shape"] == "33x17x65" and result["ratio"] > 0
    (failed,) = found[1]["results"]
    assert "no peer 'torch'" in failed["failed"]
    machine = {"gpu": "none", "date": "today", "torch": torch.__version__, "cuda": None}
    text = script.lines(json.loads(json.dumps({"machine": machine, "rows": found}, allow_nan=False)))
    assert any(line.startswith("| gemm | cuda | 33×17×65 |") and line.endswith("| ≥ 90% |") for line in text)
    assert len({line.count("|") for line in text if line.startswith("|")}) == 1


def test_what_has_no_kernel_is_not_timed(on_cuda):
    row = script.Row("gemm", "matmul", torch.float64, ((8, 8, 8),))
    (result,) = script.measure(row, "cuda", torch.device("cpu"), 0.01)["results"]
    assert result["failed"].startswith("FallbackError: fastnn.")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_without_a_gpu_that_is_said():
    for device in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match="finds 0 GPUs"):
            gpu.machine_of(device)
    with pytest.raises(ValueError, match="finds no GPU"):
        verify_all(["mm"], device="cuda")
    with pytest.raises(ValueError, match="expected 'cpu' or 'cuda'"):
        gpu.machine_of("meta")
