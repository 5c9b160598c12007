"""The activation layers of Hugging Face transformers, recognised by name and by what they answer.

fastnn does not import transformers: the fast classes are made at run time (``_made_classes.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import functional
from .._made_classes import Half, fast_class

_tanh = {"approximate": "tanh"}

#: The class's name, what computes the same, and torch's own form of that.
NAMED_ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Any]]] = {
    "GELUActivation": (functional.gelu, F.gelu, {}),
    "NewGELUActivation": (functional.gelu, F.gelu, _tanh),
    "AccurateGELUActivation": (functional.gelu, F.gelu, _tanh),
    "PytorchGELUTanh": (functional.gelu, F.gelu, _tanh),
    "GELUTanh": (functional.gelu, F.gelu, _tanh),
    "SiLUActivation": (functional.silu, F.silu, {}),
}


class NamedActivation(Half):
    """An activation elementwise, ``(*) -> (*)``, any layout: the half of the fast class that is known beforehand."""

    @staticmethod
    def members(original: type[torch.nn.Module]) -> dict[str, Any]:
        function, _, options = NAMED_ACTIVATIONS[original.__name__]
        return {"_activation_name": f"{function.__name__}_tanh" if options else function.__name__}

    def forward(self, input: Tensor) -> Tensor:
        function, _, options = NAMED_ACTIVATIONS[self._original_class.__name__]
        return function(input, **options)


def named_activation_class(original: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The fast subclass of this class."""
    return fast_class(NamedActivation, original)


def is_named_activation(module: torch.nn.Module) -> bool:
    """Whether the module has one of the names, nothing of its own, and the answers of that activation."""
    kind = type(module)
    known = NAMED_ACTIVATIONS.get(kind.__name__)
    if known is None or module._parameters or module._buffers or module._modules:
        return False
    _, theirs, options = known
    trial = torch.linspace(-8.0, 8.0, 97, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        try:
            answer = kind.forward(module, trial)
        except Exception:  # whatever it is, it is not the layer we know
            return False
        # The two kinds of GELU differ by 5e-4.
        expected = theirs(trial, **options)
    return isinstance(answer, Tensor) and answer.shape == trial.shape and torch.allclose(answer, expected, atol=1e-8)


__all__ = ["NAMED_ACTIVATIONS", "is_named_activation", "named_activation_class"]
