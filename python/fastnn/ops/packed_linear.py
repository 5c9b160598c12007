"""linear with a weight that was packed beforehand: what that copy still stands for, and which calls may use it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .. import _state
from ..backends import cpu
from ._route import (
    PLAIN,
    dispatch_modes,
    functorch_active,
    is_autocast_enabled,
    is_grad_enabled,
    tracing_state,
)

#: For fewer rows, or fewer multiplications, the kernels are done sooner with the weight where it lies (measured on
#: weights of 256 to 4096).
FEWEST_ROWS = 16
LEAST_WORK = 1 << 20

_KERNELS = (None, "cpu")

_tensor_product = cpu.tensor_product


def why_not(weight: Tensor | None) -> str | None:
    """None if a weight of two dimensions can be packed, else the reason for people."""
    if type(weight) not in PLAIN:
        return f"its weight is a {type(weight).__name__}"
    if weight.dim() != 2:
        return f"its weight has {weight.dim()} dimensions"
    if weight.device.type != "cpu":
        return f"its weight is on {weight.device}"
    reason = cpu.supports("gemm", weight)
    if reason is not None:
        return f"its weight is {reason}"
    if weight.is_inference():
        return "its weight is an inference tensor, whose changes nothing counts"
    if weight.is_neg():
        return "its weight is a lazily negated view"
    if weight.numel() == 0:
        return "its weight is empty"
    return None


class PackedWeight:
    """A packed copy of the weight of one layer, and the state of the weight that it was made from."""

    __slots__ = (
        "__weakref__",
        "address",
        "dtype",
        "fewest",
        "in_features",
        "isa",
        "kind",
        "packed",
        "precision",
        "rows",
        "version",
        "weight",
    )

    def __init__(self, weight: Tensor, *, transposed: bool = False) -> None:
        """``weight`` is (out, in), or (in, out) if ``transposed``. :func:`why_not` must have agreed."""
        self.weight = weight
        # Holding the memory keeps its address from being given to another tensor while this copy is compared with it.
        self.rows = weight.detach().t() if transposed else weight.detach()
        self.version: int | None = weight._version
        self.address = weight.data_ptr()
        self.dtype = weight.dtype
        self.in_features = self.rows.shape[1]
        self.fewest = max(FEWEST_ROWS * self.in_features, LEAST_WORK // self.rows.shape[0])
        self.precision = cpu.precision(weight.dtype)
        self.isa = cpu.isa()
        self.packed = cpu.pack_weight(self.rows)
        self.kind = cpu.MATMUL if transposed else cpu.LINEAR
        _watch_optimizers(self)

    def is_current(self, weight: Tensor) -> bool:
        """Whether the weight is the tensor that was packed, at its address, and nothing has counted a change of it."""
        return (
            weight is self.weight
            and weight._version == self.version
            and weight.data_ptr() == self.address
            and weight.dtype is self.dtype
        )

    def linear_add(self, input: Any, weight: Tensor, bias: Tensor | None, residual: Any) -> Tensor | None:
        """input @ W + bias + residual from the packed weight, or None as :meth:`linear`; also without DLPack's table."""
        return _tensor_product(self.kind, input, weight, bias, 0, None, residual, self.packed, self.fewest)

    def linear(self, input: Any, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor | None:
        """activation(input @ W + bias) from the packed weight, or None where this call has to go the ordinary way.

        That is: a small product, for which the kernels read the weight in place faster; a gradient is wanted; anything traces
        or transforms; autocast is on; another backend, instruction set or float32 precision than at the time of
        packing; or arguments that the kernels do not take.
        """
        output = _tensor_product(
            self.kind, input, weight, bias, cpu.ACTIVATION[activation], None, None, self.packed, self.fewest
        )
        if output is not None:
            return output
        if type(input) not in PLAIN or input.layout is not torch.strided or not input.is_cpu:
            return None
        settings = _state.settings()
        if input.numel() < self.fewest and not settings.batch_invariant:
            return None
        if (
            input.dtype is not self.dtype
            or input.dim() == 0
            or dispatch_modes() != 0
            or functorch_active()
            or forward_ad._current_level >= 0
            or tracing_state() is not None
            or is_autocast_enabled("cpu")
            or input.is_nested
            or input.is_neg()
            or input.shape[-1] != self.in_features
            # torch's efficient zeros have elements and no memory.
            or (input.data_ptr() == 0 and input.numel() != 0)
        ):
            return None
        wants_grad = input.requires_grad or weight.requires_grad
        if bias is not None:
            if (
                type(bias) not in PLAIN
                or bias.dtype is not self.dtype
                or not bias.is_cpu
                or bias.shape != self.rows.shape[:1]
                or bias.is_neg()
            ):
                return None
            wants_grad = wants_grad or bias.requires_grad
        if (
            (wants_grad and is_grad_enabled())
            or settings.backend not in _KERNELS
            or self.precision != cpu.precision(self.dtype)
            or self.isa != cpu.isa()
        ):
            return None
        return cpu.linear(input, self.rows, bias, activation, self.packed)


_watched: weakref.WeakSet[PackedWeight] = weakref.WeakSet()
_watching = False


def _watch_optimizers(packed: PackedWeight) -> None:
    """The fused steps of torch's optimizers change parameters without counting a version, so they are watched."""
    global _watching
    _watched.add(packed)
    if not _watching:
        _watching = True
        register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _watched:
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for packed in list(_watched):
            if id(packed.weight) in stepped:
                packed.version = None
