"""Convolutions with int8 filters and uint8 images, and what runs them one after the other without leaving integers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _cpu, nn
from ..backends.cpu import int8_conv as kernels
from ..backends.cpu import quantize as quantize_kernels
from ..ops._route import PLAIN, dispatch_modes, functorch_active, tracing_state
from ..ops.int8_conv import int8_conv1d, int8_conv2d, int8_conv3d, named_padding
from ..ops.quantize import quantize, quantize_dynamic
from .modules import Quantized, relative_error

#: The buffers of the scale and zero point of a shortcut.
RESIDUAL = ("residual_scale", "residual_zero_point")


class QuantizedConv(Quantized):
    """A convolution of one to three dimensions whose filters are int8, with a scale each, and whose input is taken as
    uint8 with one scale and zero point. Called as the layer that it was it takes and gives floating-point numbers:
    ``conv(dequantize(quantize(x)), dequantize(weight)) + bias``, in exact integer sums.

    Args, which become buffers:
        weight: (M, C / groups, *kernel), int8.
        weight_scale: (M,), float32.
        bias: (M,), floating, or None.
        input_scale, input_zero_point: of no dimensions, float32 and int32.
        output_scale, output_zero_point: likewise, of the tensor that this layer and what is fused with it hand on where that
            is uint8, else None. (Where a shortcut is added, ``residual_scale`` and ``residual_zero_point`` are its.)

    The others are those of :class:`torch.nn.Conv2d`, "same" and "valid" included. For inference: there are no gradients.
    """

    OWN = (*Quantized.OWN, "stride", "padding", "dilation", "groups", "norm", "_call")
    FIXED = (*Quantized.FIXED, "output_scale", "output_zero_point", *RESIDUAL)

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        input_scale: Tensor,
        input_zero_point: Tensor,
        output_scale: Tensor | None = None,
        output_zero_point: Tensor | None = None,
        *,
        stride: Sequence[int],
        padding: Sequence[int] | str,
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        super().__init__()
        if weight.dim() not in (3, 4, 5) or weight.dtype is not torch.int8:
            raise ValueError(
                f"QuantizedConv: weight: expected three to five dimensions of int8, got {tuple(weight.shape)} of {weight.dtype}"
            )
        self.stride, self.dilation, self.groups = tuple(stride), tuple(dilation), groups
        self.padding = padding if isinstance(padding, str) else tuple(padding)
        # As the kernels read them.
        self._buffers["weight"] = channels_last(weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_zero_point", input_zero_point)
        self.register_buffer("output_scale", output_scale)
        self.register_buffer("output_zero_point", output_zero_point)
        self.was = ((torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[weight.dim() - 3], False)
        self.weight_error, self.weight_dtype, self.group_size = None, "int8", None
        self.float_dtype = torch.float32 if bias is None else bias.dtype
        #: The name, in the model that was quantized, of the batch norm that became part of this layer.
        self.norm: str | None = None
        self._packed: dict[Any, Any] = {}
        self._call: Step | None = None
        self._check_values()

    @property
    def pads(self) -> Sequence[int]:
        """The padding in numbers, as the kernels take it."""
        if not isinstance(self.padding, str):
            return self.padding
        return named_padding("int8_conv", self.padding, self.codes.shape[2:], self.stride, self.dilation)

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor | None, inputs: Parameters, outputs: Parameters | None, **geometry: Any
    ) -> QuantizedConv:
        """With filters of floating-point numbers, each quantized symmetrically."""
        weight = weight.detach()
        q, scale, _ = quantize_dynamic(weight, axis=0)
        made = cls(q, scale, None if bias is None else bias.detach(), *inputs, *(outputs or (None, None)), **geometry)
        if not weight.is_meta:
            made.weight_error = relative_error(weight, made.dequantized_weight())
        return made

    def forward(self, input: Tensor) -> Tensor:
        dtype = input.dtype if input.dtype is torch.bfloat16 else torch.float32
        if torch.compiler.is_compiling() or not is_plain(input):
            function = (int8_conv1d, int8_conv2d, int8_conv3d)[self.codes.dim() - 3]
            return function(
                *(self.quantized(input), self.codes, self.weight_scale, self.bias),
                *(self.stride, self.padding, self.dilation, self.groups),
                **dict(input_scale=self.input_scale, input_zero_point=self.input_zero_point, dtype=dtype),
            ).to(input.dtype)
        if self._call is None or self._call.dtype is not dtype:
            self._call = Step(self, "none", dtype, None)
        return self._call(input).to(input.dtype)

    def quantized(self, input: Tensor) -> Tensor:
        """The input as the kernels take it."""
        return quantize(channels_last(input), self.input_scale, self.input_zero_point, dtype=torch.uint8)

    def dequantized_weight(self) -> Tensor:
        """The filters that the integers stand for, in float32."""
        return self.codes.float() * self.weight_scale.view(-1, *(1,) * (self.codes.dim() - 1))

    def weight_shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def dequantized(self) -> torch.nn.Module:
        kind, converted = self.was
        filters, channels, *kernel = self.codes.shape
        made = (getattr(nn, kind.__name__) if converted else kind)(
            *(channels * self.groups, filters, tuple(kernel), self.stride, self.padding, self.dilation, self.groups),
            bias=False,
            device="meta",
        )
        made.weight = torch.nn.Parameter(self.float_weight())
        made.register_parameter("bias", None if self.bias is None else torch.nn.Parameter(self.bias.clone()))
        return made

    def scheme(self) -> str:
        return "int8, static"

    def extra_repr(self) -> str:
        filters, channels, *kernel = self.codes.shape
        return (
            f"{channels * self.groups}, {filters}, kernel_size={tuple(kernel)}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, weight=int8"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Safetensors takes nothing else.
        destination[prefix + "weight"] = self.codes.contiguous()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedConv:
        super()._apply(fn, recurse)
        self._call = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_call": None}


def channels_last(x: Tensor) -> Tensor:
    """In the layout of torch's that has this name; in one dimension there is none."""
    if x.dim() == 3:
        return x.contiguous()
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


