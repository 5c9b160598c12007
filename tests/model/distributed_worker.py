"""One of two processes: trains a step under DistributedDataParallel and under fully_shard, and compares the gradients
with those of one process. Run by test_distributed.py: python distributed_worker.py RANK STORE."""

from __future__ import annotations

import copy
import gc
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastnn

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
RANKS = 2


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 64, bias=False), nn.ReLU(), fastnn.nn.MLP(64, [32], 6, "silu")
    )


def loss_of(model, x, target):
    return nn.functional.cross_entropy(model(x), target)


def check(name, got, expected):
    for key, gradient in expected.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{name} {k}: {m}")


def compare(rank):
    torch.manual_seed(1)
    x, target = torch.randn(16, 20), torch.randint(6, (16,))
    mine = slice(rank * 8, rank * 8 + 8)

    single = fastnn.revert(network())
    loss_of(single, x, target).backward()
    expected = {name: p.grad for name, p in single.named_parameters()}

    replicated = DistributedDataParallel(fastnn.convert(network()))
    loss_of(replicated, x[mine], target[mine]).backward()
    check("ddp", {n.removeprefix("module."): p.grad for n, p in replicated.named_parameters()}, expected)
    assert [row.status for row in fastnn.report(replicated).rows].count("replaced") == 5 + 3

    # Converted inside the wrapper as well.
    late = DistributedDataParallel(fastnn.revert(network()))
    fastnn.convert(late)
    loss_of(late, x[mine], target[mine]).backward()
    check("ddp, then convert", {n.removeprefix("module."): p.grad for n, p in late.named_parameters()}, expected)

    if TORCH < (2, 10):  # there fully_shard's own gradients over gloo are wrong (pytorch issue 162338), or it fails
        return
    mesh = init_device_mesh("cpu", (RANKS,))
    sharded = fastnn.convert(network())
    for layer in sharded:
        if isinstance(layer, (nn.Linear, nn.Sequential)):
            fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    rows = {row.name: row for row in fastnn.report(sharded).rows}
    assert rows["0"].status == "replaced", rows
    assert isinstance(sharded[0], fastnn.nn.Linear)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    loss_of(sharded, x[mine], target[mine]).backward()
    check("fsdp", {n: p.grad.full_tensor() for n, p in sharded.named_parameters()}, expected)
    optimizer.step()
    torch.optim.SGD(single.parameters(), lr=0.1).step()
    with torch.no_grad():
        torch.testing.assert_close(sharded(x), single(x), rtol=1e-4, atol=1e-5)

    # A prepacked copy must not outlive the sharding of its weight.
    packed = fastnn.prepack_(fastnn.convert(network()))
    plain = fastnn.revert(copy.deepcopy(packed))
    fully_shard(packed, mesh=mesh)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), plain(x), rtol=1e-4, atol=1e-5)

    fastnn.revert(sharded)
    assert not isinstance(sharded[0], fastnn.nn.Linear)
    with torch.no_grad():
        torch.testing.assert_close(sharded(x), single(x), rtol=1e-4, atol=1e-5)
    assert fastnn._state.fallbacks() == {}, fastnn._state.fallbacks()


def main(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    compare(rank)
    dist.barrier()
    # A wrapper that outlives the process group keeps gloo's threads, and they abort the interpreter's exit.
    gc.collect()
    dist.destroy_process_group()
    print("gradients agree")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
