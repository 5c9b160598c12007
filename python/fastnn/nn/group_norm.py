"""Group normalization and instance normalization layers."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional


class GroupNorm(torch.nn.GroupNorm):
    """Group normalization of (N, C, ...), as :class:`torch.nn.GroupNorm`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class _InstanceNorm(torch.nn.modules.instancenorm._InstanceNorm):
    # torch's forward checks the input, adds a missing batch dimension, and calls this.
    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return functional.instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            self.momentum if self.momentum is not None else 0.0,
            self.eps,
        )


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):
    """Instance normalization of (N, C, L) or (C, L), as :class:`torch.nn.InstanceNorm1d`."""


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):
    """Instance normalization of (N, C, H, W) or (C, H, W), as :class:`torch.nn.InstanceNorm2d`."""


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):
    """Instance normalization of (N, C, D, H, W) or (C, D, H, W), as :class:`torch.nn.InstanceNorm3d`."""
