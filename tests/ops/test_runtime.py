"""Threads, fork, one OpenMP runtime, the same bits every time, and the settings of a thread."""

import concurrent.futures
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

import fastnn
import fastnn.functional as fF
from fastnn import _cpu, _state

from .support import FLOATS

SHAPES = [(4, 64, 64), (1, 512, 768), (67, 129, 300), (256, 256, 256), (33, 1030, 65), (700, 40, 1500)]


def forward_and_backward(m, n, k, dtype):
    generator = torch.Generator().manual_seed(m)
    x, w, b = (torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in ((m, k), (n, k), (n,)))
    y = fF.linear_act(x, w, b, "gelu")
    return (y, *torch.autograd.grad(y, (x, w, b), torch.ones_like(y)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_same_bits_at_one_and_two_threads_and_on_every_run(dtype):
    for shape in SHAPES:
        runs = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            runs.append(forward_and_backward(*shape, dtype))
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True)), shape


def test_sixteen_threads_at_once():
    shapes = [(4, 64, 64), (67, 129, 300), (200, 200, 200), (1, 512, 768)]
    expected = [forward_and_backward(*shape, torch.float32) for shape in shapes]
    start = threading.Barrier(16)

    def work(seed):
        torch.set_num_threads(1)
        start.wait()
        for i in range(12):
            which = (seed + i) % len(shapes)
            found = forward_and_backward(*shapes[which], torch.float32)
            if not all(torch.equal(a, b) for a, b in zip(found, expected[which], strict=True)):
                return False
        return True

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(16)))


def run(program, **environment):
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_fork():
    """After a parallel region in the parent, the child computes too. (torch's own OpenMP does not survive this with more
    than one thread in the child, so that a DataLoader's worker uses one.)"""
    assert (
        run(
            """
import os, sys, torch, fastnn
a = torch.randn(300, 300)
expected = fastnn.mm(a, a)
fastnn.count = 0
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    same = torch.equal(fastnn.mm(a, a), expected)
    fastnn._state.count_fallback("x", "y")
    os._exit(0 if same else 3)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), torch.equal(fastnn.mm(a, a), expected))
"""
        )
        == "0 True"
    )


def test_one_openmp_runtime():
    found = run(
        """
import torch, fastnn
fastnn.mm(torch.randn(512, 512), torch.randn(512, 512))
maps = open("/proc/self/maps").read().split()
print(len({p for p in maps if "gomp" in p or "libomp" in p or "iomp" in p}))
"""
    )
    assert found == "1"


def test_a_runtime_that_torch_keeps_to_itself_is_made_global():
    """As torch's wheels for other processors than x86 do: loaded, but not where an extension's symbols are looked for."""
    code = """
import ctypes, torch
from fastnn import _openmp
theirs = ctypes.CDLL
asked = []
class Hidden:
    pass
def load(path, mode=0):
    if path is None:
        return Hidden() if not asked else theirs(None)
    asked.append((path, mode == ctypes.RTLD_GLOBAL))
    return theirs(path, mode=mode)
ctypes.CDLL = load
_openmp.make_global()
print(asked == [(_openmp.loaded()[0], True)], "torch" in asked[0][0])
ctypes.CDLL = lambda path, mode=0: Hidden()
try:
    _openmp.make_global()
except ImportError as error:
    print(error)
"""
    found = run(code).splitlines()
    assert found[0] == "True True"
    assert found[1].startswith("fastnn: no OpenMP runtime: torch has loaded none")


def test_the_gil_is_released():
    a = torch.randn(1500, 1500)
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(1)
            stop.wait(0.0005)

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        before = len(ticks)
        for _ in range(5):
            fastnn.mm(a, a)
        assert len(ticks) > before
    finally:
        stop.set()
        ticker.join()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("isa", _cpu.available_isas())
