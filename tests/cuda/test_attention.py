"""Attention on CUDA at the edges of its blocks of 64 queries and 32, 64 or 128 keys, and of its rows of 32, 64 and 128, and of
the slices of 128 or 256 of longer ones; with infinities; and with dropout, for which the CPU and CUDA draw the same numbers.
"""

import pytest
import torch

import fastnn
import fastnn.functional as fF

LOOSE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def check(q_shape, k_shape, v_size, dtype, **options):
    query = torch.randn(q_shape).to(dtype).requires_grad_()
    key = torch.randn(k_shape).to(dtype).requires_grad_()
    value = torch.randn(*k_shape[:-1], v_size).to(dtype).requires_grad_()
    result = fF.scaled_dot_product_attention(query, key, value, **options)
    direction = torch.randn_like(result)
    gradients = torch.autograd.grad(result, (query, key, value), direction)
    wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
    exact = torch.nn.functional.scaled_dot_product_attention(*wide, **options)
    for got, true in zip(
        (result, *gradients), (exact, *torch.autograd.grad(exact, wide, direction.double())), strict=True
    ):
        assert (got.double() - true).abs().max() <= LOOSE[dtype] * max(true.abs().max().item(), 1)


@pytest.mark.parametrize("dtype", LOOSE)
@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ((63, 65), (31, 33)),
        ((64, 64), (64, 64)),
        ((65, 127), (65, 17)),
        ((1, 193), (128, 128)),
        ((130, 31), (8, 127)),
        ((33, 129), (129, 31)),
        ((3, 65), (31, 257)),
    ],
    ids=str,
)
def test_edges_of_blocks(lengths, sizes, dtype, on_cuda, no_fallback):
    (queries, keys), (size, value_size) = lengths, sizes
    check((1, 2, queries, size), (1, 2, keys, size), value_size, dtype)
    check((1, 4, queries, size), (1, 2, keys, size), value_size, dtype, is_causal=True, enable_gqa=True)


def test_unaligned_rows_are_read_by_elements(on_cuda, no_fallback):
    query, key, value = (torch.randn(1, 2, n, 65)[..., 1:].requires_grad_() for n in (40, 70, 70))
    result = fF.scaled_dot_product_attention(query, key, value)
    exact = torch.nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [16, 140])
def test_dropout_is_that_of_the_cpu(size, on_cuda, no_fallback):
    args = [torch.randn(1, 2, n, size).requires_grad_() for n in (70, 45, 45)]
    mask = torch.randn(70, 45)

    def results():
        torch.manual_seed(7)
        result = fF.scaled_dot_product_attention(*args, attn_mask=mask, dropout_p=0.4)
        return result, *torch.autograd.grad(result.sin().sum(), args)

    on_a_gpu = results()
    with fastnn.backend("cpu"):
        on_a_cpu = results()
    for got, expected in zip(on_a_gpu, on_a_cpu, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [16, 64, 140])
def test_infinities_of_float32_are_not_taken_apart(size, on_cuda, no_fallback):
    """Parts of an infinity, or of products that are beyond float32, would sum up to NaN."""
    query, key, value = (torch.rand(1, 1, n, size) + 0.5 for n in (5, 40, 40))
    key[0, 0, 3] = -torch.inf  # a score of -infinity
    key[0, 0, 7] = -3e38
    query[0, 0, 2] = 3e38
    query[0, 0, 2, ::2] = 0.5
    key[0, 0, :, 1::2] = torch.where(key[0, 0, :, 1::2].isfinite(), 0.0, key[0, 0, :, 1::2])
    value[0, 0, 11, 1] = torch.inf
    value[0, 0, 12, 2] = -3.4e38
    result = fF.scaled_dot_product_attention(query, key, value)
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(result, exact, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert result[..., 0].isfinite().all() and (result[..., 1] == torch.inf).all()


def test_the_same_bits_again(on_cuda):
    args = [torch.randn(1, 4, 100, 32).requires_grad_() for _ in range(3)]
    runs = []
    for seed in (0, 3):
        on_cuda.set_seed(seed)
        result = fF.scaled_dot_product_attention(*args, is_causal=True)
        runs.append((result, *torch.autograd.grad(result.sum(), args)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
