"""The schemes of :func:`fastnn.quant.quantize_`: one frozen dataclass each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from .observers import OBSERVERS, Observer


def inputs_of(data: Any, name: str) -> Iterable[Any]:
    """The inputs in ``data``; one tensor or one mapping is one input. TypeError, with the function and argument in
    ``name``, for what holds none."""
    if isinstance(data, (Tensor, Mapping)):
        return [data]
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise TypeError(f"{name} must be an iterable of inputs, got {type(data).__name__}")
    return data


class Config:
    """What all schemes have in common: none is made of this class itself."""

    #: The scheme of the weights, as :func:`fastnn.quantize` names it.
    weight_dtype: str
    #: How many neighbours in a row of the weight share a scale; None: the whole row.
    group_size: int | None = None
    #: Whether the weights have no zero point.
    symmetric: bool = True


def check_config(function: str, config: Any) -> None:
    """Raises TypeError for what is no scheme, as the argument of ``function``."""
    if not isinstance(config, Config):
        hint = f"; make one: {config.__name__}()" if isinstance(config, type) and issubclass(config, Config) else ""
        raise TypeError(
            f"{function}: config must be one of fastnn.quant's, such as Int8Dynamic(), got {config!r}{hint}"
        )


def _check_group_size(config: Config) -> None:
    size = config.group_size
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f"{type(config).__name__}: group_size must be a positive integer or None, got {size!r}")


@dataclasses.dataclass(frozen=True)
class Int8Dynamic(Config):
    """Weights int8, symmetric, a scale a row; inputs uint8, asymmetric, with a scale and zero point for each of their rows,
    chosen in each call. Products are sums of integers, and exact."""

    weight_dtype = "int8"


@dataclasses.dataclass(frozen=True)
class Int8Static(Config):
    """Weights as in :class:`Int8Dynamic`; inputs uint8 with one scale and zero point a layer, chosen from what the layer
    sees while the model runs on ``calibration_data``.

    Args:
        calibration_data: an iterable of inputs, each a tensor, a tuple or list of positional arguments, or a mapping of
            keyword arguments. One tensor or one mapping counts as one input. The model runs in eval mode.
        observer: what chooses the range of a layer's inputs: "minmax", "moving_average", "percentile" or "mse" (see
            :mod:`fastnn.quant.observers`), or a callable that makes an :class:`~fastnn.quant.observers.Observer` for a layer.

        ranges: instead of data, the ranges that were found before: see :meth:`from_state_dict`.

    Raises ValueError for another name, TypeError for data that is no iterable; :func:`~fastnn.quant.quantize_` raises
    ValueError where there is no data.
    """

    calibration_data: Iterable[Any] = dataclasses.field(repr=False)
    observer: str | Callable[[], Observer] = "minmax"
    ranges: Mapping[str, tuple[float, float]] | None = dataclasses.field(default=None, repr=False)

    weight_dtype = "int8"

    def __post_init__(self) -> None:
        self.inputs()
        if not callable(self.observer) and self.observer not in tuple(OBSERVERS):
            names = ", ".join(repr(name) for name in OBSERVERS)
            raise ValueError(f"Int8Static: observer must be one of {names} or a callable, got {self.observer!r}")

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> Int8Static:
        """The scheme of a model that was quantized so and whose state this is: its layers, and the scales and zero points of
        their inputs, without data. The weights are loaded afterwards::

            model = quantize_(Net(), Int8Static.from_state_dict(state))
            model.load_state_dict(state)

        Layers that the state has as floating-point numbers stay so. Raises TypeError for what is no mapping, ValueError for a
        state without such layers, or whose scales or zero points are out of range.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"Int8Static: state_dict must be a mapping of tensors, got {type(state_dict).__name__}")
        ranges = {}
        for key, scale in state_dict.items():
            if key.rpartition(".")[2] not in ("input_scale", "output_scale", "residual_scale"):
                continue
            name = key.removesuffix("_scale")
            zero_point = state_dict.get(f"{name}_zero_point")
            if not isinstance(scale, Tensor) or not isinstance(zero_point, Tensor) or zero_point.is_floating_point():
                continue
            if scale.numel() != 1 or not 2.0**-126 <= scale.item() < math.inf:
                raise ValueError(f"Int8Static: state_dict: expected one positive number as {key!r}, got {scale}")
            if zero_point.numel() != 1 or not 0 <= zero_point.item() <= 255:
                raise ValueError(f"Int8Static: state_dict: expected 0 to 255 as '{name}_zero_point', got {zero_point}")
            step, zero = scale.item(), zero_point.item()
            ranges[name] = (-zero * step, (255 - zero) * step)
        if not ranges:
            raise ValueError(
                "Int8Static: state_dict: expected that of a model quantized with Int8Static, got no scale of inputs"
            )
        return cls((), ranges=ranges)

    def inputs(self) -> Iterable[Any]:
        """The inputs in ``calibration_data``."""
        return inputs_of(self.calibration_data, "Int8Static: calibration_data")

    def make_observer(self) -> Observer:
        """A fresh observer. Raises TypeError if the callable makes something else."""
        made = OBSERVERS[self.observer]() if isinstance(self.observer, str) else self.observer()
        if not isinstance(made, Observer):
            raise TypeError(f"Int8Static: observer must make an Observer, it made {type(made).__name__}")
        return made


@dataclasses.dataclass(frozen=True)
class Int8WeightOnly(Config):
    """Weights int8, symmetric, a scale a row or for each ``group_size`` neighbours of one; inputs as they are.

    Raises ValueError for a group size that is no positive integer.
    """

    group_size: int | None = None

    weight_dtype = "int8"
    __post_init__ = _check_group_size


@dataclasses.dataclass(frozen=True)
class Int4WeightOnly(Config):
    """Weights of four bits, a scale for each ``group_size`` neighbours of a row (None: a row); inputs as they are.

    ``symmetric``: int4 without zero points, else uint4 with them, which spends no code on values that a group has not.
    Raises ValueError for a group size that is no positive integer.
    """

    group_size: int | None = 32
    symmetric: bool = True

    __post_init__ = _check_group_size

    @property
    def weight_dtype(self) -> str:
        return "int4" if self.symmetric else "uint4"


@dataclasses.dataclass(frozen=True)
class Float8WeightOnly(Config):
    """Weights float8 (e4m3fn), a scale a row; inputs as they are."""

    weight_dtype = "float8_e4m3fn"


__all__ = ["Config", "Float8WeightOnly", "Int4WeightOnly", "Int8Dynamic", "Int8Static", "Int8WeightOnly"]
