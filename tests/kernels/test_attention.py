"""The attention kernels on every instruction set: dtypes, layouts, lengths, masks, against float64."""

from __future__ import annotations

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastnn import _cpu
from fastnn.backends.cpu import attention as kernels
from fastnn.backends.reference import attention as formulas

from .calls import FLOATS, UNDER_SANITIZER

dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
wide_and_half = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])

#: What a probability is rounded by on its way: 16-bit products may have them in 16 bits.
SUM = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
OPTIONS = {
    "mask": None,
    "slopes": None,
    "scale": None,
    "low": None,
    "high": None,
    "shift": 0,
    "dropout": 0.0,
    "seed": None,
}


def surrounded(x, order=None):
    """The same numbers amid NaN, with the dimensions in another order in memory."""
    order = list(range(x.dim())) if order is None else order
    base = torch.full((x.numel() + 65,), math.nan, dtype=x.dtype)
    inner = base[33 : 33 + x.numel()].view([x.shape[d] for d in order])
    return inner.permute([order.index(d) for d in range(x.dim())]).copy_(x)


def layouts(*tensors):
    yield "contiguous", [surrounded(x) for x in tensors]
    yield "length before heads", [surrounded(x, [0, 2, 1, 3]) for x in tensors]
    yield "transposed", [surrounded(x, [0, 1, 3, 2]) for x in tensors]
    yield "reversed", [surrounded(x, [3, 2, 1, 0]) for x in tensors]
    sparse = [torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), math.nan, dtype=x.dtype)[..., 1::2] for x in tensors]
    yield "sliced", [s.copy_(x) for s, x in zip(sparse, tensors, strict=True)]


def inputs(shape, dtype, spread=1.0):
    """query, key, value and a gradient, for (batch, heads, kv_heads, q_length, k_length, size, value_size)."""
    n, h, kv, length, keys, size, value_size = shape
    make = lambda *s: (spread * torch.randn(s, dtype=torch.float64)).to(dtype)  # noqa: E731
    return (
        make(n, h, length, size),
        make(n, kv, keys, size),
        make(n, kv, keys, value_size),
        make(n, h, length, value_size),
    )


def run(q, k, v, g=None, by_mask=False, **options):
    """What the kernels find: out, log_sum, and with ``g`` the gradients of query, key, value and mask."""
    o = {**OPTIONS, "scale": 1 / math.sqrt(q.shape[-1]), **options}
    out, log_sum = kernels.attention(q, k, v, *o.values(), False)
    if g is None:
        return SimpleNamespace(out=out, log_sum=log_sum)
    mask, slopes, *rest = o.values()
    grads = kernels.attention_backward(g, q, k, v, mask, slopes, out, log_sum, *rest, by_mask)
    return SimpleNamespace(out=out, log_sum=log_sum, grads=grads)


def expected(q, k, v, g=None, by_mask=False, **options):
    """The same in float64, and how large what is rounded on the way is."""
    o = {**OPTIONS, "scale": 1 / math.sqrt(q.shape[-1]), **options}
    wide = [x.double() for x in (q, k, v)]
    mask = o["mask"]
    o["mask"] = mask.double() if mask is not None and mask.is_floating_point() else mask
    out, log_sum = formulas.attention(*wide, *o.values(), False)
    p = formulas.Probabilities(*wide[:2], *o.values(), torch.float64)
    # A score's error is a relative error of its probability.
    unit = SUM[q.dtype]
    score = (abs(o["scale"]) * p.of(p.query.abs(), p.key.abs())).amax(-1, keepdim=True)
    if mask is not None and mask.is_floating_point():
        score = score + torch.where(mask.isfinite(), mask.double().abs(), 0).amax(-1, keepdim=True)
    if o["slopes"] is not None:
        score = score + o["slopes"].double()[..., None, None].abs() * (q.shape[2] + k.shape[2])
    accumulated = 2.0**-53 if q.dtype == torch.float64 else 2.0**-24
    reach = unit * 4 + accumulated * (4 * score + 0.5 * q.shape[-1] ** 0.5 * score + 8 + k.shape[2] ** 0.5)
    value = p.per_query_head(wide[2]).abs()
    found = SimpleNamespace(out=out, log_sum=log_sum, out_bound=reach * (p.value * p.kept @ value), reach=reach)
    if g is None:
        return found
    mask, slopes, *rest = o.values()
    found.grads = formulas.attention_backward(g.double(), *wide, mask, slopes, out, log_sum, *rest, by_mask)
    g = g.double().abs()
    weight = p.value * p.kept
    e = p.of(g, value) * p.kept
    scores = p.value * (e + (p.value * e).sum(-1, keepdim=True)) * (reach + unit * 4)
    scale = abs(o["scale"])
    found.bounds = [
        scale * scores @ p.key.abs(),
        p.per_kv_head(scale * scores.transpose(-2, -1) @ p.query.abs()),
        p.per_kv_head((weight * (reach + unit * 4)).transpose(-2, -1) @ g),
        scores.sum_to_size(mask.shape) if by_mask else torch.zeros(0),
    ]
    return found


