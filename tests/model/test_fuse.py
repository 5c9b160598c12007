"""convert(model, fuse=True): what is fused computes the same, and only where it may."""

from __future__ import annotations

import collections
import copy
import dataclasses
import gc
import itertools
import operator
import pickle
import random
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnn
from fastnn import _cpu, _fused
from fastnn.backends import cpu
from fastnn.fuse import fused_calls, is_fused
from fastnn.ops import conv
from fastnn.ops.conv import conv_fused
from fastnn.testing.errors import relative_error


class Block(nn.Module):
    """A residual block whose shortcut and activation are Python, not modules."""

    def __init__(self, add=operator.iadd, activation=F.relu, bias=False):
        super().__init__()
        self.conv1 = nn.Conv2d(8, 12, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(12)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(12, 8, 1, bias=bias)
        self.bn2 = nn.BatchNorm2d(8)
        self.add, self.activation = add, activation

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = self.add(out, x)
        return self.activation(out)


def with_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                if module.affine:
                    module.weight.uniform_(-1.5, 1.5)
                    module.bias.normal_()
    return model.eval()


def network(rank=2):
    conv, norm = getattr(nn, f"Conv{rank}d"), getattr(nn, f"BatchNorm{rank}d")
    return nn.Sequential(
        conv(3, 8, 3, stride=2, padding=1, bias=False),
        norm(8),
        nn.ReLU6(),
        conv(8, 8, 3, padding=1, groups=8),
        norm(8, affine=False),
        nn.SiLU(),
        conv(8, 16, 1),
        norm(16),
        conv(16, 5, 3, dilation=2, padding="same"),
        nn.Sigmoid(),
    )


def calls(model):
    return [(c.norm is not None, c.activation) for c in fused_calls(model)]


def outputs(model, x):
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chains_of_modules(rank, dtype, no_fallback):
    model = with_statistics(network(rank)).to(dtype)
    x = torch.randn(2, 3, *(11, 9, 7)[:rank], dtype=dtype)
    exact = outputs(copy.deepcopy(model).double(), x.double())
    before = relative_error(outputs(model, x), exact)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    assert fastnn.convert(model, fuse=True) is model
    assert calls(model) == [(True, "relu6"), (True, "silu"), (True, "none"), (False, "sigmoid")]
    assert relative_error(outputs(model, x), exact) <= 3 * before + 1e-7 * (dtype is torch.float32) + 1e-15
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("add", [operator.add, operator.iadd, torch.add, lambda a, b: a.add_(b)])
@pytest.mark.parametrize("activation", [F.relu, torch.relu, lambda x: x.relu_(), F.relu6, F.silu])
def test_a_shortcut(add, activation):
    model = with_statistics(nn.Sequential(Block(add, activation), Block(add, activation, bias=True)))
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 8, 7, 6).to(memory_format=layout)
        exact = outputs(copy.deepcopy(model).double(), x.double())
        fused = fastnn.convert(copy.deepcopy(model), fuse=True)
        kept = x.clone()
        assert relative_error(outputs(fused, x), exact) < 1e-6
        assert torch.equal(x, kept)
        assert len(calls(fused)) == 4
        assert all(call.norm is not None for call in fused_calls(fused))


def test_a_shortcut_that_broadcasts_or_has_another_layout():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x, other):
            return torch.relu(self.conv(x) + other)

    model = fastnn.convert(Model().eval(), fuse=True)
    x = torch.randn(2, 3, 5, 4)
    for other in (
        torch.randn(4, 1, 1),
        torch.randn(2, 4, 4, 5).transpose(2, 3),
        torch.randn(2, 4, 5, 4).to(memory_format=torch.channels_last),
        torch.randn(3, 2, 4, 5, 4),
    ):
        expected = torch.relu(F.conv2d(x, model.conv.weight, model.conv.bias) + other)
        with torch.inference_mode():
            torch.testing.assert_close(model(x, other), expected)


