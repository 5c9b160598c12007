"""Linear and bilinear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional


class PackableWeight:
    """What :func:`fastnn.prepack_` needs of a layer: a place for the packed weight, which copies leave behind.

    A copy (``copy.deepcopy``, pickle, ``torch.save``) starts without a packed weight: it has parameters of its own,
    at other addresses, and packed memory means nothing to another process.
    """

    # A class attribute, so that a layer which was never prepacked carries nothing and the look-up stays cheap.
    _packed_weight = None

    #: The name of the parameter that is packed.
    packed_parameter = "weight"

    #: False for a weight of shape (out, in), as torch.nn.Linear has it.
    weight_is_transposed = False

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_packed_weight", None)
        return state

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__.pop("_packed_weight", None)
        super()._load_from_state_dict(*args, **kwargs)

    def _linear_packed(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none"
    ) -> Tensor | None:
        """The layer's result from its packed weight, or None where that cannot be used."""
        packed = self._packed_weight
        if packed is None:  # another thread has just given it up
            return None
        if not packed.is_current(weight):
            self.__dict__.pop("_packed_weight", None)
            return None
        return packed.linear(input, weight, bias, activation)


class Linear(PackableWeight, torch.nn.Linear):
    """``y = x W^T + b``, as :class:`torch.nn.Linear`.

    Shapes: input ``(*, in_features)``, weight ``(out_features, in_features)``, bias ``(out_features,)``, output
    ``(*, out_features)``. Dtypes, precision and errors are those of :func:`fastnn.functional.linear`.
    """

    def forward(self, input: Tensor) -> Tensor:
        # Reading the dict skips Module.__getattr__, which costs more than the checks of a small product. A weight
        # that is no parameter now (weight_norm, pruning, a parametrization) is not in there.
        parameters = self._parameters
        try:
            weight = parameters["weight"]
            bias = parameters["bias"]
        except KeyError:
            weight = self.weight
            bias = self.bias
        if self._packed_weight is not None and not torch.compiler.is_compiling():
            output = self._linear_packed(input, weight, bias)
            if output is not None:
                return output
        return functional.linear(input, weight, bias)

    def forward_act(self, input: Tensor, activation: str) -> Tensor:
        """``activation(forward(input))`` in one call; the name is one of :func:`fastnn.functional.linear_act`'s."""
        weight = self.weight
        bias = self.bias
        if self._packed_weight is not None and not torch.compiler.is_compiling():
            output = self._linear_packed(input, weight, bias, activation)
            if output is not None:
                return output
        return functional.linear_act(input, weight, bias, activation)

    def forward_add(self, input: Tensor, residual: Tensor, in_place: bool = False) -> Tensor:
        """``forward(input) + residual``, or ``+=`` if ``in_place``: one call where the weight is packed
        (:func:`fastnn.prepack_`)."""
        packed = self._packed_weight
        if packed is not None and not torch.compiler.is_compiling():
            weight = self.weight
            if packed.is_current(weight):
                output = packed.linear_add(input, weight, self.bias, residual)
                if output is not None:
                    return output
        output = self.forward(input)
        return output.add_(residual) if in_place else output + residual


class NonDynamicallyQuantizableLinear(Linear, torch.nn.modules.linear.NonDynamicallyQuantizableLinear):
    """The ``out_proj`` of :class:`torch.nn.MultiheadAttention`, a linear layer with a name of its own.

    As in torch, the attention reads its weight and bias and does not call it, so that hooks on it see nothing.
    """


class Bilinear(torch.nn.Bilinear):
    """``y_o = x1^T W_o x2 + b_o``, as :class:`torch.nn.Bilinear`.

    Shapes: ``input1 (*, in1_features)``, ``input2 (*, in2_features)``, weight ``(out_features, in1_features,
    in2_features)``, bias ``(out_features,)``, output ``(*, out_features)``. Dtypes, precision and errors are those of
    :func:`fastnn.functional.bilinear`.
    """

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        return functional.bilinear(input1, input2, self.weight, self.bias)
