"""Quantization-aware training: what is simulated is what the converted model computes, and four bits cost less after it."""

import copy

import pytest
import torch
from torch import nn

import fastnn
from fastnn.quant import (
    Float8WeightOnly,
    Int4WeightOnly,
    Int8Dynamic,
    Int8Static,
    Int8WeightOnly,
    convert_qat_,
    dequantize_,
    prepare_qat_,
    quantize_,
)

CONFIGS = {
    "dynamic": lambda: Int8Dynamic(),
    "static": lambda: Int8Static([torch.randn(16, 24) for _ in range(3)]),
    "int8": lambda: Int8WeightOnly(),
    "int8 groups": lambda: Int8WeightOnly(group_size=8),
    "int4": lambda: Int4WeightOnly(group_size=None),
    "int4 groups": lambda: Int4WeightOnly(group_size=8),
    "uint4 groups": lambda: Int4WeightOnly(group_size=8, symmetric=False),
}


def mlp():
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 16, bias=False), nn.ReLU(), nn.Linear(16, 5))


def train(model, batches, rate=1e-3):
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_converted_is_what_was_simulated(name, dtype):
    model = mlp().to(dtype)
    config = CONFIGS[name]()
    if name == "static":
        config = Int8Static([x.to(dtype) for x in config.calibration_data])
    parameters = list(model.parameters())
    assert prepare_qat_(model, config) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    before = [p.detach().clone() for p in parameters]
    train(model, [(torch.randn(8, 24, dtype=dtype), torch.randint(5, (8,))) for _ in range(5)])
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    model.eval()
    x = torch.randn(3, 7, 24, dtype=dtype)
    with torch.no_grad():
        simulated = model(x)
        assert convert_qat_(model) is model
        converted = model(x)
    assert not list(model.parameters())
    assert all(type(layer).__name__ != "Linear" for layer in model)
    assert converted.dtype is dtype
    # A difference in the last place of one layer may become another integer in the next.
    rounding = 2e-2 if dtype is torch.bfloat16 else 1e-5
    step = 0.02 if name in ("dynamic", "static") else 0.0
    apart = (converted - simulated).abs().float()
    assert apart.mean() <= rounding * simulated.abs().float().mean()
    assert apart.max() <= (rounding + step) * simulated.abs().float().max()
    dequantize_(model)
    assert type(model[0]) is nn.Linear
    assert isinstance(model[0].weight, nn.Parameter)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_layer_to_the_rounding(name):
    """With nothing behind it that could make another integer of a rounding."""
    model = nn.Sequential(nn.Linear(24, 33))
    prepare_qat_(model, CONFIGS[name]())
    model.eval()
    x = torch.randn(50, 24)
    with torch.no_grad():
        simulated = model(x)
        converted = convert_qat_(model)(x)
    torch.testing.assert_close(converted, simulated, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_untrained_it_is_post_training_quantization(name):
    x = torch.randn(50, 24)
    model = mlp().eval()
    config = CONFIGS[name]()
    direct = quantize_(copy.deepcopy(model), config)
    detour = convert_qat_(prepare_qat_(model, config))
    with torch.no_grad():
        assert torch.equal(direct(x), detour(x))


def test_four_bits_on_digits():
    """Training for some epochs more gives back at least half of the accuracy that four bits cost."""
    datasets = pytest.importorskip("sklearn.datasets")
    found = datasets.load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    learned, held_out = order[:1000], order[1000:]

    def batches(epochs):
        for _ in range(epochs):
            for batch in learned[torch.randperm(len(learned))].split(50):
                yield x[batch], y[batch]

    @torch.no_grad()
    def accuracy(model):
        return (model(x[held_out]).argmax(1) == y[held_out]).double().mean().item()

    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
    train(model, batches(20), 3e-3)
    whole = accuracy(model)
    config = Int4WeightOnly(group_size=None)
    after = accuracy(quantize_(copy.deepcopy(model), config))
    prepare_qat_(model, config)
    assert accuracy(model) == pytest.approx(after, abs=0.003)
    train(model, batches(8))
    trained = accuracy(convert_qat_(model.eval()))
    torch.set_num_threads(threads)
    assert whole - after > 0.01
    assert trained >= whole - (whole - after) / 2


def test_attention():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 16)
    parameters = {id(p) for p in layer.parameters()}
    prepare_qat_(layer, Int8Dynamic())
    assert {id(p) for p in layer.parameters()} == parameters
    layer(x).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    layer.eval()
    with torch.no_grad():
        simulated = layer(x)
        converted = convert_qat_(layer)(x)
    torch.testing.assert_close(converted, simulated, rtol=2e-2, atol=2e-2)


def test_observers_observe_in_training_alone():
    model = nn.Sequential(nn.Linear(24, 5))
    prepare_qat_(model, Int8Static([torch.rand(4, 24)]))
    observer = model[0].qat_observer
    before = observer.range()
    model.eval()(torch.full((1, 24), 50.0))
    assert observer.range() == before
    model.train()(torch.full((1, 24), 50.0))
    assert observer.range()[1] == 50


def test_only_and_skip_and_undone():
    model = mlp()
    prepare_qat_(model, Int8Dynamic(), skip="4")
    assert type(model[4]) is nn.Linear
    assert "Int8Dynamic" in repr(model[0])
    convert_qat_(model)
    model = mlp()
    state = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="calibration_data"):
        prepare_qat_(model, Int8Static([]))
    assert state == {name: type(module) for name, module in model.named_modules()}


def test_one_tensor_is_one_input_of_the_calibration():
    x = torch.randn(3, 24)
    one, listed = mlp(), mlp()
    listed.load_state_dict(one.state_dict())
    prepare_qat_(one, Int8Static(x))
    prepare_qat_(listed, Int8Static([x]))
    assert one[0].qat_observer.range() == listed[0].qat_observer.range() == (x.min().item(), x.max().item())


def test_bad_arguments():
    with pytest.raises(TypeError, match="model"):
        prepare_qat_(3, Int8Dynamic())
    with pytest.raises(TypeError, match="config"):
        prepare_qat_(mlp(), "int8")
    with pytest.raises(ValueError, match=r"config.*Float8"):
        prepare_qat_(mlp(), Float8WeightOnly())
    with pytest.raises(ValueError, match="nothing to convert"):
        convert_qat_(mlp())
    with pytest.raises(ValueError, match="group_size"):
        prepare_qat_(mlp(), Int4WeightOnly(group_size=7))
    model = prepare_qat_(mlp(), Int8Dynamic())
    with pytest.raises(ValueError, match="prepared already"):
        prepare_qat_(model, Int8Dynamic())
    assert fastnn.quant.convert_qat_(model) is model
    with pytest.raises(ValueError, match="already"):
        prepare_qat_(model, Int8Dynamic())
