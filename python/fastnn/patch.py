"""``with fastnn.patch():`` for code that calls ``torch.nn.functional`` or ``torch.matmul`` itself."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import _state, functional
from .ops._route import ask_torch
from .ops.batch_norm import batch_norm_or
from .ops.gemm import addmm, baddbmm, bmm, matmul, mm, mv
from .ops.group_norm import group_norm_or, instance_norm_or
from .ops.scaled_mm import torchs_scaled_mm, torchs_scaled_mm_v2


def _with_indices(pool: Callable[..., Any]) -> Callable[..., Any]:
    """What F.max_pool2d hands a call with ``return_indices=True`` to; called by itself it returns them in any case."""

    @functools.wraps(pool)
    def call(*args: Any, **kwargs: Any) -> Any:
        names = list(inspect.signature(pool).parameters)
        return pool(**{**dict(zip(names, args, strict=False)), **kwargs, "return_indices": True})

    return call


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """``torch.batch_norm``, whose arguments have another order, and which takes one value a channel too."""

    def in_torch(x: Tensor, mean: Any, var: Any, weight: Any, bias: Any, *rest: Any) -> Tensor:
        return torch.batch_norm(x, weight, bias, mean, var, *rest, cudnn_enabled)

    return batch_norm_or(in_torch, input, running_mean, running_var, weight, bias, training, momentum, eps)


def softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
    """``torch.softmax``, whose third argument is another one."""
    return functional.softmax(input, dim, dtype=dtype, out=out)


def log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
    """``torch.log_softmax``, likewise."""
    return functional.log_softmax(input, dim, dtype=dtype, out=out)


def dropout(input: Tensor, p: float, train: bool) -> Tensor:
    """``torch.dropout``, whose arguments have another name and no defaults, and whose errors have another type."""
    if not 0 <= p <= 1:
        return ask_torch("dropout", f"p: expected a number from 0 to 1, got {p!r}", torch.dropout, input, p, train)
    return functional.dropout(input, p, train)


def embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``torch.embedding``, whose arguments have another order and where a padding that is no row is none."""
    padding = padding_idx if weight.dim() > 0 and 0 <= padding_idx < weight.shape[0] else None
    return functional.embedding(indices, weight, padding, None, 2.0, scale_grad_by_freq, sparse)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """``torch.layer_norm``, which has one argument more."""
    return functional.layer_norm(input, normalized_shape, weight, bias, eps)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """``torch.group_norm``, likewise, and which takes one value a group too."""

    def in_torch(*everything: Any) -> Tensor:
        return torch.group_norm(*everything, cudnn_enabled)

    return group_norm_or(in_torch, input, num_groups, weight, bias, eps)


def instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """``torch.instance_norm``, whose arguments have another order, and which takes one value a channel too."""

    def in_torch(x: Tensor, mean: Any, var: Any, weight: Any, bias: Any, *rest: Any) -> Tensor:
        return torch.instance_norm(x, weight, bias, mean, var, *rest, cudnn_enabled)

    return instance_norm_or(in_torch, input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """``F.hardtanh``, which :class:`torch.nn.ReLU6` calls: with its bounds, and no others, it is relu6."""
    if (min_val, max_val) == (0, 6):
        return functional.relu6(input, inplace)
    return F.hardtanh(input, min_val, max_val, inplace)


#: What torch is asked for, and what answers. ``a @ b`` reaches a mode as ``Tensor.matmul``.
PATCHES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: functional.linear,
    F.bilinear: functional.bilinear,
    F.multi_head_attention_forward: functional.multi_head_attention_forward,
    F.conv1d: functional.conv1d,
    F.conv2d: functional.conv2d,
    F.conv3d: functional.conv3d,
    F.conv_transpose1d: functional.conv_transpose1d,
    F.conv_transpose2d: functional.conv_transpose2d,
    F.conv_transpose3d: functional.conv_transpose3d,
    F.relu: functional.relu,
    F.relu6: functional.relu6,
    F.hardtanh: hardtanh,
    F.gelu: functional.gelu,
    F.silu: functional.silu,
    F.sigmoid: functional.sigmoid,
    F.tanh: functional.tanh,
    **{
        getattr(F, name): getattr(functional, name)
        for name in functional.__all__
        if name.endswith(("pool1d", "pool2d", "pool3d"))
    },
    F.max_pool1d_with_indices: _with_indices(functional.max_pool1d),
    F.max_pool2d_with_indices: _with_indices(functional.max_pool2d),
    F.max_pool3d_with_indices: _with_indices(functional.max_pool3d),
    F.adaptive_max_pool1d_with_indices: _with_indices(functional.adaptive_max_pool1d),
    F.adaptive_max_pool2d_with_indices: _with_indices(functional.adaptive_max_pool2d),
    F.adaptive_max_pool3d_with_indices: _with_indices(functional.adaptive_max_pool3d),
    torch.max_pool1d: functional.max_pool1d,
    torch.max_pool2d: functional.max_pool2d,
    torch.max_pool3d: functional.max_pool3d,
    F.scaled_dot_product_attention: functional.scaled_dot_product_attention,
    F.batch_norm: functional.batch_norm,
    torch.batch_norm: batch_norm,
    F.cross_entropy: functional.cross_entropy,
    F.softmax: functional.softmax,
    F.softmin: functional.softmin,
    F.log_softmax: functional.log_softmax,
    torch.softmax: softmax,
    torch.log_softmax: log_softmax,
    torch.special.softmax: softmax,
    torch.special.log_softmax: log_softmax,
    torch.Tensor.softmax: softmax,
    torch.Tensor.log_softmax: log_softmax,
    F.embedding: functional.embedding,
    torch.embedding: embedding,
    F.dropout: functional.dropout,
    torch.dropout: dropout,
    F.layer_norm: functional.layer_norm,
    torch.layer_norm: layer_norm,
    F.rms_norm: functional.rms_norm,
    torch.rms_norm: functional.rms_norm,
    F.group_norm: functional.group_norm,
    torch.group_norm: group_norm,
    F.instance_norm: functional.instance_norm,
    torch.instance_norm: instance_norm,
    torch.fake_quantize_per_tensor_affine: functional.fake_quantize_per_tensor_affine,
    torch.fake_quantize_per_channel_affine: functional.fake_quantize_per_channel_affine,
    torch.relu: functional.relu,
    torch.sigmoid: functional.sigmoid,
    torch.tanh: functional.tanh,
    torch.Tensor.relu: functional.relu,
    torch.Tensor.sigmoid: functional.sigmoid,
    torch.Tensor.tanh: functional.tanh,
    torch.matmul: matmul,
    torch.linalg.matmul: matmul,
    torch.mm: mm,
    torch.bmm: bmm,
    torch.addmm: addmm,
    torch.baddbmm: baddbmm,
    torch.mv: mv,
    torch.Tensor.matmul: matmul,
    torch.Tensor.__matmul__: matmul,
    torch.Tensor.mm: mm,
    torch.Tensor.bmm: bmm,
    torch.Tensor.addmm: addmm,
    torch.Tensor.baddbmm: baddbmm,
    torch.Tensor.mv: mv,
    torch._scaled_mm: torchs_scaled_mm,
}

if hasattr(F, "linear_cross_entropy"):  # since torch 2.13
    PATCHES[F.linear_cross_entropy] = functional.linear_cross_entropy

if hasattr(torch, "_scaled_mm_v2"):  # since torch 2.10: what F.scaled_mm calls
    PATCHES[torch._scaled_mm_v2] = torchs_scaled_mm_v2

