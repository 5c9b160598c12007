"""softmax and log_softmax where they differ from the other ops: dim, dtype, out; every way of a call."""

import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap
from torch.library import opcheck

import fastnn
import fastnn.functional as fF
from fastnn import _state

from .support import FLOATS

PAIRS = [(fF.softmax, F.softmax), (fF.log_softmax, F.log_softmax), (fF.softmin, F.softmin)]
pairs = pytest.mark.parametrize(("ours", "torchs"), PAIRS, ids=["softmax", "log_softmax", "softmin"])


def randn(*shape, grad=False):
    return torch.randn(shape, dtype=torch.float64, requires_grad=grad)


@pairs
def test_signature(ours, torchs):
    theirs = inspect.signature(torchs).parameters
    assert list(inspect.signature(ours).parameters)[: len(theirs)] == list(theirs)


@pairs
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtype(ours, torchs, dtype, no_fallback):
    for x in (torch.randn(3, 5), torch.randn(3, 5).bfloat16(), torch.arange(6).view(2, 3)):
        wide = x.double()
        if x.is_floating_point():
            x.requires_grad_()
        y = ours(x, -1, dtype=dtype)
        assert y.dtype is dtype
        torch.testing.assert_close(y.double(), torchs(wide.to(dtype).double(), -1), rtol=1e-2, atol=1e-2)
        if x.requires_grad:
            (found,) = torch.autograd.grad(y.square().sum(), x)
            (expected,) = torch.autograd.grad(torchs(x, -1, dtype=dtype).square().sum(), x)
            assert found.dtype is x.dtype
            torch.testing.assert_close(found, expected, rtol=5e-2, atol=2e-1)


@pairs
@pytest.mark.filterwarnings("error")
def test_without_dim_it_warns_as_torch_does(ours, torchs):
    for shape in ((3,), (3, 4), (2, 3, 4), (2, 3, 4, 5)):
        x = torch.randn(shape)
        for function in (ours, torchs):
            with pytest.raises(UserWarning, match="Implicit dimension choice"):
                function(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(ours(x), torchs(x))


@pairs
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (2, 0, 3)])
def test_no_elements_and_no_dimensions(ours, torchs, shape, no_fallback):
    x = torch.randn(shape, requires_grad=True)
    for dim in range(-max(len(shape), 1), max(len(shape), 1)):
        y, expected = ours(x, dim), torchs(x, dim)
        assert y.stride() == expected.stride()
        assert torch.equal(y, expected)
        y.sum().backward()


#: Sizes of the dimension around those where a kernel gives way to another: of a row in registers, by lanes, warps and blocks,
#: and of one that is read twice.
EDGES = (1, 2, 7, 17, 63, 64, 65, 129, 255, 257, 1023, 1025, 4097)
LONG = (8192, 8193, 16384, 16387)


def laid_out(x):
    """The same numbers: along the last dimension, along the first, and two apart at an odd address."""
    yield x
    yield x.transpose(0, -1).contiguous().transpose(0, -1)
    apart = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)[..., 1::2]
    yield apart.copy_(x)


