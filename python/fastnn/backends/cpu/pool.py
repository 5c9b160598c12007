"""The pooling kernels on CPU tensors: see backends._pool."""

from __future__ import annotations

from ... import _cpu
from .._pool import Pools, by_address
from . import empty_image

_pools = Pools(
    by_address(_cpu.pool), lambda like, shape, dtype, channels_last: empty_image(like, shape, channels_last, dtype)
)
max_pool = _pools.max_pool
max_pool_backward = _pools.max_pool_backward
max_pool_gather = _pools.max_pool_gather
max_pool_indices = _pools.max_pool_indices
avg_pool = _pools.avg_pool
avg_pool_backward = _pools.avg_pool_backward
