"""The pooling kernels on CUDA tensors: see backends._pool."""

from __future__ import annotations

from typing import Any

from .._pool import Pools, by_address
from .._tensors import new_image
from . import module, where


def _pool(*args: Any, **kwargs: Any) -> None:
    module().pool(*args, **kwargs)


_pools = Pools(
    by_address(_pool, where), lambda like, shape, dtype, channels_last: new_image(like, shape, channels_last, dtype)
)
max_pool = _pools.max_pool
max_pool_backward = _pools.max_pool_backward
max_pool_gather = _pools.max_pool_gather
max_pool_indices = _pools.max_pool_indices
avg_pool = _pools.avg_pool
avg_pool_backward = _pools.avg_pool_backward
