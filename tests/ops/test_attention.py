"""Attention: shapes, masks, layouts and dropout as torch has them; windows, ALiBi, and all the ways of a call."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

import fastnn
import fastnn.functional as fF
from fastnn import _state
from fastnn.backends import cpu
from fastnn.backends.cpu import attention as kernels
from fastnn.ops import attention as ops

from .support import FLOATS, TORCH

HAS_TABLE = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
with_triton = pytest.mark.parametrize("kernels", ["cpu", "cuda", "triton"], indirect=True)
ours, torchs = fF.scaled_dot_product_attention, F.scaled_dot_product_attention
LOOSE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def wide(value):
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def math_attention(*args, **kwargs):
    """torch's formula, which has no limits and is right for NaN."""
    with sdpa_kernel(SDPBackend.MATH):
        return torchs(*args, **kwargs)


def compare(function, reference, args, like=None, **kwargs):
    """Result and gradients beside float64's; shape, strides and dtype beside ``like``'s."""
    dtype = args[0].dtype
    result = function(*args, **kwargs)
    wide_args, wide_kwargs = [wide(a) for a in args], {k: wide(v) for k, v in kwargs.items()}
    exact = reference(*wide_args, **wide_kwargs)
    torch.testing.assert_close(result.double(), exact.double(), rtol=LOOSE[dtype], atol=LOOSE[dtype])
    if like is not None:
        theirs = like(*args, **kwargs)
        assert (result.shape, result.stride(), result.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
        assert result.requires_grad == theirs.requires_grad
    leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.requires_grad]
    if torch.is_grad_enabled() and leaves:
        wide_leaves = [
            a for a in (*wide_args, *wide_kwargs.values()) if isinstance(a, torch.Tensor) and a.requires_grad
        ]
        direction = torch.randn_like(exact)
        found = torch.autograd.grad(result, leaves, direction.to(dtype))
        wanted = torch.autograd.grad(exact, wide_leaves, direction)
        for got, true, leaf in zip(found, wanted, leaves, strict=True):
            assert (got.shape, got.dtype) == (leaf.shape, leaf.dtype)
            loose = max(LOOSE[dtype], LOOSE[leaf.dtype])
            torch.testing.assert_close(got.double(), true, rtol=loose, atol=2 * loose * max(1, true.abs().max().item()))
    return result


def slow_to_interpret(kernels, one_of_these):
    """Leaves Triton's interpreter what is not like others."""
    if kernels == "triton" and not one_of_these:
        pytest.skip("the interpreter is slow, and others are like it")


def make(*shapes, dtype=torch.float32, grad=False):
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(grad) for shape in shapes]


SHAPES = {
    "matrices": [(5, 4), (7, 4), (7, 4)],
    "3-d": [(3, 5, 4), (3, 7, 4), (3, 7, 6)],
    "4-d": [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)],
    "5-d": [(2, 2, 3, 5, 4), (2, 2, 3, 7, 4), (2, 2, 3, 7, 4)],
    "6-d": [(1, 2, 2, 3, 5, 4), (1, 2, 2, 3, 7, 4), (1, 2, 2, 3, 7, 2)],
    "one head of keys": [(2, 6, 5, 4), (2, 1, 7, 4), (2, 1, 7, 4)],
    "one head of queries": [(2, 1, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)],
    "one head of values": [(2, 3, 5, 4), (2, 3, 7, 4), (2, 1, 7, 4)],
    "one batch of keys": [(2, 3, 5, 4), (1, 3, 7, 4), (1, 3, 7, 4)],
    "one batch of queries": [(1, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)],
    "fewer dimensions of keys": [(2, 3, 5, 4), (3, 7, 4), (7, 4)],
    "fewer dimensions of queries": [(3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)],
    "broadcast in five": [(2, 1, 3, 5, 4), (2, 3, 7, 4), (2, 2, 1, 7, 4)],
    "one of each": [(1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)],
    "long rows": [(1, 2, 5, 512), (1, 2, 7, 512), (1, 2, 7, 512)],
}


@with_triton
@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, is_causal, with_grad, kernels, no_fallback):
    slow_to_interpret(kernels, with_grad and name in ("matrices", "broadcast in five", "one of each", "long rows"))
    args = make(*SHAPES[name], grad=with_grad)
    compare(ours, torchs, args, torchs, is_causal=is_causal)


@with_triton
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["3-d", "4-d", "one head of keys"])
def test_dtypes(name, dtype, kernels, no_fallback):
    slow_to_interpret(kernels, name == "one head of keys")
    args = make(*SHAPES[name], dtype=dtype, grad=True)
    compare(ours, torchs, args, torchs)
    compare(ours, torchs, args, torchs, scale=0.7)
    compare(ours, torchs, args, torchs, scale=2)


GROUPS = {
    "4-d": [(2, 6, 5, 4), (2, 2, 7, 4), (2, 2, 7, 4)],
    "3-d": [(6, 5, 4), (2, 7, 4), (2, 7, 4)],
    "5-d": [(2, 1, 6, 5, 4), (2, 1, 3, 7, 4), (2, 1, 3, 7, 4)],
    "other heads of values": [(2, 6, 5, 4), (2, 2, 7, 4), (2, 3, 7, 4)],
    "one batch of keys": [(2, 6, 5, 4), (1, 2, 7, 4), (1, 2, 7, 4)],
    "one head": [(2, 6, 5, 4), (2, 1, 7, 4), (2, 1, 7, 4)],
    "as many": [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)],
}


