"""Small models whose layers follow each other in ways that equalization and pruning must tell apart."""

import torch
import torch.nn.functional as F

import fastnn

T, nn = torch.nn, fastnn.nn


def mlp():
    return fastnn.nn.MLP(13, [17, 11], 5)


def mixed_mlp():
    """Leaky relu, one PReLU parameter, dropout; torch's and fastnn's classes."""
    return T.Sequential(
        T.Linear(13, 17), T.LeakyReLU(0.1), nn.Linear(17, 11), T.PReLU(), T.Dropout(0.3), nn.Linear(11, 5)
    )


def with_norms():
    """Batch norms after linear layers."""
    return T.Sequential(
        nn.Linear(13, 17), nn.BatchNorm1d(17), nn.ReLU(), T.Linear(17, 11), T.BatchNorm1d(11), T.Linear(11, 5)
    )


def depthwise():
    """A convolution, a depthwise one, one to other channels, each with a norm; then a flattened map."""
    return T.Sequential(
        *(nn.Conv2d(3, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7), nn.ReLU()),
        *(nn.Conv2d(7, 7, 3, groups=7, bias=False), nn.BatchNorm2d(7), T.PReLU(7)),
        *(nn.Conv2d(7, 11, 1), T.BatchNorm2d(11), T.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(T.Flatten(), nn.Linear(11 * 9, 6), T.ReLU(), T.Linear(6, 5)),
    )


def grouped():
    return T.Sequential(
        T.Conv1d(3, 8, 3), T.ReLU(), T.Conv1d(8, 6, 2, groups=2), T.ReLU(), T.AvgPool1d(2), T.Conv1d(6, 4, 1)
    )


class Branches(T.Module):
    """One convolution whose result two others read, and functions instead of modules."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.left = nn.Conv2d(8, 4, 1)
        self.right = nn.Conv2d(8, 4, 3, padding=1)
        self.head = T.Linear(4, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.relu(self.left(x)) + F.relu(self.right(x))
        return self.head(y.mean((2, 3)))


class Residual(T.Module):
    """A block with a shortcut, between two layers."""

    def __init__(self):
        super().__init__()
        self.first = T.Linear(13, 8)
        self.inner = T.Linear(8, 12)
        self.outer = T.Linear(12, 8)
        self.last = T.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.first(x))
        return self.last(x + self.outer(F.relu(self.inner(x))))


class Viewed(T.Module):
    """A map that is flattened by view, as in old tutorials."""

    def __init__(self):
        super().__init__()
        self.conv = T.Conv2d(3, 4, 3)
        self.fc = T.Linear(4 * 36, 7)
        self.out = T.Linear(7, 5)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        x = x.view(x.size(0), -1)
        return self.out(self.fc(x).relu())


#: Makes a model, the shape of its input, and how many of its layers hand their channels to others.
NETS = {
    "mlp": (mlp, (4, 13), 2),
    "mixed mlp": (mixed_mlp, (4, 3, 13), 2),
    "norms": (with_norms, (4, 13), 2),
    "depthwise": (depthwise, (2, 3, 8, 8), 4),
    "grouped": (grouped, (2, 3, 13), 2),
    "branches": (Branches, (2, 3, 8, 8), 1),
    "residual": (Residual, (4, 13), 1),
    "viewed": (Viewed, (2, 3, 8, 8), 2),
}


def make(name):
    """The model in float64, in eval mode, with weights and statistics of very different sizes; and an input."""
    build, shape, _ = NETS[name]
    torch.manual_seed(3)
    model = build().double().eval()
    for module in model.modules():
        if isinstance(module, (*fastnn.quant.links.LAYERS, *fastnn.quant.links.BATCH_NORM)):
            spread = torch.logspace(-1, 1, module.weight.shape[0], dtype=torch.float64)
            module.weight.data *= spread[torch.randperm(len(spread))].view(-1, *[1] * (module.weight.dim() - 1))
        if isinstance(module, fastnn.quant.links.BATCH_NORM):
            module.running_mean.normal_()
            module.running_var.uniform_(0.1, 4.0)
            module.bias.data.normal_()
        if isinstance(module, T.PReLU):
            module.weight.data.uniform_(-0.5, 0.5)
    return model, torch.randn(shape, dtype=torch.float64)
