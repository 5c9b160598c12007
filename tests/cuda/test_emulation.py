"""The emulation itself: kernels with planted bugs are found, correct ones are not blamed, and the order in which warps
and blocks run changes no bits."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

import fastnn
from fastnn.backends import cuda

PLANTED = Path(__file__).parents[2] / "build/emulation/planted"
#: A kernel with a bug -> what must be said of it.
BUGS = {
    "no-barrier": "wrong result: element 0 is -nan",
    "no-wait": "wrong result: element 0 is -nan",
    "refill-too-soon": "wrong result: element 0 is -nan",
    "overrun-shared": "AddressSanitizer: use-after-poison",
    "overrun-static": "AddressSanitizer: use-after-poison",
    "overrun-global": "AddressSanitizer: heap-buffer-overflow",
    "wrong-mask": "__shfl_xor_sync: lane 16 is not in its mask",
    "divergent-barrier": "divergent barrier: thread (",
    "divergent-warp": "divergent warp: lane ",
    "deadlock": "bar.sync 1 holds 32 threads",
    "misaligned": "cp.async: an address that is no multiple of 4",
    "no-full-wait": "mbarrier.arrive: more than 1 in one phase",
    "no-empty-wait": "wrong result: element 1 is -nan",
    "wrong-parity": "mbarrier.arrive: more than 1 in one phase",
    "too-many-bytes": "(deadlock: nobody else can run)",
    "no-init-fence": "cp.async.bulk.tensor: an mbarrier that no fence has made visible",
    "no-init-barrier": "no mbarrier was made there yet",
    "misplaced-tile": "cp.async.bulk.tensor: outside of shared memory, or no multiple of 1024",
    "no-swizzle": "wrong result: element 32 is 96 instead of 80",
    "no-proxy-fence": "wgmma: reads what was stored without fence.proxy.async",
    "no-fence": "wgmma: no wgmma.fence since its accumulators may have been used",
    "no-product-wait": "wgmma: a warp ended with products that it did not wait for",
    "never-waited": "wgmma: a warp ended with products that it did not wait for",
    "overwritten": "wgmma: operands that were written before it was waited for",
    "registers-reused": "wgmma: operands that were written before it was waited for",
    "wrong-stride": "wrong result: element 0 is -nan",
    "registers-of-one-warp": "setmaxnreg: not all warps of a warpgroup did the same",
    "registers-wrong-way": "setmaxnreg: from 40 to 64 is the other direction",
    "long-sum": "wrong result: element 1 is 32788 instead of 64001",
}
RIGHT = ("neighbours", "totals", "staged", "tiles", "products", "short-sums")
#: These are of the kernel's own doing, at a line of its source.
WITH_A_LINE = (
    *("wrong-mask", "divergent-barrier", "divergent-warp", "deadlock", "misaligned"),
    *("wrong-parity", "no-init-fence", "misplaced-tile", "no-proxy-fence", "no-fence", "overwritten"),
)


def run(name):
    if not PLANTED.exists():
        pytest.skip("the emulation of CUDA is not built (make emulation)")
    return subprocess.run([PLANTED, name] if name else [PLANTED], capture_output=True, text=True, timeout=60)


def test_every_example_is_tested():
    assert set(run("").stdout.split()) == {*BUGS, *RIGHT}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name):
    result = run(name)
    assert result.returncode != 0
    assert BUGS[name] in result.stdout + result.stderr
    if name in WITH_A_LINE:
        assert re.search(r"planted(_sm90)?\.cpp:\d", result.stdout)


@pytest.mark.parametrize("name", RIGHT)
def test_the_same_kernel_without_it_is_right(name):
    result = run(name)
    assert (result.returncode, result.stdout) == (0, "right\n")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_threads_changes_nothing(on_cuda, dtype):
    a, b = torch.randn(150, 90).to(dtype), torch.randn(90, 70).to(dtype)
    results = []
    for seed in (0, 1, 2, 3):
        on_cuda.set_seed(seed)
        results.append((fastnn.mm(a, b), fastnn.functional.linear(a, b.t(), b[0])))
    for more in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], more, strict=True))


def test_the_binding_checks_its_arguments(emulation):
    a = torch.randn(3, 4)
    pointer, shape, strides = a.data_ptr(), a.shape, a.stride()
    with pytest.raises(ValueError, match="a, b, c: expected"):
        emulation.gemm(pointer, shape, strides, 0, pointer, shape, strides, 0, pointer, shape, strides, 0)
    with pytest.raises(ValueError, match="dtype code"):
        emulation.gemm(pointer, shape, strides, 9, pointer, (4, 3), (1, 4), 0, pointer, (3, 3), (3, 1), 0)
    with pytest.raises(ValueError, match="no CUDA kernel for float64"):
        emulation.activation(1, pointer, pointer, shape, strides, strides, 1, 0, 0)


def test_without_a_kernel_the_call_is_torchs_and_counted(on_cuda, monkeypatch):
    monkeypatch.setattr(cuda, "OPS", cuda.OPS - {"softmax"})
    fastnn._state.reset_fallbacks()
    x = torch.randn(3, 4)
    assert torch.equal(fastnn.functional.softmax(x, 1), torch.softmax(x, 1))
    assert fastnn._state.fallbacks() == {("softmax", "no CUDA kernel for softmax"): 1}
    with fastnn.strict(), pytest.raises(fastnn.FallbackError, match="no CUDA kernel for softmax"):
        fastnn.functional.softmax(x, 1)


def test_cpu_tensors_are_none_of_a_real_device():
    fastnn._state.reset_fallbacks()
    with fastnn.backend("cuda"):
        x = torch.randn(3, 4)
        assert torch.equal(fastnn.mm(x, x.t()), x @ x.t())
    (reason,) = (reason for _, reason in fastnn._state.fallbacks())
    assert reason in (
        "this build of fastnn has no CUDA kernels",
        "a tensor on cpu, which a kernel for cuda cannot read",
    )
