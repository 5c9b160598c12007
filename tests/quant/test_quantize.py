"""`quantize_` and `dequantize_`: every scheme against a simulation in float64, and what stays of a model."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

import fastnn
from fastnn.quant import (
    Float8WeightOnly,
    Int4WeightOnly,
    Int8Dynamic,
    Int8DynamicLinear,
    Int8Static,
    Int8StaticLinear,
    Int8WeightOnly,
    QuantizedLinear,
    QuantizedMultiheadAttention,
    WeightOnlyLinear,
    dequantize_,
    quantize_,
)

from . import simulation

# What every scheme but the static one is called with here, and how the simulation calls its weights.
SCHEMES = {
    "int8 dynamic": (Int8Dynamic(), {"kind": "int8"}),
    "int8": (Int8WeightOnly(), {"kind": "int8"}),
    "int8 groups": (Int8WeightOnly(group_size=16), {"kind": "int8", "group_size": 16}),
    "int4": (Int4WeightOnly(), {"kind": "int4", "group_size": 32}),
    "int4 rows": (Int4WeightOnly(group_size=None), {"kind": "int4"}),
    "uint4": (Int4WeightOnly(group_size=16, symmetric=False), {"kind": "uint4", "group_size": 16, "symmetric": False}),
    "float8": (Float8WeightOnly(), {"kind": "float8_e4m3fn"}),
}
#: The unit roundoff of the output's dtype; float32 also rounds in the sums.
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

schemes = pytest.mark.parametrize("scheme", SCHEMES)


def every_config(data):
    return {**{name: config for name, (config, _) in SCHEMES.items()}, "int8 static": Int8Static([data])}


def mlp(bias=True):
    return nn.Sequential(nn.Linear(64, 96, bias=bias), nn.ReLU(), nn.Linear(96, 10, bias=bias))


def check(output, expected, magnitude):
    error = (output.double() - expected).abs()
    bound = ROUNDOFF[output.dtype] * expected.abs() * 1.01 + 32 * 2.0**-24 * magnitude
    assert (error <= bound).all(), (error / bound).max()


def simulated(layer, config, description, x, observed=None):
    """What the layer's formula gives for x."""
    if isinstance(config, Int8Dynamic):
        x = simulation.dynamic_input(x)
    elif isinstance(config, Int8Static):
        x = simulation.static_input(x, *observed)
    else:
        x = simulation.as_numpy(x).astype("float64")
    return simulation.linear(x, simulation.weight(layer.weight, **description), layer.bias)


# ---- every scheme against the simulation -------------------------------------------------------------------------


@schemes
@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_scheme(scheme, dtype, bias):
    config, description = SCHEMES[scheme]
    layer = nn.Linear(96, 37, bias=bias).to(dtype)
    quantized = quantize_(copy.deepcopy(layer), config)
    assert isinstance(quantized, QuantizedLinear)
    for shape in [(1, 96), (17, 96), (3, 5, 96), (96,), (0, 96)]:
        x = (torch.randn(shape) * 3).to(dtype)
        output = quantized(x)
        assert output.dtype is dtype and output.shape == (*shape[:-1], 37)
        if x.numel():
            check(output, *simulated(layer, config, description, x))


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
def test_static_scheme(dtype):
    layer = nn.Linear(96, 37).to(dtype)
    data = [(torch.randn(5, 96) + 0.3).to(dtype) for _ in range(3)]
    quantized = quantize_(copy.deepcopy(layer), Int8Static(data))
    assert type(quantized) is Int8StaticLinear
    ends = torch.cat(data).float().aminmax()
    x = torch.randn(4, 96, dtype=dtype) * 2  # beyond what was seen: it saturates
    check(quantized(x), *simulated(layer, Int8Static(data), {"kind": "int8"}, x, [end.item() for end in ends]))


@schemes
def test_activation_in_the_same_call(scheme):
    config, description = SCHEMES[scheme]
    layer = fastnn.nn.Linear(64, 48)
    quantized = quantize_(copy.deepcopy(layer), config)
    x = torch.randn(7, 64)
    expected, magnitude = simulated(layer, config, description, x)
    check(quantized.forward_act(x, "relu"), expected.relu(), magnitude)
    expected = torch.nn.functional.gelu(expected)
    check(quantized.forward_act(x, "gelu"), expected, 2 * magnitude)


