"""Convolutional networks in integers: what a chain computes is what its layers' op computes one after the other."""

import concurrent.futures
import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnn
import fastnn.functional as fF
from fastnn.models.resnet import resnet18
from fastnn.quant import Int8Static, QuantizedConv, correct_bias_, dequantize_, prepare_qat_, quantize_, report


def snr(y, exact):
    return (10 * torch.log10(exact.double().pow(2).mean() / (y.double() - exact).pow(2).mean())).item()


def settled(model):
    """With batch norms that do something."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.left = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.right = nn.Conv2d(16, 24, 1, stride=2, bias=False)
        self.right_norm = nn.BatchNorm2d(24)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(24, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.norm(self.stem(x))))
        left = self.depthwise(F.relu6(self.left(x)))
        x = torch.relu(left + self.right_norm(self.right(x)))
        return self.fc(torch.flatten(self.average(x), 1))


def quantized(model, *inputs):
    """With linear layers as they were."""
    return quantize_(copy.deepcopy(model), Int8Static(list(inputs)), skip=nn.Linear)


def test_a_chain_is_its_layers_one_after_the_other():
    model = settled(Block())
    x = torch.randn(2, 3, 17, 15)
    chain = quantized(model, x)

    def conv(layer, x, dtype, output=None, residual=None, **options):
        buffers = dict(layer.named_buffers())
        if output is not None:
            options.update(output_scale=output.output_scale, output_zero_point=output.output_zero_point)
        if residual is not None:
            options.update(
                {name: buffers[name] for name in ("residual_scale", "residual_zero_point")}, residual=residual
            )
        return fF.int8_conv2d(
            *(
                x,
                layer.codes,
                layer.weight_scale,
                layer.bias,
                layer.stride,
                layer.padding,
                layer.dilation,
                layer.groups,
            ),
            **dict(input_scale=layer.input_scale, input_zero_point=layer.input_zero_point, dtype=dtype, **options),
        )

    u8 = torch.uint8
    stem = chain.stem
    y = torch.clamp((x * (1 / stem.input_scale)).round() + stem.input_zero_point, 0, 255).to(u8)
    y = conv(stem, y, u8, stem, activation="relu")
    assert stem.output_scale == chain.left.input_scale == chain.right.input_scale
    y = F.max_pool2d(y.float(), 3, 2, 1).to(u8)
    left = conv(chain.left, y, u8, chain.left, activation="relu6")
    right = conv(chain.right, y, u8, chain.right)
    y = conv(chain.depthwise, left, u8, chain.depthwise, right, activation="relu")
    mean = (y.long() - chain.depthwise.output_zero_point).sum((2, 3)).float() * (
        chain.depthwise.output_scale * torch.tensor(1 / (y.shape[2] * y.shape[3]))
    )
    with torch.inference_mode():
        assert torch.equal(chain(x), chain.fc(mean))


def test_resnet():
    model = settled(resnet18(num_classes=20))
    data = [torch.randn(2, 3, 40, 40) for _ in range(2)]
    chain = quantized(model, *data)
    x = data[0]
    with torch.inference_mode():
        exact, y = model(x), chain(x)
        assert snr(y, exact) > 20
        # The forward of the class, whose layers take and give floating-point numbers, is as good.
        assert snr(type(chain)._original_class.forward(chain, x), exact) > 20
        assert torch.equal(chain(x[:1]), y[:1])
        assert torch.equal(chain(x.contiguous(memory_format=torch.channels_last)), y)
    assert all(isinstance(m, QuantizedConv) for m in chain.modules() if "Conv" in type(m).__name__)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in chain.modules())
    assert [name for name, m in chain.named_modules() if isinstance(m, QuantizedConv) and m.output_scale is None] == []


def test_state_dict():
    model = settled(Block())
    a, b = torch.randn(2, 3, 17, 15), torch.randn(2, 3, 17, 15) * 3
    one, other = quantized(model, a), quantized(model, b)
    with torch.inference_mode():
        y, different = one(a), other(a)
        assert not torch.equal(y, different)
        file = io.BytesIO()
        torch.save(one.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(a), y)
        assert torch.equal(copy.deepcopy(one.stem)(a), one.stem(a))


@pytest.mark.parametrize("pooled", [False, True])
def test_pooled_twice(pooled):
    """Maxima, and then the mean of them, of integers."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(8, 4)) if pooled else nn.Sequential(*layers)
    x = torch.randn(2, 3, 10, 12)
    chain = quantized(model.eval(), x)
    with torch.inference_mode():
        assert chain[0].output_scale is not None
        assert snr(chain(x), model(x)) > 25


