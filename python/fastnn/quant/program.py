"""The calls of a chain that follow each other, as one: what Python does between the layers of a network of 8-bit images takes
a tenth of the time of the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _cpu
from ..backends.cpu import DTYPE, empty, empty_strided
from ..backends.cpu import int8_conv as kernels
from .conv import GlobalAverage, Step, Unchanged, is_plain

#: Results begin at multiples of it.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Call:
    """A step, an average, or a maximum pooling with these windows. What it reads are results of calls before it, by their
    numbers, or inputs of all: -1 is the first, -2 the second."""

    what: Step | GlobalAverage | tuple[Any, ...]
    input: int
    residual: int | None = None


class Calls:
    """Runs calls one after the other: the first time with inputs of some layout each by itself, then all as one. Gives the
    results of the calls ``wanted``."""

    #: Layouts remembered.
    MOST = 16

    def __init__(self, calls: Sequence[Call], wanted: Sequence[int]) -> None:
        self._calls = calls
        self._wanted = wanted
        self._dim = max((call.what.conv.codes.dim() for call in calls if isinstance(call.what, Step)), default=4)
        self._made: dict[Any, Callable[..., list[Tensor]]] = {}
        self._watch: _cpu.Watch | Unchanged | None = None

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        if inputs[0].dim() < self._dim:
            return [y.squeeze(0) for y in self(*(x.unsqueeze(0) for x in inputs))]
        if not all(map(is_plain, inputs)):
            return self._one_by_one(*inputs)[0]
        key = tuple([(x.shape, x.stride(), x.dtype) for x in inputs])
        made = self._made.get(key)
        if made is not None and self._watch.same():
            return made(*inputs)
        if made is not None or len(self._made) >= self.MOST:
            self._made.clear()
        results, records = self._one_by_one(*inputs)
        places = [place for call in self._calls for place in _places(call.what)]
        watch = _cpu.Watch(places)
        self._watch = watch if watch.same() else Unchanged(places)  # which reads what C++ cannot
        self._made[key] = _Program.of(records, self._wanted) or (lambda *inputs: self._one_by_one(*inputs)[0])
        return results

    def _one_by_one(self, *inputs: Tensor) -> tuple[list[Tensor], list[_Record | None]]:
        results: list[Tensor] = []
        records = []
        for call in self._calls:
            read = [
                None if i is None else results[i] if i >= 0 else inputs[-1 - i] for i in (call.input, call.residual)
            ]
            if isinstance(call.what, tuple):
                results.append(kernels.max_pool(read[0], *call.what))
            elif call.residual is None:
                results.append(call.what(read[0]))
            else:
                results.append(call.what(*read))
            records.append(_Record.of(call, *read, results[-1]))
        return [results[i] for i in self._wanted], records


def _places(what: Step | GlobalAverage | tuple[Any, ...]) -> list[tuple[dict[str, Any], str]]:
    return [] if isinstance(what, tuple) else what.places


@dataclass(frozen=True)
class _Record:
    """A call with these images: what it comes down to, and the layouts of what it reads and gives."""

    call: Call
    convolution: kernels.Convolution | None
    input: Tensor
    result: tuple[torch.Size, tuple[int, ...], torch.dtype]
    residual_dtype: torch.dtype | None

    @classmethod
    def of(cls, call: Call, input: Tensor, residual: Tensor | None, result: Tensor) -> _Record | None:
        """None where a program cannot do it."""
        layout = result.shape, result.stride(), result.dtype
        if isinstance(call.what, tuple):
            return cls(call, None, input, layout, None)
        if isinstance(call.what, GlobalAverage):
            return cls(call, call.what.convolution(input), input, layout, None)
        input = kernels.channels_last(call.what.taken(input))
        if residual is not None:
            residual = call.what.taken_residual(residual)
            if (residual.shape, residual.stride()) != layout[:2]:
                return None
        return cls(call, call.what.convolution, input, layout, None if residual is None else residual.dtype)


class _Program:
    """All calls for inputs of one layout. Results that nobody wants lie in one block of memory, each where what is no longer
    needed was."""

    def __init__(self) -> None:
        self._program = _cpu.Int8Program()
        self._bytes = 0
        self._feeds: list[tuple[int, Callable[[Tensor], Tensor]]] = []
        self._wanted: list[tuple[torch.Size, tuple[int, ...], torch.dtype]] = []
        self._held: list[kernels.Convolution] = []

    @classmethod
    def of(cls, records: Sequence[_Record | None], wanted: Sequence[int]) -> _Program | None:
        if None in records:
            return None
        made = cls()
        offsets, made._bytes = _offsets(records, wanted)
        # The addresses of a call: the block, what is made of the inputs, the results that are wanted.
        made._feeds = [
            (-1 - index, function)
            for record in records
            for index, function in _reads(record)
            if index is not None and index < 0
        ]
        made._wanted = [records[i].result for i in wanted]
        place = made._program.place
        places = [
            place(1 + len(made._feeds) + wanted.index(i), 0) if i in wanted else place(0, offsets[i])
            for i in range(len(records))
        ]
        fed = iter(range(1, 1 + len(made._feeds)))
        for record, to in zip(records, places, strict=True):
            x, residual = (
                0 if index is None else places[index] if index >= 0 else place(next(fed), 0)
                for index, _ in _reads(record)
            )
            shape, strides, _ = record.result
            convolution = record.convolution
            if convolution is None:
                windows = map(tuple, record.call.what)
                made._program.max_pool(x, tuple(record.input.shape), to, tuple(shape[2:]), *windows)
                continue
            expected, given, before, between = convolution.arguments(record.input)
            if (expected, given) != (shape, strides):
                return None
            code = DTYPE[record.residual_dtype or torch.uint8]
            made._program.conv(x, *before, to, *between, residual, code, *convolution.residual, convolution.prepared)
            made._held.append(convolution)
        return made

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        fed = [function(inputs[index]) for index, function in self._feeds]
        block = empty((self._bytes,), torch.uint8)
        results = [empty_strided(*layout) for layout in self._wanted]
        self._program.run([x.data_ptr() for x in (block, *fed, *results)])
        return results


def _reads(record: _Record) -> list[tuple[int | None, Callable[[Tensor], Tensor]]]:
    """What a call reads, and what it makes of an input that is not from another call."""
    what = record.call.what
    if not isinstance(what, Step):
        return [(record.call.input, kernels.channels_last), (None, kernels.channels_last)]
    return [
        (record.call.input, lambda x: kernels.channels_last(what.taken_again(x))),
        (record.call.residual, what.taken_residual),
    ]


def _offsets(records: Sequence[_Record], wanted: Sequence[int]) -> tuple[list[int], int]:
    """Where each result lies, of those that are needed at once none on another; and how much memory that takes."""
    last = {}
    for i, record in enumerate(records):
        for index in (record.call.input, record.call.residual):
            if index is not None and index >= 0:
                last[index] = i
    offsets, most = [], 0
    needed: list[tuple[int, int, int]] = []  # where one begins and ends, and the last call that reads it
    for i, record in enumerate(records):
        shape, _, dtype = record.result
        size = 0 if i in wanted else -(-shape.numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        needed = [one for one in needed if one[2] >= i]
        at = 0
        for begin, end, _ in sorted(needed):
            if at + size <= begin:
                break
            at = max(at, end)
        offsets.append(at)
        needed.append((at, at + size, last.get(i, i)))
        most = max(most, at + size)
    return offsets, most
