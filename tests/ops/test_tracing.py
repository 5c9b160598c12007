"""torch.library, torch.compile, torch.export, autocast, fake and meta tensors, and the tracers."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager
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
    "batch_norm": lambda g: (
        op("batch_norm"),
        (randn(3, 4, 5, grad=g), None, None, randn(4, grad=g), randn(4, grad=g), None, 1e-5, False),
    ),
    "batch_norm relu": lambda g: (
        op("batch_norm"),
        (randn(3, 4, 2, 5, grad=g), None, None, randn(4, grad=g), None, randn(3, 4, 2, 5, grad=g), 1e-5, True),
    ),
    "batch_norm given": lambda g: (
        op("batch_norm"),
        (randn(3, 2, 5, 4).permute(0, 3, 1, 2).requires_grad_(g), randn(4), randn(4).exp(), *[None] * 3, 1e-5, False),
    ),
    "batch_norm_backward": lambda g: (
        op("batch_norm_backward"),
        (
            *(randn(3, 4, 5, grad=g), randn(3, 4, 5, grad=g), randn(4, grad=g)),
            *(randn(4, dtype=torch.float64), randn(4, dtype=torch.float64).exp(), randn(3, 4, 5), True, 1e-5, True),
        ),
    ),
    "attention": lambda g: (
        op("attention"),
        (*(randn(2, n, 3, 4, grad=g) for n in (4, 2, 2)), None, None, 0.5, None, 0, 0, 0.0, None, True),
    ),
    "attention masked": lambda g: (
        op("attention"),
        (
            *(randn(1, 4, 2, 3, grad=g).transpose(1, 2) for _ in range(3)),
            *(randn(1, 1, 4, 1, grad=g), torch.rand(1, 2), 0.5, -1, 2, 1, 0.5, torch.tensor(3), False),
        ),
    ),
    "attention_backward": lambda g: (
        op("attention_backward"),
        (
            *(randn(2, n, 3, 4, grad=g) for n in (4, 4, 2, 2)),
            *(randn(2, 1, 3, 3, grad=g), None, randn(2, 4, 3, 4), randn(2, 4, 3), 0.5, None, 1, 0, 0.0, None, True),
        ),
    ),
    "matmul": lambda g: (op("matmul"), (randn(3, 4, grad=g), randn(4, 5, grad=g))),
    "matmul batch": lambda g: (op("matmul"), (randn(2, 1, 3, 4, grad=g), randn(3, 4, 5, grad=g))),
    "matmul folded": lambda g: (op("matmul"), (randn(2, 3, 4, grad=g), randn(4, 5, grad=g))),
    "addmm": lambda g: (op("addmm"), (randn(5, grad=g), randn(3, 4, grad=g), randn(4, 5, grad=g), 0.5, 2.0)),
    "activation gelu": lambda g: (op("activation"), (randn(3, 4, 5, grad=g).transpose(0, 2), "gelu")),
    "activation relu": lambda g: (op("activation"), (randn(3, 4, grad=g), "relu")),
    "activation relu6": lambda g: (op("activation"), (randn(3, 4, grad=g), "relu6")),
    "activation_backward silu": lambda g: (
        op("activation_backward"),
        (randn(3, 4, grad=g), randn(3, 4, grad=g), "silu"),
    ),
    "activation_backward tanh": lambda g: (
        op("activation_backward"),
        (randn(3, 4, grad=g), randn(3, 4, grad=g), "tanh"),
    ),
}


LAST = torch.channels_last
OPCHECKS.update(
    {
        "convolution": lambda g: (
            op("convolution"),
            (randn(2, 4, 6, 5, grad=g), randn(6, 2, 3, 2, grad=g), randn(6, grad=g), [2, 1], [1, 0], [1, 2], 2),
        ),
        "convolution channels-last": lambda g: (
            op("convolution"),
            (last(2, 4, 6, 5, grad=g), last(3, 4, 3, 3, grad=g), None, [1, 1], [1, 1], [1, 1], 1),
        ),
        "convolution 3-d channels-last": lambda g: (
            op("convolution"),
            (last(1, 2, 3, 4, 5, grad=g), randn(3, 2, 2, 2, 2, grad=g), None, [1] * 3, [0] * 3, [1] * 3, 1),
        ),
        "convolution_input": lambda g: (
            op("convolution_input"),
            (randn(2, 4, 5, grad=g), randn(4, 3, 3, grad=g), randn(3, grad=g), [10], [2], [1], [1], 1),
        ),
        "convolution_input channels-last": lambda g: (
            op("convolution_input"),
            (last(2, 4, 5, 4, grad=g), randn(4, 3, 3, 2, grad=g), None, [5, 5], [1, 1], [1, 0], [1, 1], 1),
        ),
        "convolution_weight": lambda g: (
            op("convolution_weight"),
            (randn(2, 4, 3, 4, grad=g), randn(2, 6, 5, 5, grad=g), [3, 2], [2, 1], [1, 0], [1, 1], 2, False),
        ),
        "convolution_weight channels-last": lambda g: (
            op("convolution_weight"),
            (last(2, 4, 3, 4, grad=g), last(2, 6, 5, 5, grad=g), [3, 2], [2, 1], [1, 0], [1, 1], 2, True),
        ),
    }
)


def last(*shape, grad=False):
    order = LAST if len(shape) == 4 else torch.channels_last_3d
    return randn(*shape).contiguous(memory_format=order).requires_grad_(grad)


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
        y = f.relu(y) + f.sigmoid(y) * f.tanh(f.batch_norm(y, None, None, b[:6], b[2:], True))
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
    "conv1d": (fF.conv1d, F.conv1d, [(2, 3, 7), (4, 3, 3), (4,)]),
    "conv2d": (fF.conv2d, F.conv2d, [(2, 3, 5, 4), (4, 3, 3, 2), (4,)]),
    "conv_transpose2d": (fF.conv_transpose2d, F.conv_transpose2d, [(2, 3, 5, 4), (3, 4, 3, 2), (4,)]),
    "batch_norm": (
        lambda x, w, b: fF.batch_norm(x, None, None, w, b, True),
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
        [(5, 4), (4,), (4,)],
    ),
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


# ---- convolutions ------------------------------------------------------------------------------------------------


def cnn(f):
    def run(x, w, v, b, u):
        y = f.relu(f.conv2d(x, w, b, stride=2, padding=1))
        y = f.conv2d(y, v, padding="same", dilation=2, groups=2)
        y = f.conv_transpose2d(y, w, stride=2, output_padding=1)
        z = f.conv1d(y.flatten(2), u, padding=2).mean()
        return z + f.conv3d(y[:, None], v[:1, :1, None]).square().mean()

    return run


def cnn_arguments(n=2, h=8, w=6, channels_last=False):
    shapes = ((n, 3, h, w), (4, 3, 3, 3), (4, 2, 3, 2), (4,), (2, 3, 3))
    tensors = [0.5 * randn(*shape) for shape in shapes]
    if channels_last:
        tensors[0] = tensors[0].contiguous(memory_format=LAST)
    return tuple(t.requires_grad_() for t in tensors)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_convolutions(dynamic, grad, no_fallback):
    """Batch and sizes change between the calls of one graph where it is dynamic."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(cnn(fF), fullgraph=True, dynamic=dynamic, backend=count)
    # Sizes that no weight has: one symbol stands for equal ones.
    for sizes in ((5, 8, 7), (6, 8, 7), (6, 11, 9)) if dynamic else ((5, 8, 7),):
        inputs = cnn_arguments(*sizes)
        with torch.set_grad_enabled(grad):
            result, expected = compiled(*inputs), cnn(F)(*inputs)
        close(result, expected)
        if grad:
            for a, b in zip(torch.autograd.grad(result, inputs), torch.autograd.grad(expected, inputs), strict=True):
                close(a, b)
    assert len(graphs) == 1
    assert {"fastnn.convolution", "fastnn.convolution_input"} <= {str(n.target) for n in graphs[0].graph.nodes}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
