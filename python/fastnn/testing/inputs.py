"""Makes the inputs on which an op is verified: which values they hold, and how they lie in memory.

A case declares shapes only, by calling a `Maker`; the suite then runs the same shapes over every kind of values and
every layout, so that no case can forget one.
"""

from __future__ import annotations

import math

import torch

__all__ = ["LAYOUTS", "VALUES", "Maker", "poisoned", "surroundings_intact"]

#: What the numbers look like.
#:   normal      standard normal
#:   integer     -4 … 4: every sum is exact, so the result must be too; finds a wrong index that a tolerance hides
#:   wide        standard normal times a power of two from 2**-20 … 2**20 (2**-4 … 2**4 in float16)
#:   cancelling  the second half of the reduced axis takes back the first, all but a thousandth
#:   special     normal, with an infinity, a NaN and a zero in it
#: Tensors of integers beside them have all values of their dtype, but for "integer".
VALUES = ("normal", "integer", "wide", "cancelling", "special")

#: How they lie in memory. Whatever surrounds a tensor in its buffer is NaN (the extreme value for integers).
#:   contiguous  aligned to 64 bytes
#:   misaligned  contiguous, one element further
#:   transposed  the last two axes swapped in memory
#:   sliced      every second element of a larger tensor
#:   expanded    the first axis has stride 0 where there are three axes or more
LAYOUTS = ("contiguous", "misaligned", "transposed", "sliced", "expanded")

_GUARD = 64


def _poison(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def poisoned(
    shape: tuple[int, ...], dtype: torch.dtype, *, offset: int = 0, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """An uninitialised-looking contiguous tensor: it and 64 elements on either side are NaN (or the largest integer)."""
    count = math.prod(shape)
    buffer = torch.full((_GUARD + offset + count + _GUARD,), _poison(dtype), dtype=dtype, device=device)
    return buffer[_GUARD + offset : _GUARD + offset + count].view(shape)


def surroundings_intact(tensor: torch.Tensor) -> bool:
    """Whether the poison around a tensor from `poisoned` is still there, that is, nothing wrote past its ends."""
    whole = tensor.new_empty(0).set_(tensor.untyped_storage())
    begin = tensor.storage_offset()
    outside = torch.cat([whole[:begin], whole[begin + tensor.numel() :]])
    if tensor.dtype.is_floating_point:
        return bool(outside.isnan().all())
    return bool((outside == _poison(tensor.dtype)).all())


class Maker:
    """Makes tensors of given shapes in one dtype, kind of values (see `VALUES`) and layout (see `LAYOUTS`).

    The same seed gives the same numbers. `tensors` counts what was made; the first one of a sample is treated
    differently from the others when values have to cancel. On every device the numbers are the same.
    """

    def __init__(
        self, dtype: torch.dtype, values: str, layout: str, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        if values not in VALUES:
            raise ValueError(f"values must be one of {', '.join(VALUES)}; got {values!r}")
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
        self.dtype, self.values, self.layout, self.device = dtype, values, layout, device
        self.tensors = 0
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(
        self,
        *shape: int,
        reduced: int | None = None,
        dtype: torch.dtype | None = None,
        requires_grad: bool | None = None,
    ) -> torch.Tensor:
        """A tensor of `shape`. `reduced` is the axis that the op sums over, if any, for the cancelling values."""
        dtype = dtype or self.dtype
        tensor = self._lay_out(self._numbers(shape, reduced, dtype).to(dtype))
        self.tensors += 1
        if requires_grad is None:
            requires_grad = False
        return tensor.requires_grad_(requires_grad)

    def _numbers(self, shape: tuple[int, ...], reduced: int | None, dtype: torch.dtype) -> torch.Tensor:
        if self.values == "integer":
            low = 0 if dtype == torch.uint8 else -4
            return torch.randint(low, 5, shape, generator=self._generator)
        if not dtype.is_floating_point:
            ends = torch.iinfo(dtype)
            return torch.randint(ends.min, ends.max + 1, shape, generator=self._generator)
        numbers = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        if self.values == "wide":
            reach = 4 if dtype == torch.float16 else 20
            numbers *= torch.exp2(torch.randint(-reach, reach + 1, shape, generator=self._generator).double())
        elif self.values == "cancelling" and reduced is not None and shape[reduced] >= 2:
            half = shape[reduced] // 2
            first = numbers.narrow(reduced, 0, half)
            second = numbers.narrow(reduced, half, half)
            if self.tensors == 0:
                second.copy_(-first)
            else:
                second.mul_(2.0**-10).add_(1.0).mul_(first)
        elif self.values == "special":
            # Zero-size axes have nowhere to put them.
            flat = numbers.view(-1)
            for value in (math.inf, -math.inf, math.nan, 0.0):
                if flat.numel() > 0:
                    place = torch.randint(flat.numel(), (1,), generator=self._generator)
                    flat[place] = value
        return numbers

    def _lay_out(self, numbers: torch.Tensor) -> torch.Tensor:
        shape = tuple(numbers.shape)

        def there(*size: int, offset: int = 0) -> torch.Tensor:
            return poisoned(size, numbers.dtype, offset=offset, device=self.device)

        if self.layout == "misaligned":
            return there(*shape, offset=1).copy_(numbers)
        if self.layout == "transposed" and numbers.dim() >= 2:
            return there(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2).copy_(numbers)
        if self.layout == "sliced" and numbers.dim() >= 1:
            return there(*shape[:-1], 2 * shape[-1])[..., ::2].copy_(numbers)
        if self.layout == "expanded" and numbers.dim() >= 3 and shape[0] > 0:
            return there(1, *shape[1:]).copy_(numbers[:1]).expand(shape)
        return there(*shape).copy_(numbers)
