"""Whatever of a model is changed after its forward became a graph, fused or of integers or of training for them, the graph follows
or is not used."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastnn
from fastnn import _cpu
from fastnn.fuse import is_fused
from fastnn.quant import Int8Static, prepare_qat_, quantize_


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.activation = nn.ReLU()
        self.factor, self.added = 2.0, True
        self.offsets, self.options = [0.5, 0.25], {"power": 1}
        self.table = torch.linspace(0.5, 1.5, 8).view(8, 1, 1)
        self.register_buffer("shift", torch.full((8, 1, 1), 0.125))
        self.gain = nn.Parameter(torch.full((8, 1, 1), 1.25))
        self.extra = None

    def forward(self, x):
        y = self.activation(self.norm(self.conv(x)))
        if self.training:
            y = y * 3
        y = y * self.factor * self.gain.exp() + (self.shift * 2) * self.table
        if self.added:
            y = y + x
        if self.extra is not None:
            y = y - self.extra
        y = y + sum(self.offsets) + getattr(self, "later", 0)
        return y ** self.options["power"]


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.blocks = nn.ModuleList([Inner(), Inner()])
        self.last = nn.Conv2d(8, 8, 1)
        self.relu = nn.ReLU6()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.pool(self.relu(self.last(x))).flatten(1))


class Doubled(Inner):
    def forward(self, x):
        return 2 * super().forward(x)


def write_over(model):
    with torch.no_grad():
        model.blocks[0].table.add_(1.0)


def write_into_buffer(model):
    model.blocks[0].shift.add_(1.0)


def write_into_parameter(model):
    with torch.no_grad():
        model.blocks[0].gain.add_(1.0)


def new_parameter(model):
    model.blocks[0].gain = nn.Parameter(torch.rand(8, 1, 1))


def settled(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


#: After these the graph computes with what there is now.
FOLLOWED = {
    "buffer written": write_into_buffer,
    "buffer": lambda m: setattr(m.blocks[0], "shift", torch.rand(8, 1, 1)),
    "parameter written": write_into_parameter,
    "parameter": new_parameter,
    "last layer": lambda m: setattr(m, "head", nn.Linear(8, 7).eval()),
}
#: After these the graph would compute something else.
CHANGES = {
    "number": lambda m: setattr(m.blocks[0], "factor", 0.5),
    "flag": lambda m: setattr(m.blocks[1], "added", False),
    "item of a list": lambda m: m.blocks[0].offsets.__setitem__(0, 2.0),
    "longer list": lambda m: m.blocks[0].offsets.append(1.0),
    "another list": lambda m: setattr(m.blocks[0], "offsets", [1.0]),
    "item of a dictionary": lambda m: m.blocks[0].options.update(power=2),
    "tensor": lambda m: setattr(m.blocks[0], "table", torch.ones(8, 1, 1)),
    "tensor written": write_over,
    "None": lambda m: setattr(m.blocks[0], "extra", 1.5),
    "new attribute": lambda m: setattr(m.blocks[0], "later", 3.0),
    "class": lambda m: setattr(m.blocks[0], "__class__", Doubled),
    "mode of a block": lambda m: m.blocks[1].train(),
    "forward": lambda m: setattr(m.blocks[0], "forward", lambda x: x),
    "block": lambda m: m.blocks.__setitem__(1, settled(Inner()).eval()),
    "another block": lambda m: m.blocks.append(settled(Inner()).eval()),
    "one block less": lambda m: m.blocks.__delitem__(0),
    "container": lambda m: setattr(m, "blocks", nn.ModuleList([m.blocks[0]])),
    "convolution": lambda m: setattr(m, "last", nn.Conv2d(8, 8, 1)),
    "first convolution": lambda m: m.stem.__setitem__(0, nn.Conv2d(3, 8, 3)),
    "activation": lambda m: setattr(m.blocks[0], "activation", nn.SiLU()),
    "pooling": lambda m: m.stem.__setitem__(3, nn.AvgPool2d(2)),
    "attribute of a pooling": lambda m: setattr(m.stem[3], "stride", 1),
    "one more in a sequence": lambda m: m.stem.append(nn.Sigmoid().eval()),
}


def hook(model, name, seen):
    model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(name) or output + 1)


def prehook(model, name, seen):
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(name) or (args[0] + 1,))


HOOKED = (
    "stem",
    "stem.0",
    "stem.3",
    "blocks.0",
    "blocks.1.conv",
    "blocks.1.norm",
    "blocks.1.activation",
    "pool",
    "head",
)


def fused():
    return fastnn.convert(settled(Outer()).eval(), fuse=True)


def integers():
    return quantize_(settled(Outer()).eval(), Int8Static([torch.randn(4, 3, 16, 16)]), only="*[a-z0-9]", skip="head")


def in_training():
    model = settled(Outer()).eval()
    return prepare_qat_(model, Int8Static([torch.randn(4, 3, 16, 16)]), skip="head")


CLOSE = {fused: {"rtol": 1e-4, "atol": 1e-4}, integers: {"rtol": 0.05, "atol": 0.05}}


def own_forward(model, x):
    """Of the model's own class, which calls its modules one by one."""
    kind = type(model).__dict__.get("_original_class", type(model))
    return kind.forward(model, x)


