"""The matrix product of sm_90a, with the CPU as the device: the copy engine and wgmma. Where tensor maps cannot describe an
operand the kernel of sm_80 computes, whose tests are those of the ops."""

import contextlib
import functools

import pytest
import torch

import fastnn
import fastnn.functional as fF
from fastnn.backends import reference
from fastnn.backends.codes import DTYPE
from fastnn.ops.conv import conv_fused

from .support import assert_within, integers

HALVES = (torch.bfloat16, torch.float16)
# (M, N, K), K and N multiples of 8, so that rows begin at multiples of 16 bytes: tiles and steps, one less, one more.
SHAPES = ((1, 8, 8), (8, 128, 64), (127, 120, 56), (129, 136, 72), (260, 264, 200))


@contextlib.contextmanager
def by_warpgroups(module, expected=True):
    """Fails unless a kernel of sm_90a ran, or unless none did."""
    before = module.gemms_on_hopper()
    yield
    assert (module.gemms_on_hopper() > before) == expected


def laid(x, across):
    """The same matrix, its columns contiguous instead of its rows."""
    return x.t().contiguous().t() if across else x


@pytest.mark.parametrize("b_across", [False, True])
@pytest.mark.parametrize("a_across", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_integers_come_out_exactly(hopper, dtype, a_across, b_across, no_fallback):
    for m, n, k in SHAPES:
        if a_across:
            m = -(-m // 8) * 8
        a, b = integers(m, k, dtype=dtype, low=-1, high=2), integers(k, n, dtype=dtype, low=-1, high=2)
        with by_warpgroups(hopper):
            result = fastnn.mm(laid(a, a_across), laid(b, not b_across))
        assert torch.equal(result.double(), a.double() @ b.double()), (m, n, k)


@pytest.mark.parametrize("left", [torch.int8, torch.uint8])
def test_integer_operands(hopper, left, no_fallback):
    low = 0 if left is torch.uint8 else -128
    for m, n, k in ((17, 24, 32), (130, 264, 400)):
        a = torch.randint(low, low + 256, (m, k)).to(left)
        b = torch.randint(-128, 128, (n, k)).to(torch.int8).t()
        with by_warpgroups(hopper):
            result = fastnn.int_mm(a, b)
        assert torch.equal(result.long(), a.long() @ b.long())


def test_tiles_of_256_columns(hopper, no_fallback):
    """Chosen where there are as many as multiprocessors."""
    a, b = integers(133, 8, 72, dtype=torch.float16), integers(133, 72, 256, dtype=torch.float16)
    assert torch.equal(fastnn.bmm(a, b).double(), a.double() @ b.double())


def test_what_surrounds_the_operands_is_not_read(hopper):
    def inside(rows, columns):
        whole = torch.full((rows + 3, columns + 24), float("nan"), dtype=torch.bfloat16)
        whole[1:-2, 8:-16] = torch.randn(rows, columns).bfloat16()
        return whole[1:-2, 8:-16]

    a, b, out = inside(130, 88), inside(88, 72), torch.full((132, 80), 7.0, dtype=torch.bfloat16)
    with by_warpgroups(hopper):
        fastnn.mm(a, b, out=out[1:-1, 4:-4])
    exact = reference.matmul(a, b, keep=True)
    assert_within(out[1:-1, 4:-4], exact, reference.matmul(a.abs(), b.abs(), keep=True), terms=90)
    out[1:-1, 4:-4] = 7
    assert (out == 7).all()


@pytest.mark.parametrize(
    "a_shape, b_shape",
    [((3, 2, 40, 24), (3, 2, 24, 16)), ((3, 2, 40, 24), (24, 16)), ((24, 24), (5, 24, 16))],
)
def test_batches(hopper, a_shape, b_shape, no_fallback):
    a, b = integers(*a_shape, dtype=torch.bfloat16), integers(*b_shape, dtype=torch.bfloat16)
    with by_warpgroups(hopper):
        result = fastnn.matmul(a, b)
    assert torch.equal(result.double(), (a.double() @ b.double()).to(torch.bfloat16).double())


def test_batches_of_several_strides(hopper, no_fallback):
    """Heads between the rows of queries and keys, keys shared by the batch: no one stride leads through the batches."""
    query = integers(2, 20, 3, 16, dtype=torch.float16).transpose(1, 2)
    for key in (
        integers(2, 12, 3, 16, dtype=torch.float16).transpose(1, 2),
        integers(3, 12, 16, dtype=torch.float16).expand(2, 3, 12, 16),
        integers(2, 1, 12, 16, dtype=torch.float16).expand(2, 3, 12, 16),
    ):
        with by_warpgroups(hopper):
            result = fastnn.matmul(query, key.mT)
        assert torch.equal(result.double(), query.double() @ key.mT.double())
    # Four such dimensions are one too many.
    deep = integers(2, 3, 2, 3, 2, 3, 8, 16, dtype=torch.float16)[:, :2, :, :2, :, :2]
    with by_warpgroups(hopper, expected=False):
        result = fastnn.matmul(deep, deep.mT)
    assert torch.equal(result.double(), deep.double() @ deep.double().mT)


@pytest.mark.parametrize("n", [45, 48])  # C in single elements, and eight at a time
@pytest.mark.parametrize("kind", ["none", "gelu", "relu"])
def test_epilogue(hopper, kind, n, no_fallback):
    x, w, bias = (torch.randn(s).bfloat16() for s in ((70, 40), (n, 40), (n,)))
    magnitude = reference.linear(x.abs(), w.abs(), bias.abs(), keep=True)
    exact = reference.linear(x, w, bias, kind, keep=True)
    with by_warpgroups(hopper):
        assert_within(fF.linear_act(x, w, bias, kind), exact, magnitude, terms=60)
    c = torch.randn(70, n).bfloat16()
    # C the other way round, with a residual that lies as neither.
    out = torch.empty(n, 70, dtype=torch.bfloat16).t()
    with by_warpgroups(hopper):
        fastnn.addmm(c, x, w.t(), beta=0.5, alpha=2, out=out)
    exact = 0.5 * c.double() + 2 * (x.double() @ w.double().t())
    assert_within(out, exact, 0.5 * c.abs().double() + 2 * (x.abs().double() @ w.abs().double().t()), terms=60)


def test_what_no_tensor_map_describes_is_the_other_kernels(hopper, no_fallback):
    a, b = integers(20, 30, dtype=torch.bfloat16), integers(30, 24, dtype=torch.bfloat16)
    cases = {
        "rows of 60 bytes": (a, b),
        "no contiguous dimension": (
            integers(20, 64, dtype=torch.bfloat16)[:, ::2],
            integers(32, 24, dtype=torch.bfloat16),
        ),
        "expanded rows": (integers(1, 32, dtype=torch.bfloat16).expand(20, 32), integers(32, 24, dtype=torch.bfloat16)),
        "an odd address": (
            integers(20 * 32 + 1, dtype=torch.bfloat16)[1:].view(20, 32),
            integers(32, 24, dtype=torch.bfloat16),
        ),
    }
    for name, (left, right) in cases.items():
        with by_warpgroups(hopper, expected=False):
            result = fastnn.mm(left, right)
        assert torch.equal(result.double(), left.double() @ right.double()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_few_tiles_split_k(hopper, dtype, no_fallback):
    m, n, k = 40, 24, 4096 + 16
    if dtype is torch.int8:
        a, b = torch.randint(-128, 128, (m, k)).to(dtype), torch.randint(-128, 128, (n, k)).to(dtype).t()
        assert torch.equal(fastnn.int_mm(a, b).long(), a.long() @ b.long())
        return
    assert hopper.gemm_workspace((m, n), k, DTYPE[dtype]) == 8 * m * n * 4
    assert hopper.gemm_workspace((m, n), k, DTYPE[dtype], batch_invariant=True) == 0
    a, b, bias = (
        integers(m, k, dtype=dtype, low=-1, high=2),
        integers(n, k, dtype=dtype, low=-1, high=2),
        integers(n, dtype=dtype),
    )
    exact = (a.double() @ b.double().t() + bias.double()).to(dtype)
    assert torch.equal(fF.linear(a, b, bias), exact)


def test_the_limit_of_the_capability_chooses_the_kernel(hopper, no_fallback):
    a, b = integers(40, 64, dtype=torch.float16), integers(64, 24, dtype=torch.float16)
    results = []
    for most in (90, 80):
        hopper.limit_capability(most)
        with by_warpgroups(hopper, expected=most == 90):
            results.append(fastnn.mm(a, b))
    assert torch.equal(*results)


def test_batch_invariance(hopper):
    """A row's bits are those it has alone, whatever tile it is of."""
    a, b = torch.randn(300, 2048).bfloat16(), torch.randn(136, 2048).bfloat16().t()
    with fastnn.batch_invariant():
        together = fastnn.mm(a, b)
        for rows in (slice(0, 1), slice(7, 140)):
            assert torch.equal(fastnn.mm(a[rows], b), together[rows])
        # Nor does a row alone go to another kernel than the row among others.
        a, b = torch.randn(20, 30).bfloat16(), torch.randn(30, 24).bfloat16()
        with by_warpgroups(hopper, expected=False):
            assert torch.equal(fastnn.mm(a[3:4], b), fastnn.mm(a, b)[3:4])


def test_the_order_of_threads_changes_nothing(on_cuda, hopper):
    a, b = torch.randn(200, 1100)[:, :1096].bfloat16(), torch.randn(1096, 72).bfloat16()
    results = []
    for seed in (0, 1, 2):
        on_cuda.set_seed(seed)
        results.append((fastnn.mm(a[:, :200].contiguous(), b[:200]), fastnn.mm(a.contiguous(), b)))
    for more in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], more, strict=True))


