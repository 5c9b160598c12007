"""Batch norm where it differs from the other ops: running statistics, the fused form, mixed dtypes, its layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, hessian, jacrev, jvp, vmap

import fastnn
import fastnn.functional as fF
from fastnn import _state

from .support import FLOATS

LAYERS = {1: (fastnn.nn.BatchNorm1d, torch.nn.BatchNorm1d), 2: (fastnn.nn.BatchNorm2d, torch.nn.BatchNorm2d)}


def statistics(channels, dtype=torch.float32):
    return torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 0.5


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, 0.7, -0.5])
def test_running_statistics(dtype, momentum, machine, no_fallback):
    x = (torch.randn(6, 5, 7) * 3 + 2).to(dtype)
    ours = statistics(5, dtype)
    wide = [t.double() for t in (t.clone() for t in ours)]
    versions = [t._version for t in ours]
    fF.batch_norm(x, *ours, training=True, momentum=momentum)
    F.batch_norm(x.double(), *wide, training=True, momentum=momentum)
    for mine, exact, version in zip(ours, wide, versions, strict=True):
        torch.testing.assert_close(
            mine.double(), exact, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps
        )
        assert mine._version > version
    before = [t.clone() for t in ours]
    fF.batch_norm(x, *ours, momentum=momentum)
    assert all(torch.equal(a, b) for a, b in zip(before, ours, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_float32_parameters_with_16_bit_input(dtype, training, machine, no_fallback):
    x = torch.randn(5, 6, 4).to(dtype).requires_grad_()
    weight, bias = (torch.randn(6, requires_grad=True) for _ in range(2))
    mean, var = statistics(6)
    results = []
    for function in (fF.batch_norm, F.batch_norm):
        running = mean.clone(), var.clone()
        y = function(x, *running, weight, bias, training)
        results.append((y, *torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y).cumsum(0)), *running))
    for ours, torchs in zip(*results, strict=True):
        assert ours.dtype is torchs.dtype
        torch.testing.assert_close(ours, torchs, rtol=2e-2, atol=2e-1)


def strided():
    r = torch.randn
    yield r(2, 3, 4, 5)
    yield r(2, 3, 4, 5).to(memory_format=torch.channels_last)
    yield r(2, 3, 4, 5, 2).to(memory_format=torch.channels_last_3d)
    yield r(2, 3, 4, 5)[..., ::2]
    yield r(2, 4, 5, 3).permute(0, 3, 2, 1)
    yield r(3, 2, 4, 5).transpose(0, 1)
    yield r(2, 4, 3).transpose(1, 2)
    yield r(3, 6).t()
    yield r(1, 3, 4, 5).expand(2, 3, 4, 5)
    yield r(4, 1, 5).expand(4, 3, 5)
    yield r(2, 4, 6, 3).permute(0, 3, 1, 2)[:, :, :, ::2]
    yield r(2, 3, 1, 1)
    yield r(2, 1, 1, 3).permute(0, 3, 1, 2)
    yield r(2, 1, 4, 5)
    yield r(4, 5, 3, 2).permute(1, 2, 0, 3)
    yield r(2, 3, 4, 2, 2, 2)
    yield torch._neg_view(r(2, 3, 4))


@pytest.mark.parametrize("training", [True, False])
def test_strides_are_torchs(training, machine, no_fallback):
    for x in strided():
        channels = x.shape[1]
        weight = torch.randn(2 * channels)[::2].requires_grad_()
        mean, var = statistics(channels)
        x.requires_grad_()
        found = []
        # The values are compared with float64's: torch 2.13 reads a strided weight wrongly in one of its paths.
        for function, dtype in ((fF.batch_norm, None), (F.batch_norm, None), (F.batch_norm, torch.float64)):
            leaves, running = (x, weight), (mean.clone(), var.clone())
            if dtype:
                leaves = tuple(t.detach().double().requires_grad_() for t in leaves)
                running = tuple(t.double() for t in running)
            y = function(leaves[0], *running, leaves[1], None, training)
            direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
            found.append((y, *torch.autograd.grad(y, leaves, direction)))
        for ours, torchs, exact in zip(*found, strict=True):
            assert ours.stride() == torchs.stride()
            torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)
        meta = fF.batch_norm(x.detach().to("meta"), *(t.to("meta") for t in (mean, var)), training=training)
        assert (meta.shape, meta.is_meta) == (y.shape, True)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0)])
@pytest.mark.parametrize("training", [True, False])
def test_no_elements(shape, training, no_fallback):
    x, weight = torch.empty(shape, requires_grad=True), torch.ones(3, requires_grad=True)
    mean, var = statistics(3)
    y = fF.batch_norm(x, mean, var, weight, None, training)
    torchs = F.batch_norm(x, mean, var, weight, None, training)
    assert (y.shape, y.stride(), y.requires_grad) == (torchs.shape, torchs.stride(), True)
    y.sum().backward()
    assert not weight.grad.any()


def unfused(x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, residual=None, relu=True):
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    y = y if residual is None else y + residual
    return torch.relu(y) if relu else y


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_fused(training, with_residual, activation, memory_format, machine, no_fallback):
    x, residual = (torch.randn(4, 7, 5, 6).contiguous(memory_format=memory_format) for _ in range(2))
    weight, bias = torch.randn(7), torch.randn(7)
    tensors = [x, weight, bias, *([residual] if with_residual else [])]
    running = statistics(7)
    direction = torch.randn(4, 7, 5, 6)
    found = []
    for wide in (False, True):
        leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in tensors]
        held = [t.double() if wide else t.clone() for t in running]
        added = leaves[3] if with_residual else None
        if wide:
            y = unfused(leaves[0], *held, *leaves[1:3], training, residual=added, relu=activation == "relu")
        else:
            y = fF.batch_norm_act(
                leaves[0], *held, *leaves[1:3], training=training, activation=activation, residual=added
            )
        found.append((y, *torch.autograd.grad(y, leaves, direction.to(y.dtype)), *held))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=2e-5)


def test_fused_errors():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="activation"):
        fF.batch_norm_act(x, None, None, training=True, activation="gelu")
    with pytest.raises(RuntimeError, match="residual"):
        fF.batch_norm_act(x, None, None, training=True, residual=torch.randn(3, 5))
    with pytest.raises(TypeError, match="residual"):
        fF.batch_norm_act(x, None, None, training=True, residual="x")
    _state.reset_fallbacks()
    residual = torch.randn(3, 1)
    close(
        fF.batch_norm_act(x, None, None, training=True, residual=residual),
        unfused(x, None, None, training=True, residual=residual),
    )
    assert [op for op, _ in _state.fallbacks()] == ["batch_norm_act"]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def pair(dims, **arguments):
    ours, torchs = (kind(5, **arguments) for kind in LAYERS[dims])
    torch.nn.init.normal_(torchs.weight)
    ours.load_state_dict(torchs.state_dict())
    return ours, torchs


def same_buffers(ours, torchs):
    for (name, mine), (other, theirs) in zip(ours.named_buffers(), torchs.named_buffers(), strict=True):
        assert name == other
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_compile_updates_the_buffers(dynamic, training, no_fallback):
    torch._dynamo.reset()
    ours, torchs = pair(2)
    ours.train(training), torchs.train(training)
    compiled = torch.compile(ours, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (3, 4, 6) if dynamic else (3, 3):
        x = torch.randn(n, 5, n + 1, 4, requires_grad=True)
        y, expected = compiled(x), torchs(x)
        close(y, expected)
        for a, b in zip(
            torch.autograd.grad(y.sin().sum(), (x, *ours.parameters())),
            torch.autograd.grad(expected.sin().sum(), (x, *torchs.parameters())),
            strict=True,
        ):
            close(a, b)
        same_buffers(ours, torchs)


def test_compile_fused_with_inductor(no_fallback):
    torch._dynamo.reset()
    x, r = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    running, others = statistics(4), None
    others = [t.clone() for t in running]
    compiled = torch.compile(lambda x, r: fF.batch_norm_act(x, *running, training=True, residual=r), fullgraph=True)
    close(compiled(x, r), unfused(x, *others, training=True, residual=r))
    for mine, theirs in zip(running, others, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("training", [True, False])
def test_export(training, no_fallback):
    ours, torchs = pair(2)
    ours.train(training), torchs.train(training)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(ours, (torch.randn(3, 5, 4, 4),), dynamic_shapes=({0: batch},))
    assert "fastnn.batch_norm" in str(program.graph)
    exported = program.module()
    x = torch.randn(7, 5, 4, 4)
    close(exported(x), torchs(x))
    # Early versions of torch.export sort the buffers, and leave out those that are not used.
    found, expected = dict(exported.named_buffers()), dict(torchs.named_buffers())
    assert {"running_mean", "running_var"} <= set(found) <= set(expected)
    assert not training or set(found) == set(expected)
    for name, buffer in found.items():
        torch.testing.assert_close(buffer, expected[name])


def test_fake(no_fallback):
    with FakeTensorMode():
        x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
        y = fF.batch_norm(x, *statistics(3), training=True)
        assert (y.shape, y.stride()) == (x.shape, x.stride())


def test_transforms_update_what_they_captured_as_torch_does(no_fallback):
    x = torch.randn(6, 4)
    for transform in (grad, jacrev, lambda f: lambda x: jvp(f, (x,), (x,))[1], hessian):
        found = []
        for function in (fF.batch_norm, F.batch_norm):
            running = torch.zeros(4), torch.ones(4)
            result = transform(lambda x, f=function, r=running: f(x, *r, training=True).pow(3).sum())(x)
            found.append((result, *running))
        for ours, torchs in zip(*found, strict=True):
            close(ours, torchs)


def test_vmap(no_fallback):
    x, weight = torch.randn(2, 6, 4, 3), torch.randn(2, 4)
    mean, var = torch.randn(2, 4), torch.rand(2, 4) + 0.5
    for training in (True, False):
        for dims in ((0, 0, 0, 0), (0, 0, 0, None), (None, 0, 0, 0)):
            arguments = [t if d == 0 else t[0] for t, d in zip((x, mean, var, weight), dims, strict=True)]
            copies = [t.clone() for t in arguments]
            ours = vmap(lambda *t, tr=training: fF.batch_norm(*t, None, tr), dims)(*arguments)
            close(ours, vmap(lambda *t, tr=training: F.batch_norm(*t, None, tr), dims)(*copies))
            for mine, theirs in zip(arguments, copies, strict=True):
                close(mine, theirs)
    with pytest.raises(RuntimeError):
        vmap(lambda x: F.batch_norm(x, mean[0], var[0], training=True))(x)
    with pytest.raises(RuntimeError):
        vmap(lambda x: fF.batch_norm(x, mean[0], var[0], training=True))(x)


def test_backward_after_another_forward():
    """The running statistics have moved on; torch refuses this, since its backward would read them."""
    ours, _ = pair(1)
    x = torch.randn(6, 5, requires_grad=True)
    first = ours(x)
    ours(x * 2)
    (found,) = torch.autograd.grad(first.square().sum(), x)
    expected = torch.autograd.grad(F.batch_norm(x, None, None, ours.weight, ours.bias, True).square().sum(), x)[0]
    close(found, expected)


def test_cumulative_average_and_switches(no_fallback):
    for arguments in (
        dict(momentum=None),
        dict(momentum=0.3, affine=False),
        dict(track_running_stats=False),
        dict(eps=0.1),
    ):
        for dims, shape in ((1, (6, 5)), (1, (4, 5, 3)), (2, (3, 5, 4, 4))):
            ours, torchs = (kind(5, **arguments) for kind in LAYERS[dims])
            for step in range(4):
                ours.train(step != 2), torchs.train(step != 2)
                x = torch.randn(shape)
                close(ours(x), torchs(x))
                same_buffers(ours, torchs)


def test_track_running_stats_switched_off_later():
    ours, torchs = pair(1)
    for layer in (ours, torchs):
        layer.track_running_stats = False
    x = torch.randn(6, 5)
    close(ours(x), torchs(x))
    same_buffers(ours, torchs)
    close(ours.eval()(x), torchs.eval()(x))


def test_layers_refuse_what_torchs_refuse():
    for dims, shape in ((1, (2, 5, 3, 3)), (2, (2, 5, 3)), (1, (5,)), (1, (1, 5)), (2, (2, 4, 3, 3))):
        ours, torchs = pair(dims)
        with pytest.raises(Exception) as expected:
            torchs(torch.randn(shape))
        with pytest.raises(type(expected.value)):
            ours(torch.randn(shape))


def network():
    return torch.nn.Sequential(
        torch.nn.Linear(10, 24),
        torch.nn.BatchNorm1d(24),
        torch.nn.ReLU(),
        torch.nn.Unflatten(1, (4, 2, 3)),
        torch.nn.BatchNorm2d(4, momentum=None),
        torch.nn.Flatten(),
        torch.nn.Linear(24, 3),
    )


def test_ten_steps_follow_float64_as_closely_as_torch(no_fallback):
    torchs = network()
    ours, exact = fastnn.convert(copy.deepcopy(torchs), strict=True), copy.deepcopy(torchs).double()
    x, target = torch.randn(10, 16, 10), torch.randint(3, (10, 16))
    for model in (ours, torchs, exact):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for batch, labels in zip(x, target, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(batch.to(model[0].weight.dtype)), labels).backward()
            optimizer.step()
    states = (model.state_dict().values() for model in (ours, torchs, exact))
    for mine, theirs, truth in zip(*states, strict=True):
        scale = truth.double().abs().max()
        error, torch_error = ((t.double() - truth.double()).abs().max() / scale for t in (mine, theirs))
        assert error <= max(4 * torch_error, 1e-5)
    close(ours.eval()(x[0]), torchs.eval()(x[0]))


def test_sync_batch_norm_stays_torchs():
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network())
    kept = type(model[1])
    expected = copy.deepcopy(model).eval()(torch.ones(4, 10))
    fastnn.convert(model)
    assert kept is torch.nn.SyncBatchNorm
    assert type(model[1]) is kept
    close(model.eval()(torch.ones(4, 10)), expected)
    # ... and what fastnn has replaced becomes torch's when it is converted to it.
    again = torch.nn.SyncBatchNorm.convert_sync_batchnorm(fastnn.convert(network()))
    assert type(again[1]) is torch.nn.SyncBatchNorm


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_count_their_changes(training, with_grad, machine, no_fallback):
    """Once a call, where torch 2.13 counts none: autograd sees that what it has saved was changed."""
    x = torch.randn(4, 3, 5).requires_grad_(with_grad)
    running = statistics(3)
    before = [t._version for t in running]
    fF.batch_norm(x, *running, training=training)
    assert [t._version - b for t, b in zip(running, before, strict=True)] == [int(training)] * 2


@pytest.mark.parametrize(
    ("dtype", "given"), [(torch.float32,) * 2, (torch.float64,) * 2, (torch.bfloat16, torch.float32)]
)
def test_running_statistics_between_others(dtype, given, machine, no_fallback):
    """Strided ones, whose neighbours stay as they are; more channels than are updated at a time."""
    x = (torch.randn(6, 300, 2) * 2 + 1).to(dtype)
    memory = torch.rand(2, 300, 3, dtype=given)
    kept = memory.clone()
    exact = [t.double() for t in (memory[0, :, 1].clone(), memory[1, :, 1].clone())]
    fF.batch_norm(x, memory[0, :, 1], memory[1, :, 1], training=True, momentum=0.3)
    F.batch_norm(x.double(), *exact, training=True, momentum=0.3)
    for ours, wanted in zip(memory[:, :, 1], exact, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=4e-7, atol=4e-7)
    assert torch.equal(memory[:, :, ::2], kept[:, :, ::2])


@pytest.mark.parametrize("made_inside", [False, True])
def test_running_statistics_in_inference_mode(made_inside, machine):
    x = torch.randn(5, 3, 4)
    outside = statistics(3)
    exact = [t.double() for t in outside]
    with torch.inference_mode():
        running = [t.clone() for t in outside] if made_inside else outside
        y = fF.batch_norm(x, *running, training=True)
        assert y.is_inference()
    F.batch_norm(x.double(), *exact, training=True)
    for ours, wanted in zip(running, exact, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-6, atol=1e-6)


def test_large_results_of_each_layout():
    """Those that the caching allocator makes, forward and backward."""
    x = torch.randn(9, 40, 61, 53)
    for one in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
        weight, bias = (torch.randn(40, requires_grad=True) for _ in range(2))
        one = one.detach().requires_grad_()
        results = []
        for function, dtype in ((fF.batch_norm, torch.float32), (F.batch_norm, torch.float64)):
            y = function(one.to(dtype), None, None, weight.to(dtype), bias.to(dtype), True)
            results.append((y, *torch.autograd.grad(y.square().sum(), (one, weight, bias))))
        assert results[0][0].stride() == F.batch_norm(one, None, None, training=True).stride()
        for ours, exact in zip(*results, strict=True):
            torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-4, atol=1e-4)


def test_a_gradient_of_the_weight_alone(machine, no_fallback):
    x = torch.randn(4, 3, 5)
    weight, bias = torch.randn(3, requires_grad=True), torch.randn(3)
    y = fF.batch_norm_act(x, None, None, weight, bias, True)
    wide = weight.detach().double().requires_grad_()
    exact = F.relu(F.batch_norm(x.double(), None, None, wide, bias.double(), True))
    y.sum().backward()
    exact.sum().backward()
    torch.testing.assert_close(weight.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
    assert bias.grad is None
    # ... and of the bias alone, without a weight.
    bias.requires_grad_()
    fF.batch_norm(x, None, None, None, bias, True).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((3,), 20.0))