@schemes
def test_rows(scheme):
    quantized = quantize_(nn.Linear(64, 48), SCHEMES[scheme][0])
    x = torch.randn(7, 64)
    whole = quantized(x)
    for start, stop in [(0, 16), (16, 48), (5, 6)]:
        torch.testing.assert_close(quantized.forward_rows(x, start, stop), whole[:, start:stop], rtol=1e-6, atol=1e-6)


def test_infinite_and_nan_inputs():
    quantized = quantize_(nn.Linear(64, 48), Int8Dynamic())
    x = torch.randn(3, 64)
    x[0, 3], x[1, 5] = torch.inf, torch.nan
    zeroed = x.clone()
    zeroed[1, 5] = 0.0
    assert quantized(x).isfinite().all()
    assert torch.equal(quantized(x)[1:], quantized(zeroed)[1:])


def test_layers_of_an_mlp_run_with_their_activation():
    model = fastnn.nn.MLP(64, [96, 96], 10, activation="gelu").eval()
    quantized = quantize_(copy.deepcopy(model), Int8Dynamic())
    x = torch.randn(9, 64)
    called = []

    def count(module, args, output):
        called.append(module)

    at_once = quantized(x)
    for layer in quantized:
        layer.register_forward_hook(count)
    assert torch.allclose(quantized(x), at_once, rtol=1e-5, atol=1e-6)
    assert len(called) == 5
    assert not torch.equal(at_once, model(x))


# ---- attention and encoders --------------------------------------------------------------------------------------


def watch_linears(model):
    """What each quantized linear layer is called with, and what it returns."""
    calls = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):

            def note(module, args, output, name=name):
                calls.setdefault(name, []).append((args[0].detach().clone(), output.detach().clone()))

            module.register_forward_hook(note)
    return calls


def parts(model):
    """The weights and biases of all projections and linear layers of a float model, by the names that they have in the
    quantized one."""
    found = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            if module._qkv_same_embed_dim:
                found[f"{prefix}in_proj"] = (module.in_proj_weight, module.in_proj_bias)
            else:
                biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
                for letter, bias in zip("qkv", biases, strict=True):
                    found[f"{prefix}{letter}_proj"] = (getattr(module, f"{letter}_proj_weight"), bias)
        if isinstance(module, nn.Linear):
            found[name] = (module.weight, module.bias)
    return found


class Layer:
    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias


def check_all_linears(model, quantized, config, run):
    """Every quantized layer is called, and gives what the simulation gives of its input."""
    twin = copy.deepcopy(quantized)
    calls = watch_linears(twin)
    run(twin)
    expected = parts(model)
    assert set(calls) == set(expected)
    for name, entries in calls.items():
        for x, output in entries:
            check(output, *simulated(Layer(*expected[name]), config, {"kind": "int8"}, x))


def apart(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


ENCODER = {"d_model": 32, "nhead": 4, "dim_feedforward": 64, "batch_first": True}


@pytest.mark.parametrize("library", [nn, fastnn.nn], ids=["torch", "fastnn"])
@pytest.mark.parametrize("norm_first", [False, True])
@torch.no_grad()
def test_encoder_in_eval_mode_runs_the_quantized_layers(library, norm_first):
    layer = library.TransformerEncoderLayer(**ENCODER, norm_first=norm_first, activation="gelu")
    model = library.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    x = torch.randn(3, 11, 32)
    padding = torch.arange(11) >= torch.tensor([[11], [7], [4]])
    quantized = quantize_(copy.deepcopy(model), Int8Dynamic())
    for mask in (None, padding):
        check_all_linears(model, quantized, Int8Dynamic(), lambda m, mask=mask: m(x, src_key_padding_mask=mask))
        expected, found = model(x, src_key_padding_mask=mask), quantized(x, src_key_padding_mask=mask)
        assert 1e-4 < apart(found, expected) < 0.02
    # Weights alone: the float model with these weights is the simulation.
    quantized = quantize_(copy.deepcopy(model), Int4WeightOnly(16))
    same_weights = dequantize_(copy.deepcopy(quantized))
    assert apart(quantized(x), same_weights(x)) < 1e-6 < 1e-2 < apart(quantized(x), model(x))


@torch.no_grad()
def test_parts_of_an_encoder():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(**ENCODER), 3).eval()
    x = torch.randn(3, 11, 32)
    padding = torch.arange(11) >= torch.tensor([[11], [7], [4]])
    choices = [
        {"only": "layers.1.linear1"},
        {"only": "layers.0.linear2"},
        {"only": "*.self_attn"},
        {"skip": "*.self_attn"},
    ]
    choices += [{"only": "*.out_proj"}, {"skip": "*.out_proj"}, {"only": "layers.2"}]
    for choice in choices:
        quantized = quantize_(copy.deepcopy(model), Int4WeightOnly(16), **choice)
        same = dequantize_(copy.deepcopy(quantized))
        assert {type(m) for m in same.modules()} == {type(m) for m in model.modules()}
        for mask in (None, padding):
            expected = same(x, src_key_padding_mask=mask)
            assert apart(quantized(x, src_key_padding_mask=mask), expected) < 1e-6, choice
            assert apart(model(x, src_key_padding_mask=mask), expected) > 1e-3
    quantized = quantize_(copy.deepcopy(model), Int8Dynamic(), only="*.out_proj")
    assert type(quantized.layers[0].self_attn.out_proj) is Int8DynamicLinear
    assert type(quantized.layers[0].self_attn.in_proj) is fastnn.nn.Linear
    assert type(quantized.layers[0].linear1) is nn.Linear


