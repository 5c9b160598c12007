"""Batch and group norm on GPUs where the kernels' own ways part: chunks, groups of threads, packs, tiles of channels."""

import importlib
import math

import pytest
import torch

from fastnn.backends import cuda
from fastnn.backends.reference import group_norm as group_formulas
from fastnn.backends.reference import norm as formulas

EPS = 1e-5
#: A plane in a warp, in 256 threads, and in chunks; with whole packs and without; rows that end within a chunk.
PLANES = [(3, 5, 7), (2, 3, 8, 8), (5, 3, 1024), (2, 3, 4098), (67, 2, 127), (3, 1, 2, 1371)]
#: Across: lanes of 1 to 32 threads a row, channels of whole packs and others, several tiles, several chunks.
ACROSS = [(9, 3, 5, 7), (2, 8, 11, 3), (3, 33, 7, 5), (9, 136, 3, 3), (130, 5), (3, 264)]


def norms(on):
    """The functions under test, of the emulated kernels."""
    from fastnn.backends.cuda import group_norm, norm

    cuda.use(on)
    return norm, group_norm


@pytest.fixture(params=["cuda", "triton"])
def norm(request):
    """The functions of a backend."""
    request.getfixturevalue(f"on_{request.param}")
    return importlib.import_module(f"fastnn.backends.{request.param}.norm")


def surrounded(x, last):
    """x amid NaN, an odd number of elements from an address that is a multiple of 16, so that nothing is read in packs."""
    base = torch.full((x.numel() + 67,), math.nan, dtype=x.dtype)
    order = [0, *range(2, x.dim()), 1] if last else list(range(x.dim()))
    inner = base[33:-34].view([x.shape[d] for d in order])
    return inner.permute([order.index(d) for d in range(x.dim())]).copy_(x)


def layouts(shape, dtype, last, offset=0.0):
    x = (torch.randn(shape, dtype=torch.float64) + offset).to(dtype)
    as_last = last and x.dim() == 4
    yield x.to(memory_format=torch.channels_last) if as_last else x
    yield surrounded(x, as_last)


KINDS = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    *((shape, shape in ACROSS, dtype) for shape in (*PLANES, *ACROSS) for dtype in KINDS),
    ((1, 64, 66, 125), False, torch.bfloat16),  # in 512 threads
]


@pytest.mark.parametrize(("shape", "last", "dtype"), CASES, ids=str)
def test_batch_norm(shape, last, dtype, on_cuda):
    norm, _ = norms(on_cuda)
    for x in layouts(shape, dtype, last, 3.0):
        weight, bias = torch.randn(shape[1]).to(dtype), torch.randn(shape[1])[:, None].expand(-1, 3)[:, 1].to(dtype)
        exact, mean, var = formulas.batch_norm(x.double(), None, None, weight, bias, None, EPS, False)
        found = norm.batch_norm(x, None, None, weight, bias, None, EPS, False)
        torch.testing.assert_close(found[1], mean, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(found[2], var, rtol=2e-6, atol=0)
        close(found[0], exact, dtype)
        out = torch.where(torch.rand(x.shape) < 0.5, found[0], torch.zeros_like(found[0]))
        grad = torch.randn(shape).to(dtype)
        for training in (True, False):
            args = weight, mean, var, out, training, EPS, True
            ours = norm.batch_norm_backward(grad, x, *args)
            wanted = formulas.batch_norm_backward(grad.double(), x.double(), *args)
            close(ours[0], wanted[0], dtype)
            scale = math.sqrt(x.numel() / shape[1])
            for one, other in zip(ours[1:3], wanted[1:3], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6 * scale)
            assert torch.equal(ours[3].double(), wanted[3])


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize(
    ("shape", "last"), [((2, 6, 41), False), ((3, 4, 7, 50), True), ((1, 4, 61, 68), False), ((2, 72, 5, 3), True)]
)
def test_group_norm(shape, last, dtype, on_cuda):
    _, group_norm = norms(on_cuda)
    for x in layouts(shape, dtype, last, -2.0):
        weight, bias, grad = torch.randn(shape[1]), torch.randn(shape[1]), torch.randn(shape).to(dtype)
        for groups in (1, 2, shape[1]):
            exact, mean, var = group_formulas.group_norm(x.double(), groups, weight, bias, EPS)
            found = group_norm.group_norm(x, groups, weight, bias, EPS)
            torch.testing.assert_close(found[1], mean, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(found[2], var, rtol=2e-6, atol=0)
            close(found[0], exact, dtype)
            ours = group_norm.group_norm_backward(grad, x, groups, weight, mean, var, EPS)
            wanted = group_formulas.group_norm_backward(grad.double(), x.double(), groups, weight, mean, var, EPS)
            close(ours[0], wanted[0], dtype)
            for one, other in zip(ours[1:], wanted[1:], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6 * math.sqrt(x.numel() / shape[1]))


def close(found, exact, dtype):
    assert found.isfinite().all()
    unit = torch.finfo(dtype).eps
    atol = 2e-6 * exact.abs().max().item()
    torch.testing.assert_close(found.double(), exact, rtol=0.51 * unit + 1e-6, atol=atol)


FEW = [((3, 4, 50, 57), False), ((2, 4, 29, 31), True), ((2, 3, 31), False), ((40, 7), True)]


@pytest.mark.parametrize(("shape", "last"), FEW, ids=str)
def test_a_mean_far_from_zero(shape, last, norm):
    """float32 with a mean 10,000 and 1,000,000 times the deviation: the numbers as they are in float32 are exact."""
    for offset in (1e4, -1e6):
        x, *_ = layouts(shape, torch.float32, last, offset)
        axes = [d for d in range(len(shape)) if d != 1]
        out, mean, var = norm.batch_norm(x, None, None, None, None, None, EPS, False)
        wide = x.double()
        torch.testing.assert_close(mean, wide.mean(axes), rtol=1e-9, atol=0)
        # Triton's interpreter sums a column in one chain.
        torch.testing.assert_close(var, wide.var(axes, unbiased=False), rtol=3e-6, atol=0)
        exact = torch.nn.functional.batch_norm(wide, None, None, training=True)
        torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6)
        grad = torch.randn(shape)
        got = norm.batch_norm_backward(grad, x, None, mean, var, None, True, EPS, False)
        wanted = formulas.batch_norm_backward(grad.double(), wide, None, mean, var, None, True, EPS, False)
        torch.testing.assert_close(got[0].double(), wanted[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("shape", "last"), FEW, ids=str)
def test_extremes(shape, last, norm):
    """First elements that are unlike the rest, squares beyond float32, and what is not finite staying in its channel."""
    axes = [d for d in range(len(shape)) if d != 1]
    x, *_ = layouts(shape, torch.float32, last)
    x[0, 0] += 1e4
    x[:, 1] *= 1e25
    out, mean, var = norm.batch_norm(x, None, None, None, None, None, EPS, False)
    torch.testing.assert_close(mean, x.double().mean(axes), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(var, x.double().var(axes, unbiased=False), rtol=1e-5, atol=0)
    exact = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    for value in (math.nan, math.inf):
        x[-1, 2] = value
        other = norm.batch_norm(x, None, None, None, None, None, EPS, True)[0]
        assert other[:, 2].isnan().all()
        assert torch.equal(other[:, :2], out[:, :2].relu())


@pytest.mark.parametrize(("shape", "last"), FEW, ids=str)
def test_the_same_bits_in_any_order_of_threads(shape, last, on_cuda):
    norm, group_norm = norms(on_cuda)
    x, apart = layouts(shape, torch.bfloat16, last)
    grad = torch.randn(shape).bfloat16()
    found = []
    for seed, one in ((1, x), (2, x), (3, apart)):
        on_cuda.set_seed(seed)
        out, mean, var = norm.batch_norm(one, None, None, None, None, None, EPS, True)
        back = norm.batch_norm_backward(grad, one, None, mean, var, out, True, EPS, False)
        groups = group_norm.group_norm(one, 1, None, None, EPS)
        of_groups = group_norm.group_norm_backward(grad, one, 1, None, *groups[1:], EPS)
        found.append((out, mean, var, *back, *groups, *of_groups))
    for run in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], run, strict=True))


