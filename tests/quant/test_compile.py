"""Quantized models by torch.compile with its own compiler, and by torch.export, of any batch."""

import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnn
from fastnn.quant import (
    Float8WeightOnly,
    Int4WeightOnly,
    Int8Dynamic,
    Int8Static,
    Int8WeightOnly,
    prepare_qat_,
    quantize_,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 2, padding="same")
        self.last = nn.Linear(8, 5)

    def forward(self, image, gain=1.0):
        y = F.relu(self.norm(self.first(image)))
        y = F.relu(self.second(y) + y)
        return self.last(y.mean((2, 3)) * gain)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch():
    return {0: torch.export.Dim("batch", min=1, max=64)}


def test_inductor_with_a_layer_of_each_kind(no_fallback):
    """Between the layers is relu alone, so that all bits are those of eager calls."""
    x = torch.randn(5, 32)
    sizes = (32, 64, 64, 64, 64, 10)
    model = nn.Sequential(*(part for k, n in itertools.pairwise(sizes) for part in (nn.Linear(k, n), nn.ReLU()))).eval()
    for i, config in enumerate((Int8Dynamic(), Int8WeightOnly(), Int4WeightOnly(symmetric=False), Float8WeightOnly())):
        quantize_(model, config, only=[str(2 * i)])
    quantize_(model, Int8Static(x), only=["8"])
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        for rows in (5, 9, 1):
            x = torch.randn(rows, 32)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-6, atol=1e-6)


def test_export_of_linear_layers(no_fallback):
    x = torch.randn(5, 32)
    for config in (Int8Dynamic(), Int4WeightOnly(), Int8Static(x)):
        quantized = quantize_(fastnn.nn.MLP(32, [64], 10).eval(), config)
        program = torch.export.export(quantized, (x,), dynamic_shapes=(batch(),)).module()
        for rows in (5, 9):
            x = torch.randn(rows, 32)
            assert torch.equal(program(x), quantized(x))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_export_of_an_integer_chain():
    """The class of a model in integers has its forward's parameters, and exports as layers of floating-point numbers."""
    x = torch.randn(2, 3, 9, 8)
    model = quantize_(Net().eval(), Int8Static(x))
    assert list(inspect.signature(model.forward).parameters) == ["image", "gain"]
    program = torch.export.export(model, (x,), {"gain": 2.0}, dynamic_shapes={"image": batch(), "gain": None}).module()
    with torch.no_grad():
        for images in (2, 5):
            x = torch.randn(images, 3, 9, 8)
            layers = type(model)._original_class.forward(model, x, gain=2.0)
            torch.testing.assert_close(program(x, gain=2.0), layers, rtol=1e-5, atol=1e-5)
            # Rounded once more between the layers than in the chain.
            assert (model(x, gain=2.0) - layers).norm() <= 0.02 * layers.norm()


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_classes_made_at_run_time_have_their_forwards_parameters():
    made = [prepare_qat_(Net(), Int8Static(torch.randn(2, 3, 9, 8))), fastnn.convert(Net().eval(), fuse=True)]
    for model in made:
        assert list(inspect.signature(model.forward).parameters) == ["image", "gain"]
