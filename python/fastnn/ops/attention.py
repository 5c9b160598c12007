"""Attention, softmax(scale Q Kᵀ + bias) V (Vaswani et al., arXiv:1706.03762), never holding a matrix of L × S.

Shapes: query (..., H, L, E), key (..., H, S, E), value (..., H, S, Ev), result (..., H, L, Ev); of two dimensions or more,
those before the last two broadcast. With ``enable_gqa`` the heads of key and value (dimension -3) divide those of the query,
and query head h reads their head h // (H / heads). The bias is what is left of:

- ``attn_mask``, which broadcasts to (..., H, L, S): booleans, of which False excludes a key, or numbers (of the query's dtype
  or float32), which are added to the scores and have a gradient. A query that sees no key has the result 0.
- ``is_causal``: query i sees key j where j <= i.
- of :func:`attention` alone, a window and ALiBi slopes.

Then each probability is zero with probability ``dropout_p``, else divided by 1 - dropout_p, by a seed that is drawn from
torch's generator. scale is 1 / sqrt(E) by default.

float32, float64, bfloat16 or float16, one dtype for all, any strides; E and Ev up to 512. Probabilities and sums are kept in
float32 (float64 for float64). The result has torch's strides: the query's order of dimensions where torch's CPU kernel
takes the call, else contiguous. The backward computes the probabilities again from log sum exp (Dao et al., arXiv:2205.14135);
the gradient of a mask, alone, needs memory for the scores. Other dtypes and devices, longer rows, and a mask beside is_causal
go to torch. Bad input raises what torch raises: RuntimeError for sizes, dtypes and devices, TypeError for what is no tensor
or number; where torch reads past the end of values that are fewer than the keys, RuntimeError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ..backends import Kernels, cpu
from ..backends.cpu import attention as kernels
from ..backends.reference import attention as formulas
from ._op import Op
from ._random import seed_for
from ._route import (
    EAGER,
    PLAIN,
    Unsupported,
    ask_torch,
    autocast,
    describe,
    fall_back,
    functorch_active,
    is_any_autocast_enabled,
    is_dynamo_compiling,
    is_straight,
    resolve,
    route,
    wants_grad,
)

_torch_attention = torch.nn.functional.scaled_dot_product_attention
_NAME = "scaled_dot_product_attention"

#: What :func:`attention` takes for ``alignment``.
ALIGNMENTS = ("upper_left", "lower_right")


def _keeps_layout() -> bool:
    """Whether torch's kernel lays its result out as the query. Earlier ones made it (batch, length, heads, size) always."""
    query = torch.zeros(1, 2, 2, 1)
    return _torch_attention(query, query, query).stride(1) == 2


_KEEPS_LAYOUT = _keeps_layout()
_LIKE_QUERY = cpu.empty_like if _KEEPS_LAYOUT else None
_tensor_attention = cpu.tensor_attention
_kernels = Kernels("attention")
_tensor_attention_backward = cpu.tensor_attention_backward


