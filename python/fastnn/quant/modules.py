"""Layers with quantized weights: what :func:`fastnn.quant.quantize_` makes of linear layers and of attention.

Their tensors are buffers, so that ``state_dict``, ``torch.save``, ``deepcopy`` and ``to(device)`` take them along and no
optimizer does. ``to(dtype)`` changes the dtype of the bias alone: integers, floats of eight bits and scales stay as they are.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .. import nn
from .._modules import class_name
from ..backends.reference.quantize import FLOAT8, PACKED, RANGE, STORAGE
from ..convert import Row, original_class
from ..nn import mlp, transformer
from ..nn.conv1d import conv1d_class
from ..ops._scheme import scheme
from ..ops.int8_linear import int8_linear, pack_int8_weight
from ..ops.multi_head_attention import Projected, attend, ragged_self_attention
from ..ops.quantize import dequantize
from ..ops.weight_only_linear import weight_only_linear


class FloatWeight(Tensor):
    """The weight of a quantized layer as a tensor of floating-point numbers, which are not there before they are needed."""

    _layer: Quantized

    @staticmethod
    def __new__(cls, layer: Quantized) -> FloatWeight:
        made = Tensor._make_wrapper_subclass(
            cls, layer.weight_shape(), dtype=layer.float_dtype, device=layer.codes.device
        )
        made._layer = layer
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func._schema.is_mutable and args and isinstance(args[0], FloatWeight):
            raise RuntimeError(
                f"{func}: the weight of a {type(args[0]._layer).__name__} cannot be written in place; its integers are in"
                " the buffer .codes, or quantize_ the layer after the change"
            )
        args, kwargs = tree_map_only(FloatWeight, lambda weight: weight._layer.float_weight(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **kwargs: Any) -> str:
        return self._layer.float_weight().__repr__(**kwargs)


class Quantized(torch.nn.Module, abc.ABC):
    """What all layers with quantized weights have in common.

    A layer knows which class it had (``was``: torch's class, and whether it was fastnn's version of it), and how far its
    weights are from those that they were made of (``weight_error``: ‖Ŵ - W‖ / ‖W‖, None where that is not known).
    """

    #: Attributes that go when the layer becomes what it was.
    OWN = ("was", "weight_error", "float_dtype", "weight_dtype", "group_size", "_packed")
    #: Buffers whose dtype is part of the format.
    FIXED = ("weight", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point")

    was: tuple[type[torch.nn.Module], bool]
    weight_error: float | None

    @property
    def codes(self) -> Tensor:
        """The buffer that ``state_dict`` calls ``weight``: what is stored of the weight, of few bits."""
        return self._buffers["weight"]

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, of the shape and dtype that it had before, for code around the layer: models
        cast their inputs to ``layer.weight.dtype`` and multiply with ``layer.weight`` themselves. Its numbers are computed
        when a function of torch asks for them, each time. Assigning to it replaces :attr:`codes`."""
        return self.float_weight() if torch.compiler.is_compiling() else FloatWeight(self)

    def float_weight(self) -> Tensor:
        """The numbers of :attr:`weight`."""
        return self.dequantized_weight().to(self.float_dtype)

    @abc.abstractmethod
    def dequantized_weight(self) -> Tensor:
        """The weight that the codes stand for, in float32."""

    @abc.abstractmethod
    def weight_shape(self) -> tuple[int, ...]:
        """Of :attr:`weight`."""

    @abc.abstractmethod
    def dequantized(self) -> torch.nn.Module:
        """A layer of the class that this one was before, whose weights are what the quantized ones stand for."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantized:
        before = {name: self._buffers.get(name) for name in self.FIXED}
        trial = torch.empty(0, dtype=self.float_dtype, device=self.codes.device)
        super()._apply(fn, recurse)
        self._packed = {}
        self.float_dtype = fn(trial).dtype
        for name, old in before.items():
            new = self._buffers.get(name)
            if old is not None and new.dtype is not old.dtype:
                # Where it went to, as it was: a scale of 8 bits of mantissa would be another scale.
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        wrong = [text for name in (*self.FIXED, "bias") if (text := self._why_not(name, state_dict.get(prefix + name)))]
        if wrong:
            # torch would copy floats into the integers.
            args[-1].extend(f"{prefix}{text}" for text in wrong)
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.weight_error = None

    def _why_not(self, name: str, given: Any) -> str | None:
        """Why this cannot be loaded as the buffer of this name, or None."""
        own = self._buffers.get(name)
        if own is None or not isinstance(given, Tensor):
            return None  # missing and unexpected ones are torch's business
        if name in self.FIXED and given.dtype is not own.dtype:
            if name == "weight" and given.dtype in FLOATS:
                return (
                    f"weight: expected {_name(own.dtype)}, got {_name(given.dtype)}: the weights of a model that is not"
                    " quantized; load them before quantize_, or into the model that dequantize_ gives back"
                )
            return f"{name}: expected {_name(own.dtype)}, got {_name(given.dtype)}: quantized another way"
        if given.shape != own.shape:
            return (
                f"{name}: expected the shape {tuple(own.shape)}, got {tuple(given.shape)}: another layer, or quantized"
                " another way (bits, group_size)"
            )
        return self._wrong_value(name, given)

    def _wrong_value(self, name: str, given: Tensor) -> str | None:
        """What is wrong with the numbers in a scale or in zero points, of which no call looks at the weight's; or None."""
        if given.is_meta or not name.endswith(("scale", "zero_point")):
            return None
        if name.endswith("scale"):
            expected, right = "positive, normal, finite numbers", (given >= _LEAST_SCALE) & given.isfinite()
        else:
            least, most = RANGE[self.weight_dtype if name == "weight_zero_point" else "uint8"]
            expected, right = f"{least} to {most}", (given >= least) & (given <= most)
        return None if right.all() else f"{name}: expected {expected}, got {given[~right].flatten()[0].item():g}"

    def _check_values(self) -> None:
        """ValueError for scales and zero points that are out of range: the end of a constructor."""
        for name in self.FIXED:
            value = self._buffers.get(name)
            if value is not None and (wrong := self._wrong_value(name, value)):
                raise ValueError(f"{type(self).__name__}: {wrong}")

    def __getstate__(self) -> dict[str, Any]:
        # Copies have weights at other addresses.
        state = {**self.__dict__, "_packed": {}}
        # Plain pickle (torch.save is another matter) cannot read tensors of eight-bit floats: they go as bytes.
        if self.codes.dtype in _FLOAT8:
            state["_buffers"] = {**state["_buffers"], "weight": self.codes.view(torch.uint8)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        kind = STORAGE[self.weight_dtype]
        if self.codes.dtype is not kind:
            self._buffers["weight"] = self.codes.view(kind)

    @abc.abstractmethod
    def scheme(self) -> str:
        """What is quantized, and how, in a few words."""

    def packed_bytes(self) -> int:
        """The memory of what the kernels keep of the weight, beside it."""
        return 0

    def as_rows(self, weight: Tensor) -> Tensor:
        """A floating-point weight as the rows that are quantized, one for each output."""
        return weight.flatten(1)

    def quantized_row(self, name: str) -> Row:
        """The row of :func:`fastnn.report`."""
        kind, _ = self.was
        held = sum(buffer.nbytes for buffer in self.buffers(recurse=False))
        return Row(
            name,
            class_name(kind),
            "quantized",
            f"fastnn.quant.{type(self).__name__}",
            self.scheme(),
            self.parameters_before(),
            error=self.weight_error,
            bytes=held,
        )

    def parameters_before(self) -> int:
        """How many numbers the weight and the bias stand for."""
        bias = self._buffers.get("bias")
        return self.codes.numel() * (2 if self.weight_dtype in PACKED else 1) + (0 if bias is None else bias.numel())


#: The least normal float32.
_LEAST_SCALE = 2.0**-126


def class_before(layer: torch.nn.Module) -> tuple[type[torch.nn.Module], bool]:
    """torch's class of a layer that is to be quantized, and whether it has fastnn's version of it."""
    original = original_class(type(layer))
    return (type(layer), False) if original is None else (original, True)


_FLOAT8 = tuple(STORAGE[name] for name in FLOAT8)
#: What weights can be before they are quantized.
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(weight_dtype: str, group_size: int | None) -> str:
    """A scheme of weights, in a few words."""
    return f"{weight_dtype} weight" + ("" if group_size is None else f", groups of {group_size}")


class QuantizedLinear(Quantized):
    """``y = x Ŵᵀ + b`` with a quantized weight Ŵ; shapes as :class:`torch.nn.Linear`. Its kinds differ in ``forward``.

    Args, which become buffers:
        weight: (out_features, in_features): int8 or float8; or uint8 with two integers of 4 bits a byte, (out_features,
            in_features / 2).
        weight_scale: (out_features,), or (out_features, in_features / group_size); float32.
        weight_zero_point: of the same shape, int32; None where there is none.
        bias: (out_features,), floating, or None.
        weight_dtype: the scheme: a dtype or its name; by default ``weight``'s. Needed for 4 bits: "int4" or "uint4".
        group_size: how many neighbours in a row share a scale, or None for the whole row.
        float_dtype: of the weight that ``dequantized`` makes; by default ``bias``'s, or float32.

    Raises ValueError and TypeError for tensors that do not fit each other.
    """

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        weight_zero_point: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        weight_dtype: torch.dtype | str | None = None,
        group_size: int | None = None,
        float_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.weight_dtype = scheme(name, weight.dtype if weight_dtype is None else weight_dtype, "weight_dtype")
        if self.weight_dtype == "uint8":
            raise ValueError(f"{name}: weight_dtype: expected int8, int4, uint4 or float8, got uint8")
        if weight.dim() != 2 or weight.dtype is not STORAGE[self.weight_dtype]:
            raise ValueError(
                f"{name}: weight: expected two dimensions of {STORAGE[self.weight_dtype]} for {self.weight_dtype}, got "
                f"{tuple(weight.shape)} of {weight.dtype}"
            )
        rows, columns = weight.shape[0], weight.shape[1] * (2 if self.weight_dtype in PACKED else 1)
        if group_size is not None and (group_size < 1 or columns % group_size):
            raise ValueError(f"{name}: group_size: expected a divisor of {columns}, got {group_size}")
        shape = (rows,) if group_size is None else (rows, columns // group_size)
        for label, value in (("weight_scale", weight_scale), ("weight_zero_point", weight_zero_point)):
            if value is not None and value.shape != shape:
                raise ValueError(f"{name}: {label}: expected the shape {shape}, got {tuple(value.shape)}")
        if bias is not None and bias.shape != (rows,):
            raise ValueError(f"{name}: bias: expected the shape {(rows,)}, got {tuple(bias.shape)}")
        if weight_zero_point is not None and self.weight_dtype in FLOAT8:
            raise ValueError(f"{name}: weight_zero_point: expected None, as {self.weight_dtype} has none")
        self.group_size = group_size
        self.float_dtype = float_dtype or (torch.float32 if bias is None else bias.dtype)
        self._buffers["weight"] = weight
        self.register_buffer("weight_scale", weight_scale.float())
        self.register_buffer("weight_zero_point", None if weight_zero_point is None else weight_zero_point.int())
        self.register_buffer("bias", bias)
        self.was = (torch.nn.Linear, True)
        self.weight_error = None
        self._packed: dict[tuple[int, int] | None, tuple[tuple[int, int], Tensor | None, Tensor]] = {}
        self._check_values()

    @property
    def in_features(self) -> int:
        """The size of an input row."""
        return self.codes.shape[1] * (2 if self.weight_dtype in PACKED else 1)

    @property
    def out_features(self) -> int:
        """The size of an output row."""
        return self.codes.shape[0]

    def forward(self, input: Tensor) -> Tensor:
        return self._compute(input, "none", None)

    def forward_act(self, input: Tensor, activation: str) -> Tensor:
        """``activation(forward(input))`` in one call; the name is one of :func:`fastnn.functional.linear_act`'s."""
        return self._compute(input, activation, None)

    def forward_rows(self, input: Tensor, start: int, stop: int) -> Tensor:
        """``forward(input)[..., start:stop]``, of which nothing else is computed."""
        return self._compute(input, "none", slice(start, stop))

    @abc.abstractmethod
    def _compute(self, input: Tensor, activation: str, rows: slice | None) -> Tensor:
        """The layer with an activation behind it; of some rows of the weight alone, if these are given."""

    def _rows(self, name: str, rows: slice | None) -> Tensor | None:
        value = self._buffers[name]
        return value if rows is None or value is None else value[rows]

    def _pack(self, weight: Tensor) -> Tensor | None:
        """The weight as the kernel reads it; None where that is no other way."""
        return None

    def _packed_rows(self, rows: slice | None) -> Tensor | None:
        """What :meth:`_pack` made of these rows of the weight, as long as nothing has counted a change of it."""
        weight = self.codes
        key = None if rows is None else (rows.start, rows.stop)
        kept = self._packed
        if torch.compiler.is_compiling():
            return kept[key][1] if key in kept else None
        if weight.is_meta or type(weight) is not Tensor:
            return None
        state = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        found = kept.get(key)
        if found is None or found[0] != state:
            # Tensors of inference mode could not be used outside of it where there are gradients.
            with torch.inference_mode(False), torch.no_grad():
                packed = self._pack(weight if rows is None else weight[rows])
            # The memory is held, so that no other weight can come to lie there.
            found = state, packed, weight
            self._packed = {**{k: v for k, v in kept.items() if v[0] == state}, key: found}
        return found[1]

    def dequantized_weight(self) -> Tensor:
        """The weight that the integers stand for, (out_features, in_features), in float32."""
        grouping = {"axis": 0} if self.group_size is None else {"group_size": self.group_size}
        return dequantize(
            self.codes, self.weight_scale, self.weight_zero_point, from_dtype=self.weight_dtype, **grouping
        )

    def _is_conv1d(self) -> bool:
        return self.was[0].__name__ == "Conv1D"

    def weight_shape(self) -> tuple[int, int]:
        shape = self.out_features, self.in_features
        return shape[::-1] if self._is_conv1d() else shape

    def float_weight(self) -> Tensor:
        weight = super().float_weight()
        return weight.t().contiguous() if self._is_conv1d() else weight

    def dequantized(self) -> torch.nn.Module:
        kind, converted = self.was
        weight = self.float_weight()
        bias = None if self.bias is None else torch.nn.Parameter(self.bias.clone())
        if self._is_conv1d():
            made = kind.__new__(conv1d_class(kind) if converted else kind)
            torch.nn.Module.__init__(made)
            made.nx, made.nf = weight.shape
        else:
            fast = nn.Linear if kind is torch.nn.Linear else nn.NonDynamicallyQuantizableLinear
            made = (fast if converted else kind)(self.in_features, self.out_features, device="meta")
        made.weight = torch.nn.Parameter(weight)
        made.register_parameter("bias", bias)
        return made

    def packed_bytes(self) -> int:
        return sum(packed.nbytes for _, packed, _ in self._packed.values() if packed is not None)

    def scheme(self) -> str:
        return describe(self.weight_dtype, self.group_size)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.scheme()}"
        )


