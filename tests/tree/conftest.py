"""What the tests of the trees share."""

from __future__ import annotations

from pathlib import Path

import pytest
import sklearn

from fastnn import _cpu

# amx and amx-emulated have no kernels of their own here: they use those of avx512.
ISAS = [name for name in _cpu.available_isas() if not name.startswith("amx")]


@pytest.fixture(params=ISAS)
def isa(request, use_isa):
    """Runs the test once on each instruction set of this machine."""
    use_isa(request.param)
    return request.param


def pytest_collection_modifyitems(items):
    """scikit-learn's trees before 1.9 are others where values are missing; on Python 3.10 there is no newer one."""
    if tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 9):
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="scikit-learn is older than 1.9"))
