"""The rms norms of Hugging Face transformers and of code like it (``LlamaRMSNorm``, ``T5LayerNorm``, ...), recognised by
the shape of their forward.

fastnn does not import transformers: the fast classes are made at run time (``_made_classes.py``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import functional
from .._made_classes import Half, fast_class

_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class NamedRMSNorm(Half):
    """``x * rsqrt(mean(x²) + eps) * weight``: the half of the fast class that is known beforehand."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        weight, eps = self.weight, _eps_of(self)
        hidden_states = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(hidden_states, Tensor) or hidden_states.dtype is not weight.dtype or eps is None:
            # Further arguments, and what comes of two dtypes, each of these classes decides for itself.
            return self._original_class.forward(self, *args, **kwargs)
        return functional.rms_norm(hidden_states, weight.shape, weight, eps)


def rms_norm_class(original: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The fast subclass of this class."""
    return fast_class(NamedRMSNorm, original)


def _eps_of(module: Any) -> float | None:
    """The one number of these names that the module holds, or None."""
    found = [module.__dict__[name] for name in _NAMES if name in module.__dict__]
    return found[0] if len(found) == 1 and type(found[0]) is float else None


def is_named_rms_norm(kind: type) -> bool:
    """Whether the class is called as these are. Those of torch and of fastnn have their own line in the table."""
    name = kind.__name__
    return (name.endswith("RMSNorm") or name == "T5LayerNorm") and not kind.__module__.startswith(("torch.", "fastnn."))


def is_rms_norm(module: torch.nn.Module) -> bool:
    """Whether the module computes ``x * rsqrt(mean(x²) + eps) * weight``: by name, attributes and a trial.

    It has to give the formula's answer on two sets of rows: one in which eps decides, and one in which it does not.
    Those that multiply by 1 + weight, or leave something out, do not.
    """
    kind = type(module)
    if not is_named_rms_norm(kind) or kind.__bases__ != (torch.nn.Module,):
        return False
    weight, eps = getattr(module, "weight", None), _eps_of(module)
    if not isinstance(weight, Tensor) or eps is None or not 0 <= eps < 1:
        return False
    if set(module._parameters) != {"weight"} or module._modules or module._buffers:
        return False
    if weight.dim() != 1 or weight.is_meta or weight.dtype not in _FLOATS:
        return False
    if weight.numel() < 2:
        return False  # one number may be that of rows of any length
    # A weight of its own: that of the module may be all ones, which would not tell weight from 1.
    generator = torch.Generator().manual_seed(0)
    columns = torch.rand(weight.numel(), generator=generator) + 0.5
    noise = torch.randn(3, weight.numel(), generator=generator)
    trial = torch.nn.Parameter(columns.to(weight), requires_grad=False)
    twin = kind.__new__(kind)
    twin.__dict__.update(module.__dict__, _parameters={"weight": trial})
    with torch.no_grad():
        for size in (1.0, math.sqrt(max(eps, 1e-12))):
            x = (noise * size).to(weight)
            try:
                answer = kind.forward(twin, x)
            except Exception:  # whatever it is, it is not the layer we know
                return False
            if not isinstance(answer, Tensor) or answer.shape != x.shape or answer.dtype is not x.dtype:
                return False
            wide = x.double()
            expected = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * trial.double()
            # Three roundings in its dtype, and what squares in float32 lose.
            near = 4 * torch.finfo(weight.dtype).eps + 1e-6
            if not torch.allclose(answer.double(), expected, rtol=near, atol=near * 1e-3):
                return False
    return True


__all__ = ["is_named_rms_norm", "is_rms_norm", "rms_norm_class"]
