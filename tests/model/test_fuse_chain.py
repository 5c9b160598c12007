"""Fused calls one after the other as one call: the same bits as one by one, from memory that they share."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastnn
from fastnn import _cpu, _fused
from fastnn.backends import cpu
from fastnn.testing.errors import relative_error

pytestmark = pytest.mark.skipif(not cpu.has_table, reason="torch before 2.10 is called layer by layer")

CHANNELS = 16
POOLINGS = ("maximum", "average")


class Graph(nn.Module):
    """Convolutions of values that came before, each with the sum of another, by a list of (kind, input, residual or None,
    activation); the result is the last value, or those at ``outputs``."""

    def __init__(self, steps, outputs=None):
        super().__init__()
        kinds = {
            "pointwise": lambda: nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False),
            "full": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
            "depthwise": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS, bias=False),
            "maximum": lambda: nn.MaxPool2d(3, 1, 1),
            "average": lambda: nn.AvgPool2d((3, 1), 1, (1, 0), count_include_pad=False),
            "wide": lambda: nn.Sequential(
                *(nn.Conv2d(CHANNELS, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU6()),
                *(nn.Conv2d(96, 96, 3, padding=1, groups=96, bias=False), nn.BatchNorm2d(96), nn.ReLU6()),
                nn.Conv2d(96, CHANNELS, 1, bias=False),
            ),
        }
        self.layers = nn.ModuleList(
            kinds[kind]() if kind in POOLINGS else nn.Sequential(kinds[kind](), nn.BatchNorm2d(CHANNELS))
            for kind, *_ in steps
        )
        self.steps, self.outputs = steps, outputs

    def forward(self, x):
        values = [x]
        for layer, (kind, input, residual, activation) in zip(self.layers, self.steps, strict=True):
            y = layer(values[input])
            if kind in POOLINGS:
                values.append(y)
                continue
            if residual is not None:
                y = y + values[residual]
            values.append(torch.relu(y) if activation else y)
        return values[-1] if self.outputs is None else tuple(values[i] for i in self.outputs)


def ready(model):
    """Statistics and scales that keep the values of deep networks about as large as they came in."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.7)
            nn.init.normal_(module.bias)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def run(model, x):
    with torch.inference_mode():
        return model(x)


def images(*shape):
    return torch.randn(shape).to(memory_format=torch.channels_last)


