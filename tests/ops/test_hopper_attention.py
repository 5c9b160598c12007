"""The forward of attention on sm_90a, with the CPU as the device: the copy engine and wgmma. What its kernel does not have
is the other kernels', whose tests are those of the op."""

import contextlib
import itertools

import pytest
import torch

import fastnn
import fastnn.functional as fF
from fastnn.backends.cuda import attention as backend

from .support import UNIT

HALVES = (torch.bfloat16, torch.float16)
#: Of queries and keys: tiles of 128, of which a warpgroup has 64, one less and one more.
LENGTHS = (1, 63, 64, 65, 127, 128, 129, 200)


@contextlib.contextmanager
def by_warpgroups(module, expected=True):
    """Fails unless the kernel of sm_90a ran, or unless it did not."""
    before = module.attentions_on_hopper()
    yield
    assert (module.attentions_on_hopper() > before) == expected


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(shape).to(dtype)


def check(query, key, value, high=None, scale=0.125, **options):
    """The result and the log-sum-exp of the backend's kernel, where query i sees keys up to i + high: against float64."""
    like_query = query.shape[3] == value.shape[3]
    result, log_sum = backend.attention(query, key, value, None, None, scale, None, high, 0, 0.0, None, like_query)
    q, k, v = (x.double() for x in (query, key, value))
    k, v = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    if high is not None:
        seen = torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None] + high
        scores = scores.masked_fill(~seen, -torch.inf)
    weights = torch.softmax(scores, 3).nan_to_num(0)  # of a query that sees nothing, as torch has it
    exact, magnitude = weights @ v, weights @ v.abs()
    # Weights and results are rounded once each.
    assert ((result.double() - exact).abs() <= 2.1 * UNIT[query.dtype] * magnitude + 1e-7).all()
    expected = torch.logsumexp(scores, 3)
    expected[expected == -torch.inf] = torch.inf
    torch.testing.assert_close(log_sum.double(), expected, rtol=1e-5, atol=1e-5)
    return result


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("high", [None, 0])
def test_edges_of_tiles(hopper, high, dtype):
    # Up to 16 queries are another kernel's.
    for i, (queries, keys) in enumerate(itertools.product((17, *LENGTHS[1:]), LENGTHS)):
        size = (64, 128)[(i + i // len(LENGTHS)) % 2]
        query, key, value = (normal(1, h, n, size, dtype=dtype) for h, n in ((2, queries), (1, keys), (1, keys)))
        with by_warpgroups(hopper):
            check(query, key, value, high)


@pytest.mark.parametrize("high", [-150, -64, -3, 5, 100])
def test_causal_from_elsewhere(hopper, high):
    """Rows that see nothing, warpgroups and whole tiles of them among these; and those that see more than those before."""
    with by_warpgroups(hopper):
        result = check(*(normal(1, 1, n, 64) for n in (260, 200, 200)), high)
    assert (result[:, :, : max(-high, 0)] == 0).all()


@pytest.mark.parametrize("sizes", [(40, 40), (64, 128), (128, 64), (72, 104)], ids=str)
def test_sizes_in_between(hopper, sizes):
    with by_warpgroups(hopper):
        check(normal(1, 2, 70, sizes[0]), normal(1, 2, 130, sizes[0]), normal(1, 2, 130, sizes[1]), 0)


def inside(batch, length, heads, size):
    """A tensor (batch, heads, length, size) as linear layers leave it, in between NaNs."""
    around = torch.full((batch + 1, length + 2, heads + 1, size + 8), torch.nan, dtype=torch.bfloat16)
    view = around[1:, 1:-1, :-1, 8:].copy_(torch.randn(batch, length, heads, size))
    return view.transpose(1, 2)


@pytest.mark.parametrize("high", [None, 0])
def test_what_surrounds_the_heads_is_not_read(hopper, high):
    """More tiles than there are blocks, so that those go on to the next one; of 3 batches, 4 and 2 heads."""
    query, key, value = inside(3, 131, 4, 64), inside(3, 150, 2, 64), inside(3, 150, 2, 64)
    with by_warpgroups(hopper):
        result = check(query, key, value, high)
    assert result.stride(3) == 1


def test_repeated_operands(hopper):
    query = normal(2, 4, 70, 128)
    key, value = normal(2, 1, 90, 128).expand(2, 4, 90, 128), normal(1, 1, 90, 128).expand(2, 4, 90, 128)
    with by_warpgroups(hopper):
        check(query, key, value)


def test_heads_that_l2_has_no_room_for_together(hopper):
    """Each has 34 MB of keys and values; which of them are at work at a time must not change who has what."""
    query, key, value = normal(1, 3, 130, 64), *(torch.zeros(1, 3, 140000, 64).bfloat16() for _ in range(2))
    key[:, :, :130], value[:, :, :130] = normal(1, 3, 130, 64), normal(1, 3, 130, 64)
    with by_warpgroups(hopper):
        result, _ = backend.attention(query, key, value, None, None, 0.125, None, 0, 0, 0.0, None, True)
    with by_warpgroups(hopper):
        assert torch.equal(result, check(query, key[:, :, :130].clone(), value[:, :, :130].clone(), 0))


@pytest.mark.parametrize("scale", [1e-6, 3.0])
def test_scales(hopper, scale):
    with by_warpgroups(hopper):
        check(*(normal(1, 2, n, 64, dtype=torch.float16) for n in (70, 130, 130)), None, scale)


def test_the_rest_is_the_other_kernels(hopper, no_fallback):
    query, key, value = (normal(1, 2, n, 64) for n in (40, 70, 70))
    odd = normal(1, 2, 70, 68)[..., :64]  # rows that begin at multiples of 8 bytes
    short = [x[..., :32] for x in (query, key, value)]
    attend = fF.scaled_dot_product_attention
    calls = [
        lambda q, k, v: attend(q, k, v, attn_mask=torch.ones(40, 70, dtype=torch.bool)),
        lambda q, k, v: attend(q, k, v, dropout_p=1e-9),
        lambda q, k, v: attend(q, k, v, scale=-0.125),
        lambda q, k, v: attend(q, odd, v),
        lambda q, k, v: attend(q, k, odd),
        lambda q, k, v: attend(*short),
        lambda q, k, v: fastnn.ops.attention.attention(q, k, v, window=(20, None)),
        lambda q, k, v: fastnn.ops.attention.attention(q, k, v, alibi_slopes=torch.ones(2)),
    ]
    for call in calls:
        with by_warpgroups(hopper, expected=False):
            result = call(query, key, value)
        hopper.limit_capability(80)
        assert torch.equal(result, call(query, key, value))
        hopper.limit_capability(90)


def test_infinities_and_nan(hopper):
    """As in torch: a query that meets one in a score or a weighted sum, and no other, has what float32 makes of it."""
    query, key, value = (normal(1, 1, n, 64, dtype=torch.float16).abs() for n in (70, 140, 140))
    query[0, 0, 3, 5] = torch.nan
    key[0, 0, 130, :] = -torch.inf
    key[0, 0, 2, :] = -6e4
    value[0, 0, 9, 7] = torch.inf
    exact = torch.nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
    with by_warpgroups(hopper):
        result = fF.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(result.double(), exact, rtol=3e-3, atol=1e-3, equal_nan=True)
    assert (result[..., 7].isposinf() | result[..., 7].isnan()).all() and result[0, 0, 4, :7].isfinite().all()


def test_the_backward_finds_what_it_needs(hopper, no_fallback):
    inputs = [normal(2, 2, n, 64, dtype=torch.float16).requires_grad_() for n in (70, 130, 130)]
    with by_warpgroups(hopper):
        result = fF.scaled_dot_product_attention(*inputs, is_causal=True)
    direction = normal(2, 2, 70, 64, dtype=torch.float16)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True)
    expected = torch.autograd.grad(exact, wide, direction.double())
    for got, true in zip(torch.autograd.grad(result, inputs, direction), expected, strict=True):
        assert (got.double() - true).abs().max() <= 3e-3 * true.abs().max()


@pytest.mark.parametrize("size", [64, 128])
def test_the_order_of_threads_changes_nothing(size, on_cuda, hopper):
    """Of so many tiles of keys that each stage of shared memory is filled again and again."""
    inputs = [normal(1, 1, n, size) for n in (130, 1300, 1300)]
    results = []
    for seed in (0, 1, 2):
        on_cuda.set_seed(seed)
        results.append([check(*inputs, high) for high in (None, 400)])
    for more in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], more, strict=True))
