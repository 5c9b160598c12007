"""What is measured on, and how fast it could be at best: a CPU here, a GPU in :mod:`.gpu`."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import torch

from ..backends import cpu
from . import engine, peers

__all__ = ["PEAK_SECONDS", "Cpu", "describe", "microarchitecture"]

#: For which the operation of a peak is repeated.
PEAK_SECONDS = 0.05


class Cpu:
    """This machine's CPU. The other kinds of machine have the same attributes and methods."""

    device = torch.device("cpu")
    turn_seconds = engine.TURN_SECONDS

    def clock(self) -> float:
        """Seconds, once everything that was asked for is done."""
        return time.perf_counter()

    def describe(self) -> dict[str, Any]:
        """The machine and the software, for a benchmark's record."""
        return describe()

    def peak(self, kind: str) -> float:
        """Operations a second of a register-only loop on all of torch's threads; kind is "f32", "bf16", "int8" or "f64".
        Of the kind "copy" the bytes a second of a copy."""
        if kind == "copy":
            return self.copy_bandwidth(repeats=3)
        return cpu.peak_flops(kind, torch.get_num_threads(), PEAK_SECONDS)

    def copy_bandwidth(self, nbytes: int = 64 << 20, repeats: int = 7) -> float:
        """Bytes a second, read and written, of torch's copy of a warm buffer."""
        source = torch.ones(nbytes // 4, device=self.device)
        target = torch.empty_like(source)
        fastest = float("inf")
        for _ in range(repeats):
            start = self.clock()
            target.copy_(source)
            fastest = min(fastest, self.clock() - start)
        return 2 * nbytes / fastest

    def cache_bytes(self) -> int:
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


def describe() -> dict[str, Any]:
    """The CPU and the software, for a benchmark's record."""
    return {
        "cpu": _cpu_name(),
        "microarchitecture": microarchitecture(),
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


#: Vendor, family, first and last model, as CPUID has them; the first that fits.
_MICROARCHITECTURES = (
    ("AuthenticAMD", 23, 0x00, 0x2F, "Zen"),
    ("AuthenticAMD", 23, 0x30, 0xFF, "Zen 2"),
    ("AuthenticAMD", 25, 0x10, 0x1F, "Zen 4"),
    ("AuthenticAMD", 25, 0x60, 0xAF, "Zen 4"),
    ("AuthenticAMD", 25, 0x00, 0x5F, "Zen 3"),
    ("AuthenticAMD", 26, 0x00, 0xFF, "Zen 5"),
    ("GenuineIntel", 6, 0x55, 0x55, "Skylake"),
    ("GenuineIntel", 6, 0x6A, 0x6C, "Ice Lake"),
    ("GenuineIntel", 6, 0x8F, 0x8F, "Sapphire Rapids"),
    ("GenuineIntel", 6, 0xAD, 0xAE, "Granite Rapids"),
    ("GenuineIntel", 6, 0xCF, 0xCF, "Emerald Rapids"),
)


def microarchitecture() -> str:
    """The kind of core: "Zen 5"; "GenuineIntel 6 140" for one that is not in the list; the architecture ("aarch64") where
    the system does not tell. (Clouds call all of a vendor's processors by one name, so that the name says less.)"""
    vendor, family, model = (_cpuinfo(key) for key in ("vendor_id", "cpu family", "model"))
    if not (vendor and family and model):
        return platform.machine() or "unknown"
    for of_vendor, of_family, first, last, name in _MICROARCHITECTURES:
        if (vendor, int(family)) == (of_vendor, of_family) and first <= int(model) <= last:
            return name
    return f"{vendor} {family} {model}"


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str | None:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                name, colon, value = line.partition(":")
                if colon and name.strip() == key:
                    return value.strip()
    except OSError:
        pass
    return None
