"""The rms norms of other packages, recognised by what their forward computes."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastnn


class LlamaRMSNorm(nn.Module):
    """As Hugging Face's."""

    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class T5LayerNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        if self.weight.dtype in [torch.float16, torch.bfloat16]:
            hidden_states = hidden_states.to(self.weight.dtype)
        return self.weight * hidden_states


class GemmaRMSNorm(nn.Module):
    """Multiplies by 1 + weight."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        normalized = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (normalized * (1.0 + self.weight.float())).type_as(x)


class CenteredRMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return nn.functional.layer_norm(x, (x.shape[-1],), self.weight, None, self.eps)


class ForgetfulRMSNorm(nn.Module):
    """Adds no eps."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * self.weight


class GatedRMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x, gate):
        return x * gate


class ScaledRMSNorm(nn.Module):
    """One weight for rows of any length."""

    def __init__(self, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class DerivedRMSNorm(LlamaRMSNorm):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, T5LayerNorm])
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_recognised(kind, dtype, eps, no_fallback):
    layer = kind(24, eps).to(dtype)
    nn.init.normal_(layer.weight)
    calls = []
    hook = layer.register_forward_hook(lambda *_: calls.append(1))
    model = nn.Sequential(layer)
    fastnn.convert(model, strict=True)
    assert isinstance(layer, kind)
    assert type(layer) is not kind
    assert not calls  # the trial is none of the user's calls
    hook.remove()
    plain = fastnn.revert(copy.deepcopy(model))
    assert type(plain[0]) is kind
    x = (torch.randn(2, 3, 24) / 100).to(dtype).requires_grad_()
    results = []
    for one in (model, plain):
        y = one(x)
        assert y.dtype is dtype
        results.append((y, *torch.autograd.grad(y, (x, one[0].weight), torch.ones_like(y))))
    near = 8 * torch.finfo(dtype).eps
    near = max(near, 1e-5) if dtype is torch.float64 else near  # theirs computes in float32
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=near, atol=near * theirs.abs().max().item() * 4)
    other = pickle.loads(pickle.dumps(model))
    assert type(other[0]) is type(layer)
    assert torch.equal(other(x), model(x))
    fastnn.revert(model)
    assert type(layer) is kind


@pytest.mark.parametrize("kind", [GemmaRMSNorm, CenteredRMSNorm, ForgetfulRMSNorm, GatedRMSNorm, DerivedRMSNorm])
def test_left_alone(kind):
    layer = kind(24)
    nn.init.normal_(layer.weight)
    model = nn.Sequential(layer)
    fastnn.convert(model)
    assert type(model[0]) is kind
    with pytest.raises(fastnn.ConversionError):
        fastnn.convert(model, strict=True)


def test_one_weight_for_rows_of_any_length_is_left_alone():
    model = nn.Sequential(ScaledRMSNorm())
    fastnn.convert(model)
    assert type(model[0]) is ScaledRMSNorm
    x = torch.randn(3, 24)
    torch.testing.assert_close(model(x), nn.functional.rms_norm(x, (24,), eps=1e-6))


def test_two_dtypes_stay_the_classes_own():
    layer = LlamaRMSNorm(16)
    x = torch.randn(3, 16).bfloat16()
    expected = layer(x)
    fastnn.convert(layer)
    assert layer(x).dtype is expected.dtype is torch.float32
    assert torch.equal(layer(x), expected)


def test_of_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    layers = nn.ModuleList([llama.LlamaRMSNorm(32), gemma.GemmaRMSNorm(32)])
    x = torch.randn(4, 32)
    expected = [layer(x) for layer in layers]
    fastnn.convert(layers)
    assert [type(layer).__dict__.get("_original_class") for layer in layers] == [llama.LlamaRMSNorm, None]
    for layer, wanted in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer(x), wanted)


class WithResidual(torch.nn.Module):
    """Such as fused norms have: one argument more, and another name."""

    def __init__(self, size):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.rand(size)), 1e-6

    def forward(self, x, residual=None):
        x = x if residual is None else x + residual
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


WithResidual.__name__ = "FusedRMSNorm"


def test_further_arguments_are_the_class_own_business():
    model = torch.nn.Sequential(WithResidual(8))
    x, residual = torch.randn(2, 8), torch.randn(2, 8)
    expected = model[0](x), model[0](x, residual=residual)
    fastnn.convert(model)
    for got, wanted in zip((model[0](x=x), model[0](x, residual=residual)), expected, strict=True):
        assert torch.equal(got, wanted)
    assert torch.allclose(model[0](x), expected[0])
