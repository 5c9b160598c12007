"""Embedding: torch's rows, gradients and errors, without a read out of bounds."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import fastnn
import fastnn.functional as fF
from fastnn import _state
from fastnn.backends import cpu, cuda
from fastnn.ops import embedding as ops

from .support import FLOATS, assert_within

dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
#: Kernels that are others' as well.
every_machine = pytest.mark.not_on("amx", "amx-emulated")
HAS_TABLE = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


def tables(rows, columns, dtype):
    """The same numbers, with NaN around them."""
    x = torch.randn(rows, columns).to(dtype)
    yield x
    yield x.t().contiguous().t()
    wide = torch.full((rows + 2, columns + 3), math.nan, dtype=dtype)
    wide[1:-1, 1:-2] = x
    yield wide[1:-1, 1:-2]
    spread = torch.full((rows, columns, 2), math.nan, dtype=dtype)
    spread[..., 1] = x
    yield spread[..., 1]
    yield x[:1].expand(rows, columns)


def index_layouts(rows, dtype):
    for shape in ((), (1,), (7,), (3, 5), (2, 3, 4), (0,), (3, 0)):
        yield torch.randint(rows, shape, dtype=dtype)
    yield torch.randint(rows, (5, 6), dtype=dtype).t()
    yield torch.randint(rows, (5, 6), dtype=dtype)[:, ::2]
    yield torch.randint(rows, (1, 6), dtype=dtype).expand(4, 6)


@dtypes
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
@every_machine
def test_rows(integers, dtype, machine, no_fallback):
    for columns in (1, 3, 16, 33, 130) if machine != "triton" else (1, 130):
        for weight in tables(11, columns, dtype):
            for indices in index_layouts(11, integers):
                result, expected = fF.embedding(indices, weight), F.embedding(indices, weight)
                assert torch.equal(result, expected)
                assert (result.stride(), result.dtype) == (expected.stride(), expected.dtype)


def exact_gradient(grad, indices, rows, padding_idx=None, by_frequency=False):
    flat = indices.reshape(-1).long()
    g = grad.double().reshape(len(flat), grad.shape[-1])
    total = torch.zeros(rows, grad.shape[-1], dtype=torch.float64).index_add_(0, flat, g)
    size = torch.zeros_like(total).index_add_(0, flat, g.abs())
    if by_frequency:
        often = torch.bincount(flat, minlength=rows).clamp(min=1).unsqueeze(1)
        total, size = total / often, size / often
    if padding_idx is not None:
        total[padding_idx] = size[padding_idx] = 0
    return total, size


@dtypes
@every_machine
def test_gradients(dtype, machine, no_fallback):
    sizes = [(11, 5, (3, 4)), (3, 131, (50, 9)), (300, 64, (700,)), (5000, 17, (40,)), (7, 1, (9,))]
    if machine in ("cuda", "triton"):
        sizes = [(11, 5, (3, 4)), (3, 36, (50, 3)), (300, 17, (70,))][: 3 if machine == "cuda" else 2]
    for rows, columns, shape in sizes:
        weight = torch.randn(rows, columns).to(dtype).requires_grad_()
        for arguments in ({}, {"padding_idx": 2}, {"padding_idx": -1, "scale_grad_by_freq": True}):
            indices = torch.randint(rows, shape, dtype=torch.int32 if columns == 5 else torch.int64)
            result = fF.embedding(indices, weight, **arguments)
            for grad in (
                torch.randn(result.shape).to(dtype),
                torch.randn(result.shape).to(dtype).transpose(0, -1).contiguous().transpose(0, -1),
                torch.randn(()).to(dtype).expand(result.shape),
            ):
                (found,) = torch.autograd.grad(result, weight, grad, retain_graph=True)
                exact, size = exact_gradient(
                    grad, indices, rows, arguments.get("padding_idx"), arguments.get("scale_grad_by_freq", False)
                )
                assert found.is_contiguous()
                assert_within(found, exact, size, 40)


@every_machine
def test_integers_are_summed_exactly(machine, no_fallback):
    indices = torch.randint(5, (3000,))
    weight = torch.zeros(5, 33, requires_grad=True)
    grad = torch.randint(-4, 5, (3000, 33)).float()
    (found,) = torch.autograd.grad(fF.embedding(indices, weight), weight, grad)
    assert torch.equal(found.double(), exact_gradient(grad, indices, 5)[0])


@pytest.mark.parametrize(
    ("rows", "columns", "count"), [(32_000, 96, 4096), (40, 768, 5000), (70_000, 8, 30_000), (2, 16, 60_000)]
)
def test_large_and_the_same_bits_on_any_number_of_threads(rows, columns, count, no_fallback):
    weight = torch.randn(rows, columns, requires_grad=True)
    indices = torch.randint(rows, (count,)).mul_(torch.randint(2, (count,)))  # half of them 0
    grad = torch.randn(count, columns)
    runs = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        y = fF.embedding(indices, weight)
        runs.append((y.detach(), *torch.autograd.grad(y, weight, grad)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    assert torch.equal(runs[0][0], weight[indices])
    assert_within(runs[0][1], *exact_gradient(grad, indices, rows), 64 + count / 64)


def test_a_result_beyond_the_caches(no_fallback):
    weight = torch.randn(1000, 1024)
    indices = torch.randint(1000, (20_000,))
    assert torch.equal(fF.embedding(indices, weight), weight[indices])
    half = weight.bfloat16()[:, :1001]
    assert torch.equal(fF.embedding(indices, half), half[indices])


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_an_index_out_of_range_on_a_gpu(integers, on_cuda):
    """An assertion of the device, after which a real one is of no more use to the process."""
    if not cuda.module().emulated:
        pytest.skip("would end the process's use of the GPU")
    weight, grad = torch.randn(11, 5), torch.randn(3, 5)
    for bad in (-1, 11):
        indices = torch.tensor([1, bad, 3], dtype=integers)
        for call in (
            lambda i=indices: fF.embedding(i, weight),
            lambda i=indices: ops.EMBEDDING_BACKWARD(grad, i, 11, -1, False),
        ):
            with pytest.raises(RuntimeError, match="index out of range in self"):
                call()


def test_the_same_bits_in_any_order_of_threads(on_cuda, no_fallback):
    """More places than a tile of the sort has, of which many are one row's; several digits; a single row."""
    for rows, count, columns in ((70_000, 2100, 4), (3, 300, 17), (1, 200, 24)):
        indices = torch.randint(rows, (count,)).mul_(torch.randint(2, (count,)))
        grad, runs = torch.randn(count, columns), []
        for seed in (1, 2):
            on_cuda.set_seed(seed)
            runs.append(ops.EMBEDDING_BACKWARD(grad, indices, rows, -1, False))
        assert torch.equal(*runs)
        assert_within(runs[0], *exact_gradient(grad, indices, rows), 64 + count / 32)


