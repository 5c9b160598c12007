"""Convolutions on CUDA in tiles of every size, and called through the functions that users call."""

import pytest
import torch
import torch.nn.functional as F

import fastnn.functional as fF
from fastnn import _state
from fastnn.backends.cuda.conv import too_large
from fastnn.ops.conv import conv_fused, inverted_residual

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOOSE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def integers(*shape, dtype, channels_last=True):
    x = torch.randint(-1, 2, shape).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize(
    ("dtype", "filters"), [(torch.bfloat16, 72), (torch.bfloat16, 40), (torch.float32, 33)], ids=str
)
def test_images_of_many_tiles(dtype, filters, channels_last, on_cuda, no_fallback):
    """Enough pixels for the largest tiles, forward and backward by the input, where they are an odd number."""
    x = integers(1, 8, 113, 111, dtype=dtype, channels_last=channels_last).requires_grad_()
    w = integers(filters, 8, 1, 2, dtype=dtype).requires_grad_()
    y = fF.conv2d(x, w, stride=(1, 1), padding=(0, 1))
    exact = F.conv2d(x.double(), w.double(), padding=(0, 1))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y.double(), exact)
    direction = integers(*y.shape, dtype=dtype)
    (found,) = torch.autograd.grad(y, x, direction)
    (expected,) = torch.autograd.grad(exact, x, direction.double())
    assert torch.equal(found.double(), expected.double())


@pytest.mark.parametrize(
    ("dtype", "size", "channels", "filters"),
    [(torch.bfloat16, 54, 264, 264), (torch.float32, 21, 136, 152), (torch.float16, 30, 3, 64)],
    ids=str,
)
def test_a_weight_of_many_tiles_or_of_many_sums(dtype, size, channels, filters, on_cuda, no_fallback):
    """Of the largest tiles, and where K is divided among many blocks."""
    x = integers(1, channels, size, size, dtype=dtype)
    w = integers(filters, channels, 1, 1, dtype=dtype).requires_grad_()
    y = fF.conv2d(x, w)
    direction = (torch.rand(y.shape) < 0.05).to(dtype)
    (found,) = torch.autograd.grad(y, w, direction)
    exact = direction.double()[0].flatten(1) @ x.double()[0].flatten(1).t()
    assert exact.abs().max() <= 256
    assert torch.equal(found[:, :, 0, 0].double(), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_an_infinity_in_a_gradient(dtype, on_cuda, no_fallback):
    """Of the input and of the weight, it makes infinities and NaN of what it meets, and leaves the others alone."""
    x, w = integers(2, 8, 9, 9, dtype=dtype), integers(16, 8, 3, 3, dtype=dtype)
    direction = integers(2, 16, 5, 5, dtype=dtype)
    direction[1, 3, 2, 2] = torch.inf
    w[3, :, 1, 1] = 1
    leaves = [t.requires_grad_() for t in (x, w)]
    found = torch.autograd.grad(fF.conv2d(*leaves, stride=2, padding=1), leaves, direction)
    expected = torch.autograd.grad(
        F.conv2d(*(t.double() for t in leaves), stride=2, padding=1), leaves, direction.double()
    )
    for got, true in zip(found, expected, strict=True):
        assert torch.equal(got.isfinite(), true.isfinite()) and not true.isfinite().all()
        assert torch.equal(got[true.isfinite()].double(), true[true.isfinite()].double())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_fused(dtype, on_cuda, no_fallback):
    """Bias, residual and activation in one pass; a residual in the other layout; three layers of an inverted residual."""
    x, w, b = (torch.randn(s).to(dtype) for s in ((2, 6, 9, 7), (10, 3, 3, 3), (10,)))
    residual = torch.randn(2, 10, 5, 4).to(dtype).contiguous(memory_format=torch.channels_last)
    exact = F.conv2d(x.double(), w.double(), b.double(), 2, 1, 1, 2)
    for added, kind, function in ((residual, "relu", F.relu), (None, "silu", F.silu), (residual, "none", lambda t: t)):
        found = conv_fused(x, w, b, 2, 1, 1, 2, kind, added)
        expected = function(exact if added is None else exact + added.double())
        torch.testing.assert_close(found.double(), expected, rtol=LOOSE[dtype], atol=20 * LOOSE[dtype])
    deep, project = torch.randn(6, 1, 3, 3).to(dtype), torch.randn(4, 6, 1, 1).to(dtype)
    found = inverted_residual(x, None, None, 1, 0, (deep, None, 1, None), 1, (project, None, 0, None))
    exact = F.conv2d(F.conv2d(x.double(), deep.double(), None, 1, 1, 1, 6).relu().to(dtype).double(), project.double())
    torch.testing.assert_close(found.double(), exact, rtol=LOOSE[dtype], atol=20 * LOOSE[dtype])


def test_the_same_bits_in_any_order_of_threads(on_cuda, no_fallback):
    """Of a convolution whose weight's sums are divided among blocks, of a depthwise one, and of pools."""
    x, w, deep = torch.randn(2, 8, 31, 29), torch.randn(12, 8, 3, 3), torch.randn(12, 1, 3, 3)
    leaves = [t.requires_grad_() for t in (x.contiguous(memory_format=torch.channels_last), w, deep)]
    direction = torch.randn(2, 12, 1, 1)

    def run(seed):
        on_cuda.set_seed(seed)
        y = fF.conv2d(fF.conv2d(leaves[0], leaves[1], stride=2, padding=1), leaves[2], padding=1, groups=12)
        y = fF.adaptive_avg_pool2d(fF.max_pool2d(y, 3, 1, 1), 1)
        return (y, *torch.autograd.grad(y, leaves, direction))

    first = run(1)
    for seed in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(seed), strict=True))


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "stride", "groups", "why"),
    [
        ((1, 2 * 65536, 1, 1), (65536, 2, 1, 1), 1, 65536, "groups"),
        ((1, 16, 301, 302), (8, 16, 2, 2), 300, 1, "strides"),
    ],
)
def test_what_no_launch_can_count_goes_to_torch(x_shape, w_shape, stride, groups, why, on_cuda):
    """Forward and both gradients; tensors that are too large are not made here."""
    x, w = torch.randn(x_shape, requires_grad=True), torch.randn(w_shape, requires_grad=True)
    _state.reset_fallbacks()
    y = fF.conv2d(x, w, stride=stride, groups=groups)
    torch.testing.assert_close(y, F.conv2d(x, w, stride=stride, groups=groups))
    torch.testing.assert_close(
        conv_fused(x.detach(), w.detach(), None, stride, 0, 1, groups, "relu"), y.detach().relu()
    )
    assert {op for op, _ in _state.fallbacks()} == {"conv2d"}
    assert all(why in reason for _, reason in _state.fallbacks())
    _state.reset_fallbacks()
    assert too_large((1, 1, 1 << 16, 1 << 15), (1, 1, 1, 1), (1, 1, 1, 1), (1, 1), (0, 0), (1, 1), 1).startswith("x")
    assert too_large((1, 1, 9, 9), (1, 1, 3, 3), (1, 1, 7, 7), (1, 1), (0, 0), (1, 1), 1) is None
