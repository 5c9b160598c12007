"""What the tests of the kernels share."""

from __future__ import annotations

import pytest
import torch

from fastnn import _cpu

# amx and amx-emulated have no elementwise kernels of their own: they use those of avx512.
ISAS = [name for name in _cpu.available_isas() if not name.startswith("amx")]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=ISAS)
def isa(request, use_isa):
    """Runs the test once on each instruction set of this machine."""
    use_isa(request.param)
    return request.param
