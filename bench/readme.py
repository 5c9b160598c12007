"""Makes the tables of speed and memory in README.md anew from `bench/results/*.json`: `python bench/readme.py`.

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
from speed import RESULTS, ROWS

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- speed: made by bench/readme.py -->", "<!-- /speed -->"


def table() -> str:
    """The table in Markdown, a line about the machine, and the table of memory if that was measured."""
    paths = [RESULTS / f"{row.name}.json" for row in ROWS]
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    if not found:
        return "Not measured yet: `make bench`."
    lines = [
        "| work | times faster than the fastest peer: geometric mean (least – most) | peers | target | "
        "share of peak | times less CPU time |",
        "|---|---|---|---|---|---|",
    ]
    for each in found:
        measured, target = each["measured"], each["target"]
        if len(each["results"]) == 1:
            low, high = each["results"][0]["ratio_quartiles"]
            ratio = f"{measured['least']:.2f} (quartiles {low:.2f} – {high:.2f})"
        else:
            ratio = f"{measured['geometric_mean']:.2f} ({measured['least']:.2f} – {measured['largest']:.2f})"
        targets = []
        if target["least"] is not None:
            targets.append(f"each ≥ {target['least']:g}")
        if target["geometric_mean"] is not None:
            targets.append(f"mean ≥ {target['geometric_mean']:g}")
        aim = f"{', '.join(targets)}: {'met' if each['met'] else 'not met'}" if targets else "–"
        share = "–"
        if measured["share_of_peak"] is not None:
            share = f"{measured['share_of_peak']:.0%} of {measured['peak_kind']}"
        names = (name.split()[0] for result in each["results"] for name in result["contestants"])
        peers = ", ".join(name for name in dict.fromkeys(names) if name != "fastnn")
        lines.append(f"| {each['title']} | {ratio} | {peers} | {aim} | {share} | {_cpu(each['results'])} |")
    machines = {
        (m["cpu"], m["cores"], m["threads"], m["torch"], m["date"]): m["isa"] for m in (e["machine"] for e in found)
    }
    lines.append("")
    for (cpu, cores, threads, torch, date), isa in machines.items():
        lines.append(f"{cpu}, {cores} cores, {threads} threads, {isa}, torch {torch}, {date}.")
    if memory.RESULTS.exists():
        lines += ["", *_memory(json.loads(memory.RESULTS.read_text()))]
    return "\n".join(lines)


def _cpu(results: list[dict[str, Any]]) -> str:
    """How many times less CPU time fastnn took than the fastest peer, if it was measured: geometric mean (least – most)."""
    ratios = []
    for result in results:
        ours, peer = (result["contestants"][result["fastest"][who]] for who in ("fastnn", "peer"))
        if "cpu_seconds" not in ours:
            return "–"
        ratios.append(peer["cpu_seconds"] / ours["cpu_seconds"])
    return f"{statistics.geometric_mean(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})"


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
