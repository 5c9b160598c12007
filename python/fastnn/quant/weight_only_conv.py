"""Convolutions of floating-point images with filters of few bits. They save memory and no time: filters are read once for all
positions of an image, and are made floating-point numbers again in each call."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional, nn
from ..backends.reference.quantize import FLOAT8, PACKED, STORAGE
from ..nn.conv import _Convolution
from ..ops._scheme import scheme
from ..ops.quantize import dequantize, quantize_dynamic
from .config import Config
from .links import CONV
from .modules import FLOATS, Quantized, class_before, describe, relative_error

#: What makes a convolution one, beside its tensors.
_GEOMETRY = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    *("transposed", "output_padding", "_reversed_padding_repeated_twice"),
)


class WeightOnlyConv(Quantized, _Convolution):
    """``y = conv(x, Ŵ) + b`` in the input's dtype, of one to three dimensions. Gradients flow to the input.

    A filter is a row, of K = channels / groups · the kernel's elements in row-major order. Rows that are not whole
    groups, or of
    an odd size where a byte holds two numbers, end with zeros: they have K' ≥ K elements.

    Args, of which the tensors become buffers:
        weight: (M, K'): int8 or float8; or uint8 with two integers of 4 bits a byte, (M, K' / 2).
        weight_scale: (M,), or (M, K' / group_size); float32.
        weight_zero_point: of the same shape, int32; None where there is none.
        bias: (M,), floating, or None.
        like: a convolution whose sizes, stride, padding, dilation and groups it takes.
        weight_dtype: the scheme: a dtype or its name; by default ``weight``'s. Needed for 4 bits: "int4" or "uint4".
        group_size: how many neighbours in a row share a scale, or None for the whole row.

    Raises ValueError and TypeError for tensors that do not fit each other or the convolution.
    """

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        weight_zero_point: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        like: torch.nn.Module,
        weight_dtype: torch.dtype | str | None = None,
        group_size: int | None = None,
    ) -> None:
        super().__init__()
        if type(like) not in CONV:
            raise TypeError(f"WeightOnlyConv: like: expected a Conv1d, Conv2d or Conv3d, got {type(like).__name__}")
        for name in _GEOMETRY:
            setattr(self, name, getattr(like, name))
        self.weight_dtype = scheme("WeightOnlyConv", weight_dtype or weight.dtype, "weight_dtype")
        if self.weight_dtype == "uint8":
            raise ValueError("WeightOnlyConv: weight_dtype: expected int8, int4, uint4 or float8, got uint8")
        filters = self.out_channels
        columns = padded_columns(self._columns, self.weight_dtype, group_size)
        expected = (filters, columns // 2 if self.weight_dtype in PACKED else columns)
        if weight.shape != expected or weight.dtype is not STORAGE[self.weight_dtype]:
            raise ValueError(
                f"WeightOnlyConv: weight: expected {expected} of {STORAGE[self.weight_dtype]} for {self.weight_dtype}, got "
                f"{tuple(weight.shape)} of {weight.dtype}"
            )
        scales = (filters,) if group_size is None else (filters, columns // group_size)
        for label, value, shape in (
            ("weight_scale", weight_scale, scales),
            ("weight_zero_point", weight_zero_point, scales),
            ("bias", bias, (filters,)),
        ):
            if value is not None and value.shape != shape:
                raise ValueError(f"WeightOnlyConv: {label}: expected the shape {shape}, got {tuple(value.shape)}")
        if weight_zero_point is not None and self.weight_dtype in FLOAT8:
            raise ValueError(f"WeightOnlyConv: weight_zero_point: expected None, as {self.weight_dtype} has none")
        self.group_size = group_size
        self.float_dtype = like.weight.dtype if like.weight.dtype in FLOATS else torch.float32
        self._buffers["weight"] = weight
        self.register_buffer("weight_scale", weight_scale.float())
        self.register_buffer("weight_zero_point", None if weight_zero_point is None else weight_zero_point.int())
        self.register_buffer("bias", bias)
        self.was = class_before(like)
        self.weight_error = None
        self._packed: dict[Any, Any] = {}
        self._check_values()

    @classmethod
    def of(cls, conv: torch.nn.Module, config: Config) -> WeightOnlyConv:
        """Of a convolution's filters, quantized as the scheme has it."""
        weight = conv.weight.detach()
        rows, grouping = filter_rows(weight, config)
        q, scale, zero_point = quantize_dynamic(rows, dtype=config.weight_dtype, symmetric=config.symmetric, **grouping)
        made = cls(
            *(q.contiguous(), scale, zero_point, None if conv.bias is None else conv.bias.detach().clone()),
            **dict(like=conv, weight_dtype=config.weight_dtype, group_size=grouping.get("group_size")),
        )
        if not weight.is_meta:
            made.weight_error = relative_error(weight, made.dequantized_weight())
        return made

    @property
    def _columns(self) -> int:
        return self.in_channels // self.groups * math.prod(self.kernel_size)

    def _function(self, *args: Any) -> Tensor:
        return getattr(functional, f"conv{len(self.kernel_size)}d")(*args)

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return self._conv_forward(input, self.dequantized_weight(input.dtype), bias)

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The filters that the integers stand for, of the convolution's shape."""
        grouping = {"axis": 0} if self.group_size is None else {"group_size": self.group_size}
        rows = dequantize(
            *(self.codes, self.weight_scale, self.weight_zero_point),
            **dict(dtype=dtype, from_dtype=self.weight_dtype, **grouping),
        )
        return rows[:, : self._columns].reshape(self.weight_shape())

    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def as_rows(self, weight: Tensor) -> Tensor:
        rows = weight.flatten(1)
        return F.pad(rows, (0, padded_columns(rows.shape[1], self.weight_dtype, self.group_size) - rows.shape[1]))

    def dequantized(self) -> torch.nn.Module:
        kind, converted = self.was
        made = (getattr(nn, kind.__name__) if converted else kind)(
            *(
                self.in_channels,
                self.out_channels,
                self.kernel_size,
                self.stride,
                self.padding,
                self.dilation,
                self.groups,
            ),
            bias=False,
            padding_mode=self.padding_mode,
            device="meta",
        )
        made.weight = torch.nn.Parameter(self.float_weight())
        made.register_parameter("bias", None if self.bias is None else torch.nn.Parameter(self.bias.clone()))
        return made

    def parameters_before(self) -> int:
        return self.out_channels * self._columns + (0 if self.bias is None else self.bias.numel())

    def scheme(self) -> str:
        return describe(self.weight_dtype, self.group_size)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"{self.scheme()}"
        )


def padded_columns(columns: int, weight_dtype: str, group_size: int | None) -> int:
    """The size of a row that holds this many elements of a filter."""
    step = group_size or 1
    if weight_dtype in PACKED:
        step = math.lcm(step, 2)
    return -(-columns // step) * step


def filter_rows(weight: Tensor, config: Config) -> tuple[Tensor, dict[str, int]]:
    """The filters as the rows that are quantized, (M, K'), and what shares a scale, as :func:`fastnn.quantize` takes it: a
    filter of no more than ``group_size`` elements is a group by itself."""
    rows = weight.flatten(1)
    size = config.group_size
    if size is not None and rows.shape[1] <= size:
        size = None
    rows = F.pad(rows, (0, padded_columns(rows.shape[1], config.weight_dtype, size) - rows.shape[1]))
    return rows, {"axis": 0} if size is None else {"group_size": size}


__all__ = ["WeightOnlyConv"]
