"""Measures the kernels for GPUs against torch's on the GPU of this machine: `python bench/gpu.py [row ...]`, all by default.

Writes `bench/results/gpu-<name>.json` and a table of it in `docs/gpu-<name>.md`. Each row is timed with the CUDA kernels and
with Triton's; what has no kernel there is left out, with the reason. The peaks are measured ones: a copy's bandwidth and a
large product of torch's.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import fastnn
from fastnn import bench
from fastnn.bench import gpu, table

ROOT = Path(__file__).parent.parent
KERNELS = ("cuda", "triton")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """What is timed, and the least ratio to torch that it must reach, if any; of each shape."""

    name: str
    benchmark: str
    dtype: torch.dtype
    shapes: tuple[Shape, ...]
    least: float | None = None
    #: Of what torch calls its fastest: the share of a copy's bandwidth, or of a large product's rate.
    share: float | None = None
    peer: str = "torch"


_BF16, _F16, _F32, _INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
_LONG = tuple((4, 16, length, 128) for length in (4096, 16384))
_IMAGES = ((64, 256, 56, 56), (64, 1024, 14, 14))
_ROWS = ((16384, 4096), (65536, 768))

ROWS = (
    Row("gemm-bfloat16", "matmul", _BF16, ((4096,) * 3, (8192,) * 3), share=0.95),
    Row("gemm-float16", "matmul", _F16, ((4096,) * 3, (8192,) * 3)),
    Row("gemm-float32", "matmul", _F32, ((4096,) * 3,), least=1.8),
    Row("gemm-int8", "int_mm", _INT8, ((4096,) * 3,)),
    Row("gemm-float8", "scaled_mm", torch.float8_e4m3fn, ((4096,) * 3, (8192,) * 3)),
    Row("gemm-batched", "bmm", _BF16, ((256, 128, 128, 64), (64, 512, 512, 512))),
    Row("linear-few-rows", "linear", _BF16, ((1, 4096, 4096), (16, 4096, 4096), (128, 4096, 4096))),
    Row("linear-train", "linear_train", _BF16, ((4096, 4096, 4096),)),
    *(
        Row(f"attention-{name}{words}", f"attention{suffix}", dtype, shapes, least=least)
        for suffix, words in (("", ""), ("_causal", "-causal"), ("_backward", "-backward"))
        for name, dtype, shapes, least in (
            ("bfloat16", _BF16, _LONG, 1.0),
            ("float32", _F32, ((1, 16, 4096, 128),), None if suffix == "_backward" else 2.0),
        )
    ),
    Row("attention-decode", "attention_decode", _BF16, ((1, 32, 8, 4096, 128), (64, 32, 8, 4096, 128))),
    *(
        Row(name.replace("_", "-"), name, _BF16, _ROWS, share=0.92)
        for name in (
            "layer_norm",
            "rms_norm",
            "layer_norm_backward",
            "rms_norm_backward",
            "softmax",
            "softmax_backward",
        )
    ),
    Row("embedding", "embedding", _BF16, ((50304, 4096, 16384),)),
    Row("embedding-train", "embedding_train", _BF16, ((50304, 4096, 16384),)),
    Row("cross-entropy", "cross_entropy", _BF16, ((8192, 50304),)),
    Row("linear-cross-entropy", "linear_cross_entropy", _BF16, ((8192, 32000, 4096),)),
    *(
        Row(name.replace("_", "-"), name, _F32, _IMAGES, share=0.92)
        for name in ("batch_norm", "batch_norm_relu", "batch_norm_backward")
    ),
    *(Row(name, name, _BF16, ((1 << 28,),), share=0.92) for name in ("relu", "gelu")),
    *(
        Row(name.replace("_", "-"), name, _F32, (shape,), share=0.92)
        for name, shape in (
            ("quantize", (16384, 4096)),
            ("quantize_per_channel_0", (16384, 4096)),
            ("quantize_groups", (16384, 4096, 128)),
            ("quantize_per_token_dynamic", (16384, 4096)),
            ("quantize_stochastic", (16384, 4096)),
            ("dequantize", (16384, 4096)),
        )
    ),
    Row(
        "conv2d",
        "conv2d",
        _BF16,
        ((64, 256, 14, 14, 256, 3, 1), (64, 64, 56, 56, 64, 3, 1), (64, 1024, 14, 14, 256, 1, 1)),
    ),
    Row("conv2d-train", "conv2d_train", _BF16, ((64, 256, 14, 14, 256, 3, 1),)),
    Row("conv2d-depthwise", "conv2d_depthwise", _BF16, ((64, 192, 56, 56, 3, 1),)),
    *(
        Row(f"split-search{words}", "device_tree", _F32, ((1_000_000, 100, 8),), least=least, peer=peer)
        for words, least, peer in (("", 1.0, "xgboost"), ("-cpu", None, "cpu"))
    ),
    Row("int8-linear", "int8_linear", _BF16, ((16, 4096, 4096), (1024, 4096, 4096))),
    Row("weight-only-int4", "weight_only_int4_128", _BF16, ((1, 4096, 4096), (16, 4096, 4096))),
)


def measure(row: Row, kernels: str, device: torch.device, seconds: float) -> dict[str, Any]:
    """One row on one backend: its results, or why there are none."""
    found: dict[str, Any] = {"row": row.name, "kernels": kernels, "least": row.least, "share": row.share, "results": []}
    for shape in row.shapes:
        try:
            with fastnn.backend(kernels):
                results = bench.run(
                    row.benchmark, [shape], [row.dtype], against=row.peer, seconds=seconds, device=device
                )
        # One row that fails must not cost the others their place on the GPU: what it said is in the file.
        except Exception as error:
            found["results"].append({"shape": "x".join(map(str, shape)), "failed": f"{type(error).__name__}: {error}"})
            continue
        found["results"] += [result.to_dict() for result in results]
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """The table in Markdown."""
    described = found["machine"]
    rows = [
        f"# {described['gpu']}",
        "",
        f"Measured {described['date']} by `make gpu`, with torch {described['torch']} (CUDA {described['cuda']}).",
        "The ratio is that of the medians, torch's time by fastnn's (XGBoost's on the same GPU and fastnn's own on the CPU, of",
        "split searches); the share is of a copy's bandwidth, or of the rate of a large product of torch's in the same dtype.",
        "",
        "| work | kernels | shape | time | times faster than torch (quartiles) | of the peak | target |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        target = [f"≥ {row['least']:g}"] if row["least"] else []
        target += [f"≥ {row['share']:.0%}"] if row["share"] else []
        for result in row["results"]:
            head = f"| {row['row']} | {row['kernels']} | {result['shape'].replace('x', '×')} |"
            if "failed" in result:
                rows.append(
                    f"{head} – | {result['failed'].splitlines()[0].replace('|', '/')} | – | {', '.join(target) or '–'} |"
                )
                continue
            low, high = result["ratio_quartiles"]
            seconds = result["contestants"][result["fastest"]["fastnn"]]["seconds"]
            share = "–" if result["share_of_peak"] is None else f"{result['share_of_peak']:.0%}"
            rows.append(
                f"{head} {table.duration(seconds)} | {result['ratio']:.2f} ({low:.2f} – {high:.2f}) | {share} | "
                f"{', '.join(target) or '–'} |"
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", nargs="*", help=", ".join(row.name for row in ROWS))
    parser.add_argument("--seconds", type=float, default=0.3, help="for each shape (default: 0.3)")
    parser.add_argument("--device", default="cuda", help="which GPU (default: the first)")
    options = parser.parse_args()
    unknown = set(options.row) - {row.name for row in ROWS}
    if unknown:
        parser.error(f"no row named {', '.join(sorted(unknown))}")
    try:
        machine = gpu.machine_of(options.device)
    except ValueError as error:
        parser.error(str(error))
    described = machine.describe()
    chosen = [(row, kernels) for kernels in KERNELS for row in ROWS if not options.row or row.name in options.row]
    console = Console(stderr=True)
    found: dict[str, Any] = {"machine": described, "rows": []}
    name = re.sub(r"[^a-z0-9]+", "-", described["gpu"].lower()).strip("-")
    where = ROOT / f"bench/results/gpu-{name}.json"
    for row, kernels in track(chosen, description="timing", console=console):
        found["rows"].append(measure(row, kernels, machine.device, options.seconds))
        # After each row: a run that is cut off leaves what it measured.
        where.write_text(json.dumps(found, indent=1) + "\n")
    text = "\n".join(lines(found)) + "\n"
    (ROOT / f"docs/gpu-{name}.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
