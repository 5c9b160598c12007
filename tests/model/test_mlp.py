"""`fastnn.nn.MLP`: a Sequential whose pairs of layers run as one call."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fastnn
from fastnn import functional
from fastnn.nn.mlp import run_layers
from fastnn.ops import packed_linear

from .closeness import assert_as_near_as_torch

ACTIVATIONS = ("relu", "relu6", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")


@pytest.fixture
def fused(monkeypatch):
    """The names of the activations that ran fused."""
    seen = []
    original = functional.linear_act

    def spy(input, weight, bias, activation):
        seen.append(activation)
        return original(input, weight, bias, activation)

    monkeypatch.setattr(functional, "linear_act", spy)
    return seen


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prepacked", [False, True])
def test_equals_the_layers_one_by_one(activation, dtype, prepacked, fused, no_fallback, monkeypatch):
    monkeypatch.setattr(packed_linear, "LEAST_WORK", 0)
    model = fastnn.nn.MLP(13, [31, 17], 5, activation, dtype=dtype)
    x = torch.randn(19, 13, dtype=dtype)
    plain = fastnn.revert(nn.Sequential(*copy.deepcopy(model)))
    exact = copy.deepcopy(plain).double()
    if prepacked:
        fastnn.prepack_(model)
    with torch.no_grad():
        assert_as_near_as_torch(model(x), plain(x), exact(x.double()))
    assert fused == ([] if prepacked else [activation] * 2)
    model(x).sum().backward()
    plain(x).sum().backward()
    exact(x.double()).sum().backward()
    for ours, theirs, truth in zip(model.parameters(), plain.parameters(), exact.parameters(), strict=True):
        assert_as_near_as_torch(ours.grad, theirs.grad, truth.grad)


def test_is_a_sequential_and_reverts_to_one():
    model = fastnn.nn.MLP(4, [6], 3)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert isinstance(model, nn.Sequential)
    assert type(model[:2]) is nn.Sequential
    assert model[0] is model[:2][0]
    assert type(model[-1]) is fastnn.nn.Linear
    x = torch.randn(2, 4)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is fastnn.nn.MLP
        assert torch.equal(other(x), expected)
    fastnn.revert(model)
    assert [type(m) for m in model.modules()] == [nn.Sequential, nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(model(x), expected)


def test_no_hidden_layer_no_bias_and_dropout_between():
    assert len(fastnn.nn.MLP(4, [], 3)) == 1
    assert "0.bias" not in fastnn.nn.MLP(4, [5], 3, bias=False).state_dict()
    model = fastnn.nn.MLP(4, [5], 3, activation=lambda: nn.Dropout(1.0))
    assert torch.equal(model(torch.randn(2, 4)), model[2].bias.expand(2, 3))


@pytest.mark.parametrize("where", [0, 1])
def test_hooks_are_not_skipped(where, fused):
    model = fastnn.nn.MLP(4, [6], 3)
    x = torch.randn(2, 4)
    seen = []
    handles = [
        model[where].register_forward_hook(lambda *_: seen.append("forward")),
        model[where].register_forward_pre_hook(lambda *_: seen.append("pre")),
        model[where].register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    model(x).sum().backward()
    assert sorted(seen) == ["backward", "forward", "pre"]
    assert fused == []
    for handle in handles:
        handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append("global"))
    try:
        model(x)
    finally:
        handle.remove()
    assert seen.count("global") == 4
    assert fused == []
    model(x)
    assert fused == ["relu"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("where", [None, 0, 1, 2, 3])
def test_residual_and_dropout_with_and_without_hooks(training, where):
    layers = [fastnn.nn.Linear(64, 70), fastnn.nn.GELU(), fastnn.nn.Linear(70, 64), fastnn.nn.Dropout(0.5)]
    model = fastnn.prepack_(torch.nn.Sequential(*layers).train(training))
    seen = []
    if where is not None:
        layers[where].register_forward_hook(lambda *_: seen.append(where))
    x, residual = torch.randn(40, 64), torch.randn(40, 64)
    with torch.no_grad():
        torch.manual_seed(1)
        output = run_layers(model, x, residual)
        torch.manual_seed(1)
        expected = torch.nn.functional.gelu(torch.nn.functional.linear(x, layers[0].weight, layers[0].bias))
        expected = torch.nn.functional.linear(expected, layers[2].weight, layers[2].bias)
        if not training:
            torch.testing.assert_close(output, expected + residual)
        else:
            kept = output - residual
            assert 0.3 < (kept.abs() < 1e-5).float().mean() < 0.7
            torch.testing.assert_close(kept[kept.abs() > 1e-5], 2 * expected[kept.abs() > 1e-5], rtol=1e-4, atol=1e-4)
    assert seen == ([] if where is None else [where])


def test_foreign_layers_are_called_as_modules(fused):
    model = fastnn.nn.MLP(4, [6], 3)
    x = torch.randn(2, 4)
    model[1] = nn.ReLU()
    expected = model(x)
    assert fused == []
    model[1] = fastnn.nn.ReLU()
    torch.testing.assert_close(model(x), expected)
    assert fused == ["relu"]
    model[1].forward = lambda value: value * 0
    assert torch.equal(model(x), model[2].bias.expand(2, 3))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((4, [5], 3, "swish"), ValueError, "activation must be one of"),
        ((4, 5, 3), TypeError, "hidden_features"),
        ((4, ["5"], 3), TypeError, "hidden_features"),
        ((4, [5], 3, nn.ReLU()), TypeError, "a callable that makes a module"),
        ((4, [5], 3, lambda: 3), TypeError, "must make a torch.nn.Module"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        fastnn.nn.MLP(*arguments)


def test_compiles_whole():
    model = fastnn.nn.MLP(4, [6], 3, "gelu")
    x = torch.randn(2, 4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
