"""Modules that call scaled_dot_product_attention in a forward of their own, and `convert`."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import fastnn


class Attention(nn.Module):
    """As GPTs and vision transformers have it."""

    def __init__(self, width=24, heads=3, causal=False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, mask=None, *, scale=None):
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal, scale=scale)
        return self.proj(heads.transpose(1, 2).reshape(n, length, width))


class InAMethod(Attention):
    """Asked for where the forward does not say so, and with everything by name."""

    def forward(self, x):
        return self._attend(self.qkv(x))

    def _attend(self, qkv):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        function = torch.nn.functional.scaled_dot_product_attention
        return self.proj(function(query=q, key=k, value=v, is_causal=self.causal).transpose(1, 2).flatten(2))


class InABase(InAMethod):
    """With a forward that has its base's compute it."""

    def forward(self, x):
        return super().forward(x)


class WithNumbersOfItsOwn(Attention):
    """Whose own parameters and functions stay torch's."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return F.softplus(super().forward(x) * self.gain)


class Hybrid(nn.Module):
    """Convolutions and attention in one forward."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.inner = Attention()

    def forward(self, x):
        x = self.stem(x)
        rows = x.flatten(2).transpose(1, 2)
        rows = rows + self.inner(rows)
        return F.scaled_dot_product_attention(rows, rows, value=rows)


class WithoutAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(24, 24)

    def forward(self, x):
        return self.inner(x).relu()


KINDS = [Attention, InAMethod, InABase, WithNumbersOfItsOwn]


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the queries that fastnn's attention was asked for."""
    seen, original = [], fastnn.functional.scaled_dot_product_attention

    def spy(query, *args, **kwargs):
        seen.append(tuple(query.shape))
        return original(query, *args, **kwargs)

    monkeypatch.setattr(fastnn.functional, "scaled_dot_product_attention", spy)
    return seen


def results(model, x):
    """What a model gives for x, and all gradients."""
    x = x.clone().requires_grad_()
    output = model(x)
    output.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return output.detach(), x.grad, gradients


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind, causal, calls, no_fallback):
    theirs = kind().double()
    theirs.causal = causal
    ours = fastnn.convert(copy.deepcopy(theirs))
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    assert_close(results(ours, x), results(theirs, x))
    assert calls == [(2, 3, 7, 8)]
    with torch.inference_mode():
        assert_close(ours(x), theirs(x))
    assert len(calls) == 2


def test_masks_and_scale(calls, no_fallback):
    theirs = Attention()
    ours = fastnn.convert(copy.deepcopy(theirs))
    x, mask = torch.randn(2, 7, 24), torch.rand(7, 7) < 0.7
    mask.fill_diagonal_(True)
    assert_close(ours(x, mask, scale=0.3), theirs(x, mask, scale=0.3))
    assert len(calls) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind):
    model = nn.Sequential(kind(), nn.Flatten())
    before = [type(module) for module in model.modules()]
    (row,) = fastnn.report(model[0]).rows[:1]
    assert (row.status, row.replacement) == ("available", "fastnn.nn.OwnAttention")
    assert fastnn.convert(model) is model
    assert isinstance(model[0], kind)
    assert type(model[0]).__name__ == kind.__name__
    kinds = [type(module) for module in model.modules()]
    assert [type(module) for module in fastnn.convert(model).modules()] == kinds
    row = fastnn.report(model).rows[0]
    assert (row.name, row.status, row.replacement) == ("0", "replaced", "fastnn.nn.OwnAttention")
    assert row.kind.endswith(kind.__name__)
    assert "torch's" in row.reason
    assert inspect.signature(model[0].forward) == inspect.signature(kind().forward)
    assert [type(module) for module in fastnn.revert(model).modules()] == before


def test_what_computes_no_attention_stays(calls):
    model = fastnn.convert(nn.Sequential(WithoutAttention(), Attention()), skip="1")
    assert type(model[0]) is WithoutAttention
    assert type(model[1]) is Attention
    model(torch.randn(2, 7, 24))
    assert not calls


