"""cross_entropy and linear_cross_entropy: every option and way of a call, against torch's in float64."""

import gc
import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap
from torch.library import opcheck

import fastnn
import fastnn.functional as fF
from fastnn import _cpu, _state
from fastnn.backends import _cross_entropy, cpu, cuda
from fastnn.ops import cross_entropy as ops

from .support import FLOATS, TORCH, assert_within

HAS_TABLE = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
ISAS = [name for name in _cpu.available_isas() if name != "amx"]
every_machine = pytest.mark.not_on("amx")
SHAPES = [(5,), (1, 3), (6, 7), (17, 130), (3, 1500), (70, 2), (2, 5, 4), (3, 21, 40), (2, 3, 4, 5), (1, 300, 3, 3)]
#: A row for a warp, one for a block, with packs of 16 bytes and without, and images; fewer than SHAPES, which take long there.
GPUS = ("cuda", "triton")
ON_GPUS = [(5,), (6, 7), (17, 136), (2, 2504), (3, 2051), (2, 5, 20), (1, 70, 3, 3)]


def targets(shape, kind, dtype=torch.float32):
    positions = () if len(shape) == 1 else (shape[0], *shape[2:])
    classes = shape[0] if len(shape) == 1 else shape[1]
    if kind == "probabilities":
        return torch.rand(shape).softmax(0 if len(shape) == 1 else 1).to(dtype)
    return torch.randint(classes, positions).to(torch.uint8 if kind == "uint8" and classes < 256 else torch.int64)


def layouts(x):
    yield x
    order = list(range(x.dim()))[::-1]
    yield x.permute(order).contiguous().permute(order)
    yield torch.stack([torch.full_like(x, torch.nan), x], -1)[..., 1]
    yield x[..., :1].expand(x.shape)
    if x.dim() > 2:
        yield x.movedim(1, -1).contiguous().movedim(-1, 1)


@every_machine
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", ["int64", "uint8", "probabilities"])
def test_values_and_gradients(dtype, kind, machine, no_fallback):
    tight = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    choices = itertools.cycle(itertools.product(("mean", "sum", "none"), (0.0, 0.3), (False, True)))
    for number, shape in enumerate(SHAPES if machine not in GPUS else ON_GPUS):
        classes = shape[0] if len(shape) == 1 else shape[1]
        some = list(layouts((torch.randn(shape) * 3).to(dtype)))
        for x in some if machine not in GPUS else some[number % 2 :: 3]:
            for _ in range(5 if machine not in GPUS else 1):
                reduction, smoothing, weighted = next(choices)
                target = targets(shape, kind, dtype)
                weight = (torch.rand(classes) + 0.1).to(dtype) if weighted else None
                options = dict(reduction=reduction, label_smoothing=smoothing)
                if kind != "probabilities" and target.numel() > 2:
                    options["ignore_index"] = int(target.flatten()[1])
                found = []
                for function, wide in ((fF.cross_entropy, False), (F.cross_entropy, True)):
                    leaves = [x.double() if wide else x, target.double() if wide and kind[0] == "p" else target]
                    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in leaves]
                    leaves[1] = leaves[1].long() if wide and kind == "uint8" else leaves[1]
                    w = weight.double() if wide and weighted else weight
                    loss = function(*leaves, w, **options)
                    wanted = [t for t in leaves if t.requires_grad]
                    direction = (
                        torch.linspace(0.5, 1, loss.numel(), dtype=torch.float64).view(loss.shape).to(loss.dtype)
                    )
                    found.append((loss, *torch.autograd.grad(loss, wanted, direction)))
                for ours, exact in zip(*found, strict=True):
                    assert (ours.dtype, ours.shape) == (dtype, exact.shape)
                    scale = exact.abs().max().item()
                    torch.testing.assert_close(ours.double(), exact, rtol=tight, atol=tight * max(scale, 1e-2))
                assert found[0][1].is_contiguous()


def test_signatures():
    assert list(inspect.signature(fF.cross_entropy).parameters) == list(inspect.signature(F.cross_entropy).parameters)
    if hasattr(F, "linear_cross_entropy"):
        theirs = inspect.signature(F.linear_cross_entropy).parameters
        assert list(inspect.signature(fF.linear_cross_entropy).parameters) == list(theirs)


