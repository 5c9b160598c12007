"""Convolutions with filters of few bits, against the formulas in NumPy and torch's float64 convolution."""

import copy
import io
import math
import re

import numpy as np
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
    WeightOnlyConv,
    correct_bias_,
    dequantize_,
    quantize_,
)

from . import simulation

#: The scheme, and how the simulation names it.
SCHEMES = {
    "int8": (Int8WeightOnly(), ("int8", None, True)),
    "int8, groups of 16": (Int8WeightOnly(16), ("int8", 16, True)),
    "int4": (Int4WeightOnly(None), ("int4", None, True)),
    "int4, groups of 8": (Int4WeightOnly(8), ("int4", 8, True)),
    "uint4, groups of 32": (Int4WeightOnly(symmetric=False), ("uint4", 32, False)),
    "uint4, groups of 5": (Int4WeightOnly(5, symmetric=False), ("uint4", 5, False)),
    "float8": (Float8WeightOnly(), ("float8_e4m3fn", None, True)),
}
#: Of 45, 9, 13 and 16 elements a filter; with all kinds of padding.
LAYERS = {
    "3x3": (lambda **kwargs: nn.Conv2d(5, 7, 3, stride=2, padding=1, **kwargs), (2, 5, 9, 8)),
    "depthwise": (lambda **kwargs: fastnn.nn.Conv2d(6, 6, 3, groups=6, padding="same", **kwargs), (2, 6, 5, 7)),
    "1x1": (lambda **kwargs: fastnn.nn.Conv2d(13, 4, 1, bias=False, **kwargs), (3, 13, 4, 5)),
    "one dimension": (
        lambda **kwargs: nn.Conv1d(8, 6, 4, groups=2, padding=2, padding_mode="reflect", dilation=2, **kwargs),
        (2, 8, 19),
    ),
    "three dimensions": (lambda **kwargs: nn.Conv3d(2, 3, (1, 2, 3), **kwargs), (2, 2, 3, 4, 5)),
}


def simulated(weight, kind, group_size, symmetric):
    """The filters that the integers stand for, in float64. Zeros fill the last group of a filter."""
    rows = weight.detach().float().numpy().reshape(weight.shape[0], -1)
    columns = rows.shape[1]
    if group_size is not None and columns > group_size:
        rows = np.pad(rows, ((0, 0), (0, -columns % group_size)))
        runs = rows.reshape(len(rows), -1, group_size)
    else:
        runs = rows[:, None]
    found = simulation.rounded(runs, *simulation.scale_and_zero(runs, kind, symmetric), kind)
    return torch.from_numpy(found.reshape(len(rows), -1)[:, :columns].reshape(weight.shape))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layer", LAYERS)
def test_scheme(scheme, layer):
    config, arguments = SCHEMES[scheme]
    make, shape = LAYERS[layer]
    for dtype, unit in ((torch.float32, 2**-24), (torch.bfloat16, 2**-8)):
        model = make(dtype=dtype)
        exact, kind = copy.deepcopy(model).double(), type(model)
        filters = exact.weight.data = simulated(model.weight, *arguments)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        assert quantize_(model, config) is model and type(model) is WeightOnlyConv
        assert torch.equal(model.dequantized_weight(), filters.float())
        y, wanted = model(x), exact(x.double())
        assert y.dtype is dtype and not list(model.parameters())
        exact.weight.data = filters.abs()
        if exact.bias is not None:
            exact.bias.data.abs_()
        size = exact(x.detach().double().abs())
        # The filters are rounded to bfloat16 as well.
        assert ((y - wanted).abs() <= (filters[0].numel() + 4) * 2**-24 * size + 3 * unit * size).all()
        y.sum().backward()
        assert x.grad.shape == shape
        dequantize_(model)
        assert type(model) is kind and isinstance(model.weight, nn.Parameter) and model.weight.dtype is dtype
        assert torch.equal(model.weight, filters.float().to(dtype))


def test_bytes_and_report():
    model = nn.Sequential(nn.Conv2d(5, 7, 3))
    quantize_(model, Int4WeightOnly(32))
    # 45 elements: two groups of 32 numbers, of half a byte each.
    assert (tuple(model[0].codes.shape), tuple(model[0].weight_scale.shape)) == ((7, 32), (7, 2))
    row = next(row for row in fastnn.report(model).rows if row.name == "0")
    assert (row.status, row.kind, row.replacement) == ("quantized", "torch.nn.Conv2d", "fastnn.quant.WeightOnlyConv")
    assert (row.parameters, row.bytes) == (7 * 45 + 7, 7 * 32 + 7 * 2 * 4 + 7 * 4)
    assert 0.01 < row.error < 0.2
    assert "groups of 32" in repr(model)


