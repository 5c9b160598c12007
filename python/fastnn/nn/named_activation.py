"""The activation layers of Hugging Face transformers, recognised by name and by what they answer.

fastnn does not import transformers. As for its ``Conv1D``, the fast class is made at run time as a subclass of the very class
that the module has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import functional

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


class _NamedActivation:
    """An activation elementwise, ``(*) -> (*)``, any layout: the half of the fast class that is known beforehand."""

    _original_class: type[torch.nn.Module]

    def forward(self, input: Tensor) -> Tensor:
        function, _, options = NAMED_ACTIVATIONS[self._original_class.__name__]
        return function(input, **options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made at run time, so that pickle cannot find it by name; the class under it can be found.
        return _make_instance, (self._original_class,), self.__dict__.copy()


@functools.cache
def named_activation_class(original: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The fast subclass of this class; one for each, however often it is asked for."""
    body = {"__module__": __name__, "__doc__": _NamedActivation.__doc__, "_original_class": original}
    return type(original.__name__, (_NamedActivation, original), body)


def _make_instance(original: type[torch.nn.Module]) -> torch.nn.Module:
    fast = named_activation_class(original)
    return fast.__new__(fast)


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