@pytest.mark.parametrize(
    "kwargs", [{}, {"kdim": 24, "vdim": 40}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}]
)
@pytest.mark.parametrize("library", [nn, fastnn.nn], ids=["torch", "fastnn"])
@torch.no_grad()
def test_attention(library, kwargs):
    model = library.MultiheadAttention(32, 4, **kwargs).eval()
    kdim, vdim = kwargs.get("kdim", 32), kwargs.get("vdim", 32)
    query, key, value = torch.randn(5, 2, 32), torch.randn(7, 2, kdim), torch.randn(7, 2, vdim)
    mask = torch.rand(5, 7) < 0.3
    quantized = quantize_(copy.deepcopy(model), Int8WeightOnly())
    assert type(quantized) is QuantizedMultiheadAttention
    same = dequantize_(copy.deepcopy(quantized))
    assert type(same) is type(model) and same.state_dict().keys() == model.state_dict().keys()
    calls = [((query, key, value), {}), ((query, key, value), {"attn_mask": mask, "average_attn_weights": False})]
    calls += [((query, key, value), {"need_weights": False})]
    if kdim == vdim:
        calls += [((query, key, key), {}), ((query, query, query), {"need_weights": False})]
    for args, options in calls:
        for found, expected in zip(quantized(*args, **options), same(*args, **options), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # In self-attention every projection is a call of a quantized layer.
    if not kwargs.get("kdim"):
        quantized = quantize_(copy.deepcopy(model), Int8Dynamic())
        check_all_linears(model, quantized, Int8Dynamic(), lambda m: m(query, query, query))


@torch.no_grad()
def test_static_cross_attention_is_calibrated():
    model = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True).eval()
    data = [(torch.randn(2, 5, 32), torch.randn(2, 7, 32) * 2) for _ in range(3)]
    quantized = quantize_(copy.deepcopy(model), Int8Static(data))
    seen = quantized.multihead_attn.in_proj
    # Queries and keys together.
    assert seen.input_scale * 255 >= 2 * 2.5
    assert apart(quantized(*data[0]), model(*data[0])) < 0.05


@torch.no_grad()
def test_model_of_transformers_with_conv1d():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(50, (2, 9))
    for converted in (False, True):
        before = fastnn.convert(copy.deepcopy(model)) if converted else copy.deepcopy(model)
        quantized = quantize_(copy.deepcopy(before), Int4WeightOnly(16))
        block = quantized.transformer.h[0]
        assert type(block.attn.c_attn) is type(block.mlp.c_fc) is type(quantized.lm_head) is WeightOnlyLinear
        same = dequantize_(pickle.loads(pickle.dumps(quantized)))
        assert [type(m) for m in same.modules()] == [type(m) for m in before.modules()]
        assert apart(quantized(tokens).logits, same(tokens).logits) < 1e-5
        assert apart(quantized(tokens).logits, model(tokens).logits) > 1e-3
        expected = simulation.weight(model.transformer.h[0].mlp.c_fc.weight.t(), "int4", 16)
        assert torch.equal(
            same.transformer.h[0].mlp.c_fc.weight.t().double(), torch.from_numpy(expected).float().double()
        )
        assert type(same.transformer.h[0].mlp.c_fc.weight) is nn.Parameter


# ---- saving and loading ------------------------------------------------------------------------------------------


def rebuilt(name, model, x):
    """A model of other weights, quantized the same way."""
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.normal_()
    return quantize_(fresh, every_config(x)[name])