def test_compile_convolutions_with_inductor(channels_last, no_fallback):
    torch._dynamo.reset()
    inputs = cnn_arguments(channels_last=channels_last)
    result, expected = torch.compile(cnn(fF), fullgraph=True)(*inputs), cnn(F)(*inputs)
    close(result, expected)
    for a, b in zip(torch.autograd.grad(result, inputs), torch.autograd.grad(expected, inputs), strict=True):
        close(a, b)


@pytest.mark.parametrize("strict", [False, True])
def test_export_convolutions(strict, no_fallback):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = fastnn.nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="reflect")
            self.two = fastnn.nn.ConvTranspose2d(4, 2, 2, stride=2)

        def forward(self, x):
            return self.two(self.one(x))

    model = Model()
    shapes = {"x": {0: torch.export.Dim("batch", min=2)}}
    program = torch.export.export(model, (randn(3, 3, 8, 6),), dynamic_shapes=shapes, strict=strict)
    assert "fastnn.convolution" in str(program.graph)
    x = randn(5, 3, 8, 6)
    close(program.module()(x), model(x))
    close(program.run_decompositions().module()(x), model(x))


@pytest.mark.parametrize("formats", [(False, False), (True, False), (False, True)], ids=["", "input", "weight"])
@pytest.mark.parametrize(
    "name", ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]
)
def test_meta_and_fake_convolutions(name, formats, no_fallback):
    """Shape, strides and dtype are those of a call with data."""
    rank = int(name[-2])
    ours = getattr(fF, name)
    for batch, dtype in ((2, torch.float32), (1, torch.float32), (2, torch.float64)):
        x, w = randn(batch, 4, *(5, 6, 7)[:rank], dtype=dtype), randn(4, 4, *(3, 2, 3)[:rank], dtype=dtype)
        order = (None, None, LAST, torch.channels_last_3d)[rank]
        if order:
            x = x.contiguous(memory_format=order) if formats[0] else x
            w = w.contiguous(memory_format=order) if formats[1] else w
        expected = ours(x, w, padding=1)
        meta = ours(x.to("meta"), w.to("meta"), padding=1)
        assert (meta.shape, meta.dtype, meta.is_meta) == (expected.shape, expected.dtype, True)
        if rank < 3:  # what torch would choose in three dimensions is not known without the CPU's tensors
            assert meta.stride() == expected.stride()
        with FakeTensorMode() as mode:
            fake = ours(mode.from_tensor(x), mode.from_tensor(w), padding=1)
        assert (fake.shape, fake.stride(), fake.dtype) == (expected.shape, expected.stride(), expected.dtype)


