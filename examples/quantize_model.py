"""Trains a classifier of handwritten digits, quantizes it in every way, and tells what each one costs and gains.

python examples/quantize_model.py [--epochs 15] [--width 512] [--png quantized.png]

The digits are scikit-learn's: 1,797 images of 8×8 pixels, of which a fifth is kept for the test. At full length the int8 models
may lose at most half a point of accuracy, or two images of the test, which is a little more.
"""

import argparse
import copy
import io
import sys

import torch
import torch.nn.functional as F
from rich.console import Console

import fastnn
from fastnn.demo import Digits
from fastnn.quant import (
    Float8WeightOnly,
    Int4WeightOnly,
    Int8Dynamic,
    Int8Static,
    Int8WeightOnly,
    dequantize_,
    quantize_,
)

EPOCHS, WIDTH, BATCH = 15, 512, 64
LOSS = 2 / 360


def train(model, digits, epochs):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(digits.train_x)).split(BATCH):
            loss = F.cross_entropy(model(digits.train_x[rows]), digits.train_y[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--width", type=int, default=WIDTH, help="of the hidden layers")
    parser.add_argument("--png", help="where to write a picture of the first scheme's report")
    options = parser.parse_args()

    torch.manual_seed(0)
    console = Console()
    digits = Digits.load()
    model = fastnn.nn.MLP(64, [options.width, options.width], 10)
    train(model, digits, options.epochs)
    model.eval()

    schemes = {
        "int8, inputs quantized in each call": Int8Dynamic(),
        "int8, inputs quantized by what the training images were": Int8Static(digits.train_x.split(256), "percentile"),
        "int8 weights": Int8WeightOnly(),
        "int4 weights in groups of 32": Int4WeightOnly(),
        "float8 weights": Float8WeightOnly(),
    }
    failed = []
    for name, config in schemes.items():
        console.rule(name)
        quantized = quantize_(copy.deepcopy(model), config)
        report = fastnn.quant.report(
            quantized,
            [digits.test_x],
            reference=model,
            labels=[digits.test_y],
            seconds=1.0 if options.epochs >= EPOCHS else 0.1,
        )
        report.show(console)
        before, after = report.accuracy
        if name.startswith("int8") and after < before - LOSS:
            failed.append(name)
        if options.png and name == next(iter(schemes)):
            report.plot(options.png)

    # What is saved is the quantized weights; a model that is quantized the same way loads them.
    console.rule("Saved and loaded")
    quantized = quantize_(model, Int4WeightOnly())
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    print(f"{file.tell():,} bytes")
    file.seek(0)
    other = quantize_(fastnn.nn.MLP(64, [options.width, options.width], 10), Int4WeightOnly())
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(digits.test_x), quantized(digits.test_x))
    print(dequantize_(other))

    if options.epochs >= EPOCHS and failed:
        print(f"FAILED: these lose more than two images: {', '.join(failed)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
