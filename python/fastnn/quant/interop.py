"""Models that torch or torchao has quantized, as fastnn's layers. Neither package of quantization is imported here: layers and
weights are known by their attributes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._modules import Model, check_model, named_modules
from ..backends.reference.quantize import PACKED, pack
from .in_place import become, undoing
from .modules import Int8DynamicLinear, Int8StaticLinear, Quantized, QuantizedLinear, WeightOnlyLinear


def from_torch_(model: Model) -> Model:
    """Replace, in place, linear layers that torch or torchao has quantized by fastnn's; return the model.

    The integers and scales are taken as they are:

    - ``torch.ao.nn.quantized.dynamic.Linear``, from ``torch.ao.quantization.quantize_dynamic(dtype=torch.qint8)``, becomes
      :class:`Int8DynamicLinear`. torch quantizes a batch of inputs with one scale, fastnn each row with its own, which is more
      precise: results differ by that.
    - ``torch.nn.Linear`` whose weight is one of torchao's tensors, in a plain layout (integers, or floats of 8 bits, of the
      shape of the weight, scales, zero points), becomes, where inputs are quantized too and the weight is int8 with a
      scale a row, :class:`Int8DynamicLinear` or :class:`Int8StaticLinear`, and else :class:`WeightOnlyLinear`.
      torchao's dynamic inputs are symmetric int8, fastnn's asymmetric uint8; where torchao quantizes the inputs of a
      4-bit weight, fastnn takes them as they are.

    :func:`dequantize_` makes ``torch.nn.Linear`` of them.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a layer whose weights lie in another way (float16 in torch's dynamic layers, torchao's tiles for
            tensor cores, zero points that are no integers, blocks of several rows); or there is no such layer. The
            model is as it was.
    """
    check_model("from_torch_", model)
    made = []
    for names, module in named_modules(model):
        try:
            layer = _read(module)
        except _Unreadable as reason:
            raise ValueError(f"from_torch_: {names[0] or 'the model'}: {reason}") from None
        if layer is not None:
            made.append((module, layer))
    if not made:
        raise ValueError(
            "from_torch_: no layer that torch or torchao has quantized: none of torch.ao's dynamic Linear, and no"
            " torch.nn.Linear with a weight of torchao"
        )
    with undoing() as undo:
        for module, layer in made:
            undo.remember(module)
            for name in _THEIRS:
                module.__dict__.pop(name, None)
            become(module, layer)
    return model


#: What torch's layers and torchao leave on a module.
_THEIRS = ("scale", "zero_point", "version", "extra_repr")


class _Unreadable(Exception):
    """args[0] says why."""


def _read(module: torch.nn.Module) -> Quantized | None:
    """fastnn's layer for this one, or None if nobody has quantized it."""
    kind = type(module)
    if kind.__name__ == "Linear" and kind.__module__.endswith("quantized.dynamic.modules.linear"):
        return _read_dynamic(module)
    if isinstance(module, torch.nn.Linear) and type(module.weight) not in (torch.nn.Parameter, Tensor):
        weight = module.weight
        if hasattr(weight, "original_weight_tensor") or hasattr(weight, "tensor_impl") or hasattr(weight, "qdata"):
            return _read_torchao(weight, module.bias)
    return None


def _read_dynamic(module: Any) -> Quantized:
    weight, bias = module.weight(), module.bias()
    if not weight.is_quantized or weight.dtype is not torch.qint8:
        raise _Unreadable(f"expected a qint8 weight, got {weight.dtype}: torch's dynamic layer in float16")
    rows = weight.shape[0]
    if weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
        if weight.q_per_channel_axis() != 0:
            raise _Unreadable(f"expected a scale a row, got one for each of axis {weight.q_per_channel_axis()}")
        scale, zero_point = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
    else:
        scale, zero_point = torch.full((rows,), weight.q_scale()), torch.full((rows,), weight.q_zero_point())
    if zero_point.any():
        raise _Unreadable("expected a symmetric weight, got one with zero points")
    bias = None if bias is None else bias.detach()
    made = Int8DynamicLinear(weight.int_repr(), scale, None, bias)
    made.was = (torch.nn.Linear, False)
    return made


