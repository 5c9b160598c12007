"""Three small trained models, what to calibrate them with, and how many of their answers are right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F

import fastnn

T, nn = torch.nn, fastnn.nn


@dataclass(frozen=True)
class Trained:
    """A model in eval mode, a few batches of training inputs, and inputs and answers that it was not trained on."""

    model: torch.nn.Module
    calibration: list[torch.Tensor]
    inputs: torch.Tensor
    labels: torch.Tensor

    def accuracy(self, model: torch.nn.Module) -> float:
        """The share of right answers, in per cent."""
        with torch.no_grad():
            right = [
                model(x).argmax(-1) == y for x, y in zip(self.inputs.split(256), self.labels.split(256), strict=True)
            ]
        return 100 * torch.cat(right).double().mean().item()


def _fit(
    model: torch.nn.Module, batch: Callable[[], tuple[torch.Tensor, torch.Tensor]], steps: int, rate: float
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        x, y = batch()
        loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        T.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's 1,797 digits in a fixed random order."""
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x = x.float()
    return ((x - x.mean()) / x.std())[order], y[order]


def _shifted(images: torch.Tensor) -> torch.Tensor:
    """Each image, and moved by a pixel in each of the eight directions."""
    return torch.cat([torch.roll(images, (i, j), (2, 3)) for i in (-1, 0, 1) for j in (-1, 0, 1)])


def mlp(seed: int = 0) -> Trained:
    torch.manual_seed(seed)
    x, y = _digits()
    model = fastnn.nn.MLP(64, [128, 128], 10)

    def batch():
        rows = torch.randint(900, (64,))
        return x[rows] + 0.2 * torch.randn(64, 64), y[rows]

    _fit(model, batch, 300, 3e-3)
    # Three noisy copies of each test image: 897 images alone would be 0.11 points each.
    noise = torch.Generator().manual_seed(1)
    test = x[900:].repeat(3, 1) + 0.2 * torch.randn(3 * 897, 64, generator=noise)
    calibration = x[:512] + 0.2 * torch.randn(512, 64, generator=noise)
    return Trained(model, list(calibration.split(128)), test, y[900:].repeat(3))


def cnn(seed: int = 0) -> Trained:
    torch.manual_seed(seed)
    model = T.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(T.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    x, y = fit_cnn(model, 250, 5e-3)
    return Trained(model, list(x[:512].split(128)), _shifted(x[900:]), y[900:].repeat(9))


def fit_cnn(model: torch.nn.Module, steps: int, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Trains a model of images of digits, on the first 900; returns all of them and their labels."""
    x, y = _digits()
    x = x.view(-1, 1, 8, 8)

    def batch():
        rows = torch.randint(900, (64,))
        return torch.roll(x[rows], torch.randint(-1, 2, (2,)).tolist(), (2, 3)), y[rows]

    _fit(model, batch, steps, rate)
    return x, y


def gpt(seed: int = 0) -> Trained:
    """Predicts each character of Python's help from those before it."""
    torch.manual_seed(seed)
    texts = [topics[name] for name in sorted(topics)]
    characters = {character: index for index, character in enumerate(sorted(set("".join(texts))))}

    def encoded(chosen: list[str]) -> torch.Tensor:
        return torch.tensor([characters[character] for text in chosen for character in text])

    train, test = encoded([text for i, text in enumerate(texts) if i % 10]), encoded(texts[::10])
    length = 48
    model = fastnn.models.GPT(len(characters), length, n_layer=2, n_head=4, n_embd=64, dropout=0.0)

    def rows(number: int) -> torch.Tensor:
        starts = torch.randint(len(train) - length, (number, 1))
        return train[starts + torch.arange(length + 1)]

    def batch():
        found = rows(16)
        return found[:, :-1], found[:, 1:]

    _fit(model, batch, 400, 6e-3)
    size = (len(test) - 1) // length * length
    calibration = list(rows(128)[:, :-1].split(32))
    return Trained(model, calibration, test[:size].view(-1, length), test[1 : size + 1].view(-1, length))
