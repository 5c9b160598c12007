"""The product of 8-bit floats against float64, on every instruction set, on CUDA and on Triton."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import fastnn
import fastnn.functional as fF
from fastnn import _state
from fastnn.backends import cuda

from .support import integers
from .test_hopper import by_warpgroups

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
PAIRS = ((E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3), (E5M2, E5M2))
pairs = pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: "-".join(str(d)[13:17] for d in pair))
TENSOR_WISE, ROW_WISE = 0, 1
#: (M, N, K): primes, and tiles of CPUs and GPUs with one less and one more.
SHAPES = ((1, 1, 1), (1, 33, 65), (5, 7, 3), (13, 31, 16), (15, 65, 129), (33, 32, 64), (67, 63, 130))


def expected(a, b, scale_a, scale_b, bias=None):
    """In float64, and how large what is summed is."""
    a, b, scale = a.double(), b.double(), scale_a.double() * scale_b.double()
    added = 0.0 if bias is None else bias.double()
    return scale * (a @ b) + added, scale.abs() * (a.abs() @ b.abs()) + abs(added)


def assert_near(found, a, b, *rest, of_sums=2.0**-23):
    """Each sum may lose as much as its last place, and the result is rounded once."""
    want, magnitude = expected(a, b, *rest)
    bound = of_sums * (a.shape[1] + 8) * magnitude + torch.finfo(found.dtype).eps * want.abs()
    assert found.shape == want.shape and found.is_contiguous()
    assert ((found.double() - want).abs() <= bound).all()


def operands(m, n, k, dtypes):
    return torch.randn(m, k).to(dtypes[0]), torch.randn(n, k).to(dtypes[1]).t()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_against_float64(machine, shape, no_fallback):
    m, n, k = shape
    one, bias = (torch.tensor(0.37), torch.tensor([2.5])), torch.randn(n)
    each = torch.rand(m, 1) + 0.1, torch.rand(1, n) + 0.1
    for dtypes in (PAIRS[0], PAIRS[1 + m % 3]):
        a, b = operands(m, n, k, dtypes)
        assert_near(fF.scaled_mm(a, b, one[0], 0, one[1], 0, output_dtype=torch.float32), a, b, *one)
        result = fF.scaled_mm(a, b, each[0], 1, each[1], 1, bias=bias, output_dtype=torch.float32)
        assert_near(result, a, b, *each, bias)


@pairs
def test_integers_come_out_exactly(machine, dtypes, no_fallback):
    a, b = integers(37, 150, low=-2, high=3).to(dtypes[0]), integers(150, 41, low=-2, high=3).to(dtypes[1])
    one = torch.ones(())
    for left in (a, a.t().contiguous().t()):
        for right in (b, b.t().contiguous().t()):
            result = fF.scaled_mm(left, right, one, TENSOR_WISE, one, TENSOR_WISE, output_dtype=torch.float32)
            assert torch.equal(result.double(), a.double() @ b.double())


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_every_number_with_its_nan_and_infinities(machine, dtype, no_fallback):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    one = torch.ones(())
    want = every.float()
    for n in (1, 40):
        result = fF.scaled_mm(every.view(256, 1), torch.ones(1, n).to(E4M3), one, 0, one, 0, output_dtype=torch.float32)
        assert torch.equal(result.nan_to_num(7.0), want.nan_to_num(7.0).view(256, 1).expand(256, n))
        assert torch.equal(result.isnan(), want.isnan().view(256, 1).expand(256, n))
    result = fF.scaled_mm(torch.ones(3, 1).to(E5M2), every.view(1, 256), one, 0, one, 0, output_dtype=torch.float32)
    assert torch.equal(result.isnan(), want.isnan().expand(3, 256))


def test_a_nan_is_in_its_row_alone(machine, no_fallback):
    a, b = operands(9, 21, 70, (E4M3, E4M3))
    a[4, 69] = b[0, 20] = torch.nan
    one = torch.ones(())
    result = fF.scaled_mm(a, b, one, TENSOR_WISE, one, TENSOR_WISE)
    nan = torch.zeros(9, 21, dtype=torch.bool)
    nan[4], nan[:, 20] = True, True
    assert torch.equal(result.isnan(), nan)


@pytest.mark.parametrize("of_bias", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_result_and_bias(machine, out, of_bias, no_fallback):
    a, b = operands(6, 24, 40, (E4M3, E4M3))
    scales = torch.rand(6, 1), torch.rand(1, 48)[:, ::2]
    bias = torch.randn(48).to(of_bias)[::2]
    result = fF.scaled_mm(a, b, scales[0], ROW_WISE, scales[1], ROW_WISE, bias=bias, output_dtype=out)
    assert result.dtype is out
    assert_near(result, a, b, *scales, bias)


def test_what_surrounds_the_operands_is_not_read(machine, no_fallback):
    def inside(rows, columns):
        whole = torch.full((rows + 3, columns + 37), torch.nan).to(E4M3)
        whole[1:-2, 16:-21] = torch.randn(rows, columns).to(E4M3)
        return whole[1:-2, 16:-21]

    a, b = inside(17, 48), inside(19, 48).t()
    one = torch.ones(())
    for left, right in ((a, b), (a[:, ::3], b[::3]), (a[:1].expand(5, 48), b)):
        result = fF.scaled_mm(left, right, one, TENSOR_WISE, one, TENSOR_WISE, output_dtype=torch.float32)
        assert_near(result, left, right, one, one)


@pytest.mark.parametrize("shape", [(0, 5, 4), (5, 0, 4), (5, 4, 0), (0, 0, 0)])
def test_nothing(machine, shape, no_fallback):
    m, n, k = shape
    a, b = torch.zeros(m, k).to(E4M3), torch.zeros(k, n).to(E4M3)
    bias = torch.arange(n).float()
    result = fF.scaled_mm(a, b, torch.ones(m, 1), 1, torch.ones(1, n), 1, bias=bias)
    assert torch.equal(result, bias.bfloat16().expand(m, n))


# ---- on tensor cores of sm_90a -----------------------------------------------------------------------------------

#: Of 32 products and the sum so far each is cut to 13 places after the leading one of the largest: at worst 2^-8 of what is
#: summed, and a few times 2^-13 in these sums.
CUT = 2.0**-11


@pairs
def test_products_of_warpgroups(hopper, dtypes, no_fallback):
    """Of rows that begin at multiples of 16 bytes."""
    for m, n, k in ((1, 8, 16), (130, 264, 144)):
        a, b = operands(m, n, k, dtypes)
        one, each = (torch.tensor(3.0), torch.tensor(0.5)), (torch.rand(m, 1), torch.rand(1, n))
        bias = torch.randn(n)
        for scales, wise, added, out in ((one, 0, None, torch.float32), (each, 1, bias, torch.bfloat16)):
            with by_warpgroups(hopper):
                found = fF.scaled_mm(a, b, scales[0], wise, scales[1], wise, bias=added, output_dtype=out)
            want, magnitude = expected(a, b, *scales, added)
            bound = CUT * magnitude + torch.finfo(out).eps * want.abs()
            assert ((found.double() - want).abs() <= bound).all()
        whole, b_across = integers(m, k, low=-2, high=3), integers(k, n, low=-2, high=3)
        for right in (b_across, b_across.t().contiguous().t()):
            with by_warpgroups(hopper):
                found = fF.scaled_mm(
                    whole.to(dtypes[0]), right.to(dtypes[1]), *(torch.ones(()), 0) * 2, output_dtype=torch.float32
                )
            assert torch.equal(found.double(), whole.double() @ b_across.double())


@pytest.mark.parametrize("n", [16, 20])
def test_long_sums_are_those_of_float32(hopper, n, no_fallback):
    """Of 14 bits, 2048 and 1.125 are 2049. (By parts of K too, and of columns that are written one by one.)"""
    a, b, one = torch.full((3, 4096), 1.125).to(E4M3), torch.ones(n, 4096).to(E4M3).t(), torch.ones(())
    scales = torch.full((3, 1), 2.0), torch.full((1, n), 0.5)
    for way in (fastnn.batch_invariant(), contextlib.nullcontext()):
        with by_warpgroups(hopper), way:
            result = fF.scaled_mm(a, b, one, TENSOR_WISE, one, TENSOR_WISE, output_dtype=torch.float32)
            by_rows = fF.scaled_mm(a, b, scales[0], 1, scales[1], 1, bias=torch.ones(n), output_dtype=torch.float32)
        assert (result == 4096 * 1.125).all()
        assert (by_rows == 4096 * 1.125 + 1).all()


def test_fast_sums_of_tiles_of_256_columns(hopper):
    a, b = integers(133, 8, 16, low=-2, high=3), integers(133, 256, 16, low=-2, high=3)
    with by_warpgroups(hopper):
        found = cuda.product(a.to(E4M3), b.to(E4M3).mT, dtype=torch.float32, fast_sums=True)
    assert torch.equal(found.double(), a.double() @ b.double().mT)


# ---- the face ----------------------------------------------------------------------------------------------------


def test_as_torch(no_fallback):
    """torch's own functions give the same, and are replaced inside patch()."""
    a, b = operands(16, 32, 48, (E4M3, E4M3))
    one, bias = torch.tensor(0.5), torch.randn(32)
    each = torch.rand(16, 1), torch.rand(1, 32)
    calls = [
        lambda: torch._scaled_mm(a, b, one, one, bias=bias, out_dtype=torch.float32),
        lambda: torch._scaled_mm(a, b, *each, bias, None, torch.bfloat16, True),
    ]
    if hasattr(F, "scaled_mm"):
        kind = F.ScalingType
        calls += [
            lambda: F.scaled_mm(a, b, one, kind.TensorWise, one, kind.TensorWise),
            lambda: F.scaled_mm(a, b, [each[0]], [kind.RowWise], each[1], kind.RowWise, output_dtype=torch.float16),
        ]
    for call in calls:
        in_torch = call()
        before = dict(fastnn.backends.cpu.counters())
        with fastnn.patch(), fastnn.strict():
            found = call()
        assert fastnn.backends.cpu.counters() != before
        assert found.dtype is in_torch.dtype
        torch.testing.assert_close(found, in_torch)


