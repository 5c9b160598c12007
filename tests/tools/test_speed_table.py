"""bench/speed.py and bench/readme.py: the rows of the speed table, their records and their lines."""

import importlib
import json
import math
from pathlib import Path

import pytest

from fastnn import bench

pytest.importorskip("sklearn")
FOLDER = Path(__file__).parents[2] / "bench"


@pytest.fixture
def speed(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    module = importlib.import_module("speed")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


@pytest.fixture
def readme(monkeypatch, speed):
    module = importlib.import_module("readme")
    monkeypatch.setattr(module, "RESULTS", speed.RESULTS)
    monkeypatch.setattr(module.memory, "RESULTS", speed.RESULTS / "none.json")
    return module


def test_rows_are_of_benchmarks_that_exist(speed):
    assert len({row.name for row in speed.ROWS}) == len(speed.ROWS)
    for row in speed.ROWS:
        for name, shape in row.work:
            the = bench.benchmark(name)
            assert bench.parse_shape("x".join(map(str, shape)), the.axes) == shape, row.name
            assert row.dtype in [str(dtype).removeprefix("torch.") for dtype in the.dtypes], row.name


def row_of(speed, monkeypatch, work, **targets):
    row = speed.Row("some-row", "some work", work, **targets)
    monkeypatch.setattr(speed, "ROWS", (row,))
    found = speed.measure(row, 0.01)
    (speed.RESULTS / "some-row.json").write_text(json.dumps(found, allow_nan=False))
    return found


def cells(readme, monkeypatch, speed):
    monkeypatch.setattr(readme, "ROWS", speed.ROWS)
    head, _, line, *_ = readme.table().splitlines()
    assert head.count("|") == line.count("|")
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_of_trees_has_cpu_time_and_no_peak(speed, readme, monkeypatch, capsys):
    found = row_of(speed, monkeypatch, (("extra_trees", (400, 8, 3, 3, 1)), ("exact_tree", (400, 5, 3, 1))))
    assert found["measured"]["share_of_peak"] is None and found["met"] is None
    assert "of peak" not in capsys.readouterr().out
    title, _, peers, target, share, cpu = cells(readme, monkeypatch, speed)
    assert (title, peers, target, share) == ("some work", "scikit-learn", "–", "–")
    ratios = []
    for result in found["results"]:
        ours, theirs = (result["contestants"][name]["cpu_seconds"] for name in ("fastnn", "scikit-learn"))
        ratios.append(theirs / ours)
    mean = math.sqrt(ratios[0] * ratios[1])
    assert cpu == f"{mean:.2f} ({min(ratios):.2f} – {max(ratios):.2f})"
    speed.print_summary(speed.ROWS)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("some-row") and line.endswith("–") and "%" not in line


@pytest.mark.parametrize("least, met", [(1e-9, True), (1e9, False)])
def test_a_row_with_a_target_and_a_peak(speed, readme, monkeypatch, capsys, least, met):
    found = row_of(speed, monkeypatch, (("relu", (64,)), ("relu", (1024,))), least=least)
    assert found["met"] is met and found["measured"]["share_of_peak"] > 0
    target, share = cells(readme, monkeypatch, speed)[3:5]
    assert target == f"each ≥ {least:g}: {'met' if met else 'not met'}" and share.endswith("% of copy")
    speed.print_summary(speed.ROWS)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith("yes" if met else "no") and "%" in line


def test_a_record_without_cpu_time_has_a_dash(speed, readme, monkeypatch):
    found = row_of(speed, monkeypatch, (("relu", (64,)),), least=1.0)
    for contestant in found["results"][0]["contestants"].values():
        del contestant["cpu_seconds"]
    (speed.RESULTS / "some-row.json").write_text(json.dumps(found))
    assert cells(readme, monkeypatch, speed)[5] == "–"