def poison(bytes=8 << 20):
    """NaN in the memory that the next large result will be given."""
    block = cpu.empty((bytes // 4,), torch.float32)
    block.fill_(torch.nan)


@pytest.fixture
def chains(monkeypatch):
    """Per call of a chain, by the thread that called: whether it was one call."""
    seen = []

    class Counted:
        def __init__(self, chain):
            self._chain = chain

        @classmethod
        def of(cls, steps, inputs):
            chain = _cpu.Chain.of(steps, inputs)
            return None if chain is None else cls(chain)

        def run(self, make, *inputs):
            found = self._chain.run(make, *inputs)
            seen.append(found is not None)
            return found

    class Extension:
        Chain = Counted

        def __getattr__(self, name):
            return getattr(_cpu, name)

    monkeypatch.setattr(_fused, "_cpu", Extension())
    return seen


@st.composite
def programs(draw):
    count = draw(st.integers(2, 9))
    steps = []
    for i in range(count):
        kind = draw(st.sampled_from(["pointwise", "full", "depthwise", "wide", *POOLINGS]))
        # Mostly a line, in which each value is read.
        input = i if draw(st.integers(0, 3)) else draw(st.integers(0, i))
        residual = draw(st.none() | st.integers(0, i))
        steps.append((kind, input, residual, draw(st.booleans())))
    return steps


@settings(max_examples=60, deadline=None)
@given(programs(), st.sampled_from([(1, 9, 7), (3, 8, 8), (2, 1, 1), (1, 20, 13)]), st.booleans(), st.data())
def test_the_same_bits_as_one_by_one(steps, size, last, data):
    outputs = data.draw(st.none() | st.lists(st.integers(0, len(steps)), min_size=1, max_size=3))
    model = ready(Graph(steps, outputs))
    n, *spatial = size
    x = torch.randn(n, CHANNELS, *spatial)
    if last:
        x = x.to(memory_format=torch.channels_last)
    kept = x.clone()
    exact = run(copy.deepcopy(model).double(), x.double())
    whole = fastnn.convert(copy.deepcopy(model), fuse=True)
    single = fastnn.convert(model, fuse=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fused.Chain, "_see", lambda *_: None)
        expected = [run(single, x) for _ in range(2)][1]
    run(whole, x)
    poison()
    found = run(whole, x)
    assert torch.equal(x, kept)
    if outputs is None:
        found, expected, exact = (found,), (expected,), (exact,)
    for one, other, reference in zip(found, expected, exact, strict=True):
        assert torch.equal(one, other)
        # Those of dimensions of one element mean nothing.
        strides = [[s for s, n in zip(y.stride(), y.shape, strict=True) if n > 1] for y in (one, other)]
        assert strides[0] == strides[1]
        assert relative_error(one, reference) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name, pieces", [("mobilenet_v2", 1), ("resnet18", 1), ("resnet50", 1)])
def test_models_are_one_call(name, pieces, dtype, chains, no_fallback):
    model = ready(getattr(fastnn.models, name)(num_classes=7)).to(dtype)
    fused = fastnn.convert(copy.deepcopy(model), fuse=True)
    for size in (64, 33):
        x = torch.randn(2, 3, size, size, dtype=dtype)
        first = run(fused, x)
        del chains[:]
        poison()
        second = run(fused, x)
        # What a filter is prepared for, another size may not be.
        assert chains == [True] * pieces
        assert torch.equal(first, second)
        exact = run(copy.deepcopy(model).double(), x.double())
        torchs = relative_error(run(fastnn.revert(copy.deepcopy(model)), x), exact)
        assert relative_error(second, exact) <= max(3 * torchs, 1e-13)


def cnn(pool=None, rest=()):
    return nn.Sequential(
        *(nn.Conv2d(3, CHANNELS, 3, padding=1), nn.ReLU(), pool or nn.MaxPool2d(3, 2, 1)),
        *(nn.Conv2d(CHANNELS, CHANNELS, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *rest),
    ).eval()


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.MaxPool2d((2, 3), (1, 2), dilation=2),
        nn.AvgPool2d(2, stride=1, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AvgPool2d(2, divisor_override=3),
        nn.AdaptiveAvgPool2d((5, None)),
        nn.AdaptiveAvgPool2d(4),
    ],
    ids=str,
)
def test_poolings_are_part_of_it(pool, chains, no_fallback):
    model = cnn(pool, [nn.Linear(CHANNELS, 5)])
    x = torch.randn(2, 3, 13, 17)
    for image in (x, x.to(memory_format=torch.channels_last)):
        exact = run(copy.deepcopy(model).double(), image.double())
        fused = fastnn.convert(copy.deepcopy(model), fuse=True)
        first = run(fused, image)
        poison()
        assert torch.equal(run(fused, image), first)
        assert relative_error(first, exact) < 1e-6
    assert chains == [True, True]


@pytest.mark.parametrize("isa", _cpu.available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set(isa, dtype, chains, use_isa, no_fallback):
    use_isa(isa)
    # A depthwise convolution before a pointwise one would be a block.
    steps = [
        ("full", 0, None, True),
        ("pointwise", 1, 1, True),
        ("average", 2, None, True),
        ("depthwise", 3, None, True),
    ]
    for whole, last in ((True, []), (False, [("wide", 4, 4, False)])):
        model = ready(Graph([*steps, *last])).to(dtype)
        x = images(2, CHANNELS, 9, 11).to(dtype)
        exact = run(copy.deepcopy(model).double(), x.double())
        torchs = relative_error(run(copy.deepcopy(model), x), exact)
        fused = fastnn.convert(model, fuse=True)
        del chains[:]
        first = run(fused, x)
        poison()
        assert torch.equal(run(fused, x), first)
        assert relative_error(first, exact) <= 3 * torchs
        # Not all have a kernel for the blocks of MobileNetV2.
        assert chains == [True] or not whole


def test_poolings_that_are_not(chains):
    """Other windows than numbers, hooks, indices, and those without a convolution beside them."""
    x = images(1, 3, 12, 12)
    hooked, listed, indices = nn.MaxPool2d(2), nn.AvgPool2d([2, 2]), nn.MaxPool2d(2, return_indices=True)
    called = []
    hooked.register_forward_hook(lambda *_: called.append(True))
    for pool in (hooked, listed, nn.LPPool2d(2, 2)):
        model = cnn(pool)
        exact = run(copy.deepcopy(model).double(), x.double())
        fused = fastnn.convert(model, fuse=True)
        for _ in range(2):
            assert relative_error(run(fused, x), exact) < 1e-6
    assert len(called) >= 2

    class Indices(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.pool = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), indices

        def forward(self, x):
            values, places = self.pool(self.first(x))
            return values + places

    model = Indices().eval()
    expected = run(model, x)
    fused = fastnn.convert(model, fuse=True)
    for _ in range(2):
        torch.testing.assert_close(run(fused, x), expected, check_dtype=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda pool: setattr(pool, "kernel_size", 2),
        lambda pool: setattr(pool, "padding", 0),
        lambda pool: setattr(pool, "ceil_mode", True),
        lambda pool: pool.register_forward_hook(lambda *args: args[-1] * 2),
        lambda pool: setattr(pool, "forward", lambda x: x[:, :, ::2, ::2]),
    ],
)
def test_a_pooling_that_changes(change):
    model = fastnn.convert(cnn(), fuse=True)
    x = images(1, 3, 12, 12)
    before = [run(model, x) for _ in range(2)][1]
    change(model[2])
    plain = fastnn.revert(copy.deepcopy(model)) if "forward" not in model[2].__dict__ else None
    for _ in range(2):
        found = run(model, x)
        assert not torch.equal(found, before)
        if plain is not None:
            torch.testing.assert_close(found, run(plain, x), rtol=1e-5, atol=1e-6)


def test_a_pooling_that_is_to_give_indices_from_now_on():
    model = fastnn.convert(cnn(), fuse=True)
    for _ in range(2):
        run(model, images(1, 3, 12, 12))
    model[2].return_indices = True
    with pytest.raises(TypeError):  # of the convolution that is given a tuple
        run(model, images(1, 3, 12, 12))


def test_what_others_read_ends_a_chain(chains):
    steps = [("pointwise", i, None, True) for i in range(6)]
    model = fastnn.convert(ready(Graph(steps, [3, 6])), fuse=True)
    x = images(1, CHANNELS, 6, 6)
    run(model, x)
    run(model, x)
    assert chains == [True, True]


def test_one_call_alone_is_no_chain(chains):
    model = fastnn.convert(ready(Graph([("pointwise", 0, None, True)])), fuse=True)
    for _ in range(3):
        run(model, images(1, CHANNELS, 6, 6))
    assert chains == []


def test_changes_of_parameters_are_seen(chains):
    model = fastnn.convert(ready(Graph([("pointwise", 0, None, True), ("full", 1, 0, False)])), fuse=True)
    x = images(2, CHANNELS, 9, 9)
    for change in ("weight", "bias", "running_var"):
        for _ in range(2):
            run(model, x)
        with torch.no_grad():
            getattr(model.layers[1][1], change).mul_(1.5)
        for _ in range(3):
            exact = run(fastnn.revert(copy.deepcopy(model)).double(), x.double())
            assert relative_error(run(model, x), exact) < 1e-6
    assert chains[-2:] == [True, True]


def test_layers_that_the_kernels_do_not_take_together(chains):
    """21 hidden channels are no multiple of anything."""
    model = nn.Sequential(
        *(nn.Conv2d(8, 21, 1), nn.ReLU(), nn.Conv2d(21, 21, 3, padding=1, groups=21), nn.ReLU(), nn.Conv2d(21, 8, 1)),
        *(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding="same"), nn.ReLU()),
    )
    model = ready(model)
    x = torch.randn(2, 8, 9, 9, dtype=torch.bfloat16)
    model = model.to(torch.bfloat16)
    exact = run(copy.deepcopy(model).double(), x.double())
    torchs = relative_error(run(copy.deepcopy(model), x), exact)
    fused = fastnn.convert(model, fuse=True)
    for _ in range(3):
        assert relative_error(run(fused, x), exact) <= 1.5 * torchs
    assert not any(chains)


@pytest.mark.parametrize(
    "given",
    [
        lambda x: x.double(),
        lambda x: x[:0],
        lambda x: x.to(torch.bfloat16),
        lambda x: x[:, :5],
    ],
)
def test_inputs_that_are_for_torch_to_judge(given, chains):
    model = ready(Graph([("pointwise", 0, None, True), ("full", 1, 0, False)]))
    fused = fastnn.convert(copy.deepcopy(model), fuse=True)
    x = images(2, CHANNELS, 9, 9)
    for _ in range(2):
        run(fused, x)
    del chains[:]
    try:
        expected = run(model, given(x))
    except Exception as error:
        with pytest.raises(type(error)):
            run(fused, given(x))
    else:
        found = run(fused, given(x))
        assert found.shape == expected.shape and found.dtype == expected.dtype and found.device == expected.device
    assert chains == [False]


def test_a_meta_tensor_has_a_shape_alone(chains):
    fused = fastnn.convert(ready(Graph([("pointwise", 0, None, True), ("full", 1, 0, False)])), fuse=True)
    x = images(2, CHANNELS, 9, 9)
    for _ in range(2):
        run(fused, x)
    assert run(fused, x.to("meta")).is_meta
    assert chains == [True, False]


def test_settings_are_obeyed(chains):
    model = fastnn.convert(ready(Graph([("pointwise", 0, None, True), ("full", 1, 0, False)])), fuse=True)
    x = images(2, CHANNELS, 9, 9)
    for _ in range(2):
        expected = run(model, x)
    del chains[:]
    with fastnn.backend("reference"):
        assert relative_error(run(model, x), expected) < 1e-5
    with fastnn.batch_invariant():
        assert torch.equal(run(model, x)[:1], run(model, x[:1].clone()))
    assert not any(chains)
    torch.set_float32_matmul_precision("medium")
    try:
        run(model, x)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert chains[-1]


def test_many_threads_of_python_at_once():
    model = fastnn.convert(ready(fastnn.models.mobilenet_v2(num_classes=5)), fuse=True)
    inputs = [images(1 + i % 2, 3, 32 + 16 * (i % 3), 32) for i in range(6)]
    expected = [run(model, x) for x in inputs]
    wrong = []

    def work(i):
        for _ in range(4):
            if not torch.equal(run(model, inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_filters_made_while_another_thread_computes_with_the_old_ones():
    """What it then makes of the old ones is for nobody."""
    model = fastnn.convert(ready(Graph([("pointwise", 0, None, True), ("full", 1, 0, False)])), fuse=True)
    x = images(2, CHANNELS, 9, 9)
    changed = []
    one_by_one = _fused.Chain._one_by_one

    def interrupted(self, inputs):
        result = one_by_one(self, inputs)
        if not changed:
            changed.append(True)
            with torch.no_grad():
                model.layers[0][1].weight.mul_(2)
            run(model, x)  # as another thread would
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fused.Chain, "_one_by_one", interrupted)
        run(model, x)
    exact = run(fastnn.revert(copy.deepcopy(model)).double(), x.double())
    for _ in range(3):
        assert relative_error(run(model, x), exact) < 1e-6


def test_what_a_chain_holds_goes_with_its_model():
    model = fastnn.convert(ready(fastnn.models.resnet18()), fuse=True)
    before = _cpu.allocator_stats()["bytes_live"]
    run(model, torch.randn(1, 3, 64, 64))
    run(model, torch.randn(1, 3, 64, 64))
    assert _cpu.allocator_stats()["bytes_live"] <= before
    layer = weakref.ref(model.conv1)
    del model
    gc.collect()
    assert layer() is None


def layer(m, c, kernel=1):
    return (torch.randn(m, c, kernel, kernel), torch.randn(m), 0, _cpu.Prepared())


def convolution(m, c, kernel=1, padding=0):
    weight, bias, activation, prepared = layer(m, c, kernel)
    return (weight, bias, (1, 1), (padding, padding), (1, 1), 1, activation, prepared)


def test_bad_steps():
    good = (0, -1, False, convolution(8, 8))
    with pytest.raises(ValueError, match="one at least"):
        _cpu.Chain.of([], 1)
    with pytest.raises(ValueError, match="tuples of 4"):
        _cpu.Chain.of([good[:3]], 1)
    for input, residual in ((1, -1), (-1, -1), (0, 1), (0, -2)):
        with pytest.raises(ValueError, match="not there yet"):
            _cpu.Chain.of([(input, residual, False, good[3])], 1)
    assert _cpu.Chain.of([(0, -1, False, (2, (1,)))], 1) is None  # no such kind of pooling
    assert _cpu.Chain.of([good, (1, 0, False, (0, (1,)))], 1) is None  # with a residual
    with pytest.raises(ValueError, match="number of arguments"):
        _cpu.Chain.of([(0, -1, False, good[3][:5])], 1)
    # For conv_fused to compute or to refuse.
    for wrong in ({2: "same"}, {3: (-1, 0)}, {5: 0}, {6: 99}, {0: None}, {1: torch.randn(3)}, {7: None, 0: "weight"}):
        arguments = [wrong.get(i, argument) for i, argument in enumerate(convolution(8, 8))]
        assert _cpu.Chain.of([(0, -1, False, tuple(arguments))], 1) is None
    chain = _cpu.Chain.of([good], 1)
    with pytest.raises(ValueError, match="number of inputs"):
        chain.run(cpu.empty_image)


def test_steps_that_do_not_fit_each_other():
    with torch.no_grad():
        x = torch.randn(1, 8, 5, 5)
        chain = _cpu.Chain.of([(0, -1, False, convolution(8, 8)), (1, -1, False, convolution(4, 9))], 1)
        assert chain.run(cpu.empty_image, x) is None
        chain = _cpu.Chain.of([(0, -1, False, convolution(8, 8)), (1, 0, False, convolution(4, 8))], 1)
        assert chain.run(cpu.empty_image, x) is None  # a residual of other channels
        chain = _cpu.Chain.of([(0, -1, False, convolution(8, 8)), (1, 0, False, convolution(8, 8, 3, 0))], 1)
        assert chain.run(cpu.empty_image, x) is None  # of another size
        chain = _cpu.Chain.of([(0, 1, False, convolution(8, 8))], 2)
        assert chain.run(cpu.empty_image, x, x.double()) is None
        assert chain.run(cpu.empty_image, x, x.to(memory_format=torch.channels_last)) is None
        assert chain.run(cpu.empty_image, x, 3) is None
        assert chain.run(cpu.empty_image, x, x).shape == x.shape
