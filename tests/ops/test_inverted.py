"""An inverted residual in one pass: against float64, layer by layer in torch."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastnn
from fastnn import _cpu
from fastnn.backends import cpu
from fastnn.ops import conv
from fastnn.ops.conv import activation_number, inverted_residual
from fastnn.testing.errors import relative_error

ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "tanh": torch.tanh}
#: Of the error that rounding each layer's result makes, which the reference does not.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Block:
    """Filters, and what the kernels keep of them."""

    def __init__(
        self, channels, hidden, out, stride=1, dtype=torch.float32, expand=(1, 1, 0), acts=("relu6", "relu6", "none")
    ):
        kernel, *self.first = expand or (1, 1, 0)
        self.stride, self.acts, self.dtype = stride, acts, dtype
        shapes = [(hidden, channels, kernel, kernel), (hidden, 1, 3, 3), (out, hidden, 1, 1)]
        shapes = shapes if expand else shapes[1:]
        self.weights = [torch.randn(s).mul_((s[1] * s[2] * s[3]) ** -0.5).to(dtype) for s in shapes]
        self.biases = [torch.randn(s[0]).to(dtype) for s in shapes]
        self.biases[-1] = None
        self.acts = acts if expand else acts[1:]
        self.prepared = [_cpu.Prepared() for _ in shapes]

    def __call__(self, x, residual=None):
        numbers = map(activation_number, self.acts)
        layers = list(zip(self.weights, self.biases, numbers, self.prepared, strict=True))
        expand = layers[0] if len(layers) == 3 else None
        with torch.inference_mode():
            return inverted_residual(x, residual, expand, *self.first, layers[-2], self.stride, layers[-1])

    def exact(self, x, residual=None):
        x = x.double()
        options = [dict(zip(("stride", "padding"), self.first, strict=True))] if len(self.weights) == 3 else []
        options += [{"stride": self.stride, "padding": 1, "groups": self.weights[-2].shape[0]}, {}]
        for w, b, act, option in zip(self.weights, self.biases, self.acts, options, strict=True):
            x = F.conv2d(x, w.double(), None if b is None else b.double(), **option)
            if residual is not None and w is self.weights[-1]:
                x = x + residual.double()
            x = ACTIVATIONS[act](x)
        return x


def channels_last(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)


def taken():
    return _cpu.counters().get("inverted residual", 0)


@pytest.fixture(autouse=True, params=["short", "long"])
def way(request, monkeypatch):
    """The call that reads tensors in C, and the one of torch before 2.10, where there is no table to read them through."""
    if request.param == "long":
        monkeypatch.setattr(cpu, "has_table", False)
        monkeypatch.setattr(conv, "_tensor_inverted_residual", lambda *_: None)
    elif not cpu.has_table:
        pytest.skip("torch before 2.10 has no table")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check(block, x, residual=None, one_pass=True):
    """The result, for which it does not matter how many threads there are."""
    before = taken()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(block(x, residual))
    assert taken() == before + 3 * one_pass
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert relative_error(results[0], block.exact(x, residual)) < TOLERANCE[block.dtype]
    return results[0]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (7, 7), (13, 14), (15, 17), (29, 13), (28, 57)])
def test_sizes_of_maps(size, stride):
    check(Block(8, 48, 24, stride), channels_last(2, 8, *size))
    check(Block(64, 160, 40, stride), channels_last(1, 64, *size))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "channels", [(1, 16, 1), (3, 17, 8), (8, 31, 33), (17, 33, 24), (24, 96, 17), (33, 65, 3), (160, 960, 64)]
)
def test_channels(channels, stride):
    check(Block(*channels, stride), channels_last(3, channels[0], 9, 8))


def test_channels_of_fewer_lanes_than_a_vector():
    for hidden in (1, 3, 8):
        block, x = Block(4, hidden, 5), channels_last(2, 4, 7, 6)
        assert relative_error(block(x), block.exact(x)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", [(24, 144, 24), (32, 64, 16), (7, 21, 9)])
def test_dtypes(channels, dtype):
    x = channels_last(2, channels[0], 14, 15, dtype=dtype)
    for stride in (1, 2):
        block = Block(*channels, stride, dtype)
        assert block(x).dtype is dtype
        assert relative_error(block(x), block.exact(x)) < TOLERANCE[dtype]


@pytest.mark.parametrize("acts", [("relu", "silu", "relu6"), ("tanh", "none", "silu"), ("none", "relu", "none")])
def test_activations(acts):
    check(Block(16, 64, 24, acts=acts), channels_last(2, 16, 9, 10))


@pytest.mark.parametrize("height", [7, 30])
def test_residual(height):
    block, x = Block(24, 96, 24, acts=("relu6", "relu6", "relu")), channels_last(2, 24, height, 9)
    check(block, x, x)
    check(block, x, channels_last(2, 24, height, 9))
    # In other layouts, or broadcast, it is added in a pass of its own.
    for other in (torch.randn(2, 24, height, 9), torch.randn(24, 1, 1)):
        assert relative_error(block(x, other), block.exact(x, other)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("height", [6, 40])
@pytest.mark.parametrize("stride", [1, 2])
def test_without_a_first_convolution(height, stride):
    check(Block(32, 32, 16, stride, expand=None), channels_last(2, 32, height, 11))
    check(Block(19, 19, 40, stride, expand=None), channels_last(2, 19, height, 11))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("expand", [(3, 2, 1), (3, 1, 0), (5, 3, 2), (2, 2, 0), (3, (2, 1), (0, 2)), (1, 2, 0)])
def test_a_first_convolution_that_sees_more_than_a_position(expand, layout):
    for size in ((33, 31), (5, 40)):
        x = torch.randn(2, 3, *size).to(memory_format=layout)
        check(Block(3, 32, 16, expand=expand), x)
        check(Block(3, 40, 24, 2, expand=expand), x)


def test_a_first_convolution_of_many_elements():
    check(Block(40, 64, 16, expand=(3, 1, 1)), channels_last(1, 40, 9, 9))
    check(Block(150, 64, 16, expand=(3, 1, 1)), channels_last(1, 150, 9, 9), one_pass=False)


def test_layouts_of_the_input():
    block = Block(16, 48, 24)
    big = torch.full((3, 40, 14, 13), torch.nan).to(memory_format=torch.channels_last)
    x = torch.randn(2, 16, 9, 8)
    big[1:, 8:24, 2:11, 3:11] = x
    surrounded = big[1:, 8:24, 2:11, 3:11]
    padded = torch.full((2 * 9 * 8 + 2, 16), torch.nan)
    padded[1:-1] = x.permute(0, 2, 3, 1).reshape(-1, 16)
    between = padded[1:-1].view(2, 9, 8, 16).permute(0, 3, 1, 2)
    expected = block.exact(x)
    for view in (x, x.transpose(2, 3).contiguous().transpose(2, 3), surrounded, between):
        assert relative_error(block(view), expected) < TOLERANCE[torch.float32]
    before = taken()
    block(between)
    assert taken() == before + 1
    expanded = torch.randn(1, 16, 1, 8).expand(2, 16, 9, 8)
    assert relative_error(block(expanded), block.exact(expanded)) < TOLERANCE[torch.float32]


def test_whole_numbers_come_out_exactly():
    for stride, hidden, height in itertools.product((1, 2), (16, 33, 96), (5, 27)):
        block = Block(13, hidden, 20, stride, acts=("relu", "relu", "none"))
        for tensor in (*block.weights, *block.biases[:-1]):
            tensor.copy_(torch.randint(-2, 3, tensor.shape))
        x = torch.randint(-2, 3, (2, 13, height, 9)).float().to(memory_format=torch.channels_last)
        assert torch.equal(block(x).double(), block.exact(x))


def test_infinities_and_nans_reach_what_sees_them():
    block, x = Block(16, 32, 8, acts=("relu", "none", "none")), channels_last(1, 16, 12, 12)
    x[0, 3, 5, 6] = torch.nan
    y = block(x)
    assert torch.equal(y.isnan(), block.exact(x).isnan())
    assert y.isnan().any() and not y.isnan().all()


def test_no_images():
    block = Block(16, 32, 8)
    assert block(torch.empty(0, 16, 9, 9)).shape == (0, 8, 9, 9)


def test_many_threads_of_python():
    from concurrent.futures import ThreadPoolExecutor

    block, x = Block(24, 96, 24), channels_last(2, 24, 14, 14)
    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(lambda _: block(x, x), range(16))
    assert all(torch.equal(first, other) for other in others)
    assert relative_error(first, block.exact(x, x)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_lower_precisions(precision):
    block, x = Block(24, 96, 24), channels_last(2, 24, 28, 28)
    torch.set_float32_matmul_precision(precision)
    try:
        assert relative_error(block(x), block.exact(x)) < (1e-4 if precision == "high" else 3e-2)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_not_where_something_else_was_asked_for():
    block, x = Block(16, 48, 24), channels_last(2, 16, 9, 8)
    before = taken()
    with fastnn.batch_invariant():
        rows = block(x)
        assert torch.equal(rows[:1], block(x[:1]))
    with fastnn.backend("reference"):
        assert relative_error(block(x), block.exact(x)) < TOLERANCE[torch.float32]
    assert relative_error(rows, block.exact(x)) < TOLERANCE[torch.float32]
    negative = Block(16, 48, 24)
    negative.weights = [torch._neg_view(w) for w in negative.weights[:1]] + negative.weights[1:]
    assert relative_error(negative(x), negative.exact(x)) < TOLERANCE[torch.float32]
    assert taken() == before
    found = block(torch._neg_view(x))
    assert taken() == before
    assert relative_error(found, block.exact(-x)) < TOLERANCE[torch.float32]


def test_bad_arguments_of_the_kernel():
    def layer(*shape, bias=0, activation=0):
        w = torch.randn(shape)
        keep.append(w)
        sizes, strides = ((*t[:2], 1, *t[2:]) for t in (w.shape, w.stride()))
        return w.data_ptr(), sizes, strides, bias, activation, _cpu.Prepared()

    keep = []
    x, y = channels_last(1, 16, 5, 5), channels_last(1, 16, 5, 5)
    sizes, strides = (1, 16, 1, 5, 5), (400, 1, 1, 80, 16)
    good = {
        "x_ptr": x.data_ptr(),
        "x_shape": sizes,
        "x_strides": strides,
        "y_ptr": y.data_ptr(),
        "y_shape": sizes,
        "y_strides": strides,
        "dtype": 0,
        "expand": layer(48, 16, 1, 1),
        "expand_stride": (1, 1),
        "expand_padding": (0, 0),
        "depthwise": layer(48, 1, 3, 3),
        "stride": 1,
        "project": layer(16, 48, 1, 1),
    }
    assert _cpu.inverted_residual(**good)
    for changed, named in (
        ({"x_ptr": 0}, "x"),
        ({"y_shape": (1, 16, 1, 5, 4)}, "y"),
        ({"y_shape": (2, 16, 1, 5, 5)}, "y"),
        ({"x_shape": (0, 16, 1, 5, 5)}, "x"),
        ({"dtype": 6}, "dtype"),
        ({"stride": 3}, "stride"),
        ({"stride": 2}, "y"),
        ({"precision": 3}, "precision"),
        ({"expand": None}, "depthwise"),
        ({"expand": layer(48, 15, 1, 1)}, "expand"),
        ({"expand": layer(48, 16, 7, 7)}, "expand"),
        ({"expand_stride": (0, 1)}, "expand"),
        ({"expand_padding": (1 << 40, 0)}, "expand"),
        ({"expand_padding": (0,)}, "expand_padding"),
        ({"depthwise": layer(48, 1, 5, 5)}, "depthwise"),
        ({"depthwise": layer(48, 1, 3, 3)[:5]}, "depthwise"),
        ({"depthwise": (*layer(48, 1, 3, 3)[:5], None)}, "depthwise"),
        ({"project": layer(16, 48, 1, 1, activation=8)}, "project"),
        ({"project": layer(16, 40, 1, 1)}, "project"),
        ({"project": layer(8, 48, 1, 1)}, "y"),
    ):
        with pytest.raises(ValueError, match=named):
            _cpu.inverted_residual(**{**good, **changed})
