"""The main job from end to end: convert a model, verify it, train it, time it.

Real input (scikit-learn's 1,797 handwritten digits of 8×8 pixels) and a stock `torch.nn` model; everything that is
compared starts from the same weights and sees the same batches.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import fastnn
from fastnn.bench import compare, machine
from fastnn.bench.table import duration
from fastnn.testing import ModelReport, verify_model
from fastnn.testing.table import show_model

__all__ = ["Curve", "Digits", "make_model", "run"]

#: Batch of the verification and of the timing; the training's is smaller, for 1,437 images make few steps of 256.
BATCH = 256
TRAIN_BATCH = 64
LEARNING_RATE = 1e-3
#: Keeps the last loss away from zero, where a large model would learn the training set by heart.
LABEL_SMOOTHING = 0.1
#: What the trained model must reach on the test set.
ACCURACY = 0.97
#: How far apart the two accuracies may be (2 of 360 test images), and how much of the first loss the two curves.
ACCURACY_APART = 2 / 360
LOSS_APART = 0.02


@dataclass(frozen=True)
class Digits:
    """Images in rows of 64 numbers, of mean 0 and deviation 1 over the training set, and their classes."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor

    @classmethod
    def load(cls) -> Digits:
        """A fifth of each class is for testing; the split is always the same."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        x, y = load_digits(return_X_y=True)
        split = train_test_split(x, y, test_size=0.2, random_state=0, stratify=y)
        train_x, test_x = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
        mean, deviation = train_x.mean(), train_x.std()
        train_x, test_x = (train_x - mean) / deviation, (test_x - mean) / deviation
        train_y, test_y = (torch.tensor(part, dtype=torch.int64) for part in split[2:])
        return cls(train_x, train_y, test_x, test_y)


def make_model(width: int) -> torch.nn.Sequential:
    """A stock multilayer perceptron, 64 → width → width → 10, of fixed initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(64, width),
            torch.nn.ReLU(),
            torch.nn.Linear(width, width),
            torch.nn.ReLU(),
            torch.nn.Linear(width, 10),
        )


@dataclass(frozen=True)
class Curve:
    """One training: the loss of each batch, and the share of the test images that came out right after each epoch."""

    losses: list[float]
    accuracies: list[float]


def run(
    out: str = "demo-results",
    *,
    epochs: int = 10,
    width: int = 1024,
    seconds: float = 1.0,
    console: Console | None = None,
) -> int:
    """Runs the demo and writes `demo.json` and `demo.png` into the folder `out`.

    Returns 0 if fastnn's model was verified, trained like torch's and reached 97 % on the test set, else 1.
    """
    console = console or Console()
    os.makedirs(out, exist_ok=True)
    digits = Digits.load()

    original = make_model(width)
    model = copy.deepcopy(original)
    console.rule("1. Convert")
    model = fastnn.convert(model)
    console.print("model = fastnn.convert(model)")
    console.print(str(fastnn.report(model)), highlight=False, markup=False)

    console.rule("2. Verify against float64")
    batch = digits.train_x[:BATCH]
    labels = digits.train_y[:BATCH]
    reports = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = _name(dtype)
        reports[name] = verify_model(
            copy.deepcopy(original).to(dtype),
            copy.deepcopy(model).to(dtype),
            batch.to(dtype),
            loss=lambda output: F.cross_entropy(output, labels),
        )
        show_model(reports[name], console, f"Relative error, {name}")

    console.rule("3. Train both from the same start on the same batches")
    curves = _train_both(original, model, digits, epochs, console)
    agreement = _agreement(curves)
    _show_training(curves, agreement, console)

    console.rule("4. Time both, interleaved")
    described = machine.describe()
    timings = {
        _name(dtype): _time(original, model, batch, labels, dtype, seconds) for dtype in (torch.float32, torch.bfloat16)
    }
    for name, rows in timings.items():
        _show_timing(name, rows, console)
    console.print(
        f"{described['cpu']}, {described['threads']} threads, {described['isa']}; torch {described['torch']}; load average "
        f"{described['load_average']:.2f}",
        highlight=False,
    )

    console.rule("5. Write")
    passed = all(reports.values()) and agreement["agree"]
    record = {
        "passed": passed,
        "machine": described,
        "model": f"64-{width}-{width}-10",
        "batch": BATCH,
        "verification": {name: report.to_dict() for name, report in reports.items()},
        "training": {**agreement, **{name: vars(curve) for name, curve in curves.items()}},
        "timing": timings,
    }
    path = os.path.join(out, "demo.json")
    with open(path, "w") as file:
        json.dump(record, file, indent=2)
        file.write("\n")
    picture = os.path.join(out, "demo.png")
    _plot(curves, timings, reports, picture)
    console.print(f"{path}, {picture}", highlight=False)
    if passed:
        console.print("[bold green]PASSED[/]: the same numbers, verified, and the same training")
    else:
        console.print("[bold red]FAILED[/]: see the tables above")
    return 0 if passed else 1