def close(result, exact, bound, name=""):
    bound = bound + 1.01 * torch.finfo(result.dtype).eps / 2 * exact.abs() + 64 * torch.finfo(result.dtype).tiny
    excess = (result.double() - exact).abs() / bound
    assert bool((excess <= 1).all()), f"{name}: {excess.nan_to_num(nan=math.inf).max():.3g} times the bound"


def check(q, k, v, g, by_mask=False, name="", **options):
    found, exact = run(q, k, v, g, by_mask, **options), expected(q, k, v, g, by_mask, **options)
    compare(found, exact, name)
    return found


def compare(found, exact, name=""):
    close(found.out, exact.out, exact.out_bound, f"{name} out")
    finite = exact.log_sum.isfinite()
    assert torch.equal(found.log_sum.isfinite(), finite)
    torch.testing.assert_close(
        found.log_sum.double()[finite], exact.log_sum[finite], rtol=2e-6, atol=max(1e-5, float(exact.reach.max()))
    )
    for which, got, wanted, bound in zip(
        ["query", "key", "value", "mask"], found.grads, exact.grads, exact.bounds, strict=True
    ):
        close(got, wanted, bound, f"{name} {which}")


LENGTHS = (1, 2, 13, 14, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257)
#: Each length of each, beside one that is its neighbour nowhere.
PAIRS = [(a, b) for i, a in enumerate(LENGTHS) for b in (LENGTHS[(5 * i + 3) % len(LENGTHS)], a)] + [
    (1, 4099),
    (521, 3),
]
SIZES = (1, 3, 8, 16, 31, 33, 64, 65, 80, 128, 129, 256, 512)


@dtypes
@pytest.mark.parametrize("lengths", PAIRS, ids=str)
def test_lengths(isa, lengths, dtype):
    q, k, v, g = (surrounded(x) for x in inputs((2, 2, 1, *lengths, 20, 24), dtype))
    check(q, k, v, g)
    check(q, k, v, g, high=0, name="causal")


@dtypes
@pytest.mark.parametrize("size", SIZES)
def test_sizes_of_rows(isa, size, dtype):
    for value_size in {size, SIZES[(SIZES.index(size) + 5) % len(SIZES)]}:
        q, k, v, g = (surrounded(x) for x in inputs((1, 2, 2, 19, 37, size, value_size), dtype))
        check(q, k, v, g, name=str(value_size))


@dtypes
@pytest.mark.parametrize("heads", [(1, 1), (6, 6), (6, 2), (8, 1), (7, 7)], ids=str)
@pytest.mark.parametrize("lengths", [(1, 67), (5, 7), (70, 66)], ids=str)
def test_heads_that_share_keys(isa, heads, lengths, dtype):
    q, k, v, g = inputs((3, *heads, *lengths, 16, 16), dtype)
    check(q, k, v, g)
    check(q, k, v, g, high=lengths[1] - lengths[0])