class WeightOnlyLinear(QuantizedLinear):
    """``y = x Ŵᵀ + b`` in the input's dtype: float32, bfloat16 or float16. Gradients flow to the input.

    See :func:`fastnn.functional.weight_only_linear`, and :class:`QuantizedLinear` for the arguments.
    """

    def _compute(self, input: Tensor, activation: str, rows: slice | None) -> Tensor:
        return weight_only_linear(
            input,
            self._rows("weight", rows),
            self._rows("weight_scale", rows),
            self._rows("weight_zero_point", rows),
            self._rows("bias", rows),
            group_size=self.group_size,
            from_dtype=self.weight_dtype if self.weight_dtype in PACKED else None,
            activation=activation,
        )


class Int8DynamicLinear(QuantizedLinear):
    """``y = x̂ Ŵᵀ + b``: an int8 weight, symmetric, with a scale a row; each row of the input becomes uint8 in each call.

    See :func:`fastnn.functional.int8_linear`, and :class:`QuantizedLinear` for the arguments.
    """

    def __init__(self, weight: Tensor, *args: Any, **kwargs: Any) -> None:
        super().__init__(weight, *args, **kwargs)
        name = type(self).__name__
        if self.weight_dtype != "int8" or self.group_size is not None or self.weight_zero_point is not None:
            raise ValueError(
                f"{name}: weight: expected int8 with one scale a row and no zero points, got {self.extra_repr()}"
            )

    def _compute(self, input: Tensor, activation: str, rows: slice | None) -> Tensor:
        return int8_linear(
            input,
            self._rows("weight", rows),
            self._rows("weight_scale", rows),
            self._rows("bias", rows),
            activation=activation,
            packed=self._packed_rows(rows),
        )

    def _pack(self, weight: Tensor) -> Tensor | None:
        return pack_int8_weight(weight)

    def scheme(self) -> str:
        return "int8, dynamic"