@with_triton
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_grouped_queries(name, is_causal, kernels, no_fallback):
    slow_to_interpret(kernels, name == "4-d")
    args = make(*GROUPS[name], grad=True)
    compare(ours, torchs, args, torchs, is_causal=is_causal, enable_gqa=True)
    mask = torch.randn(args[0].shape[-3], 5, 7, requires_grad=True)
    compare(ours, torchs, args, torchs, attn_mask=mask, enable_gqa=True)


MASKS = [
    (2, 3, 5, 7), (1, 3, 5, 7), (2, 1, 5, 7), (2, 1, 1, 7), (2, 3, 5, 1), (1, 1, 1, 1), (3, 5, 7), (1, 5, 7), (5, 7),
    (1, 7), (5, 1), (1, 1),
]  # fmt: skip


@with_triton
@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_masks(shape, with_grad, kernels, no_fallback):
    slow_to_interpret(kernels, with_grad and shape in ((2, 1, 1, 7), (5, 1), (1, 3, 5, 7)))
    args = make(*SHAPES["4-d"], grad=with_grad)
    compare(ours, torchs, args, torchs, attn_mask=torch.rand(shape) < 0.7)
    compare(ours, torchs, args, torchs, attn_mask=torch.randn(shape))
    compare(ours, torchs, args, torchs, attn_mask=torch.randn(shape).expand(2, 3, 5, 7))
    compare(ours, torchs, args, torchs, attn_mask=torch.randn(shape, requires_grad=True))
    with torch.no_grad():
        compare(ours, torchs, args, torchs, attn_mask=torch.randn(shape, requires_grad=True))


@pytest.mark.parametrize(
    "shape", [(2, 2, 3, 5, 7), (1, 2, 1, 5, 7), (2, 1, 1, 1, 7), (1, 1, 3, 5, 7), (3, 5, 7), (5, 7)], ids=str
)
def test_masks_of_five_dimensions(shape, kernels, no_fallback):
    args = make(*SHAPES["5-d"], grad=True)
    compare(ours, torchs, args, torchs, attn_mask=torch.rand(shape) < 0.7)
    compare(ours, torchs, args, torchs, attn_mask=torch.randn(shape, requires_grad=True))


def test_masks_of_fewer_dimensions(kernels, no_fallback):
    for name, shape in (("matrices", (5, 7)), ("matrices", (1, 7)), ("3-d", (3, 5, 7)), ("3-d", (5, 1))):
        args = make(*SHAPES[name], grad=True)
        compare(ours, torchs, args, torchs, attn_mask=torch.rand(shape) < 0.7)
        compare(ours, torchs, args, torchs, attn_mask=torch.randn(shape, requires_grad=True))


@with_triton
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mask_dtype", [torch.float32, None])
def test_dtypes_of_masks(dtype, mask_dtype, kernels, no_fallback):
    args = make(*SHAPES["4-d"], dtype=dtype, grad=True)
    mask = torch.randn(3, 5, 7).to(mask_dtype or dtype).requires_grad_()
    compare(ours, torchs, args, torchs, attn_mask=mask)


@with_triton
def test_queries_that_see_nothing(kernels, no_fallback):
    args = make(*SHAPES["4-d"], grad=True)
    mask = torch.rand(2, 1, 5, 7) < 0.6
    mask[:, :, 2] = False
    for each in (mask, torch.zeros(2, 1, 5, 7).masked_fill(~mask, -math.inf)):
        assert not compare(ours, torchs, args, torchs, attn_mask=each)[:, :, 2].any()
    leaf = each.requires_grad_()
    result = ours(*args, attn_mask=leaf)
    result.sum().backward()
    assert all(x.grad.isfinite().all() for x in (*args, leaf))
    assert not leaf.grad[:, :, 2].any()
    # NaN instead of zeros is what the formula would give.
    assert not torch.isnan(result).any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("lengths", [(5, 7), (1, 300), (40, 70)], ids=str)
def test_nan_and_infinity(lengths, value, dtype, machine, no_fallback):
    """Where torch's formula has them: booleans add -infinity to an infinite score, and 0 times an infinite value is NaN. What
    causality excludes may spread, as there, or not."""
    if machine == "triton" and value == -math.inf:
        pytest.skip("the interpreter is slow, and infinity is like it")
    length, keys = lengths
    visible = torch.rand(length, keys) < 0.7
    visible[:, 0] = True
    for which in range(3):
        args = make((1, 2, length, 16), (1, 2, keys, 16), (1, 2, keys, 16), dtype=dtype)
        at = args[which].shape[2] // 2
        visible[:, at] = torch.arange(length) % 2 == 0
        args[which][0, 0, at, 3] = value
        for options in ({}, {"is_causal": True}, {"attn_mask": visible}):
            result = ours(*args, **options).double()
            exact = math_attention(*map(wide, args), **options)
            if "is_causal" in options:
                if not which:
                    continue  # infinite scores, less infinity
                result, exact = result[:, :, at:], exact[:, :, at:]
            assert torch.equal(result.isnan(), exact.isnan())
            assert torch.equal(result.isinf(), exact.isinf())
            there = exact.isfinite()
            torch.testing.assert_close(result[there], exact[there], rtol=0.02, atol=0.02)


@with_triton
def test_the_largest_numbers_are_not_infinite(kernels, no_fallback):
    """... though they are above the largest of bfloat16."""
    query, key, value = torch.ones(1, 1, 2, 16), torch.zeros(1, 1, 9, 16), torch.ones(1, 1, 9, 16)
    value[0, 0, 3, 1], value[0, 0, 5, 2] = 3.4e38, -3.4e38
    torch.testing.assert_close(ours(query, key, value), value.mean(2, keepdim=True).expand(1, 1, 2, 16))


