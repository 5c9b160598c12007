"""What the tests of the trees share."""

from __future__ import annotations

import pytest

from fastnn import _cpu

# amx and amx-emulated have no kernels of their own here: they use those of avx512.
ISAS = [name for name in _cpu.available_isas() if not name.startswith("amx")]


@pytest.fixture(params=ISAS)
def isa(request, use_isa):
    """Runs the test once on each instruction set of this machine."""
    use_isa(request.param)
    return request.param
