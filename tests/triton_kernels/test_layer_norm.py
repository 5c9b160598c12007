"""Layer norm in Triton where a program has more rows than it holds at a time."""

import pytest
import torch
import torch.nn.functional as F

import fastnn.functional as fF


@pytest.mark.parametrize("shape", [(5, 4099), (19, 130), (37, 9)], ids=str)
def test_few_programs(shape, monkeypatch, on_triton, no_fallback):
    from fastnn.backends.triton import layer_norm

    monkeypatch.setattr(layer_norm, "_MOST_CHUNKS", 2)
    monkeypatch.setattr(layer_norm, "_TILE", 128)
    x, direction = torch.randn(shape) + 2, torch.randn(shape)
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    found = []
    for f, dtype in ((fF, torch.float32), (F, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = f.layer_norm(leaves[0], shape[1:], *leaves[1:])
        found.append((y, *torch.autograd.grad(y, leaves, direction.to(dtype))))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=4e-6)