@pytest.mark.not_on("amx", "amx-emulated", "portable", "avx2")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_logits_that_are_not_finite(smoothing, machine, no_fallback):
    for classes_last in (True, False):
        x = torch.randn(6, 20)
        x[0, 3] = torch.nan
        x[1, 4] = torch.inf
        x[2, 5:] = -torch.inf
        x[3] = -torch.inf
        x[4] *= 1e30
        target = torch.tensor([3, 2, 1, 0, 7, 5])
        x, target = (x, target) if classes_last else (x.t()[None], target[None])
        options = dict(reduction="none", label_smoothing=smoothing)
        ours, torchs = (f(x, target, **options) for f in (fF.cross_entropy, F.cross_entropy))
        torch.testing.assert_close(ours, torchs, equal_nan=True)


@pytest.mark.not_on("amx", "amx-emulated", "portable", "avx2")
def test_ignored_positions(machine, no_fallback):
    x = torch.randn(5, 4, requires_grad=True)
    for target, ignored in ((torch.tensor([-100, 1, -100, 2, 0]), -100), (torch.tensor([9, 1, 2, 3, 0]), 9)):
        for reduction in ("mean", "sum", "none"):
            options = dict(ignore_index=ignored, reduction=reduction, weight=torch.rand(4))
            one, other = (f(x, target, **options) for f in (fF.cross_entropy, F.cross_entropy))
            torch.testing.assert_close(one, other)
            ours, torchs = (torch.autograd.grad(loss.sum(), x)[0] for loss in (one, other))
            torch.testing.assert_close(ours, torchs)
            assert not ours[target == ignored].any()
    nothing = torch.full((5,), -100)
    assert fF.cross_entropy(x, nothing).isnan()
    assert fF.cross_entropy(x, nothing, reduction="sum") == 0