_PRODUCTS = (addmm, baddbmm, bmm, matmul, mm, mv)
# Dictionaries: Dynamo before torch 2.8 does not look for a function in a set.
_OVERLOADED = {function: True for function, ours in PATCHES.items() if ours in _PRODUCTS}
_WITHOUT_OUT = {F.avg_pool2d: True, F.avg_pool3d: True, torch._scaled_mm: True}

# Subclasses of Tensor answer torch's functions themselves; these two do not.
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class _PatchMode(TorchFunctionMode):
    """Sends the calls in :data:`PATCHES` to fastnn. torch takes the mode off while it runs, so what fastnn itself
    calls, and hands back to torch, reaches the original."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        replacement = PATCHES.get(func)
        if replacement is None or not all(kind in _PLAIN for kind in types):
            return func(*args, **kwargs)
        if (
            ("out_dtype" in kwargs and _OVERLOADED.get(func))
            or ("out" in kwargs and _WITHOUT_OUT.get(func))
            or (_OVERLOADED.get(func) and any(isinstance(argument, (int, float, torch.dtype)) for argument in args))
        ):
            # addmm(beta, input, alpha, mat1, mat2), deprecated in torch, and mm(a, b, out_dtype), for GPUs; and the
            # out= that avg_pool2d takes and does not document.
            _state.count_fallback(replacement.__name__, "an overload that fastnn does not have")
            return func(*args, **kwargs)
        return replacement(*args, **kwargs)


class _Entered(threading.local):
    """What this thread entered, innermost last: a mode, or None where an outer patch was on already."""

    def __init__(self) -> None:
        self.modes: list[_PatchMode | None] = []


_entered = _Entered()


class patch(contextlib.ContextDecorator):
    """Inside ``with fastnn.patch():``, torch's functions of the families fastnn knows run fastnn's.

    These are ``torch.nn.functional`` ``linear``, ``bilinear``, ``multi_head_attention_forward``,
    ``scaled_dot_product_attention``, ``conv1d`` to ``conv3d`` and their transposes, ``relu``, ``relu6`` (and ``hardtanh``
    from 0 to 6), ``gelu``, ``silu``, ``sigmoid``, ``tanh``, ``softmax``, ``log_softmax``, ``softmin``, ``cross_entropy``,
    ``linear_cross_entropy``, ``batch_norm``, ``layer_norm``, ``rms_norm``, ``group_norm``, ``instance_norm``, ``dropout``, ``embedding`` and the pools
    (``max_pool2d``, ``avg_pool2d``, ``adaptive_avg_pool2d``, ... in one to three dimensions); ``torch.batch_norm``,
    ``layer_norm``, ``rms_norm``, ``group_norm``, ``instance_norm``, ``dropout``, ``embedding``, ``matmul``, ``mm``,
    ``bmm``, ``addmm``, ``baddbmm``, ``mv``, ``_scaled_mm`` (and with it ``torch.nn.functional.scaled_mm``), ``relu``,
    ``sigmoid``, ``tanh``, ``softmax``, ``log_softmax``, ``fake_quantize_per_tensor_affine``, ``fake_quantize_per_channel_affine``; the
    :class:`torch.Tensor` methods of these names; and ``a @ b``. In-place variants (``relu_``, ``addmm_``) stay torch's.

    It is a :class:`torch.overrides.TorchFunctionMode`: nothing in torch is changed, and nothing stays behind. It holds
    for the thread that entered it alone, may be nested, and works as a decorator as well (``@fastnn.patch()``). Every
    torch call inside it costs about a microsecond more, so that :func:`fastnn.convert` is the better choice where the
    model is made of modules.
    """

    def __enter__(self) -> None:
        mode = None
        if not any(_entered.modes):
            # One mode a thread: with two, whatever fastnn hands back to torch would pass through the other one.
            mode = _PatchMode()
            mode.__enter__()
        _entered.modes.append(mode)

    def __exit__(self, *exception: Any) -> None:
        mode = _entered.modes.pop()
        if mode is not None:
            mode.__exit__(*exception)
