"""Multi-head attention: projections into heads, attention in each head, a projection of the heads put together.

Formula (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2), for each batch element and head h:
head_h = softmax(Q_h K_hᵀ / √d + mask) V_h with Q = query W_qᵀ + b_q and so on, of whose columns head h has d; the result is
concat(head_1, ..., head_H) W_oᵀ + b_o. Shapes: query (L, N, E), key (S, N, E_k), value (S, N, E_v), result (L, N, E) and
weights (N, L, S), or (N, H, L, S) if they are not averaged; without N all the same; N first under ``batch_first``. Dtypes,
precision and accumulation are those of :mod:`.linear` and :mod:`.attention`, which do the work: query, key and value of
self-attention are one product, the heads are views of it, and the attention writes what the last product reads.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .attention import scaled_dot_product_attention
from .dropout import dropout
from .gemm import matmul
from .linear import linear
from .packed_linear import PackedWeight
from .softmax import softmax

#: What projections have made: tensors, and how many of query, key and value each of them holds side by side.
Projected = Sequence[tuple[Tensor, int]]


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    batch_first: bool = False,
    in_proj_packed: PackedWeight | None = None,
    out_proj_packed: PackedWeight | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`torch.nn.functional.multi_head_attention_forward`; see this module for shapes and formula.

    Two masks say where not to look: ``attn_mask`` (L, S) or (N * H, L, S), ``key_padding_mask`` (N, S). A boolean one is True
    there, a floating one is added to the scores. Boolean masks stay boolean where both are. ``is_causal`` is a hint that
    ``attn_mask`` is the causal mask, which then need not be read. ``static_k`` and ``static_v`` (N * H, S, d) take the place
    of the projected key and value.

    Beyond torch's arguments: ``batch_first`` means (N, L, E) for all three and for the result, which is contiguous;
    ``in_proj_packed`` and ``out_proj_packed`` are packed copies of the two weights, used where a call allows it;
    ``residual``, of the result's shape, is added to it.

    Raises:
        TypeError: what should be a tensor is none.
        AssertionError: dimensions, sizes or dtypes of query, key, value or a padding mask that do not fit.
        RuntimeError: an ``attn_mask`` of another shape, or ``is_causal`` without one.
    """

    def project(query: Tensor, key: Tensor, value: Tensor) -> Projected:
        if not use_separate_proj_weight:
            if in_proj_weight is None:
                raise AssertionError("use_separate_proj_weight is False but in_proj_weight is None")
            return _project(query, key, value, in_proj_weight, in_proj_bias, in_proj_packed)
        weights = {"q_proj_weight": q_proj_weight, "k_proj_weight": k_proj_weight, "v_proj_weight": v_proj_weight}
        for name, weight in weights.items():
            if weight is None:
                raise AssertionError(f"use_separate_proj_weight is True but {name} is None")
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        return [
            (linear(operand, weight, bias), 1)
            for operand, weight, bias in zip((query, key, value), weights.values(), biases, strict=True)
        ]

    return attend(
        query,
        key,
        value,
        embed_dim_to_check,
        num_heads,
        project,
        lambda heads: linear_or_packed(heads, out_proj_weight, out_proj_bias, out_proj_packed, residual),
        bias_k=bias_k,
        bias_v=bias_v,
        add_zero_attn=add_zero_attn,
        dropout_p=dropout_p if training else 0.0,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
        attn_mask=attn_mask,
        separate=use_separate_proj_weight,
        static_k=static_k,
        static_v=static_v,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
        batch_first=batch_first,
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    project: Callable[[Tensor, Tensor, Tensor], Projected],
    finish: Callable[[Tensor], Tensor],
    *,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    separate: bool,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool,
    is_causal: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor | None]:
    """:func:`multi_head_attention_forward` between projections that the caller computes, such as those of quantized layers.

    ``project`` makes of query, key and value, batch or sequence first as they came, up to three projections; ``finish``
    makes the result of the heads put together. ``separate`` says that key and value may have different widths.
    """
    for name, given in (("query", query), ("key", key), ("value", value)):
        if not isinstance(given, Tensor):
            raise TypeError(f"multi_head_attention_forward: {name}: expected a Tensor, got {type(given).__name__}")
    if query.is_nested or key.is_nested or value.is_nested:
        raise RuntimeError("multi_head_attention_forward: nested tensors have no sizes to attend over")
    is_batched = _check(query, key, value, key_padding_mask, attn_mask, num_heads, separate)
    if not is_batched:
        batch_first = True
        if query is key and key is value:
            query = key = value = query.unsqueeze(0)
        else:
            same = key is value
            query, key = query.unsqueeze(0), key.unsqueeze(0)
            value = key if same else value.unsqueeze(0)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    batch, length = query.shape[:2] if batch_first else (query.shape[1], query.shape[0])
    source = key.shape[1 if batch_first else 0]
    embed_dim = query.shape[2]
    head_dim = _check_heads(embed_dim, embed_dim_to_check, num_heads)

    if is_causal and attn_mask is None:
        raise RuntimeError(
            "Need attn_mask if specifying the is_causal hint. "
            "You may use the Transformer module method "
            "`generate_square_subsequent_mask` to create this mask."
        )
    if is_causal and key_padding_mask is None and not need_weights:
        attn_mask = None
    else:
        is_causal = False
    if attn_mask is not None:
        attn_mask = _mask_of_scores(attn_mask, batch, num_heads, length, source)

    q, k, v = (
        part
        for projected, parts in project(query, key, value)
        for part in heads_of(projected, parts, num_heads, head_dim, batch_first)
    )
    if static_k is not None:
        k = _static("static_k", static_k, batch, num_heads, head_dim)
    if static_v is not None:
        v = _static("static_v", static_v, batch, num_heads, head_dim)

    if (static_k is not None or static_v is not None) and bias_k is not None and bias_v is not None:
        raise AssertionError(f"bias cannot be added to static {'key' if static_k is not None else 'value'}.")
    k, v, extra = _with_more_keys(k, v, bias_k, bias_v, add_zero_attn)
    source = k.shape[2]
    mask = _merge_masks(attn_mask, key_padding_mask, batch, source, extra, query.dtype)

    weights = None
    if need_weights:
        weights = _attention_weights(q, k, mask, dropout_p)
        heads = matmul(weights, v)
        if average_attn_weights:
            weights = weights.mean(dim=1)
    else:
        heads = scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)
    del q, k, v
    # (N, H, L, d), whose memory is (N, L, H, d): of what is batch first, no copy.
    heads = heads.transpose(1, 2) if batch_first else heads.permute(2, 0, 1, 3)
    output = finish(heads.reshape(*heads.shape[:2], embed_dim))
    if not is_batched:
        output = output.squeeze(0)
        weights = None if weights is None else weights.squeeze(0)
    return output, weights


