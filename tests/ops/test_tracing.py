"""torch.library, torch.compile, torch.export, autocast, fake and meta tensors, and the tracers."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import fastnn
import fastnn.functional as fF
from fastnn import _state

from .support import TORCH

# Dynamo of torch 2.6 cannot raise an exception of a class of one's own, by which an op says that a call is torch's.
raises_inside_compile = pytest.mark.skipif(TORCH < (2, 7), reason="a call that falls back, inside of torch.compile")


def op(name):
    return getattr(torch.ops.fastnn, name).default


def randn(*shape, grad=False, dtype=None):
    return torch.randn(shape, requires_grad=grad, dtype=dtype)


def codes(*shape):
    return torch.randint(0, 4, shape).to(torch.uint8)


WINDOWS = ([2, 2], [2, 2], [0, 0], [1, 1])
OPCHECKS = {
    "max_pool": lambda g: (op("max_pool"), (randn(2, 3, 6, 4, grad=g), *WINDOWS, [3, 2], True)),
    "max_pool adaptive": lambda g: (op("max_pool"), (randn(3, 6, 5, grad=g), [], [], [], [], [3, 2], False)),
    "max_pool_backward": lambda g: (
        op("max_pool_backward"),
        (randn(2, 3, 3, 2, grad=g), codes(2, 3, 3, 2), *WINDOWS, [2, 3, 6, 4], 2, False),
    ),
    "max_pool_gather": lambda g: (
        op("max_pool_gather"),
        (randn(2, 3, 6, 4, grad=g), codes(2, 3, 3, 2), *WINDOWS, 2, True),
    ),
    "max_pool_indices": lambda g: (op("max_pool_indices"), (codes(2, 3, 3, 2), *WINDOWS, [6, 4], False)),
    "avg_pool": lambda g: (op("avg_pool"), (randn(2, 3, 6, 4, grad=g), *WINDOWS, [3, 2], True, 0, True)),
    "avg_pool_backward": lambda g: (
        op("avg_pool_backward"),
        (randn(2, 3, 3, 2, grad=g), *WINDOWS, [2, 3, 6, 4], 2, True, 3, False),
    ),
    "linear": lambda g: (op("linear"), (randn(2, 3, 4, grad=g), randn(5, 4, grad=g), randn(5, grad=g), "none")),
    "linear relu": lambda g: (op("linear"), (randn(3, 4, grad=g), randn(5, 4, grad=g), randn(5, grad=g), "relu")),
    "linear gelu": lambda g: (op("linear"), (randn(3, 4, grad=g), randn(5, 4, grad=g), None, "gelu")),
    "linear strided": lambda g: (
        op("linear"),
        (randn(4, 3).t().requires_grad_(g), randn(4, 5).t().requires_grad_(g), None, "none"),
    ),
    "matmul": lambda g: (op("matmul"), (randn(3, 4, grad=g), randn(4, 5, grad=g))),
    "matmul batch": lambda g: (op("matmul"), (randn(2, 1, 3, 4, grad=g), randn(3, 4, 5, grad=g))),
    "matmul folded": lambda g: (op("matmul"), (randn(2, 3, 4, grad=g), randn(4, 5, grad=g))),
    "addmm": lambda g: (op("addmm"), (randn(5, grad=g), randn(3, 4, grad=g), randn(4, 5, grad=g), 0.5, 2.0)),
    "activation gelu": lambda g: (op("activation"), (randn(3, 4, 5, grad=g).transpose(0, 2), "gelu")),
    "activation relu": lambda g: (op("activation"), (randn(3, 4, grad=g), "relu")),
    "activation_backward silu": lambda g: (
        op("activation_backward"),
        (randn(3, 4, grad=g), randn(3, 4, grad=g), "silu"),
    ),
    "activation_backward tanh": lambda g: (
        op("activation_backward"),
        (randn(3, 4, grad=g), randn(3, 4, grad=g), "tanh"),
    ),
}


@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name, grad):
    opcheck(*OPCHECKS[name](grad))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_opcheck_dtypes(dtype):
    tensors = (randn(3, 4, dtype=dtype), randn(5, 4, dtype=dtype), randn(5, dtype=dtype), "none")
    opcheck(op("linear"), tensors, test_utils=("test_schema", "test_faketensor"))


def network(f, products):
    def run(x, w, b, v):
        y = f.gelu(f.linear(x, w, b))
        y = f.relu(y) + f.sigmoid(y) * f.tanh(y)
        z = products.matmul(y, v)
        flat = y.reshape(-1, y.shape[-1])
        z = z.sum() + products.addmm(b[: v.shape[1]], flat, v, beta=0.5).sum()
        z = z + products.mm(flat, v).sum() + products.bmm(y, y.mT).sum() + products.mv(flat, b).sum()
        return (
            z
            + products.baddbmm(b[:1], y, y.mT, alpha=0.5).sum()
            + f.bilinear(flat, flat, v.t().unsqueeze(1) * w.new_ones(1, 8, 1)).sum()
        )

    return run


OURS, TORCHS = network(fF, fastnn), network(F, torch)


def arguments(n=3):
    return tuple((0.3 * t).requires_grad_() for t in (randn(n, 6, 4), randn(8, 4), randn(8), randn(8, 7)))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic, grad, no_fallback):
    torch._dynamo.reset()
    compiled = torch.compile(OURS, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (3, 5) if dynamic else (3,):
        inputs = arguments(n)
        with torch.set_grad_enabled(grad):
            result, expected = compiled(*inputs), TORCHS(*inputs)
        close(result, expected)
        if grad:
            for a, b in zip(torch.autograd.grad(result, inputs), torch.autograd.grad(expected, inputs), strict=True):
                close(a, b)


def test_compile_has_our_ops_in_its_graph():
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compile(lambda x, w: fF.relu(fF.linear(x, w)), fullgraph=True, backend=keep)(randn(3, 4), randn(5, 4))
    (graph,) = graphs
    assert {"fastnn.linear", "fastnn.activation"} <= {str(node.target) for node in graph.graph.nodes}


def test_compile_inductor(no_fallback):
    torch._dynamo.reset()
    inputs = arguments()[:3]
    compiled = torch.compile(lambda x, w, b: fF.linear_act(x, w, b, "gelu") * 2, fullgraph=True)
    result, expected = compiled(*inputs), F.gelu(F.linear(*inputs)) * 2
    close(result, expected)
    for a, b in zip(
        torch.autograd.grad(result.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        close(a, b)


@raises_inside_compile
def test_transforms_inside_compile_are_right():
    """Dynamo traces what a transform does inside; there torch's own ops run, and are counted."""
    torch._dynamo.reset()
    _state.reset_fallbacks()
    inputs = tuple(t.detach() for t in arguments()[:3])
    run = torch.compile(lambda *t: torch.func.jvp(fF.linear, t, t)[1], backend="aot_eager", fullgraph=True)
    close(run(*inputs), torch.func.jvp(F.linear, inputs, inputs)[1])
    assert ("linear", "a torch.func transform inside of torch.compile") in _state.fallbacks()