def test_what_stays_torchs():
    a, b = operands(16, 32, 48, (E4M3, E4M3))
    one = torch.tensor(0.5)
    _state.reset_fallbacks()
    with fastnn.patch():
        assert torch._scaled_mm(a, b, one, one).dtype is E4M3
    assert fF.scaled_mm(a, b, one, 0, one, 0, output_dtype=torch.float64).dtype is torch.float64
    reasons = [reason for op, reason in _state.fallbacks() if op == "scaled_mm"]
    assert len(reasons) == 2 and all(reason.startswith("output_dtype: expected float32") for reason in reasons)


A, B, ONE = torch.zeros(4, 16).to(E4M3), torch.zeros(16, 8).to(E4M3), torch.ones(())
WRONG = {
    "no tensor": ((None, B, ONE, 0, ONE, 0), {}, TypeError, "mat_a: expected a Tensor, got NoneType"),
    "a number": ((A, B, 1.0, 0, ONE, 0), {}, TypeError, "scale_a: expected a Tensor, got float"),
    "float32": ((A.float(), B, ONE, 0, ONE, 0), {}, ValueError, "expected matrices of float8"),
    "sizes": ((A, B[:8], ONE, 0, ONE, 0), {}, ValueError, "expected mat_a"),
    "three dimensions": ((A[None], B, ONE, 0, ONE, 0), {}, ValueError, "expected mat_a"),
    "scale float64": ((A, B, ONE.double(), 0, ONE, 0), {}, ValueError, "expected scales of one float32"),
    "rows": ((A, B, torch.ones(3, 1), 1, torch.ones(1, 8), 1), {}, ValueError, "expected scales of one float32"),
    "recipes": ((A, B, torch.ones(4, 1), 1, ONE, 0), {}, ValueError, "scale_recipe: expected TensorWise or RowWise"),
    "bias": ((A, B, ONE, 0, ONE, 0), {"bias": torch.ones(7)}, ValueError, "expected bias"),
    "bias float64": ((A, B, ONE, 0, ONE, 0), {"bias": torch.ones(8).double()}, ValueError, "expected bias"),
    "contraction": ((A, B, ONE, 0, ONE, 0), {"contraction_dim": (0, 0)}, ValueError, "contraction_dim: expected"),
}


