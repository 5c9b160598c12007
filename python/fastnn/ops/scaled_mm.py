"""scaled_mm: the product of two matrices of 8-bit floats, with their scales.

    y[m, n] = scale_a[m] · scale_b[n] · Σₖ mat_a[m, k] mat_b[k, n] + bias[n]

Shapes: mat_a (M, K), mat_b (K, N), each of float8_e4m3fn or float8_e5m2, any strides; scales float32: one element each
("TensorWise"), or (M, 1) and (1, N) ("RowWise"); bias (N) in float32, bfloat16 or float16; result (M, N), contiguous, float32,
bfloat16 or float16. ``torch.nn.functional.scaled_mm`` has the same (torch 2.10 or newer), and ``torch._scaled_mm``, as older
programs call it; on GPUs fastnn takes what torch does not: pairs of e5m2, K and N that are no multiples of 16, mat_b row by row.

Every product is exact, since bfloat16 and float16 hold these numbers; sums are float32, and the result is rounded once. The tensor
cores of an H100 or H200 are an exception: they sum 128 of K with about 14 bits (fastnn adds these sums in float32), and with
``use_fast_accum`` all of K, where that is faster. NaN comes out as NaN; e5m2 has infinities, which come out as in float32.

It has no gradient, as torch's has none: a backward through it raises RuntimeError. Other recipes, swizzled scales, a
``contraction_dim`` other than the usual and results in float8 are torch's. Bad input raises what torch raises: ValueError for
shapes, dtypes and scales that do not go together, TypeError for what is no tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import Kernels
from ..backends.codes import FLOAT8
from ..backends.reference import scaled_mm as formula
from ._op import Op, sample_by_sample
from ._route import Unsupported, describe, fall_back

kernels = Kernels("scaled_mm")

_NUMBERS = (torch.float32, torch.bfloat16, torch.float16)
#: torch.nn.functional.ScalingType, which torch before 2.10 does not have.
_TENSOR_WISE, _ROW_WISE = 0, 1


def scaled_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor | list[Tensor],
    scale_recipe_a: Any,
    scale_b: Tensor | list[Tensor],
    scale_recipe_b: Any,
    swizzle_a: Any = None,
    swizzle_b: Any = None,
    bias: Tensor | None = None,
    output_dtype: torch.dtype | None = torch.bfloat16,
    contraction_dim: Sequence[int] = (),
    use_fast_accum: bool = False,
) -> Tensor:
    """(scale_a · mat_a) @ (scale_b · mat_b) + bias of 8-bit floats, as :func:`torch.nn.functional.scaled_mm`. See this module
    for the formula and shapes.

    The recipes are both ``torch.nn.functional.ScalingType.TensorWise`` or both ``RowWise``, or their numbers, 0 and 1.
    """
    in_torch = functools.partial(
        _functional,
        *(mat_a, mat_b, scale_a, scale_recipe_a, scale_b, scale_recipe_b, swizzle_a, swizzle_b, bias, output_dtype),
        *(contraction_dim, use_fast_accum),
    )
    recipes = _listed(scale_recipe_a) + _listed(scale_recipe_b)
    swizzles = _listed(swizzle_a) + _listed(swizzle_b)
    return _scaled_mm(
        *(in_torch, mat_a, mat_b, _listed(scale_a), _listed(scale_b), recipes, swizzles, bias, output_dtype),
        *(contraction_dim, use_fast_accum),
    )


def torchs_scaled_mm(
    input: Tensor,
    mat2: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """``torch._scaled_mm``, where the scales' shapes are the recipe, and a scale of the result counts for float8 alone."""
    in_torch = functools.partial(
        torch._scaled_mm, input, mat2, scale_a, scale_b, bias, scale_result, out_dtype, use_fast_accum
    )
    one = all(isinstance(scale, Tensor) and scale.numel() == 1 for scale in (scale_a, scale_b))
    recipes = [_TENSOR_WISE if one else _ROW_WISE] * 2
    return _scaled_mm(
        in_torch, input, mat2, [scale_a], [scale_b], recipes, [], bias, out_dtype, (), use_fast_accum, scale_result
    )


def torchs_scaled_mm_v2(
    input: Tensor,
    mat2: Tensor,
    scale_a: list[Tensor],
    recipe_a: list[int],
    swizzle_a: list[int],
    scale_b: list[Tensor],
    recipe_b: list[int],
    swizzle_b: list[int],
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    contraction_dim: Sequence[int] = (),
    use_fast_accum: bool = False,
) -> Tensor:
    """``torch._scaled_mm_v2``, which is what ``torch.nn.functional.scaled_mm`` calls."""
    in_torch = functools.partial(
        torch._scaled_mm_v2,
        *(input, mat2, scale_a, recipe_a, swizzle_a, scale_b, recipe_b, swizzle_b, bias, out_dtype),
        *(contraction_dim, use_fast_accum),
    )
    return _scaled_mm(
        *(in_torch, input, mat2, scale_a, scale_b, [*recipe_a, *recipe_b], [*swizzle_a, *swizzle_b], bias, out_dtype),
        *(contraction_dim, use_fast_accum),
    )


