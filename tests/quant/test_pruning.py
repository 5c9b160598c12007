"""Pruning: masks that hold, and channels that are gone with all that read them."""

import copy

import pytest
import torch

import fastnn
from fastnn.quant import prunable_channels, prune_channels_, prune_magnitude_, remove_masks_
from fastnn.quant.links import Link, find_links

from . import nets

T, nn = torch.nn, fastnn.nn


# ---- magnitude ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_the_smallest_go(scope):
    model, x = nets.make("depthwise")
    layers = [module for module in model if hasattr(module, "weight") and module.weight.dim() > 1]
    weights = [layer.weight.detach().clone() for layer in layers]
    prune_magnitude_(model, 0.6, scope=scope)
    groups = [[i] for i in range(len(layers))] if scope == "layer" else [range(len(layers))]
    for group in groups:
        before = torch.cat([weights[i].abs().flatten() for i in group])
        kept = torch.cat([(layers[i].weight != 0).flatten() for i in group])
        assert (~kept).sum() == round(0.6 * len(before))
        assert before[kept].min() >= before[~kept].max()
    for layer, weight in zip(layers, weights, strict=True):
        assert torch.equal(layer.weight, weight * (layer.weight != 0))
    model(x)


def test_what_is_pruned_stays_zero_in_training():
    model = nets.mlp()
    prune_magnitude_(model, 0.5)
    zero = model[2].weight == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        model(torch.randn(8, 13)).square().sum().backward()
        optimizer.step()
    x = torch.randn(4, 13)
    y = model(x)
    assert (model[2].weight[zero] == 0).all()
    prune_magnitude_(model, 0.75)
    assert (model[2].weight[zero] == 0).all()
    assert (model[2].weight == 0).sum() == round(0.75 * zero.numel())
    y = model(x)
    assert remove_masks_(model) is model
    assert sorted(model.state_dict()) == sorted(nets.mlp().state_dict())
    assert torch.equal(model(x), y)


def test_only_and_skip():
    model = nets.mlp()
    prune_magnitude_(model, 0.5, only=["0", "2"], skip="2")
    assert [(layer.weight == 0).any().item() for layer in model if isinstance(layer, T.Linear)] == [True, False, False]


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, "half", True, float("nan")])
@pytest.mark.parametrize("function", [prune_magnitude_, prune_channels_])
def test_bad_sparsity(function, sparsity):
    with pytest.raises(ValueError, match="sparsity must be"):
        function(nets.mlp(), sparsity)


def test_bad_magnitude():
    with pytest.raises(TypeError, match="model must be"):
        prune_magnitude_(3, 0.5)
    with pytest.raises(TypeError, match="model must be"):
        remove_masks_(3)
    with pytest.raises(ValueError, match="scope"):
        prune_magnitude_(nets.mlp(), 0.5, scope="row")
    with pytest.raises(ValueError, match="no linear layer"):
        prune_magnitude_(T.ReLU(), 0.5)
    model = nets.mlp()
    model[4].weight.data[0, 0] = torch.inf
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="the weight of 4"):
        prune_magnitude_(model, 0.5)
    assert list(model.state_dict()) == before


# ---- channels ----------------------------------------------------------------------------------------------------


def silenced(model, keep):
    """The same model with the channels that are not kept multiplied by zero where they are read."""
    twin = copy.deepcopy(model)
    for name, link in find_links(twin, homogeneous=False).items():
        if isinstance(link, Link):
            gone = torch.ones(link.channels, dtype=torch.bool)
            gone[keep[name]] = False
            for use in link.uses:
                use.module.weight.data[:, gone.repeat_interleave(use.repeat)] = 0
    return twin


def rows_kept(before, after):
    """Which rows of a weight are left, told by the biases or norms, all of which are different."""
    return torch.tensor([(before == value).nonzero().item() for value in after])


