"""The ``Conv1D`` of Hugging Face transformers (GPT-2's linear layer with a transposed weight), recognised by name.

fastnn does not import transformers: the fast class is made at run time (``_made_classes.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._made_classes import Half, fast_class
from ..ops import gemm
from .linear import PackableWeight


class Conv1D(Half, PackableWeight):
    """``y = x W + b`` with weight ``(in, out)``: the half of the fast class that is known beforehand."""

    weight_is_transposed = True

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if self._packed_weight is not None and not torch.compiler.is_compiling():
            output = self._linear_packed(x, weight, bias)
            if output is not None:
                return output
        rows = gemm.addmm(bias, x.reshape(-1, x.size(-1)), weight)
        return rows.view(*x.shape[:-1], self.nf)


def conv1d_class(original: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The fast subclass of this ``Conv1D`` class."""
    return fast_class(Conv1D, original)


def is_conv1d(module: torch.nn.Module) -> bool:
    """Whether the module is transformers' ``Conv1D``, or a copy of it: by name, attributes and, if possible, a trial.

    Classes of the package transformers are trusted. Any other class of that name has to give the product's answer on
    two rows of random numbers first.
    """
    kind = type(module)
    if kind.__name__ != "Conv1D" or kind.__bases__ != (torch.nn.Module,):
        return False
    weight, bias, nf = (getattr(module, name, None) for name in ("weight", "bias", "nf"))
    if not (isinstance(weight, Tensor) and isinstance(bias, Tensor) and isinstance(nf, int)):
        return False
    if set(module._parameters) != {"weight", "bias"} or module._modules or module._buffers:
        return False
    if weight.dim() != 2 or weight.shape[1] != nf or bias.shape != (nf,):
        return False
    if kind.__module__.split(".")[0] == "transformers":
        return True
    if weight.is_meta or weight.numel() == 0:
        return False
    with torch.no_grad():
        # A generator of its own: the trial must not move the user's random numbers.
        noise = torch.rand(2, weight.shape[0], generator=torch.Generator().manual_seed(0))
        trial = noise.to(device=weight.device, dtype=weight.dtype)
        try:
            answer = kind.forward(module, trial)
        except Exception:  # whatever it is, it is not the layer we know
            return False
        expected = torch.addmm(bias, trial, weight)
        return isinstance(answer, Tensor) and answer.shape == expected.shape and torch.equal(answer, expected)


__all__ = ["conv1d_class", "is_conv1d"]