#: What the kernels quantize themselves.
_READ = (torch.float32, torch.bfloat16, torch.float16)

#: The scale and zero point of a tensor of uint8.
Parameters = tuple[Tensor, Tensor]

_BUFFERS = ("weight", "weight_scale", "bias", "input_scale", "input_zero_point", "output_scale", "output_zero_point")


class Unchanged:
    """Whether the same tensors lie in these dictionaries under these names, with nothing written to them since."""

    def __init__(self, places: list[tuple[dict[str, Tensor | None], str]]) -> None:
        self._buffers = [buffers for buffers, _ in places]
        self._names = [name for _, name in places]
        self._tensors = [buffers.get(name) for buffers, name in places]
        self._there = [tensor for tensor in self._tensors if tensor is not None]
        self._counting = [
            tensor for tensor in self._there if not tensor.is_inference()
        ]  # others' changes nothing counts
        self._addresses, self._versions = self._seen()

    def _seen(self) -> tuple[list[int], list[int]]:
        return [tensor.data_ptr() for tensor in self._there], [tensor._version for tensor in self._counting]

    def same(self) -> bool:
        found = map(dict.get, self._buffers, self._names)
        return all(map(operator.is_, found, self._tensors)) and self._seen() == (self._addresses, self._versions)


class Step:
    """A quantized convolution with what follows it: a sum with a residual, an activation, and its result in uint8 with the
    layer's ``output_scale``, or in floating-point numbers.

    ``residual`` is where the residual's scale and zero point lie: the buffers of a module, and their names. Inputs and
    residuals in floating-point numbers are quantized first.
    """

    def __init__(
        self,
        conv: QuantizedConv,
        activation: str,
        dtype: torch.dtype,
        residual: tuple[dict[str, Tensor | None], str, str] | None,
    ) -> None:
        self.conv = conv
        self.activation = activation
        self.dtype = dtype
        self.residual = residual
        self._make()

    def _make(self) -> None:
        conv = self.conv
        self._watch = Unchanged(self.places)
        narrow = self.dtype is torch.uint8
        how = kernels.requantization(
            *(conv.codes, conv.weight_scale, conv.bias, conv.input_scale, conv.input_zero_point),
            *((conv.output_scale, conv.output_zero_point) if narrow else (None, None)),
            *(self.activation, self.dtype, False),
        )
        added = (0.0, 0)
        if self.residual is not None:
            scale, zero_point = self.residual_parameters()
            added = (float(scale * torch.tensor(how.inverse)), int(zero_point))
        self.convolution = kernels.Convolution(
            *(conv.codes, how, conv.stride, conv.pads, conv.dilation, conv.groups, self.dtype, *added),
            _cpu.Prepared(),
        )

    @property
    def places(self) -> list[tuple[dict[str, Any], str]]:
        """Where all that this is made of lies: dictionaries and names."""
        places: list[tuple[dict[str, Any], str]] = [(self.conv._buffers, name) for name in _BUFFERS]
        if self.residual is not None:
            places += [(self.residual[0], name) for name in self.residual[1:]]
        return places

    def residual_parameters(self) -> Parameters:
        buffers, scale, zero_point = self.residual
        return buffers[scale], buffers[zero_point]

    def __call__(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self._watch.same():
            self._make()
        if input.dim() < self.conv.codes.dim():
            return self(input.unsqueeze(0), None if residual is None else residual.unsqueeze(0)).squeeze(0)
        return self.convolution(self.taken(input), None if residual is None else self.taken_residual(residual))

    def taken(self, input: Tensor) -> Tensor:
        """The input in integers."""
        return input if input.dtype is torch.uint8 else self.conv.quantized(input)

    def taken_again(self, input: Tensor) -> Tensor:
        """The same for a plain input of a layout that was taken before with these buffers: nothing is checked."""
        conv = self.conv
        if input.dtype not in _READ:
            return self.taken(input)
        return quantize_kernels.quantize(
            channels_last(input), conv.input_scale, conv.input_zero_point, None, (), 0, "uint8"
        )

    def taken_residual(self, residual: Tensor) -> Tensor:
        if residual.dtype is torch.uint8:
            return residual
        return quantize(residual, *self.residual_parameters(), dtype=torch.uint8)


class GlobalAverage:
    """The mean of each channel of a uint8 image, (N, C, H, W) to (N, C, 1, 1) in ``dtype``: a convolution with ones.

    ``parameters`` says where the scale and zero point of the image lie.
    """

    def __init__(self, parameters: tuple[dict[str, Tensor | None], str, str], dtype: torch.dtype) -> None:
        self._parameters = parameters
        self._dtype = dtype
        self.places = [(parameters[0], name) for name in parameters[1:]]
        self._watch = Unchanged(self.places)
        self._made: dict[tuple[int, ...], kernels.Convolution] = {}

    def __call__(self, input: Tensor) -> Tensor:
        return self.convolution(input)(input)

    def convolution(self, input: Tensor) -> kernels.Convolution:
        """What it is for images of this size."""
        shape = tuple(input.shape[1:])
        if not self._watch.same():
            self.__init__(self._parameters, self._dtype)
        if shape not in self._made:
            self._made = {shape: self._make(*shape)}
        return self._made[shape]

    def _make(self, channels: int, height: int, width: int) -> kernels.Convolution:
        buffers, scale, zero_point = self._parameters
        ones = torch.ones(channels, 1, height, width, dtype=torch.int8)
        count = torch.tensor(1.0 / (height * width))
        how = kernels.requantization(
            *(ones, count, None, buffers[scale], buffers[zero_point], None, None, "none", self._dtype, False)
        )
        return kernels.Convolution(*(ones, how, (1, 1), (0, 0), (1, 1), channels, self._dtype, 0.0, 0, _cpu.Prepared()))


def is_plain(input: Tensor) -> bool:
    """Whether it lies in memory as it says, and nobody watches what is computed with it."""
    return (
        type(input) in PLAIN
        and input.is_cpu
        and dispatch_modes() == 0
        and not functorch_active()
        and tracing_state() is None
    )