def test_without_data(tmp_path):
    """From the state of a model that was calibrated, which safetensors takes as well."""
    safetensors = pytest.importorskip("safetensors.torch")
    model, x = settled(Block()), torch.randn(2, 3, 17, 15)
    for skip in (None, "left", nn.Linear):
        chain = quantize_(copy.deepcopy(model), Int8Static([x]), skip=skip)
        with torch.inference_mode():
            expected = chain(x)
        torch.save(chain.state_dict(), tmp_path / "model.pt")
        safetensors.save_file(chain.state_dict(), tmp_path / "model.safetensors")
        for state in (
            torch.load(tmp_path / "model.pt", weights_only=True),
            safetensors.load_file(tmp_path / "model.safetensors"),
        ):
            found = quantize_(Block().eval(), Int8Static.from_state_dict(state))
            found.load_state_dict(state)
            with torch.device("meta"):
                empty = Block().eval()
            quantize_(empty, Int8Static.from_state_dict(state)).load_state_dict(state, assign=True)
            with torch.inference_mode():
                for other in (found, empty):
                    kinds = [type(module).__name__ for module in other.modules()]
                    assert kinds == [type(module).__name__ for module in chain.modules()]
                    assert torch.equal(other(x), expected)
    for name in ("stem.output_scale", "depthwise.residual_scale"):
        with pytest.raises(ValueError, match=f"{name} is missing in the state_dict"):
            quantize_(Block(), Int8Static.from_state_dict({k: v for k, v in state.items() if k != name}))
    # Ranges that were found before are as good a beginning of training as data.
    prepared = prepare_qat_(copy.deepcopy(model), Int8Static.from_state_dict(state))
    with torch.no_grad():
        assert snr(prepared(x), expected) > 25


def test_layers_alone():
    x, layer = torch.randn(2, 6, 9, 8), nn.Conv2d(6, 10, 3, padding=1)
    chain = quantized(nn.Sequential(layer), x)
    with torch.inference_mode():
        exact = layer(x)
        for y in (chain(x), chain[0](x), chain[0](x[0])[None]):
            assert y.dtype is torch.float32 and snr(y, exact[: len(y)]) > 30
        assert chain[0](x.bfloat16()).dtype is torch.bfloat16
        assert snr(chain[0].bfloat16()(x.bfloat16()), exact) > 30
        assert chain[0].weight_scale.dtype is torch.float32
        compiled = torch.compile(chain[0], fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), chain[0](x))


def test_one_dimension():
    model = settled(
        nn.Sequential(nn.Conv1d(4, 12, 5, padding=2), nn.BatchNorm1d(12), nn.ReLU(), nn.Conv1d(12, 7, 3, 2))
    )
    x = torch.randn(3, 4, 33)
    chain = quantized(model, x)
    with torch.inference_mode():
        assert chain[0].output_scale is not None
        assert snr(chain(x), model(x)) > 28


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_named_padding(rank):
    """Even filters have one zero more at the end, as in torch."""
    kind, norm = getattr(nn, f"Conv{rank}d"), getattr(nn, f"BatchNorm{rank}d")
    model = nn.Sequential(
        *(kind(3, 8, 2, padding="same"), norm(8), nn.ReLU(), kind(8, 8, 4, padding="same", dilation=3, groups=8)),
        *(nn.ReLU(), kind(8, 5, 3, stride=2, padding="valid")),
    )
    settled(model)
    x = torch.randn(2, 3, *(9, 7, 8)[:rank])
    chain = quantized(model, x)
    with torch.inference_mode():
        assert chain[0].output_scale is not None and chain[3].output_scale is not None
        y = chain(x)
        assert snr(y, model(x)) > 25
        for _ in range(2):  # from the second call on as one program
            assert torch.equal(chain(x), y)
        # Layer by layer, of floating-point numbers and compiled.
        assert snr(type(chain)._original_class.forward(chain, x), model(x)) > 25
        compiled = torch.compile(chain[0], fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), chain[0](x))
        assert torch.equal(copy.deepcopy(chain)(x), y)
        other = quantized(settled(copy.deepcopy(model)), x * 2)
        other.load_state_dict(chain.state_dict())
        assert torch.equal(other(x), y)
    assert "padding='same'" in repr(chain[0])
    back = dequantize_(chain)
    assert [back[i].padding for i in (0, 3, 5)] == ["same", "same", "valid"]
    assert snr(back(x), model(x)) > 30


