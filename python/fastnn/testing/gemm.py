"""The matrix products: matmul, mm, bmm, addmm, baddbmm, mv, linear, linear_act, bilinear.

A product of depth K is bounded by γ_K·|A|·|B| elementwise (Higham, section 3.5), so its magnitude is the same product of
absolute values. Shapes are primes and the neighbours of the tiles' 14, 16, 32 and 64; one is deep, since only a long sum
tells a float32 accumulation from a cheaper one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .case import Case, Sample, register
from .inputs import Maker

_MKN = [
    (1, 1, 1),
    (1, 17, 31),
    (2, 3, 5),
    (7, 64, 1),
    (13, 31, 33),
    (15, 16, 17),
    (33, 0, 7),
    (0, 5, 3),
    (63, 65, 129),
    (67, 131, 29),
    (31, 1009, 37),
]
_BATCHED = [((3,), (3,)), ((2, 3), (3,)), ((1, 5), (2, 1)), ((), (4,)), ((0,), (1,))]


def _product(result: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.double().abs() @ b.double().abs()


def _depth(a: torch.Tensor, b: torch.Tensor) -> int:
    return a.shape[-1]


def _mm(make: Maker) -> Iterator[Sample]:
    for m, k, n in _MKN:
        yield Sample((make(m, k, reduced=-1), make(k, n, reduced=-2)))


def _bmm(make: Maker) -> Iterator[Sample]:
    for batch, (m, k, n) in zip((1, 2, 3, 5, 7, 0), _MKN[2:], strict=False):
        yield Sample((make(batch, m, k, reduced=-1), make(batch, k, n, reduced=-2)))


def _matmul(make: Maker) -> Iterator[Sample]:
    yield from _mm(make)
    for (left, right), (m, k, n) in zip(_BATCHED, _MKN[1:], strict=False):
        yield Sample((make(*left, m, k, reduced=-1), make(*right, k, n, reduced=-2)))
    yield Sample((make(67, reduced=-1), make(67, reduced=-1)))
    yield Sample((make(67, reduced=-1), make(67, 13, reduced=-2)))
    yield Sample((make(3, 13, 67, reduced=-1), make(67, reduced=-1)))


def _mv(make: Maker) -> Iterator[Sample]:
    for m, k, _ in _MKN:
        yield Sample((make(m, k, reduced=-1), make(k, reduced=-1)))


def _added(batched: bool) -> Callable[[Maker], Iterator[Sample]]:
    def samples(make: Maker) -> Iterator[Sample]:
        scalings: list[dict[str, float]] = [{}, {"beta": 2, "alpha": 3}, {"beta": 0}, {"alpha": -1}]
        for number, (m, k, n) in enumerate(_MKN):
            batch = (1 + number % 3,) if batched else ()
            a = make(*batch, m, k, reduced=-1)
            b = make(*batch, k, n, reduced=-2)
            added = make(n) if number % 2 else make(*batch, m, n)
            yield Sample((added, a, b), dict(scalings[number % len(scalings)]))

    return samples


def _added_magnitude(
    result: torch.Tensor,
    added: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor:
    # beta = 0 ignores the first argument, NaN and all.
    kept = abs(beta) * added.abs() if beta else torch.zeros_like(added)
    return abs(alpha) * (a.abs() @ b.abs()) + kept


def _linear(make: Maker) -> Iterator[Sample]:
    for number, (m, k, n) in enumerate(_MKN):
        batch = ((), (2,), (2, 3))[number % 3]
        x = make(*batch, m, k, reduced=-1)
        weight = make(n, k, reduced=-1)
        yield Sample((x, weight) if number % 4 == 3 else (x, weight, make(n)))
    yield Sample((make(37, reduced=-1), make(11, 37, reduced=-1), make(11)))


def _linear_magnitude(
    result: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *_: str,
) -> torch.Tensor:
    magnitude = x.abs() @ weight.abs().T
    return magnitude if bias is None else magnitude + bias.abs()


#: Name, torch's function, and the largest slope of it, by which an error of its argument grows.
ACTIVATIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], float]] = {
    "none": (lambda x: x, 1.0),
    "relu": (F.relu, 1.0),
    "gelu": (F.gelu, 1.13),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), 1.13),
    "silu": (F.silu, 1.1),
    "sigmoid": (torch.sigmoid, 0.25),
    "tanh": (torch.tanh, 1.0),
    "relu6": (F.relu6, 1.0),
}


def linear_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """activation(x·weightᵀ + bias) by torch's own functions, one after the other."""
    return ACTIVATIONS[activation or "none"][0](F.linear(x, weight, bias))


def _linear_act(make: Maker) -> Iterator[Sample]:
    names = list(ACTIVATIONS)
    for number, (m, k, n) in enumerate(_MKN + _MKN[3:]):
        x, weight = make(m, k, reduced=-1), make(n, k, reduced=-1)
        yield Sample((x, weight, make(n) if number % 3 else None, names[number % len(names)]))


