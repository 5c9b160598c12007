"""Layers of torch.ao and torchao as fastnn's."""

from __future__ import annotations

import copy
import logging
import types
import warnings

import pytest
import torch
from torch import nn

from fastnn.quant import Int8DynamicLinear, Int8StaticLinear, WeightOnlyLinear, dequantize_, from_torch_

from . import simulation


def mlp(bias=True):
    return nn.Sequential(nn.Linear(64, 96, bias=bias), nn.ReLU(), nn.Linear(96, 10, bias=bias))


def by_torch(model, per_channel=False, dtype=torch.qint8):
    import torch.ao.quantization as ao

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if per_channel:
            return ao.quantize_dynamic(model, {nn.Linear: ao.per_channel_dynamic_qconfig})
        return ao.quantize_dynamic(model, {nn.Linear}, dtype=dtype)


@pytest.mark.skipif(not torch.backends.quantized.supported_engines[1:], reason="torch has no quantized engine here")
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_dynamic_layers_of_torch(per_channel, bias):
    quantized = by_torch(mlp(bias), per_channel)
    x = torch.randn(1, 64)
    theirs = quantized(x)
    weights = [layer.weight().dequantize() for layer in quantized[::2]]
    biases = [layer.bias() for layer in quantized[::2]]
    first = quantized[0]
    found = from_torch_(quantized)
    assert found[0] is first and [type(m) for m in found] == [Int8DynamicLinear, nn.ReLU, Int8DynamicLinear]
    for layer, weight in zip(found[::2], weights, strict=True):
        torch.testing.assert_close(layer.dequantized_weight(), weight, rtol=1e-6, atol=0)
    # Of one row, torch's scale is that of the row: it has 7 bits, ours 8.
    ours = found(x)
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
    y, _ = simulation.linear(simulation.dynamic_input(x), weights[0].double().numpy(), biases[0])
    torch.testing.assert_close(found[0](x).double(), y, rtol=1e-5, atol=1e-5)
    again = dequantize_(found)
    assert [type(m) for m in again] == [nn.Linear, nn.ReLU, nn.Linear]
    assert set(vars(again[0])) == set(vars(nn.Linear(2, 2)))


def test_what_cannot_be_read():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    with pytest.raises(ValueError, match="from_torch_: no layer that torch or torchao has quantized"):
        from_torch_(model)
    with pytest.raises(TypeError, match="from_torch_: model must be a"):
        from_torch_(3)
    if torch.backends.quantized.supported_engines[1:]:
        half = nn.Sequential(by_torch(mlp()), by_torch(mlp(), dtype=torch.float16))
        kinds = [type(m) for m in half.modules()]
        with pytest.raises(ValueError, match=r"from_torch_: 1\.0: expected a qint8 weight, got .*float16"):
            from_torch_(half)
        assert [type(m) for m in half.modules()] == kinds


def by_torchao(model, config, **options):
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torchao = pytest.importorskip("torchao.quantization")
            for name, value in options.items():
                if isinstance(value, tuple):
                    options[name] = getattr(torchao, value[0])(*value[1:])
                elif isinstance(value, str):
                    options[name] = getattr(torchao.MappingType, value)
            torchao.quantize_(model, getattr(torchao, config)(**options))
            return model
    finally:
        logging.disable(logging.NOTSET)


TORCHAO = {
    "int8 weights": (("Int8WeightOnlyConfig", {}), WeightOnlyLinear, "int8"),
    "int8 dynamic": (("Int8DynamicActivationInt8WeightConfig", {}), Int8DynamicLinear, "int8"),
    "int8 static": (
        ("Int8StaticActivationInt8WeightConfig", {"act_quant_scale": torch.tensor(0.03)}),
        Int8StaticLinear,
        "int8",
    ),
    "int4 groups": (
        ("IntxWeightOnlyConfig", {"weight_dtype": torch.int4, "granularity": ("PerGroup", 32)}),
        WeightOnlyLinear,
        "int4",
    ),
    "int4 asymmetric": (
        (
            "IntxWeightOnlyConfig",
            {"weight_dtype": torch.int4, "granularity": ("PerGroup", 16), "mapping_type": "ASYMMETRIC"},
        ),
        WeightOnlyLinear,
        "int4",
    ),
    "int3 rows": (
        ("IntxWeightOnlyConfig", {"weight_dtype": torch.int3, "granularity": ("PerAxis", 0)}),
        WeightOnlyLinear,
        "int4",
    ),
    "int6 rows": (
        ("IntxWeightOnlyConfig", {"weight_dtype": torch.int6, "granularity": ("PerAxis", 0)}),
        WeightOnlyLinear,
        "int8",
    ),
    "int4, inputs too": (
        ("Int8DynamicActivationIntxWeightConfig", {"weight_dtype": torch.int4}),
        WeightOnlyLinear,
        "int4",
    ),
    "float8": (("Float8WeightOnlyConfig", {}), WeightOnlyLinear, "float8_e4m3fn"),
}