class Int8StaticLinear(Int8DynamicLinear):
    """``y = x̂ Ŵᵀ + b``: as :class:`Int8DynamicLinear`, but with one scale and zero point of the inputs, chosen beforehand.

    Args, beside those: ``input_scale``, a float32 without dimensions, and ``input_zero_point``, an int32 from 0 to 255.
    """

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        *args: Any,
        input_scale: Tensor,
        input_zero_point: Tensor,
        **kwargs: Any,
    ) -> None:
        super().__init__(weight, weight_scale, *args, **kwargs)
        for label, value in (("input_scale", input_scale), ("input_zero_point", input_zero_point)):
            if value.dim() != 0:
                raise ValueError(f"Int8StaticLinear: {label}: expected no dimensions, got {tuple(value.shape)}")
        self.register_buffer("input_scale", input_scale.float())
        self.register_buffer("input_zero_point", input_zero_point.int())
        self._check_values()

    def _compute(self, input: Tensor, activation: str, rows: slice | None) -> Tensor:
        return int8_linear(
            input,
            self._rows("weight", rows),
            self._rows("weight_scale", rows),
            self._rows("bias", rows),
            input_scale=self.input_scale,
            input_zero_point=self.input_zero_point,
            activation=activation,
            packed=self._packed_rows(rows),
        )

    def scheme(self) -> str:
        return "int8, static"