@pairs
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_size_in_every_layout(ours, torchs, dtype, machine, no_fallback):
    """The result and the gradient, against torch in float64."""
    most = {torch.float32: 4e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    shapes = [((2, n), 1) for n in EDGES] + [((n, 3), 0) for n in EDGES if n < 300] + [((3, n, 5), 1) for n in (5, 37)]
    if torchs is not F.softmin:
        shapes += [((1, n), 1) for n in LONG if machine != "cuda" or dtype is torch.bfloat16 or n % 2]
    if machine == "triton":  # whose interpreter is slow: every kind, and a row of two blocks
        shapes = [((2, 17), 1), ((7, 3), 0), ((2, 5, 3), 1), ((1, 5000), 1)]
    for shape, dim in shapes:
        numbers, direction = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
        wide = numbers.double().requires_grad_()
        exact = torchs(wide, dim)
        (exact_gradient,) = torch.autograd.grad(exact, wide, direction.double())
        for x in laid_out(numbers) if numbers.numel() < 3000 else (numbers,):
            x = x.detach().requires_grad_()
            y = ours(x, dim)
            (gradient,) = torch.autograd.grad(y, x, direction)
            torch.testing.assert_close(y.double(), exact, rtol=most, atol=most)
            scale = max(exact_gradient.abs().max().item(), 1)
            torch.testing.assert_close(gradient.double(), exact_gradient, rtol=most, atol=2 * most * scale)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_that_are_not_finite(machine, dtype, no_fallback):
    """As torch's, in rows of every kernel; their neighbours are untouched."""
    for shape, dim in (((6, 40), 1), ((6, 300), 1), ((6, 2000), 1), ((6, 17000), 1), ((9, 6), 0), ((300, 6), 0)):
        if shape[1] > 10000 and machine == "cuda" and dtype is not torch.float32:
            continue
        if machine == "triton" and shape not in ((6, 300), (6, 17000), (9, 6)):
            continue
        x = torch.randn(shape).to(dtype)
        rows = x if dim == 1 else x.t()
        rows[0, 3], rows[1, 3], rows[2, :3], rows[3] = torch.nan, torch.inf, -torch.inf, -torch.inf
        rows[4] = torch.finfo(dtype).max
        for ours, torchs in PAIRS[:2]:
            found, expected = ours(x, dim), torchs(x.double(), dim)
            torch.testing.assert_close(found.double(), expected, equal_nan=True, rtol=2e-2, atol=2e-2)


BAD = {
    "dim": (torch.randn(2, 3), 2),
    "dim below": (torch.randn(2, 3), -3),
    "dim of a scalar": (torch.tensor(1.0), 1),
    "dim float": (torch.randn(2, 3), 1.5),
    "list": ([1.0, 2.0], 0),
    "integers": (torch.arange(3), 0),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize(("ours", "torchs"), [(fF.softmax, torch.softmax), (fF.log_softmax, torch.log_softmax)])
def test_errors(name, ours, torchs):
    with pytest.raises(Exception) as expected:
        torchs(*BAD[name])
    with pytest.raises(type(expected.value), match="fastnn"):
        ours(*BAD[name])


def test_what_goes_to_torch_is_counted():
    _state.reset_fallbacks()
    x = torch.randn(2, 3, dtype=torch.complex64)
    torch.testing.assert_close(fF.softmax(torch.arange(3), 0, dtype=torch.float32), torch.arange(3.0).softmax(0))
    with pytest.raises(Exception) as expected:  # NotImplementedError in some versions, RuntimeError in others
        torch.softmax(x, 0)
    with pytest.raises(Exception) as found:
        fF.softmax(x, 0)
    assert found.type is expected.type
    assert fF.softmax(torch.randn(3).to_sparse().to_dense(), 0).sum() > 0.99


def test_out(no_fallback):
    x = torch.randn(30, 40)
    for ours, torchs in ((fF.softmax, torch.softmax), (fF.log_softmax, torch.log_softmax)):
        expected = torchs(x, 0)
        for out in (torch.empty(30, 40), torch.empty(0), torch.empty(40, 30).t(), torch.empty(30, 80)[:, ::2]):
            version = out._version
            assert ours(x, 0, out=out) is out
            assert out._version > version
            torch.testing.assert_close(out, expected)
        same = x.clone()
        torch.testing.assert_close(ours(same, 0, out=same), expected)
        crossed = x.clone()
        torch.testing.assert_close(ours(crossed[:20], 0, out=crossed[10:]), torchs(x[:20], 0))


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("log", [False, True])
def test_derivatives(dim, log, no_fallback):
    f = fF.log_softmax if log else fF.softmax
    x = randn(3, 4, 5, grad=True)

    def call(x):
        return f(x, dim)

    assert gradcheck(call, x, check_forward_ad=True, check_batched_forward_grad=True)
    assert gradgradcheck(call, x)
    assert gradcheck(call, randn(4, 5, 3).permute(2, 0, 1).requires_grad_())


@pairs
def test_transforms(ours, torchs, no_fallback):
    x = randn(3, 4, 5)
    for transform in (jacrev, jacfwd, hessian):
        for dim in (0, 1):
            one, other = (transform(lambda t, f=f, d=dim: f(t, d).pow(3).sum(1))(x[0]) for f in (ours, torchs))
            torch.testing.assert_close(one, other)
    for in_dim in (0, 1, 2):
        for dim in (0, 1, -1):
            one, other = (vmap(lambda t, f=f, d=dim: f(t, d), in_dim)(x) for f in (ours, torchs))
            torch.testing.assert_close(one, other)
            per_sample = [vmap(grad(lambda t, f=f, d=dim: f(t, d).pow(2).sum()), in_dim)(x) for f in (ours, torchs)]
            torch.testing.assert_close(*per_sample)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(log, needs_grad):
    op, back = torch.ops.fastnn.softmax.default, torch.ops.fastnn.softmax_backward.default
    opcheck(op, (torch.randn(3, 4, requires_grad=needs_grad), 1, log))
    opcheck(op, (torch.randn(4, 3, 2).transpose(0, 2).requires_grad_(needs_grad), 0, log))
    opcheck(back, (torch.randn(3, 4, requires_grad=needs_grad), torch.rand(3, 4, requires_grad=needs_grad), 0, log))


@pairs
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(ours, torchs, dynamic, no_fallback):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ours(x * 2, -1), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (3, 4, 6):
        x = torch.randn(n, n + 1, requires_grad=True)
        y, expected = compiled(x), torchs(x * 2, -1)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), x), torch.autograd.grad(expected.sin().sum(), x))


