"""The multi-layer perceptron as one block."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .activation import GELU, ReLU, ReLU6, Sigmoid, SiLU, Tanh, activation_name
from .dropout import Dropout
from .hooks import any_global_hook, unwatched
from .linear import Linear

_DROPOUTS = (Dropout, torch.nn.Dropout)

_ACTIVATIONS: dict[str, Callable[[], torch.nn.Module]] = {
    "relu": ReLU,
    "relu6": ReLU6,
    "gelu": GELU,
    "gelu_tanh": lambda: GELU(approximate="tanh"),
    "silu": SiLU,
    "sigmoid": Sigmoid,
    "tanh": Tanh,
}


class MLP(torch.nn.Sequential):
    """Linear layers with an activation between each two: ``W_L act(... act(W_1 x + b_1) ...) + b_L``.

    Shapes: input ``(*, in_features)``, output ``(*, out_features)``.

    Args:
        in_features: size of an input row, at least 0.
        hidden_features: sizes of the hidden layers, in order; an empty list gives one linear layer.
        out_features: size of an output row.
        activation: ``"relu"``, ``"relu6"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"``, ``"sigmoid"`` or ``"tanh"``, or a callable
            that makes a fresh activation module, such as a module class.
        bias: whether the linear layers have a bias.
        device, dtype: of the parameters, as for :class:`torch.nn.Linear`.

    Raises:
        ValueError: the name of the activation is unknown.
        TypeError: ``hidden_features`` is no sequence of integers, or ``activation`` makes no module.

    It is a :class:`torch.nn.Sequential` of the same layers (``state_dict`` keys ``0.weight``, ``0.bias``,
    ``2.weight``, ...), and :func:`fastnn.revert` turns it into exactly that. Each linear layer and the activation
    after it run as one fused call as long as both are fastnn's own classes and nobody watches them: with a hook on
    either, a global module hook, or a ``forward`` set on an instance, the layers run one by one as in ``Sequential``.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: Sequence[int],
        out_features: int,
        activation: str | Callable[[], torch.nn.Module] = "relu",
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(hidden_features, (str, int)) or not all(isinstance(size, int) for size in hidden_features):
            raise TypeError(f"MLP: hidden_features must be a sequence of integers, got {hidden_features!r}")
        if isinstance(activation, str):
            if activation not in _ACTIVATIONS:
                raise ValueError(f"MLP: activation must be one of {sorted(_ACTIVATIONS)}, got {activation!r}")
            activation = _ACTIVATIONS[activation]
        elif not callable(activation) or isinstance(activation, torch.nn.Module):
            # One module shared by all places would share its hooks and its state as well.
            raise TypeError(
                f"MLP: activation must be a name or a callable that makes a module, got {type(activation).__name__}"
            )
        sizes = [in_features, *hidden_features, out_features]
        layers: list[torch.nn.Module] = []
        for rows, columns in itertools.pairwise(sizes):
            if layers:
                made = activation()
                if not isinstance(made, torch.nn.Module):
                    raise TypeError(f"MLP: activation must make a torch.nn.Module, it made {type(made).__name__}")
                layers.append(made)
            layers.append(Linear(rows, columns, bias=bias, device=device, dtype=dtype))
        super().__init__(*layers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            # Sequential would call this class's constructor with the layers.
            return torch.nn.Sequential(*list(self._modules.values())[index])
        return super().__getitem__(index)

    def forward(self, input: Tensor) -> Tensor:
        return run_layers(self, input)


def run_layers(
    layers: Sequence[torch.nn.Module] | torch.nn.Sequential, input: Tensor, residual: Tensor | None = None
) -> Tensor:
    """Calls one layer after the other; each linear layer and the activation after it are one fused call, as in :class:`MLP`.

    ``layers`` may be a :class:`torch.nn.Sequential` itself. ``residual`` is added to what the last one gives: in the same
    call where that is a linear layer with a packed weight, and only dropouts that drop nothing come after it.
    """
    fusing = not any_global_hook()
    layers = list(layers._modules.values()) if isinstance(layers, torch.nn.Sequential) else layers
    if fusing:
        layers = [layer for layer in layers if not passes(layer)]
    position = 0
    while position < len(layers):
        layer = layers[position]
        position += 1
        if fusing and position < len(layers) and fuses_activation(layer) and unwatched(layer):
            following = layers[position]
            name = activation_name(following)
            if name is not None and unwatched(following):
                input = layer.forward_act(input, name)
                position += 1
                continue
        if fusing and residual is not None and position == len(layers) and type(layer) is Linear and unwatched(layer):
            return layer.forward_add(input, residual)
        input = layer(input)
    return input if residual is None else input + residual


def passes(layer: torch.nn.Module) -> bool:
    """Whether it is a dropout that gives what it is given, and nobody would see that it was not called."""
    return type(layer) in _DROPOUTS and not layer.training and unwatched(layer)


#: Classes with a ``forward_act`` that goes with their forward, by exact type. fastnn.quant adds its own.
FUSING: tuple[type[torch.nn.Module], ...] = (Linear,)


def fuses_activation(layer: torch.nn.Module) -> bool:
    """Whether the layer computes an activation after it in the same call."""
    return type(layer) in FUSING
