"""Runs the compiled AMX kernels on a CPU without AMX: their instructions trap and are executed by amx_trap.cpp, each in a
few microseconds."""

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from fastnn import _cpu

HAS_AMX = "amx" in _cpu.available_isas()
#: Every test that goes through the instruction sets goes through AMX as well.
ALWAYS = bool(os.environ.get("FASTNN_TRAP_AMX")) and not HAS_AMX
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def why_not():
    """None where install() works, else the reason why not."""
    if not _cpu.cpu_features()["avx512"]:
        return "the AMX kernels need AVX-512 as well"
    return None if COMPILER else "no C++ compiler"


@functools.cache
def library():
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "amx_trap.so"
        source = Path(__file__).with_suffix(".cpp")
        subprocess.run([COMPILER, "-std=c++17", "-O2", "-shared", "-fPIC", source, "-o", built], check=True)
        return ctypes.CDLL(str(built))


def install():
    """From now on AMX is one of the available instruction sets; "amx" has to be chosen by name."""
    best = _cpu.isa()
    library().amx_trap()
    _cpu.assume_amx(True)
    _cpu.set_isa(best)


@contextlib.contextmanager
def installed():
    before = _cpu.isa()
    install()
    try:
        yield library()
    finally:
        _cpu.set_isa(before)
        if not ALWAYS:
            _cpu.assume_amx(False)
            library().amx_release()


if ALWAYS:
    install()  # here, because instruction sets are parameters of tests
