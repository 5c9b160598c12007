"""The caching host allocator, as torch sees it."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch

from fastnn import _cpu

from .calls import DTYPE, empty

MB = 1 << 20


@pytest.fixture(autouse=True)
def _fresh():
    gc.collect()
    limit = _cpu.allocator_stats()["cache_limit"]
    _cpu.empty_cache()
    yield
    gc.collect()
    _cpu.set_cache_limit(limit)
    _cpu.empty_cache()


@pytest.mark.parametrize("dtype", DTYPE)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0, 4), (1000, 1001), (2, 3, 4, 5, 6, 7)])
def test_is_a_tensor(dtype, shape):
    x = empty(*shape, dtype=dtype)
    assert x.dtype == dtype and tuple(x.shape) == shape and x.is_contiguous() and x.device.type == "cpu"
    x.fill_(3)
    assert bool((x == 3).all())
    if x.numel() > 1:
        assert x.data_ptr() % 64 == 0


def test_blocks_come_back():
    x = empty(8 * MB)
    address = x.data_ptr()
    assert address % (2 * MB) == 0
    before = _cpu.allocator_stats()
    del x
    after = _cpu.allocator_stats()
    assert after["bytes_cached"] - before["bytes_cached"] == before["bytes_live"] - after["bytes_live"] >= 32 * MB
    y = empty(8 * MB)
    assert y.data_ptr() == address
    assert _cpu.allocator_stats()["hits"] == before["hits"] + 1
    z = empty(8 * MB)
    assert z.data_ptr() != address
    assert _cpu.allocator_stats()["misses"] == before["misses"] + 1


def test_a_block_is_cut_and_grows_together_again():
    x = empty(70 * MB, dtype=torch.uint8)
    address = x.data_ptr()
    del x
    before = _cpu.allocator_stats()
    y, z = empty(19 * MB, dtype=torch.uint8), empty(40 * MB, dtype=torch.uint8)
    assert (y.data_ptr(), z.data_ptr()) == (address, address + 20 * MB)
    assert _cpu.allocator_stats()["bytes_cached"] == 10 * MB
    y.fill_(1), z.fill_(2)
    assert bool((y == 1).all())
    del y
    small = empty(8 * MB, dtype=torch.uint8)  # from the smallest piece that has it
    assert small.data_ptr() == address + 60 * MB
    del z, small
    whole = empty(70 * MB, dtype=torch.uint8)
    after = _cpu.allocator_stats()
    assert whole.data_ptr() == address
    assert (after["hits"], after["misses"]) == (before["hits"] + 4, before["misses"])


def test_no_more_is_held_than_was_needed_at_once():
    for size in (10, 20, 30, 40, 50):
        empty(size * MB, dtype=torch.uint8)
        assert _cpu.allocator_stats()["bytes_cached"] <= size * MB


def test_views_outlive_the_base():
    x = empty(4 * MB).fill_(2)
    view = x[5:7]
    alias = x.detach().view(2, -1)
    live = _cpu.allocator_stats()["bytes_live"]
    del x
    gc.collect()
    assert _cpu.allocator_stats()["bytes_live"] == live
    assert view.tolist() == [2, 2] and float(alias.sum()) == 8 * MB
    del view, alias
    assert _cpu.allocator_stats()["bytes_live"] < live


def test_autograd():
    x = empty(2 * MB).fill_(0.5).requires_grad_()
    (x * x).sum().backward()
    assert x.grad is not None and bool((x.grad == 1).all())
    with pytest.raises(RuntimeError, match="in-place"):
        x.add_(1)


def test_copies():
    x = empty(3, 400_000)
    x.copy_(torch.randn(3, 400_000))
    assert torch.equal(copy.deepcopy(x), x)
    assert torch.equal(pickle.loads(pickle.dumps(x)), x)
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer), x)
    y = x.clone()
    live = _cpu.allocator_stats()["bytes_live"]
    x.share_memory_()  # moves to shared memory and gives the block back
    assert x.is_shared() and torch.equal(x, y)
    assert _cpu.allocator_stats()["bytes_live"] < live
    assert torch.equal(torch.from_numpy(y.numpy()), y)


def test_cache_limit():
    _cpu.set_cache_limit(70 * MB)
    held = [empty(10 * MB) for _ in range(3)]
    held.clear()
    assert _cpu.allocator_stats()["bytes_cached"] <= 70 * MB
    assert _cpu.allocator_stats()["cache_limit"] == 70 * MB
    _cpu.set_cache_limit(0)
    assert _cpu.allocator_stats()["bytes_cached"] == 0
    x = empty(10 * MB)
    del x
    assert _cpu.allocator_stats()["bytes_cached"] == 0
    with pytest.raises(ValueError, match="set_cache_limit"):
        _cpu.set_cache_limit(-1)


def test_the_least_recently_used_block_goes_first():
    a, b = empty(30 * MB, dtype=torch.uint8), empty(50 * MB, dtype=torch.uint8)
    address = b.data_ptr()
    _cpu.set_cache_limit(60 * MB)
    del a
    del b  # newer: it stays, and the older one goes
    assert empty(50 * MB, dtype=torch.uint8).data_ptr() == address


def test_empty_cache():
    x = empty(16 * MB)
    del x
    assert _cpu.allocator_stats()["bytes_cached"] > 0
    _cpu.empty_cache()
    assert _cpu.allocator_stats()["bytes_cached"] == 0


def test_an_unused_capsule_gives_its_memory_back():
    live = _cpu.allocator_stats()["bytes_live"]
    capsule = _cpu.empty_dlpack((5 * MB,), 0)
    assert '"dltensor"' in repr(capsule)
    assert _cpu.allocator_stats()["bytes_live"] > live
    del capsule
    assert _cpu.allocator_stats()["bytes_live"] == live


def test_threads():
    """Tensors born on one thread and dropped on another, many at once."""
    live = _cpu.allocator_stats()["bytes_live"]
    failures: list[str] = []
    pool: list[torch.Tensor] = []
    lock = threading.Lock()

    def work(seed: int) -> None:
        for i in range(60):
            x = empty((1 + (seed + i) % 3) * MB // 2)
            x[:100].fill_(seed)
            x[-100:].fill_(seed)
            with lock:
                pool.append(x)
                y = pool.pop(0) if len(pool) > 5 else None
            if y is not None and float(y[0]) != float(y[-1]):
                failures.append("two tensors shared a block")
            if float(x[0]) != seed:
                failures.append("a live block was handed out")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    pool.clear()
    gc.collect()
    assert not failures
    assert _cpu.allocator_stats()["bytes_live"] == live


def test_fork():
    """The child of a fork, taken while other threads allocate, allocates and frees on its own."""
    x = empty(4 * MB).fill_(1)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            empty(2 * MB)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    try:
        for _ in range(10):
            pid = os.fork()
            if pid == 0:
                ok = float(x[3]) == 1
                x[3] = 2
                y = empty(2 * MB)
                y[0] = 5
                del y
                _cpu.empty_cache()
                os._exit(0 if ok else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        stop.set()
        for t in threads:
            t.join()
    assert float(x[3]) == 1


def test_out_of_memory():
    x = empty(16 * MB)
    del x
    with pytest.raises(MemoryError):
        _cpu.empty_dlpack((1 << 56,), 0)
    assert _cpu.allocator_stats()["bytes_cached"] == 0  # given back before giving up
    assert float(empty(MB).fill_(1)[0]) == 1


@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        ((-1,), 0, "shape"),
        ((1,), 7, "dtype"),
        ((1 << 40, 1 << 40), 0, "shape"),
        ([3], 0, "shape"),
        ((1,) * 65, 0, "shape"),
    ],
)
def test_bad_arguments(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        _cpu.empty_dlpack(shape, dtype)


def test_tensors_alive_at_exit():
    program = """
import sys, threading, torch
from fastnn import _cpu
class Capsule:
    def __init__(self, c): self.c = c
    def __dlpack__(self, **_): return self.c
    def __dlpack_device__(self): return (1, 0)
torch.kept = [torch.from_dlpack(Capsule(_cpu.empty_dlpack((4 << 20,), 0))) for _ in range(3)]
sys.kept = _cpu.empty_dlpack((4 << 20,), 0)
threading.current_thread().kept = torch.kept[0].view(2, -1)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
