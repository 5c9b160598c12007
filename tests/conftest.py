"""What every test starts from: one seed, torch's default precision, and two threads."""

import contextlib
import gc
import importlib.util
import os
import types
from pathlib import Path

import pytest
import torch

# Without a GPU Triton's kernels are run by its interpreter, which has to be chosen before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import amx_trap  # where FASTNN_TRAP_AMX asks for it, AMX is among the instruction sets below

import fastnn
from fastnn import _cpu, _state
from fastnn.backends import cuda, triton


def pytest_sessionstart():
    if amx_trap.ALWAYS:
        amx_trap.install()  # again: pytest has taken the signal since


def pytest_collection_finish():
    # torch, its databases of samples and twenty thousand tests stay: the garbage collector need not look at them again, which
    # takes it half a second each time.
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_state():
    torch.manual_seed(0)
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    yield
    torch.set_float32_matmul_precision(precision)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def use_isa():
    """Chooses an instruction set until the test ends."""
    before = _cpu.isa()
    yield _cpu.set_isa
    _cpu.set_isa(before)


def emulated_cuda():
    """The CUDA kernels with the CPU as their device, from `make emulation`; None where that was not run."""
    found = sorted((Path(__file__).parents[1] / "build/emulation").glob("_cuda_emulated*.so"))
    if not found:
        return None
    spec = importlib.util.spec_from_file_location("_cuda_emulated", found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emulation():
    module = emulated_cuda()
    if module is None:
        pytest.skip("the emulation of CUDA is not built (make emulation)")
    return module


#: Whether there is a GPU and this build has kernels for it: they are tested there, and not in the emulation.
ON_GPU = cuda.module() is not None and torch.cuda.is_available()


@pytest.fixture
def on_cuda(request):
    """Inside the test, ops run the CUDA kernels: on a GPU, where new tensors then are, or emulated, on CPU tensors. Its
    value has the function `set_seed`, of the order in which emulated warps run."""
    if ON_GPU:
        with torch.device("cuda"), fastnn.backend("cuda"):
            yield types.SimpleNamespace(set_seed=lambda seed: None)
        return
    emulation = request.getfixturevalue("emulation")
    before = cuda.module()
    cuda.use(emulation)
    emulation.set_seed(1)
    with fastnn.backend("cuda"):
        yield emulation
    cuda.use(before)


@pytest.fixture
def hopper(on_cuda):
    """Inside the test, the kernels of devices of capability 9.0 are used; its value is the extension module."""
    module = cuda.module()
    if not module.emulated and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a GPU of capability 9.0")
    before = module.limit_capability(90)
    yield module
    module.limit_capability(before)


@pytest.fixture
def on_triton():
    """Inside the test, ops run the Triton kernels: compiled, on a GPU, where new tensors then are, or interpreted, on CPU
    tensors."""
    if triton.why_not() is not None:
        pytest.skip(triton.why_not())
    with torch.device("cuda") if ON_GPU else contextlib.nullcontext(), fastnn.backend("triton"):
        yield


def _go_to(backend, request):
    """To the kernels for GPUs, of which there are none of float64."""
    request.getfixturevalue(f"on_{backend}")
    if request.node.callspec.params.get("dtype") is torch.float64:
        pytest.skip("no kernel of float64 for GPUs")


@pytest.fixture(params=[*_cpu.available_isas(), "cuda", "triton"])
def machine(request, use_isa):
    """Runs the test on the kernels of every instruction set of this CPU, on those of CUDA, and on Triton's, but on none
    that its mark ``not_on`` names."""
    mark = request.node.get_closest_marker("not_on")
    if mark is not None and request.param in mark.args:
        pytest.skip(f"no kernel on {request.param}")
    if request.param in ("cuda", "triton"):
        _go_to(request.param, request)
    else:
        use_isa(request.param)
    return request.param


@pytest.fixture(params=["cpu", "cuda"])
def kernels(request):
    """Runs the test on the CPU's kernels, those of the instruction set in use, and on CUDA's."""
    if request.param != "cpu":
        _go_to(request.param, request)
    return request.param


@pytest.fixture
def no_fallback():
    """Fails the test if any call in it went to torch."""
    _state.reset_fallbacks()
    yield
    assert _state.fallbacks() == {}
