"""Dropout: torch's signature, errors and gradients, and a mask that is a function of seed and index."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils.checkpoint import checkpoint

import fastnn
import fastnn.functional as fF
from fastnn import _state
from fastnn.backends import cpu
from fastnn.backends.reference import dropout as formulas
from fastnn.ops import dropout as ops
from fastnn.ops._random import draw_seed

from .support import FLOATS

OPINFO = next(op for op in op_db if op.name == "nn.functional.dropout")
HAS_TABLE = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))


def seeded(function, *args, seed=7, **kwargs):
    torch.manual_seed(seed)
    return function(*args, **kwargs)


def expected(x, p=0.5, seed=7):
    torch.manual_seed(seed)
    return formulas.dropout(x, draw_seed(), p, dtype=torch.float64 if x.dtype is torch.float64 else torch.float32)


def layouts(x):
    yield x
    yield x.transpose(0, -1).contiguous().transpose(0, -1)
    spread = torch.full((*x.shape, 2), math.nan, dtype=x.dtype)
    spread[..., 1] = x
    yield spread[..., 1]
    yield x[:1].expand(x.shape)


@dtypes
def test_samples(dtype, machine, no_fallback):
    for sample in OPINFO.sample_inputs("cpu", dtype):
        x = sample.input
        p, training = sample.kwargs.get("p", 0.5), sample.kwargs.get("training", True)
        result, torchs = seeded(fF.dropout, x, **sample.kwargs), F.dropout(x, **sample.kwargs)
        assert (result.shape, result.stride(), result.dtype) == (torchs.shape, torchs.stride(), torchs.dtype)
        assert (result is x) == (torchs is x)
        torch.testing.assert_close(result, expected(x, p) if training else x, rtol=0, atol=0)


@dtypes
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_any_layout_and_its_gradient(dtype, p, machine, no_fallback):
    for view in layouts(torch.randn(5, 7, 33).to(dtype)):
        want = expected(view, p)
        result = seeded(fF.dropout, view, p)
        assert torch.equal(result, want)
        assert result.stride() == torch.empty_like(view).stride()
        leaf = view.detach().requires_grad_()
        result = seeded(fF.dropout, leaf, p)
        assert torch.equal(result.detach(), want)
        for grad in layouts(torch.randn(view.shape).to(dtype)):
            (found,) = torch.autograd.grad(result, leaf, grad, retain_graph=True)
            assert torch.equal(found, expected(grad, p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_and_broken_pieces(dtype, machine, no_fallback):
    """Around what a block has at a time, from addresses that are multiples of 16 and from others, NaN beside."""
    memory = torch.full((4200,), math.nan, dtype=dtype)
    for start in (0, 8, 5):
        for n in (1, 3, 7, 8, 2047, 2049, 4096, 4101):
            x = memory[start : start + n].copy_(torch.randn(n))
            assert torch.equal(seeded(fF.dropout, x, 0.3), expected(x, 0.3))
            want = expected(x, 0.3)
            seeded(fF.dropout, x, 0.3, inplace=True)
            assert torch.equal(x, want)
            x.fill_(math.nan)
            assert memory.isnan().all()


def test_how_many_are_dropped(no_fallback):
    x = torch.ones(1 << 20)
    for p in (0.01, 0.1, 0.5, 0.9):
        y = fF.dropout(x, p)
        kept = (y != 0).double().mean().item()
        assert abs(kept - (1 - p)) < 6 * math.sqrt(p * (1 - p) / x.numel())
        assert torch.equal(y.unique(), torch.tensor([0, 1 / (1 - p)]))
    assert not torch.equal(fF.dropout(x), fF.dropout(x))


def test_the_generator_decides(no_fallback):
    """torch.manual_seed, and saving and restoring the generator's state, repeat a mask."""
    x = torch.randn(64, 64)
    first = seeded(fF.dropout, x)
    state = torch.get_rng_state()
    second = fF.dropout(x)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(fF.dropout(x), second)
    assert torch.equal(seeded(fF.dropout, x), first)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, no_fallback):
    x = torch.randn(16, 16, requires_grad=True)
    masks = []

    def block(x):
        masks.append(fF.dropout(torch.ones_like(x)))
        return fF.dropout(x).exp()

    y = checkpoint(block, x, use_reentrant=reentrant)
    y.sum().backward()
    assert len(masks) == 2
    assert torch.equal(*masks)
    kept = y.detach() != 1  # exp(0)
    torch.testing.assert_close(x.grad, torch.where(kept, 2 * y.detach(), 0))


def test_gradcheck(no_fallback):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def call(x):
        return seeded(fF.dropout, x, 0.4).square()

    assert gradcheck(call, (x,), check_forward_ad=True)
    assert gradgradcheck(call, (x,))


