"""The declaration of one benchmark, and running it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import _state
from . import engine
from .gpu import machine_of
from .machine import Cpu

__all__ = ["Benchmark", "Problem", "Result", "WrongResult", "benchmark", "benchmarks", "parse_shape", "register", "run"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: How far ‖ours − peer's‖ / ‖peer's‖ may be for the two to count as the same result: a few roundings of the result, and
#: for float32 under a lowered `torch.set_float32_matmul_precision` that precision's. Integers must be equal.
_TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}
_LOWERED = {"highest": 0.0, "high": 1e-3, "medium": 2e-2}

#: Seconds after which the threads of every runtime's pool sleep. GNU's OpenMP spins for some 10 ms, LLVM's for 200.
MODEL_PAUSE, TREE_PAUSE = 0.02, 0.2

#: Calls of `steady` contestants that take longer than this are as few as can be.
_LONG_SECONDS = 5.0


@dataclass(frozen=True)
class Problem:
    """One shape and dtype of a benchmark.

    Attributes:
        inputs: makes a set of arguments.
        contestants: what is called with them, by name. The first word says whose it is, "fastnn" or a peer's name, and a
            word after it which form: "torch out=". The first of a peer is its plain form, the first peer's result is
            what the others are compared with. Each returns the result as a tensor, or as a tuple of tensors.
        work: operations (or bytes, where `unit` is "B") in one call.
        unit: "FLOP", "OP" or "B".
        peak: the `machine.Cpu.peak` kind to compare with; "copy" for the bandwidth of a copy; None where no peak says anything.
        beyond_cache: whether calls must go round enough sets of inputs to pass the last cache.
        absent: peers that could not take part, by name, each with the reason.
        tolerance: how far the results may be apart, where the roundings of one operation do not explain it. Without it
            integers must be equal.
        pause: seconds before each turn, where contestants have pools of threads of their own (`MODEL_PAUSE`,
            `TREE_PAUSE`); see `engine.compare`.
        steady: whether a first call takes no longer than others: nothing is compiled or packed in it. Where it took
            seconds it was warm-up enough, and the last timed call gives the result that is compared after the timing.
    """

    inputs: Callable[[], tuple[Any, ...]]
    contestants: dict[str, Callable[..., Any]]
    work: float
    unit: str = "FLOP"
    peak: str | None = "f32"
    beyond_cache: bool = False
    absent: Mapping[str, str] = field(default_factory=dict)
    tolerance: float | None = None
    pause: float = 0.0
    steady: bool = False


@dataclass(frozen=True)
class Benchmark:
    """One op to time: the names of the numbers in `--shape`, default shapes, and how to build a `Problem` of a shape."""

    name: str
    axes: str
    shapes: tuple[tuple[int, ...], ...]
    build: Callable[[tuple[int, ...], torch.dtype], Problem]
    dtypes: tuple[torch.dtype, ...] = FLOATS


@dataclass(frozen=True)
class Result:
    """One shape's figures. `ratio` compares the fastest form of fastnn with the fastest of all peers' forms; `plain` the
    plain forms of fastnn and the first peer, which allocate their result. `absent` are the peers that are not in it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    peers: tuple[str, ...]
    absent: dict[str, str]
    ours_best: str
    peer_best: str
    ratio: tuple[float, float, float]
    plain: tuple[float, float, float]
    rate: float
    peer_rate: float
    unit: str
    peak_kind: str | None
    peak: float | None
    error: float
    timing: engine.Timing = field(repr=False)

    @property
    def share(self) -> float | None:
        """Of the machine's own peak, if there is one."""
        return self.rate / self.peak if self.peak else None

    def to_dict(self) -> dict[str, Any]:
        """The figures in JSON's types."""
        return {
            "name": self.name,
            "shape": "x".join(map(str, self.shape)),
            "dtype": self.dtype,
            "peers": list(self.peers),
            "absent_peers": self.absent,
            "fastest": {"fastnn": self.ours_best, "peer": self.peer_best},
            "ratio": self.ratio[0],
            "ratio_quartiles": list(self.ratio[1:]),
            "plain_ratio": self.plain[0],
            "plain_ratio_quartiles": list(self.plain[1:]),
            "rate": self.rate,
            "peer_rate": self.peer_rate,
            "unit": self.unit + "/s",
            "peak_kind": self.peak_kind,
            "peak": self.peak,
            "share_of_peak": self.share,
            "difference_from_peer": self.error,
            **self.timing.to_dict(),
        }


