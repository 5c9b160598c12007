"""``fit`` in a ``torch.distributed`` group of two gloo processes gives, bit for bit, the trees of one process."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastnn.tree import HistGradientBoostingRegressor
from fastnn.tree._distributed import Alone

WORKER = pathlib.Path(__file__).with_name("distributed_worker.py")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_two_processes_grow_the_trees_of_one(tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output
        assert "trees agree" in output


def test_processes_that_would_go_on_from_elsewhere():
    class Two(Alone):
        """This process, and one whose model was not fitted before."""

        size = 2

        def each(self, value):
            return [value, {**value, "iterations and seeds to go on with": None}]

    X = np.random.default_rng(0).normal(size=(40, 3))
    model = HistGradientBoostingRegressor(max_iter=2, warm_start=True).fit(X, X[:, 0])
    with pytest.raises(ValueError, match=r"iterations and seeds to go on with differ: .* None on rank 1"):
        model._compare(Two(), 3, True, True)


def test_a_frame_on_one_process_and_an_array_on_the_other():
    class Two(Alone):
        size = 2

        def each(self, value):
            return [value, {**value, "names of features": None}]

    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(np.random.default_rng(0).normal(size=(40, 2)), columns=["a", "b"])
    model = HistGradientBoostingRegressor(max_iter=1).fit(frame, frame["a"])
    with pytest.raises(ValueError, match=r"names of features differ: \['a', 'b'\] on rank 0, None on rank 1"):
        model._compare(Two(), 2, True, True)