def test_a_batch_of_gradients():
    x = torch.randn(3, 5, requires_grad=True)
    y = seeded(fF.dropout, x)
    grads = torch.randn(4, 3, 5)
    (found,) = torch.autograd.grad(y, x, grads, is_grads_batched=True)
    assert torch.equal(found, torch.stack([expected(g) for g in grads]))


def test_in_place(machine, no_fallback):
    for x in layouts(torch.randn(5, 7, 9)):
        if x.stride(0) == 0:
            with pytest.raises(RuntimeError, match="input"):
                fF.dropout(x, inplace=True)
            _state.reset_fallbacks()
            continue
        want, version = expected(x), x._version
        assert seeded(fF.dropout, x, inplace=True) is x
        assert torch.equal(x, want)
        assert x._version > version
    leaf = torch.randn(4, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        fF.dropout(leaf, inplace=True)
    _state.reset_fallbacks()
    middle = leaf * 2
    result = seeded(fF.dropout, middle, inplace=True)
    assert result is middle
    (found,) = torch.autograd.grad(result.sum(), leaf)
    assert torch.equal(found, 2 * expected(torch.ones(4, 6)))
    whole = leaf * 2
    seeded(fF.dropout, whole[1:3], inplace=True)
    (found,) = torch.autograd.grad(whole.sum(), leaf)
    torch.testing.assert_close(found[1:3], 2 * expected(torch.ones(2, 6)))
    assert found[0].eq(2).all()
    with torch.inference_mode():
        x = torch.randn(9)
        assert torch.equal(expected(x), seeded(fF.dropout, x.clone(), inplace=True))


def test_negated_and_large(no_fallback):
    x = torch._neg_view(torch.randn(40))
    assert torch.equal(seeded(fF.dropout, x), expected(x))
    y = x.clone()
    assert torch.equal(seeded(fF.dropout, torch._neg_view(y), inplace=True), expected(-x))
    empty = torch.empty(0, 3)
    assert fF.dropout(empty) is empty
    large = torch.randn(1000, 1031)
    result = seeded(fF.dropout, large, 0.2)
    assert torch.equal(result, expected(large, 0.2))
    large = large.t()
    assert torch.equal(seeded(fF.dropout, large, 0.2), expected(large, 0.2))


def test_threads(no_fallback):
    x = torch.randn(300, 1009, requires_grad=True)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = seeded(fF.dropout, x, 0.1)
        results.append((y, torch.autograd.grad(y.sum(), x)[0]))
    for run in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, results[0], strict=True))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic, no_fallback):
    torch._dynamo.reset()

    def network(x):
        return fF.dropout(fF.dropout(x, 0.3).exp(), 0.6, True).sin()

    compiled = torch.compile(network, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (3, 5) if dynamic else (3,):
        x = torch.randn(n, 41, requires_grad=True)
        ours, again = seeded(compiled, x), seeded(network, x)
        assert torch.equal(ours, again)
        torch.testing.assert_close(torch.autograd.grad(ours.sum(), x), torch.autograd.grad(again.sum(), x))
    assert not torch.equal(compiled(x), compiled(x))
    in_eval = torch.compile(lambda x: fF.dropout(x, 0.5, False) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(in_eval(x), x + 1)


def test_export_meta_and_fake(no_fallback):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    fastnn.convert(model)
    assert type(model[1]) is fastnn.nn.Dropout
    x = torch.randn(3, 4)
    program = torch.export.export(model, (x,))
    assert "fastnn.dropout" in str(program.graph)
    assert sum("rand" in str(node.target) for node in program.graph.nodes) == 1
    assert "fastnn.dropout" not in str(torch.export.export(model.eval(), (x,)).graph)
    meta = fF.dropout(torch.empty(4, 3, device="meta").t())
    assert (meta.device.type, meta.stride()) == ("meta", (1, 3))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        assert fF.dropout(fake).shape == x.shape
    assert fF.dropout(fake).shape == x.shape
    traced = torch.jit.trace(lambda x: fF.dropout(x, 0.5), (x,), check_trace=False)
    assert torch.equal(seeded(traced, x), seeded(fF.dropout, x))


@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_opcheck(grad):
    for x in (torch.randn(3, 5, requires_grad=grad), torch.randn(5, 3, 2, requires_grad=grad).transpose(0, 2)):
        opcheck(torch.ops.fastnn.dropout.default, (x, torch.tensor(5), 0.25))


def test_vmap(no_fallback):
    x = torch.randn(4, 3, 33)
    for function in (fF.dropout, F.dropout):
        with pytest.raises(RuntimeError, match="randomness"):
            torch.vmap(function)(x)
    same = seeded(torch.vmap(lambda y: fF.dropout(y), randomness="same"), x)
    assert torch.equal(same, torch.stack([expected(y) for y in x]))
    ones = torch.ones(4, 3, 33)
    different = seeded(torch.vmap(fF.dropout, randomness="different"), ones)
    assert len({tuple(row.flatten().tolist()) for row in different}) == 4
    for dim in (1, 2, -1):
        result = torch.vmap(fF.dropout, in_dims=dim, out_dims=dim, randomness="different")(ones)
        assert (result.shape, set(result.unique().tolist())) == (ones.shape, {0.0, 2.0})

    def gradient(y):
        return torch.func.grad(lambda z: fF.dropout(z).sum())(y)

    found = seeded(torch.vmap(gradient, randomness="same"), x)
    assert torch.equal(found, torch.stack([expected(torch.ones(3, 33))] * 4))
    value, tangent = seeded(torch.func.jvp, lambda y: fF.dropout(y, 0.2), (x[0],), (x[1],))
    assert torch.equal(value, expected(x[0], 0.2))
    assert torch.equal(tangent, expected(x[1], 0.2))


def test_reference_backend(no_fallback):
    x = torch.randn(5, 7, requires_grad=True)
    ours = seeded(fF.dropout, x, 0.3)
    with fastnn.backend("reference"):
        reference = seeded(fF.dropout, x, 0.3)
        torch.testing.assert_close(reference, ours)
        gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (reference, ours)]
    torch.testing.assert_close(*gradients)


def test_autocast_leaves_it_alone(no_fallback):
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in FLOATS:
            assert fF.dropout(torch.randn(3).to(dtype)).dtype is dtype


BAD = {
    "p below": ((torch.randn(3), -0.1), {}, "p:"),
    "p above": ((torch.randn(3), 1.1), {}, "p:"),
    "p NaN": ((torch.randn(3), math.nan), {}, "p:"),
    "p text": ((torch.randn(3), "half"), {}, "p:"),
    "p None": ((torch.randn(3), None), {}, "p:"),
    "training": ((torch.randn(3), 0.5, 1), {}, "training"),
    "list": (([1.0],), {}, "input"),
    "list in eval": (([1.0], 0.5, False), {}, "input"),
    "integers": ((torch.arange(3),), {}, "int64"),
    "p above, in place": ((torch.randn(3), 1.1), {"inplace": True}, "p:"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    args, kwargs, named = BAD[name]
    with pytest.raises(Exception) as theirs:
        F.dropout(*args, **kwargs)
    with pytest.raises(type(theirs.value), match=named) as ours:
        fF.dropout(*args, **kwargs)
    assert "fastnn.dropout" in str(ours.value)


def test_what_goes_to_torch_is_counted():
    _state.reset_fallbacks()
    result = fF.dropout(torch.nested.nested_tensor([torch.ones(20), torch.ones(30)]))
    assert set(result.values().tolist()) == {0.0, 2.0}
    assert list(_state.fallbacks()) == [("dropout", "input: a nested tensor")]
    _state.reset_fallbacks()


def drawn(function, *args, **kwargs):
    """Where the generator stands afterwards: nothing else is told apart by it."""
    torch.manual_seed(5)
    try:
        function(*args, **kwargs)
    except Exception as error:
        assert type(error) is not AssertionError
    return torch.get_rng_state()


def test_draws_nothing_where_torch_draws_nothing():
    """... and what torch draws, where the answer is torch's."""
    x, nothing = torch.randn(4, 6), torch.empty(0, 3)
    untouched = drawn(torch.ones, 1)
    for arguments in (
        (x, 0.0),
        (x, 1.0),
        (x, 1),
        (x, 1.0, True, True),
        (x, 0.5, False),
        (nothing, 0.5),
        (nothing.clone().requires_grad_(), 0.5),
        (nothing, 0.5, True, True),
        (x, 2.0),
        (x, "0.5"),
        ([1.0], 0.5),
    ):
        assert torch.equal(drawn(fF.dropout, *arguments), untouched)
        assert torch.equal(drawn(F.dropout, *arguments), untouched)
    for arguments in (
        (torch.ones(5, dtype=torch.int64), 0.5),
        (torch.ones(5, dtype=torch.complex64), 0.5),
        (torch.nested.nested_tensor([torch.ones(20), torch.ones(30)]), 0.5),
        (x[:, :1].expand(4, 6), 0.5, True, True),
        (x.clone().requires_grad_(), 0.5, True, True),
    ):
        assert torch.equal(drawn(fF.dropout, *arguments), drawn(F.dropout, *arguments))
    assert not torch.equal(drawn(fF.dropout, x, 0.5), untouched)
    q = torch.randn(1, 2, 3, 4)
    for dropout in (0.0, 1.0):
        for function in (fF, F):
            call = function.scaled_dot_product_attention
            assert torch.equal(drawn(call, q, q, q, dropout_p=dropout), untouched)
            assert torch.equal(drawn(call, q[:0], q[:0], q[:0], dropout_p=0.5), untouched)


def test_of_everything_asks_vmap_for_no_randomness():
    x = torch.randn(3, 4)
    result = torch.vmap(lambda row: fF.dropout(row, 1.0), randomness="error")(x)
    assert torch.equal(result, torch.vmap(lambda row: F.dropout(row, 1.0), randomness="error")(x))


@pytest.mark.skipif(not HAS_TABLE, reason="torch before 2.10 has no table")
def test_the_short_way(monkeypatch, no_fallback):
    def short(x, p=0.5):
        return cpu.tensor_dropout(cpu.empty_like, x, torch.tensor(3), p)

    x = torch.randn(5, 7)
    for view in (x, x.t(), x[:, ::2], torch.randn(900, 900), torch.randn(900, 900).t()):
        found = short(view)
        assert torch.equal(found, formulas.dropout(view, torch.tensor(3), 0.5))
        assert found.stride() == torch.empty_like(view).stride()
    result, seed = short(x.clone().requires_grad_())
    assert seed == 3
    assert not result.requires_grad
    seeds = []

    def draw():
        seeds.append(torch.randint(1 << 62, ()))
        return seeds[-1]

    result, seed = cpu.tensor_dropout(cpu.empty_like, x.clone().requires_grad_(), draw, 0.5)
    assert seed is seeds[0]
    assert torch.equal(result, formulas.dropout(x, seed, 0.5))
    assert cpu.tensor_dropout(cpu.empty_like, x.long(), draw, 0.5) is None
    assert len(seeds) == 1  # none for what is not taken
    assert cpu.tensor_dropout(cpu.empty_like, x, lambda: 3, 0.5) is None
    with pytest.raises(ZeroDivisionError):
        cpu.tensor_dropout(cpu.empty_like, x, lambda: 1 // 0, 0.5)
    for bad in ([1.0], x.long(), x[:0], torch.tensor(1.0), torch._neg_view(x), x.to("meta"), None):
        assert short(bad) is None
    for p in (1, -0.1, 1.1, math.nan, "x"):
        assert short(x, p) is None
    for seed in (torch.tensor(3, dtype=torch.int32), torch.tensor([3]), torch.tensor(3.0), 3, None):
        assert cpu.tensor_dropout(cpu.empty_like, x, seed, 0.5) is None
    leaf = torch.randn(5, 7, requires_grad=True)
    taken = [seeded(fF.dropout, leaf), *torch.autograd.grad(seeded(fF.dropout, leaf).sum(), leaf)]
    monkeypatch.setattr(ops, "_tensor_dropout", lambda *_: None)
    longer = [seeded(fF.dropout, leaf), *torch.autograd.grad(seeded(fF.dropout, leaf).sum(), leaf)]
    assert all(torch.equal(a, b) for a, b in zip(taken, longer, strict=True))


def test_layer(no_fallback):
    ours, theirs = fastnn.nn.Dropout(0.3), torch.nn.Dropout(0.3)
    assert repr(ours) == repr(theirs)
    x = torch.randn(4, 5)
    assert torch.equal(seeded(ours, x), expected(x, 0.3))
    assert ours.eval()(x) is x
    y = x.clone()
    assert seeded(fastnn.nn.Dropout(0.3, inplace=True), y) is y
    assert torch.equal(y, expected(x, 0.3))
    assert type(fastnn.convert(torch.nn.Sequential(theirs))[0]) is fastnn.nn.Dropout
    with fastnn.patch():
        for call in (theirs.train(), lambda x: F.dropout(x, 0.3), lambda x: torch.dropout(x, 0.3, True)):
            assert torch.equal(seeded(call, x), expected(x, 0.3))
        assert torch.equal(torch.dropout(x, p=0.3, train=False), x)


def test_the_mask_is_what_the_header_says():
    """Written from the words of src/cpp/common/philox.hpp's comment."""
    assert "word e % 4 of counter e / 4" in Path(__file__).parents[2].joinpath("src/cpp/common/philox.hpp").read_text()
    x, seed, p = torch.ones(50), torch.tensor(123), 0.3
    kept = formulas.words(seed, 50) >= round(p * 2**32)
    assert torch.equal(torch.ops.fastnn.dropout(x, seed, p) != 0, kept)
