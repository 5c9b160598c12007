"""How kernels are started: on the device of their tensors, whichever is current."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import INTERPRETED

if INTERPRETED:
    from . import _interpreter


def launch(kernel: Any, programs: int, on: Tensor, *args: Any, **options: Any) -> None:
    """``programs`` instances of a kernel, on the device of ``on`` and the stream that is current there."""
    if INTERPRETED:
        with _interpreter.as_a_gpu():
            kernel[(programs,)](*args, **options)
        return
    with torch.cuda.device(on.device):
        # A product and a sum become one operation, as in CUDA C++; newer versions of Triton want it said.
        kernel[(programs,)](*args, **{"enable_fp_fusion": True, **options})


def ceil_div(x: int, y: int) -> int:
    return -(-x // y)
