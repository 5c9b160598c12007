"""Running statistics, updated by torch: where no kernel does it."""

from __future__ import annotations

import torch
from torch import Tensor


def move(running: Tensor, statistic: Tensor, momentum: float) -> None:
    """running = (1 - momentum) * running + momentum * statistic, rounded once."""
    running.copy_(torch.lerp(running.double(), statistic, momentum))


def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, factor: float, momentum: float
) -> None:
    """Both of them, of float64 statistics, the variance times ``factor``."""
    with torch.no_grad():
        move(running_mean, mean, momentum)
        move(running_var, var * factor, momentum)
