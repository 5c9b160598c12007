"""Gradients, gradients of gradients, forward mode and torch.func, in float64 by finite differences."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacrev, jvp, vmap

import fastnn
import fastnn.functional as fF
from fastnn import _cpu
from fastnn.ops.activation import KINDS, activation
from fastnn.ops.conv import convolution, convolution_input, convolution_weight


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


# Shapes of (input, weight, bias), and the options of the call.
CONVS = {
    "conv1d": ([(2, 3, 7), (4, 3, 3), (4,)], {}),
    "conv1d same": ([(2, 3, 5), (2, 3, 4), (2,)], {"padding": "same"}),
    "conv1d of one": ([(4, 6), (2, 4, 1)], {}),
    "conv2d": ([(2, 3, 5, 4), (4, 3, 3, 2), (4,)], {"padding": 1}),
    "conv2d strided": ([(2, 2, 6, 5), (3, 2, 3, 2)], {"stride": (2, 3), "padding": (1, 0), "dilation": (1, 2)}),
    "conv2d with groups": ([(1, 4, 4, 5), (6, 2, 2, 3), (6,)], {"groups": 2, "stride": 2, "padding": 1}),
    "conv2d depthwise": ([(2, 3, 4, 5), (6, 1, 3, 3), (6,)], {"groups": 3, "padding": 1}),
    "conv2d with a stride past its kernel": ([(1, 2, 7, 6), (2, 2, 2, 1), (2,)], {"stride": 4}),
    "conv3d": ([(1, 2, 3, 4, 3), (2, 2, 2, 3, 2), (2,)], {"stride": (1, 2, 1), "padding": 1, "dilation": (2, 1, 1)}),
    "conv_transpose1d": ([(2, 3, 5), (3, 2, 3), (2,)], {"stride": 2, "padding": 1, "output_padding": 1}),
    "conv_transpose2d": ([(2, 4, 3, 2), (4, 2, 3, 2), (4,)], {"groups": 2, "stride": (2, 1), "dilation": (1, 2)}),
    "conv_transpose2d depthwise": ([(1, 3, 3, 4), (3, 1, 2, 3), (3,)], {"groups": 3, "stride": 3, "output_padding": 2}),
    "conv_transpose3d": ([(1, 2, 2, 3, 2), (2, 2, 2, 1, 3)], {"padding": (1, 0, 1), "dilation": (2, 1, 1)}),
}


def conv(name, where=fF):
    """The case's function, with its options."""
    function = getattr(where, name.split()[0])
    return lambda *t: function(*t, **CONVS[name][1])


#: A running mean and variance.
STATISTICS = torch.tensor([[0.5, -1.0, 0.0, 2.0], [0.5, 1.0, 2.0, 0.1]], dtype=torch.float64)

