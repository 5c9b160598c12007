"""Observers see the inputs of a layer, batch by batch, and choose the range that its integers cover.

Each has ``observe(x)``, which takes a tensor of any shape and float dtype, and ``range()``, ``(lo, hi)`` as floats with
lo <= 0 <= hi, so that 0 has a code of its own. Only finite values count.

- :class:`MinMax`: the least and the largest value of all (Jacob et al., CVPR 2018, section 3.1.1, without averaging).
- :class:`MovingAverage`: exponential averages of the batches' least and largest values (the same section).
- :class:`Percentile`: the range that holds all but a share of the values, half of it at each end (Wu et al. 2020,
  arXiv:2004.09602, section 4).
- :class:`MSE`: the range whose quantization has the smallest mean squared error (the same idea as Banner et al.,
  NeurIPS 2019, searched instead of derived).

The last two count values in bins: 2¹³ of them between -2ᵏ and 2ᵏ, of which k grows where a value needs it. Two neighbours
then become one bin, exactly, so that the counts do not depend on the order of the batches.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable

import torch
from torch import Tensor

_BINS = 1 << 13
#: A value less than 2⁻¹²⁰ counts as 0.
_SMALLEST = -120


class Observer(abc.ABC):
    """Sees batches of values and chooses a range for them: :meth:`observe` and :meth:`range`."""

    def observe(self, x: Tensor) -> None:
        """Takes note of the finite values of ``x``."""
        values = x.detach().float().flatten()
        values = values[values.isfinite()]
        if values.numel():
            self._see(values)

    def range(self) -> tuple[float, float]:
        """``(lo, hi)``, lo <= 0 <= hi. Raises ValueError if no finite value was seen."""
        found = self._range()
        if found is None:
            raise ValueError(f"{type(self).__name__}: no finite value was observed")
        lo, hi = found
        return min(lo, 0.0), max(hi, 0.0)

    @abc.abstractmethod
    def _see(self, values: Tensor) -> None:
        """Takes in finite values: float32, of one dimension, at least one."""

    @abc.abstractmethod
    def _range(self) -> tuple[float, float] | None:
        """The range of what was seen, or None if nothing was."""


class MinMax(Observer):
    """The least and the largest value seen."""

    def __init__(self) -> None:
        self._found: tuple[float, float] | None = None

    def _see(self, values: Tensor) -> None:
        lo, hi = (value.item() for value in values.aminmax())
        self._found = (lo, hi) if self._found is None else (min(lo, self._found[0]), max(hi, self._found[1]))

    def _range(self) -> tuple[float, float] | None:
        return self._found


class MovingAverage(Observer):
    """``average += momentum * (batch's - average)`` of the least and of the largest value, begun with the first batch's.

    Raises ValueError for a momentum outside of (0, 1].
    """

    def __init__(self, momentum: float = 0.1) -> None:
        if not 0.0 < momentum <= 1.0:
            raise ValueError(f"MovingAverage: momentum must be in (0, 1], got {momentum!r}")
        self.momentum = momentum
        self._found: tuple[float, float] | None = None

    def _see(self, values: Tensor) -> None:
        ends = tuple(value.item() for value in values.aminmax())
        if self._found is None:
            self._found = ends
        else:
            lo, hi = (old + self.momentum * (new - old) for old, new in zip(self._found, ends, strict=True))
            self._found = lo, hi

    def _range(self) -> tuple[float, float] | None:
        return self._found


class _Histogram(Observer):
    """Counts values in bins, and keeps the least and the largest."""

    def __init__(self) -> None:
        self._exponent = _SMALLEST
        self._counts = torch.zeros(_BINS, dtype=torch.int64)
        self._ends = MinMax()

    def _see(self, values: Tensor) -> None:
        self._ends._see(values)
        lo, hi = self._ends._range()
        needed = math.frexp(max(-lo, hi))[1]  # the largest magnitude is below 2 ** needed
        if needed > self._exponent:
            self._widen(min(needed - self._exponent, _BINS.bit_length()))
            self._exponent = needed
        # Doubles, in which the product by a power of two is exact.
        positions = (values.double() * 2.0**-self._exponent + 1.0) * (_BINS // 2)
        found = positions.floor_().clamp_(0, _BINS - 1).long()
        self._counts += torch.bincount(found, minlength=_BINS).to(self._counts.device)

    def _widen(self, doublings: int) -> None:
        for _ in range(doublings):
            halves = self._counts.view(_BINS // 2, 2).sum(1)
            self._counts = torch.nn.functional.pad(halves, (_BINS // 4, _BINS // 4))

    def _width(self) -> float:
        return 2.0**self._exponent / (_BINS // 2)


class Percentile(_Histogram):
    """The range between two quantiles: ``percentile`` per cent of the values lie in it, and half of the others at each end.

    Quantiles are found to a bin, 2⁻¹² of the largest magnitude's power of two, within which they are interpolated. Raises
    ValueError for a percentile outside of (0, 100].
    """

    def __init__(self, percentile: float = 99.99) -> None:
        if not 0.0 < percentile <= 100.0:
            raise ValueError(f"Percentile: percentile must be in (0, 100], got {percentile!r}")
        super().__init__()
        self.percentile = percentile

    def _range(self) -> tuple[float, float] | None:
        ends = self._ends._range()
        if ends is None:
            return None
        outside = (1.0 - self.percentile / 100.0) / 2.0
        lo, hi = (self._quantile(share) for share in (outside, 1.0 - outside))
        return max(lo, ends[0]), min(hi, ends[1])

    def _quantile(self, share: float) -> float:
        sums = self._counts.double().cumsum(0)
        wanted = share * sums[-1].item()
        index = min(int(torch.searchsorted(sums, torch.tensor(wanted, dtype=torch.float64))), _BINS - 1)
        before = sums[index - 1].item() if index else 0.0
        inside = (wanted - before) / max(self._counts[index].item(), 1)
        return (index + inside - _BINS // 2) * self._width()


class MSE(_Histogram):
    """The range whose rounding and clipping to ``levels`` codes has the smallest mean squared error over the bins.

    Searched: both ends shrunk by a common factor, then either by itself, of 128 steps each, twice over.
    """

    _STEPS = 128

    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        self.levels = levels

    def _range(self) -> tuple[float, float] | None:
        ends = self._ends._range()
        if ends is None:
            return None
        filled = self._counts.nonzero().flatten()
        centres = (filled.double() + 0.5 - _BINS // 2) * self._width()
        centres = centres.clamp_(*ends)
        counts = self._counts[filled].double()
        lo, hi = min(ends[0], 0.0), max(ends[1], 0.0)
        if lo == hi:
            return lo, hi
        factors = torch.arange(1, self._STEPS + 1, dtype=torch.float64) / self._STEPS
        one = torch.ones_like(factors)
        for by_lo, by_hi in ((factors, factors), (factors, one), (one, factors), (factors, one), (one, factors)):
            errors = self._errors(lo * by_lo, hi * by_hi, centres, counts)
            # Of equal ones the widest.
            best = self._STEPS - 1 - int(errors.flip(0).argmin())
            lo, hi = lo * by_lo[best].item(), hi * by_hi[best].item()
        return lo, hi

    def _errors(self, lo: Tensor, hi: Tensor, centres: Tensor, counts: Tensor) -> Tensor:
        """Σ counts · (centre - its code's value)², for each pair of ends."""
        found = []
        for low, high in zip(lo.tolist(), hi.tolist(), strict=True):
            scale = (high - low) / (self.levels - 1)
            if scale <= 0.0:
                found.append(math.inf)
                continue
            zero = min(max(round(-low / scale), 0), self.levels - 1)
            codes = (centres / scale).round_().add_(zero).clamp_(0, self.levels - 1)
            found.append(torch.dot((codes.sub_(zero).mul_(scale) - centres).square_(), counts).item())
        return torch.tensor(found, dtype=torch.float64)


#: The names that :class:`fastnn.quant.Int8Static` knows.
OBSERVERS: dict[str, Callable[[], Observer]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "mse": MSE,
}

__all__ = ["MSE", "OBSERVERS", "MinMax", "MovingAverage", "Observer", "Percentile"]