class QuantizedMultiheadAttention(torch.nn.Module):
    """:class:`torch.nn.MultiheadAttention` with its projections as layers that are called: ``in_proj`` (or ``q_proj``,
    ``k_proj`` and ``v_proj`` where key or value have widths of their own) and ``out_proj``.

    Shapes, masks and errors are those of :class:`fastnn.nn.MultiheadAttention`. The projections are
    :class:`QuantizedLinear`, or linear layers that were left as they are. Between them it computes in the input's dtype.
    """

    OWN = ("was",)
    #: torch's encoder layers, which would read the weights of their layers in eval mode, call them where this is None.
    in_proj_bias = None

    def __init__(self, attention: torch.nn.MultiheadAttention) -> None:
        super().__init__()
        for name in _ATTENTION:
            setattr(self, name, getattr(attention, name))
        self.bias_k, self.bias_v = attention.bias_k, attention.bias_v
        bias = attention.in_proj_bias
        if self._qkv_same_embed_dim:
            self.in_proj = _linear(attention.in_proj_weight, bias)
        else:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            for name, part in zip(_SEPARATE, biases, strict=True):
                setattr(self, name, _linear(getattr(attention, f"{name}_weight"), part))
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        converted = isinstance(attention, nn.MultiheadAttention)
        self.was = (torch.nn.MultiheadAttention, converted)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        return attend(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self._project,
            self.out_proj,
            bias_k=self.bias_k,
            bias_v=self.bias_v,
            add_zero_attn=self.add_zero_attn,
            dropout_p=self.dropout if self.training else 0.0,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            separate=not self._qkv_same_embed_dim,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
            batch_first=self.batch_first,
        )

    def forward_ragged(self, input: Tensor, lengths: list[int]) -> Tensor:
        """As :meth:`fastnn.nn.MultiheadAttention.forward_ragged`."""
        return ragged_self_attention(input, lengths, self.num_heads, self.in_proj, self.out_proj)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Projected:
        if not self._qkv_same_embed_dim:
            return [(self.q_proj(query), 1), (self.k_proj(key), 1), (self.v_proj(value), 1)]
        size = self.embed_dim
        if key is value:
            if query is key:
                return [(self.in_proj(query), 3)]
            return [(self._rows_of(query, 0, size), 1), (self._rows_of(key, size, 3 * size), 2)]
        return [(self._rows_of(x, i * size, (i + 1) * size), 1) for i, x in enumerate((query, key, value))]

    def _rows_of(self, input: Tensor, start: int, stop: int) -> Tensor:
        layer = self.in_proj
        if isinstance(layer, QuantizedLinear) and not layer._forward_hooks and not layer._forward_pre_hooks:
            return layer.forward_rows(input, start, stop)
        # A layer that may be watched, such as in a calibration, is called.
        return layer(input)[..., start:stop]

    def quantized_row(self, name: str) -> Row:
        """The row of :func:`fastnn.report`: its projections have their own."""
        own = sum(parameter.numel() for parameter in self.parameters(recurse=False))
        return Row(name, class_name(self.was[0]), "note", "", "attention around quantized projections", own)

    def recomposed(self) -> torch.nn.MultiheadAttention:
        """The attention as it was, of the present weights. All projections must be linear layers again."""
        kind = nn.MultiheadAttention if self.was[1] else self.was[0]
        made = kind(self.embed_dim, self.num_heads, kdim=self.kdim, vdim=self.vdim, device="meta")
        for name in _ATTENTION:
            setattr(made, name, getattr(self, name))
        made.bias_k, made.bias_v = self.bias_k, self.bias_v
        if self._qkv_same_embed_dim:
            made.in_proj_weight = self.in_proj.weight
            made.register_parameter("in_proj_bias", self.in_proj.bias)
        else:
            layers = [getattr(self, name) for name in _SEPARATE]
            for name, layer in zip(_SEPARATE, layers, strict=True):
                setattr(made, f"{name}_weight", layer.weight)
            bias = None if layers[0].bias is None else torch.nn.Parameter(torch.cat([y.bias.detach() for y in layers]))
            made.register_parameter("in_proj_bias", bias)
        made.out_proj.weight = self.out_proj.weight
        made.out_proj.register_parameter("bias", self.out_proj.bias)
        return made


#: What an attention is made with, and keeps as attributes.
_ATTENTION = (
    "embed_dim",
    "kdim",
    "vdim",
    "_qkv_same_embed_dim",
    "num_heads",
    "dropout",
    "batch_first",
    "head_dim",
    "add_zero_attn",
)
_SEPARATE = ("q_proj", "k_proj", "v_proj")


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of these very parameters."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = weight
    if bias is not None:
        made.bias = bias if isinstance(bias, torch.nn.Parameter) else torch.nn.Parameter(bias.detach())
    return made


def relative_error(weight: Tensor, found: Tensor) -> float:
    """‖found - weight‖ / ‖weight‖, 0 where both are 0."""
    norm = weight.double().norm().item()
    error = (found.double() - weight.double()).norm().item()
    return error / norm if norm else (0.0 if error == 0.0 else math.inf)


mlp.FUSING += (WeightOnlyLinear, Int8DynamicLinear, Int8StaticLinear)
transformer.RAGGED += (QuantizedMultiheadAttention,)

__all__ = [
    "Int8DynamicLinear",
    "Int8StaticLinear",
    "Quantized",
    "QuantizedLinear",
    "QuantizedMultiheadAttention",
    "WeightOnlyLinear",
]