@raises_inside_compile
def test_fallbacks_compile():
    torch._dynamo.reset()
    _state.reset_fallbacks()
    x = torch.arange(6).view(2, 3)
    close(torch.compile(fastnn.matmul, fullgraph=True, backend="aot_eager")(x, x.t()), x @ x.t())
    assert ("matmul", "dtype int64") in _state.fallbacks()


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, no_fallback):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 8)

        def forward(self, x):
            return fF.silu(fF.linear(x, self.layer.weight, self.layer.bias))

    model = Model()
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(model, (randn(3, 4),), dynamic_shapes={"x": {0: rows}}, strict=strict)
    assert "fastnn.linear" in str(program.graph)
    x = randn(7, 4)
    close(program.module()(x), F.silu(model.layer(x)))
    close(program.run_decompositions().module()(x), F.silu(model.layer(x)))


def test_meta_and_fake(no_fallback):
    for f, g in ((OURS, TORCHS),):
        inputs = [t.detach().to("meta") for t in arguments()]
        assert f(*inputs).shape == g(*inputs).shape
        assert f(*inputs).device.type == "meta"
    with FakeTensorMode():
        result = fF.linear(randn(2, 3, 4), randn(5, 4))
        assert result.shape == (2, 3, 5)
        assert result.stride() == (15, 5, 1)
    cases = [((4,), (4,)), ((3, 4), (4,)), ((4,), (2, 4, 3)), ((2, 3, 4), (4, 5)), ((5, 1, 3, 4), (2, 4, 5))]
    for a, b in cases:
        ours = fastnn.matmul(torch.empty(a, device="meta"), torch.empty(b, device="meta"))
        torchs = torch.matmul(torch.empty(a), torch.empty(b))
        assert (ours.shape, ours.stride()) == (torchs.shape, torchs.stride())
    x = torch.empty(3, 4, 5, device="meta").permute(2, 0, 1)
    assert fF.gelu(x).stride() == F.gelu(torch.empty(3, 4, 5).permute(2, 0, 1)).stride()