def test_batch_invariant(isa, dtype):
    """A row's bits do not depend on how many other rows are in the batch."""
    before = _cpu.isa()
    _cpu.set_isa(isa)
    try:
        for n, k in ((64, 64), (129, 300), (1, 77), (40, 1200), (70, 147), (33, 2500)):
            x, w, b = torch.randn(150, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
            with fastnn.batch_invariant():
                whole = fF.linear_act(x, w, b, "gelu")
                for first, last in ((0, 1), (0, 2), (5, 12), (17, 50), (3, 150)):
                    assert torch.equal(fF.linear_act(x[first:last], w, b, "gelu"), whole[first:last])
                    assert torch.equal(fF.linear(x[first:last], w, b), fF.linear(x, w, b)[first:last])
                for right in (w.t(), w.t().contiguous()):
                    for last in (8, 20, 40):
                        assert torch.equal(fastnn.mm(x[7:last], right), fastnn.mm(x, right)[7:last])
                batched = fF.linear_act(x.view(3, 50, k), w, b, "gelu").view(150, n)
                assert torch.equal(batched, whole)
    finally:
        _cpu.set_isa(before)


def test_backends_by_name():
    x, w = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    with fastnn.backend("reference"):
        y = fF.linear(x, w)
        assert "Linear" not in type(y.grad_fn).__name__
        torch.testing.assert_close(y, F.linear(x, w))
        torch.testing.assert_close(fastnn.addmm(x[:, :1], x, x.t(), beta=2), torch.addmm(x[:, :1], x, x.t(), beta=2))
        torch.testing.assert_close(fF.gelu(x), F.gelu(x))
        torch.testing.assert_close(fF.relu(x.clone(), inplace=True), F.relu(x))
        (g,) = torch.autograd.grad(y.sum(), w)
        with fastnn.backend("cpu"):
            assert type(fF.linear(x, w).grad_fn).__name__ == "_LinearBackward"
        assert _state.settings().backend == "reference"
    assert _state.settings() is _state.PLAIN
    torch.testing.assert_close(g, torch.autograd.grad(F.linear(x, w).sum(), w)[0])
    with pytest.raises(ValueError, match="backend"):
        fastnn.backend("mkl")


def test_a_backend_from_the_environment():
    program = (
        "import torch, fastnn; print(fastnn._state.settings().backend); fastnn.mm(torch.ones(2, 2), torch.ones(2, 2))"
    )
    assert run(program, FASTNN_BACKEND="reference") == "reference"


def test_settings_belong_to_a_thread():
    seen = {}

    def look():
        seen["other"] = _state.settings()

    with fastnn.backend("reference"), fastnn.batch_invariant(), fastnn.strict():
        other = threading.Thread(target=look)
        other.start()
        other.join()
        assert _state.settings() == ("reference", True, True)
    assert seen["other"] is _state.PLAIN
    assert _state.settings() is _state.PLAIN


def test_fallbacks_are_counted_from_many_threads():
    _state.reset_fallbacks()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: [_state.count_fallback("op", "why") for _ in range(200)], range(8)))
    assert _state.fallbacks() == {("op", "why"): 1600}
    _state.reset_fallbacks()


def test_without_the_dlpack_table_of_newer_torch():
    """torch before 2.10 has none: everything goes the long way, to the same results."""
    program = """
import torch
if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    del torch.Tensor.__dlpack_c_exchange_api__
import fastnn
from fastnn.backends import cpu
x, w = torch.randn(4, 6), torch.randn(5, 6, requires_grad=True)
assert cpu.tensor_product(cpu.LINEAR, x, w.detach(), None, 0, None) is None
y = fastnn.functional.linear(x, w)
torch.testing.assert_close(y, torch.nn.functional.linear(x, w))
y.sum().backward()
torch.testing.assert_close(w.grad, torch.autograd.grad(torch.nn.functional.linear(x, w).sum(), w)[0])
torch.testing.assert_close(fastnn.matmul(x, x.t()), x @ x.t())
torch.testing.assert_close(fastnn.functional.gelu(x), torch.nn.functional.gelu(x))
print(fastnn._state.fallbacks())
"""
    assert run(program) == "{}"