def test_fake_and_meta(no_fallback):
    with FakeTensorMode():
        assert fF.softmax(torch.randn(3, 4).t(), 0).stride() == (3, 1)
    assert fF.log_softmax(torch.empty(3, 4, device="meta"), 0).is_meta


@pairs
def test_autocast_leaves_them_alone_as_torchs_does(ours, torchs):
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x, 1).dtype is torchs(x, 1).dtype is torch.float32
        assert ours(x.bfloat16(), 1).dtype is torchs(x.bfloat16(), 1).dtype is torch.bfloat16


@pairs
def test_reference_backend(ours, torchs):
    x = torch.randn(3, 4, requires_grad=True)
    with fastnn.backend("reference"):
        torch.testing.assert_close(ours(x, 1), torchs(x, 1))


def test_negated_view(no_fallback):
    x = torch._neg_view(torch.randn(3, 4))
    torch.testing.assert_close(fF.softmax(x, 1), F.softmax(x, 1))


def test_layers_warn_and_refuse_as_torchs():
    with pytest.raises(ValueError, match="3D or 4D"):
        fastnn.nn.Softmax2d()(torch.randn(3, 4))
    for kind in ("Softmax", "LogSoftmax", "Softmin"):
        with pytest.warns(UserWarning, match="Implicit dimension choice"):
            getattr(fastnn.nn, kind)()(torch.randn(3, 4))


@pytest.mark.parametrize("op", ("softmax", "log_softmax"))
def test_one_value_for_the_whole_dimension(op):
    """Expanded along it, as the gradient of a sum is."""
    ours, theirs = getattr(fF, op), getattr(F, op)
    x = torch.randn(5, 1, dtype=torch.float64).expand(5, 37)
    assert torch.allclose(ours(x, 1), theirs(x, 1))
    a = torch.randn(4, 37, dtype=torch.float64, requires_grad=True)
    (by_ours,) = torch.autograd.grad((ours(a, -1) * 1.0).sum(-1), a, torch.arange(4.0, dtype=torch.float64))
    (by_theirs,) = torch.autograd.grad(theirs(a, -1).sum(-1), a, torch.arange(4.0, dtype=torch.float64))
    (by_both,) = torch.autograd.grad(ours(a, -1).sum(-1), a, torch.arange(4.0, dtype=torch.float64))
    assert torch.allclose(by_ours, by_theirs) and torch.allclose(by_both, by_theirs)