def _linear_act_magnitude(
    result: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    before = _linear_magnitude(result, x, weight, bias)
    # The activation's own roundings are of the size of its argument where 1 + erf cancels.
    return ACTIVATIONS[activation][1] * before + result.abs() + F.linear(x, weight, bias).abs()


def _bilinear(make: Maker) -> Iterator[Sample]:
    for batch, p, q, n in ((1, 1, 1, 1), (3, 5, 7, 2), (17, 13, 31, 5), (2, 33, 15, 11)):
        x, y = make(batch, p, reduced=-1), make(batch, q)
        weight = make(n, p, q, reduced=-2)
        yield Sample((x, y, weight) if batch == 3 else (x, y, weight, make(n)))
    yield Sample((make(2, 3, 7), make(2, 3, 5), make(4, 7, 5), make(4)))


def _bilinear_magnitude(
    result: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    return F.bilinear(x.abs(), y.abs(), weight.abs(), None if bias is None else bias.abs())


register(Case("matmul", torch.matmul, _matmul, _product, _depth, "fastnn:matmul", out=True))
register(Case("mm", torch.mm, _mm, _product, _depth, "fastnn:mm", out=True))
register(Case("bmm", torch.bmm, _bmm, _product, _depth, "fastnn:bmm", out=True))
register(Case("mv", torch.mv, _mv, _product, _depth, "fastnn:mv", out=True))
register(
    Case(
        "addmm",
        torch.addmm,
        _added(False),
        _added_magnitude,
        lambda added, a, b, **_: a.shape[-1] + 3,
        "fastnn:addmm",
        out=True,
    )
)
register(
    Case(
        "baddbmm",
        torch.baddbmm,
        _added(True),
        _added_magnitude,
        lambda added, a, b, **_: a.shape[-1] + 3,
        "fastnn:baddbmm",
        out=True,
    )
)
register(
    Case(
        "linear",
        F.linear,
        _linear,
        _linear_magnitude,
        lambda x, *_: x.shape[-1] + 1,
        "fastnn.functional:linear",
    )
)
register(
    Case(
        "linear_act",
        linear_act,
        _linear_act,
        _linear_act_magnitude,
        lambda x, *_: x.shape[-1] + 8,
        "fastnn.functional:linear_act",
        exact=False,
    )
)
register(
    Case(
        "bilinear",
        F.bilinear,
        _bilinear,
        _bilinear_magnitude,
        lambda x, y, *_: x.shape[-1] + y.shape[-1] + 2,
        "fastnn.functional:bilinear",
    )
)


def _int_mm(make: Maker) -> Iterator[Sample]:
    for number, (m, k, n) in enumerate(_MKN):
        # The extremes, where a product of two bytes summed in pairs saturates 16 bits.
        a, b = make(m, k), make(k, n, dtype=torch.int8)
        if number % 2:
            a, b = torch.full_like(a, torch.iinfo(a.dtype).min or 255), torch.full_like(b, -128)
        yield Sample((a, b))


def int_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product of 8-bit integers in int32, by way of float64, in which it is exact; torch._int_mm refuses uint8."""
    return a @ b if a.dtype == torch.int64 else (a.double() @ b.double()).to(torch.int32)


register(
    Case(
        "int_mm",
        int_mm,
        _int_mm,
        _product,
        _depth,
        "fastnn.functional:int_mm",
        dtypes=(torch.int8, torch.uint8),
        differentiable=False,
        product=False,
    )
)


def _float8(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest number of eight bits, the largest instead of what is larger."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


def scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> torch.Tensor:
    """a and b rounded to eight bits, multiplied and scaled in float32 at least; torch has no such product on every CPU."""
    wide = torch.promote_types(a.dtype, torch.float32)
    y = _float8(a, dtypes[0]).to(wide) @ _float8(b, dtypes[1]).to(wide) * scale_a.to(wide) * scale_b.to(wide)
    return (y if bias is None else y + bias.to(wide)).to(a.dtype)


def fastnns_scaled_mm(*arguments: Any) -> torch.Tensor:
    """The same, of the same arguments, by :func:`fastnn.functional.scaled_mm`, given what a and b round to."""
    from .. import functional

    a, b, scale_a, scale_b, bias, dtypes = arguments
    recipe = 0 if scale_a.numel() == scale_b.numel() == 1 else 1
    left, right = _float8(a, dtypes[0]), _float8(b, dtypes[1])
    scales = scale_a.float(), scale_b.float()
    return functional.scaled_mm(left, right, scales[0], recipe, scales[1], recipe, bias=bias, output_dtype=a.dtype)


def _scaled_mm(make: Maker) -> Iterator[Sample]:
    kinds = (torch.float8_e4m3fn, torch.float8_e5m2)
    for number, (m, k, n) in enumerate(_MKN):
        a, b = make(m, k, reduced=-1), make(k, n, reduced=0)
        scales = (make(m, 1), make(1, n)) if number % 2 else (make(1, 1), make(1, 1))
        yield Sample((a, b, *scales, make(n) if number % 3 else None, (kinds[number % 2], kinds[number // 2 % 2])))


def _scaled_magnitude(result: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return scaled_mm(*(each.abs() if isinstance(each, torch.Tensor) else each for each in arguments))


register(
    Case(
        "scaled_mm",
        scaled_mm,
        _scaled_mm,
        _scaled_magnitude,
        # An H100's tensor cores keep 14 bits of a sum.
        lambda a, *_: (a.shape[-1] + 4) * (1024 if a.is_cuda else 1),
        "fastnn.testing.gemm:fastnns_scaled_mm",
        dtypes=(torch.bfloat16, torch.float16),
        differentiable=False,
        product=False,
    )
)