@pytest.mark.parametrize("name", TORCHAO)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_torchao(name, dtype):
    (config, options), kind, scheme = TORCHAO[name]
    model = by_torchao(mlp().to(dtype), config, **copy.deepcopy(options))
    x = torch.randn(5, 64).to(dtype)
    weight = model[0].weight.dequantize().detach().float()
    theirs = None if kind is Int8StaticLinear else model(x)  # torchao's own fails on a CPU
    from_torch_(model)
    assert type(model[0]) is kind and model[0].weight_dtype == scheme
    torch.testing.assert_close(model[0].dequantized_weight().to(dtype).float(), weight, rtol=0, atol=0)
    ours = model(x)
    assert ours.dtype is dtype
    if theirs is not None:
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
    else:
        # Symmetric int8 of torchao, the same numbers as uint8 around 128.
        codes = (x.float() / 0.03).round().clamp(-128, 127) * 0.03
        expected = codes @ weight.t() + model[0].bias
        torch.testing.assert_close(model[0](x).float(), expected.float(), rtol=1e-2, atol=1e-2)
    assert type(dequantize_(model)[0]) is nn.Linear and model[0].weight.dtype is dtype


# ---- torchao's older tensors: AffineQuantizedTensor in its plain layout -------------------------------------------


class Affine(torch.Tensor):
    """The attributes of torchao's AffineQuantizedTensor that say how it lies (torchao/dtypes/affine_quantized_tensor.py)."""

    @staticmethod
    def __new__(cls, codes, *args, shape=None, dtype=torch.float32, **kwargs):
        return torch.Tensor._make_wrapper_subclass(cls, shape or codes.shape, dtype=dtype)

    def __init__(
        self, codes, scale, zero_point, block_size, quant_min=None, quant_max=None, domain="INT", shape=None, dtype=None
    ):
        self.tensor_impl = types.SimpleNamespace(get_plain=lambda: (codes, scale, zero_point))
        self.block_size = block_size
        self.quant_min, self.quant_max = quant_min, quant_max
        self.zero_point_domain = types.SimpleNamespace(name=domain)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


def layer_of(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return nn.Sequential(layer)


def test_affine_tensors():
    codes = torch.randint(-128, 128, (6, 32), dtype=torch.int8)
    scale = torch.rand(6, 1) + 0.1
    model = from_torch_(layer_of(Affine(codes, scale, torch.zeros(6, 1, dtype=torch.int64), (1, 32))))
    assert type(model[0]) is WeightOnlyLinear and torch.equal(model[0].codes, codes)
    assert model[0].weight_zero_point is None
    torch.testing.assert_close(model[0].dequantized_weight(), codes * scale)

    codes = torch.randint(0, 16, (6, 32), dtype=torch.int32)
    scale, zero = torch.rand(6, 4).bfloat16() + 0.1, torch.randint(0, 16, (6, 4))
    model = from_torch_(layer_of(Affine(codes, scale, zero, (1, 8), 0, 15)))
    assert model[0].weight_dtype == "uint4" and model[0].group_size == 8
    expected = (codes.view(6, 4, 8) - zero[..., None]) * scale.float()[..., None]
    torch.testing.assert_close(model[0].dequantized_weight(), expected.view(6, 32))

    # Of uint8, and of an odd number of four bits.
    for shape, most in (((6, 32), 255), ((6, 31), 15)):
        codes = torch.randint(0, most + 1, shape, dtype=torch.uint8)
        scale, zero = torch.rand(6, 1) + 0.1, torch.randint(0, most + 1, (6, 1))
        model = from_torch_(layer_of(Affine(codes, scale, zero, (1, shape[1]), 0, most)))
        assert model[0].weight_dtype == "int8"
        torch.testing.assert_close(model[0].dequantized_weight(), (codes.int() - zero) * scale)
        assert model(torch.randn(2, shape[1])).shape == (2, 6)

    # One scale for all.
    codes = torch.randint(-128, 128, (6, 31), dtype=torch.int8)
    model = from_torch_(layer_of(Affine(codes, torch.tensor(0.5), None, (6, 31), domain="NONE")))
    torch.testing.assert_close(model[0].dequantized_weight(), codes * 0.5)


def test_layouts_that_cannot_be_read():
    codes, scale = torch.zeros(6, 32, dtype=torch.int8), torch.ones(6, 1)
    bad = {
        "zero points are no integers": Affine(codes, scale, torch.zeros(6, 1), (1, 32), domain="FLOAT"),
        "blocks within one row": Affine(codes, torch.ones(3, 1), None, (2, 32)),
        r"its values in the shape of the weight, \(6, 32\), got \(6, 16\)": Affine(
            codes[:, :16], scale, None, (1, 32), shape=(6, 32)
        ),
        "integers of at most 8 bits": Affine(codes.int(), scale, None, (1, 32), -1000, 1000),
        "integers or float8": Affine(codes.float(), scale, None, (1, 32)),
    }
    for message, weight in bad.items():
        model = layer_of(weight)
        with pytest.raises(ValueError, match=message):
            from_torch_(model)
        assert type(model[0]) is nn.Linear and model[0].weight is not None