def _read_torchao(weight: Any, bias: Tensor | None) -> Quantized:
    dtype = weight.dtype
    dynamic = False
    if hasattr(weight, "original_weight_tensor"):  # LinearActivationQuantizedTensor
        weight, dynamic = weight.original_weight_tensor, True
    if hasattr(weight, "tensor_impl"):  # AffineQuantizedTensor
        codes, scale, zero_point = _plain(weight)
        bits = _bits_of(weight, codes)
        input_scale = input_zero_point = None
    else:
        codes, scale, zero_point = weight.qdata, weight.scale, getattr(weight, "zero_point", None)
        bits = _bits_of(weight, codes)
        dynamic = getattr(weight, "act_quant_kwargs", None) is not None
        dynamic = dynamic or getattr(weight, "activation_quantization", None) is not None
        input_scale = getattr(weight, "act_quant_scale", None)
        input_zero_point = getattr(weight, "act_quant_zero_point", None)
        if getattr(weight, "act_pre_scale", None) is not None:
            raise _Unreadable("its inputs are scaled beforehand (act_pre_scale), which fastnn's layers do not do")
    shape = tuple(weight.shape)
    if tuple(codes.shape) != shape:
        raise _Unreadable(
            f"{type(weight).__name__}: expected its values in the shape of the weight, {shape}, got {tuple(codes.shape)}: a layout"
            " for another kernel"
        )
    group, scale, zero_point = _grouping(weight, shape, scale, zero_point)
    options: dict[str, Any] = {"group_size": group, "float_dtype": dtype}
    args = (scale, zero_point, None if bias is None else bias.detach())
    if codes.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        if zero_point is not None:
            raise _Unreadable("expected no zero points with floats of 8 bits")
        return _named_linear(WeightOnlyLinear(codes.contiguous(), *args, **options))
    if codes.dtype not in (torch.int8, torch.uint8, torch.int32, torch.int16):
        raise _Unreadable(f"{type(weight).__name__}: expected integers or float8, got {codes.dtype}")
    least, most = bits
    name = next((n for n, (lo, hi) in _RANGES.items() if lo <= least and most <= hi), None)
    if name is None:
        raise _Unreadable(f"expected integers of at most 8 bits, got a range from {least} to {most}")
    if name in PACKED and shape[1] % 2:
        name = "int8" if name == "int4" else "uint8"
    if name == "uint8":  # the kernels read int8: everything is 128 less
        zero_point = torch.full_like(scale, 0, dtype=torch.int32) if zero_point is None else zero_point
        name, codes, args = "int8", codes.int() - 128, (scale, zero_point - 128, args[2])
    codes = pack(codes) if name in PACKED else codes.to(torch.int8).contiguous()
    options["weight_dtype"] = name
    per_row = name == "int8" and group is None and args[1] is None
    if per_row and input_scale is not None:
        if input_scale.numel() != 1:
            raise _Unreadable(f"expected one scale of the inputs, got {tuple(input_scale.shape)}")
        # Symmetric int8 is uint8 with the zero point 128.
        shift = 0 if input_zero_point is None else int(input_zero_point.reshape(()))
        made = Int8StaticLinear(
            codes,
            *args,
            **options,
            input_scale=input_scale.reshape(()),
            input_zero_point=torch.tensor(128 + shift, device=codes.device),
        )
        return _named_linear(made)
    return _named_linear((Int8DynamicLinear if per_row and dynamic else WeightOnlyLinear)(codes, *args, **options))


#: From the smallest.
_RANGES = {"int4": (-8, 7), "uint4": (0, 15), "int8": (-128, 127), "uint8": (0, 255)}


def _named_linear(made: QuantizedLinear) -> QuantizedLinear:
    made.was = (torch.nn.Linear, False)
    return made


def _plain(weight: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """An AffineQuantizedTensor's integers, scales and zero points."""
    domain = getattr(weight, "zero_point_domain", None)
    name = getattr(domain, "name", str(domain)).rsplit(".", 1)[-1].upper()
    codes, scale, zero_point = weight.tensor_impl.get_plain()
    if name == "FLOAT":
        raise _Unreadable("its zero points are no integers (zero_point_domain=FLOAT)")
    return codes, scale, None if name == "NONE" else zero_point


def _bits_of(weight: Any, codes: Tensor) -> tuple[int, int]:
    """The least and the largest integer that the weight may hold."""
    least, most = getattr(weight, "quant_min", None), getattr(weight, "quant_max", None)
    if least is not None and most is not None:
        return int(least), int(most)
    target = str(getattr(weight, "target_dtype", codes.dtype)).removeprefix("torch.")
    digits = target.lstrip("uint")
    if not digits.isdigit():
        return -128, 127
    size = 1 << int(digits)
    return (0, size - 1) if target.startswith("u") else (-size // 2, size // 2 - 1)


def _grouping(
    weight: Any, shape: tuple[int, ...], scale: Tensor, zero_point: Tensor | None
) -> tuple[int | None, Tensor, Tensor | None]:
    """The size of a group (None for whole rows), and scales and zero points of the shape that fastnn has for that."""
    block = tuple(weight.block_size)
    if len(shape) != 2 or len(block) != 2:
        raise _Unreadable(f"expected a weight of two dimensions, got {shape} in blocks of {block}")
    rows, columns = shape
    if block == shape:
        scale = scale.reshape(-1).expand(rows)
        zero_point = None if zero_point is None else zero_point.reshape(-1).expand(rows)
    elif block[0] != 1:
        raise _Unreadable(f"expected blocks within one row, got {block}")
    group = None if block[1] == columns else block[1]
    wanted = (rows,) if group is None else (rows, columns // group)
    scale = scale.reshape(wanted).float().contiguous()
    if zero_point is not None and zero_point.numel():
        if zero_point.is_floating_point() and not torch.equal(zero_point, zero_point.round()):
            raise _Unreadable("its zero points are no integers")
        zero_point = zero_point.reshape(wanted).int().contiguous()
        zero_point = zero_point if zero_point.any() else None
    else:
        zero_point = None
    return group, scale, zero_point


__all__ = ["from_torch_"]