def test_three_dimensions():
    model = settled(
        nn.Sequential(nn.Conv3d(3, 12, 3, padding=1), nn.BatchNorm3d(12), nn.ReLU(), nn.Conv3d(12, 7, (1, 3, 2), 2))
    )
    x = torch.randn(2, 3, 5, 9, 8)
    chain = quantized(model, x)
    with torch.inference_mode():
        assert chain[0].output_scale is not None
        y = chain(x)
        assert snr(y, model(x)) > 28
        assert torch.equal(chain(x.contiguous(memory_format=torch.channels_last_3d)), y)
        assert torch.equal(chain(x[1]), y[1])
    assert isinstance(dequantize_(chain)[3], nn.Conv3d)


def test_calls_as_one_are_the_calls_one_by_one():
    chain = quantized(settled(Block()), torch.randn(2, 3, 17, 15))
    inputs = [torch.randn(*shape) for shape in ((2, 3, 17, 15), (1, 3, 30, 21))]
    inputs.append(inputs[0].contiguous(memory_format=torch.channels_last))
    with torch.inference_mode():
        for x in inputs:
            first = chain(x)  # one by one, and remembered
            assert torch.equal(chain(x), first)
            assert torch.equal(chain(x.clone()), first)
        (calls,) = chain._fastnn_integer_chain.runs
        assert [type(made).__name__ for made in calls._made.values()] == ["_Program"] * 3
        # From several threads at once.
        expected = [chain(x) for x in inputs]
        infer = torch.inference_mode()(chain)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for y, x in zip(pool.map(infer, inputs * 8), range(24), strict=True):
                assert torch.equal(y, expected[x % 3])


def test_one_image_alone():
    chain = quantized(
        settled(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 4, 3))),
        torch.randn(2, 3, 17, 15),
    )
    x = torch.randn(2, 3, 17, 15)
    with torch.inference_mode():
        assert torch.equal(chain(x[1]), chain(x)[1])


def test_calls_as_one_are_for_plain_tensors():
    chain = quantized(settled(Block()), torch.randn(2, 3, 17, 15))
    x = torch.randn(2, 3, 17, 15)
    with torch.inference_mode():
        y = [chain(x), chain(x)][1]
        with pytest.raises(Exception):  # noqa: B017 - whichever comes first
            chain(x.to("meta"))
        assert torch.equal(chain(x), y)
        assert chain(x[:0]).shape == chain(x[:0]).shape == (0, 10)
        for dtype in (torch.float64, torch.float16):
            other = quantized(settled(Block()), x)
            other.fc = nn.Identity()
            first = other(x.to(dtype))
            assert torch.equal(other(x.to(dtype)), first)