class Shortcuts(nn.Module):
    """Pointwise convolutions with sums of which some, by ``kind``, are not the last to see their shortcut."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.convs = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)) for _ in range(3))

    def forward(self, x):
        a, b, c = self.convs
        first = torch.relu(a(x))
        if self.kind == "the last":
            return torch.relu(c(torch.relu(b(first))) + first)
        if self.kind == "the input as well":
            return torch.relu(b(first) + first)
        if self.kind == "twice":
            return torch.relu(c(torch.relu(b(x) + first)) + first)
        if self.kind == "seen later":
            y = torch.relu(b(x) + first)
            return torch.relu(c(first) + y), y
        if self.kind == "returned":
            return torch.relu(b(x) + first), first
        if self.kind == "a view of it":
            kept = first.flatten(2)
            return torch.relu(b(x) + first), kept
        if self.kind == "changed in place":
            changed = first.add_(1)
            return torch.relu(b(x) + first), changed
        return torch.relu(b(x) + x), x  # "given"


@pytest.mark.parametrize(
    "kind, ends",
    [
        ("the last", [False, False, True]),
        ("the input as well", [False, False]),
        ("twice", [False, False, True]),
        ("seen later", [False, False, False]),
        ("returned", [False, False]),
        ("a view of it", [False, False]),
        ("changed in place", [False, False]),
        ("given", [False, False]),
    ],
)
def test_a_residual_is_overwritten_by_the_last_that_sees_it(kind, ends):
    model = with_statistics(Shortcuts(kind))
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 8, 9, 7).to(memory_format=layout)
        exact = outputs(copy.deepcopy(model).double(), x.double())
        fused = fastnn.convert(copy.deepcopy(model), fuse=True)
        kept = x.clone()
        for _ in range(2):
            found = outputs(fused, x)
            assert torch.equal(x, kept)
            torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5, check_dtype=False)
    assert [call.ends_residual for call in fused_calls(fused)] == ends


@pytest.mark.parametrize("way", ["short", "long"])
def test_the_memory_of_a_residual_becomes_the_results(way, monkeypatch):
    if way == "long":  # that of torch before 2.10
        monkeypatch.setattr(conv, "_tensor_convolution", lambda *_: None)
    x, w, residual = torch.randn(2, 16, 9, 9), torch.randn(24, 16, 1, 1), torch.randn(2, 24, 9, 9)
    for layout, kernel in itertools.product(
        (torch.contiguous_format, torch.channels_last), (w, torch.randn(24, 16, 3, 3))
    ):
        x, kernel = x.to(memory_format=layout), kernel.to(memory_format=layout)
        given = residual.to(memory_format=layout, copy=True)
        padding = kernel.shape[2] // 2
        expected = torch.relu(F.conv2d(x.double(), kernel.double(), padding=padding) + residual)
        with torch.no_grad():
            found = conv_fused(x, kernel, None, 1, padding, 1, 1, "relu", given, None, True)
        assert found.data_ptr() == given.data_ptr()
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_only_in_eval_mode_without_gradients():
    model = with_statistics(nn.Sequential(Block()))
    torchs = copy.deepcopy(model)
    fastnn.convert(model, fuse=True)
    x = torch.randn(2, 8, 5, 5)

    def close(**kwargs):
        torch.testing.assert_close(model(x), torchs(x), **kwargs)

    close()
    y = model(x)
    assert y.requires_grad
    grads = torch.autograd.grad(y.sum(), list(model.parameters()))
    expected = torch.autograd.grad(torchs(x).sum(), list(torchs.parameters()))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        close()
        model.train(), torchs.train()
        close(rtol=1e-4, atol=1e-5)
        for (name, ours), theirs in zip(model.named_buffers(), torchs.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, msg=name)
        model.eval(), torchs.eval()
        with torch.autocast("cpu"):
            assert model(x).dtype is torchs(x).dtype


def test_a_hook_is_called():
    model = fastnn.convert(with_statistics(nn.Sequential(Block())), fuse=True)
    seen = []
    handle = model[0].bn1.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(1, 8, 5, 5)
    expected = outputs(model, x)
    assert seen == [1]
    handle.remove()
    torch.testing.assert_close(outputs(model, x), expected)
    assert seen == [1]


def test_an_input_without_a_batch():
    chain = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.ReLU(), nn.Conv2d(32, 16, 1), nn.ReLU()).eval()
    x = torch.randn(32, 8, 9)
    expected = outputs(copy.deepcopy(chain), x)
    torch.testing.assert_close(outputs(fastnn.convert(chain, fuse=True), x), expected, rtol=1e-5, atol=1e-5)


def test_a_parametrized_weight_is_seen():
    chain = nn.Sequential(nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 6, 1), nn.ReLU()).eval()
    fastnn.convert(chain, fuse=True)
    x = torch.randn(2, 8, 7, 7)
    outputs(chain, x)
    torch.nn.utils.parametrizations.weight_norm(chain[0])
    for _ in range(3):
        with torch.no_grad():
            chain[0].parametrizations.weight.original0.mul_(1.5)
            expected = F.relu(
                F.conv2d(F.relu(F.conv2d(x, chain[0].weight, chain[0].bias)), chain[2].weight, chain[2].bias)
            )
        torch.testing.assert_close(outputs(chain, x), expected, rtol=1e-5, atol=1e-5)
    del chain[2].weight
    for _ in range(3):
        chain[2].weight = torch.randn(6, 12, 1, 1)
        with torch.no_grad():
            expected = F.relu(
                F.conv2d(F.relu(F.conv2d(x, chain[0].weight, chain[0].bias)), chain[2].weight, chain[2].bias)
            )
        torch.testing.assert_close(outputs(chain, x), expected, rtol=1e-5, atol=1e-5)


def test_a_convolution_whose_geometry_changes():
    chain = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.ReLU(), nn.Conv2d(32, 16, 1), nn.ReLU()).eval()
    fastnn.convert(chain, fuse=True)
    x = torch.randn(2, 32, 9, 9)
    assert outputs(chain, x).shape == (2, 16, 9, 9)
    chain[0].dilation, chain[0].padding = (2, 2), (3, 2)
    y = F.relu(F.conv2d(x, chain[0].weight, chain[0].bias, 1, (3, 2), (2, 2), 32))
    expected = F.relu(F.conv2d(y, chain[2].weight, chain[2].bias))
    torch.testing.assert_close(outputs(chain, x), expected.detach(), rtol=1e-5, atol=1e-5)


def test_changes_of_parameters_are_seen():
    model = fastnn.convert(with_statistics(nn.Sequential(Block())), fuse=True)
    x = torch.randn(1, 8, 5, 5)
    outputs(model, x)

    def check():
        fresh = fastnn.revert(copy.deepcopy(model))
        torch.testing.assert_close(outputs(model, x), outputs(fresh, x), rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        model[0].conv1.weight.mul_(2)
    check()
    model[0].bn2.running_var.fill_(3.0)
    check()
    model.load_state_dict({name: t + 0.5 for name, t in model.state_dict().items()})
    check()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    model(x).square().sum().backward()
    optimizer.step()
    model.eval()
    check()
    model.to(torch.bfloat16)
    assert outputs(model, x.bfloat16()).dtype is torch.bfloat16


def test_filters_are_made_at_once_in_eval_mode():
    def layers(model):
        return [getattr(call, "folded", None) for call in fused_calls(model)]

    model = fastnn.convert(with_statistics(network()), fuse=True)
    made = layers(model)
    assert made and None not in made
    outputs(model, torch.randn(1, 3, 9, 9))
    assert all(now is then for now, then in zip(layers(model), made, strict=True))
    assert set(layers(fastnn.convert(network().train(), fuse=True))) == {None}


class Passing(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.conv, self.between, self.norm = nn.Conv2d(3, 8, 3), between, nn.BatchNorm2d(8)
        self.last = nn.Sequential(nn.Identity(), nn.Dropout(0.5))

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.between(self.conv(x)))))


@pytest.mark.parametrize("between", [nn.Identity(), nn.Dropout(0.9), nn.Dropout2d(0.9), nn.AlphaDropout(0.9)], ids=str)
def test_what_hands_its_input_on_is_not_in_the_way(between):
    model = with_statistics(Passing(between))
    x = torch.randn(2, 3, 9, 9)
    exact = outputs(copy.deepcopy(model).double(), x.double())
    fused = fastnn.convert(copy.deepcopy(model), fuse=True)
    assert calls(fused) == [(True, "relu")]
    assert relative_error(outputs(fused, x), exact) < 1e-6
    # Dropout alone in training mode, for Monte Carlo estimates: no more the identity.
    fused.last[1].train()
    assert (outputs(fused, x) == 0).sum() > (outputs(model, x) == 0).sum()
    fused.last[1].eval()
    assert relative_error(outputs(fused, x), exact) < 1e-6
    seen = []
    fused.between.register_forward_hook(lambda *_: seen.append(True))
    assert relative_error(outputs(fused, x), exact) < 1e-6
    assert seen == [True]


def test_dropout_in_training_mode_does_not_keep_the_rest_from_fusing(no_fallback):
    model = with_statistics(Passing(nn.Identity()))
    model.last[1].train()
    fused = fastnn.convert(model, fuse=True)
    x = torch.randn(2, 3, 9, 9)
    torch.manual_seed(0)
    first = outputs(fused, x)
    assert calls(fused) == [(True, "relu")] and type(fused)._fused_calls.are_current()
    assert not torch.equal(first, outputs(fused, x))


def test_an_identity_of_what_is_no_tensor():
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pass_on = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), nn.Identity()

        def forward(self, x):
            y, _ = self.pass_on((self.conv(x), self.pass_on(None)))
            return y

    model, x = Pairs().eval(), torch.randn(1, 3, 4, 4)
    expected = outputs(model, x)
    torch.testing.assert_close(outputs(fastnn.convert(model, fuse=True), x), expected)


def test_only_one_that_hands_its_input_on():
    """The result may be the input itself."""
    model = nn.Sequential(nn.Identity(), nn.Dropout())
    assert fastnn.convert(model.eval(), fuse=True)(torch.ones(2)).equal(torch.ones(2))


def test_a_norm_of_other_channels_stays_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(4)).eval()
    fastnn.convert(model, fuse=True)
    assert not list(fused_calls(model))
    with pytest.raises(RuntimeError, match="running_mean"):
        outputs(model, torch.randn(1, 3, 5, 5))


def test_revert_report_copies_and_again():
    model = with_statistics(Block())
    fastnn.convert(model, fuse=True)
    assert isinstance(model, Block)
    fused = type(model)
    (row,) = [row for row in fastnn.report(model).rows if row.name == "(model)"]
    assert row.status == "note"
    assert "2 convolutions" in row.reason
    x = torch.randn(1, 8, 5, 5)
    expected = outputs(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is Block
        torch.testing.assert_close(outputs(other, x), expected)
    assert type(fastnn.convert(model, fuse=True)) is fused
    fastnn.revert(model)
    assert type(model) is Block
    assert type(model.conv1) is nn.Conv2d
    torch.testing.assert_close(outputs(model, x), expected)


def test_what_stays_unfused():
    shared = nn.Conv2d(8, 8, 1)

    class Branches(nn.Module):
        """Its Python cannot be followed: its block is fused by itself."""

        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(x) if x.sum() > 0 else x

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    cases = {
        "a shared layer": (nn.Sequential(shared, nn.BatchNorm2d(8), shared, nn.ReLU()), 0),
        "a result used twice": (Twice(), 0),
        "no running statistics": (nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, track_running_stats=False)), 0),
        "circular padding": (nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), nn.ReLU()), 0),
        "branches": (Branches(), 2),
    }
    x = torch.rand(2, 8, 5, 5)
    for name, (model, count) in cases.items():
        model = model.eval()
        expected = outputs(model, x)
        fastnn.convert(model, fuse=True)
        assert len(calls(model)) == count, name
        torch.testing.assert_close(outputs(model, x), expected, rtol=1e-4, atol=1e-5, msg=name)
    skipping = fastnn.convert(Block().eval(), fuse=True, skip="bn1")
    assert [call.norm is None for call in fused_calls(skipping)] == [False]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "alexnet"])
def test_models(name, no_fallback):
    model = with_statistics(getattr(fastnn.models, name)())
    edge = 64 if name == "alexnet" else 33
    x = torch.randn(2, 3, edge, edge)
    exact = outputs(copy.deepcopy(model).double(), x.double())
    error = relative_error(outputs(fastnn.revert(copy.deepcopy(model)), x), exact)
    for layout in (torch.contiguous_format, torch.channels_last):
        fused = fastnn.convert(copy.deepcopy(model).to(memory_format=layout), fuse=True)
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert len(calls(fused)) == len(convolutions)
        assert relative_error(outputs(fused, x.to(memory_format=layout)), exact) <= 3 * error


#: What a convolution is computed by: a product, Winograd's algorithm (tile by tile, filter by filter), strips, gathered columns, depthwise
#: filters; x, w, stride, padding, groups.
KEPT = {
    "pointwise": ((2, 40, 9, 11), (24, 40, 1, 1), 1, 0, 1),
    "winograd": ((1, 32, 16, 16), (32, 32, 3, 3), 1, 1, 1),
    "winograd, many tiles": ((4, 32, 40, 40), (27, 32, 3, 3), 1, 1, 1),
    "winograd, many filters": ((1, 256, 14, 14), (256, 256, 3, 3), 1, 1, 1),
    "winograd, every second": ((2, 96, 32, 48), (96, 96, 3, 3), 2, 1, 1),
    "winograd, 5x5": ((1, 32, 17, 23), (48, 32, 5, 5), 1, 2, 1),
    "first layer": ((2, 3, 31, 29), (16, 3, 7, 7), 2, 3, 1),
    "strips": ((2, 64, 13, 15), (33, 64, 3, 3), 2, 1, 1),
    "groups": ((2, 32, 12, 12), (64, 16, 3, 3), 1, 1, 2),
    "few filters": ((1, 6, 12, 12), (5, 6, 3, 3), 1, 1, 1),
    "depthwise": ((1, 24, 12, 12), (24, 1, 3, 3), 1, 1, 24),
    "a line": ((2, 20, 33), (18, 20, 5), 1, 2, 1),
    "deep": ((1, 8, 6, 7, 8), (16, 8, 3, 3, 3), 1, 1, 1),
}


def kept(name, dtype, channels_last):
    x_shape, w_shape, *geometry = KEPT[name]
    x, w = torch.randn(x_shape).to(dtype), torch.randn(w_shape).to(dtype)
    if channels_last and x.dim() == 4:
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    return x, w, *geometry


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_of_filters(name, dtype, channels_last):
    """The first call makes it, and the following ones, of other images and from other threads, give the same numbers."""
    from concurrent.futures import ThreadPoolExecutor

    x, w, stride, padding, groups = kept(name, dtype, channels_last)
    bias = torch.randn(len(w)).to(dtype)
    function = getattr(F, f"conv{x.dim() - 2}d")
    exact = function(x.double(), w.double(), bias.double(), stride, padding, 1, groups).relu()
    prepared = fastnn._cpu.Prepared()

    def call(image):
        with torch.no_grad():
            return conv_fused(image, w, bias, stride, padding, 1, groups, "relu", None, prepared)

    first = call(x)
    size = prepared.nbytes
    assert relative_error(first, exact) < (1e-6 if dtype is torch.float32 else 5e-3)
    call(x * 3)
    with ThreadPoolExecutor(4) as pool:
        for again in pool.map(call, [x] * 8):
            assert torch.equal(again, first)
    assert prepared.nbytes == size
    # With AMX the latter two are split products, which pack filters for each call.
    surely = ("winograd",) if splits(dtype) else ("winograd", "first layer", "strips")
    if name in surely and dtype is torch.float32:
        assert size > 0


needs_table = pytest.mark.skipif(
    not cpu.has_table, reason="the long way, of torch before 2.10, reads filters themselves"
)


def splits(dtype):
    return dtype is torch.float32 and _cpu.isa().startswith("amx")


not_amx = pytest.mark.skipif(
    splits(torch.float32), reason="with AMX other algorithms compute some of these, and read the filters themselves"
)


@needs_table
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", KEPT)
def test_filters_that_are_gone(name, dtype, channels_last):
    """What was made of them serves; nothing is computed, or written, without."""
    x, w, stride, padding, groups = kept(name, dtype, channels_last)

    def call(weight, prepared, residual, overwrite=False):
        with torch.no_grad():
            return conv_fused(x, weight, None, stride, padding, 1, groups, "relu", residual, prepared, overwrite)

    for residual in (None, torch.randn_like(call(w, None, None))):
        given = None if residual is None else residual.clone()
        prepared = _cpu.Prepared()
        assert call(None, None, given, True) is None
        assert call(None, prepared, given, True) is None
        expected = call(w, prepared, residual)
        found = call(None, prepared, given, True)
        # A product of split operands begins anew where that is too coarse, and so is not tried over its own residual.
        again = name == "pointwise" and channels_last and residual is not None and splits(dtype)
        assert (found is None) == (groups > 1 or prepared.nbytes == 0 or again)
        assert torch.equal(found, expected) if found is not None else given is None or torch.equal(given, residual)


def various():
    """Convolutions of each kind; with a residual in its place, and an inverted residual."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        Residual(),
        *(nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.SiLU()),
        *(nn.Conv2d(64, 32, 1), nn.ReLU6()),
        *(nn.Conv2d(32, 32, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 8, 1, bias=False), nn.BatchNorm2d(8)),
        inverted(),
    )


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 48, 1, bias=False), nn.BatchNorm2d(48)
        self.conv3, self.bn3 = nn.Conv2d(32, 48, 1, bias=False), nn.BatchNorm2d(48)
        self.last = nn.Sequential(nn.Conv2d(48, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return self.last(torch.relu(self.bn3(self.conv3(x)) + y))


def gone(model):
    return [call.folded.layer[0] is None for call in fused_calls(model)]


@needs_table
@not_amx
def test_filters_go_once_the_kernels_keep_theirs():
    model = fastnn.convert(with_statistics(various()), fuse=True)
    assert gone(model) == [False] * 12
    x = torch.randn(2, 3, 64, 64)
    first = outputs(model, x)
    # The model's own, of a pointwise convolution without a norm, and those of several groups stay.
    assert [i for i, is_gone in enumerate(gone(model)) if not is_gone] == [6, 7]
    layers = [call.folded.layer for call in fused_calls(model)]
    for _ in range(3):
        assert torch.equal(outputs(model, x), first)
    assert all(call.folded.layer is layer for call, layer in zip(fused_calls(model), layers, strict=True))


def refusing(x):
    """An image with which Winograd's way gives up."""
    x = x.clone()
    x[..., x.shape[-2] // 2, :] *= 1e6
    return x


def under(context, call):
    with context:
        return call()


def with_threads(count, call):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def with_precision(precision, call):
    torch.set_float32_matmul_precision(precision)
    try:
        return call()
    finally:
        torch.set_float32_matmul_precision("highest")


#: What a model may be asked for once its filters are gone.
ASKED = {
    "the same": outputs,
    "one image": lambda model, x: outputs(model, x[:1]),
    "a larger image": lambda model, x: outputs(model, torch.cat([x, x], 2)),
    "a small image": lambda model, x: outputs(model, x[..., :9, :7]),
    "channels-last": lambda model, x: outputs(model, x.to(memory_format=torch.channels_last)),
    "a view": lambda model, x: outputs(model, x[..., ::2, 1::3]),
    "without a batch": lambda model, x: outputs(model, x[0]),
    "no images": lambda model, x: outputs(model, x[:0]),
    "Winograd's way refused": lambda model, x: outputs(model, refusing(x)),
    "one thread": lambda model, x: with_threads(1, lambda: outputs(model, x)),
    "three threads": lambda model, x: with_threads(3, lambda: outputs(model, x)),
    "another precision": lambda model, x: with_precision("high", lambda: outputs(model, x)),
    "batch invariant": lambda model, x: under(fastnn.batch_invariant(), lambda: outputs(model, x)),
    "inference mode": lambda model, x: under(torch.inference_mode(), lambda: model(x)).clone(),
    "the reference": lambda model, x: under(fastnn.backend("reference"), lambda: outputs(model, x)),
    "a dispatch mode": lambda model, x: under(Looking(), lambda: outputs(model, x)),
    "vmap": lambda model, x: under(torch.no_grad(), lambda: torch.vmap(model)(x[:, None])),
    "gradients": lambda model, x: model(x).detach(),
}
#: Computed from folded filters or by one layer after the other, whichever is there.
ROUNDED = ("the reference", "a dispatch mode", "vmap")


class Looking(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("first", [*ASKED, "all"])
def test_filters_that_are_gone_change_no_numbers(first, channels_last, monkeypatch):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = with_statistics(various()).to(memory_format=layout)
    x = torch.randn(2, 3, 48, 56)
    order = [*ASKED, *ASKED] if first == "all" else [first, "the same", first, "the same"]

    def answers():
        fused = fastnn.convert(copy.deepcopy(model), fuse=True)
        return [ASKED[name](fused, x) for name in order]

    with monkeypatch.context() as patch:
        patch.setattr(cpu, "has_table", False)  # of which filters are let go of for the short way alone
        expected = answers()
    for name, found, one in zip(order, answers(), expected, strict=True):
        if name in ROUNDED:
            assert relative_error(found, one) < 1e-5, name
        else:
            assert torch.equal(found, one), name


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_without_filters_is_of_the_layers():
    chain = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    model = fastnn.convert(with_statistics(chain), fuse=True)
    x = torch.randn(1, 32, 16, 16)
    expected = outputs(model, x)
    with torch.no_grad():
        traced = torch.jit.trace(model, x, check_trace=False)
        torch.testing.assert_close(traced(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs(model, x), expected)


@needs_table
@not_amx
def test_filters_are_folded_again_for_another_size_and_go_again(monkeypatch):
    folded = []
    fold = _fused.fold_batch_norm
    monkeypatch.setattr(_fused, "fold_batch_norm", lambda *args: folded.append(args) or fold(*args))
    chain = nn.Sequential(
        *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 24, 1), nn.BatchNorm2d(24), nn.ReLU()),
    )
    model = fastnn.convert(with_statistics(chain), fuse=True)
    x = torch.randn(2, 32, 24, 24)
    assert len(folded) == 2
    outputs(model, x)
    assert gone(model) == [True, True]
    for image, times in ((x, 2), (x[..., :3, :3], 3), (x[..., :3, :3], 3), (x, 3), (refusing(x), 3), (x[:1], 3)):
        outputs(model, image)
        assert len(folded) == times
        assert gone(model) == [True, True]
    # Filters that a call read themselves stay: more such calls are expected.
    with fastnn.batch_invariant():
        for _ in range(2):
            outputs(model, x)
    assert len(folded) == 5
    outputs(model, x)
    assert len(folded) == 5


def test_after_filters_have_gone():
    """What holds of a fused model goes on holding."""
    torchs = with_statistics(various())
    state = {name: t.clone() for name, t in torchs.state_dict().items()}
    x = torch.randn(2, 3, 48, 48)

    def fused():
        model = fastnn.convert(copy.deepcopy(torchs), fuse=True)
        outputs(model, x), outputs(model, x[..., :20, :20])
        return model

    def close(model, other, **kwargs):
        torch.testing.assert_close(outputs(model, x), outputs(other, x), rtol=1e-4, atol=1e-4, **kwargs)

    model = fused()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    close(model, torchs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fastnn.revert(fused())):
        assert not list(fused_calls(other))
        assert all(torch.equal(t, state[name]) for name, t in other.state_dict().items())
        close(other, torchs)
    expected = outputs(fused(), x)
    assert torch.equal(outputs(fastnn.convert(fastnn.revert(model), fuse=True), x), expected)

    model = fused()
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        model.to(dtype)
        again = fastnn.convert(fastnn.revert(copy.deepcopy(model)), fuse=True)
        with torch.no_grad():
            assert torch.equal(model(x.to(dtype)), again(x.to(dtype)))

    model, other = fused(), copy.deepcopy(torchs)
    model.train(), other.train()
    torch.testing.assert_close(model(x), other(x), rtol=1e-3, atol=1e-3)
    for (name, ours), theirs in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=name)
    model.eval(), other.eval()
    close(model, other)

    model, other = fused(), copy.deepcopy(torchs)
    with torch.no_grad():
        for changed in (model, other):
            changed[0].weight.mul_(1.5), changed[4].bias.add_(1), changed[5].running_var.mul_(2)
    close(model, other)
    image = x[..., :20, :20]
    torch.testing.assert_close(outputs(model, image), outputs(other, image), rtol=1e-4, atol=1e-4)


def test_converting_again_sees_what_was_written_through_data():
    chain = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
    model = fastnn.convert(with_statistics(chain), fuse=True)
    x = torch.randn(1, 8, 9, 9)
    outputs(model, x)
    model[0].weight.data.mul_(2)
    expected = outputs(fastnn.revert(copy.deepcopy(model)), x)
    torch.testing.assert_close(outputs(fastnn.convert(model, fuse=True), x), expected, rtol=1e-4, atol=1e-5)
    model.train()
    model[0].weight.data.mul_(2)
    fastnn.convert(model, fuse=True).eval()
    expected = outputs(fastnn.revert(copy.deepcopy(model)), x)
    torch.testing.assert_close(outputs(model, x), expected, rtol=1e-4, atol=1e-5)


def test_threads_that_ask_for_images_of_other_sizes_at_once():
    from concurrent.futures import ThreadPoolExecutor

    model = with_statistics(various())
    images = [torch.randn(1, 3, 24 + 8 * (i % 5), 24 + 8 * (i % 3)) for i in range(15)]
    expected = [outputs(fastnn.convert(copy.deepcopy(model), fuse=True), image) for image in images]
    for _ in range(3):
        fused = fastnn.convert(copy.deepcopy(model), fuse=True)
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda image, fused=fused: outputs(fused, image), images * 4))
        assert all(torch.equal(a, b) for a, b in zip(found, expected * 4, strict=True))


