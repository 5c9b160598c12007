"""Shows benchmark results as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .benchmark import Result

__all__ = ["duration", "geometric_mean", "rate", "show"]


def duration(seconds: float) -> str:
    """Three digits and a unit: 3.21 µs."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def rate(value: float, unit: str) -> str:
    """Billions a second: 312 GFLOP/s."""
    return f"{value / 1e9:.3g} G{unit}/s"


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean of logarithms. ValueError for none."""
    if not values:
        raise ValueError("geometric mean of nothing")
    return math.exp(sum(map(math.log, values)) / len(values))


def show(results: Sequence[Result], machine: dict[str, Any], console: Console) -> None:
    """One line a shape; below, the machine, the geometric mean of the ratios, and the peers that were not there."""
    peers = list(dict.fromkeys(peer for r in results for peer in r.peers))
    ops = list(dict.fromkeys(r.name for r in results))
    title = f"{', '.join(ops)}: fastnn and {', '.join(peers)}, interleaved medians"
    table = Table(title=title, title_justify="left")
    for name in (*(("op",) if len(ops) > 1 else ()), "shape", "dtype"):
        table.add_column(name)
    with_peak = any(r.share is not None for r in results)
    for name in (
        "fastnn",
        peers[0] if len(peers) == 1 else "fastest peer",
        "faster by",
        "quartiles",
        "rate",
        *(("of peak",) if with_peak else ()),
        "both plain",
    ):
        table.add_column(name, justify="right")
    table.add_column("fastest forms")
    for r in results:
        colour = "green" if r.ratio[0] >= 1 else "red"
        table.add_row(
            *((r.name,) if len(ops) > 1 else ()),
            "×".join(map(str, r.shape)),
            r.dtype,
            duration(r.timing.median(r.ours_best)),
            duration(r.timing.median(r.peer_best)),
            f"[{colour}]{r.ratio[0]:.2f}[/]",
            f"{r.ratio[1]:.2f}–{r.ratio[2]:.2f}",
            rate(r.rate, r.unit),
            *(("" if r.share is None else f"{r.share:.0%} {r.peak_kind}",) if with_peak else ()),
            f"{r.plain[0]:.2f}",
            f"{r.ours_best}, {r.peer_best}",
        )
    console.print(table)
    absent = {peer: reason for r in results for peer, reason in r.absent.items()}
    if absent:
        console.print("not there: " + ", ".join(f"{peer} ({reason})" for peer, reason in absent.items()))
    if len(results) > 1:
        mean = geometric_mean([r.ratio[0] for r in results])
        console.print(f"geometric mean {mean:.2f}, smallest {min(r.ratio[0] for r in results):.2f}")
    peaks: dict[str, float] = {}
    for r in results:
        if r.peak_kind is not None:
            peaks[r.peak_kind] = max(r.peak, peaks.get(r.peak_kind, 0.0))
    text = ", ".join(f"{kind} {value / 1e9:.4g} G/s" for kind, value in peaks.items())
    console.print(
        f"{machine['gpu'] + '; ' if 'gpu' in machine else ''}{machine['cpu']}, {machine['threads']} threads, {machine['isa']}; torch {machine['torch']}; "
        f"{f'peak {text}; ' if text else ''}load average {machine['load_average']:.2f}",
        highlight=False,
    )
