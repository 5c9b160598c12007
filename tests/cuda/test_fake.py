"""Fake tensors of a GPU that is not there: what the compiled kernels' ops say of their results, which is what tracing and
torch.compile go by. (torch built for CPUs has no gradients for such tensors.)"""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastnn
import fastnn.functional as fF
from fastnn import _state
from fastnn.backends import cuda

from .test_code import BUILT


@pytest.fixture
def compiled():
    """The kernels that `make cuda` built, which need no driver to be asked about."""
    found = sorted(BUILT.glob("_cuda*.so"))
    if not found:
        pytest.skip("the CUDA kernels are not built (make cuda)")
    spec = importlib.util.spec_from_file_location("_cuda", found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = cuda.module()
    cuda.use(module)
    yield
    cuda.use(before)


#: fastnn's function and torch's, and the shapes of the arguments.
CALLS = {
    "mm": (fastnn.mm, torch.mm, (7, 5), (5, 3)),
    "matmul": (fastnn.matmul, torch.matmul, (2, 7, 5), (5, 3)),
    "baddbmm": (fastnn.baddbmm, torch.baddbmm, (2, 7, 3), (2, 7, 5), (2, 5, 3)),
    "linear": (fF.linear, F.linear, (2, 7, 5), (3, 5), (3,)),
    "linear_act": (lambda *a: fF.linear_act(*a, "gelu"), lambda *a: F.gelu(F.linear(*a)), (7, 5), (3, 5), (3,)),
    "gelu": (fF.gelu, F.gelu, (7, 5)),
    "relu of a transposed matrix": (lambda x: fF.relu(x.t()), lambda x: F.relu(x.t()), (7, 5)),
    "softmax": (lambda x: fF.softmax(x, 0), lambda x: F.softmax(x, 0), (7, 5)),
    "layer_norm": (lambda *a: fF.layer_norm(a[0], (5,), *a[1:]), lambda *a: F.layer_norm(a[0], (5,), *a[1:]), (7, 5), (5,), (5,)),
    "rms_norm": (lambda x, w: fF.rms_norm(x, (5,), w), lambda x, w: F.rms_norm(x, (5,), w), (7, 5), (5,)),
    "attention": (fF.scaled_dot_product_attention, F.scaled_dot_product_attention, (2, 3, 9, 8), (2, 3, 9, 8), (2, 3, 9, 8)),
}  # fmt: skip


@pytest.fixture
def autocast_on_cuda():
    """What torch.autocast("cuda") sets, which it does not do without a GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.parametrize("name", ["mm", "matmul", "baddbmm", "linear", "attention"])
def test_autocast(name, compiled, autocast_on_cuda, no_fallback):
    """Of operands of two types, too."""
    ours, _, *shapes = CALLS[name]
    for dtypes in ((torch.float32, torch.float32, torch.float32), (torch.bfloat16, torch.float32, torch.float32)):
        with torch.no_grad(), FakeTensorMode():
            tensors = [torch.empty(shape, dtype=dtypes[i], device="cuda") for i, shape in enumerate(shapes)]
            assert ours(*tensors).dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_results_are_described(name, dtype, compiled, no_fallback):
    ours, torchs, *shapes = CALLS[name]
    with torch.no_grad(), FakeTensorMode():
        tensors = [torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes]
        found, expected = ours(*tensors), torchs(*tensors)
    assert found.device.type == "cuda"
    assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())


def test_a_graph_holds_the_kernels(compiled):
    _state.reset_fallbacks()
    with torch.no_grad(), FakeTensorMode():
        x, w, b = (torch.empty(shape, device="cuda") for shape in ((4, 5), (3, 5), (3,)))
        graph = make_fx(lambda x, w, b: fF.softmax(fF.linear_act(x, w, b, "relu"), -1))(x, w, b)
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert called and all(name.startswith("fastnn.") for name in called), called
    assert _state.fallbacks() == {}