@pytest.mark.parametrize("name", every_config(None))
def test_save_and_load(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, x = mlp(), torch.randn(5, 64)
    quantized = quantize_(copy.deepcopy(model), every_config(x)[name])
    expected = quantized(x)

    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    file.seek(0)
    found = rebuilt(name, model, x)
    assert not torch.equal(found(x), expected)
    found.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(found(x), expected)
    assert found[0].weight_error is None

    safetensors.save_file(quantized.state_dict(), tmp_path / "model.safetensors")
    found = rebuilt(name, model, x)
    found.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    assert torch.equal(found(x), expected)
    found = rebuilt(name, model, x)
    found.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"), assign=True)
    assert torch.equal(found(x), expected)

    for copied in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert torch.equal(copied(x), expected)
        assert copied[0].codes.data_ptr() != quantized[0].codes.data_ptr()
        assert type(dequantize_(copied)[0]) is nn.Linear


def test_static_layers_need_no_data_once_they_are_saved():
    """All that the state has as integers, and nothing else, whatever its names: attention, a layer by itself, the model."""
    for model, x in (
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(**ENCODER), 2).eval(), torch.randn(2, 5, 32)),
        (nn.TransformerDecoderLayer(**ENCODER).eval(), torch.randn(2, 5, 32)),
        (nn.Linear(8, 3), torch.randn(2, 8)),
    ):
        inputs = (x, x) if isinstance(model, nn.TransformerDecoderLayer) else (x,)
        chosen = {"skip": "layers.0.linear2"} if isinstance(model, nn.TransformerEncoder) else {}
        quantized = quantize_(copy.deepcopy(model), Int8Static([inputs]), **chosen)
        state = quantized.state_dict()
        found = quantize_(copy.deepcopy(model), Int8Static.from_state_dict(state))
        for name, buffer in found.named_buffers():
            torch.testing.assert_close(buffer, state[name])
        for parameter in found.parameters():
            parameter.data.normal_()
        found.load_state_dict(state)
        assert torch.equal(found(*inputs), quantized(*inputs))
        assert [type(m) for m in found.modules()] == [type(m) for m in quantized.modules()]


def test_a_state_that_does_not_fit():
    state = quantize_(mlp(), Int8Static(torch.randn(5, 64))).state_dict()
    with pytest.raises(TypeError, match="state_dict must be a mapping of tensors, got list"):
        Int8Static.from_state_dict(list(state))
    for config in (Int8Dynamic(), None):
        other = mlp() if config is None else quantize_(mlp(), config)
        with pytest.raises(ValueError, match="state_dict: expected that of a model quantized with Int8Static"):
            Int8Static.from_state_dict(other.state_dict())
    for value in (torch.tensor(0.0), torch.tensor(math.nan), torch.ones(2)):
        with pytest.raises(ValueError, match=r"state_dict: expected one positive number as '0\.input_scale'"):
            Int8Static.from_state_dict({**state, "0.input_scale": value})
    with pytest.raises(ValueError, match=r"expected 0 to 255 as '0\.input_zero_point', got 256"):
        Int8Static.from_state_dict({**state, "0.input_zero_point": torch.tensor(256)})
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(64, 96)))
    before = picture(model)
    with pytest.raises(ValueError, match="nothing to quantize"):
        quantize_(model, Int8Static.from_state_dict(state))
    same_picture(before, picture(model))


def test_attention_saves_and_loads():
    model = nn.TransformerEncoderLayer(**ENCODER).eval()
    x = torch.randn(2, 5, 32)
    quantized = quantize_(copy.deepcopy(model), Int8Dynamic())
    found = rebuilt("int8 dynamic", model, x)
    found.load_state_dict(quantized.state_dict())
    assert torch.equal(found(x), quantized(x))
    assert torch.equal(copy.deepcopy(quantized)(x), quantized(x))