@functools.cache
def large():
    """Normal numbers, of a size from which float32 is multiplied in parts; their product in float64."""
    torch.manual_seed(5)
    a, b = torch.randn(1030, 264), torch.randn(264, 1100)
    return a, b, a.double() @ b.double()


@pytest.mark.parametrize("precision, most", [("highest", None), ("high", 1e-5), ("medium", 5e-3)])
def test_float32_in_parts(hopper, precision, most, no_fallback):
    a, b, exact = large()
    torchs = ((a @ b).double() - exact).norm() / exact.norm()
    torch.set_float32_matmul_precision(precision)
    with by_warpgroups(hopper):
        result = fastnn.mm(a, laid(b, precision != "highest"))
    error = (result.double() - exact).norm() / exact.norm()
    assert error <= (torchs if most is None else most)
    assert precision == "highest" or error > torchs, "more parts than were asked for"


def test_float32_that_is_not_finite(hopper):
    """Infinities, NaN and the largest numbers come out as in float32, though parts of them are not finite."""
    torch.set_float32_matmul_precision("medium")  # the quickest
    a, b, _ = large()
    a, b = a.clone(), b.clone()
    a[3, 5], a[4, 7], a[200, 0], a[1029, 263] = float("inf"), float("nan"), 3.4e38, -float("inf")
    b[0, 9] = 1.0
    result, expected = fastnn.mm(a, b), torch.mm(a.double(), b.double()).float()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(result), kind(expected)), kind
    assert abs(result[200, 9] / expected[200, 9] - 1) < 1e-6


