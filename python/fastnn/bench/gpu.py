"""A GPU to measure on, and how fast it could be at best."""

from __future__ import annotations

import time
from typing import Any

import torch

from . import machine

__all__ = ["Gpu", "machine_of"]

#: The edge of the square products that the peaks are measured by, and the dtype of each.
_PEAK_EDGE = 8192
_PEAK_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f64": torch.float64}


class Gpu(machine.Cpu):
    """One GPU: what :class:`machine.Cpu` says of a CPU. Raises ValueError where torch has none of that number."""

    # Waiting for a GPU costs some 10 microseconds, which a turn has to be long beside.
    turn_seconds = 2e-3

    def __init__(self, device: torch.device) -> None:
        count = torch.cuda.device_count()
        index = device.index or 0
        if index >= count:
            raise ValueError(f"device {str(device)!r}: torch {torch.__version__} finds {count} GPUs")
        self.device = torch.device("cuda", index)

    def clock(self) -> float:
        """Seconds, once everything that was asked for is done."""
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def describe(self) -> dict[str, Any]:
        """The GPU, the machine and the software, for a benchmark's record."""
        found = torch.cuda.get_device_properties(self.device)
        return {
            "gpu": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "gpu_memory": found.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **machine.describe(),
        }

    def peak(self, kind: str) -> float:
        """Operations a second of a large product in torch (cuBLAS), which is as near to the hardware's as anyone came; bytes a
        second of a copy for the kind "copy"."""
        if kind == "copy":
            return self.copy_bandwidth()
        n = _PEAK_EDGE
        if kind == "int8":
            a = torch.randint(-128, 128, (n, n), dtype=torch.int8, device=self.device)
            multiply, b = torch._int_mm, a.t()
        else:
            a = torch.randn(n, n, dtype=torch.float32, device=self.device).to(_PEAK_DTYPES[kind])
            multiply, b = torch.mm, a.t()
        multiply(a, b)
        fastest, begin = float("inf"), self.clock()
        while True:
            start = self.clock()
            multiply(a, b)
            end = self.clock()
            fastest = min(fastest, end - start)
            if end - begin > machine.PEAK_SECONDS:
                return 2.0 * n**3 / fastest

    def copy_bandwidth(self, nbytes: int = 1 << 30, repeats: int = 7) -> float:
        """Bytes a second, read and written, of torch's copy of a buffer that no cache holds."""
        return super().copy_bandwidth(nbytes, repeats)

    def cache_bytes(self) -> int:
        """The size of the cache that all multiprocessors share."""
        return torch.cuda.get_device_properties(self.device).L2_cache_size


def machine_of(device: torch.device | str) -> machine.Cpu:
    """What a device of torch's is measured as. ValueError for one that is neither a CPU nor a GPU that is there."""
    device = torch.device(device)
    if device.type == "cpu":
        return machine.Cpu()
    if device.type == "cuda":
        return Gpu(device)
    raise ValueError(f"device {str(device)!r}: expected 'cpu' or 'cuda'")
