"""The OpenMP runtime of the process: torch's, which the extension uses too, so that there is one pool of threads.

The extension is linked without a runtime, and finds its symbols among those that are global when it is imported. torch for
x86 makes its own global; torch for other processors loads it for itself alone.
"""

from __future__ import annotations

import ctypes
import os

_NAMES = ("libgomp", "libiomp", "libomp")


def loaded() -> list[str]:
    """Where the OpenMP runtimes in this process come from, torch's first; empty where ``/proc`` does not tell."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {fields[5].strip() for line in maps if len(fields := line.split(maxsplit=5)) == 6}
    except OSError:
        return []
    found = [path for path in paths if os.path.basename(path).startswith(_NAMES)]
    return sorted(found, key=lambda path: ("torch" not in path, path))


def make_global() -> None:
    """Has the extension find the runtime that torch has loaded, or the system's if it has none.

    Raises:
        ImportError: there is neither.
    """
    if _is_global():
        return
    found = [*loaded(), "libgomp.so.1"]
    for path in found:
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if _is_global():
            return
    raise ImportError(f"fastnn: no OpenMP runtime: torch has loaded none with GOMP_parallel; tried {found}")


def _is_global() -> bool:
    return hasattr(ctypes.CDLL(None), "GOMP_parallel")
