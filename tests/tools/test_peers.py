"""The other ways of running a whole model that the benchmarks compare with."""

import importlib.util
import json
import sys

import pytest
import torch

from fastnn import bench
from fastnn.bench import machine, peers


@pytest.fixture
def model():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, 2, padding=1, bias=False),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU6(),
        torch.nn.Conv2d(16, 16, 3, padding=1, groups=16),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 10),
    ).eval()


NAMES = ("torch.compile", "torch.compile channels_last", "onnxruntime", "openvino")


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_peer_computes_what_torch_computes(model, name, dtype, bound):
    for package in peers._PACKAGES[name.split()[0]]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    model = model.to(dtype)
    if name == "onnxruntime" and dtype == torch.bfloat16:
        assert name not in peers.contestants(model, dtype) and "bfloat16" in peers.absent(dtype)[name]
        return
    compute = peers.contestants(model, dtype)[name]
    # A second call with other numbers: nothing of the first was made a constant.
    for _ in range(2):
        x = torch.randn(2, 3, 31, 30).to(dtype)
        with torch.inference_mode():
            expected = model(x)
        result = compute(x)
        assert result.dtype == dtype and result.shape == expected.shape
        assert (result - expected).float().norm() <= bound * expected.float().norm()


class Tagger(torch.nn.Module):
    """Tokens in, numbers out."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.linear = torch.nn.Linear(16, 7)

    def forward(self, tokens):
        x = self.norm(self.embedding(tokens))[:, None]  # one head
        return self.linear(torch.nn.functional.scaled_dot_product_attention(x, x, x)[:, 0])


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["torch.compile", "onnxruntime", "openvino"])
def test_a_peer_takes_tokens(name, dtype, bound):
    for package in peers._PACKAGES[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    model = Tagger().eval().to(dtype)
    found = peers.contestants(model, dtype, channels_last=False)
    assert set(found) == {"torch.compile", "onnxruntime", "openvino"} - set(peers.absent(dtype))
    if name in peers.absent(dtype):
        return
    for _ in range(2):
        tokens = torch.randint(50, (3, 11))
        with torch.inference_mode():
            expected = model(tokens)
        result = found[name](tokens)
        assert result.dtype == dtype and result.shape == expected.shape
        assert (result - expected).float().norm() <= bound * expected.float().norm()


@pytest.mark.parametrize("calibrated", [False, True], ids=["dynamic", "static"])
def test_onnxruntime_in_int8_is_near_what_torch_computes(model, calibrated):
    for package in peers._PACKAGES["onnxruntime"]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    layers = [torch.nn.Linear(30, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)]
    model = model if calibrated else torch.nn.Sequential(*layers).eval()
    images = [torch.randn(2, 3, 31, 30) for _ in range(4)]
    compute = peers.int8_onnxruntime(model, images if calibrated else None)
    for x in images:
        with torch.inference_mode():
            expected = model(x)
        result = compute(x)
        distance = (result - expected).norm() / expected.norm()
        # A hundredth of the range a layer; and not the float model.
        assert 1e-5 < distance < 0.1, distance


def test_a_peer_that_is_missing_is_named(model, monkeypatch):
    for package in ("openvino", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    absent = peers.absent(torch.float32)
    assert absent["openvino"] == "not installed: openvino"
    assert absent["onnxruntime"].startswith("not installed: onnxruntime")
    assert set(peers.contestants(model, torch.float32)) == set(NAMES[:2])
    assert not {"openvino", "onnxruntime"} & machine.describe()["peers"].keys()
    # In the record of a benchmark, which is built and not run: compiling whole models takes long.
    problem = bench.benchmark("resnet18_inference").build((1, 32), torch.float32)
    assert {"openvino", "onnxruntime"} <= problem.absent.keys()
    json.dumps(dict(problem.absent))
