"""Makes the tables of speed and memory in README.md anew from `bench/results/`: `python bench/readme.py`.

What stands between the two markers is replaced; rows that were not measured are left out. `--check` writes nothing and
exits with 1 if the table is not what the files say.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import memory
from speed import RESULTS, ROWS, Row

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- speed: made by bench/readme.py -->", "<!-- /speed -->"


def table() -> str:
    """The table in Markdown, with a column for each machine, a line about each, and the table of memory if that was
    measured."""
    machines = _machines()
    if not machines:
        return "Not measured yet: `make bench`."
    head = ["work", "peers", "target", *machines]
    lines = [_line(head), "|" + "---|" * len(head)]
    for row in ROWS:
        found = [records.get(row.name) for records in machines.values()]
        if not any(found):
            continue
        peers = dict.fromkeys(
            name.split()[0] for each in found if each for result in each["results"] for name in result["contestants"]
        )
        figures = [_figures(row, each) if each else "–" for each in found]
        lines.append(_line([row.title, ", ".join(name for name in peers if name != "fastnn"), _target(row), *figures]))
    lines.append("")
    for name, records in machines.items():
        described = [each["machine"] for each in records.values()]
        dates = sorted({m["date"] for m in described})
        days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        seen = dict.fromkeys((m["cpu"], m["cores"], m["threads"], m["isa"], m["torch"]) for m in described)
        for cpu, cores, threads, isa, torch in seen:
            lines.append(f"{name}: {cpu}, {cores} cores, {threads} threads, {isa}, torch {torch}, {days}.")
    if memory.RESULTS.exists():
        lines += ["", *_memory(json.loads(memory.RESULTS.read_text()))]
    return "\n".join(lines)


def _machines() -> dict[str, dict[str, Any]]:
    """The records of each machine by the names of their rows; the machine that was measured last comes first."""
    machines = {}
    for folder in sorted(path for path in RESULTS.glob("*") if path.is_dir()):
        paths = [folder / f"{row.name}.json" for row in ROWS]
        records = {path.stem: json.loads(path.read_text()) for path in paths if path.exists()}
        if records:
            machines[folder.name] = records

    def dates(name: str) -> tuple[str, str]:
        found = [each["machine"]["date"] for each in machines[name].values()]
        return max(found), min(found)

    return {name: machines[name] for name in sorted(machines, key=dates, reverse=True)}


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _target(row: Row) -> str:
    parts = []
    if row.least is not None:
        parts.append(f"each ≥ {row.least:g}")
    if row.mean is not None:
        parts.append(f"mean ≥ {row.mean:g}")
    return ", ".join(parts) or "–"


def _figures(row: Row, record: dict[str, Any]) -> str:
    """How many times faster, and whether that is what is aimed for; the share of the peak; the CPU time."""
    measured = record["measured"]
    if len(record["results"]) == 1:
        low, high = record["results"][0]["ratio_quartiles"]
        cell = f"**{measured['least']:.2f}** (quartiles {low:.2f} – {high:.2f})"
    else:
        cell = f"**{measured['geometric_mean']:.2f}** ({measured['least']:.2f} – {measured['largest']:.2f})"
    cell += {True: ", met", False: ", not met", None: ""}[row.met(measured)]
    if measured["share_of_peak"] is not None:
        cell += f"; {measured['share_of_peak']:.0%} of {measured['peak_kind']}"
    return cell + _cpu(record["results"])


def _cpu(results: list[dict[str, Any]]) -> str:
    """How many times less CPU time fastnn took than the fastest peer, if it was measured: the geometric mean."""
    ratios = []
    for result in results:
        ours, peer = (result["contestants"][result["fastest"][who]] for who in ("fastnn", "peer"))
        if "cpu_seconds" not in ours:
            return ""
        ratios.append(peer["cpu_seconds"] / ours["cpu_seconds"])
    return f"; CPU time {statistics.geometric_mean(ratios):.2f}"


def _memory(found: dict[str, Any]) -> list[str]:
    """One line a work and layout."""
    lines = [
        f"| peak memory of a forward, batch {found['batch']}, in MB | layout | torch | fastnn | no more than torch's |"
        " with model and input: torch | fastnn |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["results"]:
        met = "yes" if row["met"] else "no"
        with_model = [row["with_model"][who] for who in ("torch", "fastnn")] if "with_model" in row else []
        whole = " | ".join(f"{figure:.0f}" for figure in with_model) or "– | –"
        lines.append(
            f"| {row['work']} | {row['layout']} | {row['torch']:.0f} | {row['fastnn']:.0f} | {met} | {whole} |"
        )
    return lines


def main() -> int:
    text = README.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        print(f"{README}: expected one {BEGIN} and one {END}", file=sys.stderr)
        return 2
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    new = f"{head}{BEGIN}\n{table()}\n{END}{tail}"
    if "--check" in sys.argv:
        return 0 if new == text else 1
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