_BENCHMARKS: dict[str, Benchmark] = {}


def register(new: Benchmark) -> Benchmark:
    """Adds a benchmark to what `python -m fastnn bench` knows. ValueError if the name is taken."""
    if new.name in _BENCHMARKS:
        raise ValueError(f"a benchmark named {new.name!r} exists already")
    _BENCHMARKS[new.name] = new
    return new


def benchmarks() -> dict[str, Benchmark]:
    """Every registered benchmark by name."""
    return dict(_BENCHMARKS)


def benchmark(name: str) -> Benchmark:
    """The benchmark of that name. KeyError, listing the names, if there is none."""
    try:
        return _BENCHMARKS[name]
    except KeyError:
        raise KeyError(f"no benchmark named {name!r}; there are {', '.join(sorted(_BENCHMARKS))}") from None


def parse_shape(text: str, axes: str) -> tuple[int, ...]:
    """ "1024x512x64" for axes "MxNxK". ValueError for another count of numbers, or one below 1."""
    parts = text.lower().split("x")
    if len(parts) != len(axes.split("x")) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"shape {text!r}: expected {axes} in positive integers, such as {axes_example(axes)}")
    return tuple(map(int, parts))


def axes_example(axes: str) -> str:
    return "x".join("1024" for _ in axes.split("x"))


class WrongResult(AssertionError):
    """fastnn's result was not the peer's: its time means nothing."""


def run(
    what: Benchmark | str,
    shapes: Iterable[Sequence[int]] | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
    *,
    against: str | None = None,
    seconds: float = 1.0,
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] = lambda label: None,
) -> list[Result]:
    """Times a benchmark at each shape and dtype, fastnn against its peers.

    The results of all contestants are compared before and after the timing. The machine's peak is measured before and
    after each shape, and the larger figure counts.

    Args:
        what: a `Benchmark`, or the name of a registered one.
        shapes: instead of the benchmark's own.
        dtypes: instead of float32, or the first that the benchmark has.
        against: the one peer to compare with, by the first word of its contestants' names; by default all that there are.
        seconds: for each shape, all contestants together.
        device: where the tensors are. On a GPU a call that fastnn hands to torch is an error, as it is under
            `fastnn.backend`: it would time torch twice.
        progress: called with a label before each shape.

    Raises:
        KeyError: for an unknown name, ValueError for a peer, dtype or device that is not there.
        FallbackError: on a GPU, or with a backend asked for, where there is no kernel.
        WrongResult: if the results of two contestants differ.
    """
    the = benchmark(what) if isinstance(what, str) else what
    machine = machine_of(device)
    results = []
    for dtype in tuple(dtypes or the.dtypes[:1]):
        if dtype not in the.dtypes:
            names = ", ".join(map(_name, the.dtypes))
            raise ValueError(f"{the.name}: no dtype {_name(dtype)}; it has {names}")
        for shape in tuple(shapes or the.shapes):
            shape = tuple(shape)
            progress(f"{the.name} {'×'.join(map(str, shape))} {_name(dtype)}")
            results.append(_one(the, shape, dtype, against, seconds, machine))
    return results