@pytest.mark.parametrize("isa", _cpu.available_isas())
def test_bits_do_not_depend_on_threads_where_values_are_tiny(isa, use_isa):
    """What packing notices of a split product decides the kernel, and must not depend on how the work was cut."""
    use_isa(isa)
    for tiny in (1e-35, 1e-20, 0.0):
        a, b = torch.randn(96, 256), torch.randn(256, 256)
        b[:32] *= tiny
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(fastnn.mm(a, b))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def test_the_dlpack_table_is_used():
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("torch before 2.10")
    from fastnn.backends import cpu

    x = torch.randn(4, 6)

    def product(a, b, bias=None, out=None, kind=cpu.LINEAR, activation="none"):
        return cpu.tensor_product(kind, a, b, bias, cpu.ACTIVATION[activation], out)

    assert product(x, x) is not None
    # What it does not take: other dtypes, layouts, subclasses, tensors without elements or memory.
    for bad in (
        x.int(),
        x.to_sparse(),
        x.to("meta"),
        torch.empty(0, 6),
        None,
        3,
        torch.randn(6),
        torch._neg_view(x),
        torch.randn(4, 5),
        torch.randn(2, 4, 6),
        x.double(),
    ):
        assert product(x, bad) is None
        if not isinstance(bad, torch.Tensor) or bad.dim() != 3:
            assert product(bad, x) is None
    assert product(x, x, bias=x) is None
    assert product(x, x, kind=99) is None
    # Nor an out= that torch would change, refuse or warn of, or that shares memory with an input.
    square, large = torch.randn(4, 4), torch.randn(8, 8)
    assert product(square, square, out=torch.empty(4, 4), kind=cpu.MM) is not None
    assert product(square, square, out=large[::2, ::2], kind=cpu.MM) is not None
    for out in (
        torch.empty(4, 5),
        torch.empty(16),
        torch.empty(4, 4).double(),
        torch.empty(1, 4).expand(4, 4),
        square,
        square.t(),
        torch.empty(4, 4, requires_grad=True),
        torch._neg_view(torch.empty(4, 4)),
        [1.0],
    ):
        assert product(square, square, out=out, kind=cpu.MM) is None
    with torch.inference_mode():
        inference = torch.empty(4, 4)
    assert product(square, square, out=inference, kind=cpu.MM) is None
    # Where a gradient is wanted, the result comes in a tuple, if the gradient needs nothing else.
    w = torch.randn(5, 6, requires_grad=True)
    (result,) = product(x, w)
    assert not result.requires_grad
    torch.testing.assert_close(result, x @ w.detach().t())
    assert product(x, w, activation="gelu") is None
    assert type(product(x, w, activation="relu")) is tuple
    with torch.no_grad():
        assert product(x, w) is not None
    # What C and Python both know must be the same.
    for kind in cpu.ACTIVATION:
        if kind is not None:
            fused = kind == "none" or kind in cpu.SAVES_OUTPUT
            assert (product(x, w, activation=kind) is not None) == fused, kind
    most = cpu.LARGE_BYTES // 4
    column = torch.ones(most, 1)
    assert product(column, torch.ones(1, 1), kind=cpu.MM) is not None
    # No packed weight, and neither a crash.
    assert cpu.tensor_product(cpu.LINEAR, x, w.detach(), None, 0, None, None, object(), 0) is None
    # Larger results come from the caching allocator, in whole huge pages.
    large = product(torch.ones(most + 1, 1), torch.ones(1, 1), kind=cpu.MM)
    assert large.data_ptr() % (2 << 20) == 0 and bool((large == 1).all())
    # And nothing where something looks on.
    with torch.autocast("cpu", torch.bfloat16):
        assert product(x, x) is None
    with fastnn.strict():
        assert product(x, x) is None
    with torch.autograd.forward_ad.dual_level():
        assert product(x, x) is None
    torch.func.vmap(lambda row: row if product(x, x) is None else pytest.fail("under vmap"))(x)


# ---- convolutions ------------------------------------------------------------------------------------------------