def test_filters_made_anew_where_old_ones_lay():
    """Parameters that were rounded and widened again may come to lie where the ones that were folded did."""
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    fused = fastnn.convert(with_statistics(model), fuse=True)
    x = torch.randn(1, 16, 9, 9)
    before = outputs(fused, x)
    for _ in range(4):
        fused.to(torch.bfloat16).to(torch.float32)
        assert relative_error(outputs(fused, x), outputs(copy.deepcopy(fused).double(), x.double())) < 1e-6
        assert not torch.equal(outputs(fused, x), before)


def test_changed_filters_are_prepared_anew():
    conv = nn.Conv2d(32, 32, 3, padding=1)
    fused = fastnn.convert(nn.Sequential(conv, nn.ReLU()).eval(), fuse=True)
    x = torch.randn(1, 32, 16, 16)
    before = outputs(fused, x)
    with torch.no_grad():
        fused[0].weight.mul_(2)
        fused[0].bias.mul_(2)
    torch.testing.assert_close(outputs(fused, x), 2 * before)


class Viewing(nn.Module):
    """Code of the model's own that needs a layout, where there is one convolution to choose it and where there are two."""

    def __init__(self, between):
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.conv2, self.relu2 = nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()
        self.between = between

    def forward(self, x):
        x = self.pool(self.relu1(self.conv1(x)))
        if self.between:
            x = x.view(x.shape[0], -1).view(x.shape)
        x = self.relu2(self.conv2(x))
        return x if self.between else x.view(x.shape[0], -1)


