"""Whether a result is as near to float64 as torch's own."""

from __future__ import annotations

import torch

from fastnn.testing.errors import relative_error, roundoff


def assert_as_near_as_torch(ours, theirs, exact, *, factor=3.0, roundoffs=4.0, what=""):
    """The error of `ours` against `exact` (float64) is at most `factor` times torch's, or a few roundoffs."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    if ours.dtype == torch.float64:
        # What it is measured against has rounded as often, and 1 - tanh(x)^2 cancels, as does a nearly constant gradient.
        roundoffs = 4096.0
    error, torch_error = relative_error(ours, exact), relative_error(theirs, exact)
    bound = max(factor * torch_error, roundoffs * roundoff(theirs.dtype))
    assert error <= bound, f"{what}: relative error {error:.2e}, torch's {torch_error:.2e}"