def test_on_a_gpu(on_cuda, no_fallback, monkeypatch):
    """Targets that are no class; a sum over more positions than a block's; slices, of which each adds to the gradients."""
    x = torch.randn(5000, 3, requires_grad=True)
    target = torch.randint(3, (5000,))
    loss = fF.cross_entropy(x, target)
    torch.testing.assert_close(loss, F.cross_entropy(x.detach(), target))
    assert_within(loss, F.cross_entropy(x.detach().double(), target), torch.tensor(8.0), 8)
    if cuda.module().emulated:  # a real one is of no more use to the process after an assertion
        for bad in (-1, 3):
            for call in (lambda t: fF.cross_entropy(x[:4], t), lambda t: fF.linear_cross_entropy(x[:4], x[:3], t)):
                with pytest.raises(RuntimeError, match="Target is out of bounds"):
                    call(torch.tensor([0, 1, bad, 2]))
    monkeypatch.setattr(_cross_entropy, "SLICE_BYTES", 3 * 11 * 4)
    for reduction in ("mean", "none"):
        found = []
        for dtype in (torch.float32, torch.float64):
            torch.manual_seed(1)
            leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((7, 20), (11, 20), (11,))]
            labels = torch.tensor([1, 2, -100, 10, 0, 3, 3])
            if dtype is torch.float32:
                loss = fF.linear_cross_entropy(*leaves[:2], labels, linear_bias=leaves[2], reduction=reduction)
            else:
                loss = F.cross_entropy(F.linear(*leaves), labels, reduction=reduction)
            found.append((loss, *torch.autograd.grad(2 * loss.sum(), leaves)))
        for ours, exact in zip(*found, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


X, T, P = torch.randn(4, 5), torch.tensor([0, 1, 2, 3]), torch.rand(4, 5)
BAD = {
    "beyond": (X, torch.tensor([0, 1, 2, 7])),
    "negative": (X, torch.tensor([0, 1, -2, 3])),
    "beyond in one": (X[0], torch.tensor(9)),
    "beyond in an image": (X.view(1, 5, 4), torch.full((1, 4), 9)),
    "batch": (X, T[:3]),
    "int32": (X, T.int()),
    "weight size": (X, T, torch.rand(4)),
    "weight dtype": (X, T, torch.rand(5).double()),
    "scalar": (torch.tensor(1.0), torch.tensor(0)),
    "no classes": (torch.randn(2, 0), torch.zeros(2, dtype=torch.long)),
    "list": ([1.0], T),
    "probabilities' shape": (X, P[:, :4]),
}
BAD_OPTIONS = {
    "reduction": dict(reduction="average"),
    "smoothing": dict(label_smoothing=1.5),
    "ignored probabilities": dict(target=P, ignore_index=2),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
    with pytest.raises(Exception) as expected:
        F.cross_entropy(*BAD[name])
    with pytest.raises(type(expected.value)) as found:
        fF.cross_entropy(*BAD[name])
    assert "out of bounds" in str(found.value) or "fastnn.cross_entropy" in str(found.value)


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_errors_of_options(name):
    options = {"target": T, **BAD_OPTIONS[name]}
    with pytest.raises(Exception) as expected:
        F.cross_entropy(X, **options)
    with pytest.raises(type(expected.value), match="fastnn"):
        fF.cross_entropy(X, **options)


def test_legacy_arguments_and_what_goes_to_torch():
    with pytest.warns(UserWarning, match="deprecated"):
        one = fF.cross_entropy(X, T, size_average=False)
    torch.testing.assert_close(one, F.cross_entropy(X, T, reduction="sum"))
    _state.reset_fallbacks()
    torch.testing.assert_close(fF.cross_entropy(X, P.double()), F.cross_entropy(X, P.double()))
    weight = torch.rand(5, requires_grad=True)
    fF.cross_entropy(X, P, weight).backward()
    assert weight.grad.any()
    assert [op for op, _ in _state.fallbacks()] == ["cross_entropy"] * 2


@pytest.mark.parametrize("shape", [(0, 5), (2, 5, 0)])
def test_no_elements(shape, no_fallback):
    target = torch.zeros((shape[0], *shape[2:]), dtype=torch.long)
    for reduction in ("mean", "sum", "none"):
        ours, torchs = (f(torch.empty(shape), target, reduction=reduction) for f in (fF.cross_entropy, F.cross_entropy))
        torch.testing.assert_close(ours, torchs, equal_nan=True)


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_derivatives(reduction, smoothing, no_fallback):
    options = dict(reduction=reduction, label_smoothing=smoothing)
    weight = torch.rand(4, dtype=torch.float64)
    x, target = double(3, 4, 2), torch.tensor([[0, 3], [1, -100], [2, 2]])
    for w in (None, weight):
        assert gradcheck(lambda x, w=w: fF.cross_entropy(x, target, w, **options), x, check_forward_ad=True)
        assert gradgradcheck(lambda x, w=w: fF.cross_entropy(x, target, w, **options), x)
        p = torch.rand(3, 4, 2, dtype=torch.float64, requires_grad=True)
        both = (x, p)
        assert gradcheck(lambda x, p, w=w: fF.cross_entropy(x, p, w, **options), both, check_forward_ad=True)
        assert gradgradcheck(lambda x, p, w=w: fF.cross_entropy(x, p, w, **options), both)


def test_transforms(no_fallback):
    x, target = torch.randn(3, 6, 4).double(), torch.randint(4, (3, 6))
    for transform in (jacrev, jacfwd, hessian):
        one, other = (transform(lambda t, f=f: f(t, target[0]))(x[0]) for f in (fF.cross_entropy, F.cross_entropy))
        torch.testing.assert_close(one, other)
    for reduction in ("mean", "none"):
        one, other = (
            vmap(lambda t, i, f=f, r=reduction: f(t, i, reduction=r), (0, 0))(x, target)
            for f in (fF.cross_entropy, F.cross_entropy)
        )
        torch.testing.assert_close(one, other)
    per_sample = [
        vmap(grad(lambda t, i, f=f: f(t, i)), (0, None))(x, target[0]) for f in (fF.cross_entropy, F.cross_entropy)
    ]
    torch.testing.assert_close(*per_sample)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(needs_grad):
    ops = torch.ops.fastnn
    x, target, weight = torch.randn(3, 4, requires_grad=needs_grad), torch.tensor([0, 3, 1]), torch.rand(4)
    opcheck(ops.cross_entropy.default, (x, target, weight, -100, "mean", 0.1))
    opcheck(ops.cross_entropy.default, (x, torch.rand(3, 4), None, -100, "none", 0.0))
    statistics = ops.cross_entropy(x.detach(), target, weight, -100, "none", 0.1)[1]
    direction = torch.randn(3, requires_grad=needs_grad)
    opcheck(ops.cross_entropy_backward.default, (direction, x, target, weight, statistics, -100, "none", 0.1))
    w, b = torch.randn(4, 5, requires_grad=needs_grad), torch.randn(4, requires_grad=needs_grad)
    rows = torch.randn(3, 5, requires_grad=needs_grad)
    opcheck(ops.linear_cross_entropy.default, (rows, w, b, target, None, -100, "mean", 0.0, False))
    opcheck(ops.linear_cross_entropy_backward.default, (direction, rows, w, b, target, weight, -100, "none", 0.1))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, no_fallback):
    torch._dynamo.reset()

    def both(f, linear, x, w, b, target):
        return f(x @ w.t(), target, label_smoothing=0.1) + linear(x, w, target, linear_bias=b)

    def in_torch(x, w, target, linear_bias):
        return F.cross_entropy(F.linear(x, w, linear_bias), target)

    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (3, 4, 6):
        leaves = [torch.randn(s, requires_grad=True) for s in ((n, 7), (5, 7), (5,))]
        target = torch.randint(5, (n,))
        ours = compiled(fF.cross_entropy, fF.linear_cross_entropy, *leaves, target)
        torchs = both(F.cross_entropy, in_torch, *leaves, target)
        torch.testing.assert_close(ours, torchs)
        torch.testing.assert_close(torch.autograd.grad(ours, leaves), torch.autograd.grad(torchs, leaves))


def test_autocast(no_fallback):
    x, w = torch.randn(4, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        for logits in (X.bfloat16(), X.half(), X, X.double()):
            for target in (T, P.to(logits.dtype)):
                ours, torchs = (f(logits, target) for f in (fF.cross_entropy, F.cross_entropy))
                assert ours.dtype is torchs.dtype
                torch.testing.assert_close(ours, torchs)
        one, other = fF.linear_cross_entropy(x, w, T), F.cross_entropy(F.linear(x, w), T)
    assert one.dtype is other.dtype is torch.float32
    torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    for ours, torchs in zip(torch.autograd.grad(one, (x, w)), torch.autograd.grad(other, (x, w)), strict=True):
        assert ours.dtype is torchs.dtype is torch.float32
        torch.testing.assert_close(ours, torchs, rtol=5e-2, atol=2e-2)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_same_bits_for_any_number_of_threads(reduction, no_fallback):
    x, image = torch.randn(700, 900, requires_grad=True), torch.randn(3, 40, 5000, requires_grad=True)
    w, labels = torch.randn(900, 900, requires_grad=True), torch.randint(900, (700,))
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found = []
        for leaves, loss in (
            ((x,), fF.cross_entropy(x, labels, reduction=reduction)),
            ((image,), fF.cross_entropy(image, labels.repeat(22)[:15000].view(3, 5000) % 40, reduction=reduction)),
            ((x, w), fF.linear_cross_entropy(x, w, labels, reduction=reduction)),
        ):
            found += [loss.detach(), *torch.autograd.grad(loss, leaves, torch.ones_like(loss))]
        runs.append(found)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_indices_that_change_before_the_backward(no_fallback):
    """... unseen by torch: nothing is written beyond the gradient."""
    for size, reduction in ((4, "mean"), (4, "none"), (300, "sum")):
        x, target = torch.randn(size, 5, requires_grad=True), torch.zeros(size, dtype=torch.int64)
        loss = fF.cross_entropy(x, target, reduction=reduction).sum()
        target.data.fill_(10**9)
        with pytest.raises(IndexError, match="Target 1000000000 is out of bounds"):
            loss.backward()


def test_lazily_negated_operands(no_fallback):
    for x, target in ((X, torch._neg_view(-T)), (torch._neg_view(X), T), (torch._neg_view(X), torch._neg_view(-P))):
        leaf = x.detach().requires_grad_()
        ours, torchs = (f(leaf, target) for f in (fF.cross_entropy, F.cross_entropy))
        torch.testing.assert_close(ours, torchs)
        torch.testing.assert_close(torch.autograd.grad(ours, leaf), torch.autograd.grad(torchs, leaf))


@pytest.mark.skipif(not HAS_TABLE, reason="torch before 2.10 has no table")
def test_the_short_way(no_fallback):
    def short(x, target, weight=None, ignored=-100, reduction="mean", smoothing=0.0):
        return cpu.tensor_cross_entropy(x, target, weight, ignored, reduction, smoothing)

    def gradient(*args):
        with torch.no_grad():
            return cpu.tensor_cross_entropy_backward(*args)

    choices = itertools.cycle(itertools.product(("mean", "sum", "none"), (0.0, 0.3), (False, True)))
    for dtype in FLOATS:
        for shape in SHAPES[1:]:
            for x in layouts((torch.randn(shape) * 3).to(dtype)):
                reduction, smoothing, weighted = next(choices)
                target = targets(shape, "int64")
                ignored = int(target.flatten()[-1]) if target.numel() > 1 else -100
                weight = torch.rand(shape[1]).to(dtype) if weighted and dtype in FLOATS[:2] else None
                options = (ignored, reduction, smoothing)
                leaf = x.detach().requires_grad_()
                loss, statistics = short(leaf, target, weight, *options)
                assert not loss.requires_grad
                assert torch.equal(short(x, target, weight, *options), loss)
                expected, same = ops.CROSS_ENTROPY(leaf, target, weight, *options, where="eager")
                assert torch.equal(loss, expected)
                assert torch.equal(statistics, same)
                grad = torch.rand_like(loss)
                found = gradient(grad, statistics, x, target, weight, *options)
                if reduction == "none" or dtype in FLOATS[2:]:  # numbers of 16 bits are not read
                    assert found is None
                else:
                    assert torch.equal(found, torch.autograd.grad(expected, leaf, grad)[0])
                    assert found.is_contiguous()

    large = torch.randn(700, 900)
    labels = torch.randint(900, (700,))
    assert torch.equal(short(large, labels), ops.CROSS_ENTROPY(large, labels, None, -100, "mean", 0.0)[0])
    with pytest.raises(IndexError, match="Target 5 is out of bounds"):
        short(X, T + 2)
    assert short(X, T, None, 3, "sum") == short(X[:3], T[:3], None, -100, "sum")
    for x in (X.long(), X[:0], X[0], X.to("meta"), torch._neg_view(X), X.tolist(), None):
        assert short(x, T) is None
    for target in (T.int(), T.byte(), P, T[:3], T[:, None], torch.stack([T, T], 1)[:, 0], torch._neg_view(-T), 1, None):
        assert short(X, target) is None
    for weight in (torch.rand(4), torch.rand(5).double(), torch.rand(10)[::2], torch.rand(5).requires_grad_(), 1.0):
        assert short(X, T, weight) is None
    for ignored, reduction, smoothing in (
        (True, "mean", 0.0),
        (2**70, "mean", 0.0),
        (-100.0, "mean", 0.0),
        (-100, "average", 0.0),
        (-100, None, 0.0),
        (-100, "mean", 1.5),
        (-100, "mean", float("nan")),
        (-100, "mean", True),
    ):
        assert short(X, T, None, ignored, reduction, smoothing) is None
    with torch.autocast("cpu"):
        assert short(X, T) is None
    with fastnn.backend("reference"):
        assert short(X, T) is None
    assert vmap(lambda x: torch.tensor(short(x, T) is None))(X[None]).all()

    statistics = short(X.clone().requires_grad_(), T)[1]
    one, rest = torch.tensor(1.0), (X, T, None, -100, "mean", 0.0)
    assert gradient(one, statistics, *rest) is not None
    assert cpu.tensor_cross_entropy_backward(one, statistics, *rest) is None  # where gradients are on
    for grad in (torch.ones(4), torch.tensor(1), torch._neg_view(one), one.to("meta"), 1.0, None):
        assert gradient(grad, statistics, *rest) is None
    for wrong in (statistics[1:], statistics.float(), None):
        assert gradient(one, wrong, *rest) is None


# ---- fused with the linear layer ---------------------------------------------------------------------------------


@every_machine
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear(dtype, reduction, machine, no_fallback):
    loose = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 4e-2, torch.float16: 8e-3}[dtype]
    for rows, classes, features in ((1, 3, 2), (7, 130, 19), (130, 31, 64))[: 2 if machine in GPUS else 3]:
        for smoothing, with_bias, weighted in ((0.0, False, False), (0.1, True, True), (0.0, True, False)):
            x = (torch.randn(features, rows) / features**0.5).to(dtype).t()
            w, b = torch.randn(classes, features).to(dtype), torch.randn(2 * classes).to(dtype)[::2]
            target = torch.randint(classes, (rows,))
            target[0] = 1
            weight = (torch.rand(classes) + 0.1).to(dtype) if weighted else None
            options = dict(
                reduction=reduction, label_smoothing=smoothing, ignore_index=int(target[-1]) if rows > 1 else 0
            )
            found = []
            for wide in (False, True):
                leaves = [
                    (t.double() if wide else t).detach().requires_grad_() for t in ((x, w, b) if with_bias else (x, w))
                ]
                bias = leaves[2] if with_bias else None
                if wide:
                    wider = None if weight is None else weight.double()
                    loss = F.cross_entropy(F.linear(leaves[0], leaves[1], bias), target, wider, **options)
                else:
                    loss = fF.linear_cross_entropy(*leaves[:2], target, linear_bias=bias, weight=weight, **options)
                direction = torch.linspace(0.5, 1, loss.numel(), dtype=torch.float64).view(loss.shape).to(loss.dtype)
                found.append((loss, *torch.autograd.grad(loss, leaves, direction)))
            for ours, exact in zip(*found, strict=True):
                assert (ours.dtype, ours.shape) == (dtype, exact.shape)
                torch.testing.assert_close(
                    ours.double(), exact, rtol=loose, atol=loose * max(exact.abs().max().item(), 1e-2)
                )


@pytest.mark.parametrize("isa", [name for name in ISAS if name != "portable"])
def test_linear_in_many_chunks(isa, use_isa, no_fallback):
    """More logits than one chunk holds, and one row without a batch."""
    use_isa(isa)
    x, w = torch.randn(500, 9, requires_grad=True), torch.randn(70_000, 9, requires_grad=True)
    b, target = torch.randn(70_000, requires_grad=True), torch.randint(70_000, (500,))
    found = []
    for wide in (False, True):
        leaves = [t.detach().double().requires_grad_() if wide else t for t in (x, w, b)]
        if wide:
            loss = F.cross_entropy(F.linear(*leaves), target)
        else:
            loss = fF.linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2])
        found.append((loss, *torch.autograd.grad(loss * 3, leaves)))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
    one = fF.linear_cross_entropy(x[0], w, target[0], reduction="none")
    torch.testing.assert_close(one, F.cross_entropy(F.linear(x[:1], w), target[:1]).detach(), rtol=1e-5, atol=1e-5)
    assert one.shape == ()