@dtypes
@pytest.mark.parametrize("shape", [(2, 4, 2, 35, 70, 24, 17), (3, 2, 2, 1, 33, 16, 16)], ids=str)
def test_layouts(isa, shape, dtype):
    tensors = inputs(shape, dtype)
    exact = expected(*tensors)
    for name, laid_out in layouts(*tensors):
        compare(run(*laid_out), exact, name)
    # Each in another, and results that are asked for in any.
    mixed = [list(layouts(x))[i][1][0] for i, x in enumerate(tensors)]
    compare(run(*mixed), exact, "mixed")


@dtypes
def test_expanded(isa, dtype):
    """One row, one head, one batch again and again; a gradient that is one number."""
    q, k, v, g = inputs((1, 1, 1, 1, 1, 8, 8), dtype)
    one = lambda x, *s: x.expand(*s)  # noqa: E731
    check(one(q, 2, 3, 17, 8), one(k, 2, 3, 19, 8), one(v, 2, 3, 19, 8), one(g, 2, 3, 17, 8))
    check(
        one(q[..., :1], 2, 3, 17, 8), one(k[..., :1], 2, 3, 19, 8), one(v, 2, 3, 19, 8), g[..., :1].expand(2, 3, 17, 8)
    )


def masks(shape, dtype):
    n, h, _, length, keys, _, _ = shape
    full = torch.randn(n, h, length, keys)
    for name, mask in (
        ("whole", full),
        ("of queries and keys", full[:1, :1]),
        ("of keys", full[:, :1, :1]),
        ("of heads", full[:1]),
        ("of queries", full[..., :1]),
        ("of nothing", full[:1, :1, :1, :1]),
        ("expanded", full[:, :1, :, :1].expand(n, h, length, keys)),
        ("transposed", full.mT.contiguous().mT),
        ("sliced", full.repeat_interleave(2, -1)[..., ::2]),
    ):
        yield name, mask, torch.float32
        yield name, mask.to(dtype), dtype
        yield name, mask > -0.5, torch.bool


@dtypes
@pytest.mark.parametrize(
    "shape", [(2, 3, 3, 18, 35, 8, 8), (2, 4, 2, 1, 130, 16, 16), (1, 2, 1, 65, 33, 33, 5)], ids=str
)
def test_masks(isa, shape, dtype):
    q, k, v, g = inputs(shape, dtype)
    for name, mask, kind in masks(shape, dtype):
        check(q, k, v, g, kind is not torch.bool, f"{name} {kind}", mask=mask)


@dtypes
@pytest.mark.parametrize("kind", ["bool", "-inf", "least"])
def test_queries_that_see_nothing(isa, kind, dtype):
    """Zeros without a gradient; where the mask is finite, all keys alike."""
    shape = (2, 2, 1, 37, 70, 16, 16)
    q, k, v, g = inputs(shape, dtype)
    hidden = torch.rand(2, 1, 37, 70) < 0.4
    hidden[:, :, 3:6] = True
    hidden[:, :, 20, :64] = True
    hidden[1] = True
    mask = ~hidden
    if kind != "bool":
        least = -math.inf if kind == "-inf" else torch.finfo(dtype).min
        mask = torch.zeros(2, 1, 37, 70, dtype=dtype).masked_fill(hidden, least)
    found = run(q, k, v, g, kind != "bool", mask=mask)
    if kind == "least":
        # float16's is not so large that float32 does not see the score beside it.
        for row in (3, 4, 5) if dtype is not torch.float16 else ():
            wanted = v[1].double().mean(-2, keepdim=True)
            torch.testing.assert_close(
                found.out[1, :, row].double(), wanted[:, 0].expand(2, -1), rtol=0, atol=4 * torch.finfo(dtype).eps
            )
        # The others are as if it excluded what it almost excludes.
        mask = mask.masked_fill(hidden.all(-1, keepdim=True), 0.0)
        found = run(q, k, v, g, True, mask=mask)
        exact = expected(q, k, v, g, True, mask=torch.where(mask < -1, -math.inf, mask))
        close(found.out, exact.out, exact.out_bound)
        return
    compare(found, expected(q, k, v, g, kind != "bool", mask=mask))
    assert not found.out[1].any()
    assert not found.out[0, :, 3:6].any()
    assert (found.log_sum[1] == math.inf).all()
    assert not found.grads[0][1].any()
    assert not any(x[1].any() for x in found.grads[1:3])