def test_float32_under_batch_invariance_is_the_other_kernels(hopper):
    assert hopper.gemm_workspace((1024, 1024), 1024, DTYPE[torch.float32]) > 0
    assert hopper.gemm_workspace((1024, 1024), 1024, DTYPE[torch.float32], batch_invariant=True) == 0
    assert hopper.gemm_workspace((64, 1024), 1024, DTYPE[torch.float32]) == 0


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_pointwise_convolutions(hopper, dtype, channels_last, no_fallback):
    """They are matrix products, batches of them where channels are planes, with a residual as the convolution has it."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, w = integers(2, 64, 6, 8, dtype=dtype, low=-1, high=2), integers(72, 64, 1, 1, dtype=dtype, low=-1, high=2)
    x = x.contiguous(memory_format=layout).requires_grad_()
    direction = integers(2, 72, 6, 8, dtype=dtype, low=-1, high=2).contiguous(memory_format=layout)
    wide = x.detach().double().requires_grad_()
    exact = torch.nn.functional.conv2d(wide, w.double())
    with by_warpgroups(hopper):
        y = fF.conv2d(x, w)
    with by_warpgroups(hopper):
        (found,) = torch.autograd.grad(y, x, direction)
    assert torch.equal(y.double(), exact)
    assert torch.equal(found.double(), torch.autograd.grad(exact, wide, direction.double())[0])
    with by_warpgroups(hopper):
        added = conv_fused(x.detach(), w, None, 1, 0, 1, 1, "relu", direction)
    assert torch.equal(added.double(), (exact + direction.double()).relu())