@pytest.mark.parametrize("bad", [-1, 11, 1 << 20, 1 << 40, -(1 << 62)])
@pytest.mark.parametrize("grad", [False, True])
def test_an_index_out_of_range(bad, grad, monkeypatch):
    weight = torch.randn(11, 5, requires_grad=grad)
    indices = torch.tensor([1, 2, bad, 3])
    for way in ("short", "long"):
        if way == "long":
            monkeypatch.setattr(ops, "_tensor_embedding", lambda *_: None)
        for wrong in (indices, torch.tensor(bad), indices.view(2, 2).t()):
            with pytest.raises(IndexError, match="index out of range in self"):
                fF.embedding(wrong, weight)
        with fastnn.backend("reference"), pytest.raises(IndexError, match="index out of range in self"):
            fF.embedding(indices, weight)
    for backward in (torch.ops.fastnn.embedding_backward, ops.EMBEDDING_BACKWARD):
        with pytest.raises(IndexError, match="index out of range in self"):
            backward(torch.randn(4, 5), indices, 11, -1, False)
    if abs(bad) < 1 << 31:
        with pytest.raises(IndexError):
            fF.embedding(indices.int(), weight)
    with pytest.raises(IndexError):
        fF.embedding(torch.tensor([0]), torch.randn(0, 3))
    assert fF.embedding(torch.empty(0, dtype=torch.long), torch.randn(0, 3)).shape == (0, 3)


