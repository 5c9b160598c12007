"""Linear layers whose weight alone is quantized, in bfloat16, against what torch has for them: int8 with a scale a row, and
four bits in groups of 32 and 128. The shape is that of the product, M×N×K."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends.reference.quantize import pack
from ..ops.weight_only_linear import weight_only_linear
from .benchmark import Benchmark, Problem, register


def _int8(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    m, n, k = shape
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scale = (torch.rand(n) + 0.5).to(dtype)  # torch's are of the input's dtype
    wide = scale.float()

    def ours(x: Tensor) -> Tensor:
        return weight_only_linear(x, weight, wide)

    def torchs(x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, weight, scale)

    return _problem(m, n, k, dtype, ours, torchs)


def _int4(group: int) -> Callable[[tuple[int, ...], torch.dtype], Problem]:
    def build(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
        m, n, k = shape
        q = torch.randint(0, 16, (n, k), dtype=torch.int32)
        weight = pack(q)
        laid_out = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
        scale = (torch.rand(n, k // group) + 0.5).to(dtype)
        # torch's formula is (q - 8) scale + zero.
        torchs_scale = torch.stack((scale, torch.zeros_like(scale)), -1).transpose(0, 1).contiguous()
        wide, eight = scale.float(), torch.full((n, k // group), 8, dtype=torch.int32)

        def ours(x: Tensor) -> Tensor:
            return weight_only_linear(x, weight, wide, eight, group_size=group, from_dtype="uint4")

        def torchs(x: Tensor) -> Tensor:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, laid_out, group, torchs_scale)

        return _problem(m, n, k, dtype, ours, torchs)

    return build


def _problem(
    m: int, n: int, k: int, dtype: torch.dtype, ours: Callable[[Tensor], Tensor], torchs: Callable[[Tensor], Tensor]
) -> Problem:
    return Problem(
        lambda: (torch.randn(m, k).to(dtype),),
        {"fastnn": ours, "torch": torchs},
        2.0 * m * n * k,
        peak="bf16" if dtype is torch.bfloat16 else "f32",
    )


_SHAPES = tuple((m, 4096, 1024) for m in (1, 4, 16, 128))
# Other dtypes torch computes element by element.
_DTYPES = (torch.bfloat16,)
register(Benchmark("weight_only_int8", "MxNxK", _SHAPES, _int8, _DTYPES))
register(Benchmark("weight_only_int4", "MxNxK", _SHAPES, _int4(32), _DTYPES))
register(Benchmark("weight_only_int4_128", "MxNxK", _SHAPES, _int4(128), _DTYPES))