def strided():
    """query, key, value of (2, 3, 5, 4) and (2, 3, 7, 4) in many layouts."""
    for orders in itertools.product(itertools.permutations(range(4)), ([0, 1, 2, 3], [0, 2, 1, 3])):
        tensors = []
        for shape, order in zip(SHAPES["4-d"], (orders[0], orders[1], orders[1]), strict=True):
            order = list(order)
            tensors.append(torch.randn([shape[d] for d in order]).permute([order.index(d) for d in range(4)]))
        yield tensors
    yield [x[..., ::2] for x in make((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))]
    yield [x.transpose(1, 2)[..., :4] for x in make((2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8))]
    yield [x.transpose(1, 2)[:, ::2] for x in make((2, 5, 6, 4), (2, 7, 6, 4), (2, 7, 6, 4))]
    yield torch.randn(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
    yield torch.randn(2, 5, 3, 3, 4).permute(3, 0, 2, 1, 4).unbind(0)
    yield [x.transpose(1, 2) for x in make((2, 1, 3, 4), (2, 7, 3, 4), (2, 7, 3, 4))]
    yield [x.expand(2, 3, *x.shape[2:]) for x in make((2, 1, 5, 4), (1, 3, 7, 4), (1, 1, 7, 4))]
    yield [x.transpose(1, 2) for x in make((2, 5, 1, 4), (2, 7, 1, 4), (2, 7, 1, 4))]
    yield [x.transpose(1, 2) for x in make((2, 5, 3, 1), (2, 7, 3, 1), (2, 7, 3, 1))]
    yield [x.transpose(1, 2)[..., ::8] for x in make((2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8))]
    yield [x.transpose(1, 2) for x in make((2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 6))]
    yield [torch._neg_view(x) for x in make(*SHAPES["4-d"])]


@pytest.mark.skipif(TORCH < (2, 13), reason="torch had other strides")
@pytest.mark.parametrize("with_grad", [False, True])
def test_strides_are_torchs(with_grad, no_fallback):
    for tensors in strided():
        tensors = [x.detach().requires_grad_(with_grad) for x in tensors]
        compare(ours, torchs, tensors, torchs)
        compare(ours, torchs, tensors, torchs, is_causal=True)
        meta = ours(*(x.detach().to("meta") for x in tensors))
        assert meta.is_meta
        for mask in (torch.randn(1, tensors[1].shape[2]), torch.randn(3, 1, 1)[: tensors[0].shape[1]]):
            compare(ours, torchs, tensors, torchs, attn_mask=mask)
        with_dropout = ours(*tensors, dropout_p=0.5)
        assert with_dropout.stride() == torchs(*tensors, dropout_p=0.5).stride()


def test_large_results_keep_their_layout(no_fallback):
    """Those that the caching allocator makes."""
    for order in ((0, 1, 2, 3), (0, 2, 1, 3)):
        tensors = [torch.randn(2, 8, 300, 128).permute(order).contiguous().permute(order) for _ in range(3)]
        result = compare(ours, torchs, [x.requires_grad_() for x in tensors], torchs)
        assert result.numel() * 4 > 1 << 20


@pytest.mark.parametrize("shapes", [
    [(0, 3, 5, 4), (0, 3, 7, 4), (0, 3, 7, 4)], [(2, 3, 0, 4), (2, 3, 7, 4), (2, 3, 7, 4)],
    [(2, 3, 5, 4), (2, 3, 0, 4), (2, 3, 0, 4)], [(2, 3, 5, 0), (2, 3, 7, 0), (2, 3, 7, 4)],
    [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 0)], [(2, 0, 5, 4), (2, 0, 7, 4), (2, 0, 7, 4)], [(0, 4), (7, 4), (7, 4)],
], ids=str)  # fmt: skip
@pytest.mark.parametrize("is_causal", [False, True])
def test_no_elements(shapes, is_causal, no_fallback):
    args = make(*shapes, grad=True)
    # torch 2.9's kernel divides by the number of heads.
    reference = math_attention if shapes[0][-3:-2] == (0,) else torchs
    result, theirs = ours(*args, is_causal=is_causal), reference(*args, is_causal=is_causal)
    assert (result.shape, result.requires_grad) == (theirs.shape, True)
    torch.testing.assert_close(result, theirs, equal_nan=True)
    result.sum().backward()
    assert fF.attention(*args, window=(1, 1)).shape == theirs.shape


def test_longer_rows_go_to_torch():
    _state.reset_fallbacks()
    args = make((1, 2, 5, 600), (1, 2, 7, 600), (1, 2, 7, 4), grad=True)
    compare(ours, torchs, args, torchs)
    slopes = torch.rand(2)
    for function in (ours, lambda *a: fF.attention(*a, window=(1, 2), alibi_slopes=slopes, alignment="lower_right")):
        function(*args)
    exact = reference(*(wide(a) for a in args), window=(1, 2), slopes=slopes, shift=2)
    torch.testing.assert_close(function(*args).double(), exact, rtol=1e-5, atol=1e-5)
    assert {op for op, _ in _state.fallbacks()} == {"scaled_dot_product_attention", "attention"}


# ---- dropout -----------------------------------------------------------------------------------------------------


def recovered(p, *args, **kwargs):
    """What dropout multiplied the probabilities with: those of equal scores, times unit vectors."""
    q, k, _ = args
    keys = k.shape[-2]
    out = ours(torch.zeros_like(q), k, torch.eye(keys).expand(*k.shape[:-1], keys), dropout_p=p, **kwargs)
    return out.detach() * keys