def test_gradcheck(no_fallback):
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[1, 5, 1], [0, 2, 1]])
    for by_frequency in (False, True):

        def call(w, by_frequency=by_frequency):
            return fF.embedding(indices, w, scale_grad_by_freq=by_frequency).square()

        if not by_frequency:
            assert gradcheck(call, (weight,), check_forward_ad=True)
            assert gradgradcheck(call, (weight,))
        # A mean is no gradient of the rows, but the second derivative is that of the first.
        grad = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda g, b=by_frequency: ops.EMBEDDING_BACKWARD(g, indices, 6, 2, b), (grad,))
        assert gradgradcheck(lambda g, b=by_frequency: ops.EMBEDDING_BACKWARD(g, indices, 6, 2, b).square(), (grad,))


def test_a_batch_of_gradients():
    weight = torch.randn(6, 4, requires_grad=True)
    y = fF.embedding(torch.tensor([1, 2, 1]), weight, padding_idx=2)
    theirs = F.embedding(torch.tensor([1, 2, 1]), weight, padding_idx=2)
    grads = torch.randn(5, 3, 4)
    found, expected = (torch.autograd.grad(r, weight, grads, is_grads_batched=True)[0] for r in (y, theirs))
    torch.testing.assert_close(found, expected)


def test_max_norm(no_fallback):
    """The rows that are asked for are scaled in place, as torch does it."""
    for norm_type in (2.0, 1.0):
        tables = [torch.randn(9, 5).mul_(3).requires_grad_() for _ in range(2)]
        tables[1].data.copy_(tables[0].data)
        indices = torch.tensor([[1, 3], [3, 8]]).t()
        results = [
            f.embedding(indices, table, max_norm=1.0, norm_type=norm_type)
            for f, table in zip((fF, F), tables, strict=True)
        ]
        assert torch.equal(*results)
        assert torch.equal(*tables)
        assert results[0].norm(norm_type, -1).max() < 1.0001
        gradients = [torch.autograd.grad(r.square().sum(), t)[0] for r, t in zip(results, tables, strict=True)]
        torch.testing.assert_close(*gradients)


def test_sparse_gradients_are_torchs():
    _state.reset_fallbacks()
    weight = torch.randn(9, 5, requires_grad=True)
    indices = torch.tensor([1, 3, 1])
    fF.embedding(indices, weight, sparse=True).sum().backward()
    assert weight.grad.layout is torch.sparse_coo
    assert list(_state.fallbacks()) == [("embedding", "sparse: a gradient that is sparse")]
    _state.reset_fallbacks()
    with torch.no_grad():
        assert torch.equal(fF.embedding(indices, weight, sparse=True), weight[indices])
    assert _state.fallbacks() == {}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic, no_fallback):
    torch._dynamo.reset()

    def network(f, indices, weight):
        return f.embedding(indices, weight, 1, scale_grad_by_freq=True).exp() + f.embedding(indices, weight)

    compiled = torch.compile(lambda *a: network(fF, *a), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (3, 5) if dynamic else (3,):
        weight = torch.randn(6 + n, 5, requires_grad=True)
        indices = torch.randint(6, (n, 4))
        results = [compiled(indices, weight), network(F, indices, weight)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*[torch.autograd.grad(r.sum(), weight)[0] for r in results])
    with pytest.raises(IndexError):
        compiled(indices + 100, weight)


def test_export_meta_and_fake(no_fallback):
    model = fastnn.convert(torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 2)))
    indices = torch.randint(7, (3, 2))
    program = torch.export.export(model, (indices,))
    assert "fastnn.embedding" in str(program.graph)
    torch.testing.assert_close(program.module()(indices), model(indices))
    meta = fF.embedding(torch.empty(3, 2, dtype=torch.long, device="meta"), torch.empty(7, 4, device="meta"))
    assert (meta.shape, meta.device.type) == ((3, 2, 4), "meta")
    weight = model[0].weight.detach()
    with torch._subclasses.FakeTensorMode() as mode:
        fake, weight = mode.from_tensor(indices), mode.from_tensor(weight)
        assert fF.embedding(fake, weight).shape == (3, 2, 4)


