"""torch tensors in, torch tensors out, for estimators whose methods know numpy."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

__all__ = ["TensorMixin", "takes_tensors", "to_numpy"]

_TAKES = ("fit", "partial_fit", "score", "decision_path", "cost_complexity_pruning_path")
_RETURNS = (
    "predict",
    "predict_proba",
    "predict_log_proba",
    "decision_function",
    "apply",
    "transform",
    "fit_transform",
    "fit_predict",
)
_YIELDS = ("staged_predict", "staged_predict_proba", "staged_decision_function")
_MARK = "_fastnn_takes_tensors"


def to_numpy(value: Any) -> Any:
    """A tensor as the array that shares its memory, or a copy where that is not the CPU's or of a type that numpy lacks
    (bfloat16 becomes float32); anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    if value.dtype == torch.bfloat16:
        value = value.float()
    if value.device.type != "cpu":
        value = value.cpu()
    return value.resolve_conj().resolve_neg().numpy()


def _to_tensor(value: Any, device: torch.device) -> Any:
    """Arrays, and lists of them, as tensors; what torch has no type for (strings) as it is."""
    if isinstance(value, list):
        return [_to_tensor(entry, device) for entry in value]
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.from_numpy(value if value.flags.writeable else value.copy()).to(device)
    return value


def _converted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    return [to_numpy(value) for value in args], {name: to_numpy(value) for name, value in kwargs.items()}


def _wrap(method: Any, kind: str) -> Any:
    def device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
        given = args[0] if args else kwargs.get("X")
        return given.device if isinstance(given, torch.Tensor) else None

    if kind == "takes":

        @functools.wraps(method)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = _converted(args, kwargs)
            return method(self, *args, **kwargs)

    elif kind == "returns":

        @functools.wraps(method)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            device = device_of(args, kwargs)
            if device is None:
                return method(self, *args, **kwargs)
            args, kwargs = _converted(args, kwargs)
            return _to_tensor(method(self, *args, **kwargs), device)

    else:

        @functools.wraps(method)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            device = device_of(args, kwargs)
            args, kwargs = _converted(args, kwargs)
            for result in method(self, *args, **kwargs):
                yield result if device is None else _to_tensor(result, device)

    setattr(wrapped, _MARK, True)
    return wrapped


def takes_tensors(method: Any) -> Any:
    """Marks a method that :class:`TensorMixin` is to leave as it is."""
    setattr(method, _MARK, True)
    return method


class TensorMixin:
    """First among the bases of an estimator: its methods that take data also take torch tensors, whose memory is read in
    place, and those that return predictions return tensors where X was one, on its device."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for kind, names in (("takes", _TAKES), ("returns", _RETURNS), ("yields", _YIELDS)):
            for name in names:
                method = getattr(cls, name, None)
                # What is no plain function is there only sometimes (scikit-learn's available_if), and stays as it is.
                if callable(method) and hasattr(method, "__code__") and not getattr(method, _MARK, False):
                    setattr(cls, name, _wrap(method, kind))
