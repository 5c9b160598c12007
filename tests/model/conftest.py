"""What the tests of the layers share."""

from __future__ import annotations

import pytest
import torch

import fastnn
from fastnn import _state


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def no_fallback():
    """Fails the test if any call went to torch."""
    _state.reset_fallbacks()
    yield
    assert fastnn._state.fallbacks() == {}
