"""Measures the peak memory of a forward, fastnn's and torch's: `python bench/memory.py`. Linux only.

A figure is by how much the peak of the resident memory is above what a process had when model and input were ready (VmHWM
in /proc/self/status, set back through /proc/self/clear_refs), after five forwards in `torch.inference_mode()`, the first
with all that it sets up included; the median of three fresh processes. So that what a model was given beforehand is seen
as well, the same peak is also measured from before there was a model (`with_model`). The results are written to
`bench/results/memory.json`; `python bench/readme.py` makes README's table from it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "memory.json"
BATCH, FORWARDS, PROCESSES = 8, 5, 3
LAYOUTS = ("contiguous", "channels_last")
#: Two runs of one contestant differ by about this much: how a memory allocator divides its arenas among threads is chance,
#: the system counts resident pages of each thread in batches, and large blocks are whole huge pages of 2 MB.
SLACK_SHARE, SLACK_MB = 0.05, 4.0

#: Whole models; and convolutions by C, H = W, M, K, S and groups: one for each way in which they are computed.
MODELS = ("resnet50", "resnet50 fuse=True")
LAYERS = {
    "7×7 stride 2, 3 → 64, 224²": (3, 224, 64, 7, 2, 1),
    "1×1, 256 → 64, 56²": (256, 56, 64, 1, 1, 1),
    "3×3, 64 → 64, 56²": (64, 56, 64, 3, 1, 1),
    "3×3, 512 → 512, 7²": (512, 7, 512, 3, 1, 1),
    "3×3 stride 2, 128 → 128, 56²": (128, 56, 128, 3, 2, 1),
    "3×3 depthwise, 144, 56²": (144, 56, 144, 3, 1, 144),
}


def growth(work: str, layout: str, who: str) -> tuple[float, float]:
    """Runs the forwards in this process; without and with the model and its input, in MB (2²⁰ bytes)."""
    import torch

    import fastnn

    start = _status("VmRSS")
    name, _, option = work.partition(" ")
    if work in LAYERS:
        channels, edge, filters, kernel, stride, groups = LAYERS[work]
        model = torch.nn.Conv2d(channels, filters, kernel, stride, kernel // 2, groups=groups, bias=False)
    else:
        channels, edge = 3, 224
        model = fastnn.revert(getattr(fastnn.models, name)())
    memory_format = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[layout]
    model = model.eval().to(memory_format=memory_format)
    if who == "fastnn":
        model = fastnn.convert(model, fuse=bool(option) and work not in LAYERS)
    x = torch.randn(BATCH, channels, edge, edge).to(memory_format=memory_format)
    with torch.inference_mode():
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        for _ in range(FORWARDS):
            model(x)
        peak = _status("VmHWM")
        return peak - before, peak - start


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(work: str, layout: str, processes: int = PROCESSES) -> dict[str, object]:
    """Both contestants, each in processes of its own."""
    found: dict[str, list[float]] = {"torch": [], "fastnn": []}
    whole: dict[str, list[float]] = {"torch": [], "fastnn": []}
    for _ in range(processes):
        for who, values in found.items():
            command = [sys.executable, __file__, "--here", work, layout, who]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
            alone, with_model = map(float, done.stdout.split())
            values.append(alone)
            whole[who].append(with_model)
    torchs, ours = (statistics.median(values) for values in found.values())
    return {
        "work": work,
        "layout": layout,
        "torch": torchs,
        "fastnn": ours,
        "all": found,
        "with_model": {who: statistics.median(values) for who, values in whole.items()},
        "met": ours <= torchs + max(SLACK_SHARE * torchs, SLACK_MB),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", nargs="*", help="what to measure again, the rest as it was (default: all)")
    parser.add_argument("--here", nargs=3, metavar=("WORK", "LAYOUT", "WHO"), help="one figure, in this process")
    options = parser.parse_args()
    if options.here:
        print(*growth(*options.here))
        return 0
    from fastnn.bench import machine

    before = json.loads(RESULTS.read_text())["results"] if options.work else []
    rows = []
    print(f"{'MB':<34}{'':<15}{'torch':>8}{'fastnn':>8}  no more than torch's; with the model")
    for work in (*MODELS, *LAYERS):
        for layout in LAYOUTS:
            if options.work and work not in options.work:
                rows += [row for row in before if (row["work"], row["layout"]) == (work, layout)]
                continue
            row = measure(work, layout)
            rows.append(row)
            print(
                f"{work:<34}{layout:<15}{row['torch']:>8.1f}{row['fastnn']:>8.1f}  {'yes' if row['met'] else 'no':<21}",
                *(f"{row['with_model'][who]:8.1f}" for who in ("torch", "fastnn")),
                flush=True,
            )
    found = {
        "unit": "MB",
        "batch": BATCH,
        "forwards": FORWARDS,
        "slack": {"share": SLACK_SHARE, "MB": SLACK_MB},
        "met": all(row["met"] for row in rows),
        "machine": machine.describe(),
        "results": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
