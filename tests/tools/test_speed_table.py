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
    write(speed, found)
    return found


def write(speed, found, machine=None):
    folder = speed.RESULTS / (machine or speed.machine_name(found["machine"]))
    folder.mkdir(exist_ok=True)
    (folder / "some-row.json").write_text(json.dumps(found, allow_nan=False))


def cells(readme, monkeypatch, speed):
    monkeypatch.setattr(readme, "ROWS", speed.ROWS)
    head, _, line, *_ = readme.table().splitlines()
    assert head.count("|") == line.count("|")
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_of_trees_has_cpu_time_and_no_peak(speed, readme, monkeypatch, capsys):
    found = row_of(speed, monkeypatch, (("extra_trees", (400, 8, 3, 3, 1)), ("exact_tree", (400, 5, 3, 1))))
    assert found["measured"]["share_of_peak"] is None and found["met"] is None
    assert "of peak" not in capsys.readouterr().out
    title, peers, target, figures = cells(readme, monkeypatch, speed)
    assert (
        (title, peers, target) == ("some work", "scikit-learn", "–") and "met" not in figures and "% of" not in figures
    )
    ratios = []
    for result in found["results"]:
        ours, theirs = (result["contestants"][name]["cpu_seconds"] for name in ("fastnn", "scikit-learn"))
        ratios.append(theirs / ours)
    mean = math.sqrt(ratios[0] * ratios[1])
    assert figures.endswith(f"; CPU time {mean:.2f}")
    speed.print_summary(speed.ROWS)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("some-row") and line.endswith("–") and "%" not in line


@pytest.mark.parametrize("least, met", [(1e-9, True), (1e9, False)])
def test_a_row_with_a_target_and_a_peak(speed, readme, monkeypatch, capsys, least, met):
    found = row_of(speed, monkeypatch, (("relu", (64,)), ("relu", (1024,))), least=least)
    assert found["met"] is met and found["measured"]["share_of_peak"] > 0
    target, figures = cells(readme, monkeypatch, speed)[2:]
    ratio, share, cpu = figures.split("; ")
    assert target == f"each ≥ {least:g}" and share.endswith("% of copy") and cpu.startswith("CPU time ")
    assert ratio.endswith("), met" if met else "), not met")
    speed.print_summary(speed.ROWS)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith("yes" if met else "no") and "%" in line


def test_records_are_held_to_the_targets_of_today(speed, readme, monkeypatch, capsys):
    found = row_of(speed, monkeypatch, (("relu", (64,)), ("relu", (1024,))), least=1e-9)
    assert found["met"] is True
    monkeypatch.setattr(speed, "ROWS", (speed.Row("some-row", "some work", speed.ROWS[0].work, mean=1e9),))
    target, figures = cells(readme, monkeypatch, speed)[2:]
    assert target == "mean ≥ 1e+09" and "), not met;" in figures
    speed.print_summary(speed.ROWS)
    assert capsys.readouterr().out.splitlines()[-1].endswith("no")


def test_without_results_the_table_says_so(readme, speed):
    assert readme.table().startswith("Not measured yet")
    (speed.RESULTS / "memory.json").write_text("{}")
    assert readme.table().startswith("Not measured yet")
    speed.RESULTS.joinpath("memory.json").unlink()
    speed.RESULTS.rmdir()
    assert readme.table().startswith("Not measured yet")


def test_of_a_record_without_cpu_time_none_is_given(speed, readme, monkeypatch):
    found = row_of(speed, monkeypatch, (("relu", (64,)),), least=1.0)
    for contestant in found["results"][0]["contestants"].values():
        del contestant["cpu_seconds"]
    write(speed, found)
    assert "CPU" not in cells(readme, monkeypatch, speed)[3]


def test_machines_stand_side_by_side_the_last_measured_first(speed, readme, monkeypatch):
    found = row_of(speed, monkeypatch, (("relu", (64,)), ("relu", (1024,))))
    here = speed.machine_name(found["machine"])
    found["machine"]["date"] = "2999-01-01"
    found["measured"]["geometric_mean"] = 7.0
    write(speed, found, "later")
    monkeypatch.setattr(speed, "ROWS", (*speed.ROWS, speed.Row("other-row", "never measured", (("relu", (64,)),))))
    row = cells(readme, monkeypatch, speed)
    assert len(row) == 5 and row[3].startswith("**7.00** (") and not row[4].startswith("**7.00**")
    head, *lines = readme.table().splitlines()
    assert head.split(" | ")[3:] == ["later", f"{here} |"]
    assert [line.partition(":")[0] for line in lines[-2:]] == ["later", here]
    assert not any("never measured" in line for line in lines)
    (speed.RESULTS / here / "some-row.json").unlink()
    (speed.RESULTS / here / "other-row.json").write_text(json.dumps(found))
    first, second = [line.strip("| ").split(" | ") for line in readme.table().splitlines()[2:4]]
    assert first[4] == second[3] == "–" and first[3] != "–" != second[4]