@pytest.mark.parametrize("name", [name for name in nets.NETS if name != "grouped"])
@pytest.mark.parametrize("sparsity", [0.4, 1.0])
def test_a_pruned_model_is_one_whose_channels_are_not_read(name, sparsity):
    model, x = nets.make(name)
    before = copy.deepcopy(model)
    links = {k: v for k, v in find_links(model, homogeneous=False).items() if isinstance(v, Link)}
    assert prune_channels_(model, sparsity) is model
    keep = {}
    for layer in links:
        old, new = before.get_submodule(layer), model.get_submodule(layer)
        left = max(1, old.weight.shape[0] - int(sparsity * old.weight.shape[0]))
        assert new.weight.shape[0] == left
        norm = links[layer].norm
        if norm is None:
            keep[layer] = rows_kept(old.bias, new.bias)
        else:
            old_norm = dict(zip(model.modules(), before.modules(), strict=True))[norm]
            keep[layer] = rows_kept(old_norm.bias, norm.bias)
    torch.testing.assert_close(model(x), silenced(before, keep)(x), rtol=1e-11, atol=1e-11)
    # Sizes are those of a model that was made so: its repr, and its gradients.
    for old in model.modules():
        if isinstance(old, T.Linear):
            assert old.weight.shape == (old.out_features, old.in_features)
        if isinstance(old, T.Conv2d):
            assert old.weight.shape[:2] == (old.out_channels, old.in_channels // old.groups)
    model(x).sum().backward()


def test_the_least_important_go():
    model, _ = nets.make("mlp")
    first, second = model[0].weight.detach(), model[2].weight.detach()
    importance = first.norm(dim=1) * second.norm(dim=0)
    keep = importance.argsort(descending=True)[:9].sort().values
    fastnn.quant.equalize_(equalized := copy.deepcopy(model), pairs=[("0", "2")])
    for each in (model, equalized):
        bias = each[0].bias.detach().clone()
        prune_channels_(each, 0.5, only="0")
        assert torch.equal(each[0].bias, bias[keep])
        assert each[2].weight.shape == (11, 9)


def test_multiple():
    model = fastnn.nn.MLP(8, [64, 12], 4)
    prune_channels_(model, 0.7, multiple=16)
    assert [layer.out_features for layer in model if isinstance(layer, T.Linear)] == [32, 12, 4]


def test_residual_connections_are_refused():
    model, _ = nets.make("residual")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"(?s)outer: its result is added to another one, as in a residual"):
        prune_channels_(model, 0.5, only="outer")
    with pytest.raises(ValueError, match=r"(?s)first: .*\n  outer: .*\n  last: its result is returned"):
        prune_channels_(model, 0.5, only=["first", "inner", "outer", "last"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [name for name, reason in prunable_channels(model).items() if not reason] == ["inner"]


def test_refusals_name_the_reason():
    reasons = prunable_channels(nets.grouped())
    assert reasons["2"] == "it has 2 groups"
    assert reasons["0"] == "2 has 2 groups"
    with pytest.raises(ValueError, match="cannot be removed"):
        prune_channels_(nets.grouped(), 0.5)
    assert prunable_channels(nets.depthwise())["3"].startswith("it is depthwise")
    with pytest.raises(ValueError, match="no linear layer"):
        prune_channels_(T.ReLU(), 0.5)
    with pytest.raises(ValueError, match="multiple"):
        prune_channels_(nets.mlp(), 0.5, multiple=0)
    with pytest.raises(TypeError, match="model must be"):
        prune_channels_(None, 0.5)
    with pytest.raises(TypeError, match="model must be"):
        prunable_channels(None)


def test_models():
    torch.manual_seed(0)
    gpt = fastnn.models.GPT(31, 16, n_layer=2, n_head=2, n_embd=16)
    tokens = torch.randint(31, (2, 16))
    prune_channels_(gpt, 0.5)
    assert gpt.transformer.h[1].mlp.c_fc.out_features == 32
    gpt(tokens).sum().backward()
    with torch.no_grad():
        resnet = fastnn.models.resnet18(num_classes=7).eval()
        parameters = sum(p.numel() for p in resnet.parameters())
        prune_channels_(resnet, 0.5, skip="conv1")
        assert sum(p.numel() for p in resnet.parameters()) < 0.6 * parameters
        assert resnet(torch.randn(2, 3, 33, 33)).shape == (2, 7)
        mobile = fastnn.models.mobilenet_v2(num_classes=7).eval()
        prune_channels_(mobile, 0.5)
        assert mobile(torch.randn(2, 3, 33, 33)).shape == (2, 7)