def ragged_self_attention(
    input: Tensor,
    lengths: list[int],
    num_heads: int,
    project: Callable[[Tensor], Tensor],
    finish: Callable[[Tensor], Tensor],
) -> Tensor:
    """Self-attention of sequences that lie one after the other, (sum of lengths, E), each to itself alone; no masks.

    ``project`` makes query, key and value side by side, ``finish`` the result of the heads put together; each is called
    once for all sequences, as if they were one.
    """
    rows, embed_dim = input.shape
    projected = project(input).view(rows, 3, num_heads, embed_dim // num_heads)
    heads = []
    for sequence in projected.split(lengths):
        if sequence.shape[0]:
            q, k, v = sequence.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
            heads.append(scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).reshape(-1, embed_dim))
    return finish(torch.cat(heads))


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    num_heads: int,
    separate: bool,
) -> bool:
    """Whether the arguments have a batch dimension; AssertionError for those that do not fit each other."""
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(f"multi_head_attention_forward: {name}: expected a Tensor, got {type(mask).__name__}")
    rank = query.dim()
    if rank not in (2, 3):
        raise AssertionError(f"query should be unbatched 2D or batched 3D tensor but received {rank}-D query tensor")
    kind = f"{'batched (3-D)' if rank == 3 else 'unbatched (2-D)'} `query`"
    if key.dim() != rank or value.dim() != rank:
        raise AssertionError(
            f"For {kind}, expected `key` and `value` to be {rank}-D but found {key.dim()}-D and {value.dim()}-D tensors"
            " respectively"
        )
    if key_padding_mask is not None:
        if key_padding_mask.dim() != rank - 1:
            raise AssertionError(
                f"For {kind}, expected `key_padding_mask` to be `None` or {rank - 1}-D but found"
                f" {key_padding_mask.dim()}-D tensor instead"
            )
        _check_mask_dtype("key_padding_mask", key_padding_mask)
    if attn_mask is not None:
        if attn_mask.dim() not in (2, 3):
            raise AssertionError(
                f"For {kind}, expected `attn_mask` to be `None`, 2-D or 3-D but found {attn_mask.dim()}-D tensor instead"
            )
        if rank == 2 and attn_mask.dim() == 3 and attn_mask.shape != (num_heads, query.shape[0], key.shape[0]):
            expected = (num_heads, query.shape[0], key.shape[0])
            raise AssertionError(f"Expected `attn_mask` shape to be {expected} but got {attn_mask.shape}")
        _check_mask_dtype("attn_mask", attn_mask)
        if key_padding_mask is not None and key_padding_mask.dtype != attn_mask.dtype:
            warnings.warn(
                "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead.",
                stacklevel=3,
            )
    if separate:
        if key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(
                f"key's sequence and batch dims {key.shape[:-1]} do not match value's {value.shape[:-1]}"
            )
    elif key.shape != value.shape:
        raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")
    return rank == 3


