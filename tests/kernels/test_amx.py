"""The compiled AMX kernels: the same bits as their emulation. Where there is no AMX, their instructions trap and are
executed one by one (tests/support/amx_trap.cpp), so that what the compiler made of them is tested on any CPU with AVX-512."""

import itertools
import subprocess
import sys

import amx_trap
import pytest
import torch

import fastnn
from fastnn import _cpu
from fastnn import functional as F

pytestmark = pytest.mark.skipif(not amx_trap.HAS_AMX and bool(amx_trap.why_not()), reason=str(amx_trap.why_not()))


@pytest.fixture(scope="module", autouse=True)
def amx():
    if amx_trap.HAS_AMX:
        yield None
    else:
        with amx_trap.installed() as library:
            yield library


def executed():
    """How many AMX instructions so far; on a CPU that has them nobody counts."""
    return None if amx_trap.HAS_AMX else amx_trap.library().amx_executed()


def on(isa, compute):
    """What compute() gives on an instruction set."""
    _cpu.set_isa(isa)
    assert _cpu.isa() == isa
    torch.manual_seed(1)
    return list(compute())


def assert_same_bits(compute):
    """For a function of no arguments that gives tensors, from AMX and from its emulation."""
    before = executed()
    results = on("amx", compute)
    assert before is None or executed() > before, "no AMX instruction was executed"
    for found, expected in zip(results, on("amx-emulated", compute), strict=True):
        assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


SHAPES = [(32, 32, 32), (33, 31, 65), (1, 64, 96), (70, 97, 33), (129, 66, 300)]


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32(precision):
    torch.set_float32_matmul_precision(precision)
    assert_same_bits(lambda: [fastnn.matmul(torch.randn(m, k), torch.randn(k, n)) for m, n, k in SHAPES])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half(dtype):
    def compute():
        for m, n, k in SHAPES:
            a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
            yield fastnn.matmul(a, b)
            yield fastnn.matmul(a.t().contiguous().t(), b.t().contiguous().t())
        # Longer than what is summed at a time: sums are added to those before.
        yield fastnn.matmul(torch.randn(40, 2500).to(dtype), torch.randn(2500, 40).to(dtype))

    assert_same_bits(compute)


def test_long_sums_and_epilogues():
    def compute():
        x, w, bias = torch.randn(90, 1100), torch.randn(130, 1100), torch.randn(130)
        yield F.linear_act(x, w, bias, "gelu")
        yield fastnn.addmm(torch.randn(90, 130), x, w.t(), beta=0.5, alpha=2)
        yield fastnn.bmm(torch.randn(3, 135, 140), torch.randn(3, 140, 136))

    assert_same_bits(compute)


def test_integers_are_exact():
    def integers(dtype, *shape):
        ends = torch.iinfo(dtype)
        return torch.randint(ends.min, ends.max + 1, shape, dtype=dtype)

    for (m, n, k), dtype in itertools.product(SHAPES, (torch.int8, torch.uint8)):
        a, b = integers(dtype, m, k), integers(torch.int8, k, n)
        _cpu.set_isa("amx")
        assert torch.equal(fastnn.int_mm(a, b), (a.long() @ b.long()).int())


def test_quantized_layers():
    def compute():
        weight, scale = torch.randint(-128, 128, (70, 130), dtype=torch.int8), torch.rand(70) + 0.01
        yield F.int8_linear(torch.randn(45, 130), weight, scale, torch.randn(70))
        yield F.weight_only_linear(torch.randn(45, 130), weight, scale)

    assert_same_bits(compute)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolution(dtype):
    def compute():
        x = torch.randn(2, 80, 15, 17, dtype=dtype, requires_grad=True)
        w = torch.randn(96, 80, 3, 3, dtype=dtype, requires_grad=True)
        y = F.conv2d(x, w, padding=1, stride=2)
        yield y.detach()
        yield from torch.autograd.grad(y.float().square().sum(), (x, w))
        yield F.conv2d(x.detach().contiguous(memory_format=torch.channels_last), w.detach()[:, :, :1, :1])

    assert_same_bits(compute)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(dtype):
    def compute():
        q, k, v = (torch.randn(1, 2, 70, 40, dtype=dtype, requires_grad=True) for _ in range(3))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        yield y.detach()
        yield from torch.autograd.grad(y.float().square().sum(), (q, k, v))

    assert_same_bits(compute)


def test_infinities_and_sizes_of_zero():
    def compute():
        a, b = torch.randn(140, 150), torch.randn(150, 160)
        a[3, 7], a[5, 9], b[11, 2] = torch.inf, torch.nan, -torch.inf
        yield fastnn.matmul(a, b).nan_to_num(7)
        yield fastnn.matmul(torch.randn(5, 0), torch.randn(0, 6))

    assert_same_bits(compute)


def test_tiles_are_left(amx):
    if amx is None:
        pytest.skip("the instructions are the CPU's own")
    before = executed()
    on("amx", lambda: [fastnn.matmul(torch.randn(128, 96), torch.randn(96, 160))])
    # 4 x 5 blocks of 32 x 32, 3 steps of K, 6 products of 4 tiles.
    assert executed() - before > 4 * 5 * 3 * 6 * 4
    assert not amx.amx_in_use()  # oneDNN has a configuration of its own


@pytest.mark.skipif(amx_trap.HAS_AMX, reason="the instructions are the CPU's own")
@pytest.mark.parametrize(
    ("planted", "says"), [("unconfigured", "no tiles are configured"), ("half_configured", "the tile has no size")]
)
def test_faults_are_found(planted, says):
    code = f"import amx_trap; amx_trap.library().amx_trap(); amx_trap.library().amx_planted_{planted}()"
    ran = subprocess.run([sys.executable, "-c", code], cwd=amx_trap.Path(amx_trap.__file__).parent, capture_output=True)
    assert ran.returncode < 0 and says in ran.stderr.decode()
