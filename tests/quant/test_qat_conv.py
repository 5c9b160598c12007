"""Quantization-aware training of convolutional networks: what is simulated is what the converted model computes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnn
from fastnn.models.resnet import resnet18
from fastnn.quant import (
    Float8WeightOnly,
    Int4WeightOnly,
    Int8Dynamic,
    Int8Static,
    Int8WeightOnly,
    QuantizationAware,
    QuantizedConv,
    WeightOnlyConv,
    convert_qat_,
    dequantize_,
    prepare_qat_,
    quantize_,
)

SHAPE = (4, 3, 17, 15)


class Net(nn.Module):
    """Batch norms, a shortcut, pooling of both kinds, a depthwise convolution, and dropout that is a function."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.left = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.right = nn.Conv2d(16, 24, 1, stride=2, bias=False)
        self.right_norm = nn.BatchNorm2d(24)
        self.last = fastnn.nn.Conv2d(24, 20, 2)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(20, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.norm(self.stem(x))))
        left = self.depthwise(F.relu6(self.left(x)))
        x = torch.relu(left + self.right_norm(self.right(x)))
        x = self.last(F.dropout(x, 0.2, self.training))
        return self.fc(torch.flatten(self.average(x), 1))


def train(model, shape, dtype=torch.float32, steps=3):
    """A few steps, with gradients for every parameter."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(torch.randn(shape, dtype=dtype)).float()
        F.cross_entropy(y.flatten(1), torch.randint(y.flatten(1).shape[1], y.shape[:1])).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    return model.eval()


def assert_same(converted, simulated, rounding):
    """A difference in the last place of one layer may become another integer in the next: of a few, and by one step."""
    apart, size = (converted - simulated).abs().float(), simulated.abs().float()
    assert apart.mean() <= rounding * size.mean()
    assert apart.max() <= (rounding + 0.02) * size.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("observer", ["minmax", "moving_average"])
def test_a_chain_of_integers_is_what_was_simulated(observer, dtype):
    model = Net().to(dtype)
    modules, parameters = dict(model.named_modules()), list(model.parameters())
    keys = list(model.state_dict())
    x = torch.randn(SHAPE, dtype=dtype)
    assert prepare_qat_(model, Int8Static(x, observer)) is model
    assert dict(model.named_modules()) == modules and list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    prepared = {name for name, module in model.named_modules() if isinstance(module, QuantizationAware)}
    assert prepared == {"stem", "left", "depthwise", "right", "last", "fc"}
    statistics = model.norm.running_mean.clone()
    train(model, SHAPE, dtype)
    assert not torch.equal(model.norm.running_mean, statistics)
    other = copy.deepcopy(model)
    with torch.no_grad():
        simulated = model(x)
        assert convert_qat_(model) is model
        converted = model(x)
        assert_same(converted, simulated, 2e-2 if dtype is torch.bfloat16 else 1e-4)
        # What hands integers on does so in the training, too: the layers one by one are less alike.
        assert {type(getattr(model, name)) for name in prepared - {"fc"}} == {QuantizedConv}
        assert model.stem.output_scale == model.left.input_scale and type(model.norm) is nn.Identity
        assert torch.equal(other(x), simulated)
        assert torch.equal(convert_qat_(other)(x), converted)
    dequantize_(model)
    assert type(model) is Net and type(model.stem) is nn.Conv2d and type(model.last) is fastnn.nn.Conv2d


def test_resnet():
    model = resnet18(num_classes=20)
    shape = (4, 3, 40, 40)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    prepare_qat_(model, Int8Static(torch.randn(shape), "moving_average"))
    train(model, shape, steps=2)
    x = torch.randn(shape)
    with torch.no_grad():
        simulated = model(x)
        assert_same(convert_qat_(model)(x), simulated, 1e-3)


def test_three_dimensions_and_back_without_data():
    def make():
        return nn.Sequential(nn.Conv3d(2, 8, 3, bias=False), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 4, 2))

    x = torch.randn(2, 2, 6, 7, 5)
    model = train(prepare_qat_(make(), Int8Static(x)), x.shape)
    with torch.no_grad():
        simulated = model(x)
        assert_same(convert_qat_(model)(x), simulated, 1e-4)
        state = model.state_dict()
        loaded = quantize_(make().eval(), Int8Static.from_state_dict(state))
        loaded.load_state_dict(state)
        assert torch.equal(loaded(x), model(x))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_named_padding():
    model = nn.Sequential(nn.Conv2d(3, 8, 2, padding="same"), nn.ReLU(), nn.Conv2d(8, 4, (3, 4), padding="same"))
    x = torch.randn(2, 3, 9, 7)
    prepare_qat_(model, Int8Static(x))
    model.train()(x).square().sum().backward()
    model.eval()
    with torch.no_grad():
        simulated = model(x)
        convert_qat_(model)
        assert_same(model(x), simulated, 1e-4)


def test_frozen_batch_norms():
    """In eval mode a norm is folded, in training as well: its statistics stay, and all parameters have gradients."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
    model(torch.randn(8, 3, 9, 9))
    x = torch.randn(8, 3, 9, 9)
    prepare_qat_(model, Int8Static(x))
    with torch.no_grad():
        expected = model.eval()(x)
        model.train()[1].eval()
        torch.testing.assert_close(model(x), expected)
    before = model[1].running_mean.clone()
    model(x).square().sum().backward()
    assert torch.equal(model[1].running_mean, before)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_untrained_it_is_post_training_quantization():
    model, x = Net().eval(), torch.randn(SHAPE)
    model.train()(torch.randn(SHAPE))
    model.eval()
    direct = quantize_(copy.deepcopy(model), Int8Static(x))
    prepare_qat_(model, Int8Static(x))
    with torch.no_grad():
        simulated = model(x)
        convert_qat_(model)
        assert torch.equal(direct(x), model(x))
    assert direct.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(direct.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert_same(model(x).detach(), simulated, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config", [Int8WeightOnly(), Int4WeightOnly(None), Int4WeightOnly(5, symmetric=False)], ids=repr
)
def test_weight_only(config, dtype):
    model = nn.Sequential(
        *(nn.Conv1d(3, 8, 5, padding=2, padding_mode="circular", bias=False), nn.BatchNorm1d(8), nn.ReLU()),
        *(fastnn.nn.Conv1d(8, 8, 3, groups=8, bias=False), nn.ReLU(), nn.Conv1d(8, 4, 2, stride=2)),
    ).to(dtype)
    x = torch.randn(6, 3, 23, dtype=dtype)
    prepare_qat_(model, config)
    train(model, x.shape, dtype)
    with torch.no_grad():
        simulated = model(x)
        convert_qat_(model)
        assert [type(model[i]) for i in (0, 1, 3, 5)] == [
            WeightOnlyConv,
            nn.BatchNorm1d,
            WeightOnlyConv,
            WeightOnlyConv,
        ]
        assert_same(model(x), simulated, 2e-2 if dtype is torch.bfloat16 else 1e-5)


def test_a_layer_by_itself():
    """Called by others than the module around it, a layer rounds its own input and filters."""
    model, x = Net().eval(), torch.randn(SHAPE)
    prepare_qat_(model, Int8Static(x))
    with torch.no_grad():
        simulated = model.stem(x)
    model = convert_qat_(model)
    with torch.no_grad():
        # The batch norm is part of the converted one.
        found = model.stem(x)
        norm = Net().eval().norm
    torch.testing.assert_close(found, norm(simulated).detach(), rtol=1e-4, atol=1e-4)


class OtherInTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x) if self.training else torch.relu(self.conv(x))