def _check_heads(embed_dim: int, embed_dim_to_check: int, num_heads: int) -> int:
    """The size of a head; AssertionError where heads do not divide the embedding."""
    if embed_dim != embed_dim_to_check:
        raise AssertionError(
            f"embed_dim_to_check: was expecting embedding dimension of {embed_dim_to_check}, but got {embed_dim}"
        )
    if not isinstance(num_heads, (int, torch.SymInt)) or num_heads < 1:
        raise AssertionError(f"num_heads: expected a positive integer, got {num_heads!r}")
    if embed_dim % num_heads:
        raise AssertionError(f"embed_dim {embed_dim} not divisible by num_heads {num_heads}")
    return embed_dim // num_heads


def _with_more_keys(
    k: Tensor, v: Tensor, bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool
) -> tuple[Tensor, Tensor, int]:
    """Keys and values with those that every sequence has at its end, and how many these are: a learned one, and zeros."""
    extra = 0
    batch, num_heads, _, head_dim = k.shape
    if bias_k is not None and bias_v is not None:
        k, v = (
            torch.cat([x, b.view(1, num_heads, 1, head_dim).expand(batch, -1, -1, -1).to(x.dtype)], dim=2)
            for x, b in ((k, bias_k), (v, bias_v))
        )
        extra += 1
    elif bias_k is not None or bias_v is not None:
        raise AssertionError("bias_k and bias_v go together: one of them is None")
    if add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(batch, num_heads, 1, head_dim)], dim=2) for x in (k, v))
        extra += 1
    return k, v, extra


