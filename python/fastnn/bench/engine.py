"""Times several ways of computing the same thing against each other, in one process, fairly.

They take turns, so that a neighbour's load or a change of clock falls on all of them alike; the ratio of two is taken
round by round before its median is. A turn is many calls where one is too short for the clock.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Timing", "compare", "quartiles"]

#: A turn lasts at least this long: the clock and the loop around the call are then below a percent of it.
TURN_SECONDS = 200e-6
_WARM_UP_SECONDS = 0.02
#: What follows a pause is called for this long before it is timed: threads that slept wake on the core that wakes them,
#: and some kernels leave them there, on one core, for 10 ms. A server under load does not know that state.
_WAKE_SECONDS = 0.02
_FEWEST_ROUNDS, _MIN_ROUNDS, _MAX_ROUNDS = 2, 5, 300
#: Calls that take longer than this are few, but three rounds at least: two where a third would end past the limit.
_SLOW_SECONDS = 0.3
_LIMIT_SECONDS = 60.0


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third, by linear interpolation; of one value, that value thrice."""
    if not values:
        raise ValueError("quartiles of nothing")
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


@dataclass(frozen=True)
class Timing:
    """Seconds a call for each contestant, one figure a round; figures of the same index were taken side by side."""

    seconds: dict[str, list[float]]
    calls_a_turn: dict[str, int]
    load_average: float
    #: The same of the whole process's time on its cores, all threads together.
    cpu_seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Seconds a call."""
        return statistics.median(self.seconds[name])

    def spread(self, name: str) -> tuple[float, float]:
        """First and third quartile of the seconds a call."""
        low, _, high = quartiles(self.seconds[name])
        return low, high

    def best(self, names: Sequence[str]) -> str:
        """The one of `names` whose median is the smallest."""
        return min(names, key=self.median)

    def ratio(self, name: str, peer: str) -> tuple[float, float, float]:
        """How many times faster `name` is than `peer`: the ratio of medians, and the quartiles of the rounds' ratios."""
        rounds = [p / s for s, p in zip(self.seconds[name], self.seconds[peer], strict=True)]
        low, _, high = quartiles(rounds)
        return self.median(peer) / self.median(name), low, high

    def to_dict(self) -> dict[str, Any]:
        """The figures in JSON's types."""
        return {
            "load_average": self.load_average,
            "contestants": {
                name: {
                    "seconds": self.median(name),
                    "quartiles": list(self.spread(name)),
                    "cpu_seconds": statistics.median(self.cpu_seconds[name]),
                    "rounds": len(values),
                    "calls_a_turn": self.calls_a_turn[name],
                }
                for name, values in self.seconds.items()
            },
        }


def compare(
    contestants: Mapping[str, Callable[..., Any]],
    inputs: Sequence[tuple[Any, ...]],
    *,
    seconds: float = 1.0,
    pause: float = 0.0,
    warm: Mapping[str, float] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    turn_seconds: float = TURN_SECONDS,
) -> Timing:
    """Times each contestant on the same inputs by turns, for about `seconds` in all.

    Args:
        contestants: what is called, by name, each with one element of `inputs` as its arguments.
        inputs: the sets of arguments. Calls go round them: give as many as pass the cache where that matters.
        seconds: for all contestants together, not counting the warm-up. There are at least 5 rounds, 3 of slow calls, and
            of those that take minutes 2.
        pause: seconds to sleep before each turn. The threads of a pool wait for more work by spinning, for some
            milliseconds, on cores that a contestant with another pool already needs. The turn itself begins with calls
            that are not timed, until the contestant's own threads are on the cores again.
        warm: contestants that need no warm-up, each with the seconds that a call took.
        clock: in seconds; it waits for what the calls have begun.
        turn_seconds: a turn lasts at least this long.
    """
    warm = warm or {}
    if not contestants or not inputs:
        raise ValueError("compare: needs at least one contestant and one set of inputs")
    load = os.getloadavg()[0]
    took = {
        name: warm[name] if name in warm else _warm_up(function, inputs, clock)
        for name, function in contestants.items()
    }
    slowest = max(took.values())
    if pause:
        turn_seconds = max(turn_seconds, _WAKE_SECONDS)
    calls = {name: max(1, math.ceil(turn_seconds / max(seconds_a_call, 1e-9))) for name, seconds_a_call in took.items()}
    least = 3 if slowest > _SLOW_SECONDS else _MIN_ROUNDS
    measured: dict[str, list[float]] = {name: [] for name in contestants}
    on_cores: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    begin = clock()
    position = dict.fromkeys(names, 0)
    for number in range(_MAX_ROUNDS):
        so_far = clock() - begin
        if number >= least and so_far >= seconds:
            break
        if number >= _FEWEST_ROUNDS and so_far * (number + 1) / number > max(seconds, _LIMIT_SECONDS):
            break
        # Whoever comes first finds the cache as the last one left it; so the first place goes round.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            function, count = contestants[name], calls[name]
            turn = [inputs[(position[name] + i) % len(inputs)] for i in range(count)]
            position[name] += count
            if pause:
                time.sleep(pause)
                if took[name] < _SLOW_SECONDS:
                    _call_for(_WAKE_SECONDS, function, inputs, clock)
            start_on_cores, start = time.process_time(), clock()
            for arguments in turn:
                function(*arguments)
            measured[name].append((clock() - start) / count)
            on_cores[name].append((time.process_time() - start_on_cores) / count)
    return Timing(measured, calls, load, on_cores)


def _warm_up(function: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], clock: Callable[[], float]) -> float:
    """Calls until caches, clocks and thread pools are warm; returns the seconds of a call."""
    return _call_for(_WARM_UP_SECONDS, function, inputs, clock, at_least=3)


def _call_for(
    seconds: float,
    function: Callable[..., Any],
    inputs: Sequence[tuple[Any, ...]],
    clock: Callable[[], float],
    at_least: int = 1,
) -> float:
    """Calls for so many seconds and at least so often, or until a call was slow; returns the seconds of the fastest."""
    fastest = math.inf
    end = clock() + seconds
    calls = 0
    while calls < at_least or clock() < end:
        start = clock()
        function(*inputs[calls % len(inputs)])
        took = clock() - start
        fastest = min(fastest, took)
        calls += 1
        if took > _SLOW_SECONDS:
            break
    return fastest
