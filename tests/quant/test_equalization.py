"""Cross-layer equalization: the function stays, the ranges become equal."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fastnn
from fastnn.quant import equalize_
from fastnn.quant.links import find_links

from . import nets

T, nn = torch.nn, fastnn.nn


def close(a, b):
    return torch.allclose(a, b, rtol=1e-11, atol=1e-11 * b.abs().max().item())


@pytest.mark.parametrize("name", nets.NETS)
def test_function_stays(name):
    model, x = nets.make(name)
    before = copy.deepcopy(model)
    assert sum(not isinstance(link, str) for link in find_links(model, homogeneous=True).values()) == _linked(name)
    assert equalize_(model) is model
    assert close(model(x), before(x))
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before.state_dict()[k])]
    assert changed


def _linked(name):
    return nets.NETS[name][2] + {"depthwise": 0}.get(name, 0)


@pytest.mark.parametrize("name", ["norms", "depthwise"])
def test_function_stays_in_training(name):
    model, x = nets.make(name)
    model = T.Sequential(*(layer for layer in model if not isinstance(layer, T.Dropout))).train()
    before = copy.deepcopy(model)
    equalize_(model)
    assert model.training
    assert all(module.training for module in model.modules())
    assert close(model(x), before(x))


def test_ranges_become_equal():
    model, _ = nets.make("mlp")
    equalize_(model)
    for first, second in ((model[0], model[2]), (model[2], model[4])):
        torch.testing.assert_close(first.weight.abs().amax(1), second.weight.abs().amax(0), rtol=5e-3, atol=0)


def test_ranges_of_filters_with_their_norm_become_equal():
    model, _ = nets.make("depthwise")
    equalize_(model)
    folded = [
        (conv.weight * (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1, 1, 1)).abs()
        for conv, norm in ((model[0], model[1]), (model[3], model[4]), (model[6], model[7]))
    ]
    torch.testing.assert_close(folded[0].amax((1, 2, 3)), folded[1].amax((1, 2, 3)), rtol=5e-3, atol=0)
    torch.testing.assert_close(folded[1].amax((1, 2, 3)), folded[2].amax((0, 2, 3)), rtol=5e-3, atol=0)
    by_map = model[11].weight.abs().amax(0).view(11, 9).amax(1)
    torch.testing.assert_close(folded[2].amax((1, 2, 3)), by_map, rtol=5e-3, atol=0)


def test_less_is_lost_per_tensor():
    model, x = nets.mlp().double(), torch.randn(200, 13, dtype=torch.float64)
    for first, second in ((model[0], model[2]), (model[2], model[4])):
        unequal = torch.logspace(-1.5, 1.5, len(first.bias), dtype=torch.float64)
        first.weight.data *= unequal.unsqueeze(1)
        first.bias.data *= unequal
        second.weight.data /= unequal

    def error(model):
        rough = copy.deepcopy(model)
        for layer in rough:
            if isinstance(layer, T.Linear):
                step = layer.weight.abs().max() / 127
                layer.weight.data = (layer.weight / step).round() * step
        return (rough(x) - model(x)).norm() / model(x).norm()

    before = error(model)
    assert error(equalize_(model)) < before / 4


def test_pairs_by_name():
    model, x = nets.make("viewed")
    before = copy.deepcopy(model)
    equalize_(model, pairs=[("conv", "fc")])
    assert close(model(x), before(x))
    assert torch.equal(model.out.weight, before.out.weight)
    assert not torch.equal(model.conv.weight, before.conv.weight)


def test_dead_channels_stay():
    model, x = nets.make("mlp")
    model[0].weight.data[3] = 0
    model[2].weight.data[:, 5] = 0
    before = copy.deepcopy(model)
    equalize_(model)
    assert close(model(x), before(x))
    assert torch.equal(model[0].bias[3], before[0].bias[3])


class Calls(T.Module):
    """Ways to use a layer that must keep it from being scaled."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.a, self.b, self.c = T.Linear(8, 8), T.Linear(8, 8), T.Linear(8, 8)
        self.norm = T.LayerNorm(8)
        if how == "tied":
            self.c.weight = self.a.weight

    def forward(self, x):
        h = F.relu(self.a(x))
        if self.how == "twice":
            return self.b(F.relu(self.a(h)))
        if self.how == "returned":
            return self.b(h), h
        if self.how == "gelu":
            return self.b(F.gelu(self.a(x)))
        if self.how == "layer norm":
            return self.b(self.norm(h))
        if self.how == "shifted":
            return self.b(h + 1)
        if self.how == "transposed":
            return self.b(h.transpose(0, 1))
        if self.how == "flattened":
            return self.b(h.flatten(1).view(-1, 8))
        if self.how == "branches":
            return self.b(h) if x.sum() > 0 else self.c(h)
        return self.b(h) + self.c(x)


@pytest.mark.parametrize(
    "how", ["twice", "returned", "gelu", "layer norm", "shifted", "transposed", "flattened", "branches", "tied"]
)
def test_what_must_not_be_scaled_is_left(how):
    model = Calls(how)
    before = copy.deepcopy(model.state_dict())
    equalize_(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_sequential_that_may_be_called_in_parts_is_left():
    class Parts(T.Module):
        def __init__(self):
            super().__init__()
            self.layers = T.Sequential(T.Linear(8, 8), T.ReLU(), T.Linear(8, 8))

        def forward(self, x):
            if x.sum() > 0:
                return self.layers[:2](x)
            return self.layers(x)

    model = Parts()
    before = copy.deepcopy(model.state_dict())
    equalize_(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_parts_of_what_cannot_be_traced():
    class Whole(T.Module):
        def __init__(self):
            super().__init__()
            self.block = nets.mlp()

        def forward(self, x):
            return self.block(x) if x.shape[0] > 0 else x

    torch.manual_seed(0)
    model = Whole().double()
    x = torch.randn(4, 13, dtype=torch.float64)
    before = copy.deepcopy(model)
    equalize_(model)
    assert close(model(x), before(x))
    assert not torch.equal(model.block[0].weight, before.block[0].weight)


def test_fused_models():
    model, x = nets.make("depthwise")
    fused = fastnn.convert(copy.deepcopy(model), fuse=True)
    with torch.no_grad():
        expected = model(x)
        assert close(fused(x), expected)
        assert close(equalize_(fused)(x), expected)
    assert not torch.equal(fused[1].weight, model[1].weight)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("0", "9")], "'9', which is no module"),
        ([("0", "1")], "'1', a ReLU"),
        ([("0", "4")], "hands on 17 channels and 4 takes 11 in"),
        ([("0", "2"), ("0", "2")], "twice"),
        (["02"], "pairs of names"),
        ([("0",)], "pairs of names"),
    ],
)
def test_bad_pairs(pairs, message):
    model, _ = nets.make("mlp")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        equalize_(model, pairs=pairs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bad_models():
    with pytest.raises(TypeError, match="model must be"):
        equalize_("model")
    model, _ = nets.make("mlp")
    model[2].weight.data[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="the weight of 2"):
        equalize_(model)
    assert torch.equal(model[0].weight, before["0.weight"])