@pytest.mark.skipif(not hasattr(F, "scaled_mm"), reason="whose errors are torch's")
@pytest.mark.parametrize("case", WRONG)
def test_bad_arguments(case):
    args, keywords, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        fF.scaled_mm(*args, **keywords)


def test_there_is_no_derivative():
    a = torch.randn(4, 16, requires_grad=True)
    result = fF.scaled_mm(a.to(E4M3), B, ONE, 0, ONE, 0)
    with pytest.raises(RuntimeError, match="derivative is not implemented"):
        result.sum().backward()


def test_traced():
    a, b = operands(6, 8, 16, (E4M3, E5M2))
    scales = torch.rand(6, 1), torch.rand(1, 8)
    op = torch.ops.fastnn.scaled_mm
    # torch's test of schemas compares inputs by allclose, which float8 has not.
    for bias in (None, torch.randn(8)):
        args = (a, b, *scales, bias, torch.bfloat16, False)
        opcheck(op, args, test_utils=("test_autograd_registration", "test_faketensor"))
    compiled = torch.compile(lambda a, b: fF.scaled_mm(a, b, ONE, 0, ONE, 0), fullgraph=True, backend="eager")
    assert torch.equal(compiled(a, b), fF.scaled_mm(a, b, ONE, 0, ONE, 0))
    if hasattr(F, "ScalingType"):
        kind = F.ScalingType.RowWise
        compiled = torch.compile(lambda a, b: fF.scaled_mm(a, b, scales[0], kind, scales[1], kind), backend="eager")
        assert torch.equal(compiled(a, b), fF.scaled_mm(a, b, scales[0], 1, scales[1], 1))
    meta = fF.scaled_mm(a.to("meta"), b.to("meta"), ONE.to("meta"), 0, ONE.to("meta"), 0)
    assert meta.shape == (6, 8) and meta.is_meta and meta.dtype is torch.bfloat16


def test_vmap():
    many = torch.randn(3, 6, 16).to(E4M3)
    b = torch.randn(8, 16).to(E4M3).t()
    found = torch.func.vmap(lambda a: fF.scaled_mm(a, b, ONE, 0, ONE, 0))(many)
    assert torch.equal(found, torch.stack([fF.scaled_mm(a, b, ONE, 0, ONE, 0) for a in many]))


def test_reference(no_fallback):
    a, b = operands(5, 7, 9, (E4M3, E5M2))
    each, bias = (torch.rand(5, 1), torch.rand(1, 7)), torch.randn(7)
    with fastnn.backend("reference"):
        result = fF.scaled_mm(a, b, each[0], 1, each[1], 1, bias=bias, output_dtype=torch.float32)
    assert torch.equal(result, expected(a, b, *each, bias)[0].float())


def test_any_number_of_threads_gives_the_same(no_fallback):
    a, b = operands(150, 90, 300, (E4M3, E4M3))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(fF.scaled_mm(a, b, ONE, 0, ONE, 0, output_dtype=torch.float32))
    assert all(torch.equal(results[0], other) for other in results[1:])
