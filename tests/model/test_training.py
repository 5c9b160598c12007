"""A converted model in the places where models live: training, compile, checkpointing, DataLoader workers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastnn

from .closeness import assert_as_near_as_torch


def network(activation=nn.GELU):
    return nn.Sequential(
        nn.Linear(20, 48), activation(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 5)
    )


def gradients(model, x, target):
    model.zero_grad(set_to_none=True)
    loss = nn.functional.cross_entropy(model(x).double(), target)
    loss.backward()
    parameters = list(model.parameters())
    # One number may be right by luck: it is judged in the precision that it was computed with.
    return [loss.detach().to(parameters[0].dtype), *(p.grad for p in parameters)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Sigmoid])
def test_gradients_are_as_near_to_float64_as_torchs(dtype, activation, no_fallback):
    theirs = network(activation).to(dtype)
    ours = fastnn.convert(copy.deepcopy(theirs), strict=True)
    exact = copy.deepcopy(theirs).double()
    x, target = torch.randn(33, 20, dtype=dtype), torch.randint(5, (33,))
    triples = zip(
        gradients(ours, x, target), gradients(theirs, x, target), gradients(exact, x.double(), target), strict=True
    )
    for one, other, truth in triples:
        assert_as_near_as_torch(one, other, truth)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_training_follows_float64_as_closely_as_torch(optimizer, no_fallback):
    theirs = network()
    ours, exact = fastnn.convert(copy.deepcopy(theirs)), copy.deepcopy(theirs).double()
    x, target = torch.randn(8, 32, 20), torch.randint(5, (8, 32))
    losses = []
    for model in (ours, theirs, exact):
        steps = optimizer(model.parameters(), lr=1e-3)
        history = []
        for _epoch in range(3):
            for batch, labels in zip(x, target, strict=True):
                loss, *_ = gradients(model, batch.to(model[0].weight.dtype), labels)
                history.append(loss)
                steps.step()
        losses.append(torch.stack(history))
    assert losses[2][-1] < losses[2][0]
    assert_as_near_as_torch(losses[0], losses[1], losses[2], factor=4)
    for one, other, truth in zip(ours.parameters(), theirs.parameters(), exact.parameters(), strict=True):
        assert_as_near_as_torch(one.detach(), other.detach(), truth, factor=4)


def test_training_resumes_across_conversion():
    """Optimizer state stays with the parameters when a model is converted, and reverted, in mid-training."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, target = torch.randn(32, 20), torch.randint(5, (32,))
    reference = copy.deepcopy(model)
    reference_optimizer = torch.optim.Adam(reference.parameters(), lr=1e-2)
    for step in range(9):
        if step == 3:
            fastnn.convert(model)
        if step == 6:
            fastnn.revert(model)
        for one, steps in ((model, optimizer), (reference, reference_optimizer)):
            gradients(one, x, target)
            steps.step()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    model = fastnn.convert(network())
    x, target = torch.randn(32, 20), torch.randint(5, (32,))
    expected = gradients(model, x, target)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    # The reentrant form asks for an input that requires a gradient.
    for one, other in zip(gradients(Checkpointed(), x.requires_grad_(), target), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    model = fastnn.convert(network())
    x, target = torch.randn(32, 20), torch.randint(5, (32,))
    expected = gradients(model, x, target)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for one, other in zip(gradients(compiled, x, target), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_compile_before_convert_and_module_compile():
    plain = network()
    x = torch.randn(32, 20)
    with torch.no_grad():
        expected = plain(x)
        torch._dynamo.reset()
        compiled = torch.compile(plain, backend="aot_eager")
        compiled(x)
        fastnn.convert(compiled)
        assert type(plain[0]) is fastnn.nn.Linear
        torch.testing.assert_close(compiled(x), expected)
        fastnn.revert(compiled)
        torch.testing.assert_close(compiled(x), expected)
        inner = fastnn.convert(plain)
        inner.compile(backend="aot_eager")
        torch.testing.assert_close(inner(x), expected)


def test_compile_with_dynamic_batch():
    model = fastnn.convert(network())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (2, 3, 7):
            x = torch.randn(rows, 20)
            torch.testing.assert_close(compiled(x), model(x))


def test_export():
    model = fastnn.convert(network()).eval()
    x = torch.randn(4, 20)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    y = torch.randn(9, 20)
    torch.testing.assert_close(program.module()(y), model(y))


def test_autocast():
    theirs = network()
    ours = fastnn.convert(copy.deepcopy(theirs))
    x, target = torch.randn(32, 20), torch.randint(5, (32,))
    truth = gradients(copy.deepcopy(theirs).double(), x.double(), target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x).dtype == theirs(x).dtype
        got, expected = gradients(ours, x, target), gradients(theirs, x, target)
    for one, other, reference in zip(got, expected, truth, strict=True):
        assert_as_near_as_torch(one, other, reference, factor=2)


def test_per_sample_gradients_with_torch_func():
    model = fastnn.convert(network())
    x, target = torch.randn(6, 20), torch.randint(5, (6,))
    state = dict(model.named_parameters())

    def loss(state, row, label):
        return nn.functional.cross_entropy(torch.func.functional_call(model, state, (row,)), label)

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(state, x, target)
    for index in range(6):
        model.zero_grad()
        loss(state, x[index], target[index]).backward()
        for name, parameter in state.items():
            torch.testing.assert_close(each[name][index], parameter.grad, rtol=1e-4, atol=1e-6)


class Encoded(torch.utils.data.Dataset):
    """A data set whose items go through a model, as those with an encoder do."""

    def __init__(self, model, rows):
        self.model, self.rows = model, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        with torch.no_grad():
            return self.model(self.rows[index])


@pytest.mark.parametrize("prepacked", [False, True])
def test_dataloader_workers(prepacked):
    model = fastnn.convert(nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 50)))
    if prepacked:
        fastnn.prepack_(model)
    rows = torch.randn(8, 64, 200)
    with torch.no_grad():
        # The parent's threads have run before the fork.
        expected = model(rows.flatten(0, 1)).view(8, 64, 50)
    loader = torch.utils.data.DataLoader(
        Encoded(model, rows), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    torch.testing.assert_close(torch.cat(list(loader)), expected)


def test_gradients_accumulate_and_scale_and_clip():
    model, plain = fastnn.convert(network()), network()
    plain.load_state_dict(model.state_dict())
    x, target = torch.randn(32, 20), torch.randint(5, (32,))
    for one in (model, plain):
        for part in range(4):
            rows = slice(8 * part, 8 * part + 8)
            (nn.functional.cross_entropy(one(x[rows]), target[rows]) / 4).backward()
        nn.utils.clip_grad_norm_(one.parameters(), 0.1)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


# ---- convolutional networks --------------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    """Strided, padded, depthwise and pointwise convolutions, and a transposed one; two outputs."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(2, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", groups=8),
            nn.Conv2d(8, 12, 1, bias=False),
            nn.GELU(),
        )
        self.up = nn.ConvTranspose2d(12, 2, 4, stride=2, padding=1)
        self.classes = nn.Linear(12, 5)

    def forward(self, x):
        features = self.down(x)
        return self.classes(features.mean((2, 3))), self.up(features)