def test_writes_nothing_beside_its_result(on_cuda):
    for shape, strides in (
        ((3, 5, 7, 9), (315, 63, 9, 1)),
        ((3, 5, 7, 9), (315, 1, 45, 5)),
        ((2, 8, 64), (512, 64, 1)),
    ):
        x = torch.randn(shape)
        base = torch.full((x.numel() + 64,), math.nan)
        out = base[32:-32].as_strided(shape, strides, 32)
        statistics, memory = torch.empty(2, shape[1], dtype=torch.float64), []

        def workspace(size, memory=memory):
            memory.append(torch.empty(size, dtype=torch.int8))
            return memory[-1].data_ptr()

        x = torch.empty_like(out).copy_(x)
        on_cuda.norm(
            shape, 0, 0, ((x.data_ptr(), x.stride()), None, (out.data_ptr(), strides)), None, None, None, None,
            statistics[0].data_ptr(), statistics[1].data_ptr(), EPS, False, workspace, 0, 0,
        )  # fmt: skip
        assert out.isfinite().all()
        assert base[:32].isnan().all()
        assert base[-32:].isnan().all()


def test_bad_arguments(on_cuda):
    x, number = torch.randn(2, 3), torch.zeros(3, dtype=torch.float64).data_ptr()
    operand, torn = (x.data_ptr(), x.stride()), (x.data_ptr(), (9, 7, 5, 3))

    def call(**changes):
        arguments = {
            **dict(shape=(2, 3), dtype=0, groups=0, operands=(operand, None, operand), weight=None, bias=None),
            **dict(given_mean=None, given_var=None, mean=number, var=number, eps=EPS, relu=False),
            **dict(workspace=lambda size: 0, device=0, stream=0),
        }
        return on_cuda.norm(**{**arguments, **changes})

    for changes, named in (
        (dict(dtype=9), "dtype"),
        (dict(shape=(3,)), "shape"),
        (dict(shape=(0, 3)), "shape"),
        (dict(groups=2), "groups"),
        (dict(operands=(None, None, operand)), "x"),
        (dict(operands=(operand, None, (x.data_ptr(), (1,)))), "strides"),
        (dict(operands=(operand,) * 6), "operands"),
        (dict(weight=(x.data_ptr(), 1, 1)), "weight"),
        (dict(weight=x.data_ptr()), "weight"),
        (dict(given_mean=(x.data_ptr(), 1, 0)), "given_mean"),
        (dict(mean=0), "mean"),
        (dict(shape=(2, 3, 2, 2), operands=(torn, None, (x.data_ptr(), (12, 4, 2, 1)))), "strides"),
    ):
        with pytest.raises(ValueError, match=named):
            call(**changes)