def test_calls_as_one_notice_changes():
    chain = quantized(settled(Block()), torch.randn(2, 3, 17, 15))
    x = torch.randn(2, 3, 17, 15)
    with torch.inference_mode():
        before = [chain(x), chain(x)][1]
    other = quantized(settled(Block()), torch.randn(2, 3, 17, 15))
    for change in (
        lambda: chain.left.codes.neg_(),
        lambda: chain.depthwise.residual_scale.mul_(3),
        lambda: setattr(chain.stem, "bias", chain.stem.bias + 1),
        lambda: chain.load_state_dict(other.state_dict()),
    ):
        change()
        with torch.inference_mode():
            after = chain(x)
            assert not torch.equal(after, before)
            assert torch.equal(chain(x), after)
            assert torch.equal(copy.deepcopy(chain)(x), after)
            before = after
    with torch.inference_mode():
        assert torch.equal(before, other(x))


def test_numbers_come_in_and_go_out_between_calls():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(6, 6, 3, padding=1) for _ in range(3))

        def forward(self, x):
            y = F.relu(self.a(x) + x)  # the residual is of floating-point numbers
            y = torch.sigmoid(self.b(y)) * y
            return self.c(self.b(x) if False else y), F.relu(y)

    model, x = Model().eval(), torch.randn(2, 6, 9, 9)
    chain = quantized(model, x)
    with torch.inference_mode():
        exact = model(x)
        for _ in range(2):
            for y, wanted in zip(chain(x), exact, strict=True):
                assert snr(y, wanted) > 25
    assert len(chain._fastnn_integer_chain.runs) == 2


def test_what_reads_integers_not_gets_numbers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            y = self.a(x)
            return self.b(torch.sigmoid(y)) + y

    model, x = Model().eval(), torch.randn(2, 3, 9, 9)
    chain = quantized(model, x)
    with torch.inference_mode():
        assert chain.a.output_scale is None
        assert snr(chain(x), model(x)) > 25


def test_linear_layers_at_the_same_time_or_afterwards():
    model, x = settled(Block()), torch.randn(4, 3, 17, 15)
    afterwards = quantize_(quantized(model, x), Int8Static([x]), only="fc")
    for chain in (afterwards, quantize_(copy.deepcopy(model), Int8Static(x for x in [x]))):
        with torch.inference_mode():
            assert chain.stem.codes.dtype is chain.fc.codes.dtype is torch.int8
            assert snr(chain(x), model(x)) > 20