def image_losses(model, images, target, steps=9, **to):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.to(**to)
    history = []
    for step in range(steps):
        batch, labels = images[step % 3].to(**to), target[step % 3]
        scores, image = model(batch)
        loss = nn.functional.cross_entropy(scores, labels) + (image - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.detach())
    return torch.stack(history)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_a_convolutional_network_trains_as_torchs(memory_format, no_fallback):
    torch.set_num_threads(1)
    theirs = Autoencoder()
    ours, exact = fastnn.convert(copy.deepcopy(theirs), strict=True), copy.deepcopy(theirs)
    images, target = torch.randn(3, 6, 2, 12, 10), torch.randint(5, (3, 6))
    losses = [
        image_losses(model, images, target, memory_format=memory_format, dtype=dtype)
        for model, dtype in ((ours, torch.float32), (theirs, torch.float32), (exact, torch.float64))
    ]
    assert losses[2][-3:].mean() < losses[2][:3].mean()
    assert_as_near_as_torch(*losses, factor=4)
    for one, other, truth in zip(ours.parameters(), theirs.parameters(), exact.parameters(), strict=True):
        assert one.grad.stride() == other.grad.stride()
        assert_as_near_as_torch(one.detach(), other.detach(), truth.detach(), factor=6, roundoffs=64)


def test_a_convolutional_network_under_patch_and_autocast():
    theirs = Autoencoder()
    ours = fastnn.convert(copy.deepcopy(theirs))
    x = torch.randn(3, 2, 12, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = theirs(x), ours(x)
        with fastnn.patch():
            patched = theirs(x)
    for found in (got, patched):
        for one, other in zip(found, expected, strict=True):
            assert one.dtype is other.dtype
            torch.testing.assert_close(one.float(), other.float(), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("edge", [6, 160], ids=["small", "large"])
def test_results_can_be_changed_in_place(layout, edge):
    """Of every family, also where the caching allocator has made them: none is a view, which autograd would refuse."""
    torch.manual_seed(0)
    layers = [
        torch.nn.Conv2d(3, 48, 3, padding=1),
        torch.nn.BatchNorm2d(48),
        torch.nn.MaxPool2d(3, 1, 1),
        torch.nn.AvgPool2d(3, 1, 1),
        torch.nn.ConvTranspose2d(48, 48, 1),
        torch.nn.GELU(),
    ]
    theirs = torch.nn.Sequential(*(m for layer in layers for m in (layer, torch.nn.Hardtanh(-1, 2, inplace=True))))
    theirs.to(memory_format=layout)
    ours = fastnn.convert(copy.deepcopy(theirs))
    x = torch.randn(1, 3, edge, edge).contiguous(memory_format=layout)
    results = []
    for model in (ours, theirs):
        y = model(x)
        results.append((y, *torch.autograd.grad(y.square().mean(), list(model.parameters()))))
    assert results[0][0].stride() == results[1][0].stride()
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
