"""Which calls go to Triton, and what is said where none can."""

import subprocess
import sys

import pytest
import torch

import fastnn
from fastnn import _state
from fastnn.backends import Kernels, cuda, supports, triton


def test_without_a_kernel_the_call_is_torchs_and_counted(on_triton):
    _state.reset_fallbacks()
    x = torch.arange(4.0).view(1, 4)
    y = fastnn.functional.rotary_embedding(x, torch.zeros(1, 2), torch.ones(1, 2))
    assert torch.equal(y, torch.tensor([[-2.0, -3.0, 0.0, 1.0]]))
    ((_, reason),) = _state.fallbacks()
    assert reason.startswith("no Triton kernel for")
    _state.reset_fallbacks()


def test_without_triton_the_reason_is_named(monkeypatch):
    monkeypatch.setattr(triton, "_missing", "Triton is not installed")
    _state.reset_fallbacks()
    with fastnn.backend("triton"):
        assert torch.equal(fastnn.mm(torch.eye(3), torch.eye(3)), torch.eye(3))
    assert _state.fallbacks() == {("mm", "Triton is not installed"): 1}
    _state.reset_fallbacks()


def test_a_gpu_without_cuda_kernels_gets_tritons(monkeypatch):
    """The CPU plays the GPU: its tensors may go to both, as a GPU's do."""
    if triton.why_not() is not None:
        pytest.skip(triton.why_not())
    monkeypatch.setattr(fastnn.backends, "names_of", lambda *tensors: ("cuda", "triton"))
    before = cuda.module()
    cuda.use(None)
    try:
        x = torch.randn(3, 5)
        assert supports("activation", x) is None
        assert torch.equal(Kernels().activation("relu", x), x.clamp(min=0))
        assert supports("rotary", x) == "this build of fastnn has no CUDA kernels; no Triton kernel for rotary"
    finally:
        cuda.use(before)


def test_cpu_tensors_are_none_of_a_gpu(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setattr(triton, "_missing", None)
    with fastnn.backend("triton"):
        assert supports("gemm", torch.eye(2)) == "a tensor on cpu, which a kernel for cuda cannot read"


def test_the_package_works_without_triton():
    program = "import sys; sys.modules['triton'] = None; import torch, fastnn; fastnn.mm(torch.eye(2), torch.eye(2))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