@pytest.mark.parametrize("between", [True, False])
def test_code_that_asks_for_a_view(between):
    model = Viewing(between).eval()
    fused = fastnn.convert(copy.deepcopy(model), fuse=True)
    x = torch.randn(2, 3, 12, 12)
    expected = outputs(model, x)
    found = outputs(fused, x)
    assert relative_error(found, expected) < 1e-6
    assert found.stride() == expected.stride()
    # Between its own convolutions the kernels choose the layout.
    assert [call.any_layout for call in fused_calls(fused)] == [not between, False]


def test_flattened_results_may_have_any_layout():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5)
    ).eval()
    fused = fastnn.convert(copy.deepcopy(model), fuse=True)
    x = torch.randn(2, 3, 12, 12)
    assert relative_error(outputs(fused, x), outputs(model, x)) < 1e-6
    assert [call.any_layout for call in fused_calls(fused)] == [True]


def inverted(hidden=32, out=8, stride=1, padding=1, kernel=3, groups=None, expands=True):
    first = [nn.Conv2d(8, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()] if expands else []
    depthwise = nn.Conv2d(hidden, hidden, kernel, stride, padding, groups=groups or hidden, bias=False)
    return nn.Sequential(
        *first,
        *(depthwise, nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)),
        *(nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out)),
    )


class WithShortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = inverted()

    def forward(self, x):
        return x + self.inner(x)


def passes(model, x):
    """How many inverted residuals are computed in one pass."""

    def count():
        return fastnn._cpu.counters().get("inverted residual", 0)

    before = count()
    outputs(model, x)
    return count() - before


def image(*shape):
    return torch.randn(shape).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (lambda: inverted(), 1),
        (lambda: inverted(33, 17, stride=2), 1),
        (lambda: inverted(8, 24, expands=False), 0),  # fewer channels than a vector may have
        (lambda: WithShortcut(), 1),
        (lambda: nn.Sequential(WithShortcut(), WithShortcut(), inverted(stride=2)), 3),
        (lambda: inverted(padding=0), 0),
        (lambda: inverted(padding=2, kernel=5), 0),
        (lambda: inverted(stride=(2, 1)), 0),
        (lambda: inverted(groups=16), 0),
        (lambda: inverted(groups=1), 0),
    ],
)
def test_inverted_residuals(model, count, no_fallback):
    model = with_statistics(model())
    x = image(2, 8, 14, 13)
    exact = outputs(copy.deepcopy(model).double(), x.double())
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    fastnn.convert(model, fuse=True)
    assert len(calls(model)) == convolutions
    found = outputs(model, x)
    assert relative_error(found, exact) < 1e-6
    assert found.is_contiguous()
    if count:
        assert passes(model, x) == count
    # The first convolution takes no other layout so.
    assert relative_error(outputs(model, x.contiguous()), exact) < 1e-6


def test_a_first_layer_and_a_depthwise_one():
    model = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.SiLU(), inverted(expands=False))
    model = with_statistics(model)
    x = torch.randn(2, 3, 27, 31)
    exact = outputs(copy.deepcopy(model).double(), x.double())
    fused = fastnn.convert(model, fuse=True)
    assert relative_error(outputs(fused, x), exact) < 1e-6
    assert passes(fused, x) == 1


def test_all_blocks_of_mobilenet_are_computed_in_one_pass_each():
    model = fastnn.convert(with_statistics(fastnn.models.mobilenet_v2()), fuse=True)
    assert passes(model, torch.randn(1, 3, 64, 64)) == 17


def test_what_lies_between_is_used_elsewhere():
    class Tapped(nn.Module):
        def __init__(self, at):
            super().__init__()
            self.block, self.at = inverted(), at

        def forward(self, x):
            parts = list(self.block)
            found = None
            for i, part in enumerate(parts):
                x = part(x)
                found = x if i == self.at else found
            return x, found

    for at in (2, 5):
        model = with_statistics(Tapped(at))
        x = image(1, 8, 9, 9)
        expected = outputs(fastnn.revert(copy.deepcopy(model)), x)
        model = fastnn.convert(model, fuse=True)
        assert passes(model, x) == 0
        for found, one in zip(outputs(model, x), expected, strict=True):
            assert relative_error(found, one) < 1e-6


def test_changes_within_an_inverted_residual_are_seen():
    torchs = with_statistics(nn.Sequential(WithShortcut(), inverted()))
    model = fastnn.convert(copy.deepcopy(torchs), fuse=True)
    x = image(2, 8, 9, 10)

    def check(count=2):
        assert passes(model, x) == count
        assert relative_error(outputs(model, x), outputs(fastnn.revert(copy.deepcopy(model)), x)) < 1e-6

    check()
    inner = model[0].inner
    with torch.no_grad():
        for change in (
            lambda: inner[0].weight.mul_(2),
            lambda: inner[3].weight.add_(1),
            lambda: inner[6].weight.neg_(),
            lambda: inner[7].running_mean.fill_(3),
            lambda: inner[4].running_var.mul_(4),
            lambda: setattr(inner[1], "weight", nn.Parameter(torch.rand(32))),
            lambda: setattr(inner[0], "bias", nn.Parameter(torch.rand(32))),
            lambda: setattr(inner[6].weight, "data", torch.randn(8, 32, 1, 1)),
            lambda: setattr(inner[4], "eps", 0.1),
            lambda: model.load_state_dict({k: t * 0.5 for k, t in model.state_dict().items()}),
            lambda: model.load_state_dict({k: t * 0.5 for k, t in model.state_dict().items()}, assign=True),
        ):
            before = outputs(model, x)
            change()
            check()
            assert not torch.equal(outputs(model, x), before)
    for module in (inner[0], inner[1], inner[2], inner[3], inner[5], inner[7]):
        seen = []
        handle = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        check(0)
        assert seen
        handle.remove()
        check()
    inner[4].train()
    assert passes(model, x) == 0
    inner[4].eval()
    check()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert relative_error(outputs(other, x), outputs(model, x)) < 1e-6
        assert passes(other, x) == 0
        assert passes(fastnn.convert(other, fuse=True), x) == 2
    expected = outputs(model, x)
    fastnn.revert(model)
    assert relative_error(outputs(model, x), expected) < 1e-6
    assert passes(model, x) == 0


def test_a_model_that_its_layers_lead_back_to_is_collected():
    model = fastnn.convert(with_statistics(nn.Sequential(inverted())), fuse=True)
    outputs(model, image(1, 8, 9, 9))
    model[0][0].register_forward_hook(lambda *_, model=model: None)
    model[0][1].parent = [model]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_parameters_of_inference_mode():
    """They do not count what is written to them."""
    with torch.inference_mode():
        model = with_statistics(WithShortcut())
    fastnn.convert(model, fuse=True)
    x = image(1, 8, 9, 9)
    assert passes(model, x) == 1
    assert passes(model, x) == 1
    assert relative_error(outputs(model, x), outputs(fastnn.revert(copy.deepcopy(model)), x)) < 1e-6


