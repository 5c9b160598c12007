"""Rotary position embedding: both forms of it, all shapes of tables, gradients by all three."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import fastnn
import fastnn.functional as fF
from fastnn import _cpu, _state
from fastnn.backends import cpu
from fastnn.ops import rotary as ops

from .support import FLOATS, assert_within

dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
forms = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
HAS_TABLE = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
ISAS = [name for name in _cpu.available_isas() if not name.startswith("amx")]


def by_loop(x, cos, sin, interleaved):
    """One pair after the other, in float64; cos and sin of x's shape."""
    out, half = torch.empty_like(x, dtype=torch.float64), x.shape[-1] // 2
    x, cos, sin = x.double(), cos.double().expand(x.shape), sin.double().expand(x.shape)
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        out[..., a] = x[..., a] * cos[..., a] - x[..., b] * sin[..., a]
        out[..., b] = x[..., b] * cos[..., b] + x[..., a] * sin[..., b]
    return out


def both(table, interleaved):
    return table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)


def angles(length, pairs, dtype=torch.float32):
    return torch.arange(length).unsqueeze(1) * 10_000 ** (-torch.arange(pairs, dtype=dtype) / pairs)


def layouts(x):
    yield x
    yield x.transpose(-3, -2).contiguous().transpose(-3, -2)
    yield x.transpose(-1, -2).contiguous().transpose(-1, -2)
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), math.nan, dtype=x.dtype)
    wide[..., 1:-2] = x
    yield wide[..., 1:-2]
    spread = torch.full((*x.shape, 2), math.nan, dtype=x.dtype)
    spread[..., 1] = x
    yield spread[..., 1]
    yield x[:, :1].expand(x.shape)