# ---- the public functions ----------------------------------------------------------------------------------------


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As :func:`torch.nn.functional.scaled_dot_product_attention`. See this module for shapes, dtypes and errors."""
    if not is_dynamo_compiling() and dropout_p == 0:
        found = _tensor_attention(_LIKE_QUERY, query, key, value, attn_mask, is_causal, scale, enable_gqa)
        if type(found) is tuple:
            return _apply_attention(query, key, value, attn_mask, found, is_causal, scale)
        if found is not None:
            return found
    everything = (query, key, value, attn_mask, dropout_p, is_causal)
    options = {"scale": scale, "enable_gqa": enable_gqa}
    try:
        has_elements = _check(*everything, scale, enable_gqa)
        if not has_elements:
            return ask_torch(_NAME, "no elements", _without_elements, *everything, **options)
        if is_causal and attn_mask is not None:
            raise Unsupported("is_causal: expected False beside an attn_mask, got True")
        bounds = (None, 0 if is_causal else None)
        return _run(query, key, value, attn_mask, None, dropout_p, bounds, 0, scale, enable_gqa)
    except Unsupported as reason:
        return fall_back(_NAME, reason.args[0], _torch_attention, *everything, **options)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    alignment: str = "upper_left",
) -> Tensor:
    """:func:`scaled_dot_product_attention` with a sliding window and ALiBi, each of which may go with any mask.

    Query i stands at p = i, or with ``alignment="lower_right"`` at p = i + S - L: then the last query stands at the last
    key, which is what decoding with a cache of keys needs. torch's own is "upper_left".

    is_causal: query i sees key j where j <= p. Beside an attn_mask both hold.
    window: ``(left, right)``: query i sees key j where p - left <= j <= p + right; None is no bound. (Beltagy et al.,
        arXiv:2004.05150; ``(n, 0)`` with ``is_causal`` is Mistral's, arXiv:2310.06825.)
    alibi_slopes: (H) or (batch, H), of any floating dtype: -slope * |p - j| is added to the scores (Press et al.,
        arXiv:2108.12409). Slopes that require a gradient get one, for which the bias is made whole.

    Raises ValueError for another alignment or a window that is no pair of integers or None; RuntimeError for slopes of
    another shape.
    """
    if alignment not in ALIGNMENTS:
        raise ValueError(f"fastnn.attention: alignment: expected one of {', '.join(ALIGNMENTS)}, got {alignment!r}")
    left, right = _bounds_of(window)
    everything = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    options = (left, right, alibi_slopes, alignment)
    try:
        if not _check(*everything):
            return ask_torch("attention", "no elements", _in_torch, *everything, *options)
        if alibi_slopes is not None:
            _check_slopes(alibi_slopes, query, _scores_shape(query, key, value, enable_gqa))
        shift = key.shape[-2] - query.shape[-2] if alignment == "lower_right" else 0
        if alibi_slopes is not None and _may_differentiate(alibi_slopes):
            attn_mask, alibi_slopes = _with_alibi(attn_mask, alibi_slopes, query, key, shift), None
        high = 0 if is_causal and (right is None or right > 0) else right
        bounds = (None if left is None else shift - left, None if high is None else shift + high)
        return _run(query, key, value, attn_mask, alibi_slopes, dropout_p, bounds, shift, scale, enable_gqa)
    except Unsupported as reason:
        return fall_back("attention", reason.args[0], _in_torch, *everything, *options)


# ---- what they are made of ---------------------------------------------------------------------------------------


def _bounds_of(window: Any) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    if not (
        isinstance(window, (tuple, list))
        and len(window) == 2
        and all(bound is None or (isinstance(bound, int) and not isinstance(bound, bool)) for bound in window)
    ):
        raise ValueError(f"fastnn.attention: window: expected (left, right) of integers or None, got {window!r}")
    return window[0], window[1]


def _may_differentiate(slopes: Tensor) -> bool:
    return wants_grad(slopes) or functorch_active() or forward_ad._current_level >= 0


def _with_alibi(mask: Tensor | None, slopes: Tensor, query: Tensor, key: Tensor, shift: int) -> Tensor:
    """The mask with the bias of the slopes, whole: torch knows the slopes' gradient from the mask's."""
    positions = torch.arange(query.shape[-2], device=query.device) + shift
    distance = (positions.unsqueeze(-1) - torch.arange(key.shape[-2], device=query.device)).abs()
    bias = -slopes.to(kernels.log_sum_dtype(query.dtype))[..., None, None] * distance
    if mask is None:
        return bias
    return torch.where(mask, bias, -math.inf) if mask.dtype is torch.bool else bias + mask


def _without_elements(query: Tensor, *args: Any, **options: Any) -> Tensor:
    """torch's answer. Where there are no heads that of its formula: the kernel of torch 2.9 divides by their number, and
    ends the process."""
    if query.dim() > 2 and query.shape[-3] == 0:
        return torch.ops.aten._scaled_dot_product_attention_math(query, *args, **options)[0]
    return _torch_attention(query, *args, **options)


def _in_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    gqa: bool,
    left: int | None,
    right: int | None,
    slopes: Tensor | None,
    alignment: str,
) -> Tensor:
    tensors = all(isinstance(x, Tensor) and x.dim() >= 2 for x in (query, key))
    shift = key.shape[-2] - query.shape[-2] if tensors and alignment == "lower_right" else 0
    if tensors and (
        slopes is not None or left is not None or right is not None or (is_causal and (shift or mask is not None))
    ):
        if slopes is not None:
            mask = _with_alibi(mask, slopes, query, key, shift).to(query.dtype)
        positions = torch.arange(query.shape[-2], device=query.device).unsqueeze(-1) + shift
        distance = torch.arange(key.shape[-2], device=query.device) - positions
        visible = torch.ones_like(distance, dtype=torch.bool)
        for bound in (0 if is_causal else None, right):
            visible = visible if bound is None else visible & (distance <= bound)
        if left is not None:
            visible = visible & (distance >= -left)
        if mask is None:
            mask = visible
        else:
            mask = mask & visible if mask.dtype is torch.bool else torch.where(visible, mask, -math.inf)
        is_causal = False
    function = _without_elements if tensors else _torch_attention
    return function(query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=gqa)


def _check(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    dropout: Any,
    is_causal: Any,
    scale: Any,
    gqa: Any,
) -> bool:
    """Whether there is anything to compute."""
    for name, x in (("query", query), ("key", key), ("value", value), ("attn_mask", mask)):
        if type(x) in PLAIN:
            continue
        if not isinstance(x, Tensor):
            if x is None and name == "attn_mask":
                continue
            raise Unsupported(f"{name}: expected a Tensor, got {type(x).__name__}")
        # A mask that answers torch's functions itself, as torch's causal biases do, goes there; before torch 2.7 these
        # answer no other question.
        route("attention", x)
        if x.is_nested:
            raise Unsupported(f"{name}: a nested tensor")
    for name, number in (("dropout_p", dropout), ("scale", scale)):
        if not isinstance(number, (int, float)) and not (number is None and name == "scale"):
            raise Unsupported(f"{name}: expected a float, got {type(number).__name__}")
    for name, switch in (("is_causal", is_causal), ("enable_gqa", gqa)):
        if not isinstance(switch, bool):
            raise Unsupported(f"{name}: expected a bool, got {type(switch).__name__}")
    if not 0 <= dropout <= 1:
        raise Unsupported(f"dropout_p: expected a probability, 0 to 1, got {dropout}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.is_nested:
            raise Unsupported(f"{name}: a nested tensor")
        if x.dim() < 2:
            raise Unsupported(f"{name}: expected two dimensions or more, got {describe(name, x)}")
        if x.device != query.device:
            raise Unsupported(f"{name}: expected the device of query, {query.device}, got {x.device}")
    if query.shape[-1] != key.shape[-1]:
        raise Unsupported(
            f"key: expected rows as long as those of {describe('query', query)}, got {describe('key', key)}"
        )
    if key.shape[-2] != value.shape[-2]:
        # torch's kernel reads past the end of the values.
        raise RuntimeError(
            f"fastnn.{_NAME}: value: expected as many as there are keys, got {describe('value', value)} for "
            f"{describe('key', key)}"
        )
    if query.shape[-1] > kernels.MAX_SIZE or value.shape[-1] > kernels.MAX_SIZE:
        raise Unsupported(f"rows longer than {kernels.MAX_SIZE}")
    shape = _scores_shape(query, key, value, gqa)
    if mask is not None:
        if mask.device != query.device:
            raise Unsupported(f"attn_mask: expected the device of query, {query.device}, got {mask.device}")
        rank = mask.dim()
        if not 2 <= rank <= len(shape) or any(
            size not in (1, full) for size, full in zip(mask.shape, shape[-rank:], strict=True)
        ):
            raise Unsupported(
                f"attn_mask: expected what broadcasts to {tuple(shape)}, got {describe('attn_mask', mask)}"
            )
    # Sizes may be symbols, of which Dynamo before torch 2.7 makes no bool.
    return not (query.numel() == 0 or key.numel() == 0 or value.numel() == 0)


def _scores_shape(query: Tensor, key: Tensor, value: Tensor, gqa: bool) -> Sequence[int]:
    """(..., H, L, S), of as many dimensions as the longest of the three."""
    lengths = (query.shape[-2], key.shape[-2])
    q, k, v = query.shape[:-2], key.shape[:-2], value.shape[:-2]
    if gqa:
        if not (q and k and v):
            raise Unsupported("enable_gqa: expected heads, in dimension -3")
        for name, x in (("key", k), ("value", v)):
            if x[-1] == 0 or q[-1] % x[-1]:
                raise Unsupported(f"{name}: expected heads that divide the {q[-1]} of query, got {x[-1]}")
        k, v = (*k[:-1], q[-1]), (*v[:-1], q[-1])
    if q == k == v:
        return (*q, *lengths)
    try:
        return (*torch.broadcast_shapes(q, k, v), *lengths)
    except RuntimeError:
        raise Unsupported(
            f"query, key, value: expected dimensions before the last two that broadcast, got {describe('query', query)}, "
            f"{describe('key', key)}, {describe('value', value)}"
        ) from None


def _check_slopes(slopes: Any, query: Tensor, scores: Sequence[int]) -> None:
    """Raises what torch raises of arguments: these cannot be handed to it."""
    if not isinstance(slopes, Tensor):
        raise TypeError(f"fastnn.attention: alibi_slopes: expected a Tensor, got {type(slopes).__name__}")
    if not slopes.is_floating_point() or slopes.device != query.device:
        raise RuntimeError(
            f"fastnn.attention: alibi_slopes: expected a floating dtype on {query.device}, got "
            f"{describe('alibi_slopes', slopes)} on {slopes.device}"
        )
    heads = scores[-3] if len(scores) > 2 else 1
    if tuple(slopes.shape) not in ((heads,), (*scores[:-3], heads)):
        raise RuntimeError(
            f"fastnn.attention: alibi_slopes: expected ({heads}) or {(*scores[:-3], heads)}, got "
            f"{describe('alibi_slopes', slopes)}"
        )


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    dropout: float,
    bounds: tuple[int | None, int | None],
    shift: int,
    scale: float | None,
    gqa: bool,
) -> Tensor:
    if is_any_autocast_enabled():
        query, key, value, mask = autocast(query, key, value, mask)
    dtype = query.dtype
    if key.dtype is not dtype or value.dtype is not dtype or dtype is torch.bool:
        raise Unsupported(f"query, key, value: expected one floating dtype, got {dtype}, {key.dtype} and {value.dtype}")
    if mask is not None and mask.dtype not in (torch.bool, torch.float32, dtype):
        raise Unsupported(f"attn_mask: expected bool, float32 or the dtype of query, {dtype}, got {mask.dtype}")
    if slopes is not None:
        slopes = slopes.detach().to(torch.float32)
    where = route("attention", query, key, value, mask, slopes)
    like_query = dropout == 0 and _takes_layout(query, key, value, mask, gqa)
    shape = None
    if not _is_folded(query, key, value, gqa):
        shape = (*_scores_shape(query, key, value, gqa)[:-1], value.shape[-1])
        query, key, value = _fold(query, key, value, shape[:-2], gqa)
    if mask is not None:
        mask = _fold_mask(mask, shape)
    if slopes is not None:
        slopes = slopes.reshape(-1, query.shape[1])
    seed = seed_for(query, dropout) if dropout > 0 else None
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    args = (query, key, value, mask, slopes, float(scale), *bounds, shift, float(dropout), seed, like_query)
    if where is EAGER and not wants_grad(query, key, value, mask):
        out = _kernels.attention_alone(resolve(query), resolve(key), resolve(value), resolve(mask), *args[4:])
    else:
        out, _ = ATTENTION(*args, where=where)
    return out if shape is None else out.reshape(shape)


def _takes_layout(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, gqa: bool) -> bool:
    """Whether torch's CPU kernel takes the call, whose result is laid out as the query."""
    return (
        _KEEPS_LAYOUT
        and query.dim() == key.dim() == value.dim() == 4
        and query.shape[-1] == value.shape[-1]
        and query.shape[0] == key.shape[0] == value.shape[0]
        and key.shape[1] == value.shape[1]
        and (gqa or query.shape[1] == key.shape[1])
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and (mask is None or (mask.dim() in (2, 4) and not mask.requires_grad))
    )


# ---- any shape as (batch, heads, length, size) -------------------------------------------------------------------


def _is_folded(query: Tensor, key: Tensor, value: Tensor, gqa: bool) -> bool:
    return (
        query.dim() == key.dim() == value.dim() == 4
        and query.shape[0] == key.shape[0] == value.shape[0]
        and key.shape[1] == value.shape[1]
        and (gqa or key.shape[1] in (1, query.shape[1]))
    )


def _fold(query: Tensor, key: Tensor, value: Tensor, lead: Sequence[int], gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The three with one batch dimension, by expanding those before the heads to ``lead``."""
    lead = (1,) * (2 - len(lead)) + tuple(lead)
    batch, heads = lead[:-1], lead[-1]
    query, key, value = (x.reshape((1,) * (len(lead) + 2 - x.dim()) + x.shape) for x in (query, key, value))
    if key.shape[-3] != value.shape[-3] or (not gqa and key.shape[-3] not in (1, heads)):
        # A head each: those of keys and values are not shared alike.
        key, value = (
            x.repeat_interleave(heads // x.shape[-3], -3) if gqa else x.expand(*x.shape[:-3], heads, *x.shape[-2:])
            for x in (key, value)
        )
    query = query.expand(*query.shape[:-3], heads, *query.shape[-2:])
    return tuple(x.expand(*batch, *x.shape[-3:]).reshape(-1, *x.shape[-3:]) for x in (query, key, value))


def _fold_mask(mask: Tensor, shape: Sequence[int] | None) -> Tensor:
    """(batch or 1, heads or 1, ...), for a result of ``shape``, or of four dimensions."""
    rank = 4 if shape is None else max(4, len(shape))
    if mask.dim() < rank:
        mask = mask.reshape((1,) * (rank - mask.dim()) + mask.shape)
    if rank == 4:
        return mask
    assert shape is not None
    if all(size == 1 for size in mask.shape[:-3]):
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*shape[:-3], *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])


# ---- derivatives -------------------------------------------------------------------------------------------------

#: query, key, value, mask, and then what has no derivative.
_OPTIONS = 8


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What derivatives in plain torch are computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _save(ctx: Any, args: tuple[Any, ...], result: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    query, key, value, mask, slopes, ctx.scale, ctx.low, ctx.high, ctx.shift, ctx.dropout, seed, _ = args
    return query, key, value, mask, slopes, *result, seed


class _Attention(Function):
    """What the short way has computed, ``found``, made part of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        found: tuple[Tensor, Tensor],
        is_causal: bool,
        scale: float | None,
    ) -> Tensor:
        ctx.scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        ctx.low, ctx.high, ctx.shift, ctx.dropout = None, 0 if is_causal else None, 0, 0.0
        mask = mask if mask is None or mask.dim() == 4 else mask[None, None]
        ctx.save_for_backward(query, key, value, mask, None, *found, None)
        return found[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return *_backward(ctx, grad)[:3], None, None, None, None


# Function.apply asks for transforms, of which the short way knows that there are none.
_apply_attention = super(Function, _Attention).apply


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    *saved, seed = ctx.saved_tensors
    query, key, value, mask, slopes, out, log_sum = saved
    by_mask = mask is not None and mask.is_floating_point() and ctx.needs_input_grad[3]
    if not (is_dynamo_compiling() or by_mask or ctx.dropout or slopes is not None) and (
        ctx.low is None and ctx.shift == 0 and ctx.high in (None, 0)
    ):
        causal = ctx.high is not None
        found = _tensor_attention_backward(
            cpu.empty_like, grad, query, key, value, mask, out, log_sum, ctx.scale, causal
        )
        if found is not None:
            return *found, None, *[None] * _OPTIONS
    args = (grad, *saved, ctx.scale, ctx.low, ctx.high, ctx.shift, ctx.dropout, seed, by_mask)
    if is_straight("attention", grad, query, key, value):
        found = _kernels.attention_backward(*(resolve(x) for x in (grad, query, key, value, mask)), *args[5:])
    elif forward_ad._current_level >= 0:
        # Forward mode over reverse mode: torch knows how to differentiate the formula.
        found = formulas.attention_backward(*args, dtype=_wide(query.dtype))
    else:
        try:
            found = ATTENTION_BACKWARD(*args)
        except Unsupported as reason:
            found = fall_back(
                "attention_backward",
                reason.args[0],
                lambda: formulas.attention_backward(*args, dtype=_wide(query.dtype)),
            )
    by_query, by_key, by_value, by_bias = found
    return by_query, by_key, by_value, by_bias if by_mask else None, *[None] * _OPTIONS


def _probabilities(ctx: Any, query: Tensor, key: Tensor, mask: Any, slopes: Any, seed: Any) -> formulas.Probabilities:
    return formulas.Probabilities(
        *(query, key, mask, slopes, ctx.scale, ctx.low, ctx.high, ctx.shift, ctx.dropout, seed, _wide(query.dtype))
    )


def _jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
    of_query, of_key, of_value, of_mask, *_ = tangents
    query, key, value, mask, slopes, _, _, seed = ctx.saved_tensors
    p = _probabilities(ctx, query, key, mask, slopes, seed)
    by_scores = torch.zeros_like(p.value)
    if of_query is not None:
        by_scores = by_scores + p.scale * p.of(of_query.to(p.dtype), p.key)
    if of_key is not None:
        by_scores = by_scores + p.scale * p.of(p.query, p.per_query_head(of_key))
    if of_mask is not None:
        by_scores = by_scores + of_mask.to(p.dtype)
    result = (p.derivative(by_scores) * p.kept) @ p.per_query_head(value)
    if of_value is not None:
        result = result + (p.value * p.kept) @ p.per_query_head(of_value)
    return result.to(query.dtype), None


def _save_backward(ctx: Any, args: tuple[Any, ...], result: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    *tensors, ctx.scale, ctx.low, ctx.high, ctx.shift, ctx.dropout, seed, ctx.by_mask = args
    grad, query, key, value, mask, slopes, _, _ = tensors
    return grad, query, key, value, mask, slopes, seed


def _backward_twice(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """The gradients by grad, query, key, value and mask of a sum of all gradients, each times one of ``grads``.

    With P the probabilities, Z what dropout multiplies them with, D = the derivative of P by the scores (symmetric),
    g = grad and E = (g Vᵀ) Z: by_scores S' = D E, grad_query = scale S' K, grad_key = scale S'ᵀ Q, grad_value = (P Z)ᵀ g,
    grad_mask = S'. A sum of S' times W is one of E times D W, and changes with the scores by D of
    E (W - sum(P W)) - W sum(P E), sums over the keys.
    """
    grad, query, key, value, mask, slopes, seed = ctx.saved_tensors
    p = _probabilities(ctx, query, key, mask, slopes, seed)
    of_query, of_key, of_value, of_mask = grads
    g, v = grad.to(p.dtype), p.per_query_head(value)
    e = p.of(g, v) * p.kept
    by_scores = p.derivative(e)
    w = torch.zeros_like(e)
    by_query, by_key = torch.zeros_like(p.query), torch.zeros_like(p.key)
    if of_query is not None:
        a = of_query.to(p.dtype)
        w = w + p.scale * p.of(a, p.key)
        by_key = by_key + p.scale * by_scores.transpose(-2, -1) @ a
    if of_key is not None:
        b = p.per_query_head(of_key)
        w = w + p.scale * p.of(p.query, b)
        by_query = by_query + p.scale * by_scores @ b
    if of_mask is not None and ctx.by_mask:
        w = w + of_mask.to(p.dtype)
    through = e * (w - (p.value * w).sum(-1, keepdim=True)) - w * (p.value * e).sum(-1, keepdim=True)
    by_grad = p.derivative(w) * p.kept
    by_value = by_grad.transpose(-2, -1) @ g
    by_grad = by_grad @ v
    if of_value is not None:
        c = p.per_query_head(of_value)
        through = through + p.of(g, c) * p.kept
        by_grad = by_grad + (p.value * p.kept) @ c
    by_scores = p.derivative(through)
    by_query = by_query + p.scale * by_scores @ p.key
    by_key = by_key + p.scale * by_scores.transpose(-2, -1) @ p.query
    by_bias = None
    if mask is not None and mask.is_floating_point() and ctx.needs_input_grad[4]:
        by_bias = by_scores.sum_to_size(mask.shape).to(mask.dtype)
    return (
        by_grad.to(grad.dtype),
        by_query.to(query.dtype),
        p.per_kv_head(by_key).to(key.dtype),
        p.per_kv_head(by_value).to(value.dtype),
        by_bias,
        *[None] * 10,
    )


# ---- vmap: what is mapped over becomes more of the batch ---------------------------------------------------------


def _larger_batch(x: Tensor | None, dim: int | None, size: int, batch: int | None = None) -> Tensor | None:
    """``x`` with its batch repeated or taken together; one that holds for all of the batch stays so, unless it has to be
    ``batch`` times as large."""
    if x is None:
        return None
    x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
    if dim is None and x.shape[1] == 1 and batch is None:
        return x.squeeze(0)
    return x.expand(size, x.shape[1] if batch is None else batch, *x.shape[2:]).flatten(0, 1)


def _each(
    op: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[Any, tuple[int, ...]]:
    """One call after the other: in a batch of all, dropout would treat each differently."""
    found = [
        op(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    results = tuple(torch.stack(each) for each in zip(*found, strict=True))
    return results, (0,) * len(results)


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    query, _, _, mask, slopes, *options, seed, like_query = args
    size = info.batch_size
    if seed is not None and in_dims[10] is None:
        return _each(ATTENTION, info, in_dims, args)
    batch = query.shape[0 if in_dims[0] is None or in_dims[0] > 0 else 1]
    folded = [_larger_batch(x, dim, size, batch) for x, dim in zip(args[:3], in_dims, strict=False)]
    shared = [
        _larger_batch(x, dim, size, None if dim is None and (x is None or x.shape[0] == 1) else batch)
        for x, dim in zip((mask, slopes), in_dims[3:5], strict=True)
    ]
    seed = None if seed is None else seed.select(in_dims[10], 0)
    out, log_sum = ATTENTION(*folded, *shared, *options, seed, like_query)
    return (out.unflatten(0, (size, batch)), log_sum.unflatten(0, (size, batch))), (0, 0)


def _vmap_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    grad, _, _, _, mask, slopes, out, log_sum, *options, seed, by_mask = args
    size = info.batch_size
    if seed is not None and in_dims[13] is None:
        return _each(ATTENTION_BACKWARD, info, in_dims, args)
    batch = grad.shape[0 if in_dims[0] is None or in_dims[0] > 0 else 1]
    folded = [_larger_batch(x, dim, size, batch) for x, dim in zip(args[:4], in_dims, strict=False)]
    shared = [
        # Where there is a gradient of the mask, each has one.
        _larger_batch(x, dim, size, None if dim is None and (x is None or (x.shape[0] == 1 and not whole)) else batch)
        for x, dim, whole in zip((mask, slopes), in_dims[4:6], (by_mask, False), strict=True)
    ]
    results = [_larger_batch(x, dim, size, batch) for x, dim in zip((out, log_sum), in_dims[6:8], strict=True)]
    seed = None if seed is None else seed.select(in_dims[13], 0)
    *found, by_bias = ATTENTION_BACKWARD(*folded, *shared, *results, *options, seed, by_mask)
    found = [x.unflatten(0, (size, batch)) for x in found]
    if not by_mask:
        return (*found, by_bias), (0, 0, 0, None)
    by_bias = by_bias.unflatten(0, (size, batch))
    if mask.shape[0 if in_dims[4] is None or in_dims[4] > 0 else 1] == 1:
        by_bias = by_bias.sum(1, keepdim=True)
    return (*found, by_bias), (0, 0, 0, 0)


# ---- the ops -----------------------------------------------------------------------------------------------------


def _fake(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    like_query = args[-1]
    batch, heads, length, _ = query.shape
    out = torch.empty_like(query) if like_query else query.new_empty(batch, heads, length, value.shape[-1])
    return out, query.new_empty((batch, heads, length), dtype=kernels.log_sum_dtype(query.dtype))


def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    by_mask = args[-1]
    by_bias = query.new_empty(0) if not by_mask or mask is None else mask.new_empty(mask.shape)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), by_bias


#: The result, and log sum exp of the scores. query (batch, heads, q_length, size), key and value (batch, kv_heads, k_length,
#: size), mask of four dimensions and slopes (batch, heads), each full or 1. Query i sees key j where low <= j - i <= high,
#: and -slope * |i + shift - j| is added. like_query: the result has the strides of the query, else it is contiguous.
ATTENTION = Op(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? slopes, float scale, SymInt? low, SymInt? high, "
    "SymInt shift, float dropout, Tensor? seed, bool like_query) -> (Tensor, Tensor)",
    kernel=_kernels.attention,
    reference=formulas.attention,
    fake=_fake,
    save=_save,
    backward=_backward,
    vmap=_vmap,
    jvp=_jvp,
)

#: The gradients of query, key, value, and mask; that is empty without by_mask.
ATTENTION_BACKWARD = Op(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? slopes, Tensor out, "
    "Tensor log_sum, float scale, SymInt? low, SymInt? high, SymInt shift, float dropout, Tensor? seed, bool by_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_kernels.attention_backward,
    reference=formulas.attention_backward,
    fake=_fake_backward,
    save=_save_backward,
    backward=_backward_twice,
    vmap=_vmap_backward,
    differentiable=4,
)