# Shapes of input and weight, and options: many positions and few, grouped, depthwise, strided, pointwise, transposed.
CONVOLUTIONS = [
    ("conv2d", (3, 16, 23, 19), (33, 16, 3, 3), {"padding": 1}),
    ("conv2d", (2, 65, 7, 7), (130, 65, 1, 1), {}),
    ("conv2d", (4, 24, 12, 11), (24, 1, 3, 3), {"padding": 1, "groups": 24, "stride": 2}),
    ("conv2d", (2, 12, 14, 9), (18, 4, 5, 3), {"groups": 3, "dilation": 2}),
    ("conv1d", (3, 40, 301), (31, 40, 5), {"stride": 2, "padding": 2}),
    ("conv3d", (2, 5, 6, 9, 8), (17, 5, 3, 3, 3), {"padding": 1}),
    ("conv_transpose2d", (3, 17, 9, 11), (17, 20, 4, 4), {"stride": 2, "padding": 1}),
]


def convolve(name, x_shape, w_shape, options, dtype, channels_last=False):
    """Result and gradients, of numbers that the shape decides."""
    generator = torch.Generator().manual_seed(sum(x_shape))
    filters = w_shape[1] if "transpose" in name else w_shape[0]
    x, w, b = (torch.randn(s, generator=generator).to(dtype) for s in (x_shape, w_shape, (filters,)))
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    inputs = [t.requires_grad_() for t in (x, w, b)]
    y = getattr(fF, name)(*inputs, **options)
    return (y, *torch.autograd.grad(y, inputs, torch.randn(y.shape, generator=generator).to(dtype)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("isa", _cpu.available_isas())
def test_convolutions_give_the_same_bits_on_any_number_of_threads(isa, dtype, use_isa, no_fallback):
    use_isa(isa)
    for case in CONVOLUTIONS:
        for channels_last in (False, True):
            runs = []
            for threads in (1, 2, 3, 2):
                torch.set_num_threads(threads)
                runs.append(convolve(*case, dtype, channels_last))
            for run in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True)), (case, channels_last)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("isa", _cpu.available_isas())
def test_convolutions_are_batch_invariant(isa, dtype, use_isa):
    """An image's bits do not depend on how many others are in the batch, nor do those of its gradient."""
    use_isa(isa)
    torch.set_num_threads(1)
    for name, (_, *rest), w_shape, options in CONVOLUTIONS:
        w = torch.randn(w_shape).to(dtype)
        for channels_last in (False, True):
            x = torch.randn(9, *rest).to(dtype)
            if channels_last and x.dim() == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            x.requires_grad_()
            with fastnn.batch_invariant():
                whole = getattr(fF, name)(x, w, None, **options)
                direction = torch.randn_like(whole)
                (gradient,) = torch.autograd.grad(whole, x, direction)
                for first, last in ((0, 1), (4, 6), (2, 9)):
                    part = x.detach()[first:last].requires_grad_()
                    result = getattr(fF, name)(part, w, None, **options)
                    assert torch.equal(result, whole[first:last]), (name, first, last)
                    (some,) = torch.autograd.grad(result, part, direction[first:last])
                    assert torch.equal(some, gradient[first:last]), (name, first, last)


def test_convolutions_from_sixteen_threads_at_once():
    expected = [convolve(*case, torch.float32) for case in CONVOLUTIONS]
    start = threading.Barrier(16)

    def work(seed):
        torch.set_num_threads(1 + seed % 2)
        start.wait()
        for i in range(4):
            which = (seed + i) % len(CONVOLUTIONS)
            found = convolve(*CONVOLUTIONS[which], torch.float32)
            if not all(torch.equal(a, b) for a, b in zip(found, expected[which], strict=True)):
                return False
        return True

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(16)))


def test_convolutions_by_the_reference(no_fallback):
    """``backend("reference")`` is the formula, gradients and all, and leaves the way of the kernels."""
    for name, x_shape, w_shape, options in CONVOLUTIONS:
        leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (x_shape, w_shape)]
        with fastnn.backend("reference"):
            _cpu.reset_counters()
            y = getattr(fF, name)(*leaves, **options)
            assert type(y.grad_fn).__name__ != "convolutionBackward"
            found = torch.autograd.grad(y, leaves, torch.ones_like(y))
            assert not any(_cpu.counters().values())
        z = getattr(F, name)(*leaves, **options)
        torch.testing.assert_close(y, z)
        for a, b in zip(found, torch.autograd.grad(z, leaves, torch.ones_like(z)), strict=True):
            torch.testing.assert_close(a, b)
