"""Whole models on CUDA's kernels: converted, in `patch()`, in bfloat16 and under autocast; nothing of them goes to torch."""

import copy

import pytest
import torch
from torch import nn

import fastnn
from fastnn import _state, models
from fastnn.testing import verify_model


def encoder(**options):
    return nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, **options)


def bert():
    return models.Bert(50, 32, 2, 4, 64, max_position_embeddings=16).eval()


def cnn():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, stride=2, groups=8), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )


#: What makes a model, and the shapes of its inputs.
MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(20, 33), nn.GELU(), nn.Linear(33, 7)), [(9, 20)]),
    "encoder": (lambda: encoder(norm_first=True, activation="gelu"), [(2, 9, 32)]),
    "decoder": (
        lambda: nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True),
        [(2, 9, 32), (2, 5, 32)],
    ),
    "bert": (bert, [(2, 11)]),
    "cnn": (cnn, [(4, 3, 9, 9)]),
}


def made(name):
    """The model and its inputs, on the device."""
    make, shapes = MODELS[name]
    return make(), [torch.randint(50, shape) if name == "bert" else torch.randn(shape) for shape in shapes]


def went_to_torch():
    """But for the reference in float64 where the model is fastnn's own."""
    return {(op, why): n for (op, why), n in _state.fallbacks().items() if "float64" not in why}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_converted_model_is_the_original(name, dtype, on_cuda):
    model, inputs = made(name)
    model = model.to(dtype)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    _state.reset_fallbacks()
    report = verify_model(model, fastnn.convert(copy.deepcopy(model)), inputs)
    assert report, str(report)
    assert went_to_torch() == {}


def test_a_model_is_patched(on_cuda):
    model, inputs = made("encoder")
    expected = model(*inputs)
    _state.reset_fallbacks()
    with fastnn.patch():
        found = model(*inputs)
    torch.testing.assert_close(found, expected)
    assert went_to_torch() == {}


def test_autocast_is_torchs(on_cuda):
    model, (x,) = made("encoder")
    ours = fastnn.convert(copy.deepcopy(model))
    with torch.autocast(x.device.type, torch.bfloat16):
        found, expected = ours(x), model(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    exact = model(x)
    assert (found - exact).norm() <= 2 * (expected - exact).norm()


def test_ten_steps_of_training(on_cuda):
    """The losses of torch's own training, from the same start on the same batches."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.LayerNorm(40), nn.Linear(40, 4))
    batches = [(torch.randn(12, 16), torch.randint(4, (12,))) for _ in range(10)]
    losses = []
    for each in (fastnn.convert(copy.deepcopy(model)), model):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2)
        losses.append([])
        for x, y in batches:
            loss = nn.functional.cross_entropy(each(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] != losses[0][0]