@pytest.mark.parametrize("scheme", ["int8", "int4, groups of 8", "uint4, groups of 5", "float8"])
def test_save_and_load(scheme, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    config, _ = SCHEMES[scheme]
    x = torch.randn(2, 5, 9, 8)

    def make():
        return nn.Sequential(nn.Conv2d(5, 7, 3, padding=1), nn.ReLU(), nn.Conv2d(7, 3, 2, bias=False))

    quantized = quantize_(make(), config)
    expected = quantized(x)
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    file.seek(0)
    safetensors.save_file(quantized.state_dict(), tmp_path / "model.safetensors")
    for state in (torch.load(file, weights_only=True), safetensors.load_file(tmp_path / "model.safetensors")):
        found = quantize_(make(), config)
        found.load_state_dict(state)
        assert torch.equal(found(x), expected)
    with torch.device("meta"):
        found = make()
    quantize_(found, config).load_state_dict(quantized.state_dict(), assign=True)
    assert torch.equal(found(x), expected)
    assert torch.equal(copy.deepcopy(quantized)(x), expected)
    with pytest.raises(RuntimeError, match="the weights of a model that is not quantized"):
        found.load_state_dict(make().state_dict())


@pytest.mark.parametrize("config", [Int4WeightOnly(16), Int4WeightOnly(None, symmetric=False)], ids=repr)
def test_better_scales_and_roundings(config):
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, bias=False), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16)),
        *(nn.Conv2d(16, 12, 1), nn.Flatten(1, 2), nn.Conv1d(48, 6, 3)),
    )
    x = torch.randn(32, 3, 8, 8)
    with torch.no_grad():
        exact = model(x)

        def error(**options):
            return (quantize_(copy.deepcopy(model), config, **options)(x) - exact).norm().item()

        nearest, rounded = error(), error(rounding="adaround", calibration_data=x)
        assert error(rounding="mse") < nearest and rounded < 0.8 * nearest
        quantized = quantize_(copy.deepcopy(model), config)
        correct_bias_(quantized, model, x)
        assert (quantized(x) - exact).mean((0, 2)).abs().max() < 1e-5
        assert (quantized(x) - exact).norm() < nearest


@pytest.mark.parametrize("rounding", ["mse", "adaround"])
def test_integer_convolutions_are_rounded_so_as_well(rounding):
    """Filters of a chain, with the batch norm that is part of them."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
    nn.init.uniform_(model[1].weight, 0.5, 2)
    model(torch.randn(64, 3, 7, 7))
    model.eval()
    x = torch.randn(32, 3, 7, 7)
    nearest = quantize_(copy.deepcopy(model), Int8Static(x))
    rounded = quantize_(copy.deepcopy(model), Int8Static(x), rounding=rounding)
    assert rounded[0].codes.is_contiguous(memory_format=torch.channels_last)
    for index, norm in ((0, model[1]), (3, None)):
        weight = model[index].weight.detach().double()
        if norm is not None:
            weight = weight * (norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()).view(
                -1, 1, 1, 1
            )
        errors = []
        with torch.no_grad():
            images = x if index == 0 else model[:3](x)
            layer = copy.deepcopy(model[index]).double()
            for quantized in (nearest, rounded):
                layer.weight.data = quantized[index].dequantized_weight().double() - weight
                layer.bias = None
                of = layer(images.double()) if rounding == "adaround" else layer.weight
                errors.append(of.norm().item())
        # The same scales or better ones; moments of so few images are damped.
        assert errors[1] <= errors[0] * (1.02 if rounding == "adaround" else 1.0) and not torch.equal(
            nearest[index].codes, rounded[index].codes
        )


def test_dynamic_leaves_convolutions():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 4))
    quantize_(model, Int8Dynamic())
    assert type(model[0]) is nn.Conv2d
    with pytest.raises(ValueError, match="not for Int8Dynamic"):
        quantize_(nn.Sequential(nn.Conv2d(1, 2, 3)), Int8Dynamic())


def test_what_is_refused_leaves_the_model():
    fused = fastnn.convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()).eval(), fuse=True)
    for model, problem in (
        (fused, r"converted with fuse=True.*fastnn\.revert"),
        (nn.Sequential(nn.Conv2d(1, 2, 3, dtype=torch.float64)), "0: its weight is float64"),
        (quantize_(nn.Sequential(nn.Conv2d(1, 2, 3)), Int8WeightOnly()), "0 is a WeightOnlyConv already"),
    ):
        modules = {name: (module, type(module), dict(vars(module))) for name, module in model.named_modules()}
        with pytest.raises(ValueError, match=problem):
            quantize_(model, Int4WeightOnly())
        for name, module in model.named_modules():
            assert (module, type(module)) == modules[name][:2] and vars(module) == modules[name][2]


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"like": nn.Linear(3, 4)}, TypeError, "like: expected a Conv1d"),
        ({"weight": torch.zeros(4, 26, dtype=torch.int8)}, ValueError, r"weight: expected (4, 27) of torch.int8"),
        ({"weight": torch.zeros(4, 27)}, ValueError, "weight_dtype: expected one of"),
        ({"weight_dtype": "int4"}, ValueError, r"weight: expected (4, 14) of torch.uint8 for int4"),
        ({"weight_scale": torch.ones(5)}, ValueError, r"weight_scale: expected the shape (4,), got (5,)"),
        ({"weight_zero_point": torch.ones(3)}, ValueError, r"weight_zero_point: expected the shape (4,), got (3,)"),
        ({"bias": torch.ones(3)}, ValueError, r"bias: expected the shape (4,), got (3,)"),
        ({"group_size": 9}, ValueError, r"weight_scale: expected the shape (4, 3), got (4,)"),
    ],
    ids=str,
)
def test_bad_layers(change, error, problem):
    arguments = dict(weight=torch.zeros(4, 27, dtype=torch.int8), weight_scale=torch.ones(4), like=nn.Conv2d(3, 4, 3))
    assert math.prod(WeightOnlyConv(**arguments).dequantized_weight().shape) == 108
    with pytest.raises(error, match=re.escape(problem)):
        WeightOnlyConv(**{**arguments, **change})
