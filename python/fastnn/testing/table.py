"""Shows a verification as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .model import ModelReport
from .verify import Report

__all__ = ["show", "show_model"]


def show(reports: Sequence[Report], console: Console) -> None:
    """One line for each op and dtype, then every finding, then the verdict."""
    table = Table(title="Error against float64", title_justify="left")
    table.add_column("op")
    table.add_column("dtype")
    table.add_column("calls", justify="right")
    table.add_column("of the bound", justify="right")
    table.add_column("torch's", justify="right")
    table.add_column("rms, torch = 1", justify="right")
    table.add_column("worst call", justify="right")
    table.add_column("gradients, torch = 1", justify="right")
    table.add_column("integers exact")
    table.add_column("verdict")
    for report in reports:
        for dtype in dict.fromkeys(row.dtype for row in report.rows):
            rows = [row for row in report.rows if row.dtype == dtype]
            forward = [row for row in rows if row.values != "gradient"]
            ratios = [row.ratio for row in forward if math.isfinite(row.ratio)]
            worst = [row.worst for row in forward if math.isfinite(row.worst)]
            gradients = [row.ratio for row in rows if row.values == "gradient" and math.isfinite(row.ratio)]
            integers = [row for row in rows if row.values == "integer"]
            problems = sum(row.problems for row in rows)
            table.add_row(
                report.op,
                dtype,
                str(sum(row.samples for row in rows)),
                f"{max((row.used for row in forward), default=0):.1%}",
                f"{max((row.peer_used for row in forward), default=0):.1%}",
                f"{max(ratios):.2f}" if ratios else "–",
                f"{max(worst):.2f}" if worst else "–",
                f"{max(gradients):.2f}" if gradients else "–",
                _integers(integers),
                f"[bold red]{problems} wrong[/]" if problems else "[green]ok[/]",
            )
    console.print(table)
    for report in reports:
        for dtype, reason in report.not_ours.items():
            console.print(f"{report.op}, {dtype}: not verified: {escape(reason)}", highlight=False)
        for finding in report.findings:
            console.print(f"[red]{report.op}[/]: {escape(str(finding))}", highlight=False)
        if report.precision != "highest":
            console.print(f"{report.op}: float32 judged as precision {report.precision!r}")
    failed = [report.op for report in reports if not report.passed]
    if failed:
        console.print(f"[bold red]FAILED[/]: {', '.join(failed)}")
    else:
        console.print(f"[bold green]PASSED[/]: {sum(bool(report.rows) for report in reports)} ops")


def _integers(rows: list) -> str:
    if not rows or any(row.used for row in rows):
        return "–"
    return "no" if any(row.problems for row in rows) else "yes"


def show_model(report: ModelReport, console: Console, title: str) -> None:
    """One line for each output and gradient, then the verdict."""
    table = Table(title=title, title_justify="left")
    table.add_column(report.dtype)
    table.add_column("fastnn's error", justify="right")
    table.add_column("torch's error", justify="right")
    table.add_column("torch = 1", justify="right")
    table.add_column("verdict")
    for each in report.compared:
        table.add_row(
            each.name,
            f"{each.error:.2e}",
            f"{each.torch_error:.2e}",
            f"{each.ratio:.2f}",
            "[green]ok[/]" if each.passed else "[bold red]wrong[/]",
        )
    console.print(table)
    colour = "green" if report.passed else "bold red"
    console.print(f"[{colour}]{escape(report.verdict)}[/]", highlight=False)