@pytest.fixture
def x():
    return torch.randn(2, 3, 16, 16)


@pytest.mark.parametrize("make", [fused, integers])
@pytest.mark.parametrize("what", [*CHANGES, *FOLLOWED])
@pytest.mark.parametrize("copied", [False, True], ids=["", "a copy"])
def test_a_changed_module_is_seen(make, what, copied, x):
    model = make()
    close = CLOSE[make]
    # Pooling of what is no integer is no part of a chain.
    follows = what in FOLLOWED or (make is integers and "pooling" in what)
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(before, own_forward(model, x), **close)
        if copied:
            model = copy.deepcopy(model)
            if make is fused:
                fastnn.convert(model, fuse=True)
            assert torch.equal(model(x), before)
        fastnn.convert(model)  # what is put in later is torch's
        {**CHANGES, **FOLLOWED}[what](model)
        for _ in range(2):
            after = model(x)
            # Where the graph is not used, it is the same code.
            exactly = {"rtol": 0, "atol": 0}
            torch.testing.assert_close(after, own_forward(model, x), **(close if follows else exactly))
        assert after.shape != before.shape or (after - before).abs().max() > 1e-3
        seen = not follows and what not in ("mode of a block", "forward")
        assert ("changed since" in fastnn.report(model).rows[0].reason) is seen
        if make is fused:
            for module in model.modules():
                module.__dict__.pop("forward", None)
            fastnn.convert(model.eval(), fuse=True)
            assert is_fused(type(model)) and type(model)._fused_calls.are_current()
            torch.testing.assert_close(model(x), own_forward(model, x), **close)


@pytest.mark.parametrize("make", [fused, integers])
@pytest.mark.parametrize("register", [hook, prehook])
@pytest.mark.parametrize("name", HOOKED)
def test_hooks_are_called(make, register, name, x):
    model, seen = make(), []
    with torch.no_grad():
        before = model(x)
        register(model, name, seen)
        after = model(x)
        assert seen == [name]
        assert (after - before).abs().max() > 1e-3
        torch.testing.assert_close(after, own_forward(model, x), **CLOSE[make])


@pytest.mark.parametrize("make", [fused, integers])
def test_global_hooks_are_called(make, x):
    model, seen = make(), []
    with torch.no_grad():
        model(x)
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
        with handle:
            model(x)
        assert seen.count(Inner) == 2


@pytest.mark.parametrize("what", [name for name in CHANGES if name != "mode of a block"])
def test_training_for_integers_refuses_what_has_changed(what, x):
    model = in_training()
    model(x).sum().backward()
    copied = copy.deepcopy(model)
    CHANGES[what](model)
    for _ in range(2):
        with pytest.raises(ValueError, match="was changed"):
            model(x)
    copied(x).sum().backward()


def test_what_nothing_was_done_to_goes_on(x):
    model, chain = fused(), integers()
    with torch.no_grad():
        model(x), chain(x)
        for each in (model, chain):
            each.blocks[0].factor = 1.0 + 1.0  # another object, but the same number
            each.load_state_dict(each.state_dict())
            each.train()
            each.eval()
    assert type(model)._fused_calls.are_current()
    assert chain._fastnn_integer_chain.guards.hold()
    assert copy.deepcopy(chain)._fastnn_integer_chain.guards.hold()
    again = pickle.loads(pickle.dumps(chain))
    torch.testing.assert_close(again(x), own_forward(chain, x))


def test_a_fused_linear_layer_is_found_unchanged_at_once():
    model = fastnn.convert(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)).eval(), fuse=True)
    calls = type(model)._fused_calls
    assert len(calls.linears) == 1 and calls.are_current()
    assert calls._watch.same()
    for change in (
        lambda: setattr(model[1], "approximate", "tanh"),
        lambda: quantize_(model, fastnn.quant.Int8Dynamic()),
    ):
        change()
        assert not calls._watch.same()
        assert not calls.are_current()
        x = torch.randn(3, 4)
        with torch.no_grad():
            torch.testing.assert_close(model(x), own_forward(model, x))


def test_a_watch_of_lists_classes_and_dictionaries():
    whole = {"a": 1}
    place = {"list": [1, object()], "module": nn.ReLU(), "dictionary": {"a": 1}, "number": 5}

    def watch():
        return _cpu.Watch([(place, name) for name in [*place, "absent"]] + [(whole, None)])

    for change in (
        lambda: place["list"].append(2),
        lambda: place["list"].__setitem__(1, object()),
        lambda: place["list"].pop(),
        lambda: setattr(place["module"], "__class__", nn.SiLU),
        lambda: place["dictionary"].update(b=2),
        lambda: place.update(number=7.5),
        lambda: place.update(absent=1),
        lambda: place.pop("number"),
        lambda: whole.update(b=2),
        lambda: whole.clear(),
    ):
        seen = watch()
        assert seen.same()
        change()
        assert not seen.same()