def _one(
    the: Benchmark, shape: tuple[int, ...], dtype: torch.dtype, against: str | None, seconds: float, machine: Cpu
) -> Result:
    on_cpu = machine.device.type == "cpu"
    # A default device costs every call of torch some time, so that of the CPU is left as it is, and none is set while timing.
    place = contextlib.nullcontext() if on_cpu else machine.device
    with place:
        problem = the.build(shape, dtype)
    there = list(dict.fromkeys(name.split()[0] for name in problem.contestants if not _is_ours(name)))
    if against is not None and against not in there:
        reason = f" ({problem.absent[against]})" if against in problem.absent else ""
        raise ValueError(f"{the.name}: no peer {against!r}{reason}; it has {', '.join(there)}")
    contestants = {
        name: function
        for name, function in problem.contestants.items()
        if _is_ours(name) or against in (None, name.split()[0])
    }
    ours = [name for name in contestants if _is_ours(name)]
    peers = [name for name in contestants if not _is_ours(name)]
    with place:
        inputs = [problem.inputs()]
        if problem.beyond_cache:
            size = sum(t.nbytes for t in inputs[0] if isinstance(t, torch.Tensor))
            sets = min(64, math.ceil(2 * machine.cache_bytes() / max(size, 1)))
            inputs += [problem.inputs() for _ in range(sets - 1)]
    top = None if problem.peak is None else machine.peak(problem.peak)
    allowed = max(_TOLERANCE.get(dtype, 0.0), _LOWERED[torch.get_float32_matmul_precision()])
    allowed = allowed if problem.tolerance is None else max(allowed, problem.tolerance)
    what = f"{the.name} {'x'.join(map(str, shape))} {_name(dtype)}"
    may_differ = problem.tolerance is not None
    # What was asked for by name, or by the device, is what has to run: torch would be timed against itself.
    with contextlib.nullcontext() if on_cpu and _state.settings().backend is None else _state.strict():
        error, took = _check(what, allowed, may_differ, contestants, inputs[0], peers[0])
    # Results of other inputs than the first are not those to compare with.
    steady = problem.steady and len(inputs) == 1
    warm = {name: seconds for name, seconds in took.items() if steady and seconds > _LONG_SECONDS}
    keeping = {name: _Keeping(contestants[name]) for name in warm}
    timing = engine.compare(
        {**contestants, **keeping},
        inputs,
        seconds=seconds,
        pause=problem.pause,
        warm=warm,
        clock=machine.clock,
        turn_seconds=machine.turn_seconds,
    )
    kept = {name: each.again for name, each in keeping.items()}
    _check(what, allowed, may_differ, {**contestants, **kept}, inputs[0], peers[0])
    if problem.peak is not None:
        top = max(top, machine.peak(problem.peak))
    best, peer_best = timing.best(ours), timing.best(peers)
    return Result(
        name=the.name,
        shape=shape,
        dtype=_name(dtype),
        peers=tuple(there) if against is None else (against,),
        absent=dict(problem.absent) if against is None else {},
        ours_best=best,
        peer_best=peer_best,
        ratio=timing.ratio(best, peer_best),
        plain=timing.ratio(ours[0], peers[0]),
        rate=problem.work / timing.median(best),
        peer_rate=problem.work / timing.median(peer_best),
        unit=problem.unit,
        peak_kind=problem.peak,
        peak=top,
        error=error,
        timing=timing,
    )


class _Keeping:
    """A contestant whose calls are long: its last result is kept."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._result: Any = None

    def __call__(self, *arguments: Any) -> Any:
        self._result = self._function(*arguments)
        return self._result

    def again(self, *arguments: Any) -> Any:
        """The result of the last call, for the same arguments."""
        return self._result


def _is_ours(contestant: str) -> bool:
    return contestant.split()[0] == "fastnn"


def _check(
    what: str,
    allowed: float,
    integers_differ: bool,
    contestants: dict[str, Callable[..., Any]],
    arguments: tuple[Any, ...],
    peer: str,
) -> tuple[float, dict[str, float]]:
    """The largest relative difference from the peer's result, and the seconds of each contestant's call; WrongResult if
    a difference is too large."""
    took = {}

    def call(name: str) -> list[torch.Tensor]:
        start = time.perf_counter()
        result = contestants[name](*arguments)
        took[name] = time.perf_counter() - start
        return _tensors(result)

    expected = [tensor.detach().clone() for tensor in call(peer)]
    worst = 0.0
    for name in contestants:
        if name == peer:
            continue
        got = call(name)
        if len(got) != len(expected):
            raise WrongResult(f"{what}: {name} returned {len(got)} tensors, {peer} {len(expected)}")
        for mine, theirs in zip(got, expected, strict=True):
            worst = max(worst, _difference(mine.detach(), theirs, integers_differ))
        if not worst <= allowed:
            raise WrongResult(
                f"{what}: the result of {name} differs from {peer}'s by {worst:.3g}; at most {allowed:.3g} is expected"
            )
    return worst, took


def _difference(mine: torch.Tensor, theirs: torch.Tensor, integers_differ: bool) -> float:
    """‖mine − theirs‖ / ‖theirs‖, infinite for another shape or dtype, where it is NaN, and for integers that are not
    equal, unless they may differ."""
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        return math.inf
    if not mine.is_floating_point() and not integers_differ:
        return 0.0 if torch.equal(mine, theirs) else math.inf
    # In place and in the dtype at hand where that is wide enough: at 4096² a float64 copy is 128 MB.
    wide = torch.float64 if mine.dtype == torch.float64 else torch.float32
    a, b = mine.to(wide), theirs.to(wide)
    norm = torch.linalg.vector_norm(b).item()
    error = torch.linalg.vector_norm(a - b).item()
    value = error / norm if norm else error
    return value if not math.isnan(value) else math.inf


def _tensors(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
