"""What is measured on, and how fast it could be at best."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import torch

from ..backends import cpu
from . import peers

__all__ = ["cache_bytes", "copy_bandwidth", "describe", "peak"]


def describe() -> dict[str, Any]:
    """The machine and the software, for a benchmark's record."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": cpu.isa(),
        "torch": torch.__version__,
        "peers": peers.versions(),
        "python": platform.python_version(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "load_average": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def peak(kind: str, seconds: float = 0.1) -> float:
    """Operations a second of a register-only loop on all of torch's threads; kind is "f32", "bf16", "int8" or "f64"."""
    return cpu.peak_flops(kind, torch.get_num_threads(), seconds)


def copy_bandwidth(nbytes: int = 64 << 20, repeats: int = 7) -> float:
    """Bytes a second, read and written, of torch's copy of a warm buffer."""
    source = torch.ones(nbytes // 4)
    target = torch.empty_like(source)
    fastest = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        target.copy_(source)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * nbytes / fastest


def cache_bytes() -> int:
    """The size of the last cache of the first core; 32 MB where the system does not tell."""
    largest = 0
    folder = "/sys/devices/system/cpu/cpu0/cache"
    try:
        for index in os.listdir(folder):
            with open(os.path.join(folder, index, "size")) as file:
                text = file.read().strip()
            scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
            size = int(text[:-1]) * scale[text[-1]] if text[-1] in scale else int(text)
            largest = max(largest, size)
    except (OSError, ValueError):
        return 32 << 20
    return largest or 32 << 20


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()
