"""How results are judged: against float64, within what rounding explains."""

import torch

#: The version of torch.
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: The unit roundoff of a dtype, and of the type its sums are kept in.
UNIT = {torch.float32: 2**-24, torch.float64: 2**-53, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SUM_UNIT = {**UNIT, torch.bfloat16: 2**-24, torch.float16: 2**-24}


def double(value, absolute=False):
    """Tensors (in lists and tuples too) as float64, or their absolute values; numbers likewise."""
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            return value
        value = value.detach().double()
        return value.abs() if absolute else value
    if isinstance(value, (list, tuple)):
        return type(value)(double(v, absolute) for v in value)
    if isinstance(value, dict):
        return {k: double(v, absolute) for k, v in value.items()}
    if absolute and isinstance(value, (int, float)) and not isinstance(value, bool):
        return abs(value)
    return value


def assert_within(result, exact, magnitude, terms, dtype=None):
    """|result - exact| ≤ terms · u_sum · magnitude + u · |exact|: γ of the sums, and one rounding of the result.

    ``magnitude`` is the same formula on absolute values. NaN and infinities have to agree.
    """
    dtype = dtype or result.dtype
    result = result.detach().double()
    finite = exact.isfinite()
    torch.testing.assert_close(result[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True)
    tiny = torch.finfo(dtype).tiny
    bound = terms * SUM_UNIT[dtype] * magnitude + 1.01 * UNIT[dtype] * exact.abs() + tiny
    excess = ((result - exact).abs() / bound)[finite]
    worst = excess.max().item() if excess.numel() else 0.0
    assert worst <= 1, f"{worst:.3g} times the bound"


def integers(*shape, dtype=torch.float32, low=-4, high=5):
    return torch.randint(low, high, shape).to(dtype)