def test_linear_backward_twice_and_graphs_that_are_kept(no_fallback):
    x, w, target = torch.randn(6, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True), torch.arange(6)
    expected = torch.autograd.grad(F.cross_entropy(F.linear(x, w), target), (x, w))
    loss = fF.linear_cross_entropy(x, w, target)
    for _ in range(3):
        found = torch.autograd.grad(loss, (x, w), retain_graph=True)
        torch.testing.assert_close(found, expected)
        for gradient in found:
            gradient.zero_()  # they are the caller's own
    torch.autograd.grad(loss, (x, w))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    only = fF.linear_cross_entropy(x, w.detach(), target)
    torch.testing.assert_close(torch.autograd.grad(only * 2, x)[0], 2 * expected[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_derivatives(reduction, no_fallback):
    target = torch.tensor([0, 3, -100])

    def call(x, w, *b):
        return fF.linear_cross_entropy(
            x, w, target, linear_bias=b[0] if b else None, reduction=reduction, label_smoothing=0.1
        )

    for leaves in ((double(3, 5), double(4, 5)), (double(3, 5), double(4, 5), double(4))):
        assert gradcheck(call, leaves, check_forward_ad=True)
        assert gradgradcheck(call, leaves)


def test_linear_transforms(no_fallback):
    x, w, target = torch.randn(3, 4, 5).double(), torch.randn(6, 5).double(), torch.randint(6, (3, 4))

    def in_torch(x, w, target):
        return F.cross_entropy(F.linear(x, w), target)

    functions = (fF.linear_cross_entropy, in_torch)
    for transform in (jacrev, jacfwd, hessian):
        torch.testing.assert_close(*(transform(lambda t, f=f: f(x[0], t, target[0]))(w) for f in functions))
    torch.testing.assert_close(*(vmap(f, (0, None, 0))(x, w, target) for f in functions))
    torch.testing.assert_close(*(vmap(grad(f, 1), (0, None, 0))(x, w, target) for f in functions))


def test_linear_errors_and_what_goes_to_torch():
    x, w, target = torch.randn(3, 5), torch.randn(4, 5), torch.tensor([0, 1, 2])
    for bad in ((x, w, target + 2), (x, w[:, :4], target), (x, w.double(), target), (x, w, target[:2])):
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            fF.linear_cross_entropy(*bad)
    _state.reset_fallbacks()
    p = torch.rand(3, 4)
    torch.testing.assert_close(fF.linear_cross_entropy(x, w, p), F.cross_entropy(F.linear(x, w), p))
    images, labels = torch.randn(4, 6, 5), torch.randint(4, (3, 6))
    torch.testing.assert_close(
        fF.linear_cross_entropy(x, images, labels, linear_bias=torch.ones(4, 6)),
        F.cross_entropy(F.linear(x, images.flatten(0, 1), torch.ones(24)).view(3, 4, 6), labels),
    )
    assert _state.fallbacks() == {}  # these two are computed as two ops
    with torch.no_grad():
        weight = torch.rand(4, requires_grad=True)
        fF.linear_cross_entropy(x, w, target, weight=weight)
    assert [op for op, _ in _state.fallbacks()] == ["linear_cross_entropy"]


def peak_of(function):
    """The most memory above what was there before and the gradients, in bytes."""
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    most = now = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def test_linear_holds_less_than_the_logits():
    """torch's allocator, and fastnn's beside it."""
    x, w = torch.randn(512, 16, requires_grad=True), torch.randn(50_000, 16, requires_grad=True)
    target = torch.randint(50_000, (512,))
    logits = 512 * 50_000 * 4

    def train(loss):
        torch.autograd.grad(loss(), (x, w))

    fastnn.empty_cache()
    train(lambda: fF.linear_cross_entropy(x, w, target))
    statistics = fastnn.allocator_stats() if hasattr(fastnn, "allocator_stats") else _cpu.allocator_stats()
    ours = statistics["bytes_cached"] + statistics["bytes_live"]
    ours += peak_of(lambda: train(lambda: fF.linear_cross_entropy(x, w, target)))
    torchs = peak_of(lambda: train(lambda: F.cross_entropy(F.linear(x, w), target)))
    assert torchs >= 2 * logits
    assert ours < 0.75 * logits


def test_layers():
    loss = fastnn.nn.CrossEntropyLoss(weight=torch.rand(5), label_smoothing=0.1, ignore_index=2)
    assert isinstance(fastnn.convert(torch.nn.Sequential(torch.nn.CrossEntropyLoss()))[0], fastnn.nn.CrossEntropyLoss)
    theirs = torch.nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=2)
    theirs.weight = loss.weight
    torch.testing.assert_close(loss(X, T), theirs(X, T))
    assert_within(loss(X, T), functional_call(theirs.double(), {}, (X.double(), T)).detach(), torch.tensor(8.0), 8)


@pytest.mark.skipif(TORCH < (2, 13), reason="torch.nn.LinearCrossEntropyLoss")
def test_linear_layer(no_fallback):
    theirs = torch.nn.LinearCrossEntropyLoss(6, 5, bias=True, label_smoothing=0.1)
    ours = fastnn.nn.LinearCrossEntropyLoss(6, 5, bias=True, label_smoothing=0.1)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 6)
    torch.testing.assert_close(ours(x, T), theirs(x, T))
