"""The convolutional networks of `fastnn.models` against the same networks in plain `torch.nn` (cnn_twins.py)."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnn
from fastnn import models
from fastnn.testing.errors import relative_error

from . import cnn_twins as twins
from .closeness import assert_as_near_as_torch

WAVENET = dict(dilation_channels=5, residual_channels=6, skip_channels=7, end_channels=9, classes=8)


@dataclass(frozen=True)
class Network:
    ours: Callable[[], nn.Module]
    twin: Callable[[], nn.Module]
    #: Of the input; one image or sound of it is a row.
    shape: tuple[int, ...]
    classes: int = 10
    #: The classes are those of the points in time, not those of the whole.
    per_sample: bool = False
    rate: float = 0.01

    def batch(self, dtype):
        if self.per_sample:
            samples = torch.randint(self.classes, (self.shape[0], self.shape[2] + 1))
            return F.one_hot(samples[:, :-1], self.classes).mT.to(dtype), samples[:, 1:]
        return torch.randn(self.shape).to(dtype), torch.randint(self.classes, self.shape[:1])

    def pair(self, prepare):
        """fastnn's and torch's, with the same parameters and buffers, on which `prepare` has worked."""
        ours, theirs = self.ours(), self.twin()
        state = theirs.state_dict()
        for name in state:
            prepare(state, name)
        ours.load_state_dict(state)
        return ours, theirs


def seen_data(state, name):
    """Norms as after some training: with the values they start from much would go unnoticed in eval mode."""
    if name.endswith("running_mean"):
        state[name].normal_(0.0, 0.2)
        state[name.replace("running_mean", "running_var")].uniform_(0.5, 2.0)
        state[name.replace("running_mean", "bias")].normal_(0.0, 0.2)
        state[name.replace("running_mean", "weight")].uniform_(0.5, 1.5)


def smooth(model, monkeypatch):
    """Puts SiLU and means in the places of ReLU and max pooling, in the model and in the twins' functions.

    Where an input of ReLU is so near 0 that float32's rounding changes its side, or the two largest of a window so near
    each other, a whole gradient comes or goes, in torch's network as in fastnn's, by chance.
    """
    for name in ("max_pool1d", "max_pool2d"):
        monkeypatch.setattr(twins, name, getattr(F, name.replace("max", "avg")))
    monkeypatch.setattr(twins, "relu", F.silu)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, (nn.ReLU, nn.Hardtanh)):
                setattr(parent, name, fastnn.nn.SiLU())
            elif isinstance(child, nn.MaxPool1d):
                setattr(parent, name, fastnn.nn.AvgPool1d(child.kernel_size, child.stride, child.padding))
            elif isinstance(child, nn.MaxPool2d):
                setattr(parent, name, fastnn.nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
    return model


def narrow_alexnet():
    """With 16 features in place of the 4,096 whose 57 million parameters would take the time of all the tests."""
    model = models.alexnet(num_classes=10, dropout=0.0)
    model.classifier[1] = fastnn.nn.Linear(9216, 16)
    model.classifier[4] = fastnn.nn.Linear(16, 16)
    model.classifier[6] = fastnn.nn.Linear(16, 10)
    return model


def resnet_twin(blocks, bottleneck, classes=10, **kwargs):
    return lambda: twins.ResNet(blocks, bottleneck=bottleneck, num_classes=classes, **kwargs)


def mobilenet_widths(*groups):
    """The channels of the 17 blocks, of which each of the seven groups has its own."""
    return [width for width, blocks in zip(groups, (1, 2, 3, 4, 3, 3, 1), strict=True) for _ in range(blocks)]


NETWORKS = {
    "lenet5": Network(models.LeNet5, twins.LeNet5, (8, 1, 32, 32)),
    "alexnet": Network(narrow_alexnet, lambda: twins.AlexNet(10, 0.0, hidden=16), (2, 3, 67, 71)),
    "resnet18": Network(
        lambda: models.resnet18(num_classes=10), resnet_twin([2, 2, 2, 2], bottleneck=False), (4, 3, 40, 33)
    ),
    "resnet34": Network(
        lambda: models.resnet34(num_classes=10), resnet_twin([3, 4, 6, 3], bottleneck=False), (4, 3, 40, 33)
    ),
    "resnet50": Network(
        lambda: models.resnet50(num_classes=10), resnet_twin([3, 4, 6, 3], bottleneck=True), (4, 3, 40, 33)
    ),
    "bottlenecks": Network(
        lambda: models.ResNet(models.Bottleneck, [1, 1, 1, 1], num_classes=10),
        resnet_twin([1, 1, 1, 1], bottleneck=True),
        (4, 3, 40, 33),
    ),
    "mobilenet_v2": Network(
        lambda: models.mobilenet_v2(num_classes=10, dropout=0.0),
        lambda: twins.MobileNetV2(10, dropout=0.0),
        (4, 3, 40, 33),
    ),
    "narrow_mobilenet": Network(
        lambda: models.mobilenet_v2(num_classes=10, dropout=0.0, width_mult=0.35),
        lambda: twins.MobileNetV2(10, widths=mobilenet_widths(8, 8, 16, 24, 32, 56, 112), first=16, dropout=0.0),
        (4, 3, 40, 33),
    ),
    "m5": Network(lambda: models.M5(n_output=10), lambda: twins.M5(n_output=10), (4, 1, 8000)),
    "wavenet": Network(
        lambda: models.WaveNet(layers=4, blocks=2, kernel_size=3, bias=True, **WAVENET),
        lambda: twins.WaveNet([1, 2, 4, 8] * 2, kernel_size=3, bias=True, **WAVENET),
        (3, 8, 67),
        classes=8,
        per_sample=True,
    ),
}

each_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())


def backward(model, x, target):
    """The loss, the output and every gradient, by name."""
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    output = model(x)
    loss = F.cross_entropy(output.double(), target)
    loss.backward()
    found = {"loss": loss.detach().to(output.dtype), "output": output.detach(), "gradient of the input": x.grad}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad
    return found


def statistics(model):
    return {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def vanishing(name, tensors):
    """Whether a gradient is zero but for rounding, as that of a bias whose output a norm centres."""
    return name.startswith("gradient") and tensors[name].norm() < 1e-9 * tensors["gradient of the input"].norm()


@each_network
def test_state_dict_goes_both_ways(network):
    ours, theirs = network.ours(), network.twin()
    mine, other = ours.state_dict(), theirs.state_dict()
    assert {name: (value.shape, value.dtype) for name, value in mine.items()} == {
        name: (value.shape, value.dtype) for name, value in other.items()
    }
    theirs.load_state_dict(mine)
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, mine[name])
    ours.load_state_dict(network.twin().state_dict())


@each_network
def test_same_as_the_twin_in_float64(network):
    """Outputs, gradients and running statistics, where rounding hides no mistake in how the layers are connected."""
    ours, theirs = (model.double() for model in network.pair(seen_data))
    x, target = network.batch(torch.float64)
    for training in (False, True):
        ours.train(training)
        theirs.train(training)
        found, expected = backward(ours, x, target), backward(theirs, x, target)
        found |= statistics(ours)
        expected |= statistics(theirs)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if vanishing(name, expected):
                assert vanishing(name, found)
            else:
                assert relative_error(found[name], value) < 1e-9, name
    for name, buffer in theirs.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert ours.get_buffer(name) == buffer == 1


@each_network
def test_trains_as_near_to_float64_as_torch(network, monkeypatch):
    ours, theirs = (smooth(model, monkeypatch) for model in network.pair(seen_data))
    exact = copy.deepcopy(theirs).double()
    x, target = network.batch(torch.float32)
    every = (ours, theirs, exact)
    optimizers = [torch.optim.SGD(model.parameters(), lr=network.rate, momentum=0.9) for model in every]
    losses = []
    for step in range(10):
        results = [backward(model, x.to(model_dtype(model)), target) for model in every]
        losses.append([result["loss"] for result in results])
        if step == 0:
            for result, model in zip(results, every, strict=True):
                del result["loss"]  # one number may be right by luck
                result |= statistics(model)
            assert_near(*results)
        for optimizer in optimizers:
            optimizer.step()
    assert losses[-1][2] < losses[0][2]
    ours_losses, their_losses, exact_losses = map(torch.stack, zip(*losses, strict=True))
    assert_as_near_as_torch(ours_losses, their_losses, exact_losses, factor=4, roundoffs=16, what="losses")
    assert_near(*({**dict(model.named_parameters()), **statistics(model)} for model in every))


def model_dtype(model):
    return next(model.parameters()).dtype


def assert_near(ours, theirs, exact):
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, truth in exact.items():
        if vanishing(name, exact):
            assert ours[name].norm() < 1e-4 * ours["gradient of the input"].norm(), name
        else:
            one, other = ours[name].detach(), theirs[name].detach()
            assert_as_near_as_torch(one, other, truth.detach(), factor=4, what=name)


@each_network
@pytest.mark.parametrize("training", [False, True])
def test_output_as_near_to_float64_as_torchs(network, training):
    ours, theirs = (model.train(training) for model in network.pair(seen_data))
    exact = copy.deepcopy(theirs).double()
    x, _ = network.batch(torch.float32)
    with torch.no_grad():
        assert_as_near_as_torch(ours(x), theirs(x), exact(x.double()))


@each_network
def test_copies(network):
    """A copy computes the same bits, on layers of its own."""
    model = network.ours().eval()
    x, _ = network.batch(torch.float32)
    with torch.no_grad():
        expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
        with torch.no_grad():
            assert torch.equal(other(x), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = network.ours().eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        assert torch.equal(other(x), expected)


@each_network
def test_reverts_to_torchs_layers(network):
    """Every layer is fastnn's, where fastnn has one, and torch's after `revert`."""
    model = network.ours().eval()
    x, _ = network.batch(torch.float32)
    assert not fastnn.report(model).not_replaced
    with torch.no_grad():
        expected = model(x)
        fastnn.revert(model)
        assert not any(type(module).__module__.startswith("fastnn.nn") for module in model.modules())
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)


def two_groups_of_mobilenet():
    """With and without an expansion, of both strides, and one block that adds its input: what the 17 blocks are."""
    setting = [[1, 16, 1, 1], [6, 24, 2, 2]]
    return models.mobilenet_v2(num_classes=10, width_mult=0.35, inverted_residual_setting=setting)


@pytest.mark.parametrize("name", ["lenet5", "bottlenecks", "narrow_mobilenet", "m5", "wavenet"])
def test_traces_whole(name):
    model = two_groups_of_mobilenet() if name == "narrow_mobilenet" else NETWORKS[name].ours()
    model.eval()
    x, _ = NETWORKS[name].batch(torch.float32)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))


# ---- what is published of them -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "parameters", "entries"),
    [
        (models.alexnet, 61_100_840, 16),
        (models.resnet18, 11_689_512, 122),
        (models.resnet34, 21_797_672, 218),
        (models.resnet50, 25_557_032, 320),
        # ResNeXt-50 32x4d and Wide ResNet-50-2.
        (lambda: models.resnet50(groups=32, width_per_group=4), 25_028_904, 320),
        (lambda: models.resnet50(width_per_group=128), 68_883_240, 320),
        (models.mobilenet_v2, 3_504_872, 314),
        (models.LeNet5, 61_706, 10),
        (models.M5, 26_915, 30),
    ],
)
def test_number_of_parameters(make, parameters, entries):
    with torch.device("meta"):
        model = make()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.state_dict()) == entries


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (
            models.alexnet,
            {"features.0.weight": (64, 3, 11, 11), "features.10.bias": (256,), "classifier.1.weight": (4096, 9216)},
        ),
        (
            models.resnet18,
            {
                "conv1.weight": (64, 3, 7, 7),
                "layer1.0.conv1.weight": (64, 64, 3, 3),
                "layer2.0.downsample.0.weight": (128, 64, 1, 1),
                "layer4.1.bn2.running_var": (512,),
                "fc.weight": (1000, 512),
            },
        ),
        (
            models.resnet50,
            {
                "layer1.0.downsample.0.weight": (256, 64, 1, 1),
                "layer1.0.downsample.1.num_batches_tracked": (),
                "layer3.5.conv2.weight": (256, 256, 3, 3),
                "layer4.2.bn3.bias": (2048,),
            },
        ),
        (
            models.mobilenet_v2,
            {
                "features.0.0.weight": (32, 3, 3, 3),
                "features.1.conv.0.0.weight": (32, 1, 3, 3),
                "features.1.conv.1.weight": (16, 32, 1, 1),
                "features.1.conv.2.running_mean": (16,),
                "features.2.conv.1.0.weight": (96, 1, 3, 3),
                "features.17.conv.3.weight": (320,),
                "features.18.0.weight": (1280, 320, 1, 1),
                "classifier.1.weight": (1000, 1280),
            },
        ),
    ],
)
def test_names_of_the_standard_implementation(make, names):
    with torch.device("meta"):
        state = make().state_dict()
    assert {name: tuple(state[name].shape) for name in names} == names


def test_full_alexnet():
    ours, theirs = models.alexnet().eval(), twins.AlexNet().eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 63, 63)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-5)


# ---- arguments ---------------------------------------------------------------------------------------------------


def agree(ours, theirs, x):
    """The two compute the same from the same state, in float64."""
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert relative_error(ours.double()(x.double()), theirs.double()(x.double())) < 1e-10


def group_norm(channels):
    return nn.GroupNorm(8, channels)


@pytest.mark.parametrize(
    ("arguments", "twin"),
    [
        (dict(groups=4, width_per_group=8), dict(groups=4, width=8)),
        (dict(width_per_group=128), dict(width=128)),
        (dict(replace_stride_with_dilation=[False, True, True]), dict(dilate=(0, 1, 1))),
        (dict(norm_layer=group_norm), dict(norm=group_norm)),
    ],
    ids=["groups", "wide", "dilated", "norm_layer"],
)
def test_resnet_arguments(arguments, twin):
    ours = models.ResNet(models.Bottleneck, [1, 2, 2, 1], num_classes=7, **arguments)
    agree(ours, twins.ResNet([1, 2, 2, 1], bottleneck=True, num_classes=7, **twin), torch.randn(2, 3, 40, 33))


def test_dilation_keeps_the_resolution():
    plain = models.ResNet(models.Bottleneck, [1, 1, 1, 1])
    dilated = models.ResNet(models.Bottleneck, [1, 1, 1, 1], replace_stride_with_dilation=[False, True, True])
    dilated.load_state_dict(plain.state_dict())
    sizes = []
    for model in (plain, dilated):
        model.layer4.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[2:])))
        model(torch.randn(2, 3, 64, 96))
    assert sizes == [(2, 3), (8, 12)]


@pytest.mark.parametrize("block", [models.BasicBlock, models.Bottleneck])
def test_zero_init_residual_starts_blocks_as_the_identity(block):
    model = models.ResNet(block, [2, 1, 1, 1], zero_init_residual=True)
    x = torch.rand(2, 64 * block.expansion, 5, 6)
    assert torch.equal(model.layer1[1](x), x)
    assert not torch.equal(models.ResNet(block, [2, 1, 1, 1]).layer1[1](x), x)


def test_initialisation_is_torchvisions():
    """He's normal by fan-out for convolutions; norms at 1 and 0; MobileNetV2's linear layer of deviation 0.01."""
    for model in (models.resnet50(), models.mobilenet_v2()):
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight.shape[0] * module.weight[0, 0].numel()
                deviation, count = (2 / fan_out) ** 0.5, module.weight.numel()
                assert module.bias is None
                assert abs(module.weight.std() / deviation - 1) < 5 / (2 * count) ** 0.5
                assert abs(module.weight.mean()) < 5 * deviation / count**0.5
            elif isinstance(module, nn.BatchNorm2d):
                assert torch.equal(module.weight, torch.ones_like(module.weight))
                assert torch.equal(module.bias, torch.zeros_like(module.bias))
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        if isinstance(model, models.MobileNetV2):
            assert not last.bias.any() and abs(last.weight.std() - 0.01) < 1e-4
        else:
            assert last.bias.any() and last.weight.abs().max() <= 2048**-0.5


def test_resnet_refuses():
    with pytest.raises(ValueError, match="replace_stride_with_dilation"):
        models.resnet18(replace_stride_with_dilation=[True])
    with pytest.raises(NotImplementedError, match="dilation must be 1"):
        models.resnet18(replace_stride_with_dilation=[True, False, False])
    with pytest.raises(ValueError, match="groups=2"):
        models.resnet18(groups=2)
    with pytest.raises(ValueError, match="base_width=128"):
        models.resnet34(width_per_group=128)


@pytest.mark.parametrize(
    ("multiplier", "first", "groups", "last"),
    [
        # Channels by hand: the nearest multiple of 8, but not less than nine tenths of the product.
        (0.5, 16, (8, 16, 16, 32, 48, 80, 160), 1280),
        (0.35, 16, (8, 8, 16, 24, 32, 56, 112), 1280),
        (1.4, 48, (24, 32, 48, 88, 136, 224, 448), 1792),
    ],
)
def test_mobilenet_width(multiplier, first, groups, last):
    widths = mobilenet_widths(*groups)
    ours = models.mobilenet_v2(width_mult=multiplier, num_classes=7).eval()
    theirs = twins.MobileNetV2(7, widths=widths, first=first, last=last).eval()
    agree(ours, theirs, torch.randn(1, 3, 33, 40))


def test_mobilenet_arguments():
    model = models.mobilenet_v2(
        inverted_residual_setting=[[1, 16, 1, 1], [2, 20, 2, 2]], round_nearest=4, num_classes=5
    )
    assert [tuple(m.weight.shape[:2]) for m in model.modules() if isinstance(m, nn.Conv2d)] == [
        *[(32, 3), (32, 1), (16, 32)],
        *[(32, 16), (32, 1), (20, 32)],
        *[(40, 20), (40, 1), (20, 40)],
        (1280, 20),
    ]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in models.mobilenet_v2(norm_layer=group_norm).modules())
    made = []

    def block(inp, oup, stride, expand_ratio, norm_layer):
        made.append((inp, oup, stride, expand_ratio))
        return models.InvertedResidual(inp, oup, stride, expand_ratio, norm_layer)

    models.mobilenet_v2(block=block)
    assert len(made) == 17 and made[:3] == [(32, 16, 1, 1), (16, 24, 2, 6), (24, 24, 1, 6)]
    for wrong in ([], [[1, 16, 1]]):
        with pytest.raises(ValueError, match="inverted_residual_setting"):
            models.mobilenet_v2(inverted_residual_setting=wrong)
    with pytest.raises(ValueError, match="stride must be 1 or 2"):
        models.InvertedResidual(8, 8, 3, 1)


@pytest.mark.parametrize(
    ("ours", "twin"),
    [
        (lambda: models.mobilenet_v2(num_classes=5, dropout=0.4), lambda: twins.MobileNetV2(5, dropout=0.4)),
        (models.mobilenet_v2, twins.MobileNetV2),
        (models.alexnet, twins.AlexNet),
    ],
    ids=["mobilenet_v2", "mobilenet_v2-default", "alexnet-default"],
)
def test_dropout(ours, twin):
    """With torch's layers the same features are dropped as in the twin, of the same random numbers, and with none in eval
    mode."""
    ours, theirs = fastnn.revert(ours()), twin()
    theirs.load_state_dict(ours.state_dict())
    x, outputs = torch.randn(2, 3, 64, 64), []
    with torch.no_grad():
        for model in (ours, theirs):
            torch.manual_seed(1)
            outputs.append(model(x))
        torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)
        ours.eval()
        assert torch.equal(ours(x), ours(x))


@pytest.mark.parametrize("arguments", [dict(n_input=2, n_output=3, stride=4, n_channel=6), dict(stride=7, n_channel=4)])
def test_m5_arguments(arguments):
    agree(models.M5(**arguments), twins.M5(**arguments), torch.randn(2, arguments.get("n_input", 1), 4000))


def test_shortest_sounds_of_m5():
    for stride, length in ((16, 6848), (4, 1772)):
        model = models.M5(stride=stride).eval()
        assert model(torch.randn(1, 1, length)).shape == (1, 35)
        with pytest.raises(RuntimeError):
            model(torch.randn(1, 1, length - 1))


# ---- WaveNet -----------------------------------------------------------------------------------------------------

SHAPES = [(3, 1, 2), (2, 3, 2), (2, 2, 3), (3, 2, 1)]


@pytest.mark.parametrize(("layers", "blocks", "kernel_size"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_wavenet_arguments(layers, blocks, kernel_size, bias):
    ours = models.WaveNet(layers=layers, blocks=blocks, kernel_size=kernel_size, bias=bias, **WAVENET)
    dilations = [2**layer for layer in range(layers)] * blocks
    theirs = twins.WaveNet(dilations, kernel_size=kernel_size, bias=bias, **WAVENET)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    agree(ours, theirs, torch.randn(2, 8, 41))


@pytest.mark.parametrize(("layers", "blocks", "kernel_size"), SHAPES)
def test_wavenet_sees_its_receptive_field_and_nothing_later(layers, blocks, kernel_size):
    model = models.WaveNet(layers=layers, blocks=blocks, kernel_size=kernel_size, **WAVENET).double()
    field = 1 + blocks * (kernel_size - 1) * (2**layers - 1)
    assert model.receptive_field == field
    x = torch.randn(1, 8, 50, dtype=torch.float64, requires_grad=True)
    for t in (49, 30, 3, 0):
        (gradient,) = torch.autograd.grad(model(x)[:, :, t].square().sum(), x)
        seen = gradient.abs().amax((0, 1)) > 0
        assert seen.nonzero().flatten().tolist() == list(range(max(0, t - field + 1), t + 1))


def test_wavenet_is_causal():
    """What comes later changes no bit of what came out before."""
    model = models.WaveNet(layers=4, blocks=2, **WAVENET)
    x = torch.randn(2, 8, 60)
    with torch.no_grad():
        before = model(x)
        assert before.shape == (2, 8, 60)
        for t in (0, 17, 58):
            changed = x.clone()
            changed[:, :, t + 1 :] = torch.randn(2, 8, 59 - t)
            after = model(changed)
            assert torch.equal(after[:, :, : t + 1], before[:, :, : t + 1])
            assert not torch.equal(after[:, :, t + 1 :], before[:, :, t + 1 :])


def test_receptive_field_of_the_paper():
    with torch.device("meta"):
        # Blocks of 1, 2, 4, ..., 512, each of which sees 1,024 samples.
        assert models.WaveNet(blocks=1).receptive_field == 1024
        assert models.WaveNet().receptive_field == 4093


def test_wavenet_learns_a_period():
    """One-hot samples in, their classes one step later as targets: a signal of period 5 is learnt by heart."""
    model = models.WaveNet(layers=3, blocks=1, dilation_channels=16, residual_channels=16, classes=8)
    samples = torch.tensor([0, 3, 7, 3, 1]).repeat(2, 12)
    x = F.one_hot(samples, 8).mT.float()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(x)[:, :, :-1], samples[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    with torch.no_grad():
        # 3 is followed by 7 and by 1: which of them is known only from the samples before.
        right = model(x)[:, :, 8:-1].argmax(1) == samples[:, 9:]
    assert right.all()
