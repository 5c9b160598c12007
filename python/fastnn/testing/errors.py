"""Measures an error against float64, in units that say which precision it looks like. NaN counts as wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["Roundoff", "first_wrong_class", "gamma", "looks_like", "relative_error", "roundoff"]

#: Unit roundoff u = 2**-p of a format with p bits of significand (Higham, Accuracy and Stability, section 2.1).
_SIGNIFICAND = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}

#: What a float32 product may use besides float32, for naming the precision that an error looks like.
_FORMATS = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "two bfloat16 parts": 2.0**-16,
    "TF32 or float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}


def roundoff(dtype: torch.dtype) -> float:
    """The unit roundoff of a floating dtype; 0 for integers, whose arithmetic is exact."""
    return 2.0 ** -_SIGNIFICAND[dtype] if dtype.is_floating_point else 0.0


def gamma(count: float, u: float) -> float:
    """γ_n = n·u / (1 − n·u), the bound on n rounding errors in a row (Higham, section 3.1)."""
    return count * u / (1 - count * u) if count * u < 1 else math.inf


@dataclass(frozen=True)
class Roundoff:
    """The roundings that an op may make: in the arithmetic it computes with, and once in its result."""

    compute: float
    result: float
    tiny: float

    @classmethod
    def of(cls, dtype: torch.dtype, precision: str = "highest") -> Roundoff:
        """Half precisions accumulate in float32; `precision` is `torch.get_float32_matmul_precision()`'s."""
        if not dtype.is_floating_point:
            return cls(0.0, 0.0, 0.0)
        result = roundoff(dtype)
        compute = min(result, 2.0**-24)
        if dtype == torch.float32:
            compute = {"highest": 2.0**-24, "high": 2.0**-15, "medium": 2.0**-7}[precision]
        tiny = torch.finfo(dtype).smallest_normal
        # Subnormal numbers are this far apart. Below the normal ones torch's float64, the reference, is no oracle: its
        # sigmoid goes to zero where the true value is still a subnormal number.
        return cls(compute, result, tiny if dtype == torch.float64 else tiny * 2 * result)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """‖value − reference‖ / ‖reference‖ (Frobenius) in float64; infinity when a NaN is on one side only."""
    value, reference = value.detach().double(), reference.detach().double()
    if first_wrong_class(value, reference) is not None:
        return math.inf
    finite = reference.isfinite()
    value, reference = value[finite], reference[finite]
    norm = torch.linalg.vector_norm(reference).item() if reference.numel() else 0.0
    error = torch.linalg.vector_norm(value - reference).item() if reference.numel() else 0.0
    return error / norm if norm else (0.0 if error == 0 else math.inf)


def first_wrong_class(
    value: torch.Tensor, *references: torch.Tensor, skip: torch.Tensor | None = None
) -> tuple[int, ...] | None:
    """The first index where `value` is finite, NaN, +inf or −inf and no reference is the same; None if there is none.

    More than one reference may be given because a sum that overflows in one order of additions may not in another.
    """
    agrees = torch.zeros_like(value, dtype=torch.bool) if skip is None else skip.clone()
    for reference in references:
        agrees |= _classes(value) == _classes(reference)
    wrong = (~agrees).nonzero()
    return tuple(wrong[0].tolist()) if len(wrong) else None


def _classes(tensor: torch.Tensor) -> torch.Tensor:
    """0 finite, 1 NaN, 2 plus infinity, 3 minus infinity."""
    return tensor.isnan().long() + 2 * (tensor == math.inf).long() + 3 * (tensor == -math.inf).long()


def looks_like(unit_error: float) -> str:
    """The name of the format whose unit roundoff is nearest to a root-mean-square error."""
    if not math.isfinite(unit_error) or unit_error <= 0:
        return "no format"
    return min(_FORMATS, key=lambda name: abs(math.log2(unit_error) - math.log2(_FORMATS[name])))
