"""Whole models of fastnn, quantized: they run, save, load and come back."""

from __future__ import annotations

import copy

import pytest
import torch

import fastnn
from fastnn.quant import Int4WeightOnly, Int8Dynamic, Int8Static, QuantizedLinear, dequantize_, quantize_


def bert():
    model = fastnn.models.Bert(
        vocab_size=37, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    return model, (torch.randint(37, (2, 9)),)


def gpt():
    return fastnn.models.GPT(37, 16, n_layer=2, n_head=4, n_embd=32, dropout=0.0), (torch.randint(37, (2, 9)),)


def vit():
    model = fastnn.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    torch.nn.init.normal_(model.heads.head.weight)  # it begins at 0
    return model, (torch.randn(2, 3, 16, 16),)


def seq2seq():
    model = fastnn.models.Seq2SeqTransformer(2, 2, 32, 4, 37, 41, 64, dropout=0.0)
    return model, (torch.randint(37, (2, 9)), torch.randint(41, (2, 5)))


MODELS = [bert, gpt, vit, seq2seq]


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("make", MODELS)
@torch.no_grad()
def test_model(make):
    model, inputs = make()
    model.eval()
    expected = first(model(*inputs))
    for config in (Int8Dynamic(), Int4WeightOnly(16), Int8Static([inputs])):
        # The pooler of Bert is behind its first result.
        quantized = quantize_(copy.deepcopy(model), config)
        found = first(quantized(*inputs))
        error = (found - expected).norm() / expected.norm()
        assert 1e-5 < error < (0.4 if isinstance(config, Int4WeightOnly) else 0.05)
        assert any(isinstance(module, QuantizedLinear) for module in quantized.modules())

        fresh, _ = make()
        loaded = quantize_(fresh.eval(), Int8Static([inputs]) if isinstance(config, Int8Static) else config)
        loaded.load_state_dict(quantized.state_dict())
        assert torch.equal(first(loaded(*inputs)), found)

        again = dequantize_(quantized)
        assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]
        assert again.state_dict().keys() == model.state_dict().keys()
        if isinstance(config, Int4WeightOnly):
            torch.testing.assert_close(first(again(*inputs)), found, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_decoding():
    model, (src, _) = seq2seq()
    quantized = quantize_(model.eval(), Int4WeightOnly(16))
    same = dequantize_(copy.deepcopy(quantized))
    found, expected = (m.greedy_decode(src, 6, 1, 2) for m in (quantized, same))
    assert torch.equal(found, expected)
    # Layers around attention that is as it was keep keys, and call the layers that are quantized.
    model, (src, _) = seq2seq()
    quantized = quantize_(model.eval(), Int4WeightOnly(16), skip=torch.nn.MultiheadAttention)
    same = dequantize_(copy.deepcopy(quantized))
    found, expected = (m.greedy_decode(src, 6, 1, 2) for m in (quantized, same))
    assert torch.equal(found, expected)


@torch.no_grad()
def test_padded_batches_run_without_padding():
    encoder = fastnn.nn.TransformerEncoder(fastnn.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    quantized = quantize_(copy.deepcopy(encoder), Int8Dynamic())
    x = torch.randn(3, 20, 32)
    padding = torch.arange(20) >= torch.tensor([[20], [7], [4]])
    at_once = quantized(x, src_key_padding_mask=padding)
    seen = []
    quantized.layers[0].linear1.register_forward_hook(lambda layer, args, output: seen.append(args[0].shape))
    watched = quantized(x, src_key_padding_mask=padding)
    assert seen == [(3, 20, 32)]
    torch.testing.assert_close(at_once, watched, rtol=1e-3, atol=2e-2)
    assert (at_once[padding] == 0).all()