def test_nothing_stays_behind(calls):
    """Torch's function is torch's again outside of the converted module's forward, also after an error in it."""
    model = fastnn.convert(Attention())
    x = torch.randn(2, 7, 24)
    with pytest.raises(RuntimeError):
        model(x, mask=torch.zeros(5, 5))
    calls.clear()
    model(x)
    Attention()(x)
    assert len(calls) == 1


def test_inside_of_patch(calls):
    model = fastnn.convert(WithNumbersOfItsOwn())
    with fastnn.patch():
        model(torch.randn(2, 7, 24))
    assert len(calls) == 1


def test_a_tensor_that_answers_for_itself_is_left_to(calls):
    class Noted(torch.Tensor):
        pass

    class Direct(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q)

    q = torch.randn(1, 2, 5, 8)
    found = fastnn.convert(Direct())(q.as_subclass(Noted))
    assert type(found) is Noted
    assert not calls
    assert_close(found.as_subclass(torch.Tensor), F.scaled_dot_product_attention(q, q, q))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("fuse", [False, True], ids=["converted", "fused"])
def test_copies(how, fuse, calls):
    model = fastnn.convert(Hybrid().eval(), fuse=fuse)
    if how == "deepcopy":
        made = copy.deepcopy(model)
    elif how == "pickle":
        made = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        made = torch.load(file, weights_only=False)
    x = torch.randn(1, 3, 5, 6)
    with torch.no_grad():
        assert_close(made(x), model(x))
    assert len(calls) == 4  # one in the model's forward and one in the layer's, of two models
    assert type(fastnn.revert(made)) is Hybrid
    assert type(made.inner) is Attention


def test_fused_with_the_convolutions_around_it(calls, no_fallback):
    theirs = Hybrid().eval()
    theirs.stem[1].running_mean.normal_()
    ours = fastnn.convert(copy.deepcopy(theirs), fuse=True)
    assert any("1 convolution and" in row.reason for row in fastnn.report(ours).rows)
    x = torch.randn(2, 3, 5, 6)
    with torch.inference_mode():
        assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert len(calls) == 2
    assert_close(results(ours.double(), x.double()), results(theirs.double(), x.double()))


def test_compile_and_export():
    model = fastnn.convert(Attention(causal=True)).eval()
    x = torch.randn(2, 7, 24)
    expected = model(x)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_close(compiled(x), expected)
    assert any("fastnn" in str(node.target) for node in graphs[0].graph.nodes if "attention" in str(node.target))
    exported = torch.export.export(model, (x,))
    assert_close(exported.module()(x), expected)


def test_transforms():
    model = fastnn.convert(Attention().double())
    x = torch.randn(3, 2, 7, 24, dtype=torch.float64)
    assert_close(torch.func.vmap(model)(x), torch.stack([model(row) for row in x]))


def test_a_parametrized_module_stays():
    class Twice(nn.Module):
        def forward(self, gain):
            return 2 * gain

    model = WithNumbersOfItsOwn()
    parametrize.register_parametrization(model, "gain", Twice())
    kind = type(model)
    assert type(fastnn.convert(model)) is kind
    parametrize.remove_parametrizations(model, "gain")
    assert type(model) is WithNumbersOfItsOwn


class Checkpointed(Attention):
    """In the backward it computes its attention outside of its forward."""

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


class Static(nn.Module):
    @staticmethod
    def forward(q):
        return F.scaled_dot_product_attention(q, q, q)


class CopiedItsOwnWay(Attention):
    def __reduce__(self):
        return CopiedItsOwnWay, ()


class Refusing(Attention):
    def __init_subclass__(cls, **kwargs):
        raise TypeError("no children")


@pytest.mark.parametrize("kind", [Checkpointed, Static, CopiedItsOwnWay, Refusing])
def test_left_alone(kind):
    model = kind()
    assert type(fastnn.convert(model)) is kind
    x = torch.randn(2, 7, 24, requires_grad=True)
    if kind is not Static:
        model(x).sum().backward()
    if kind is Refusing:
        assert "no children" in fastnn.report(model).rows[0].reason


def test_a_class_that_computes_when_asked():
    class Asked:
        def __get__(self, instance, owner):
            raise RuntimeError("class access")

    class Model(nn.Module):
        value = Asked()

        def forward(self, x):
            return self.value if x is None else x

    assert type(fastnn.convert(Model())) is Model