@pytest.mark.parametrize("grad", [False, True])
def test_tracers_of_convolutions(grad, no_fallback):
    """... which go on where gradients are off."""
    inputs = (randn(2, 3, 5, 4), randn(4, 3, 3, 2), randn(4))
    with torch.set_grad_enabled(grad):
        graph = make_fx(lambda x, w, b: fF.conv2d(x, w, b))(*inputs)
        assert "fastnn.convolution" in str(graph.graph)
        close(graph(*inputs), F.conv2d(*inputs))
        traced = torch.jit.trace(lambda x, w, b: fF.conv2d(x, w, b), inputs)
        assert "fastnn::convolution" in str(traced.graph)
        other = (randn(3, 3, 6, 5), *inputs[1:])
        close(traced(*other), F.conv2d(*other))


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_of_a_transposed_convolution_holds_for_other_sizes():
    traced = torch.jit.trace(lambda x, w: fF.conv_transpose2d(x, w), (randn(2, 3, 5, 4), randn(3, 4, 2, 2)))
    x, w = randn(3, 3, 7, 2), randn(3, 4, 2, 2)
    close(traced(x, w), F.conv_transpose2d(x, w))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_of_convolutions(reentrant, no_fallback):
    x, w = randn(2, 3, 5, 4, grad=True), randn(3, 3, 3, 2, grad=True)

    def run(f):
        return lambda x, w: f.conv_transpose2d(f.relu(f.conv2d(x, w)), w)

    found = _backward(checkpoint(run(fF), x, w, use_reentrant=reentrant), x, w)
    for a, b in zip(found, _backward(run(F)(x, w), x, w), strict=True):
        close(a, b)


def test_autocast_of_convolutions_leaves_float64_alone_and_mixes():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fF.conv2d(randn(2, 3, 5, 4).bfloat16(), randn(4, 3, 3, 2), randn(4))
        assert y.dtype is torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert fF.conv2d(randn(2, 3, 5, 4), randn(4, 3, 3, 2)).dtype is torch.float32