class Branches(nn.Module):
    """Whose forward cannot be followed."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return self.inside(x) if x.sum() < 1e9 else x


def test_bad_input():
    x = torch.randn(1, 3, 5, 5)
    for model, data, problem in (
        (Branches(nn.Conv2d(3, 4, 3)), [x], "nothing to quantize"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), [], "needs calibration_data"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), [x * torch.nan], "saw no finite value"),
    ):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        modules = dict(model.named_modules())
        with pytest.raises(ValueError, match=problem):
            quantize_(model, Int8Static(data))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert dict(model.named_modules()) == modules and model.training


def test_a_part_whose_forward_can_be_followed():
    x = torch.randn(2, 3, 17, 15)
    model = Branches(settled(Block())).eval()
    whole = quantize_(copy.deepcopy(model), Int8Static(x))
    part = quantize_(copy.deepcopy(model.inside), Int8Static(x))
    with torch.inference_mode():
        assert torch.equal(whole(x), part(x))


def test_a_fused_model_is_refused():
    x = torch.randn(2, 3, 17, 15)
    model = fastnn.convert(settled(Block()), fuse=True)
    expected = model(x)
    with pytest.raises(ValueError, match=r"converted with fuse=True.*fastnn\.revert"):
        quantize_(model, Int8Static(x))
    assert torch.equal(model(x), expected)
    with torch.inference_mode():
        assert snr(quantize_(fastnn.revert(model), Int8Static(x))(x), expected) > 20


def test_only_and_skip():
    model, x = settled(Block()), torch.randn(2, 3, 17, 15)
    chain = quantize_(copy.deepcopy(model), Int8Static(x), skip=["left", nn.Linear])
    kept = {name for name, module in chain.named_modules() if type(module) in (nn.Conv2d, nn.Linear)}
    assert kept == {"left", "fc"}
    with torch.inference_mode():
        assert snr(chain(x), model(x)) > 20


def test_a_chain_is_quantized_once():
    x = torch.randn(2, 3, 17, 15)
    chain = quantized(settled(Block()), x)
    expected = chain(x)
    with pytest.raises(ValueError, match="stem is a QuantizedConv already"):
        quantize_(chain, Int8Static(x))
    assert torch.equal(chain(x), expected)


def test_dequantized():
    model, x = settled(Block()), torch.randn(2, 3, 17, 15)
    chain = quantize_(copy.deepcopy(model), Int8Static(x))
    stem, weight = chain.stem, chain.stem.dequantized_weight()
    assert fastnn.revert(chain) is chain and chain.stem.output_scale is not None
    floats = dequantize_(chain)
    assert type(floats) is Block and floats.stem is stem and type(stem) is nn.Conv2d
    assert torch.equal(stem.weight, weight) and not any("Quantized" in type(m).__name__ for m in floats.modules())
    with torch.inference_mode():
        assert snr(floats(x), model(x)) > 25


def test_copies_are_of_their_own():
    x = torch.randn(2, 3, 17, 15)
    chain = quantized(settled(Block()), x)
    expected = chain(x)
    other = copy.deepcopy(chain)
    with torch.no_grad():
        assert torch.equal(other(x), expected)
        other.stem.weight_scale.mul_(2)
        assert not torch.equal(other(x), expected) and torch.equal(chain(x), expected)
        file = io.BytesIO()
        torch.save(chain, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert type(loaded) is Block and snr(loaded(x), expected) > 30


def test_layers_that_are_watched():
    x = torch.randn(2, 3, 17, 15)
    chain = quantized(settled(Block()), x)
    seen = []
    with torch.inference_mode():
        expected = chain(x)
        handle = chain.left.register_forward_hook(lambda module, args, output: seen.append(output))
        assert snr(chain(x), expected) > 30
        assert len(seen) == 1 and seen[0].dtype is torch.float32
        handle.remove()
        assert torch.equal(chain(x), expected)


def test_reports():
    x = torch.randn(2, 3, 17, 15)
    model = settled(Block())
    chain = quantize_(copy.deepcopy(model), Int8Static(x))
    rows = {row.name: row for row in fastnn.report(chain).rows}
    assert rows["(model)"].status == "note"
    assert rows["stem"].status == "quantized" and 0 < rows["stem"].error < 0.02
    layers = {layer.name: layer for layer in report(chain, [x], reference=model).layers}
    assert set(layers) == {"stem", "left", "depthwise", "right", "fc"}
    # The batch norms that are part of them, too.
    assert min(layer.snr for layer in layers.values()) > 20


@pytest.mark.parametrize("computed", [True, False], ids=["computed", "measured"])
def test_bias_correction(computed):
    model = settled(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16))
    )
    x = torch.randn(64, 3, 9, 9)
    chain = quantize_(copy.deepcopy(model), Int8Static(x))
    assert isinstance(chain[3], QuantizedConv) and chain[3].norm == "4"
    with torch.inference_mode():
        before = snr(chain(x), model(x))
        correct_bias_(chain, model, None if computed else [x])
        # A mean that is wrong by a batch norm would be heard.
        assert snr(chain(x), model(x)) > before - 1


class Disturbed(nn.Module):
    """A convolution whose input or shortcut is changed in place before what follows it, by ``kind``."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.kind = nn.BatchNorm2d(8), kind

    def forward(self, x):
        x = x * 1
        shortcut = F.relu(self.first(x)) * 2
        y = self.second(x)
        if self.kind == "before the norm":
            x.mul_(3)
        y = self.norm(y)
        if self.kind == "before the sum":
            shortcut -= 2
        y = y + shortcut
        if self.kind == "before the activation":
            shortcut.mul_(-4)
        return F.relu(y) + shortcut * 0


@pytest.mark.parametrize("kind", ["before the norm", "before the sum", "before the activation"])
def test_what_is_changed_in_place_between(kind):
    x = torch.randn(2, 8, 9, 7)
    model = settled(Disturbed(kind))
    chain = quantized(model, x)
    with torch.inference_mode():
        assert snr(chain(x), model(x)) > 25
