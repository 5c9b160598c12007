"""What estimators that train across machines ask of the processes that train with them.

Rows are numbered through: those of rank 0 first, then those of rank 1, and so on. :class:`Alone` answers the same
questions where there is one process.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

_alone = contextvars.ContextVar("fastnn_tree_alone", default=False)
_gloo: dict[object, object] = {}  # by the default group that it was made for


@contextlib.contextmanager
def local_fit() -> Iterator[None]:
    """Fits in this block use the rows of this process alone, also inside an initialised ``torch.distributed`` group."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def processes():
    """The processes that a fit started now is shared with: those of torch's default group, if there are several."""
    if _alone.get() or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return Alone()
    return Group()


class Alone:
    """One process, which holds all rows."""

    size, rank = 1, 0
    reduce = None

    def share(self, value):
        """The value of rank 0."""
        return value

    def each(self, value) -> list:
        """The value of each process."""
        return [value]

    def largest(self, values: np.ndarray) -> np.ndarray:
        """Of each number the largest of all processes; NaN where one is."""
        return values

    def count(self, rows: int) -> None:
        """Says how many rows this process holds; numbers them."""
        self.first, self.last, self.all = 0, rows, rows

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """An array with an entry a row, of all processes."""
        return rows

    def own_positions(self, order: np.ndarray | None) -> np.ndarray | None:
        """Where this process's rows are in `order`, a list of rows; None for all rows as they come."""
        return None

    def assemble(self, part: np.ndarray, positions: np.ndarray | None, total: int) -> np.ndarray:
        """Puts each process's part to its positions in an array of `total`."""
        return part

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What one process raises in this block stops all of them."""
        yield


class Group(Alone):
    """The processes of torch's default group. Every method is called by all of them, in the same order."""

    def __init__(self) -> None:
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        self.group = None
        if dist.get_backend() != "gloo":  # numbers lie in main memory
            default = dist.group.WORLD
            if default not in _gloo:
                _gloo.clear()
                _gloo[default] = dist.new_group(backend="gloo")
            self.group = _gloo[default]

    def reduce(self, address: int, count: int) -> None:
        """Sums int64 of all processes in place."""
        memory = (ctypes.c_int64 * count).from_address(address)
        dist.all_reduce(torch.from_numpy(np.frombuffer(memory, dtype=np.int64)), group=self.group)

    def share(self, value):
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def each(self, value) -> list:
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def largest(self, values: np.ndarray) -> np.ndarray:
        return np.max(self.each(np.asarray(values)), axis=0)

    def count(self, rows: int) -> None:
        counts = self.each(rows)
        self.counts = counts
        self.first = sum(counts[: self.rank])
        self.last, self.all = self.first + rows, sum(counts)

    def _gather(self, array: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
        if array.dtype.hasobject or array.dtype.kind not in "biuf":
            return self.each(array)
        most = max(lengths)
        mine = np.zeros((most, *array.shape[1:]), dtype=array.dtype)
        mine[: len(array)] = array
        mine = torch.from_numpy(mine.reshape(-1).view(np.uint8))
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self.group)
        shape = (most, *array.shape[1:])
        return [p.numpy().view(array.dtype).reshape(shape)[:length] for p, length in zip(parts, lengths, strict=True)]

    def gather(self, rows: np.ndarray) -> np.ndarray:
        dtypes = self.each(rows.dtype)
        dtype = dtypes[0] if len(set(dtypes)) == 1 else np.result_type(*dtypes)
        return np.concatenate(self._gather(np.asarray(rows, dtype=dtype), self.counts))

    def own_positions(self, order: np.ndarray | None) -> np.ndarray:
        if order is None:
            return np.arange(self.first, self.last)
        return np.flatnonzero((order >= self.first) & (order < self.last))

    def assemble(self, part: np.ndarray, positions: np.ndarray, total: int) -> np.ndarray:
        lengths = self.each(len(part))
        out = np.empty((total, *part.shape[1:]), dtype=part.dtype, order="F" if part.ndim > 1 else "C")
        for at, values in zip(self._gather(positions, lengths), self._gather(part, lengths), strict=True):
            out[at] = values
        return out

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        error = None
        try:
            yield
        except Exception as e:
            error = e
        messages = self.each(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise RuntimeError(f"fit across {self.size} processes: rank {rank} raised {message}")