class InPlace(nn.Module):
    """A layer and a sum, and something that is changed in place where another value is read, by ``kind``."""

    def __init__(self, kind, linear):
        super().__init__()
        self.kind = kind
        self.first, self.second = (nn.Linear(8, 8) if linear else nn.Conv2d(8, 8, 1) for _ in range(2))

    def forward(self, x):
        y = self.first(x)
        if self.kind == "written over the shortcut":
            kept = y * 1
            y.add_(self.second(kept))
            return y
        if self.kind == "by another name":
            kept = y.view_as(y)
            y += self.second(kept)
            return kept
        if self.kind == "the caller's":
            x += y
            return x * 1
        if self.kind == "the layer's input":
            z = self.second(y)
            y.mul_(2)
            return z + y
        if self.kind == "the layer's input, by an operator":
            z = self.second(y)
            y *= 2
            return torch.relu(z + x)
        if self.kind == "an item":
            z = self.second(y)
            y[:, 0] = 0
            return z + x
        if self.kind == "by a function":
            z = self.second(y)
            torch.nn.functional.relu(y, inplace=True)
            return z + x
        if self.kind == "into out":
            z = self.second(y)
            torch.neg(x, out=y)
            return z + x
        if self.kind == "into out, and a second value":
            z, w = self.second(y), x * 2
            torch.neg(w, out=y)
            return z + x
        if self.kind == "bits":
            mask = x > 0
            same = mask
            mask &= x < 1
            return torch.relu(self.second(y) + x) * same
        if self.kind == "numbers":
            count = x.shape[1]
            more = count
            more += 1
            return torch.relu(self.second(y) + x) * count + more
        if self.kind == "nobody else's":
            return self.second(x).add(torch.relu_(y))
        raise NotImplementedError(self.kind)


@pytest.mark.parametrize("linear", [False, True], ids=["convolution", "linear"])
@pytest.mark.parametrize(
    ("kind", "fused_layers"),
    [
        ("written over the shortcut", 0),
        ("by another name", 0),
        ("the caller's", 0),
        ("the layer's input", 0),
        ("the layer's input, by an operator", 0),
        ("an item", 0),
        ("by a function", 0),
        ("into out", 0),
        ("into out, and a second value", 0),
        ("bits", 1),
        ("numbers", 1),
        ("nobody else's", 2),
    ],
)
def test_what_is_changed_in_place(kind, fused_layers, linear):
    plain = InPlace(kind, linear).eval()
    fused = fastnn.convert(copy.deepcopy(plain), fuse=True)
    x = torch.randn(2, 8, 3, 8) if linear else torch.randn(2, 8, 5, 4)
    for _ in range(2):
        given, expected_given = x.clone(), x.clone()
        torch.testing.assert_close(outputs(fused, given), outputs(plain, expected_given))
        assert torch.equal(given, expected_given) or not torch.equal(given, x)
    found = 0
    if is_fused(type(fused)):
        calls_of = type(fused)._fused_calls
        found = len(calls_of.linears if linear else calls_of.convolutions)
    assert found == fused_layers


class Perceptron(nn.Module):
    def __init__(self, activation, kind="module"):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(24, 40), nn.Linear(40, 24), nn.LayerNorm(24)
        self.activation, self.kind = activation, kind

    def forward(self, x, y):
        hidden = self.activation(self.up(x))
        return self.norm(self.down(hidden) + y if self.kind == "after" else y + self.down(hidden))


@pytest.mark.parametrize("prepacked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU(inplace=True), nn.SiLU(), F.gelu, torch.tanh])
def test_linear_layers(activation, dtype, prepacked, no_fallback):
    plain = Perceptron(activation).to(dtype).eval()
    fused = fastnn.convert(copy.deepcopy(plain), fuse=True)
    if prepacked:
        fastnn.prepack_(fused)
    linears = type(fused)._fused_calls.linears
    assert [call.activation != "none" for call in linears] == [True, False]
    assert "2 linear layers" in fastnn.report(fused).rows[0].reason
    exact = copy.deepcopy(plain).double()
    for rows in (1, 3, 50):
        x, y = torch.randn(2, rows, 24, dtype=dtype), torch.randn(2, rows, 24, dtype=dtype)
        expected = exact(x.double(), y.double())
        with torch.inference_mode():
            torchs = relative_error(plain(x, y), expected)
            assert relative_error(fused(x, y), expected) <= 2 * torchs + 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(fused(x, y[:, :1]), fused(x, y[:, :1].expand_as(y).clone()))


def test_fused_linear_layers_follow_their_model(monkeypatch):
    plain = Perceptron(nn.GELU()).eval()
    fused = fastnn.convert(copy.deepcopy(plain), fuse=True)
    x, y = torch.randn(2, 9, 24), torch.randn(2, 9, 24)
    called = []
    original = fastnn.nn.Linear.forward_act
    monkeypatch.setattr(fastnn.nn.Linear, "forward_act", lambda *a: called.append(a[2]) or original(*a))
    outputs(lambda x: fused(x, y), x)
    assert called == ["gelu"]
    # Gradients, training and hooks: one by one.
    fused(x, y).sum().backward()
    handle = fused.up.register_forward_hook(lambda *_: called.append("hook"))
    with torch.no_grad():
        torch.testing.assert_close(fused(x, y), plain(x, y))
    assert called == ["gelu", "hook"]
    handle.remove()
    # Another layer in its place, changed weights, and integers in their place.
    with torch.no_grad():
        plain.up = nn.Linear(24, 40)
        fused.up = copy.deepcopy(plain.up)
        torch.testing.assert_close(fused(x, y), plain(x, y))
        plain.down.weight.mul_(2)
        fused.down.weight.mul_(2)
        torch.testing.assert_close(fused(x, y), plain(x, y))
        fastnn.quant.quantize_(fused, fastnn.quant.Int8Dynamic())
        assert relative_error(fused(x, y), plain(x, y)) < 0.05
    made = pickle.loads(pickle.dumps(fastnn.convert(copy.deepcopy(plain), fuse=True)))
    with torch.no_grad():
        torch.testing.assert_close(made(x, y), plain(x, y))


def test_what_a_shared_linear_layer_computes():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            return torch.relu(self.inner(torch.relu(self.inner(x))))

    plain = Twice().eval()
    fused = fastnn.convert(copy.deepcopy(plain), fuse=True)
    x = torch.randn(3, 8)
    torch.testing.assert_close(outputs(fused, x), outputs(plain, x))


class Optional(nn.Module):
    """A forward that takes another way with other arguments than its defaults."""

    def __init__(self, linear):
        super().__init__()
        self.first, self.second = (nn.Linear(8, 8) if linear else nn.Conv2d(8, 8, 1) for _ in range(2))

    def forward(self, x, shortcut=None, scale: float = 1.0, *, both=False, **more):
        y = torch.relu(self.first(x))
        if shortcut is not None:
            y = y + shortcut
        if more:
            y = y * more["factor"]
        z = torch.relu(self.second(y)) * scale
        return (z, y) if both else z


@pytest.mark.parametrize("linear", [False, True], ids=["convolution", "linear"])
def test_arguments_with_defaults(linear, monkeypatch):
    plain = Optional(linear).eval()
    fused = fastnn.convert(copy.deepcopy(plain), fuse=True)
    called = []
    kind = Optional
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *a, **k: called.append(1) or original(*a, **k))
    x = torch.randn(2, 8, 3, 8) if linear else torch.randn(2, 8, 5, 4)
    with torch.no_grad():
        for args, kwargs in (((x,), {}), ((), {"x": x}), ((x, None), {"both": False})):
            torch.testing.assert_close(fused(*args, **kwargs), original(plain, *args, **kwargs))
        assert not called
        for args, kwargs in (((x, x), {}), ((x,), {"both": True}), ((x,), {"scale": 2.0}), ((x,), {"factor": 3.0})):
            torch.testing.assert_close(fused(*args, **kwargs), original(plain, *args, **kwargs))
        assert len(called) == 4
        with pytest.raises(TypeError):
            fused()
        with pytest.raises(TypeError):
            fused(x, x, 1.0, 2.0)


