"""Finetunes a network: LeNet-5 learns the digits 0 to 4, then its last layer alone learns 5 to 9.

python examples/finetune.py [--epochs 15]
"""

import argparse

import torch
from train_cnn import accuracy, enlarged, train

import fastnn
from fastnn.demo import Digits


def halves(rows, labels):
    """The images of 0 to 4 and those of 5 to 9, each with classes from 0 to 4."""
    images, low = enlarged(rows), labels < 5
    return (images[low], labels[low]), (images[~low], labels[~low] - 5)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    epochs = parser.parse_args().epochs

    torch.manual_seed(0)
    digits = Digits.load()
    low, high = halves(digits.train_x, digits.train_y)
    low_test, high_test = halves(digits.test_x, digits.test_y)

    model = fastnn.models.LeNet5(num_classes=5)
    train({"0 to 4": model}, *low, epochs, rate=2e-3)
    print(f"the whole network, digits 0 to 4: {accuracy(model, *low_test):.2%} of {len(low_test[1])} test images right")

    # Freeze the body. The last layer is replaced after that, so that the new one is not frozen.
    model.requires_grad_(False)
    model.fc3 = fastnn.nn.Linear(model.fc3.in_features, 5)
    body = {name: parameter.clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, parameter in model.named_parameters():
        print(f"{'trains' if parameter.requires_grad else 'frozen'}  {name:12} {tuple(parameter.shape)}")

    print(f"a new last layer, digits 5 to 9: {accuracy(model, *high_test):.2%} before training")
    train({"5 to 9": model}, *high, epochs, rate=2e-2)
    print(f"the last layer trained: {accuracy(model, *high_test):.2%} of {len(high_test[1])} test images right")
    for name, before in body.items():
        assert torch.equal(model.get_parameter(name), before), f"{name} was frozen and has changed"


if __name__ == "__main__":
    main()