def test_failures_leave_the_model():
    x = torch.randn(2, 3, 7, 7)
    cases = [
        (Net(), Int8Static([]), ValueError, "needs calibration_data"),
        (Net(), Int8Static(x * torch.nan), ValueError, "saw no finite value"),
        (Net(), Int8Static(torch.randn(2, 4, 17, 15)), RuntimeError, "channels"),
        (OtherInTraining(), Int8Static(x), ValueError, "conv in training is not what follows in eval mode"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), Int8Dynamic(), ValueError, "nothing to quantize"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), Float8WeightOnly(), ValueError, "config: expected a scheme of integers"),
        (nn.Sequential(nn.Conv2d(3, 4, 3).double()), Int8WeightOnly(), ValueError, "0: its weight is float64"),
        (prepare_qat_(Net(), Int8Static(torch.randn(SHAPE))), Int8Static(x), ValueError, "prepared already"),
    ]
    for model, config, error, problem in cases:
        modules = {name: (module, type(module), dict(vars(module))) for name, module in model.named_modules()}
        with pytest.raises(error, match=problem):
            prepare_qat_(model, config)
        for name, module in model.named_modules():
            assert (module, type(module)) == modules[name][:2] and vars(module) == modules[name][2]


def test_a_model_that_has_changed_since():
    model = prepare_qat_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), Int8Static(torch.randn(2, 3, 7, 7)))
    watching = model[0].register_forward_hook(lambda *_: None)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="no longer calls the convolutions"):
        convert_qat_(model)
    assert [type(module) for module in model.modules()] == kinds
    with pytest.raises(ValueError, match="is watched by hooks"):
        model(torch.randn(2, 3, 7, 7))
    watching.remove()
    assert model.eval()(torch.randn(2, 3, 7, 7)).shape == (2, 4, 5, 5)
