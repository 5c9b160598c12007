"""Trains a classifier of handwritten digits, prunes it in two ways, and tells what each one costs and saves.

python examples/prune_model.py [--epochs 15] [--width 1024] [--resnet]

Weights that are zero save no time: the kernels are dense. Channels that are gone do. A few epochs of training bring the
accuracy back. With ``--resnet`` a ResNet-50 with random weights is narrowed as well, and timed.
"""

import argparse
import copy
import sys

import torch
from quantize_model import train
from rich.console import Console
from rich.table import Table

import fastnn
from fastnn.bench import compare
from fastnn.demo import Digits
from fastnn.quant import prune_channels_, prune_magnitude_, remove_masks_

EPOCHS, WIDTH = 15, 1024
#: Points that a pruned model may lose after training: two images of the test.
LOSS = 2 / 360


def accuracy(model, digits):
    with torch.no_grad():
        return (model(digits.test_x).argmax(1) == digits.test_y).double().mean().item()


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def timed(models, x, seconds):
    """Milliseconds a forward of each model, by turns."""

    def forward(model):
        def call(x):
            with torch.inference_mode():
                return model(x)

        return call

    timing = compare({name: forward(model) for name, model in models.items()}, [(x,)], seconds=seconds)
    return {name: 1e3 * timing.median(name) for name in models}


def table(title, models, columns, times):
    found = Table("model", "parameters", *columns, "ms", "faster by", title=title, title_justify="left")
    dense = next(iter(times.values()))
    for name, model in models.items():
        cells = [column[name] for column in columns.values()]
        found.add_row(name, f"{parameters(model):,}", *cells, f"{times[name]:.3f}", f"{dense / times[name]:.2f}")
    Console().print(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--width", type=int, default=WIDTH, help="of the hidden layers")
    parser.add_argument("--resnet", action="store_true")
    options = parser.parse_args()
    full = options.epochs >= EPOCHS

    torch.manual_seed(0)
    digits = Digits.load()
    model = fastnn.nn.MLP(64, [options.width, options.width], 10)
    train(model, digits, options.epochs)
    models = {"dense": model}
    for share in (0.5, 0.9):
        models[f"{share:.0%} of the weights zero"] = prune_magnitude_(copy.deepcopy(model), share)
    for share in (0.5, 0.75, 0.9):
        models[f"{share:.0%} of the channels gone"] = prune_channels_(copy.deepcopy(model), share, multiple=16)
    before = {name: accuracy(each, digits) for name, each in models.items()}
    for name, each in models.items():
        if name != "dense":
            train(each, digits, max(1, options.epochs // 3))
            remove_masks_(each)
    after = {name: accuracy(each, digits) for name, each in models.items()}
    columns = {
        title: {name: f"{value:.2%}" for name, value in found.items()}
        for title, found in (("accuracy", before), ("after training", after))
    }
    x = digits.train_x[:256]
    table("256 digits at a time", models, columns, timed(models, x, 4.0 if full else 0.2))

    if options.resnet:
        resnet = fastnn.models.resnet50().eval()
        models = {"dense": resnet}
        for share in (0.25, 0.5, 0.75):
            narrow = prune_channels_(copy.deepcopy(resnet), share, multiple=16)
            models[f"{share:.0%} of the inner channels gone"] = narrow
        times = timed(models, torch.randn(1, 3, 224, 224), 10.0)
        table("ResNet-50, an image at a time", models, {}, times)

    failed = [name for name in after if full and after[name] < after["dense"] - LOSS - 1e-9]
    if failed:
        print(f"FAILED: these lose more than two images: {', '.join(failed)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
