"""Attention of few queries on GPUs: how the keys are split over blocks and warps, and how their sums come together."""

import importlib
import math

import pytest
import torch

import fastnn
import fastnn.functional as fF
from fastnn.backends.reference import attention as formulas

LOOSE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
dtypes = pytest.mark.parametrize("dtype", LOOSE, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(params=["cuda", "triton"])
def kernels(request):
    """The module that calls them."""
    request.getfixturevalue(f"on_{request.param}")
    return importlib.import_module(f"fastnn.backends.{request.param}.attention")


def wide(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def cache_of(keys, *shape, dtype):
    """Of a longer cache, which is NaN behind its end."""
    memory = torch.full((*shape[:2], keys + 9, shape[2]), math.nan, dtype=dtype)
    view = memory[:, :, :keys]
    return view.copy_(torch.randn(view.shape))


def check(kernels, heads, kv_heads, length, keys, size, value_size, dtype, *, batch=1, **options):
    """Result and log sum exp beside float64's, and the gradients that come of them."""
    o = dict(mask=None, slopes=None, scale=size**-0.5, low=None, high=None, shift=0, dropout=0.0, seed=None) | options
    query = torch.randn(batch, heads, length, size).to(dtype)
    key, value = (cache_of(keys, batch, kv_heads, n, dtype=dtype) for n in (size, value_size))
    out, log_sum = kernels.attention(query, key, value, *o.values(), False)
    wides = [wide(x) for x in (query, key, value)]
    exact, exact_sum = formulas.attention(*wides, *map(wide, o.values()), False)
    torch.testing.assert_close(log_sum.double(), exact_sum, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), exact, rtol=LOOSE[dtype], atol=LOOSE[dtype])
    beside, rest = list(o.values())[:2], list(o.values())[2:]
    grad = torch.randn_like(out)
    found = kernels.attention_backward(grad, query, key, value, *beside, out, log_sum, *rest, False)
    wanted = formulas.attention_backward(wide(grad), *wides, *map(wide, beside), None, None, *rest, False)
    for ours, true in zip(found[:3], wanted[:3], strict=True):
        loose = 2 * LOOSE[dtype] * max(1, true.abs().max().item())
        torch.testing.assert_close(ours.double(), true, rtol=loose, atol=loose)
    return out


@dtypes
@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "keys", "size", "value_size"),
    [
        (4, 1, 1, 149, 64, 64),  # the last split ends within a warp's 16 keys
        (8, 2, 1, 64, 128, 128),  # one split
        (6, 2, 5, 65, 40, 72),  # 15 rows; one key in the last split
        (4, 2, 16, 131, 33, 7),  # two tiles of rows, which are read by elements
        (3, 3, 2, 17, 128, 100),
    ],
    ids=str,
)
def test_splits(heads, kv_heads, length, keys, size, value_size, dtype, kernels):
    check(kernels, heads, kv_heads, length, keys, size, value_size, dtype)


def test_long_rows(kernels):
    check(kernels, 2, 1, 1, 70, 256, 200, torch.bfloat16)


@dtypes
@pytest.mark.parametrize(
    ("length", "low", "high"),
    [
        (1, None, 129),  # causal, as in a cache: all are seen
        (4, 57, 126),  # a window that begins and ends where no split does
        (7, None, 0),  # causal from the upper left
        (5, -1, 2),
        (3, 200, None),  # nothing is seen
        (16, 114, None),  # the last queries see nothing
    ],
    ids=str,
)
def test_bounds(length, low, high, dtype, kernels):
    slopes = torch.rand(1, 4) / 10 if length in (4, 7) else None
    check(kernels, 4, 2, length, 130, 64, 64, dtype, low=low, high=high, slopes=slopes, shift=130 - length)


@dtypes
def test_masks_that_hide_whole_splits(dtype, kernels):
    """... and all of a query's keys: its result is 0."""
    seen = torch.rand(2, 1, 3, 260) < 0.8
    seen[0, :, :, 64:192] = False
    seen[1, :, :, :64] = False
    seen[1, :, 1] = False
    assert not check(kernels, 4, 2, 3, 260, 64, 64, dtype, batch=2, mask=seen)[1, :, 1].any()
    bias = torch.randn(1, 4, 3, 260).masked_fill(~seen[1:], -math.inf)
    check(kernels, 4, 2, 3, 260, 64, 64, dtype, mask=bias, slopes=torch.rand(1, 4) / 10, shift=257)


def test_the_largest_score_in_any_split(kernels):
    """Scores beyond exp's range, in each split others."""
    for at in (3, 70, 140):
        query, key, value = torch.ones(1, 2, 1, 64), torch.randn(1, 1, 150, 64), torch.randn(1, 1, 150, 64)
        key[0, 0, at] = 100
        out = fF.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        torch.testing.assert_close(out, value[:, :, at : at + 1].expand(1, 2, 1, 64))


def test_infinities_of_a_split(kernels):
    """One that is hidden altogether counts for nothing, whatever its values are."""
    query, key, value = torch.randn(1, 2, 1, 64), torch.randn(1, 1, 150, 64), torch.randn(1, 1, 150, 64)
    seen = torch.ones(1, 150, dtype=torch.bool)
    seen[:, 64:128] = False
    clean = fF.scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)
    value[0, 0, 64:128] = math.inf
    assert torch.equal(fF.scaled_dot_product_attention(query, key, value, seen, enable_gqa=True), clean)


def test_the_same_bits_again_and_in_any_batch(kernels, request):
    query, key, value = torch.randn(3, 4, 2, 32), torch.randn(3, 2, 200, 32), torch.randn(3, 2, 200, 32)
    found = []
    for seed in (0, 5):
        if "cuda" in kernels.__name__:
            request.getfixturevalue("on_cuda").set_seed(seed)
        found.append(fF.scaled_dot_product_attention(query, key, value, enable_gqa=True))
    assert torch.equal(*found)
    with fastnn.batch_invariant():
        all_of_them = fF.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        alone = fF.scaled_dot_product_attention(*(x[1:2].contiguous() for x in (query, key, value)), enable_gqa=True)
    assert torch.equal(all_of_them[1:2], alone)


def test_how_many_splits_there_are(on_cuda):
    """Enough for two blocks a multiprocessor, and none more where batches fill them."""
    from fastnn.backends import _attention
    from fastnn.backends.cuda import module

    def splits(batch, heads, kv_heads, length, keys, invariant=False, bounds=(None, None)):
        shape = (batch, heads, kv_heads, length, keys, 128, 128)
        floats = module().attention_workspace(2, shape, bounds, invariant)
        return max(floats // (batch * heads * length * 130), 1)

    assert splits(1, 32, 8, 1, 4096) * 8 > 132
    assert splits(1, 32, 8, 1, 100_000) * 8 > 132
    assert splits(1, 32, 8, 1, 100_000, bounds=(96_000, None)) * 8 > 132
    assert splits(300, 32, 8, 1, 4096) == 1
    assert splits(300, 32, 8, 1, 4096, invariant=True) == splits(1, 32, 8, 1, 4096)
    assert splits(1, 32, 8, 17, 4096) == 1  # another kernel's
    with pytest.raises(ValueError, match="workspace"):
        x = torch.randn(1, 1, 1, 64)
        k = torch.randn(1, 1, 300, 64)
        _attention.forward(
            module().attention, x, x, k, k, None, None, 1.0, None, None, 0, 0.0, None, None,
            workspace=0, batch_invariant=False, device=0, stream=0,
        )  # fmt: skip
