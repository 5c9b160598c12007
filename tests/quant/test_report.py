"""`fastnn.quant.report`, against the same numbers computed by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import fastnn
from fastnn.quant import Int4WeightOnly, Int8Dynamic, Int8WeightOnly, quantize_


def decibels(expected, found):
    expected, found = expected.double(), found.double()
    return 10 * math.log10(expected.square().sum() / (found - expected).square().sum())


@pytest.fixture
def mlp():
    return nn.Sequential(nn.Linear(64, 96), nn.Dropout(0.5), nn.ReLU(), nn.Linear(96, 10))


@torch.no_grad()
def test_numbers(mlp):
    quantized = quantize_(copy.deepcopy(mlp), Int4WeightOnly(16))
    data = [torch.randn(20, 64), torch.randn(13, 64)]
    labels = [torch.randint(10, (20,)), torch.randint(10, (13,))]
    found = fastnn.quant.report(quantized, data, reference=mlp, labels=labels, seconds=0.02)
    assert mlp.training and quantized.training
    assert not any(module._forward_hooks for model in (mlp, quantized) for module in model.modules())
    mlp.eval(), quantized.eval()
    x, y = torch.cat(data), torch.cat(labels)
    hidden = mlp[:3](x), quantized[:3](x)
    first, last = found.layers
    assert (first.name, last.name) == ("0", "3")
    assert first.snr == pytest.approx(decibels(mlp[0](x), quantized[0](x)), rel=1e-6)
    assert first.own_snr == pytest.approx(first.snr, rel=1e-6)
    assert last.snr == pytest.approx(decibels(mlp(x), quantized(x)), rel=1e-6) == pytest.approx(found.snr)
    assert last.own_snr == pytest.approx(decibels(mlp[3](hidden[0]), quantized[3](hidden[0])), rel=1e-6)
    assert found.error == pytest.approx(10 ** (-found.snr / 20))
    choices = mlp(x).argmax(-1), quantized(x).argmax(-1)
    assert found.accuracy == tuple((choice == y).float().mean().item() for choice in choices) or found.accuracy == (
        pytest.approx(tuple((choice == y).double().mean().item() for choice in choices))
    )
    assert found.agreement == pytest.approx((choices[0] == choices[1]).double().mean().item())
    assert first.bytes == (4 * (64 * 96 + 96), 96 * 32 + 4 * (96 * 4 + 96))
    assert found.bytes == tuple(sum(layer.bytes[i] for layer in found.layers) for i in (0, 1))
    assert all(seconds > 0 for seconds in found.seconds)


def test_text_table_and_plot(mlp, tmp_path):
    from rich.console import Console

    quantized = quantize_(copy.deepcopy(mlp), Int8Dynamic())
    x = torch.randn(20, 64)
    found = fastnn.quant.report(quantized, x, reference=mlp, labels=torch.randint(10, (20,)), seconds=0.02)
    text = str(found)
    console = Console(record=True, width=200)
    found.show(console)
    shown = console.export_text()
    for part in (
        "int8, dynamic",
        "accuracy",
        "relative error",
        "same largest output",
        "smaller",
        "time of a call",
        "dB",
    ):
        assert part in text and part in shown
    found.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_without_a_reference_activations_alone_count(mlp):
    x = torch.randn(20, 64)
    exact = fastnn.quant.report(quantize_(copy.deepcopy(mlp), Int8WeightOnly()), x, seconds=0.02)
    assert exact.error < 1e-6 and "dequantized" in str(exact)
    dynamic = fastnn.quant.report(quantize_(copy.deepcopy(mlp), Int8Dynamic()), x, seconds=0.02)
    assert dynamic.error > 1e-4 and dynamic.accuracy is None


def test_attention_is_a_layer():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    quantized = quantize_(copy.deepcopy(model), Int8Dynamic())
    x = torch.randn(2, 5, 32)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    found = fastnn.quant.report(
        quantized, [x, (x,), {"src": x, "src_key_padding_mask": padding}], reference=model, seconds=0.02
    )
    assert [layer.name for layer in found.layers] == [
        f"layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "linear1", "linear2")
    ]
    assert all(20 < layer.own_snr < 60 and 20 < layer.snr < 60 for layer in found.layers)
    assert found.layers[0].bytes[0] == 4 * (4 * 32 * 32 + 4 * 32)


def test_bad_arguments(mlp):
    quantized = quantize_(copy.deepcopy(mlp), Int8Dynamic())
    x = torch.randn(20, 64)
    report = fastnn.quant.report
    with pytest.raises(TypeError, match="model must be a"):
        report(3, x)
    with pytest.raises(TypeError, match="reference must be a"):
        report(quantized, x, reference=3)
    with pytest.raises(TypeError, match="data must be an iterable"):
        report(quantized, 3)
    with pytest.raises(TypeError, match="labels must be an iterable"):
        report(quantized, x, labels=3)
    with pytest.raises(ValueError, match="no quantized layer"):
        report(mlp, x)
    with pytest.raises(ValueError, match="data is empty"):
        report(quantized, [], reference=mlp)
    with pytest.raises(ValueError, match="reference has no layer '0'"):
        report(quantized, x, reference=nn.ReLU())
    with pytest.raises(ValueError, match="as many labels as inputs, 1, got 2"):
        report(quantized, [x], reference=mlp, labels=[x, x])
    with pytest.raises(ValueError, match=r"labels: expected the shape \(20,\)"):
        report(quantized, x, reference=mlp, labels=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="expected a tensor, a tuple"):
        report(quantized, ["text"], reference=mlp)
    assert not any(module._forward_hooks for model in (mlp, quantized) for module in model.modules())
