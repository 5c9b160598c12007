"""What can be done for quantized weights without training: four bits, step by step, on three trained models.

python examples/quantize_improve.py [--steps 900] [--epochs 30]

A multilayer perceptron and a convolutional network read handwritten digits, a GPT predicts the characters of Python's help.
Each step's accuracy and its signal-to-noise ratio in the logits are compared with the float model's.
"""

import argparse
import copy
import sys

import char_gpt
import quantize_model
import torch
import train_cnn
from rich.console import Console
from rich.table import Table

import fastnn
from fastnn.demo import Digits
from fastnn.quant import Int4WeightOnly, Int8Dynamic, Int8Static, correct_bias_, equalize_, quantize_

EPOCHS, STEPS = 30, 900
#: Points of accuracy that int8 and the improved int4 may lose, and an answer more, since tests are small.
INT8_LOSS, INT4_LOSS = 0.5, 1.0


def trained_models(epochs, steps):
    """Name -> model, batches to calibrate it with, inputs and right answers to test it with."""
    digits = Digits.load()
    mlp = fastnn.nn.MLP(64, [128, 128], 10)
    images, test_images = (rows.view(-1, 1, 8, 8) for rows in (digits.train_x, digits.test_x))
    quantize_model.train(mlp, digits, epochs)
    yield "MLP", mlp.eval(), digits.train_x[:512].split(128), digits.test_x, digits.test_y

    nn, T = fastnn.nn, torch.nn
    cnn = T.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(T.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    train_cnn.train({"CNN": cnn}, images, digits.train_y, epochs, 2e-3)
    yield "CNN", cnn.eval(), images[:512].split(128), test_images, digits.test_y

    characters, text, test = char_gpt.load()
    gpt = fastnn.models.GPT(len(characters), char_gpt.BLOCK, n_layer=2, n_head=4, n_embd=128, dropout=0.0)
    char_gpt.train(gpt, text, steps)
    starts = torch.randint(len(text) - char_gpt.BLOCK, (64, 1))
    data = text[starts + torch.arange(char_gpt.BLOCK)].split(16)
    length = (len(test) - 1) // char_gpt.BLOCK * char_gpt.BLOCK
    count = min(200, steps)  # a short trial's test is short
    rows = (part.view(-1, char_gpt.BLOCK)[:count] for part in (test[:length], test[1 : length + 1]))
    yield "GPT", gpt.eval(), data, *rows


def schemes(model, data):
    """Name -> the quantized model."""
    equal = equalize_(copy.deepcopy(model))

    def made(config, start=model, **options):
        return quantize_(copy.deepcopy(start), config, **options)

    yield "int8 dynamic", made(Int8Dynamic())
    yield "int8 static", made(Int8Static(data, "mse"))
    for name, config in (("a row", Int4WeightOnly(None)), ("groups of 32", Int4WeightOnly(32))):
        yield f"int4, scale for {name}", made(config)
        yield "  equalized", made(config, equal)
        yield "  scales of least squared error", made(config, rounding="mse")
        yield "  those, bias corrected", correct_bias_(made(config, rounding="mse"), model, data)
        yield "  adaround", made(config, rounding="adaround", calibration_data=data)
        both = made(config, equal, rounding="adaround", calibration_data=data)
        yield "  equalized, adaround", both
        yield "  equalized, adaround, bias corrected", correct_bias_(copy.deepcopy(both), equal, data)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the two that read digits")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the GPT")
    options = parser.parse_args()
    torch.manual_seed(0)
    failed = []
    for name, model, data, x, y in trained_models(options.epochs, options.steps):
        table = Table("weights", "right", "lost, points", "signal to noise", title=name, title_justify="left")
        with torch.no_grad():
            logits = model(x)
        right = 100 * (logits.argmax(-1) == y).double().mean().item()
        table.add_row("float32", f"{right:.2f} %", "", "")
        for scheme, quantized in schemes(model, data):
            with torch.no_grad():
                found = quantized(x)
            now = 100 * (found.argmax(-1) == y).double().mean().item()
            noise = 10 * torch.log10(logits.square().mean() / (found - logits).square().mean()).item()
            table.add_row(scheme, f"{now:.2f} %", f"{right - now:+.2f}", f"{noise:.1f} dB")
            allowed = INT8_LOSS if "int8" in scheme else INT4_LOSS if scheme.endswith("corrected") else 100.0
            if right - now > allowed + 100 / y.numel():
                failed.append(f"{name}, {scheme.strip()}")
        Console().print(table)
    if failed and options.epochs >= EPOCHS and options.steps >= STEPS:
        print(f"FAILED: these lose too much: {'; '.join(failed)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
