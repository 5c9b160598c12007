"""Bias correction: means of results become the reference's; without data, by the batch norm before."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fastnn
from fastnn import quant
from fastnn.quant.bias_correction import expected_input
from fastnn.quant.links import Source, find_sources

T, nn = torch.nn, fastnn.nn


def quantized(model, config=None):
    rough = copy.deepcopy(model)
    quant.quantize_(rough, config or quant.Int4WeightOnly(None))
    return rough


def means(model, inputs):
    """Of each linear layer's results over all inputs, by its name."""
    found = {}

    def hook(name):
        def see(module, args, output):
            found.setdefault(name, []).append(output.flatten(0, -2))

        return see

    for name, module in model.named_modules():
        if isinstance(module, (T.Linear, quant.QuantizedLinear)):
            module.register_forward_hook(hook(name))
    with torch.no_grad():
        for x in inputs:
            model(x)
    return {name: torch.cat(outputs).double().mean(0) for name, outputs in found.items()}


@pytest.mark.parametrize(
    "config", [quant.Int4WeightOnly(None), quant.Int4WeightOnly(4, symmetric=False), quant.Int8Dynamic()]
)
@pytest.mark.parametrize("bias", [True, False])
def test_means_are_those_of_the_reference(config, bias):
    torch.manual_seed(0)
    model = fastnn.nn.MLP(16, [32, 32], 8, bias=bias).train()
    x = torch.randn(200, 3, 16) + 0.5
    rough = quantized(model, config)
    state = copy.deepcopy(model.state_dict())
    before = copy.deepcopy(rough)
    assert quant.correct_bias_(rough, model, [x]) is rough
    assert rough.training
    assert not rough[0]._forward_hooks
    assert not model[0]._forward_hooks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    wanted, found, uncorrected = (means(copy.deepcopy(each), [x]) for each in (model, rough, before))
    for name, mean in wanted.items():
        # A bias is rounded to float32, and inputs that are quantized anew are rounded another way.
        torch.testing.assert_close(found[name], mean, rtol=0, atol=1e-4 if config == quant.Int8Dynamic() else 1e-5)
        assert (found[name] - mean).norm() < 0.3 * (uncorrected[name] - mean).norm()
    assert torch.equal(rough[0].weight, before[0].weight)


def test_several_batches():
    torch.manual_seed(0)
    model = fastnn.nn.MLP(16, [32, 32], 8)
    batches = [torch.randn(size, 16) + 0.5 for size in (150, 50, 100)]
    rough = quantized(model)
    before = means(copy.deepcopy(rough), batches)
    quant.correct_bias_(rough, model, batches)
    wanted, found = means(copy.deepcopy(model), batches), means(copy.deepcopy(rough), batches)
    for name, mean in wanted.items():
        assert (found[name] - mean).abs().max() < 0.15 * (before[name] - mean).abs().max()
    # The first layer's inputs are the same whatever is corrected: it is exact.
    torch.testing.assert_close(found["0"], wanted["0"], rtol=0, atol=1e-5)


def test_a_layer_that_is_called_twice():
    class Twice(T.Module):
        def __init__(self):
            super().__init__()
            self.layer = T.Linear(8, 8)

        def forward(self, x):
            return self.layer(F.relu(self.layer(x)))

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(100, 8) + 1
    rough = quantized(model)
    before = means(copy.deepcopy(rough), [x])
    quant.correct_bias_(rough, model, x)
    wanted, found = means(copy.deepcopy(model), [x]), means(copy.deepcopy(rough), [x])
    assert (found["layer"] - wanted["layer"]).norm() < 0.3 * (before["layer"] - wanted["layer"]).norm()


def test_attention():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    x = torch.randn(50, 7, 16) + torch.randn(16)
    rough = quantized(model)
    before = copy.deepcopy(rough.state_dict())
    with torch.no_grad():
        wanted, lost = model(x), F.mse_loss(rough(x), model(x))
        quant.correct_bias_(rough, model, x)
        assert F.mse_loss(rough(x), wanted) < lost
    changed = {name for name, value in rough.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"self_attn.out_proj.bias", "linear1.bias", "linear2.bias"}


