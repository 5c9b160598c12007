"""Trains LeNet-5 on scikit-learn's handwritten digits, on fastnn's layers and on torch's, to at least 98.5 %.

python examples/train_cnn.py [--epochs 30]

The 1,797 digits have 8×8 pixels; they are enlarged to the 32×32 that LeNet-5 expects. Both networks start from the same
weights and see the same batches.
"""

import argparse
import copy
import sys
import time

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import fastnn
from fastnn.demo import Digits

EPOCHS = 30
BATCH = 32
LEARNING_RATE = 2e-3
#: Of the 360 test images, after the default number of epochs.
ACCURACY = 0.985


def enlarged(rows):
    """(N, 64) numbers as (N, 1, 32, 32) images."""
    return F.interpolate(rows.view(-1, 1, 8, 8), size=(32, 32), mode="bilinear")


def train(models, images, labels, epochs, rate):
    """Trains each of the named models on the same batches; returns the seconds that each of them took.

    Only parameters that require a gradient are trained.
    """
    optimizers, schedules, seconds = {}, {}, dict.fromkeys(models, 0.0)
    steps = epochs * -(-len(images) // BATCH)
    for name, model in models.items():
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizers[name] = torch.optim.AdamW(trained, lr=rate)
        schedules[name] = torch.optim.lr_scheduler.OneCycleLR(optimizers[name], rate, total_steps=steps)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("", total=steps, loss="")
        for _ in range(epochs):
            for chosen in torch.randperm(len(images)).split(BATCH):
                # A shift of a pixel or two is the same digit to a reader, and another image to the network.
                batch = torch.roll(images[chosen], torch.randint(-2, 3, (2,)).tolist(), dims=(2, 3))
                losses = []
                for name, model in models.items():
                    start = time.perf_counter()
                    loss = F.cross_entropy(model(batch), labels[chosen], label_smoothing=0.1)
                    optimizers[name].zero_grad()
                    loss.backward()
                    optimizers[name].step()
                    schedules[name].step()
                    seconds[name] += time.perf_counter() - start
                    losses.append(f"{name} {loss.item():.4f}")
                progress.update(task, advance=1, loss=", ".join(losses))
    return seconds


def accuracy(model, images, labels):
    """The share of the images whose class comes out."""
    with torch.no_grad():
        return (model(images).argmax(1) == labels).double().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    epochs = parser.parse_args().epochs

    torch.manual_seed(0)
    digits = Digits.load()
    model = fastnn.models.LeNet5()
    models = {"fastnn": model, "torch": fastnn.revert(copy.deepcopy(model))}
    seconds = train(models, enlarged(digits.train_x), digits.train_y, epochs, LEARNING_RATE)

    test_images = enlarged(digits.test_x)
    reached = {name: accuracy(each, test_images, digits.test_y) for name, each in models.items()}
    for name in models:
        print(f"{name}: {reached[name]:.2%} of {len(test_images)} test images right, {seconds[name]:.1f} s of training")
    if epochs >= EPOCHS and reached["fastnn"] < ACCURACY:
        print(f"FAILED: at least {ACCURACY:.1%} is asked for")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