class Named(dict):
    """As the results of transformers' models: a dictionary with attributes."""

    def __getattr__(self, name):
        return self[name]


def test_a_result_with_attributes_stays_what_it_is():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

        def forward(self, x, scale=1.0):
            return Named(last=self.inner(x) * scale)

    plain = Model().eval()
    fused = fastnn.convert(copy.deepcopy(plain), fuse=True)
    x = torch.randn(3, 8)
    with torch.no_grad():
        found = fused(x)
        assert type(found) is Named
        torch.testing.assert_close(found.last, plain(x).last)
    assert not is_fused(type(fused))
    assert is_fused(type(fused.inner))


def test_an_ordered_dictionary_stays_one():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            return collections.OrderedDict([("b", torch.relu(self.inner(x))), ("a", (x, 1))])

    plain = Model().eval()
    fused = fastnn.convert(copy.deepcopy(plain), fuse=True)
    assert is_fused(type(fused))
    x = torch.randn(3, 8)
    found, expected = outputs(fused, x), outputs(plain, x)
    assert type(found) is collections.OrderedDict
    assert list(found) == ["b", "a"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("follows", [True, False])
def test_what_a_forward_keeps_is_left_as_it_was(follows):
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)
            self.longest = None

        def forward(self, x):
            if self.longest is None or (self.longest.shape[0] < x.shape[0]):
                self.longest = x * 1
                self.new = x
            y = torch.relu(self.inner(x))
            return y if follows or y.sum() > 0 else -y

    model = Keeping().eval()
    fused = fastnn.convert(nn.Sequential(model), fuse=True)
    assert model.longest is None
    assert not hasattr(model, "new")
    assert not model.training
    for rows in (3, 5, 4):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(
            outputs(fused, x), torch.relu(F.linear(x, model.inner.weight, model.inner.bias)).detach()
        )