def test_tracers(no_fallback):
    inputs = (randn(3, 4), randn(5, 4), randn(5))
    graph = make_fx(lambda x, w, b: fF.linear(x, w, b))(*inputs)
    assert "fastnn.linear" in str(graph.graph)
    close(graph(*inputs), F.linear(*inputs))
    traced = torch.jit.trace(lambda x, w, b: fF.linear(x, w, b), inputs)
    other = (randn(6, 4), *inputs[1:])
    close(traced(*other), F.linear(*other))


def test_checkpoint(no_fallback):
    x, w = randn(3, 4, grad=True), randn(5, 4, grad=True)
    for reentrant in (False, True):
        y = checkpoint(lambda x, w: fF.gelu(fF.linear(x, w)), x, w, use_reentrant=reentrant)
        expected = F.gelu(F.linear(x, w))
        for a, b in zip(
            torch.autograd.grad(y.sum(), (x, w)) if not reentrant else _backward(y, x, w),
            torch.autograd.grad(expected.sum(), (x, w)),
            strict=True,
        ):
            close(a, b)


def _backward(y, *leaves):
    for leaf in leaves:
        leaf.grad = None
    y.sum().backward()
    return tuple(leaf.grad for leaf in leaves)


CASTS = {
    "linear": (fF.linear, F.linear, [(3, 4), (5, 4), (5,)]),
    "matmul": (fastnn.matmul, torch.matmul, [(2, 3, 4), (4, 5)]),
    "matmul of vectors": (fastnn.matmul, torch.matmul, [(4,), (4,)]),
    "mm": (fastnn.mm, torch.mm, [(3, 4), (4, 5)]),
    "bmm": (fastnn.bmm, torch.bmm, [(2, 3, 4), (2, 4, 5)]),
    "addmm": (fastnn.addmm, torch.addmm, [(5,), (3, 4), (4, 5)]),
    "baddbmm": (fastnn.baddbmm, torch.baddbmm, [(5,), (2, 3, 4), (2, 4, 5)]),
    "mv": (fastnn.mv, torch.mv, [(3, 4), (4,)]),
    "bilinear": (fF.bilinear, F.bilinear, [(3, 4), (3, 5), (2, 4, 5), (2,)]),
    "gelu": (fF.gelu, F.gelu, [(3, 4)]),
}


@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, dtype, no_fallback):
    torch._dynamo.reset()  # torch 2.6 does not look at autocast's dtype when it takes a compiled graph again
    ours, torchs, shapes = CASTS[name]
    inputs = [randn(*s, grad=True) for s in shapes]
    with torch.autocast("cpu", dtype=dtype):
        result, expected = ours(*inputs), torchs(*inputs)
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)(*inputs)
        doubles = ours(*(t.double() for t in inputs))
    assert result.dtype is compiled.dtype is expected.dtype
    assert doubles.dtype is torch.float64
    torch.testing.assert_close(result.float(), expected.float(), rtol=0.02, atol=0.05)
    torch.testing.assert_close(compiled, result, rtol=0.02, atol=0.05)
    for a, b in zip(
        torch.autograd.grad(result.float().sum(), inputs),
        torch.autograd.grad(expected.float().sum(), inputs),
        strict=True,
    ):
        assert a.dtype is torch.float32
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.05)


def test_autocast_mixes_dtypes():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fF.linear(randn(3, 4).bfloat16(), randn(5, 4), randn(5))
        assert y.dtype is torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert fF.linear(randn(3, 4), randn(5, 4)).dtype is torch.float32
        out = torch.empty(3, 5)
        assert fastnn.mm(randn(3, 4), randn(4, 5), out=out).dtype is torch.float32