def _check_mask_dtype(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise AssertionError(f"only bool and floating types of {name} are supported, got {mask.dtype}")


def linear_or_packed(
    input: Tensor, weight: Tensor, bias: Tensor | None, packed: PackedWeight | None, residual: Tensor | None = None
) -> Tensor:
    """``input @ weightᵀ + bias``, and ``residual`` if there is one, from the packed copy where that can be used."""
    if packed is not None and residual is not None:
        output = packed.linear_add(input, weight, bias, residual)
        if output is not None:
            return output
    output = None if packed is None else packed.linear(input, weight, bias, "none")
    if output is None:
        output = linear(input, weight, bias)
    return output if residual is None else residual + output


def heads_of(
    projected: Tensor, parts: int, num_heads: int, head_dim: int, batch_first: bool
) -> tuple[Tensor, ...] | list[Tensor]:
    """The parts of a projection (N, L, parts * E), or (L, N, ...), each as (N, H, L, d): views."""
    first, second = projected.shape[:2]
    if parts == 1:
        split = (projected.view(first, second, num_heads, head_dim),)
    elif not projected.requires_grad:
        order = (2, 0, 3, 1, 4) if batch_first else (2, 1, 3, 0, 4)
        return projected.view(first, second, parts, num_heads, head_dim).permute(order).unbind(0)
    else:
        # Unbound where they lie next to each other: its gradient is then one stack, in the order of memory.
        split = projected.view(first, second, parts, num_heads, head_dim).unbind(2)
    if batch_first:
        return [part.transpose(1, 2) for part in split]
    return [part.permute(1, 2, 0, 3) for part in split]


def _project(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, packed: PackedWeight | None
) -> Projected:
    """Query, key and value projected by as few products as there are different operands."""
    if key is value:
        if query is key:
            return [(linear_or_packed(query, weight, bias, packed), 3)]
        embed_dim = query.shape[-1]
        by_query, by_both = weight.split([embed_dim, 2 * embed_dim])
        bias_query, bias_both = (None, None) if bias is None else bias.split([embed_dim, 2 * embed_dim])
        return [(linear(query, by_query, bias_query), 1), (linear(key, by_both, bias_both), 2)]
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return [
        (linear(operand, w, b), 1) for operand, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True)
    ]


def _static(name: str, given: Tensor, batch: int, num_heads: int, head_dim: int) -> Tensor:
    if not isinstance(given, Tensor):
        raise TypeError(f"multi_head_attention_forward: {name}: expected a Tensor, got {type(given).__name__}")
    if given.shape[0] != batch * num_heads:
        raise AssertionError(f"expecting {name}.size(0) of {batch * num_heads}, but got {given.shape[0]}")
    if given.shape[2] != head_dim:
        raise AssertionError(f"expecting {name}.size(2) of {head_dim}, but got {given.shape[2]}")
    return given.view(batch, num_heads, given.shape[1], head_dim)


def _mask_of_scores(mask: Tensor, batch: int, num_heads: int, length: int, source: int) -> Tensor:
    """The attention mask as (1 or N, 1 or H, L, S)."""
    if mask.dim() == 2:
        if mask.shape != (length, source):
            raise RuntimeError(f"The shape of the 2D attn_mask is {mask.shape}, but should be {(length, source)}.")
        return mask.view(1, 1, length, source) if mask.is_contiguous() else mask[None, None]
    if mask.shape != (batch * num_heads, length, source):
        expected = (batch * num_heads, length, source)
        raise RuntimeError(f"The shape of the 3D attn_mask is {mask.shape}, but should be {expected}.")
    return mask.unflatten(0, (batch, num_heads))


def _merge_masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    batch: int,
    source: int,
    extra: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """One mask as attention takes it: boolean and True where to look, or floating and added.

    ``extra`` keys at the end, of ``bias_k`` and ``add_zero_attn``, are seen by all.
    """
    padding = key_padding_mask
    if attn_mask is None and padding is None:
        return None
    if extra:
        attn_mask = None if attn_mask is None else torch.nn.functional.pad(attn_mask, (0, extra))
        padding = None if padding is None else torch.nn.functional.pad(padding, (0, extra))
    if padding is not None:
        if padding.shape != (batch, source):
            axis = 0 if padding.shape[0] != batch else 1
            raise AssertionError(
                f"Expected key_padding_mask.shape[{axis}] to be {(batch, source)[axis]}, but got {padding.shape[axis]}"
            )
        padding = padding[:, None, None]
    if attn_mask is None or padding is None:
        mask = padding if attn_mask is None else attn_mask
        return mask.logical_not() if mask.dtype == torch.bool else mask
    if attn_mask.dtype == torch.bool and padding.dtype == torch.bool:
        return (attn_mask | padding).logical_not()
    return _added(attn_mask, dtype) + _added(padding, dtype)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)


def _attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    """dropout(softmax(q kᵀ / √d + mask)), (N, H, L, S)."""
    scores = matmul(q * math.sqrt(1.0 / q.shape[-1]), k.transpose(2, 3))
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(mask.logical_not(), -math.inf)
        else:
            scores = scores + mask.to(scores.dtype)
    weights = softmax(scores, dim=-1)
    return dropout(weights, dropout_p) if dropout_p > 0.0 else weights