def test_weights_of_another_kind_are_refused():
    model = mlp()
    with pytest.raises(
        RuntimeError, match=r"0\.weight: expected int8, got float32: the weights of a model that is not quan"
    ):
        quantize_(copy.deepcopy(model), Int8Dynamic()).load_state_dict(model.state_dict())
    int4 = quantize_(copy.deepcopy(model), Int4WeightOnly())
    state = quantize_(copy.deepcopy(model), Int4WeightOnly(group_size=16)).state_dict()
    before = copy.deepcopy(int4.state_dict())
    with pytest.raises(RuntimeError, match=r"0\.weight_scale: expected the shape \(96, 2\), got \(96, 4\).*group_size"):
        int4.load_state_dict(state)
    assert all(torch.equal(int4.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(RuntimeError, match=r"0\.weight: expected int8, got uint8: quantized another way"):
        quantize_(copy.deepcopy(model), Int8WeightOnly()).load_state_dict(int4.state_dict())
    with pytest.raises(RuntimeError, match=r"expected the shape"):
        quantize_(nn.Linear(32, 10), Int8Dynamic()).load_state_dict(
            quantize_(nn.Linear(64, 10), Int8Dynamic()).state_dict()
        )
    with pytest.raises(RuntimeError, match="input_scale"):
        quantize_(copy.deepcopy(model), Int8Static([torch.randn(2, 64)])).load_state_dict(
            quantize_(copy.deepcopy(model), Int8Dynamic()).state_dict()
        )


@pytest.mark.parametrize(
    "config", [Int8Dynamic(), Int4WeightOnly(group_size=16), Float8WeightOnly()], ids=lambda c: type(c).__name__
)
def test_code_around_a_layer_reads_its_weight(config):
    """Mamba and the vision transformers cast to the weight's dtype, Swin and WavLM multiply with it themselves."""

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 48)

        def forward(self, x):
            called = self.layer(x.to(self.layer.weight.dtype))
            return called, nn.functional.linear(x, self.layer.weight, self.layer.bias), x @ self.layer.weight.t()

    model = quantize_(Reader().to(torch.bfloat16), config)
    weight = model.layer.weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((48, 64), torch.bfloat16, "cpu")
    assert model.layer.codes.dtype is model.state_dict()["layer.weight"].dtype is not weight.dtype
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    _, outside, product = model(x)
    expected = copy.deepcopy(model.layer).dequantized()
    torch.testing.assert_close(outside, expected(x), rtol=0, atol=0)
    torch.testing.assert_close(product, x @ expected.weight.t(), rtol=0, atol=0)
    (ours,) = torch.autograd.grad(outside.sum(), x)
    torch.testing.assert_close(ours, torch.autograd.grad(expected(x).sum(), x)[0], rtol=0, atol=0)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)[1], outside, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="codes"):
        model.layer.weight.neg_()


def test_a_change_of_the_weight_is_seen():
    quantized = quantize_(nn.Linear(64, 48), Int8Dynamic())
    x = torch.randn(33, 64)
    before = quantized(x)
    quantized.codes.neg_()
    quantized.bias.neg_()
    torch.testing.assert_close(quantized(x), -before)
    quantized.weight = -quantized.codes
    quantized.bias.neg_()
    torch.testing.assert_close(quantized(x), before)


@pytest.mark.parametrize("name", every_config(None))
def test_dtype_of_the_activations(name):
    model, x = mlp(), torch.randn(5, 64)
    quantized = quantize_(copy.deepcopy(model), every_config(x)[name])
    before = {key: value.clone() for key, value in quantized.state_dict().items()}
    half = copy.deepcopy(quantized).to(torch.bfloat16)
    for key, value in half.state_dict().items():
        if key.endswith("bias"):
            assert value.dtype is torch.bfloat16
        else:
            assert value.dtype is before[key].dtype and torch.equal(value.float(), before[key].float())
    y = half(x.bfloat16())
    assert y.dtype is torch.bfloat16 and apart(y.float(), quantized(x)) < 0.02
    assert dequantize_(half)[0].weight.dtype is torch.bfloat16
    # Activations alone in another dtype.
    assert quantized(x.half()).dtype is torch.float16


