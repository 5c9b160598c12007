"""Gradients, gradients of gradients, forward mode and torch.func, in float64 by finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacrev, jvp, vmap

import fastnn
import fastnn.functional as fF
from fastnn import _cpu
from fastnn.ops.activation import KINDS, activation


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


CASES = {
    "max_pool1d": (lambda x: fF.max_pool1d(x, 3, 2, 1, ceil_mode=True), [(2, 3, 8)]),
    "max_pool2d": (lambda x: fF.max_pool2d(x, (3, 2), (2, 1), 1), [(2, 2, 5, 6)]),
    "max_pool2d dilated": (lambda x: fF.max_pool2d(x, 3, 1, 2, dilation=2, return_indices=True)[0], [(2, 6, 5)]),
    "max_pool3d": (lambda x: fF.max_pool3d(x, 2), [(1, 2, 4, 2, 5)]),
    "adaptive_max_pool2d": (lambda x: fF.adaptive_max_pool2d(x, (2, 3)), [(2, 5, 7)]),
    "avg_pool1d": (lambda x: fF.avg_pool1d(x, 3, 2, 1, count_include_pad=False), [(2, 3, 8)]),
    "avg_pool2d": (lambda x: fF.avg_pool2d(x, 3, 2, 1, ceil_mode=True), [(2, 2, 6, 5)]),
    "avg_pool3d": (lambda x: fF.avg_pool3d(x, 2, 1, divisor_override=3), [(1, 2, 3, 2, 4)]),
    "adaptive_avg_pool2d": (lambda x: fF.adaptive_avg_pool2d(x, (3, 1)), [(2, 5, 7)]),
    "linear": (fF.linear, [(2, 3, 4), (5, 4), (5,)]),
    "linear of a vector": (fF.linear, [(4,), (5, 4), (5,)]),
    "linear without bias": (fF.linear, [(3, 4), (5, 4)]),
    "mm": (fastnn.mm, [(3, 4), (4, 2)]),
    "bmm": (fastnn.bmm, [(2, 3, 4), (2, 4, 2)]),
    "mv": (fastnn.mv, [(3, 4), (4,)]),
    "addmm": (lambda i, a, b: fastnn.addmm(i, a, b, beta=0.5, alpha=2), [(2,), (3, 4), (4, 2)]),
    "baddbmm": (lambda i, a, b: fastnn.baddbmm(i, a, b, beta=0.5, alpha=2), [(3, 1), (2, 3, 4), (2, 4, 2)]),
    "bilinear": (fF.bilinear, [(3, 2), (3, 4), (2, 2, 4), (2,)]),
    "relu in place": (lambda x: fF.relu(x * 1, inplace=True), [(3, 4)]),
    "silu in place": (lambda x: fF.silu(x * 1, inplace=True), [(3, 4)]),
    **{f"activation {kind}": (lambda x, kind=kind: activation(kind, x), [(3, 4)]) for kind in KINDS[1:]},
    **{
        f"linear_act {kind}": (lambda x, w, b, kind=kind: fF.linear_act(x, w, b, kind), [(3, 4), (2, 4), (2,)])
        for kind in KINDS[1:]
    },
    **{
        f"matmul {a} {b}": (fastnn.matmul, [a, b])
        for a, b in (
            ((4,), (4,)),
            ((3, 4), (4,)),
            ((4,), (2, 4, 3)),
            ((2, 3, 4), (4,)),
            ((2, 3, 4), (4, 2)),
            ((3, 4), (2, 4, 2)),
            ((2, 1, 3, 4), (3, 4, 2)),
        )
    },
}


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    function, shapes = CASES[name]
    inputs = [leaf(*shape) for shape in shapes]
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_gradgradcheck(name):
    function, shapes = CASES[name]
    assert gradgradcheck(function, [leaf(*shape) for shape in shapes], fast_mode=True)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
def test_only_the_gradients_asked_for(needs, no_fallback):
    tensors = [torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)]
    inputs = [t.clone().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
    theirs = [t.clone().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
    fF.linear(*inputs).square().sum().backward()
    F.linear(*theirs).square().sum().backward()
    for a, b in zip(inputs, theirs, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def backward_with(direction, function, *inputs):
    result = function(*inputs)
    before = direction.clone()
    found = torch.autograd.grad(result, inputs, direction)
    torch.testing.assert_close(direction, before, rtol=0, atol=0)
    return found


@pytest.mark.parametrize(
    "direction",
    [
        torch.ones(()).expand(6, 5),
        torch.randn(1, 5).expand(6, 5),
        torch.randn(6, 1).expand(6, 5),
        torch.randn(5, 6).t(),
        torch.randn(12, 10)[::2, ::2],
        torch.randn(31)[1:].view(6, 5),
    ],
    ids=["scalar", "rows", "columns", "transposed", "sliced", "offset"],
)
@pytest.mark.parametrize("kind", ["none", "relu", "gelu", "tanh"])
def test_gradients_arrive_in_any_layout(direction, kind, no_fallback):
    """... and are not written to."""
    x, w, b = (t.requires_grad_() for t in (torch.randn(6, 4), torch.randn(5, 4), torch.randn(5)))
    found = backward_with(direction, lambda *t: fF.linear_act(*t, kind), x, w, b)
    f = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}[kind]
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    expected = torch.autograd.grad(f(F.linear(*wide)), wide, direction.double())
    for g, e in zip(found, expected, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-5)


def test_no_graph_without_need(no_fallback):
    x, w = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    with torch.no_grad():
        assert fF.linear(x, w).grad_fn is None
    with torch.inference_mode():
        y = fF.linear(x, w)
        assert y.is_inference()
        torch.testing.assert_close(fF.gelu(y), F.gelu(y))
        torch.testing.assert_close(fastnn.matmul(y, y.t()), y @ y.t())
    assert fF.linear(x, w.detach()).grad_fn is None
    assert fF.linear(x, w).requires_grad


def test_a_saved_tensor_changed_in_place_is_noticed():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    y = fF.linear(x, w)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    z = fF.relu(y)
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_relu_in_place(no_fallback):
    x = torch.randn(3, 4)
    version = x._version
    assert fF.relu(x, inplace=True) is x
    assert x._version > version
    assert (x >= 0).all()


def network(f, products):
    def run(x, w, b, v):
        y = f.gelu(f.linear(x, w, b))
        z = products.matmul(f.relu(y), v)
        return (products.addmm(b[: v.shape[1]], y.reshape(-1, y.shape[-1]), v, beta=0.5).sum() + f.silu(z).sum()).tanh()

    return run


OURS, TORCHS = network(fF, fastnn), network(F, torch)


@pytest.fixture
def arguments():
    return tuple(t * 0.3 for t in (torch.randn(3, 6, 4), torch.randn(8, 4), torch.randn(8), torch.randn(8, 7)))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_func_grad(arguments, no_fallback):
    for a, b in zip(grad(OURS, (0, 1, 2, 3))(*arguments), grad(TORCHS, (0, 1, 2, 3))(*arguments), strict=True):
        close(a, b)


def test_func_vmap_of_grad(arguments, no_fallback):
    dims = (0, None, None, None)
    close(vmap(grad(OURS, 1), dims)(*arguments), vmap(grad(TORCHS, 1), dims)(*arguments))


def test_func_jvp(arguments, no_fallback):
    close(jvp(OURS, arguments, arguments)[1], jvp(TORCHS, arguments, arguments)[1])


def test_func_hessian(arguments, no_fallback):
    x, w, b, v = arguments
    close(hessian(lambda b: OURS(x, w, b, v))(b), hessian(lambda b: TORCHS(x, w, b, v))(b))


def test_func_jacrev(arguments, no_fallback):
    x, w, b, _ = arguments
    close(jacrev(lambda x: fF.linear(x, w, b))(x[0]), jacrev(lambda x: F.linear(x, w, b))(x[0]))


@pytest.mark.parametrize(
    ("shapes", "dims"),
    [
        ([(5, 3, 4), (5, 8, 4), (5, 8)], (0, 0, 0)),
        ([(5, 4), (8, 4), (8,)], (0, None, None)),
        ([(3, 4), (8, 5, 4), (8,)], (None, 1, None)),
        ([(3, 5, 4), (8, 4), (8, 5)], (1, None, 1)),
    ],
)
def test_func_vmap_of_linear(shapes, dims, no_fallback):
    inputs = [torch.randn(s) for s in shapes]
    close(vmap(fF.linear, dims)(*inputs), vmap(F.linear, dims)(*inputs))


@pytest.mark.parametrize(
    ("shapes", "dims"),
    [([(5, 3, 4), (5, 4, 2)], (0, 0)), ([(5, 3, 4), (4, 2)], (0, None)), ([(3, 4), (4, 2, 5)], (None, 2))],
)
def test_func_vmap_of_matmul(shapes, dims, no_fallback):
    inputs = [torch.randn(s) for s in shapes]
    close(vmap(fastnn.matmul, dims)(*inputs), vmap(torch.matmul, dims)(*inputs))


def test_create_graph_computes_each_product_once():
    x, w = (torch.randn(90, 90, requires_grad=True) for _ in range(2))
    for function in (lambda: fF.linear(x, w), lambda: fastnn.mm(x, w)):
        result = function()
        _cpu.reset_counters()
        torch.autograd.grad(result.sum(), (x, w), create_graph=True)
        assert sum(_cpu.counters().values()) == 2