@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_opcheck(grad):
    indices = torch.tensor([[1, 2], [2, 0]])
    for arguments in ((-1, False), (2, True)):
        weight = torch.randn(4, 3, requires_grad=grad)
        opcheck(torch.ops.fastnn.embedding.default, (weight, indices, *arguments))
        g = torch.randn(2, 2, 3, requires_grad=grad)
        opcheck(torch.ops.fastnn.embedding_backward.default, (g, indices.int(), 4, *arguments))


@pytest.mark.parametrize("dims", [(0, None), (1, None), (None, 0), (None, 1), (0, 0), (1, 1), (2, 0)])
def test_vmap(dims, no_fallback):
    sizes = [6, 5]
    if dims[0] is not None:
        sizes.insert(dims[0], 3)
    weight = torch.randn(sizes)
    shape = [2, 4]
    if dims[1] is not None:
        shape.insert(dims[1], 3)
    indices = torch.randint(6, shape)

    def call(f):
        return lambda w, i: f.embedding(i, w, padding_idx=1)

    ours, theirs = (torch.vmap(call(f), dims)(weight, indices) for f in (fF, F))
    assert torch.equal(ours, theirs)
    gradients = [
        torch.vmap(torch.func.grad(lambda w, i, f=f: call(f)(w, i).square().sum()), dims)(weight, indices)
        for f in (fF, F)
    ]
    torch.testing.assert_close(*gradients)
    if dims[0] is None:
        tangent = torch.randn(6, 5)
        found = [
            torch.vmap(lambda i, f=f: torch.func.jvp(lambda w: call(f)(w, i), (weight,), (tangent,))[1], dims[1])(
                indices
            )
            for f in (fF, F)
        ]
        assert torch.equal(*found)


def test_reference_backend(no_fallback):
    weight = torch.randn(6, 5, requires_grad=True)
    indices = torch.tensor([[1, 2], [2, 0]])
    for arguments in ({}, {"padding_idx": 2}, {"scale_grad_by_freq": True}):
        ours = fF.embedding(indices, weight, **arguments)
        with fastnn.backend("reference"):
            reference = fF.embedding(indices, weight, **arguments)
        torch.testing.assert_close(ours, reference)
        torch.testing.assert_close(*[torch.autograd.grad(y.square().sum(), weight)[0] for y in (ours, reference)])


def test_autocast_leaves_it_alone(no_fallback):
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in FLOATS:
            assert fF.embedding(torch.tensor([1]), torch.randn(3, 2).to(dtype)).dtype is dtype