def test_a_watch_sees_attributes_that_hot_code_stores():
    module = Inner()

    def store(value):
        module.factor = value

    for i in range(100):
        seen = _cpu.Watch([(module.__dict__, "factor"), (module.__dict__, "added")])
        store(module.factor)
        assert seen.same()
        store(float(i))
        assert not seen.same()
        store(module.factor)
        assert not seen.same()


class Plain(nn.Module):
    """Layers one after the other, and what a test adds."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm, self.slope = nn.BatchNorm2d(8), nn.LeakyReLU(0.1)
        self.register_module("after", None)
        self.register_buffer("mask", None)
        self.gains, self.nested, self.pair = {0: 1.0, (1, 2): 2.0}, [[1.0, [2.0]], {"a": [3.0]}], (torch.ones(1), 2)
        self.layers = nn.ModuleDict({"a": nn.Identity(), "b": nn.Tanh()})
        self.w1 = self.w2 = nn.Parameter(torch.rand(8, 1, 1))
        self.acts = nn.ModuleList([nn.Tanh()] * 2)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = self.acts[0](torch.relu(self.second(x)) * self.gains[0] * self.gains[1, 2])
        x = self.acts[1](x * self.w1 + self.w2) * self.nested[0][1][0] * self.nested[1]["a"][0] * self.pair[1]
        if self.after is not None:
            x = self.after(x)
        if self.mask is not None:
            x = x * self.mask
        for i, layer in enumerate(self.layers.values()):
            x = layer(x + i)
        return x * self.slope.negative_slope


def move(table, name):
    value = table.pop(name)
    table[name] = value


def no_statistics(model):
    model.norm.running_mean = model.norm.running_var = None
    model.norm.track_running_stats = False


DEEPER = {
    "a module that was None": lambda m: setattr(m, "after", nn.Tanh().eval()),
    "a buffer that was None": lambda m: setattr(m, "mask", torch.rand(8, 1, 1)),
    "key that is a number": lambda m: m.gains.update({0: 3.0}),
    "key that is a tuple": lambda m: m.gains.update({(1, 2): 5.0}),
    "list in a list": lambda m: m.nested[0][1].__setitem__(0, 7.0),
    "list in a dictionary": lambda m: m.nested[1]["a"].__setitem__(0, 7.0),
    "tuple": lambda m: setattr(m, "pair", (torch.ones(1), 3)),
    "order of modules": lambda m: move(m.layers, "a"),
    "untied parameter": lambda m: setattr(m, "w2", nn.Parameter(torch.rand(8, 1, 1))),
    "untied module": lambda m: m.acts.__setitem__(1, nn.Sigmoid().eval()),
    "attribute of a module that is called": lambda m: setattr(m.slope, "negative_slope", 0.7),
    "table of modules": lambda m: setattr(m.layers, "_modules", {"a": nn.Tanh().eval()}),
    "statistics": no_statistics,
}


def fused_plain():
    return fastnn.convert(settled(Plain()).eval(), fuse=True)


def integers_plain():
    return quantize_(settled(Plain()).eval(), Int8Static([torch.randn(4, 3, 9, 9)]), only=nn.Conv2d)


# In integers the norm is a part of the filters.
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (make, what)
        for make in (fused_plain, integers_plain)
        for what in DEEPER
        if (make, what) != (integers_plain, "statistics")
    ],
)
def test_a_change_deeper_down_is_seen(make, what):
    model, x = make(), torch.randn(2, 3, 9, 9)
    close = CLOSE[fused if make is fused_plain else integers]
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(before, own_forward(model, x), **close)
        DEEPER[what](model)
        for _ in range(2):
            after = model(x)
            torch.testing.assert_close(after, own_forward(model, x), **close)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("make", [fused, integers, in_training])
def test_attributes_that_nobody_reads(make, x):
    model = make()
    with torch.no_grad():
        expected = model(x)
        model.epoch, model.blocks[0].criterion = 3, nn.MSELoss
        model.apply(lambda module: setattr(module, "_seen_by_somebody", 0))
        assert torch.equal(model(x), expected)
    if make is not in_training:
        assert "changed since" not in fastnn.report(model).rows[0].reason


@pytest.mark.parametrize("make", [fused, integers, in_training])
def test_compiling_leaves_the_graph_in_use(make, x):
    model = make()
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(x), expected, **CLOSE[integers])
        assert torch.equal(model(x), expected)


def test_the_mode_of_a_block_in_training_for_integers(x):
    model = in_training().train()
    model(x)
    model.blocks[0].activation.eval()  # which no code asks for
    model(x)
    model.blocks[0].eval()
    with pytest.raises(ValueError, match="was changed"):
        model(x)