@forms
@dtypes
@pytest.mark.parametrize("isa", ISAS)
def test_every_layout_and_table(isa, dtype, interleaved, use_isa, no_fallback):
    use_isa(isa)
    batch, heads, length = 2, 3, 5
    for size in (2, 6, 16, 30, 34, 128):
        for table_dtype in {dtype, dtype if dtype is torch.float64 else torch.float32}:
            for shape in (
                (length, size),
                (length, size // 2),
                (1, size // 2),
                (batch, length, size),
                (1, length, size // 2),
                (batch, 1, length, size),
                (1, heads, 1, size // 2),
            ):
                cos, sin = (torch.randn(shape).to(table_dtype) for _ in range(2))
                whole = [t if shape[-1] == size else both(t, interleaved) for t in (cos, sin)]
                whole = [t.unsqueeze(1) if t.dim() == 3 else t for t in whole]
                for x in layouts(torch.randn(batch, heads, length, size).to(dtype)):
                    result = fF.rotary_embedding(x, cos, sin, interleaved=interleaved)
                    exact = by_loop(x, *whole, interleaved)
                    size_of = by_loop(x.abs(), whole[0].abs(), -whole[1].abs(), interleaved).abs()
                    size_of += by_loop(x.abs(), whole[0].abs(), whole[1].abs(), interleaved).abs()
                    assert_within(result, exact, size_of, 3)
                    if torch.empty_like(x).stride(-1) == 1:
                        assert result.stride() == torch.empty_like(x).stride()


def test_the_forms_of_hugging_face(no_fallback):
    """As their modules write it: Llama's rotate_half with cos (B, L, D), GPT-J's rotate_every_two."""

    def rotate_half(x):
        return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)

    def rotate_every_two(x):
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    q = torch.randn(2, 4, 7, 16)
    table = torch.stack((angles(7, 8), angles(7, 8) + 3))
    cos, sin = (both(f(table), False) for f in (torch.cos, torch.sin))
    llama = q * cos.unsqueeze(1) + rotate_half(q) * sin.unsqueeze(1)
    torch.testing.assert_close(fF.rotary_embedding(q, cos, sin), llama)
    torch.testing.assert_close(fF.rotary_embedding(q, table.cos(), table.sin()), llama)
    cos, sin = (both(f(table), True).unsqueeze(1) for f in (torch.cos, torch.sin))
    gptj = q * cos + rotate_every_two(q) * sin
    torch.testing.assert_close(fF.rotary_embedding(q, cos, sin, interleaved=True), gptj)
    torch.testing.assert_close(fF.rotary_embedding(q, table.cos(), table.sin(), interleaved=True), gptj)


@forms
def test_what_it_is_for(interleaved, no_fallback):
    """Lengths stay, and products of two positions depend on their distance alone (the paper's equation 16)."""
    q, k = torch.randn(2, 1, 32, dtype=torch.float64).expand(2, 40, 32)
    table = angles(40, 16, torch.float64)
    q, k = (fF.rotary_embedding(t, table.cos(), table.sin(), interleaved=interleaved) for t in (q, k))
    torch.testing.assert_close(q.norm(dim=-1), q[0].norm().expand(40))
    scores = q @ k.t()
    for distance in range(-20, 20):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand(diagonal.shape))


@forms
@dtypes
def test_gradients(interleaved, dtype, no_fallback):
    x = torch.randn(2, 3, 7, 34).to(dtype).requires_grad_()
    table = angles(7, 17)
    cos, sin = table.cos().to(dtype), table.sin().to(dtype)
    y = fF.rotary_embedding(x, cos, sin, interleaved=interleaved)
    for grad in layouts(torch.randn(2, 3, 7, 34).to(dtype)):
        (found,) = torch.autograd.grad(y, x, grad, retain_graph=True)
        assert found.dtype is dtype
        whole = [both(t, interleaved) for t in (cos, -sin)]
        assert_within(found, by_loop(grad, *whole, interleaved), 3 * grad.double().abs().max(), 3)


@forms
@pytest.mark.parametrize("table", [(5, 6), (5, 3), (2, 5, 6), (2, 5, 3), (2, 1, 1, 3), (1, 2, 5, 6)])
def test_gradcheck(interleaved, table, no_fallback):
    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def call(*tensors):
        return fF.rotary_embedding(*tensors, interleaved=interleaved)

    tensors = leaf(2, 2, 5, 6), leaf(*table), leaf(*table)
    assert gradcheck(call, tensors, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(call, tensors, fast_mode=True)
    # And with tables that have no gradient, where x is not kept.
    fixed = [t.detach() for t in tensors[1:]]
    assert gradcheck(lambda x: call(x, *fixed), tensors[:1], check_forward_ad=True)
    assert gradgradcheck(lambda x: call(x, *fixed).square(), tensors[:1])


def test_gradients_in_half_precision_keep_the_tables_dtypes(no_fallback):
    x = torch.randn(2, 3, 5, 8).bfloat16().requires_grad_()
    cos, sin = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
    y = fF.rotary_embedding(x, cos, sin)
    assert y.dtype is torch.bfloat16
    assert [g.dtype for g in torch.autograd.grad(y.sum(), (x, cos, sin))] == [torch.bfloat16, *[torch.float32] * 2]
    wide = fF.rotary_embedding(x.double(), cos.half(), sin.bfloat16())
    assert wide.dtype is torch.float64


def test_a_batch_of_gradients():
    x = torch.randn(2, 3, 4, requires_grad=True)
    table = angles(3, 2)
    y = fF.rotary_embedding(x, table.cos(), table.sin())
    grads = torch.randn(5, 2, 3, 4)
    (found,) = torch.autograd.grad(y, x, grads, is_grads_batched=True)
    torch.testing.assert_close(found, fF.rotary_embedding(grads, table.cos(), -table.sin()))
    assert list(_state.fallbacks())
    _state.reset_fallbacks()


def test_threads_and_large(no_fallback):
    x = torch.randn(2, 9, 511, 128, requires_grad=True)
    table = angles(511, 64)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = fF.rotary_embedding(x, table.cos(), table.sin())
        runs.append((y.detach(), *torch.autograd.grad(y.exp().sum(), x)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    whole = [both(t, False) for t in (table.cos(), table.sin())]
    torch.testing.assert_close(runs[0][0], by_loop(x.detach(), *whole, False).float())


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic, no_fallback):
    torch._dynamo.reset()

    def network(x, cos, sin):
        return fF.rotary_embedding(x.exp(), cos, sin) + fF.rotary_embedding(x, cos, sin, interleaved=True)

    compiled = torch.compile(network, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (3, 5) if dynamic else (3,):
        x = torch.randn(2, 4, length, 6, requires_grad=True)
        cos, sin = torch.randn(2, 2, length, 6)
        cos.requires_grad_()
        results = [f(x, cos, sin) for f in (compiled, network)]
        torch.testing.assert_close(*results)
        ours, eager = (torch.autograd.grad(r.sum(), (x, cos)) for r in results)
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_opcheck(grad):
    for transposed in (False, True):
        tensors = (torch.randn(s, requires_grad=grad) for s in ((2, 3, 5, 6), (1, 3, 5, 6), (1, 3, 5, 6)))
        opcheck(torch.ops.fastnn.rotary.default, (*tensors, True, transposed))
        x = torch.randn(6, 5, requires_grad=grad).t()
        opcheck(torch.ops.fastnn.rotary.default, (x, torch.randn(5, 3), torch.randn(5, 3), False, transposed))


def test_meta(no_fallback):
    x = torch.empty(2, 5, 3, 6, device="meta").transpose(1, 2)
    result = fF.rotary_embedding(x, *torch.empty(2, 5, 6, device="meta"))
    assert (result.shape, result.stride()) == (x.shape, torch.empty_like(x).stride())


@pytest.mark.parametrize("dims", [(0, None, None), (2, 0, 0), (None, 1, None), (1, 0, None), (None, 0, 0)])
def test_vmap(dims, no_fallback):
    sizes = [[2, 5, 6], [5, 6], [5, 6]]
    for size, dim in zip(sizes, dims, strict=True):
        if dim is not None:
            size.insert(dim, 3)
    tensors = [torch.randn(size) for size in sizes]

    def formula(x, cos, sin):
        return x * cos + torch.cat((-x[..., 3:], x[..., :3]), -1) * sin

    for f in (lambda g: g, lambda g: torch.func.grad(lambda *t: g(*t).square().sum(), argnums=(0, 1, 2))):
        found = torch.vmap(f(fF.rotary_embedding), dims)(*tensors)
        torch.testing.assert_close(found, torch.vmap(f(formula), dims)(*tensors))


def test_reference_backend_and_autocast(no_fallback):
    x, table = torch.randn(2, 3, 5, 6), torch.randn(5, 3)
    ours = fF.rotary_embedding(x, table.cos(), table.sin())
    with fastnn.backend("reference"):
        torch.testing.assert_close(fF.rotary_embedding(x, table.cos(), table.sin()), ours)
    with torch.autocast("cpu", torch.bfloat16):
        assert fF.rotary_embedding(x, table.cos(), table.sin()).dtype is torch.float32


@pytest.mark.skipif(not HAS_TABLE, reason="torch before 2.10 has no table")
@forms
def test_the_short_way(interleaved, monkeypatch, no_fallback):
    def short(x, cos, sin, *flags):
        return cpu.tensor_rotary(cpu.empty_like, x, cos, sin, *(flags or (interleaved, False)))

    for shape, tables in (
        ((5, 6), ((5, 6), (5, 3), (1, 3))),
        ((2, 5, 6), ((5, 6), (2, 5, 3), (1, 1, 6))),
        ((2, 3, 5, 6), ((5, 3), (2, 5, 6), (1, 5, 3), (2, 1, 1, 6))),
        ((2, 2, 3, 5, 6), ((5, 3), (2, 1, 1, 5, 6))),
        ((2, 3, 511, 128), ((511, 64),)),
    ):
        for table in tables:
            tensors = torch.randn(shape), torch.randn(table), torch.randn(table)
            leaf = tensors[0].clone().requires_grad_()
            found = short(*tensors)
            assert type(short(leaf, *tensors[1:])) is tuple
            runs = [found]
            for way in (cpu.tensor_rotary, lambda *_: None):
                monkeypatch.setattr(ops, "_tensor_rotary", way)
                y = fF.rotary_embedding(leaf, *tensors[1:], interleaved=interleaved)
                runs += [y.detach(), torch.autograd.grad(y.sum(), leaf)[0]]
            assert torch.equal(found, runs[1])
            assert torch.equal(runs[1], runs[3])
            assert torch.equal(runs[2], runs[4])
    x, c = torch.randn(2, 3, 4, 6), torch.randn(4, 6)
    assert torch.equal(
        short(x.transpose(1, 2), c[:3], c[:3]).contiguous(), short(x.transpose(1, 2).contiguous(), c[:3], c[:3])
    )
    for bad in (
        *((x.long(), c, c), (x[..., :5], c, c), (x[0, 0, 0], c, c), (x.mT, c, c), (torch._neg_view(x), c, c)),
        *((x, c[:3], c[:3]), (x, c[:, :4], c[:, :4]), (x, c, c[:, :3]), (x, c.double(), c.double()), (x, c.half(), c)),
        *((x, c.clone().requires_grad_(), c), (x, c, [1.0]), (x, c.t().contiguous().t(), c), (x, c[0], c[0])),
        *((x, c.expand(3, 4, 6), c.expand(3, 4, 6)), (x[0, 0], c[None], c[None]), (x[:0], c, c)),
    ):
        assert short(*bad) is None
    assert short(x, c, c, 1, False) is None


X, C = torch.randn(2, 3, 5, 6), torch.randn(5, 6)
BAD = {
    "x list": (([1.0], C, C), TypeError, "x:"),
    "cos list": ((X, [1.0], C), TypeError, "cos:"),
    "sin None": ((X, C, None), TypeError, "sin:"),
    "integers": ((X, C.long(), C), RuntimeError, "cos:"),
    "integer x": ((X.long(), C, C), RuntimeError, "x:"),
    "device": ((X, C.to("meta"), C), RuntimeError, "cos:"),
    "odd": ((X[..., :5], C, C), ValueError, "x:"),
    "vector": ((X[0, 0, 0], C, C), ValueError, "x:"),
    "other shapes": ((X, C, C[:, :3]), ValueError, "sin:"),
    "length": ((X, C[:4], C[:4]), ValueError, "cos, sin:"),
    "size": ((X, C[:, :4], C[:, :4]), ValueError, "cos, sin:"),
    "batch": ((X, C.expand(3, 5, 6), C.expand(3, 5, 6)), ValueError, "cos, sin:"),
    "dimensions": ((X, C[0], C[0]), ValueError, "cos, sin:"),
    "too many dimensions": ((X[0, 0], C[None], C[None]), ValueError, "cos, sin:"),
    "heads": ((X, C.expand(2, 2, 5, 6), C.expand(2, 2, 5, 6)), ValueError, "cos, sin:"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    args, error, named = BAD[name]
    with pytest.raises(error, match=f"fastnn.rotary_embedding: {named}"):
        fF.rotary_embedding(*args)
    with pytest.raises(TypeError, match="interleaved"):
        fF.rotary_embedding(X, C, C, interleaved=1)
