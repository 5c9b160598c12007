"""The benchmark engine's statistics, its check of results, and its records."""

import functools
import io
import json
import platform
import sys
import time

import pytest
import torch
from rich.console import Console

from fastnn import bench, models
from fastnn.bench import Benchmark, Problem, engine, exact_trees, histogram_trees, machine, table, tree_predict
from fastnn.bench.table import duration, geometric_mean


class Clock:
    """Time that passes only when a contestant says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        def call(*_):
            self.now += seconds() if callable(seconds) else seconds

        return call


def test_quartiles():
    assert engine.quartiles([1, 2, 3, 4, 5]) == (2, 3, 4)
    assert engine.quartiles([7.0]) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError):
        engine.quartiles([])


def test_ratio_of_medians():
    clock = Clock()
    timing = bench.compare({"fastnn": clock.work(1e-3), "torch": clock.work(3e-3)}, [()], seconds=0.1, clock=clock)
    assert timing.median("fastnn") == pytest.approx(1e-3)
    assert timing.ratio("fastnn", "torch") == pytest.approx((3.0, 3.0, 3.0))
    assert timing.best(["fastnn", "torch"]) == "fastnn"


def test_one_slow_round_does_not_count():
    clock = Clock()
    calls = {"n": 0}

    def sometimes():
        calls["n"] += 1
        return 0.2 if calls["n"] % 10 == 0 else 1e-3

    timing = bench.compare({"fastnn": clock.work(sometimes), "torch": clock.work(1e-3)}, [()], seconds=3, clock=clock)
    assert timing.median("fastnn") == pytest.approx(1e-3)
    assert timing.ratio("fastnn", "torch")[0] == pytest.approx(1.0)


def test_a_load_that_comes_and_goes_falls_on_both():
    clock = Clock()
    load = {"n": 0}

    def slow(seconds):
        def now():
            load["n"] += 1
            return seconds * (5 if load["n"] // 40 % 2 else 1)

        return now

    timing = bench.compare({"fastnn": clock.work(slow(1e-3)), "torch": clock.work(slow(2e-3))}, [()], clock=clock)
    ratio, low, high = timing.ratio("fastnn", "torch")
    assert low <= 2.0 <= high
    assert ratio == pytest.approx(2.0, rel=0.5)


def test_time_on_cores_is_that_of_the_work_alone():
    def work():
        end = time.process_time() + 2e-3
        while time.process_time() < end:
            pass

    timing = bench.compare({"works": work, "sleeps": lambda: time.sleep(4e-3)}, [()], seconds=0.05)
    record = timing.to_dict()["contestants"]
    assert record["works"]["cpu_seconds"] >= 2e-3 > record["sleeps"]["cpu_seconds"] >= 0


def test_short_calls_are_timed_many_at_a_time_and_slow_ones_few():
    clock = Clock()
    timing = bench.compare({"short": clock.work(1e-6), "slow": clock.work(1.0)}, [()], seconds=0.1, clock=clock)
    assert timing.calls_a_turn["short"] >= 200
    assert timing.calls_a_turn["slow"] == 1
    assert len(timing.seconds["slow"]) == 3


def test_calls_of_a_minute_are_fewest():
    clock = Clock()
    contestants = {"fastnn": clock.work(5.0), "sklearn": clock.work(57.0)}
    timing = bench.compare(contestants, [()], seconds=0.1, clock=clock)
    assert len(timing.seconds["sklearn"]) == len(timing.seconds["fastnn"]) == 2
    assert clock.now == 3 * (5 + 57)  # with the warm-up
    # Time that was asked for is taken.
    timing = bench.compare(contestants, [()], seconds=300, clock=clock)
    assert len(timing.seconds["sklearn"]) == 4


def test_threads_that_slept_are_awake_before_the_clock_starts(monkeypatch):
    clock = Clock()
    woke = {"at": 0.0}

    def sleep(seconds):
        clock.now += seconds
        woke["at"] = clock.now

    def on_one_core_at_first():
        return 4e-3 if clock.now - woke["at"] < 12e-3 else 1e-3

    monkeypatch.setattr(bench.engine.time, "sleep", sleep)
    contestants = {"sleepy": clock.work(on_one_core_at_first), "slow": clock.work(0.5)}
    timing = bench.compare(contestants, [()], seconds=0.1, pause=0.02, clock=clock)
    assert timing.seconds["sleepy"] == pytest.approx([1e-3] * 3)
    assert timing.calls_a_turn == {"sleepy": 20, "slow": 1}


def test_what_is_warm_is_not_warmed_up():
    clock = Clock()
    timing = bench.compare({"a": clock.work(57.0)}, [()], seconds=0.1, warm={"a": 57.0}, clock=clock)
    assert clock.now == 2 * 57 and timing.calls_a_turn["a"] == 1


def test_inputs_go_round():
    seen = []
    bench.compare({"a": lambda i: seen.append(i)}, [(0,), (1,), (2,)], seconds=0.01)
    counts = [seen.count(i) for i in range(3)]
    assert max(counts) - min(counts) <= 2


def small(contestants, **options):
    return Benchmark(
        "small",
        "MxN",
        ((4, 8),),
        lambda shape, dtype: Problem(lambda: (torch.randn(shape),), contestants, work=64.0, **options),
    )


def test_a_result_knows_the_best_forms_and_the_peak():
    contestants = {"fastnn": lambda x: x + 1, "fastnn out=": lambda x: x + 1, "torch": lambda x: x.add(1)}
    (result,) = bench.run(small(contestants), seconds=0.02)
    assert result.ours_best in contestants and result.peer_best == "torch"
    assert result.peak > 1e9 and 0 < result.share < 1
    assert result.plain[0] == pytest.approx(result.timing.ratio("fastnn", "torch")[0])
    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert record["shape"] == "4x8" and set(record["contestants"]) == set(contestants)


def test_where_no_peak_says_anything_there_is_none():
    (result,) = bench.run(small({"fastnn": torch.relu, "torch": torch.relu}, peak=None), seconds=0.02)
    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert [record[name] for name in ("peak", "peak_kind", "share_of_peak")] == [None] * 3
    (other,) = bench.run(small({"fastnn": torch.relu, "torch": torch.relu}, peak="copy"), seconds=0.02)
    for results, heads in (([result], False), ([other], True), ([result, other], True)):
        console = Console(file=io.StringIO(), width=200)
        table.show(results, machine.describe(), console)
        printed = console.file.getvalue()
        assert ("of peak" in printed) == ("peak copy" in printed) == heads and "None" not in printed


class Slow:
    """A contestant whose calls take long by the clock of the check, and go wrong after some."""

    def __init__(self, monkeypatch, right=100):
        self.calls, self.right = 0, right
        monkeypatch.setattr(sys.modules[bench.run.__module__], "_LONG_SECONDS", 1e-3)

    def __call__(self, x):
        self.calls += 1
        time.sleep(2e-3)
        return x + (1 if self.calls <= self.right else 2)


@pytest.mark.parametrize("steady", [False, True])
def test_long_steady_calls_are_not_made_for_warming_up_and_comparing_alone(monkeypatch, steady):
    slow = Slow(monkeypatch)
    (result,) = bench.run(small({"fastnn": lambda x: x + 1, "torch": slow}, steady=steady), seconds=0.0)
    timed = len(result.timing.seconds["torch"])
    assert result.timing.calls_a_turn["torch"] == 1
    assert (slow.calls == timed + 1) if steady else (slow.calls > timed + 2)


@pytest.mark.parametrize("right", [0, 1])
def test_a_long_steady_result_that_is_wrong_is_found(monkeypatch, right):
    slow = Slow(monkeypatch, right)
    with pytest.raises(bench.WrongResult, match="fastnn"):
        bench.run(small({"fastnn": slow, "torch": lambda x: x + 1}, steady=True), seconds=0.0)
    assert (slow.calls > 1) == (right > 0)


@pytest.mark.parametrize(
    "wrong", [lambda x: x + 1.01, lambda x: x * float("nan"), lambda x: x[:1], lambda x: x.double()]
)
def test_a_wrong_result_is_not_timed(wrong):
    with pytest.raises(bench.WrongResult, match="fastnn"):
        bench.run(small({"fastnn": wrong, "torch": lambda x: x + 1}), seconds=0.02)


def test_a_result_that_goes_wrong_while_timed_is_found():
    calls = {"n": 0}

    def later(x):
        calls["n"] += 1
        return x + (1 if calls["n"] < 5 else 2)

    with pytest.raises(bench.WrongResult):
        bench.run(small({"fastnn": later, "torch": lambda x: x + 1}), seconds=0.02)


def slowly(x):
    time.sleep(2e-3)
    return x + 1


def test_the_fastest_of_all_peers_counts():
    contestants = {"fastnn": lambda x: x + 1, "torch": slowly, "other": slowly, "other fast": lambda x: x + 1}
    (result,) = bench.run(small(contestants, absent={"third": "not installed"}), seconds=0.02)
    assert result.peers == ("torch", "other") and result.peer_best == "other fast"
    assert result.ratio[0] < result.plain[0]
    assert result.to_dict()["fastest"]["peer"] == "other fast"
    assert result.to_dict()["absent_peers"] == {"third": "not installed"}

    (result,) = bench.run(small(contestants), against="torch", seconds=0.02)
    assert result.peers == ("torch",) and result.peer_best == "torch"


def test_the_table_names_the_peers_that_were_there_and_those_that_were_not():
    contestants = {"fastnn": torch.relu, "torch": torch.relu, "other fast": torch.relu}
    results = bench.run(small(contestants, absent={"third": "not installed: third"}), seconds=0.02)
    console = Console(file=io.StringIO(), width=160)
    table.show(results, machine.describe(), console)
    printed = console.file.getvalue()
    assert "fastnn and torch, other, interleaved" in printed
    assert "not there: third (not installed: third)" in printed


def test_a_peer_that_is_wrong_is_found():
    contestants = {"fastnn": torch.relu, "torch": torch.relu, "other": lambda x: x.relu() * 1.01}
    with pytest.raises(bench.WrongResult, match="result of other"):
        bench.run(small(contestants), seconds=0.02)
    bench.run(small(contestants, tolerance=0.02), seconds=0.02)


def test_unknown_names():
    with pytest.raises(KeyError, match="no benchmark named 'gem'"):
        bench.benchmark("gem")
    with pytest.raises(ValueError, match="no peer 'numpy'"):
        bench.run(small({"fastnn": torch.relu, "torch": torch.relu}), against="numpy")
    with pytest.raises(ValueError, match="no peer 'third' \\(not installed"):
        bench.run(
            small({"fastnn": torch.relu, "torch": torch.relu}, absent={"third": "not installed"}), against="third"
        )
    with pytest.raises(ValueError, match="no dtype int8"):
        bench.run("matmul", dtypes=[torch.int8])


SMALL_TREES = {
    "exact_tree": (400, 5, 3, 1),
    "forest": (400, 8, 3, 1000, 1),
    "extra_trees": (400, 8, 3, 1000, 2),
    "tree_predict": (300, 5, 3, 3, 1),
    **dict.fromkeys(("binning", "histogram_tree", "boosting"), (500, 13, 1)),
    "binned_tree": (8000, 13, 1),  # of fewer rows, accuracies are farther apart
    **dict.fromkeys(("digits_tree", "digits_forest", "breast_cancer_tree", "breast_cancer_forest"), (1,)),
}


#: Of a model's layers, blocks or stages a few: what is timed is all there, and most of the rest would be random weights.
FEW_LAYERS = {
    "bert_base": functools.partial(models.bert_base, num_hidden_layers=2),
    "gpt2": functools.partial(models.gpt2, n_layer=2),
    "resnet18": functools.partial(models.ResNet, models.BasicBlock, (1, 1, 1, 1)),
    "resnet50": functools.partial(models.ResNet, models.Bottleneck, (1, 1, 1, 1)),
    "vit_b_16": functools.partial(models.vit_b_16, num_layers=2),
}


def in_brief(cpu, copy_bandwidth, repeats):
    return copy_bandwidth(cpu, 1 << 20, repeats)


@pytest.mark.parametrize("name", sorted(bench.benchmarks()))
def test_every_benchmark_runs_at_a_small_shape(name, monkeypatch):
    # Measured before and after each run, with 64 MB or for a twentieth of a second, the peak would take most of the time.
    monkeypatch.setattr(machine, "PEAK_SECONDS", 1e-3)
    monkeypatch.setattr(machine.Cpu, "copy_bandwidth", functools.partialmethod(in_brief, machine.Cpu.copy_bandwidth))
    for model, make in FEW_LAYERS.items():
        monkeypatch.setattr(models, model, make)
    for trees in (exact_trees, histogram_trees, tree_predict):
        monkeypatch.setattr(trees, "TREE_PAUSE", 0.0)  # which makes times fair, and nothing waits for these
    the = bench.benchmark(name)
    axes = the.axes.split("x")
    shape = {4: (2, 32, 16, 16)}.get(len(axes), tuple(32 if len(axes) < 5 else 4 for _ in axes))
    if name.startswith(("bert", "vit")):
        shape = (2, 16)
    elif name.startswith("gpt2"):
        shape = (16, 2)
    elif the.axes == "NxEDGE":  # training takes batch norm's statistics, of rows that must be many
        shape = (16 if "train" in name else 2, 32)
    if name.startswith("weight_only"):
        shape = (32, 32, 128)  # a group at least
    shape = SMALL_TREES.get(name, shape)
    against = {"device_tree": "cpu"}.get(name, "scikit-learn" if name in SMALL_TREES else "torch")
    for dtype in the.dtypes:
        # Compiling whole models for the other peers takes minutes; test_peers.py does it for a small one.
        (result,) = bench.run(the, [shape], [dtype], against=against, seconds=0.01)
        assert result.rate > 0


def test_parse_shape():
    assert bench.parse_shape("3x4X5", "MxNxK") == (3, 4, 5)
    for text in ("3x4", "3x4x0", "axbxc", "", "3x4x-5", "3x4x5x6"):
        with pytest.raises(ValueError, match="MxNxK"):
            bench.parse_shape(text, "MxNxK")


def test_numbers_for_people():
    assert duration(3.21e-6) == "3.21 µs" and duration(0.5) == "500 ms" and duration(12e-9) == "12 ns"
    assert geometric_mean([1, 4]) == pytest.approx(2)


def test_the_machine_is_described():
    assert machine.Cpu().cache_bytes() > 0
    assert machine.Cpu().copy_bandwidth(1 << 20, 2) > 0
    assert {"cpu", "microarchitecture", "threads", "isa", "torch"} <= machine.describe().keys()


@pytest.mark.parametrize(
    "said, name",
    [
        (("AuthenticAMD", "25", "1"), "Zen 3"),
        (("AuthenticAMD", "25", "17"), "Zen 4"),
        (("AuthenticAMD", "25", "33"), "Zen 3"),
        (("AuthenticAMD", "25", "97"), "Zen 4"),
        (("AuthenticAMD", "26", "2"), "Zen 5"),
        (("GenuineIntel", "6", "143"), "Sapphire Rapids"),
        (("GenuineIntel", "6", "140"), "GenuineIntel 6 140"),
        ((None, None, None), platform.machine()),
    ],
)
def test_microarchitectures_by_their_numbers(monkeypatch, said, name):
    numbers = dict(zip(("vendor_id", "cpu family", "model"), said, strict=True))
    monkeypatch.setattr(machine, "_cpuinfo", numbers.get)
    assert machine.microarchitecture() == name