class Odd(nn.Module):
    """A forward that a graph would not do justice to, by ``kind``."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.inner = kind, nn.Linear(8, 8)
        self.last, self.seen = None, []
        self.state = torch.zeros(3, 8)

    def forward(self, x, other):
        y = torch.relu(self.inner(x))
        if self.kind == "keeps a tensor":
            self.last = y
        if self.kind == "a list of them":
            self.seen.append(y)
        if self.kind == "has a state":
            self.state = y = y + self.state
        if self.kind == "draws numbers":
            y = y + torch.randn(8)
        if self.kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                y = torch.relu(self.inner(x))
        if self.kind == "gradients":
            with torch.enable_grad():
                z = x.detach().requires_grad_()
                y = torch.autograd.grad(torch.relu(self.inner(z)).sum(), z)[0]
        return y if other is None else y + other


@pytest.mark.parametrize(
    "kind", ["keeps a tensor", "a list of them", "has a state", "draws numbers", "autocast", "gradients", "a flag"]
)
def test_what_a_graph_would_not_do(kind):
    plain = Odd(kind).eval()
    fused = fastnn.convert(nn.Sequential(copy.deepcopy(plain)), fuse=True)[0]
    assert is_fused(type(fused)) == (kind == "a flag")
    x = torch.randn(3, 8)
    with torch.no_grad():
        for _ in range(2):
            for other in (None, x):
                torch.manual_seed(0)
                expected = plain(x, other)
                torch.manual_seed(0)
                found = fused(x, other)
                assert found.dtype == expected.dtype
                torch.testing.assert_close(found, expected)
    assert len(fused.seen) == len(plain.seen)
    assert type(fused.last) is type(plain.last)


def test_another_module_of_a_fused_class_is_not_fused():
    fused = fastnn.convert(Perceptron(nn.GELU()).eval(), fuse=True)
    other = type(fused)(nn.GELU()).eval()
    x, y = torch.randn(3, 24), torch.randn(3, 24)
    with torch.no_grad():
        torch.testing.assert_close(other(x, y), fastnn.revert(copy.deepcopy(other))(x, y))
        assert not torch.equal(other(x, y), fused(x, y))


def test_hooks_and_replacements_inside_of_linear_models():
    model = fastnn.convert(nn.Sequential(Perceptron(nn.GELU()), nn.Identity()).eval(), fuse=True)
    outer = nn.ModuleDict({"inner": model})
    called = []
    model[0].register_forward_hook(lambda *_: called.append(1))

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.last = outer["inner"][0], nn.Linear(24, 24)

        def forward(self, x, y):
            return torch.relu(self.last(self.part(x, y)))

    around = fastnn.convert(Around().eval(), fuse=True)
    x, y = torch.randn(3, 24), torch.randn(3, 24)
    with torch.no_grad():
        around(x, y)
        assert called == [1]
        around.part = Perceptron(nn.ReLU()).eval()
        expected = torch.relu(F.linear(around.part(x, y), around.last.weight, around.last.bias))
        torch.testing.assert_close(around(x, y), expected)


class SumInPlace(nn.Module):
    """A sum with something else, that is written over the layer's result."""

    def __init__(self, kind, add):
        super().__init__()
        widen = [nn.Conv2d(8, 16, 1), nn.ReLU6(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6()]
        self.before = nn.Sequential(*widen if kind == "inverted" else [])
        self.layer = nn.Linear(8, 8) if kind == "linear" else nn.Conv2d(16 if kind == "inverted" else 8, 8, 1)
        self.add = add

    def forward(self, x, other):
        return self.add(self.layer(self.before(x)), other)


@pytest.mark.parametrize(
    ("kind", "prepacked"), [("conv", False), ("inverted", False), ("linear", False), ("linear", True)]
)
@pytest.mark.parametrize("add", [operator.add, operator.iadd, lambda a, b: a.add_(b)], ids=["add", "iadd", "add_"])
def test_a_sum_in_place_is_of_the_layers_dtype_and_shape(kind, prepacked, add):
    plain = SumInPlace(kind, add).eval().bfloat16()
    fused = fastnn.convert(copy.deepcopy(plain), fuse=True)
    if prepacked:
        fastnn.prepack_(fused)
    shape = (2, 8, 5, 8)
    x = torch.randn(shape).bfloat16()
    with torch.no_grad():
        for other in (torch.randn(shape), torch.randn(8, 1, 8), torch.randn(shape, dtype=torch.float64)):
            for _ in range(2):
                found, expected = fused(x, other), plain(x, other)
                assert found.dtype is expected.dtype
                torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
        larger = torch.randn(3, *shape).bfloat16()
        if add is operator.add:
            assert fused(x, larger).shape == plain(x, larger).shape
        else:
            with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
                fused(x, larger)


class Asking(nn.Module):
    """A forward that asks what it was given, or (``result``) what a layer has returned."""

    def __init__(self, result):
        super().__init__()
        self.first, self.second, self.result = nn.Linear(8, 8), nn.Linear(8, 8), result

    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            x = x[0]
        y = self.first(x)
        if self.result and isinstance(y, torch.Tensor):
            y = y * 2
        return torch.relu(self.second(y)) if torch.is_tensor(x) else y


@pytest.mark.parametrize("result", [False, True])
def test_a_forward_that_asks_for_types(result):
    plain = Asking(result).eval()
    fused = fastnn.convert(copy.deepcopy(plain), fuse=True)
    assert is_fused(type(fused)) is not result
    x = torch.randn(3, 8)
    torch.testing.assert_close(outputs(fused, x), outputs(plain, x))


class Making(nn.Module):
    """A forward that makes a tensor, and changes or returns it, by ``kind``."""

    def __init__(self, kind, linear):
        super().__init__()
        self.layer, self.kind = nn.Linear(8, 8) if linear else nn.Conv2d(8, 8, 1), kind
        self.sums = [torch.zeros(8)]

    def forward(self, x):
        y = torch.relu(self.layer(x))
        made = torch.zeros(8)
        if self.kind == "in a list":
            self.sums[0] += y.sum()
            made = self.sums[0] * 1
        if self.kind == "in a list, read":
            made = y.sum() + self.sums[0]
        if self.kind == "+=":
            made += y.sum()
        if self.kind == "method":
            made.add_(y.sum())
        if self.kind == "item":
            made[0] = y.sum()
            made[1] += 1
        if self.kind == "view":
            view = made.view(2, 4)
            view += y.sum()
        if self.kind == "changed after":
            made.add_(y.sum())
            made.fill_(3)
        if self.kind == "changed between":
            y = y + made.sum() + made[0]
            made.fill_(3)
        if self.kind == "of its dtype":
            made = torch.ones(8, dtype=y.dtype) if y.dtype == torch.float32 else made + 5
        return y, made


@pytest.mark.parametrize("linear", [False, True], ids=["convolution", "linear"])
@pytest.mark.parametrize(
    ("kind", "follows"),
    [
        ("returned", True),
        ("+=", False),
        ("method", False),
        ("item", False),
        ("view", False),
        ("changed after", False),
        ("changed between", False),
        ("of its dtype", True),
        ("in a list", False),
        ("in a list, read", False),
    ],
)
def test_tensors_that_a_forward_makes(kind, follows, linear):
    plain = Making(kind, linear).eval()
    fused = fastnn.convert(copy.deepcopy(plain), fuse=True)
    x = torch.randn(2, 8, 3, 8)
    for _ in range(3):
        found, expected = outputs(fused, x), outputs(plain, x)
        torch.testing.assert_close(found, expected)
        found[1].add_(1)  # which is the caller's
    assert is_fused(type(fused)) is follows


class Clamping(nn.Module):
    """As layers of Hugging Face's that may run in float16; ``between`` stands before what is asked for."""

    def __init__(self, between=None):
        super().__init__()
        self.first, self.second, self.between = nn.Linear(8, 8), nn.Linear(8, 8), between

    def forward(self, x):
        y = self.second(torch.nn.functional.gelu(self.first(x)))
        if self.between is not None:
            y = self.between(y, x)
        if y.dtype == torch.float16:
            y = y.clamp(-1, 1)
        if x.dtype == torch.float64:
            y = y * 2
        return y.to(x.dtype) + x


def test_a_forward_that_asks_for_dtypes():
    plain = Clamping().eval()
    fused = fastnn.convert(copy.deepcopy(plain), fuse=True)
    calls = type(fused)._fused_calls
    assert len(calls.linears) == 1
    x = torch.randn(3, 8)
    for _ in range(2):
        torch.testing.assert_close(outputs(fused, x), outputs(plain, x))
        assert calls.are_current()
    for dtype in (torch.bfloat16, torch.float64):
        plain.to(dtype), fused.to(dtype)
        for _ in range(2):
            found, expected = outputs(fused, x.to(dtype)), outputs(plain, x.to(dtype))
            assert found.dtype is dtype
            torch.testing.assert_close(found, expected)
        assert not calls.are_current()
        fastnn.convert(fused, fuse=True)
        calls = type(fused)._fused_calls
        torch.testing.assert_close(outputs(fused, x.to(dtype)), outputs(plain, x.to(dtype)))
        assert calls.are_current()


def test_an_unexpected_dtype_is_found_before_anything_has_changed():
    changing = fastnn.convert(Clamping(lambda y, x: y.add_(x.mul_(2))).eval(), fuse=True)
    assert not is_fused(type(changing))  # the caller's x would be doubled twice
    plain = Clamping(lambda y, x: y.double()).eval()
    fused = fastnn.convert(copy.deepcopy(plain), fuse=True)
    x = torch.randn(3, 8)
    for _ in range(2):
        found, expected = outputs(fused, x), outputs(plain, x)
        assert found.dtype is expected.dtype
        torch.testing.assert_close(found, expected)
    assert not type(fused)._fused_calls.unchanged()


class Told(nn.Module):
    """A forward that goes by what a proxy cannot tell it, or that keeps something, by ``kind``."""

    def __init__(self, kind):
        super().__init__()
        self.layer, self.kind = nn.Linear(8, 8), kind
        self.count, self.register, self.views = torch.zeros(1), {"seen": torch.zeros(1)}, torch.ones(2, 4)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        y = torch.relu(self.layer(x))
        if self.kind == "written" and "cpu" in str(x.device):
            y = y * 2
        if self.kind == "formatted" and f"{x.device}" == "cpu":
            y = y * 2
        if self.kind == "has" and hasattr(x, "tensors"):
            y = y * 2
        if self.kind == "is_tensor of a number" and not torch.is_tensor(x.shape[-1]):
            y = y * 2
        if self.kind == "parameters":
            y = y + sum(p.abs().sum() for p in self.parameters())
        if self.kind == "buffers":
            y = y + dict(self.named_buffers())["scale"] * 2
        if self.kind == "dtype of parameters":
            y = y.to(next(self.parameters()).dtype)
        if self.kind == "random" and random.random() < 0.5:
            y = y * 2
        if self.kind == "numpy's random":
            y = y * float(np.random.rand())
        if self.kind == "count":
            self.count += 1
            y = y * self.count
        if self.kind == "count in a dictionary":
            self.register["seen"] += 1
            y = y * self.register["seen"]
        if self.kind == "view":
            return y, self.views.view(8)
        if self.kind == "dataclass":
            return Doubling(y)
        return y


@dataclasses.dataclass
class Doubling:
    value: torch.Tensor

    def __post_init__(self):
        self.value = self.value * 2


TOLD = (
    "written",
    "formatted",
    "has",
    "is_tensor of a number",
    "parameters",
    "buffers",
    "dtype of parameters",
    "random",
)
TOLD += ("numpy's random", "count", "count in a dictionary", "view", "dataclass")


@pytest.mark.parametrize("kind", TOLD)
def test_forwards_that_a_proxy_cannot_tell(kind):
    plain = Told(kind).eval()
    random.seed(7), np.random.seed(7)
    states = random.getstate(), str(np.random.get_state())
    fused = fastnn.convert(copy.deepcopy(plain), fuse=True)
    assert (random.getstate(), str(np.random.get_state())) == states
    x = torch.randn(3, 8)
    for step in range(3):
        results = []
        for model in (plain, fused):
            random.seed(step), np.random.seed(step)
            results.append(outputs(model, x))
            if kind == "view":
                results[-1][1].add_(1)
            if kind == "dataclass":
                results[-1] = results[-1].value
        if kind != "count in a dictionary":  # which following it once has changed
            torch.testing.assert_close(*results)
        for model in (plain, fused):
            with torch.no_grad():
                model.scale.mul_(3)
                for parameter in model.parameters():
                    parameter.mul_(1.5)
    assert is_fused(type(fused)) is (kind == "has")


class Listing(nn.Module):
    """As DenseNet's layers, that take a tensor or a list of them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 1)

    def forward(self, input):
        features = [input] if isinstance(input, torch.Tensor) else input
        return torch.relu(self.layer(torch.cat(features, 1)))


def test_arguments_that_are_no_tensors():
    plain = Listing().eval()
    fused = fastnn.convert(copy.deepcopy(plain), fuse=True)
    assert is_fused(type(fused))
    x = torch.randn(2, 4, 5, 5)
    for given in (x, [x[:, :2], x[:, 2:]], (x[:, :1], x[:, 1:])):
        torch.testing.assert_close(outputs(fused, given), outputs(plain, given))