def test_meta_model():
    with torch.device("meta"):
        empty = mlp()
    quantize_(empty, Int4WeightOnly())
    assert empty[0].codes.is_meta and empty[0].codes.shape == (96, 32)
    assert empty[0].weight.is_meta and empty[0].weight.shape == (96, 64)
    full = quantize_(mlp(), Int4WeightOnly())
    empty.load_state_dict(full.state_dict(), assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(empty(x), full(x))


# ---- what stays, and what comes back -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", every_config(None))
def test_dequantize(name):
    for model in (mlp(), fastnn.convert(mlp()), mlp(bias=False)):
        x = torch.randn(4, 64)
        config = every_config(x)[name]
        description = SCHEMES[name][1] if name in SCHEMES else {"kind": "int8"}
        quantized = quantize_(copy.deepcopy(model), config)
        assert not list(quantized.parameters())
        again = dequantize_(quantized)
        assert again is quantized
        assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
        assert again.state_dict().keys() == model.state_dict().keys()
        for found, layer in zip(again[::2], model[::2], strict=True):
            expected = torch.from_numpy(simulation.weight(layer.weight, **description)).float()
            assert torch.equal(found.weight, expected) and found.weight.requires_grad
            assert layer.bias is None or torch.equal(found.bias, layer.bias)
            assert (found.in_features, found.out_features) == (layer.in_features, layer.out_features)
            assert set(vars(found)) == set(vars(layer))


def test_modules_stay_the_objects_that_they_were():
    model = nn.Sequential(mlp(), nn.MultiheadAttention(64, 4))
    modules = dict(model.named_modules())
    layer = model[0][0]
    layer.my_own = "remark"
    seen = []
    handle = layer.register_forward_hook(lambda *args: seen.append(1))
    layer.eval()
    quantize_(model, Int8Dynamic())
    assert model[0][0] is layer and type(layer) is Int8DynamicLinear and not layer.training and model.training
    assert layer.my_own == "remark"
    model[0](torch.randn(1, 64))
    assert seen == [1]
    dequantize_(model)
    assert dict(model.named_modules()).keys() == modules.keys()
    assert all(model.get_submodule(name) is module for name, module in modules.items() if "out_proj" not in name)
    model[0](torch.randn(1, 64))
    assert seen == [1, 1]
    handle.remove()
    model[0](torch.randn(1, 64))
    assert seen == [1, 1]


def test_shared_layers_and_tied_weights():
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(16, 4))})
    quantize_(model, Int8WeightOnly())
    assert model["a"] is model["b"][0] and type(model["a"]) is WeightOnlyLinear
    gpt = fastnn.models.GPT(31, 8, n_layer=1, n_head=2, n_embd=16, dropout=0.0).eval()
    table = gpt.transformer.wte.weight
    quantize_(gpt, Int8Dynamic())
    assert gpt.transformer.wte.weight is table and type(gpt.lm_head) is Int8DynamicLinear
    tokens = torch.randint(31, (2, 8))
    assert gpt(tokens).shape == (2, 8, 31)
    assert gpt.generate(tokens[:, :3], 4).shape == (2, 7)


def test_layers_that_are_left():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(
        Doubled(8, 8),
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        nn.Linear(8, 8),
        nn.Conv2d(3, 4, 3),
        nn.Embedding(5, 8),
    )
    kinds = [type(module) for module in model]
    quantize_(model, Int8Dynamic())
    assert [type(module) for module in model] == [*kinds[:2], Int8DynamicLinear, *kinds[3:]]
    rows = {row.name: row for row in fastnn.report(model).rows}
    assert rows["2"].status == "quantized" and rows["0"].status == "kept"


def test_gradients_reach_the_input_of_weight_only_layers():
    quantized = quantize_(mlp(), Int4WeightOnly())
    same = dequantize_(copy.deepcopy(quantized))
    x = torch.randn(5, 64, requires_grad=True)
    (found,) = torch.autograd.grad(quantized(x).square().sum(), x)
    (expected,) = torch.autograd.grad(same(x).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_inference_mode_leaves_nothing_behind():
    with torch.inference_mode():
        quantized = quantize_(mlp(), Int8Dynamic())
        quantized(torch.randn(40, 64))
    x = torch.randn(40, 64, requires_grad=True)
    quantized(x).sum().backward()
    assert x.grad.shape == x.shape


@schemes
def test_compiled(scheme):
    model = fastnn.nn.MLP(64, [96], 10).eval()
    quantized = quantize_(model, SCHEMES[scheme][0])
    x = torch.randn(5, 64)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), quantized(x), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_report_has_errors_and_bytes():
    model = mlp()
    quantized = quantize_(copy.deepcopy(model), Int4WeightOnly())
    row = next(row for row in fastnn.report(quantized).rows if row.name == "0")
    assert (row.status, row.kind, row.replacement) == ("quantized", "torch.nn.Linear", "fastnn.quant.WeightOnlyLinear")
    w = model[0].weight.detach().double().numpy()
    error = ((simulation.weight(model[0].weight, "int4", 32) - w) ** 2).sum() ** 0.5 / (w**2).sum() ** 0.5
    assert row.error == pytest.approx(error, rel=1e-6)
    assert row.bytes == 96 * 32 + 96 * 2 * 4 + 96 * 4
    assert row.parameters == 96 * 64 + 96
    text = str(fastnn.report(quantized))
    assert "int4 weight, groups of 32; error " in text and f"{row.bytes:,} bytes" in text
    assert fastnn.convert(quantized, strict=True)[0] is quantized[0]
    assert type(fastnn.revert(quantized)[0]) is WeightOnlyLinear


# ---- calibration -------------------------------------------------------------------------------------------------