@with_triton
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout(p, kernels, no_fallback):
    slow_to_interpret(kernels, p == 0.5)
    args = make((2, 4, 33, 8), (2, 4, 40, 8), (2, 4, 40, 8), grad=True)
    torch.manual_seed(5)
    kept = recovered(p, *args)
    assert abs((kept == 0).double().mean().item() - p) < 0.02
    torch.testing.assert_close(kept[kept != 0], torch.full_like(kept[kept != 0], 1 / (1 - p)))
    torch.manual_seed(5)
    result = ours(*args, dropout_p=p)
    probabilities = (args[0] @ args[1].mT / math.sqrt(8)).softmax(-1) * kept
    exact = probabilities @ args[2]
    torch.testing.assert_close(result, exact, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(exact)
    for a, b in zip(
        torch.autograd.grad(result, args, direction), torch.autograd.grad(exact, args, direction), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_dropout_is_torchs_generators(no_fallback):
    args = make(*SHAPES["4-d"])
    torch.manual_seed(3)
    first, second = ours(*args, dropout_p=0.5), ours(*args, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(ours(*args, dropout_p=0.5), first)
    assert torch.equal(ours(*args, dropout_p=0.5), second)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    ours(*args)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(ours(*args, dropout_p=1.0), torchs(*args, dropout_p=1.0))
    # The mean of many is the result without.
    many = torch.stack([ours(*args, dropout_p=0.3) for _ in range(3000)])
    torch.testing.assert_close(many.mean(0), ours(*args), rtol=0, atol=0.1)


def test_dropout_on_the_reference_backend():
    """... drops the same."""
    args = make((2, 4, 9, 8), (2, 2, 11, 8), (2, 2, 11, 8), grad=True)
    found = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(3)
        with fastnn.backend(backend):
            result = ours(*args, dropout_p=0.4, enable_gqa=True)
            found.append((result, *torch.autograd.grad(result.square().sum(), args)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gradients_of_gradients_with_dropout():
    args = [x.requires_grad_() for x in make((1, 2, 3, 4), (1, 1, 5, 4), (1, 1, 5, 4), dtype=torch.float64)]

    def seeded(*tensors):
        torch.manual_seed(11)
        return ours(*tensors, dropout_p=0.4)

    assert torch.autograd.gradcheck(seeded, args, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(seeded, args)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_dropout_in_vmap(randomness, no_fallback):
    x = torch.randn(3, 2, 5, 4)
    q = torch.zeros(1, 2, 5, 4)

    def run(k):
        return ours(q, k, torch.eye(5).expand(1, 2, 5, 5), dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(run)(x[:, None])
    result = vmap(run, randomness=randomness)(x[:, None])
    assert torch.equal(result[0] == 0, result[1] == 0) == (randomness == "same")
    # The backward drops what the forward dropped.
    torch.manual_seed(1)
    values = torch.eye(5).expand(3, 1, 2, 5, 5)
    result = vmap(lambda v: ours(q, q, v, dropout_p=0.5), randomness=randomness)(values)
    torch.manual_seed(1)
    by_value = vmap(grad(lambda v: ours(q, q, v, dropout_p=0.5).sum()), randomness=randomness)(values)
    torch.testing.assert_close(by_value[..., 0], result.sum(-2))


# ---- windows, ALiBi ----------------------------------------------------------------------------------------------


def reference(q, k, v, mask=None, causal=False, window=(None, None), slopes=None, shift=0, scale=None):
    """The formula, by itself."""
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    p = torch.arange(q.shape[-2])[:, None] + shift
    j = torch.arange(k.shape[-2])
    if slopes is not None:
        scores = scores - slopes.double()[..., None, None] * (p - j).abs()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    hidden = torch.zeros(len(p), len(j), dtype=torch.bool)
    if causal:
        hidden |= j > p
    if window[0] is not None:
        hidden |= j < p - window[0]
    if window[1] is not None:
        hidden |= j > p + window[1]
    nothing = (scores.masked_fill(hidden, -math.inf) == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(hidden & ~nothing, -math.inf)
    return torch.where(nothing, 0, scores.where(~nothing, 0).softmax(-1)) @ v


@with_triton
@pytest.mark.parametrize("alignment", ["upper_left", "lower_right"])
@pytest.mark.parametrize("lengths", [(9, 9), (4, 11), (11, 4), (1, 9)], ids=str)
def test_windows(lengths, alignment, kernels, no_fallback):
    slow_to_interpret(kernels, lengths in ((4, 11), (11, 4)) and alignment == "lower_right")
    length, keys = lengths
    args = make((2, 4, length, 8), (2, 4, keys, 8), (2, 4, keys, 8), grad=True)
    shift = keys - length if alignment == "lower_right" else 0
    mask = torch.rand(2, 1, 1, keys) < 0.8
    cases = list(
        itertools.product(
            (False, True), (None, (2, 1), (0, 0), (None, 2), (3, None), (None, None), (5, -1), (-2, 4), [100, 100])
        )
    )
    for number, (causal, window) in enumerate(cases[1::4] if kernels == "triton" else cases):
        options = dict(causal=causal, window=window or (None, None), shift=shift)
        masks = (None, mask)
        # Emulated and interpreted: with a mask or without one by turns, which alignments and lengths begin differently.
        if kernels != "cpu":
            masks = masks[(number + (alignment == "upper_left") + (length > keys)) % 2 :][:1]
        for attn_mask in masks:
            compare(
                lambda *a, m=attn_mask, c=causal, w=window: fF.attention(
                    *a, attn_mask=m, is_causal=c, window=w, alignment=alignment
                ),
                lambda *a, o=options, m=attn_mask: reference(*a, mask=m, **o),
                args,
            )


@with_triton
@pytest.mark.parametrize("alignment", ["upper_left", "lower_right"])
@pytest.mark.parametrize("slopes", [(4,), (2, 4)], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_alibi(slopes, alignment, kv_heads, kernels, no_fallback):
    slow_to_interpret(kernels, slopes == (2, 4) and alignment == "lower_right" and kv_heads == 2)
    args = make((2, 4, 5, 8), (2, kv_heads, 9, 8), (2, kv_heads, 9, 8), grad=True)
    shift = 4 if alignment == "lower_right" else 0
    repeat = lambda q, k, v: (q, *(x.repeat_interleave(4 // kv_heads, 1) for x in (k, v)))  # noqa: E731
    mask = torch.randn(5, 9, requires_grad=True)
    kinds = ((torch.float32, False), (torch.float64, False), (torch.float32, True))
    for dtype, learned in kinds[:1] if kernels == "triton" else kinds:
        bias = torch.rand(slopes, dtype=dtype, requires_grad=learned)
        for causal in (False, True):
            compare(
                lambda q, k, v, s, m, c=causal: fF.attention(
                    q, k, v, m, is_causal=c, alibi_slopes=s, alignment=alignment, enable_gqa=True
                ),
                lambda q, k, v, s, m, c=causal: reference(*repeat(q, k, v), m, c, slopes=s, shift=shift),
                (*args, bias, mask),
            )
        hidden = torch.rand(2, 1, 5, 9) < 0.8
        compare(
            lambda q, k, v, s, hidden=hidden: fF.attention(
                q, k, v, hidden, alibi_slopes=s, window=(3, 3), alignment=alignment, enable_gqa=True
            ),
            lambda q, k, v, s, hidden=hidden: reference(*repeat(q, k, v), hidden, window=(3, 3), slopes=s, shift=shift),
            (*args, bias),
        )


def test_a_cache_of_keys(no_fallback):
    """Decoding one by one gives the rows of the whole."""
    q, k, v = make((2, 4, 12, 8), (2, 2, 12, 8), (2, 2, 12, 8))
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    options = dict(is_causal=True, enable_gqa=True, alignment="lower_right", window=(6, 0), alibi_slopes=slopes)
    whole = fF.attention(q, k, v, **options)
    for i in range(12):
        step = fF.attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], **options)
        torch.testing.assert_close(step[:, :, 0], whole[:, :, i], rtol=1e-5, atol=1e-6)


def test_attention_is_torchs_without_options(no_fallback):
    args = make(*SHAPES["4-d"], grad=True)
    compare(fF.attention, torchs, args, torchs)
    compare(fF.attention, torchs, args, torchs, is_causal=True)
    compare(fF.attention, torchs, args, torchs, attn_mask=torch.randn(5, 7), scale=0.3)


# ---- bad input ---------------------------------------------------------------------------------------------------

Q, K, V = (torch.randn(2, 4, n, 8) for n in (5, 7, 7))
BAD = {
    "no tensor": (([1.0], K, V), {}),
    "mask no tensor": ((Q, K, V, [1.0]), {}),
    "a vector": ((Q[0, 0, 0], K, V), {}),
    "head sizes": ((Q, K[..., :4], V), {}),
    "heads": ((Q, K[:, :3], V[:, :3]), {}),
    "batches": ((Q, K.repeat(2, 1, 1, 1)[:3], V), {}),
    "gqa heads": ((Q, K[:, :3], V[:, :3]), {"enable_gqa": True}),
    "gqa heads of values": ((Q, K, V[:, :3]), {"enable_gqa": True}),
    "gqa of matrices": ((Q[0, 0], K[0, 0], V[0, 0]), {"enable_gqa": True}),
    "mask keys": ((Q, K, V, torch.ones(5, 6)), {}),
    "mask queries": ((Q, K, V, torch.ones(4, 7) > 0), {}),
    "mask heads": ((Q, K, V, torch.ones(2, 3, 5, 7)), {}),
    "mask batches": ((Q, K, V, torch.ones(3, 1, 5, 7)), {}),
    "mask of five dimensions": ((Q, K, V, torch.ones(2, 1, 1, 5, 7)), {}),
    "mask vector": ((Q, K, V, torch.ones(7)), {}),
    "mask number": ((Q, K, V, torch.ones(())), {}),
    "mask integers": ((Q, K, V, torch.ones(5, 7).int()), {}),
    "mask float64": ((Q, K, V, torch.ones(5, 7).double()), {}),
    "mask float16": ((Q.bfloat16(), K.bfloat16(), V.bfloat16(), torch.ones(5, 7).half()), {}),
    "mask and causal": ((Q, K, V, torch.ones(5, 7, requires_grad=True), 0.0, True), {}),
    "mask and causal and dropout": ((Q, K, V, torch.ones(5, 7), 0.5, True), {}),
    "dtypes": ((Q, K.double(), V), {}),
    "integers": ((Q.int(), K.int(), V.int()), {}),
    "booleans": ((Q > 0, K > 0, V > 0), {}),
    "devices": ((Q, K.to("meta"), V), {}),
    "dropout below 0": ((Q, K, V, None, -0.5), {}),
    "dropout above 1": ((Q, K, V, None, 1.5), {}),
    "dropout None": ((Q, K, V, None, None), {}),
    "dropout text": ((Q, K, V, None, "0.5"), {}),
    "causal number": ((Q, K, V, None, 0.0, 1), {}),
    "scale text": ((Q, K, V), {"scale": "1"}),
    "gqa number": ((Q, K, V), {"enable_gqa": 1}),
    "scale as a position": ((Q, K, V, None, 0.0, False, 1.0), {}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    """torch's exception types."""
    args, kwargs = BAD[name]
    with pytest.raises(Exception) as theirs:
        torchs(*args, **kwargs)
    with pytest.raises(theirs.type):
        ours(*args, **kwargs)
    if len(args) < 7:
        with pytest.raises(theirs.type) as error:
            ours(*args, **kwargs)
        assert "fastnn.scaled_dot_product_attention" in str(error.value)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_values_that_are_fewer_than_keys(backend):
    """torch's kernel would read past their end; its formula raises."""
    for v in (V[:, :, :6], torch.randn(2, 4, 8, 8)):
        with sdpa_kernel(backend), pytest.raises(RuntimeError, match="value: expected as many as there are keys"):
            ours(Q, K, v)


def test_messages_name_the_argument():
    for args, kwargs, text in (
        ((Q, K[..., :4], V), {}, "key: expected rows as long as"),
        ((Q, K[:, :3], V[:, :3]), {"enable_gqa": True}, "key: expected heads that divide the 4 of query, got 3"),
        ((Q, K, V, torch.ones(5, 6)), {}, "attn_mask: expected what broadcasts to"),
        (
            (Q, K, V, torch.ones(5, 7, requires_grad=True), 0.0, True),
            {},
            "is_causal: expected False beside an attn_mask",
        ),
        ((Q, K, V, None, 1.5), {}, "dropout_p: expected a probability"),
    ):
        with pytest.raises(RuntimeError, match=text):
            ours(*args, **kwargs)


def test_a_mask_beside_is_causal_is_what_torch_makes_of_it():
    mask = torch.randn(5, 7)
    torch.testing.assert_close(ours(Q, K, V, mask, is_causal=True), torchs(Q, K, V, mask, is_causal=True))
    assert any("is_causal" in reason for _, reason in _state.fallbacks())


def test_bad_options():
    for window in (3, (1,), (1, 2, 3), (1.5, 2), ("a", 1), (True, 1)):
        with pytest.raises(ValueError, match="window"):
            fF.attention(Q, K, V, window=window)
    with pytest.raises(ValueError, match="alignment"):
        fF.attention(Q, K, V, alignment="left")
    with pytest.raises(TypeError, match="alibi_slopes"):
        fF.attention(Q, K, V, alibi_slopes=[1.0] * 4)
    for slopes in (
        torch.ones(3),
        torch.ones(2, 3),
        torch.ones(3, 4),
        torch.ones(4).int(),
        torch.ones(4, device="meta"),
    ):
        with pytest.raises(RuntimeError, match="alibi_slopes"):
            fF.attention(Q, K, V, alibi_slopes=slopes)
    for bad in (((Q, K[..., :4], V), RuntimeError), (([1.0], K, V), TypeError), ((Q[0, 0, 0], K, V), RuntimeError)):
        with pytest.raises(bad[1]):
            fF.attention(*bad[0], window=(1, 1))


def test_tensors_that_answer_themselves_go_to_torch():
    _state.reset_fallbacks()
    bias = causal_lower_right(5, 7)
    torch.testing.assert_close(ours(Q, K, V, bias), torchs(Q, K, V, bias))
    assert _state.fallbacks()


# ---- all the ways of a call --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, no_fallback):
    args = make(*SHAPES["4-d"], grad=True)
    mask = torch.randn(5, 7, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        for kwargs in ({}, {"attn_mask": mask}, {"attn_mask": mask > 0}, {"is_causal": True}):
            result, theirs = ours(*args, **kwargs), torchs(*args, **kwargs)
            assert (result.dtype, result.stride()) == (theirs.dtype, theirs.stride())
            torch.testing.assert_close(result, theirs, rtol=2e-2, atol=2e-2)
            leaves = [*args, *(x for x in kwargs.values() if x is mask)]
            for a, b in zip(
                torch.autograd.grad(result.float().square().sum(), leaves),
                torch.autograd.grad(theirs.float().square().sum(), leaves),
                strict=True,
            ):
                assert a.dtype is torch.float32
                torch.testing.assert_close(a, b, rtol=5e-2, atol=8e-2)
        assert ours(args[0].to(dtype), *args[1:]).dtype is dtype
        assert ours(*(x.double() for x in args)).dtype is torch.float64
        with pytest.raises(RuntimeError):
            ours(*args, attn_mask=mask.double())
        torch._dynamo.reset()  # Dynamo before torch 2.7 takes the code of another autocast's dtype again
        compiled = torch.compile(lambda *a: ours(*a), backend="aot_eager", fullgraph=True)(*args)
        assert compiled.dtype is dtype


def network(f):
    def run(q, k, v, m):
        x = f.scaled_dot_product_attention(q, k, v, m, scale=0.5)
        x = f.scaled_dot_product_attention(x.transpose(1, 2).contiguous().transpose(1, 2), k, v, is_causal=True)
        return (
            f.scaled_dot_product_attention(x, k[:, :2], v[:, :2], m > 0, enable_gqa=True).square().mean() + x.sum() / 9
        )

    return run


def arguments(n=2, length=5, keys=7, grad=True):
    return (
        *make((n, 4, length, 8), (n, 4, keys, 8), (n, 4, keys, 8), grad=grad),
        torch.randn(length, keys, requires_grad=grad),
    )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("with_grad", [False, True], ids=["inference", "training"])
def test_compile(dynamic, with_grad, no_fallback):
    torch._dynamo.reset()
    graphs, found = [], []

    def count(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(network(fF), fullgraph=True, dynamic=dynamic, backend=count)
    for sizes in ((5, 6, 9), (3, 10, 11)) if dynamic else ((5, 6, 9),):
        args = arguments(*sizes)
        with torch.set_grad_enabled(with_grad):
            result, expected = compiled(*args), network(F)(*args)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
        if with_grad:
            for a, b in zip(torch.autograd.grad(result, args), torch.autograd.grad(expected, args), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        found.append(len(graphs))
        # Dynamo begins again where it finds that the scale is a number.
        assert found[0] == len(graphs)
    assert "fastnn.attention" in {str(n.target) for n in graphs[-1].graph.nodes}


def test_compile_with_inductor_and_options(no_fallback):
    torch._dynamo.reset()
    slopes = torch.rand(4)

    def run(q, k, v, m):
        x = fF.attention(q, k, v, m, window=(2, 1), alibi_slopes=slopes, alignment="lower_right")
        return fF.scaled_dot_product_attention(x, k, v, dropout_p=0.3).sum() * 0 + x.square().sum()

    args = arguments()
    result, expected = torch.compile(run, fullgraph=True)(*args), run(*args)
    torch.testing.assert_close(result, expected)
    for a, b in zip(torch.autograd.grad(result, args), torch.autograd.grad(expected, args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_export(no_fallback):
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return fF.scaled_dot_product_attention(q, k, v, is_causal=True)

    shapes = {name: {0: torch.export.Dim("batch", min=2), 2: torch.export.Dim("length", min=3)} for name in "qkv"}
    args = make((3, 2, 5, 4), (3, 2, 5, 4), (3, 2, 5, 4))
    program = torch.export.export(Model(), tuple(args), dynamic_shapes=shapes)
    assert "fastnn.attention" in str(program.graph)
    args = make((4, 2, 9, 4), (4, 2, 9, 4), (4, 2, 9, 4))
    torch.testing.assert_close(program.module()(*args), torchs(*args, is_causal=True))


def test_func(no_fallback):
    args = arguments(grad=False)
    numbers = (0, 1, 2, 3)
    for a, b in zip(grad(network(fF), numbers)(*args), grad(network(math_functions), numbers)(*args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    tangents = tuple(torch.randn_like(x) for x in args)
    for a, b in zip(jvp(network(fF), args, tangents), jvp(network(math_functions), args, tangents), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class math_functions:
    scaled_dot_product_attention = staticmethod(math_attention)


@pytest.mark.parametrize("dims", list(itertools.product((0, None), (1, None), (0, None), (-1, None)))[:-1], ids=str)
def test_vmap(dims, no_fallback):
    """Mapped over, and not, each; results and per-sample gradients."""
    q, k, v, m = (torch.randn(s) for s in ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), (5, 7)))
    q, k, v, m = (
        x if d is None else torch.stack([x + 0.1 * i * torch.randn_like(x) for i in range(3)], d)
        for x, d in zip((q, k, v, m), dims, strict=True)
    )

    def run(q, k, v, m):
        return ours(q, k, v, m, enable_gqa=True), fF.attention(q, k, v, enable_gqa=True, window=(2, 2))

    def each(f):
        found = [
            f(*(x if d is None else x.select(d, i) for x, d in zip((q, k, v, m), dims, strict=True))) for i in range(3)
        ]
        return [torch.stack(x) for x in zip(*found, strict=True)]

    for a, b in zip(vmap(run, dims)(q, k, v, m), each(run), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    loss = lambda *a: sum(x.square().sum() for x in run(*a))  # noqa: E731
    gradients = grad(loss, (0, 1, 2, 3))
    for a, b in zip(vmap(gradients, dims)(q, k, v, m), each(gradients), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_jacobians(no_fallback):
    args = [torch.randn(s, dtype=torch.float64) for s in ((1, 2, 3, 4), (1, 1, 5, 4), (1, 1, 5, 4), (3, 5))]
    numbers = (0, 1, 2, 3)

    def repeat(q, k, v, m):
        return math_attention(q, k, v, m, enable_gqa=True)

    for a, b in zip(
        jacrev(lambda *t: ours(*t, enable_gqa=True), numbers)(*args), jacrev(repeat, numbers)(*args), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_only_the_gradients_asked_for(no_fallback):
    for needs in itertools.product((False, True), repeat=4):
        args = make((2, 2, 5, 4), (2, 2, 7, 4), (2, 2, 7, 4), (5, 7))
        args = [x.requires_grad_(n) for x, n in zip(args, needs, strict=True)]
        result = ours(*args)
        assert result.requires_grad == any(needs)
        if any(needs):
            result.sum().backward()
        assert tuple(x.grad is not None for x in args) == needs


def test_a_saved_tensor_changed_in_place_is_noticed(no_fallback):
    args = make(*SHAPES["4-d"], grad=True)
    for change in (0, 2, None):
        result = ours(*args)
        with torch.no_grad():
            (result if change is None else args[change]).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.sum().backward()


@with_triton
def test_gradients_arrive_in_any_layout(kernels, no_fallback):
    for direction in (
        torch.ones(()).expand(2, 3, 5, 4),
        torch.randn(2, 5, 3, 4).transpose(1, 2),
        torch.randn(2, 3, 4, 5).mT,
        torch.randn(2, 3, 5, 9)[..., 1::2],
        torch.randn(1, 1, 5, 1).expand(2, 3, 5, 4),
    ):
        args = make(*SHAPES["4-d"], grad=True)
        wides = [wide(x) for x in args]
        kept = direction.clone()
        found = torch.autograd.grad(ours(*args), args, direction)
        assert torch.equal(direction, kept)
        for a, b in zip(found, torch.autograd.grad(torchs(*wides), wides, direction.double()), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_backward_through_a_large_network_keeps_no_matrix_of_scores(no_fallback):
    """What is saved grows with the length, not with its square."""
    saved = []
    q, k, v = make((1, 2, 600, 8), (1, 2, 700, 8), (1, 2, 700, 8), grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        ours(q, k, v)
    assert sum(saved) < 10 * 2 * 700 * 8


def test_inference_mode_and_no_grad(no_fallback):
    args = make(*SHAPES["4-d"], grad=True)
    with torch.no_grad():
        assert ours(*args).grad_fn is None
    with torch.inference_mode():
        result = ours(*args)
        assert result.is_inference()
        torch.testing.assert_close(result, torchs(*args))


def test_one_graph_from_many_threads(no_fallback):
    from concurrent.futures import ThreadPoolExecutor

    args = make((2, 4, 65, 16), (2, 4, 70, 16), (2, 4, 70, 16), grad=True)

    def work(_):
        result = ours(*args)
        return (result.detach(), *torch.autograd.grad(result.sum(), args))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(8)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(1, 300), (65, 70), (130, 300)], ids=str)
def test_batch_invariant(lengths, dtype, no_fallback):
    """A sequence's bits do not depend on the others in its batch."""
    length, keys = lengths
    tensors = make((5, 4, length, 32), (5, 2, keys, 32), (5, 2, keys, 32), (5, 4, length, 32), dtype=dtype)

    def run(part):
        *args, direction = (x[part].clone() for x in tensors)
        args = [x.requires_grad_() for x in args]
        result = ours(*args, enable_gqa=True)
        return (result, *torch.autograd.grad(result, args, direction))

    with fastnn.batch_invariant():
        for whole, alone in zip(run(slice(None)), run(slice(2, 3)), strict=True):
            assert torch.equal(whole[2:3], alone)


def test_the_short_way_gives_what_the_long_one_gives(no_fallback):
    """... which a mask of three dimensions takes: result, layout and gradients."""
    for dtype in (torch.float32, torch.float64):
        q, k, v = (x.transpose(1, 2) for x in make((2, 9, 4, 8), (2, 11, 4, 8), (2, 11, 4, 8), dtype=dtype))
        mask = torch.randn(4, 9, 11, dtype=dtype)
        found = []
        for shape in ((1, 4, 9, 11), (4, 9, 11)):
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            result = ours(*leaves, attn_mask=mask.view(shape), scale=0.3)
            found.append((result, *torch.autograd.grad(result.square().sum(), leaves)))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(not HAS_TABLE, reason="torch before 2.10 has no table")
def test_the_short_way_of_the_backward(monkeypatch, no_fallback):
    calls = []
    kernel = kernels.attention_backward
    monkeypatch.setattr(kernels, "attention_backward", lambda *args: calls.append(1) or kernel(*args))
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for heads, kv_heads, value_size in ((4, 4, 8), (4, 2, 8), (3, 1, 5)):
            q, k = torch.randn(2, 9, heads, 8, dtype=dtype), torch.randn(2, 11, kv_heads, 8, dtype=dtype)
            v = torch.randn(2, 11, kv_heads, value_size, dtype=dtype)
            views = tuple(x.transpose(1, 2) for x in (q, k, v))
            for tensors in (views, tuple(x.contiguous() for x in views), tuple(x[..., ::2] for x in views)):
                masks = (None, torch.rand(2, 1, 9, 11) > 0.3, torch.randn(9, 11))
                for mask, is_causal in (*((m, False) for m in masks), (None, True)):
                    leaves = [x.detach().requires_grad_() for x in tensors]
                    options = dict(attn_mask=mask, is_causal=is_causal, enable_gqa=True)
                    result = ours(*leaves, **options)
                    for direction in (
                        torch.randn(result.shape, dtype=dtype),
                        torch.ones((), dtype=dtype).expand_as(result),
                    ):
                        found = torch.autograd.grad(result, leaves, direction, retain_graph=True)
                        assert not calls
                        with monkeypatch.context() as patched:
                            patched.setattr(ops, "_tensor_attention_backward", lambda *_: None)
                            expected = torch.autograd.grad(result, leaves, direction, retain_graph=True)
                        assert calls.pop() == 1
                        for one, other in zip(found, expected, strict=True):
                            assert torch.equal(one, other)
                            assert one.stride() == other.stride()


@pytest.mark.skipif(not HAS_TABLE, reason="torch before 2.10 has no table")
def test_what_the_short_way_of_the_backward_takes():
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 11, 8), torch.randn(2, 2, 11, 6)
    out, log_sum = kernels.attention(q, k, v, None, None, 0.3, None, None, 0, 0.0, None, False)
    good = dict(grad=out, query=q, key=k, value=v, mask=None, out=out, log_sum=log_sum, scale=0.3, causal=False)

    def gradients(**changed):
        with torch.no_grad():
            return cpu.tensor_attention_backward(cpu.empty_like, *{**good, **changed}.values())

    assert [x.shape for x in gradients()] == [q.shape, k.shape, v.shape]
    assert cpu.tensor_attention_backward(cpu.empty_like, *good.values()) is None  # where gradients are on
    bad = [
        {name: value} for name in ("grad", "query", "key", "value", "out", "log_sum") for value in (None, 1.0, q[:0])
    ]
    bad += [{name: good[name].double()} for name in ("grad", "query", "key", "value", "out", "log_sum")]
    bad += [{name: good[name][:1]} for name in ("grad", "query", "key", "value", "out", "log_sum")]
    bad += [{name: good[name][..., :-1]} for name in ("grad", "query", "key", "out", "log_sum")]
    bad += [dict(key=k[:, :1]), dict(value=v[:, :, :-1]), dict(key=k.repeat(1, 2, 1, 1)[:, :3], value=v[:, [0, 1, 1]])]
    bad += [dict(scale=1), dict(causal=None), dict(mask=torch.randn(9, 10)), dict(mask=torch.randn(3, 9, 11))]
    bad += [dict(log_sum=log_sum.transpose(0, 1).contiguous().transpose(0, 1)), dict(grad=torch._neg_view(out))]
    for changed in bad:
        assert gradients(**changed) is None, changed
    with fastnn.batch_invariant():
        assert gradients() is None
