"""What every test starts from: one seed, torch's default precision, and two threads."""

import pytest
import torch

from fastnn import _cpu, _state


@pytest.fixture(autouse=True)
def fresh_state():
    torch.manual_seed(0)
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    yield
    torch.set_float32_matmul_precision(precision)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def use_isa():
    """Chooses an instruction set until the test ends."""
    before = _cpu.isa()
    yield _cpu.set_isa
    _cpu.set_isa(before)


@pytest.fixture
def no_fallback():
    """Fails the test if any call in it went to torch."""
    _state.reset_fallbacks()
    yield
    assert _state.fallbacks() == {}