@dtypes
@pytest.mark.parametrize("lengths", [(33, 33), (70, 9), (9, 70), (1, 200), (130, 129), (64, 256)], ids=str)
def test_bounds(isa, lengths, dtype):
    length, keys = lengths
    q, k, v, g = inputs((1, 2, 1, length, keys, 16, 16), dtype)
    shift = keys - length
    for low, high in (
        (None, 0), (None, shift), (0, None), (shift, None), (-3, 2), (shift - 7, shift), (shift - 64, shift + 5),
        (2, 1), (keys, None), (None, -length), (-1, -1), (None, 10**15), (-(10**15), None), (-(2**62), 2**62),
    ):  # fmt: skip
        check(q, k, v, g, low=low, high=high, name=f"{low} {high}")


@dtypes
def test_bounds_beside_masks(isa, dtype):
    shape = (2, 2, 1, 40, 67, 8, 8)
    q, k, v, g = inputs(shape, dtype)
    mask = torch.randn(2, 1, 40, 67)
    check(q, k, v, g, True, mask=mask, high=0)
    check(q, k, v, g, True, mask=mask.to(dtype), low=-5, high=20)
    check(q, k, v, g, mask=mask > 0, high=27, low=0)


@dtypes
@pytest.mark.parametrize("lengths", [(33, 33), (70, 9), (1, 200), (9, 130)], ids=str)
def test_slopes(isa, lengths, dtype):
    length, keys = lengths
    q, k, v, g = inputs((2, 4, 2, length, keys, 16, 16), dtype)
    for slopes in (
        torch.tensor([[0.5, 0.25, 0.125, 0.0625]]),
        torch.rand(2, 4),
        torch.rand(4, 2).t(),
        torch.rand(2, 1),
    ):
        check(q, k, v, g, slopes=slopes)
        check(q, k, v, g, slopes=slopes, shift=keys - length, high=keys - length)
    check(q, k, v, g, True, slopes=slopes, mask=torch.randn(1, 1, length, keys), high=5)


@dtypes
@pytest.mark.parametrize("scale", [0.0, -0.5, 1.0, 0.03])
def test_scales(isa, scale, dtype):
    check(*inputs((1, 2, 2, 21, 34, 8, 8), dtype), scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["f32", "f64", "bf16"])
@pytest.mark.parametrize("spread", [30.0, 1e4, 1e12])
def test_scores_beyond_the_range_of_exp(isa, spread, dtype):
    """... of which the largest takes all."""
    q, k, v, g = inputs((1, 2, 2, 33, 70, 16, 16), dtype)
    q, k = q * spread, k * spread
    found, exact = run(q, k, v, g), expected(q, k, v, g)
    scores = torch.sort(q.double() @ k.double().mT / 4).values
    decided = scores[..., -1] - scores[..., -2] > 1e-2 * scores[..., -1].abs() + 50
    assert decided.any()
    torch.testing.assert_close(
        found.out.double()[decided], exact.out[decided], rtol=torch.finfo(dtype).eps, atol=1e-12, msg=str(spread)
    )
    assert all(x.isfinite().all() for x in (found.out, found.log_sum, *found.grads))