class Named(nn.Module):
    """Layers of which one runs only when it is asked for."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 4)
        self.unused = nn.Linear(8, 4)

    def forward(self, x, scale=1.0, *, alternative=False):
        x = self.norm(self.first(x) * scale)
        return self.unused(x) if alternative else self.second(x)


def test_calibration_takes_tensors_arguments_and_keywords():
    x = torch.randn(3, 8)
    scales = []
    for data in [[x], [(x,)], [[x]], [{"x": x}], x, {"x": x}, iter([x]), ({"x": x} for _ in range(2))]:
        model = quantize_(Named(), Int8Static(data), skip="unused")
        scales.append(model.first.input_scale.item())
    assert len(set(scales)) == 1
    expected = (x.amax().clamp(min=0) / torch.tensor(255.0) - x.amin().clamp(max=0) / torch.tensor(255.0)).item()
    assert scales[0] == expected
    model = quantize_(Named(), Int8Static([(x, 100.0)]), only="second")
    assert type(model.second) is Int8StaticLinear


def test_calibration_leaves_mode_statistics_and_gradients():
    model = Named().train()
    model.second.eval()
    state = copy.deepcopy(model.norm.state_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    quantize_(model, Int8Static([torch.randn(3, 8)]), skip="unused")
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(model.norm.state_dict()[name], value) for name, value in state.items())
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---- bad input ---------------------------------------------------------------------------------------------------


def picture(model):
    """All that makes a model what it is: objects, classes, tensors, hooks, modes."""
    found = []
    for name, module in model.named_modules():
        tensors = [
            (k, v, v.clone()) for k, v in (*module._parameters.items(), *module._buffers.items()) if v is not None
        ]
        found.append((name, module, type(module), dict(vars(module)), list(module._modules), tensors))
        found.append([dict(v) for v in vars(module).values() if isinstance(v, dict) and not isinstance(v, nn.Module)])
    return found


def same_picture(a, b):
    for x, y in zip(a, b, strict=True):
        if isinstance(x, list):
            continue
        assert x[0] == y[0] and x[1] is y[1] and x[2] is y[2] and x[4] == y[4]
        assert x[3].keys() == y[3].keys()
        assert all(v is y[3][k] or v == y[3][k] for k, v in x[3].items() if not isinstance(v, dict))
        for (k, v, value), (k2, v2, value2) in zip(x[5], y[5], strict=True):
            assert k == k2 and v is v2 and torch.equal(value, value2)


class OwnEncoderLayer(nn.TransformerEncoderLayer):
    """torch's forward, which reads the weights of the layers in eval mode."""


def raising():
    yield torch.randn(3, 8)
    raise ZeroDivisionError("the data's own")