# ---- training ----------------------------------------------------------------------------------------------------


def _train_both(
    original: torch.nn.Module, converted: torch.nn.Module, digits: Digits, epochs: int, console: Console
) -> dict[str, Curve]:
    models = {"torch": copy.deepcopy(original), "fastnn": copy.deepcopy(converted)}
    optimizers = {name: torch.optim.Adam(model.parameters(), lr=LEARNING_RATE) for name, model in models.items()}
    curves = {name: Curve([], []) for name in models}
    order = torch.Generator().manual_seed(0)
    steps = -(-len(digits.train_x) // TRAIN_BATCH)
    schedules = {
        name: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
        for name, optimizer in optimizers.items()
    }
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("training", total=epochs * steps, loss="")
        for _ in range(epochs):
            for chosen in torch.randperm(len(digits.train_x), generator=order).split(TRAIN_BATCH):
                for name, model in models.items():
                    loss = F.cross_entropy(
                        model(digits.train_x[chosen]), digits.train_y[chosen], label_smoothing=LABEL_SMOOTHING
                    )
                    optimizers[name].zero_grad()
                    loss.backward()
                    optimizers[name].step()
                    schedules[name].step()
                    curves[name].losses.append(loss.item())
                progress.update(
                    task,
                    advance=1,
                    loss=", ".join(f"{name} {curve.losses[-1]:.4f}" for name, curve in curves.items()),
                )
            for name, model in models.items():
                with torch.no_grad():
                    right = model(digits.test_x).argmax(1) == digits.test_y
                curves[name].accuracies.append(right.double().mean().item())
    return curves


def _agreement(curves: dict[str, Curve]) -> dict[str, Any]:
    torchs, ours = curves["torch"], curves["fastnn"]
    scale = torchs.losses[0]
    apart = max(abs(a - b) for a, b in zip(torchs.losses, ours.losses, strict=True)) / scale
    accuracy_apart = abs(torchs.accuracies[-1] - ours.accuracies[-1])
    return {
        "largest_loss_difference": apart,
        "accuracy_difference": accuracy_apart,
        "agree": apart <= LOSS_APART
        and accuracy_apart <= ACCURACY_APART + 1e-9
        and min(torchs.accuracies[-1], ours.accuracies[-1]) >= ACCURACY,
    }


def _show_training(curves: dict[str, Curve], agreement: dict[str, Any], console: Console) -> None:
    table = Table("epoch")
    for name in curves:
        table.add_column(f"{name}: loss", justify="right")
        table.add_column("test accuracy", justify="right")
    epochs = len(curves["torch"].accuracies)
    steps = len(curves["torch"].losses) // epochs
    for epoch in range(epochs):
        row = [str(epoch + 1)]
        for curve in curves.values():
            mean = sum(curve.losses[epoch * steps : (epoch + 1) * steps]) / steps
            row += [f"{mean:.5f}", f"{curve.accuracies[epoch]:.2%}"]
        table.add_row(*row)
    console.print(table)
    verdict = "[green]agree[/]" if agreement["agree"] else "[bold red]do not agree[/]"
    console.print(
        f"The curves {verdict}: the losses are at most {agreement['largest_loss_difference']:.2e} of the first loss apart, "
        f"the accuracies {agreement['accuracy_difference']:.2%}; at least {ACCURACY:.0%} is asked for.",
        highlight=False,
    )


# ---- timing ------------------------------------------------------------------------------------------------------


def _time(
    original: torch.nn.Module,
    converted: torch.nn.Module,
    batch: torch.Tensor,
    labels: torch.Tensor,
    dtype: torch.dtype,
    seconds: float,
) -> list[dict[str, Any]]:
    """Forward and training step, of each layer and of the whole; one dict for each."""
    models = {"fastnn": copy.deepcopy(converted).to(dtype), "torch": copy.deepcopy(original).to(dtype)}
    x = batch.to(dtype)
    rows = []
    inputs = x
    layers = list(zip(*(model.named_children() for model in models.values()), strict=True))
    for (name, ours), (_, theirs) in layers:
        pair = {"fastnn": ours, "torch": theirs}
        # The first layer's input needs no gradient; every other's does.
        size = f" {theirs.in_features}→{theirs.out_features}" if isinstance(theirs, torch.nn.Linear) else ""
        label = f"{name} {type(theirs).__name__}{size}"
        steps = {k: _backward_of(layer, inputs, needs_input=name != "0") for k, layer in pair.items()}
        rows.append(_row(label, _forward_of(pair, inputs), steps, seconds / 2))
        with torch.no_grad():
            inputs = theirs(inputs)
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.0) for name, model in models.items()}
    steps = {name: _training_step(model, optimizers[name], x, labels) for name, model in models.items()}
    rows.append(_row("the whole model", _forward_of(models, x), steps, seconds))
    return rows