def test_sums_of_many_rows_of_like_scores(isa):
    """Where keys are the same, the mean of the values; 40,000 of them."""
    q, k, v = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8).expand(1, 2, 40_000, 8), torch.randn(1, 2, 40_000, 8) + 3
    found = run(q, k, v)
    torch.testing.assert_close(found.out.double(), v.double().mean(2, keepdim=True), rtol=2e-6, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_masks(isa, value):
    q, k, v, _ = inputs((1, 1, 1, 20, 40, 8, 8), torch.float32)
    mask = torch.randn(1, 1, 20, 40)
    mask[0, 0, 7, 33] = value
    found = run(q, k, v, mask=mask).out
    assert found[0, 0, 7].isnan().all()
    others = [i for i in range(20) if i != 7]
    torch.testing.assert_close(found[:, :, others], expected(q, k, v, mask=mask).out.float()[:, :, others])


def test_what_is_excluded_is_not_seen(isa):
    """NaN among keys and values that a boolean or a bound excludes has no effect."""
    q, k, v, _ = inputs((1, 2, 2, 40, 70, 8, 8), torch.float32)
    clean = run(q, k, v, high=0).out
    bad_k, bad_v = k.clone(), v.clone()
    bad_k[:, :, 41:], bad_v[:, :, 64:] = math.nan, 0
    torch.testing.assert_close(run(q, bad_k, bad_v, high=0).out, clean)


@dtypes
@pytest.mark.parametrize(
    "shape", [(2, 3, 3, 200, 190, 32, 32), (1, 8, 2, 1, 3000, 64, 64), (8, 4, 1, 1, 1000, 16, 16), (1, 2, 1, 64, 4000, 8, 8)],
    ids=str,
)  # fmt: skip
def test_the_same_bits_for_any_number_of_threads(isa, shape, dtype):
    q, k, v, g = inputs(shape, dtype)
    mask = torch.randn(1, 1, shape[3], shape[4])
    for options in ({}, {"high": shape[4] - shape[3]}, {"mask": mask}, {"dropout": 0.3, "seed": torch.tensor(7)}):
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            result = run(q, k, v, g, "mask" in options, **options)
            found.append((result.out, result.log_sum, *result.grads))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@dtypes
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("keys", [255, 1024, 4097])
def test_decoding(isa, batch, keys, dtype):
    """One query, many keys, in a longer cache."""
    q, k, v, g = inputs((batch, 8, 2, 1, keys, 64, 64), dtype)
    cache = torch.full((2, batch, 2, keys + 100, 64), math.nan, dtype=dtype)
    cache[0, :, :, :keys], cache[1, :, :, :keys] = k, v
    padding = torch.arange(keys) >= torch.tensor([5, 100, 0])[:batch, None]
    for mask in (None, padding[:, None, None]):
        check(q, *cache[:, :, :, :keys], g, mask=mask)


def recovered(shape, dropout, seed, **options):
    """What dropout multiplies probabilities with, from values that are unit vectors, a few keys at a time."""
    n, h, kv, length, keys, size, _ = shape
    q, k = torch.zeros(n, h, length, size), torch.zeros(n, kv, keys, size)
    found = []
    for first in range(0, keys, 300):
        v = torch.eye(keys)[:, first : first + 300].expand(n, kv, -1, -1)
        found.append(run(q, k, v, dropout=dropout, seed=torch.tensor(seed), **options).out)
    return torch.cat(found, -1) * keys


@pytest.mark.parametrize(
    "shape", [(2, 3, 3, 33, 70, 8, 8), (1, 4, 1, 1, 1000, 16, 16), (3, 2, 1, 130, 61, 8, 8)], ids=str
)
@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_dropout(isa, shape, dropout):
    """The same probabilities are dropped forward and backward, for any keys and values."""
    seed = 0x1234_5678_9ABC_DEF0
    kept = recovered(shape, dropout, seed)
    assert bool(((kept == 0) | ((kept * (1 - dropout) - 1).abs() < 1e-5)).all())
    share = (kept == 0).double().mean().item()
    assert abs(share - dropout) < 5 * math.sqrt(dropout * (1 - dropout) / kept.numel())
    # No head, query or batch like another.
    rows = (kept == 0).flatten(0, 2)
    assert rows.unique(dim=0).shape[0] > 0.95 * rows.shape[0]
    assert not torch.equal(recovered(shape, dropout, seed + 1) == 0, kept == 0)
    assert not torch.equal(recovered(shape, dropout, seed - 2**63) == 0, kept == 0)
    q, k, v, g = (x.requires_grad_() for x in inputs(shape, torch.float64))
    p = torch.softmax(q @ k.repeat_interleave(shape[1] // shape[2], 1).mT / math.sqrt(shape[5]), -1)
    dropped = (kept != 0).double() / (1 - dropout)
    out = (p * dropped) @ v.repeat_interleave(shape[1] // shape[2], 1)
    wanted = (out, *torch.autograd.grad(out, (q, k, v), g))
    for dtype in FLOATS:
        q_, k_, v_, g_ = (x.detach().to(dtype) for x in (q, k, v, g))
        found = run(q_, k_, v_, g_, dropout=dropout, seed=torch.tensor(seed))
        loose = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
        for got, exact in zip((found.out, *found.grads), wanted, strict=False):
            torch.testing.assert_close(got.double(), exact.detach(), rtol=loose, atol=loose * exact.abs().max().item())
    compare(
        run(q.detach(), k.detach(), v.detach(), g.detach(), dropout=dropout, seed=torch.tensor(seed)),
        expected(q.detach(), k.detach(), v.detach(), g.detach(), dropout=dropout, seed=torch.tensor(seed)),
    )


def test_dropout_of_all_and_of_nothing(isa):
    shape = (1, 2, 2, 17, 33, 8, 8)
    q, k, v, g = inputs(shape, torch.float32)
    found = run(q, k, v, g, dropout=1.0, seed=torch.tensor(3))
    assert not any(x.any() for x in (found.out, *found.grads))
    torch.testing.assert_close(run(q, k, v, g, dropout=1e-12, seed=torch.tensor(3)).out, run(q, k, v).out)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 128, 64), (1, 2, 512, 128), (1, 8, 77, 40)], ids=str)
def test_no_less_exact_than_torch(isa, shape, is_causal):
    """The root-mean-square error of float32, forward and backward."""
    tensors = [torch.randn(shape) for _ in range(3)]
    g = torch.randn(shape)

    def rms(found, exact):
        return (found.double() - exact).square().mean().sqrt().item()

    leaves = [x.clone().requires_grad_() for x in tensors]
    theirs = F.scaled_dot_product_attention(*leaves, is_causal=is_causal)
    theirs = (theirs, *torch.autograd.grad(theirs, leaves, g))
    wide = [x.double().requires_grad_() for x in tensors]
    exact = F.scaled_dot_product_attention(*wide, is_causal=is_causal)
    exact = (exact, *torch.autograd.grad(exact, wide, g.double()))
    found = run(*tensors, g, high=0 if is_causal else None)
    for name, ours, their, true in zip(
        ("out", "query", "key", "value"), (found.out, *found.grads), theirs, exact, strict=False
    ):
        # Where a query sees few keys, torch has their probabilities exactly: its log sum exp is a score.
        assert rms(ours, true) <= (1.1 if name == "out" else 1.4) * rms(their, true), name


def test_writes_nothing_beside_its_results(isa):
    q, k, v, g = inputs((2, 2, 1, 19, 33, 9, 7), torch.float32)
    exact = expected(q, k, v, g)
    shape = (2, 2, 1, 19, 33, 9, 7)
    operand = lambda x: (x.data_ptr(), x.stride())  # noqa: E731
    for order in ([0, 1, 2, 3], [0, 2, 1, 3], [0, 1, 3, 2]):
        bases = [torch.full((x.numel() + 128,), 1234.5) for x in (g, q, k, v)]
        views = [
            base[64:-64].view([x.shape[d] for d in order]).permute([order.index(d) for d in range(4)])
            for base, x in zip(bases, (g, q, k, v), strict=True)
        ]
        out, *grads = views
        log_sum = torch.full((2 * 2 * 19 + 64,), 1234.5)
        scores = torch.full((2 * 2 * 19 * 33 + 64,), 1234.5)
        address = log_sum[32:].data_ptr()
        rest = (1 / 3, None, (None, None), None, None)
        _cpu.attention(0, shape, operand(q), operand(k), operand(v), operand(out), address, *rest)
        _cpu.attention_backward(
            *(0, shape, operand(q), operand(k), operand(v), operand(out), address, operand(g)),
            *(operand(x) for x in grads),
            (scores[32:].data_ptr(), (2 * 19 * 33, 19 * 33, 33, 1)),
            *rest,
        )
        close(out, exact.out, exact.out_bound)
        for got, wanted, bound in zip(grads, exact.grads, exact.bounds, strict=False):
            close(got, wanted, bound)
        for base in bases:
            assert (base[:64] == 1234.5).all()
            assert (base[-64:] == 1234.5).all()
        for base in (log_sum, scores):
            assert (base[:32] == 1234.5).all()
            assert (base[-32:] == 1234.5).all()
            assert not (base[32:-32] == 1234.5).any()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its own memory by what Linux tells of it")
@pytest.mark.skipif(UNDER_SANITIZER, reason="AddressSanitizer aborts where memory is limited")
def test_out_of_memory():
    """Where a thread finds no memory for its keys: a MemoryError, and the next call is right."""
    program = """
import resource, torch
from fastnn import _cpu
q, k, v = torch.randn(1, 2, 64, 64), *torch.randn(2, 1, 2, 64, 1 << 18).mT
out = torch.empty(1, 2, 64, 64)
def call(k, v):
    operands = ((x.data_ptr(), x.stride()) for x in (q, k, v, out))
    shape = (1, 2, 2, 64, k.shape[2], 64, 64)
    _cpu.attention(0, shape, *operands, None, 0.125, None, (None, None), None, None)
call(k[:, :, :64], v[:, :, :64])  # starts the threads
memory = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
_, most = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (memory + (16 << 20), most))
try:
    call(k, v)
except MemoryError:
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    call(k, v)
    q, k, v = q.double(), k.double(), v.double()
    torch.testing.assert_close(out.double(), (q @ k.mT / 8).softmax(-1) @ v, rtol=1e-4, atol=1e-6)
    print("recovered")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "recovered\n", done.stderr


def test_bad_arguments():
    x = torch.randn(1, 2, 3, 4)
    operand = (x.data_ptr(), x.stride())

    def call(**changes):
        arguments = {
            **dict(dtype=0, shape=(1, 2, 2, 3, 3, 4, 4), q=operand, k=operand, v=operand, out=operand, log_sum=None),
            **dict(scale=1.0, mask=None, bounds=(None, None), slopes=None, dropout=None),
        }
        return _cpu.attention(**{**arguments, **changes})

    for changes, named in (
        (dict(dtype=5), "dtype"),
        (dict(dtype=99), "dtype"),
        (dict(shape=(1, 2, 2, 3, 3, 4)), "shape"),
        (dict(shape=(1, 2, 2, 0, 3, 4, 4)), "shape"),
        (dict(shape=(1, 3, 2, 3, 3, 4, 4)), "shape"),
        (dict(q=None), "q"),
        (dict(k=(0, x.stride())), "k"),
        (dict(v=(x.data_ptr(), (1, 2, 3))), "v"),
        (dict(out=x.data_ptr()), "out"),
        (dict(mask=operand), "mask"),
        (dict(mask=(*operand, 3)), "mask"),
        (dict(bounds=None), "bounds"),
        (dict(slopes=(x.data_ptr(), 1)), "slopes"),
        (dict(dropout=(1.5, 0)), "dropout"),
        (dict(dropout=(math.nan, 0)), "dropout"),
        (dict(dropout=(0.5, 0)), "dropout: expected an address"),
        (dict(log_sum=0), "log_sum"),
    ):
        with pytest.raises(ValueError, match=named):
            call(**changes)