def encoder_and(layer):
    return nn.ModuleDict({"encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(**ENCODER), 2), "other": layer})


FAILURES = {
    "twice": (
        lambda: quantize_(mlp(), Int8Dynamic()),
        Int8WeightOnly(),
        ValueError,
        "0 is a Int8DynamicLinear already",
    ),
    "groups": (mlp, Int4WeightOnly(40), ValueError, r"0: its 64 inputs do not divide into groups of group_size=40"),
    "odd": (
        lambda: encoder_and(nn.Linear(7, 4)),
        Int4WeightOnly(None),
        ValueError,
        "other: its 7 inputs are odd in number",
    ),
    "long rows": (
        lambda: encoder_and(nn.Linear(65_794, 1)),
        Int8Dynamic(),
        ValueError,
        "other: its 65,794 inputs are more than the 65,793",
    ),
    "float64": (
        lambda: encoder_and(nn.Linear(8, 4).double()),
        Int8Dynamic(),
        ValueError,
        "other: its weight is float64",
    ),
    "subclass of an encoder layer": (
        lambda: nn.Sequential(nn.Linear(32, 32), OwnEncoderLayer(**ENCODER)),
        Int8Dynamic(),
        ValueError,
        "OwnEncoderLayer, which in eval mode",
    ),
    "subclass in an encoder": (
        lambda: nn.TransformerEncoder(OwnEncoderLayer(**ENCODER), 2),
        Int8Dynamic(),
        ValueError,
        "OwnEncoderLayer, which in eval mode",
    ),
    "nothing": (lambda: nn.Sequential(nn.ReLU(), nn.Embedding(3, 4)), Int8Dynamic(), ValueError, "nothing to quantize"),
    "no data": (Named, Int8Static([]), ValueError, "got none"),
    "unused": (Named, Int8Static([torch.randn(3, 8)]), ValueError, "unused saw no finite value"),
    "not finite": (Named, Int8Static([torch.full((3, 8), torch.nan)]), ValueError, "first saw no finite value"),
    "bad input": (Named, Int8Static([torch.randn(3, 9)]), RuntimeError, "shape|size"),
    "input of no known kind": (Named, Int8Static(["text"]), TypeError, "expected a tensor, a tuple"),
    "the data's own": (Named, Int8Static(raising()), ZeroDivisionError, "own"),
    "no observer": (Named, Int8Static([torch.randn(3, 8)], observer=lambda: 3), TypeError, "it made int"),
    "config": (mlp, "int8", TypeError, "config must be one of"),
    "class": (mlp, Int8Dynamic, TypeError, r"make one: Int8Dynamic\(\)"),
    "encoder in calibration": (
        lambda: nn.TransformerEncoderLayer(**ENCODER),
        Int8Static([torch.randn(2, 3, 31)]),
        (RuntimeError, AssertionError),
        "shape|size|dimension",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures_leave_the_model(case):
    make, config, error, message = FAILURES[case]
    model = make()
    before = picture(model)
    with pytest.raises(error, match=message):
        quantize_(model, config)
    same_picture(before, picture(model))


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"quantize_: model must be a torch\.nn.Module, got int"):
        quantize_(3, Int8Dynamic())
    with pytest.raises(TypeError, match="dequantize_: model must be"):
        dequantize_(3)
    with pytest.raises(ValueError, match="quantize_: only='nowhere' matches the name of no module"):
        quantize_(mlp(), Int8Dynamic(), only="nowhere")
    with pytest.raises(TypeError, match="quantize_: skip names int"):
        quantize_(mlp(), Int8Dynamic(), skip=int)
    for size in (0, -1, 2.0, True, "32"):
        with pytest.raises(ValueError, match="Int4WeightOnly: group_size must be a positive integer or None"):
            Int4WeightOnly(size)
        with pytest.raises(ValueError, match="Int8WeightOnly: group_size"):
            Int8WeightOnly(size)
    with pytest.raises(TypeError, match="calibration_data must be an iterable of inputs, got int"):
        Int8Static(3)
    with pytest.raises(
        ValueError, match="observer must be one of 'minmax', 'moving_average', 'percentile', 'mse' or a cal"
    ):
        Int8Static([], "histogram")


def test_twice_where_it_is_another_layer():
    model = quantize_(mlp(), Int8Dynamic(), only="0")
    quantize_(model, Int4WeightOnly(), skip="0")
    assert [type(m) for m in model] == [Int8DynamicLinear, nn.ReLU, WeightOnlyLinear]


def test_bad_layers():
    q, scale = torch.zeros(4, 8, dtype=torch.int8), torch.ones(4)
    with pytest.raises(ValueError, match=r"WeightOnlyLinear: weight: expected two dimensions of torch\.int8 for int8"):
        WeightOnlyLinear(q[0], scale)
    with pytest.raises(ValueError, match="weight_dtype: expected int8, int4, uint4 or float8, got uint8"):
        WeightOnlyLinear(q.to(torch.uint8), scale)
    with pytest.raises(ValueError, match="weight_dtype: expected one of"):
        WeightOnlyLinear(q.int(), scale)
    with pytest.raises(ValueError, match=r"weight: expected two dimensions of torch\.uint8 for int4"):
        WeightOnlyLinear(q, scale, weight_dtype="int4")
    with pytest.raises(ValueError, match=r"group_size: expected a divisor of 8, got 3"):
        WeightOnlyLinear(q, scale, group_size=3)
    with pytest.raises(ValueError, match=r"weight_scale: expected the shape \(4,\), got \(5,\)"):
        WeightOnlyLinear(q, torch.ones(5))
    with pytest.raises(ValueError, match=r"weight_zero_point: expected the shape \(4,\), got \(3,\)"):
        WeightOnlyLinear(q, scale, torch.zeros(3))
    with pytest.raises(ValueError, match=r"bias: expected the shape \(4,\), got \(3,\)"):
        WeightOnlyLinear(q, scale, bias=torch.zeros(3))
    with pytest.raises(ValueError, match="Int8DynamicLinear: weight: expected int8 with one scale a row"):
        Int8DynamicLinear(q, torch.ones(4, 2), group_size=4)
    with pytest.raises(ValueError, match="input_scale: expected no dimensions"):
        Int8StaticLinear(q, scale, input_scale=torch.ones(1), input_zero_point=torch.tensor(0))