def _scaled_mm(
    in_torch: Callable[[], Tensor],
    mat_a: Any,
    mat_b: Any,
    scale_a: list[Any],
    scale_b: list[Any],
    recipes: list[Any],
    swizzles: list[Any],
    bias: Any,
    out_dtype: torch.dtype | None,
    contraction_dim: Sequence[int],
    use_fast_accum: bool,
    scale_result: Tensor | None = None,
) -> Tensor:
    try:
        if len(scale_a) != 1 or len(scale_b) != 1 or len(recipes) != 2:
            raise Unsupported("scales: more than one each")
        if any(_number(swizzle) for swizzle in swizzles):
            raise Unsupported("swizzle: scales in another order")
        if tuple(contraction_dim) not in ((), (1, 0), (-1, -2), (1, -2), (-1, 0)):
            raise Unsupported(f"contraction_dim: expected (1, 0), got {tuple(contraction_dim)}")
        if scale_result is not None:
            raise Unsupported("scale_result: a scale of the result")
        _check(mat_a, mat_b, scale_a[0], scale_b[0], [_number(recipe) for recipe in recipes], bias, out_dtype)
        return SCALED_MM(mat_a, mat_b, scale_a[0], scale_b[0], bias, out_dtype, bool(use_fast_accum))
    except Unsupported as reason:
        return fall_back("scaled_mm", reason.args[0], in_torch)


def _listed(x: Any) -> list[Any]:
    return list(x) if isinstance(x, (list, tuple)) else [] if x is None else [x]


def _number(choice: Any) -> Any:
    """Of a member of one of torch's enumerations."""
    return getattr(choice, "value", choice)


def _functional(mat_a: Any, mat_b: Any, scale_a: Any, recipe_a: Any, scale_b: Any, recipe_b: Any, *rest: Any) -> Tensor:
    """torch's answer to the same call, which does not take numbers for recipes."""
    if not hasattr(F, "scaled_mm"):
        raise ValueError(f"torch {torch.__version__} has no scaled_mm")
    recipe_a, recipe_b = (F.ScalingType(r) if isinstance(r, int) else r for r in (recipe_a, recipe_b))
    return F.scaled_mm(mat_a, mat_b, scale_a, recipe_a, scale_b, recipe_b, *rest)


# ---- checks ------------------------------------------------------------------------------------------------------


def _check(
    mat_a: Any, mat_b: Any, scale_a: Any, scale_b: Any, recipes: list[Any], bias: Any, out_dtype: torch.dtype | None
) -> None:
    tensors = {"mat_a": mat_a, "mat_b": mat_b, "scale_a": scale_a, "scale_b": scale_b, "bias": bias}
    if bias is None:
        del tensors["bias"]
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise Unsupported(f"{name}: expected a Tensor, got {type(value).__name__}")
        if value.device != mat_a.device:
            raise Unsupported(f"{name}: expected the device of mat_a, {mat_a.device}, got {value.device}")
    if mat_a.dtype not in FLOAT8 or mat_b.dtype not in FLOAT8:
        raise Unsupported(
            "expected matrices of float8_e4m3fn or float8_e5m2, got "
            f"{describe('mat_a', mat_a)}, {describe('mat_b', mat_b)}"
        )
    if mat_a.dim() != 2 or mat_b.dim() != 2 or mat_a.shape[1] != mat_b.shape[0]:
        raise Unsupported(
            f"expected mat_a (M, K) and mat_b (K, N), got {describe('mat_a', mat_a)}, {describe('mat_b', mat_b)}"
        )
    m, n = mat_a.shape[0], mat_b.shape[1]
    if recipes == [_ROW_WISE, _ROW_WISE]:
        fits = scale_a.shape == (m, 1) and scale_b.shape == (1, n)
    elif recipes == [_TENSOR_WISE, _TENSOR_WISE]:
        fits = scale_a.numel() == 1 and scale_b.numel() == 1
    else:
        raise Unsupported(f"scale_recipe: expected TensorWise or RowWise twice, got {recipes[0]!r} and {recipes[1]!r}")
    if not fits or scale_a.dtype is not torch.float32 or scale_b.dtype is not torch.float32:
        raise Unsupported(
            "expected scales of one float32 each, or of (M, 1) and (1, N), got "
            f"{describe('scale_a', scale_a)}, {describe('scale_b', scale_b)} for {describe('mat_a', mat_a)}, "
            f"{describe('mat_b', mat_b)}"
        )
    if bias is not None and (bias.shape != (n,) or bias.dtype not in _NUMBERS):
        raise Unsupported(
            f"expected bias (N) of float32, bfloat16 or float16, got {describe('bias', bias)} for N = {n}"
        )
    if out_dtype not in _NUMBERS:
        raise Unsupported(f"output_dtype: expected float32, bfloat16 or float16, got {out_dtype}")


# ---- the op ------------------------------------------------------------------------------------------------------


def _save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> tuple[Tensor | None, ...]:
    return ()


def _no_derivative(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError("fastnn.scaled_mm: the derivative is not implemented, as torch's is not")


def _fake(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    use_fast_accum: bool,
) -> Tensor:
    return mat_a.new_empty((mat_a.shape[0], mat_b.shape[1]), dtype=out_dtype)


#: The product, of scales of one element or of (M, 1) and (1, N).
SCALED_MM = Op(
    "scaled_mm(Tensor mat_a, Tensor mat_b, Tensor scale_a, Tensor scale_b, Tensor? bias, ScalarType out_dtype, "
    "bool use_fast_accum) -> Tensor",
    kernel=kernels.scaled_mm,
    reference=formula.scaled_mm,
    fake=_fake,
    save=_save,
    backward=_no_derivative,
    vmap=lambda info, in_dims, *args: sample_by_sample(SCALED_MM, info, in_dims, args),
)