I, W = torch.tensor([1, 2]), torch.randn(5, 3)
BAD = {
    "input list": (([1, 2], W), {}, "input"),
    "weight list": ((I, [1.0]), {}, "weight"),
    "float input": ((I.float(), W), {}, "input"),
    "short input": ((I.to(torch.int16), W), {}, "input"),
    "bool input": ((I.bool(), W), {}, "input"),
    "weight of three dimensions": ((I, W[None]), {}, "weight"),
    "weight of one dimension": ((I, W[0]), {}, "weight"),
    "padding beyond": ((I, W, 5), {}, "padding_idx"),
    "padding before": ((I, W, -6), {}, "padding_idx"),
    "padding text": ((I, W, "x"), {}, "padding_idx"),
    "max_norm": ((I, W.clone()), {"max_norm": "x"}, "max_norm"),
    "norm_type": ((I, W.clone()), {"max_norm": 1.0, "norm_type": "x"}, "norm_type"),
    "scale_grad_by_freq": ((I, W), {"scale_grad_by_freq": 2}, "scale_grad_by_freq"),
    "sparse": ((I, W), {"sparse": "x"}, "sparse"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    args, kwargs, named = BAD[name]
    with pytest.raises(Exception) as theirs:
        F.embedding(*args, **kwargs)
    with pytest.raises(type(theirs.value), match=named) as ours:
        fF.embedding(*args, **kwargs)
    assert "fastnn.embedding" in str(ours.value)


def test_what_goes_to_torch_is_counted():
    for weight in (torch.randn(5, 3, dtype=torch.complex64), torch.arange(6).view(3, 2)):
        _state.reset_fallbacks()
        assert torch.equal(fF.embedding(I, weight), F.embedding(I, weight))
        assert len(_state.fallbacks()) == 1
    _state.reset_fallbacks()


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(0, 70),
    shape=st.lists(st.integers(0, 5), max_size=4),
    padding=st.one_of(st.none(), st.integers(-45, 45)),
    by_frequency=st.booleans(),
    wide=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_anything(rows, columns, shape, padding, by_frequency, wide, seed):
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns, requires_grad=True)
    indices = torch.randint(rows, shape, dtype=torch.int64 if wide else torch.int32)
    try:
        expected = F.embedding(indices, weight, padding, scale_grad_by_freq=by_frequency)
    except AssertionError:
        with pytest.raises(AssertionError):
            fF.embedding(indices, weight, padding, scale_grad_by_freq=by_frequency)
        return
    result = fF.embedding(indices, weight, padding, scale_grad_by_freq=by_frequency)
    assert torch.equal(result, expected)
    grad = torch.randn(expected.shape)
    found, theirs = (torch.autograd.grad(r, weight, grad)[0] for r in (result, expected))
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not HAS_TABLE, reason="torch before 2.10 has no table")
def test_the_short_way(no_fallback):
    def short(indices, weight):
        return cpu.tensor_embedding(ops._empty, indices, weight)

    for weight in tables(5, 3, torch.float32):
        for indices in (I, I.int(), torch.tensor(3), torch.randint(5, (2, 3, 4))):
            assert torch.equal(short(indices, weight), weight[indices.long()])
    assert type(short(I, W.clone().requires_grad_())) is tuple
    large = torch.randint(5, (1 << 17,))
    assert torch.equal(short(large, W), W[large])
    for indices in (I.float(), I.short(), I[:0], [1], I.to("meta"), torch.randint(5, (3, 3)).t(), None):
        assert short(indices, W) is None
    for weight in (W.long(), W[None], W[0], W[:0], torch._neg_view(W), None):
        assert short(I, weight) is None
    with pytest.raises(IndexError):
        short(torch.tensor([5]), W)

    def gradient(grad, indices, rows=5, padding=-1, by_frequency=False):
        with torch.no_grad():
            return cpu.tensor_embedding_backward(ops._empty_gradient, grad, indices, rows, padding, by_frequency)

    grad = torch.randn(2, 3)
    assert torch.equal(gradient(grad, I), torch.zeros(5, 3).index_add(0, I, grad))
    assert torch.equal(gradient(grad, I.int(), 5, 2, True)[2], torch.zeros(3))
    big = gradient(torch.randn(2, 3000), I, 500)
    assert (big.shape, big[3:].any().item()) == ((500, 3000), False)
    for bad in (grad.long(), grad[:1], grad[0], grad.t(), torch._neg_view(grad), None):
        assert gradient(bad, I) is None
    for indices in (I.float(), I[:1], I[None], None):
        assert gradient(grad, indices) is None
    for rest in ((0,), (1 << 40,), (5.0,), (5, None), (5, -1, 0)):
        assert gradient(grad, I, *rest) is None
    # While gradients are on, the gradient may be asked for its own.
    assert cpu.tensor_embedding_backward(ops._empty_gradient, grad, I, 5, -1, False) is None
    with pytest.raises(IndexError):
        gradient(grad, I, 2)


def test_layer_and_patch(no_fallback):
    theirs = torch.nn.Embedding(9, 4, padding_idx=3)
    ours = fastnn.convert(torch.nn.Sequential(torch.nn.Embedding(9, 4, padding_idx=3)))[0]
    assert type(ours) is fastnn.nn.Embedding
    ours.load_state_dict(theirs.state_dict())
    indices = torch.tensor([[1, 3], [8, 1]])
    results = [layer(indices) for layer in (ours, theirs)]
    assert torch.equal(*results)
    for result in results:
        result.square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    with fastnn.patch():
        assert torch.equal(torch.embedding(theirs.weight, indices), results[1])
        assert torch.equal(theirs(indices), results[1])
    frozen = fastnn.nn.Embedding.from_pretrained(W)
    assert torch.equal(frozen(I), W[I])