def _forward_of(models: dict[str, torch.nn.Module], x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    def forward(model: torch.nn.Module) -> Callable[[], Any]:
        def call() -> torch.Tensor:
            with torch.inference_mode():
                return model(x)

        return call

    return {name: forward(model) for name, model in models.items()}


def _backward_of(layer: torch.nn.Module, x: torch.Tensor, *, needs_input: bool) -> Callable[[], Any]:
    x = x.detach().clone().requires_grad_(needs_input)
    wanted = [*layer.parameters(), *([x] if needs_input else [])]
    with torch.no_grad():
        cotangent = torch.randn_like(layer(x))
    return lambda: torch.autograd.grad(layer(x), wanted, cotangent)


def _training_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, labels: torch.Tensor
) -> Callable[[], Any]:
    """Loss, backward and optimizer; at a learning rate of 0, so that every step does the same work."""

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def _row(
    label: str, forward: dict[str, Callable[[], Any]], step: dict[str, Callable[[], Any]], seconds: float
) -> dict[str, Any]:
    row: dict[str, Any] = {"what": label}
    for kind, contestants in (("forward", forward), ("step", step)):
        timing = compare(contestants, [()], seconds=seconds / 2)
        ratio, low, high = timing.ratio("fastnn", "torch")
        row[kind] = {
            "fastnn": timing.median("fastnn"),
            "torch": timing.median("torch"),
            "ratio": ratio,
            "quartiles": [low, high],
        }
    return row


def _show_timing(name: str, rows: list[dict[str, Any]], console: Console) -> None:
    for kind, title in (("forward", "forward"), ("step", "training step")):
        table = Table(title=f"{name}, batch {BATCH}: {title}", title_justify="left")
        table.add_column("layer", no_wrap=True)
        for column in ("fastnn", "torch", "faster by", "quartiles"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            t = row[kind]
            colour = "green" if t["ratio"] >= 1 else "red"
            low, high = t["quartiles"]
            table.add_row(
                row["what"],
                duration(t["fastnn"]),
                duration(t["torch"]),
                f"[{colour}]{t['ratio']:.2f}[/]",
                f"{low:.2f}–{high:.2f}",
                end_section=row is rows[-2],
            )
        console.print(table)


# ---- plot --------------------------------------------------------------------------------------------------------


_BARS = {"forward": ("forward", "tab:blue"), "step": ("training step", "tab:orange")}


def _plot(
    curves: dict[str, Curve],
    timings: dict[str, list[dict[str, Any]]],
    reports: dict[str, ModelReport],
    path: str,
) -> None:
    """Loss curves, errors against float64, and times, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    left.semilogy(curves["torch"].losses, label="torch", linewidth=3, color="0.7")
    left.semilogy(curves["fastnn"].losses, label="fastnn", linewidth=1, color="tab:red")
    left.set(
        title=f"Training loss; test accuracy {curves['fastnn'].accuracies[-1]:.1%} "
        f"(torch {curves['torch'].accuracies[-1]:.1%})",
        xlabel="batch",
        ylabel="cross entropy",
    )
    left.legend()

    marks = {"float32": "o", "bfloat16": "s"}
    for name, report in reports.items():
        middle.loglog(
            [each.torch_error for each in report.compared],
            [each.error for each in report.compared],
            marks[name],
            label=name,
        )
    ends = [min(*middle.get_xlim(), *middle.get_ylim()), max(*middle.get_xlim(), *middle.get_ylim())]
    middle.plot(ends, ends, color="0.7", zorder=0)
    middle.set(
        title="Error against float64: output and every gradient", xlabel="torch's error", ylabel="fastnn's error"
    )
    middle.legend()

    labels, heights, colours = [], [], []
    for name, rows in timings.items():
        for row in rows:
            for kind, (_, colour) in _BARS.items():
                labels.append(f"{row['what']}, {name}")
                heights.append(row[kind]["ratio"])
                colours.append(colour)
    right.barh(range(len(heights)), heights, color=colours)
    right.axvline(1.0, color="0.4")
    right.set_yticks(range(len(labels)), labels, fontsize=7)
    right.invert_yaxis()
    right.set(title="Times faster than torch")
    right.legend(handles=[Patch(color=colour, label=label) for label, colour in _BARS.values()])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