CASES = {
    **{name: (conv(name), shapes) for name, (shapes, _) in CONVS.items()},
    "max_pool1d": (lambda x: fF.max_pool1d(x, 3, 2, 1, ceil_mode=True), [(2, 3, 8)]),
    "max_pool2d": (lambda x: fF.max_pool2d(x, (3, 2), (2, 1), 1), [(2, 2, 5, 6)]),
    "max_pool2d dilated": (lambda x: fF.max_pool2d(x, 3, 1, 1, dilation=2, return_indices=True)[0], [(2, 6, 5)]),
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
    "batch_norm": (lambda x, w, b: fF.batch_norm(x, None, None, w, b, True), [(3, 4, 2), (4,), (4,)]),
    "batch_norm without weight": (lambda x: fF.batch_norm(x, None, None, None, None, True), [(5, 2)]),
    "batch_norm given": (
        lambda x, w, b: fF.batch_norm(x, STATISTICS[0], STATISTICS[1], w, b),
        [(3, 4, 2, 2), (4,), (4,)],
    ),
    "batch_norm_act": (
        lambda x, w, b, r: fF.batch_norm_act(x, None, None, w, b, True, residual=r),
        [(3, 4, 2), (4,), (4,), (3, 4, 2)],
    ),
    "batch_norm_act given": (
        lambda x, w, r: fF.batch_norm_act(x, STATISTICS[0], STATISTICS[1], w, residual=r),
        [(3, 4, 2), (4,), (3, 4, 2)],
    ),
    "attention": (fF.scaled_dot_product_attention, [(2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 3), (3, 5)]),
    "attention causal": (
        lambda q, k, v: fF.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=-0.7),
        [(1, 4, 3, 2), (1, 2, 4, 2), (1, 2, 4, 2)],
    ),
    "attention of matrices": (fF.scaled_dot_product_attention, [(3, 4), (5, 4), (5, 2)]),
    "attention of queries that see nothing": (
        lambda q, k, v: fF.scaled_dot_product_attention(q, k, v, torch.ones(5, 3).tril(-2) > 0),
        [(2, 5, 4), (2, 3, 4), (2, 3, 4)],
    ),
    "attention with a window": (
        lambda q, k, v, m, s: fF.attention(q, k, v, m, window=(2, 1), alibi_slopes=s, alignment="lower_right"),
        [(1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4), (1, 2, 1, 5), (2,)],
    ),
    "relu in place": (lambda x: fF.relu(x * 1, inplace=True), [(3, 4)]),
    "relu6 in place": (lambda x: fF.relu6(x * 4, inplace=True), [(3, 4)]),
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
@pytest.mark.parametrize("name", ["linear", "conv2d", "conv_transpose2d"])
def test_only_the_gradients_asked_for(name, needs, no_fallback):
    ours, torchs = (conv(name, f) if name in CONVS else getattr(f, name) for f in (fF, F))
    tensors = [torch.randn(shape) for shape in CASES[name][1]]
    inputs = [t.clone().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
    theirs = [t.clone().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
    ours(*inputs).square().sum().backward()
    torchs(*theirs).square().sum().backward()
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
@pytest.mark.parametrize("kind", ["none", "relu", "relu6", "gelu", "tanh"])
def test_gradients_arrive_in_any_layout(direction, kind, no_fallback):
    """... and are not written to."""
    x, w, b = (t.requires_grad_() for t in (torch.randn(6, 4), torch.randn(5, 4), torch.randn(5)))
    found = backward_with(direction, lambda *t: fF.linear_act(*t, kind), x, w, b)
    f = {"none": lambda y: y, "relu": F.relu, "relu6": F.relu6, "gelu": F.gelu, "tanh": torch.tanh}[kind]
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
    images, filters = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    for f in (fF.conv2d, lambda x, w: fF.conv_transpose2d(x, w.transpose(0, 1))):
        y = f(images, filters)
        with torch.no_grad():
            filters.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    y = fF.linear(x, w)
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
        y = f.batch_norm(y.mT, None, None, training=True).mT
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


# ---- convolutions under torch.func -------------------------------------------------------------------------------

# The three products by themselves: of (input, weight), (result, weight) and (result, input).
PRODUCTS = {
    "convolution": (convolution, [(2, 4, 5, 4), (6, 2, 3, 2), (6,)], ([2, 1], [1, 0], [1, 2], 2)),
    "convolution_input": (convolution_input, [(2, 6, 3, 2), (6, 2, 3, 2), (4,)], ([5, 4], [2, 1], [1, 0], [1, 2], 2)),
    "convolution_weight": (
        convolution_weight,
        [(2, 6, 3, 2), (2, 4, 5, 4)],
        ([3, 2], [2, 1], [1, 0], [1, 2], 2, False),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_each_product_is_differentiable(name):
    op, shapes, options = PRODUCTS[name]
    inputs = [leaf(*shape) for shape in shapes]
    assert gradcheck(
        lambda *t: op(*t, *options),
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        fast_mode=True,
    )
    assert gradgradcheck(lambda *t: op(*t, *options), inputs, fast_mode=True)


@pytest.mark.parametrize("name", PRODUCTS)
def test_func_vmap_of_each_product_over_every_combination_of_dims(name, no_fallback):
    op, shapes, options = PRODUCTS[name]
    for dims in itertools.product(*((None, *range(len(shape) + 1)) for shape in shapes)):
        if all(d is None for d in dims):
            continue
        inputs = [
            torch.randn(shape if d is None else (*shape[:d], 3, *shape[d:]), dtype=torch.float64)
            for shape, d in zip(shapes, dims, strict=True)
        ]
        each = [
            op(*(t if d is None else t.select(d, i) for t, d in zip(inputs, dims, strict=True)), *options)
            for i in range(3)
        ]
        found = vmap(lambda *t: op(*t, *options), dims)(*inputs)
        torch.testing.assert_close(found, torch.stack(each))
    if name != "convolution_weight":
        x, w = (torch.randn(3, *shape, dtype=torch.float64) for shape in shapes[:2])
        found = vmap(lambda x, w: op(x, w, None, *options))(x, w)
        torch.testing.assert_close(found, torch.stack([op(x[i], w[i], None, *options) for i in range(3)]))


@pytest.mark.parametrize("name", CONVS)
def test_func_of_convolutions(name, no_fallback):
    """vmap, vmap of grad, jvp, jacrev and hessian beside torch's."""
    ours, torchs = conv(name), conv(name, F)
    x, *rest = (torch.randn(shape) for shape in CONVS[name][0])
    many = torch.randn(3, *x.shape)
    each = torch.stack([torchs(one, *rest) for one in many])
    close(vmap(lambda x: ours(x, *rest))(many), each)

    def loss(function):
        return lambda w, x: function(x, w, *rest[1:]).sin().sum()

    found = vmap(grad(loss(ours)), (None, 0))(rest[0], many)
    close(found, torch.stack([grad(loss(torchs))(rest[0], one) for one in many]))
    tangents = tuple(torch.randn_like(t) for t in (x, *rest))
    close(jvp(ours, (x, *rest), tangents)[1], jvp(torchs, (x, *rest), tangents)[1])
    close(jacrev(lambda w: ours(x, w, *rest[1:]))(rest[0]), jacrev(lambda w: torchs(x, w, *rest[1:]))(rest[0]))
    if rest[0].numel() < 30:
        close(hessian(lambda w: loss(ours)(w, x))(rest[0]), hessian(lambda w: loss(torchs)(w, x))(rest[0]))


def test_forward_mode_needs_no_gradient_mode(no_fallback):
    """A dual number keeps its tangent where gradients are off."""
    x, w, t = torch.randn(2, 3, 5, 4), torch.randn(4, 3, 3, 2), torch.randn(2, 3, 5, 4)
    with torch.no_grad(), forward_ad.dual_level():
        y = forward_ad.unpack_dual(fF.conv2d(forward_ad.make_dual(x, t), w))
        close(y.tangent, F.conv2d(t, w))
        zero = forward_ad.unpack_dual(fF.conv2d(x, w))
        assert zero.tangent is None


@pytest.mark.parametrize("layout", ["scalar", "channels", "rows", "transposed", "sliced", "channels last", "offset"])
@pytest.mark.parametrize("name", ["conv2d", "conv2d with groups", "conv2d depthwise", "conv_transpose2d"])
def test_gradients_of_convolutions_arrive_in_any_layout(name, layout, no_fallback):
    inputs = [torch.randn(shape).requires_grad_() for shape in CONVS[name][0]]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    n, m, h, w = conv(name, F)(*wide).shape
    direction = {
        "scalar": lambda: torch.ones(()).expand(n, m, h, w),
        "channels": lambda: torch.randn(1, m, 1, 1).expand(n, m, h, w),
        "rows": lambda: torch.randn(n, m, h, 1).expand(n, m, h, w),
        "transposed": lambda: torch.randn(w, h, m, n).permute(3, 2, 1, 0),
        "sliced": lambda: torch.randn(2 * n, 2 * m, 2 * h, 3 * w)[::2, 1::2, ::2, ::3],
        "channels last": lambda: torch.randn(n, h, w, m).permute(0, 3, 1, 2),
        "offset": lambda: torch.randn(n * m * h * w + 1)[1:].view(n, m, h, w),
    }[layout]()
    found = backward_with(direction, conv(name), *inputs)
    expected = torch.autograd.grad(conv(name, F)(*wide), wide, direction.double())
    for g, e in zip(found, expected, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-5)


def test_strides_of_gradients_are_torchs(no_fallback):
    """... where input and weight are channels-last or not."""
    for name, (shapes, _) in CONVS.items():
        if len(shapes[1]) == 3 or len(shapes[0]) < len(shapes[1]):
            continue
        last = torch.channels_last if len(shapes[1]) == 4 else torch.channels_last_3d
        for formats in itertools.product((torch.contiguous_format, last), repeat=2):
            tensors = [torch.randn(shape) for shape in shapes]
            tensors[:2] = [t.contiguous(memory_format=f) for t, f in zip(tensors[:2], formats, strict=True)]
            strides = []
            for f in (fF, F):
                inputs = [t.detach().requires_grad_() for t in tensors]
                y = conv(name, f)(*inputs)
                by_x, by_w, *_ = torch.autograd.grad(y, inputs, torch.randn_like(y))
                strides.append((y.stride(), by_x.stride()))
                if f is fF:  # as a parameter's .grad lies, for which torch copies its own
                    assert by_w.stride() == inputs[1].stride()
            assert strides[0] == strides[1], (name, formats)


def test_a_convolution_computes_each_product_once():
    x, w = (torch.randn(shape, requires_grad=True) for shape in ((2, 8, 9, 9), (8, 8, 3, 3)))
    result = fF.conv2d(x, w)
    _cpu.reset_counters()
    torch.autograd.grad(result.sum(), (x, w), create_graph=True)
    assert sum(_cpu.counters().values()) == 2