# ---- without data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_expected_input_against_sampling(activation):
    torch.manual_seed(0)
    norm = T.BatchNorm1d(5).double()
    norm.weight.data = torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    norm.bias.data = torch.tensor([1.0, -1.0, 0.0, 5.9, 4.0], dtype=torch.float64)
    x = norm.bias + norm.weight.abs() * torch.randn(400_000, 5, dtype=torch.float64)
    y = {"none": x, "relu": F.relu(x), "relu6": F.relu6(x)}[activation]
    found = expected_input(Source(norm, activation, 2))
    torch.testing.assert_close(found, y.mean(0).repeat_interleave(2), rtol=0, atol=0.02)


def sources_net():
    return T.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), T.BatchNorm2d(8), T.ReLU6()),
        *(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(2), T.Flatten(), T.Dropout(), nn.Linear(24, 6)),
        *(T.BatchNorm1d(6), T.Linear(6, 5), T.ReLU(), T.Linear(5, 4)),
    )


def test_sources():
    found = find_sources(sources_net())
    assert {name: (source.activation, source.repeat) for name, source in found.items()} == {
        "3": ("relu", 1),
        "6": ("relu6", 1),
        "11": ("none", 4),
        "13": ("none", 1),
    }


def test_without_data():
    """Behind a batch norm that has seen these very inputs, the mean is right up to what is normal about them."""
    torch.manual_seed(0)
    model = T.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8)).train()
    model[1].momentum = None
    model[1].bias.data.normal_()
    x = torch.randn(4000, 16)
    with torch.no_grad():
        model(x)
    model.eval()
    rough = quantized(model)
    before = means(copy.deepcopy(rough), [x])["3"]
    bias = rough[0].bias.clone()
    wanted = means(copy.deepcopy(model), [x])["3"]
    # The first layer's own error moves what the second one sees: it is put back.
    measured = means(copy.deepcopy(quant.correct_bias_(copy.deepcopy(rough), model, x)), [x])["3"]
    quant.correct_bias_(rough, model)
    assert torch.equal(rough[0].bias, bias)
    error = model[3].weight.detach().double() - rough[3].dequantized_weight().double()
    normal = model[1].bias.detach().double() + torch.randn(200_000, 32, dtype=torch.float64)
    shift = F.relu(normal).mean(0) @ error.t()
    torch.testing.assert_close((rough[3].bias - model[3].bias).double(), shift, rtol=0, atol=2e-3)
    assert (measured - wanted).norm() < 1e-4 < (before - wanted).norm()


# ---- bad input ---------------------------------------------------------------------------------------------------


def test_bad_input():
    torch.manual_seed(0)
    model = fastnn.nn.MLP(16, [32, 32], 8)
    rough = quantized(model)
    before = copy.deepcopy(rough.state_dict())
    x = torch.randn(4, 16)
    cases = [
        (TypeError, "model must be", (None, model, x)),
        (TypeError, "reference must be", (rough, None, x)),
        (TypeError, "an iterable of inputs", (rough, model, 3)),
        (ValueError, "no quantized layer", (model, model, x)),
        (ValueError, "reached no quantized layer", (rough, model, [])),
        (ValueError, "reference has no module '0'", (rough, T.ReLU(), x)),
        (ValueError, "0 has 32 channels in model and 16", (rough, fastnn.nn.MLP(16, [16, 32], 8), x)),
        (ValueError, "is not finite", (rough, model, torch.full((4, 16), torch.inf))),
        (ValueError, "follows a batch norm", (rough, model, None)),
        (RuntimeError, None, (rough, model, torch.randn(4, 3))),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            quant.correct_bias_(*arguments)
        assert all(torch.equal(value, before[name]) for name, value in rough.state_dict().items())
        assert not rough[0]._forward_hooks
