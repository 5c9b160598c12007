"""fastnn: existing PyTorch code, faster, with the same numbers.

``model = fastnn.convert(model)`` replaces the layers of a model; ``with fastnn.patch():`` replaces torch's functions;
``fastnn.functional`` and ``fastnn.matmul`` and its kin are the functions themselves.
"""

import importlib as _importlib
import importlib.metadata as _metadata

from . import functional, nn
from ._state import FallbackError, backend, batch_invariant, strict
from .backends.cpu import empty_cache
from .convert import ConversionError, convert, report, revert
from .functional import (
    addmm,
    baddbmm,
    bmm,
    dequantize,
    fake_quantize,
    int_mm,
    matmul,
    mm,
    mv,
    quantize,
    quantize_dynamic,
)
from .info import info
from .patch import patch
from .prepack import prepack_

try:
    __version__ = _metadata.version("fastnn")
except _metadata.PackageNotFoundError:  # run from a source tree that is on the path
    __version__ = "0+unknown"


def __getattr__(name):
    # The models, the suite and the benchmarks are imported when they are asked for: layers do not need them.
    if name in ("models", "testing", "bench", "integrations", "quant", "tree"):
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ConversionError",
    "FallbackError",
    "addmm",
    "backend",
    "baddbmm",
    "batch_invariant",
    "bmm",
    "convert",
    "dequantize",
    "empty_cache",
    "fake_quantize",
    "functional",
    "info",
    "int_mm",
    "matmul",
    "mm",
    "mv",
    "nn",
    "patch",
    "prepack_",
    "quantize",
    "quantize_dynamic",
    "report",
    "revert",
    "strict",
]
