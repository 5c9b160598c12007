"""Bad input of whole models: an exception that names the argument, and the model as it was. (That of the functions is with
their tests in tests/ops, what only one function refuses with that function's.)"""

import copy
import math

import pytest
import torch
from torch import nn

import fastnn
from fastnn.quant import (
    Int4WeightOnly,
    Int8Dynamic,
    Int8DynamicLinear,
    Int8Static,
    Int8StaticLinear,
    Int8WeightOnly,
    QuantizedConv,
    WeightOnlyConv,
    WeightOnlyLinear,
    convert_qat_,
    prepare_qat_,
    quantize_,
)

Q = torch.zeros(4, 8, dtype=torch.int8)
FILTERS = torch.zeros(4, 2, 3, 3, dtype=torch.int8)
GEOMETRY = dict(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1)
ONE, ZERO = torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
SCALES = {"0": 0.0, "negative": -1.0, "NaN": math.nan, "infinite": math.inf, "subnormal": 1e-40}
#: Layers made of one scale and one zero point: of the weight, or of the inputs.
OF_WEIGHT = {
    "weight only": lambda scale, zero: WeightOnlyLinear(Q.byte()[:, :4], scale, zero, weight_dtype="uint4"),
    "weight-only convolution": lambda scale, zero: WeightOnlyConv(
        torch.zeros(4, 9, dtype=torch.uint8), scale, zero, weight_dtype="uint4", like=nn.Conv2d(2, 4, 3)
    ),
    "dynamic": lambda scale, zero: Int8DynamicLinear(Q, scale),
    "convolution": lambda scale, zero: QuantizedConv(FILTERS, scale, None, ONE, ZERO, **GEOMETRY),
}
OF_INPUT = {
    "static": lambda scale, zero: Int8StaticLinear(Q, torch.ones(4), input_scale=scale, input_zero_point=zero),
    "convolution": lambda scale, zero: QuantizedConv(FILTERS, torch.ones(4), None, scale, zero, **GEOMETRY),
}


def loaded(layer, **wrong):
    """What torch says to the layer's state with other numbers in it; the layer has to stay as it was."""
    state = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError) as raised:
        layer.load_state_dict({**state, **wrong})
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    return str(raised.value)


@pytest.mark.parametrize("value", SCALES)
def test_scales(value):
    bad = torch.tensor(SCALES[value])
    row = torch.stack([ONE, ONE, bad, ONE])
    for make in OF_WEIGHT.values():
        with pytest.raises(ValueError, match="weight_scale: expected positive, normal, finite numbers, got"):
            make(row, None)
        assert "weight_scale: expected positive" in loaded(make(torch.ones(4), None), weight_scale=row)
    for make in OF_INPUT.values():
        with pytest.raises(ValueError, match="input_scale: expected positive, normal, finite numbers, got"):
            make(bad, ZERO)
        assert "input_scale: expected positive" in loaded(make(ONE, ZERO), input_scale=bad)


@pytest.mark.parametrize("value", [-1, 16, 256])
def test_zero_points(value):
    bad = torch.tensor(value, dtype=torch.int32)
    row = torch.stack([ZERO, bad, ZERO, ZERO])
    for name in ("weight only", "weight-only convolution"):
        make = OF_WEIGHT[name]
        with pytest.raises(ValueError, match=f"weight_zero_point: expected 0 to 15, got {value}"):
            make(torch.ones(4), row)
        found = loaded(make(torch.ones(4), torch.zeros_like(row)), weight_zero_point=row)
        assert f"weight_zero_point: expected 0 to 15, got {value}" in found
    for make in OF_INPUT.values() if value != 16 else ():
        with pytest.raises(ValueError, match=f"input_zero_point: expected 0 to 255, got {value}"):
            make(ONE, bad)
        assert f"input_zero_point: expected 0 to 255, got {value}" in loaded(make(ONE, ZERO), input_zero_point=bad)


class Net(nn.Module):
    def __init__(self, features=8):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, features)
        self.attention, self.last = nn.MultiheadAttention(features, 2), nn.Linear(features, 3)

    def forward(self, x):
        x = self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return self.last(self.attention(x, x, x)[0])


X = torch.randn(2, 2, 5, 5)
#: What is asked for, of which model, and the error's text.
MODELS = {
    "odd": (Int4WeightOnly(None), lambda: nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 2)), "1: its 7 inputs are odd"),
    "groups": (
        Int8WeightOnly(3),
        lambda: nn.Sequential(nn.Conv1d(1, 3, 3), Net(6)),
        r"1\.fc: its 4 inputs do not divide",
    ),
    "no data": (Int8Static([]), Net, "needs calibration_data, got none"),
    "used up": (Int8Static(iter(())), Net, "needs calibration_data, got none"),
    "no numbers": (Int8Static(X * torch.nan), Net, "saw no finite value"),
    "another model's state": (
        lambda: Int8Static.from_state_dict(
            quantize_(nn.Sequential(nn.Linear(2, 3)), Int8Static(torch.ones(2, 2))).state_dict()
        ),
        Net,
        "nothing to quantize",
    ),
    "twice": (
        Int8Dynamic(),
        lambda: quantize_(Net(), Int8Dynamic()),
        "is a QuantizedMultiheadAttention already|fc is a",
    ),
    "twice, another scheme": (
        Int4WeightOnly(2),
        lambda: quantize_(Net(), Int8WeightOnly()),
        "conv is a WeightOnlyConv already",
    ),
    "twice, static": (Int8Static(X), lambda: quantize_(Net(), Int8Static(X)), "conv is a QuantizedConv already"),
}


@pytest.mark.parametrize("function", [quantize_, prepare_qat_])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, function):
    config, make, message = MODELS[name]
    model = make()
    before = {path: (module, type(module), dict(vars(module))) for path, module in model.named_modules()}
    values = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        function(model, config() if callable(config) else config)
    assert {path: (module, type(module)) for path, module in model.named_modules()} == {
        path: found[:2] for path, found in before.items()
    }
    assert all(vars(module) == before[path][2] for path, module in model.named_modules())
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


def test_training_twice():
    model = prepare_qat_(Net(), Int8Static(X))
    kinds = [type(module) for module in model.modules()]
    for function in (prepare_qat_, quantize_):
        with pytest.raises(
            ValueError, match=f"{function.__name__}: .*is prepared already, by prepare_qat_; call convert_qat_ first"
        ):
            function(model, Int8Static(X))
    assert [type(module) for module in model.modules()] == kinds
    convert_qat_(model)
    with pytest.raises(ValueError, match="nothing to convert"):
        convert_qat_(model)


def test_unknown_schemes():
    for config in ("int3", torch.int8, None):
        for function in (quantize_, prepare_qat_):
            with pytest.raises(TypeError, match="config must be one of"):
                function(Net(), config)
    for function in (fastnn.quantize, fastnn.fake_quantize):
        with pytest.raises(ValueError, match=r"dtype: expected one of.*int3"):
            function(torch.ones(2), 1.0, dtype="int3")
    with pytest.raises(ValueError, match=r"weight_dtype: expected one of.*int3"):
        WeightOnlyLinear(Q, torch.ones(4), weight_dtype="int3")
