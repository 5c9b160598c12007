"""One of two processes, each with rows of its own: fits with the other, and alone on all rows, and compares the trees.
Run by test_distributed.py: python distributed_worker.py RANK STORE."""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.distributed as dist
from sklearn.datasets import make_classification

from fastnn.tree import HistGradientBoostingClassifier, HistGradientBoostingRegressor, local_fit

RANKS = 2


def trees(model):
    return [
        (tree.nodes.tobytes(), tree.binned_left_cat_bitsets.tobytes(), tree.raw_left_cat_bitsets.tobytes())
        for iteration in model._predictors
        for tree in iteration
    ]


def compare(name, rank, model, X, y, cut, weight=None, **more):
    mine = slice(0, cut) if rank == 0 else slice(cut, None)
    take = (lambda a: a.iloc[mine]) if hasattr(X, "iloc") else (lambda a: a[mine])
    with local_fit():
        alone = type(model)(**model.get_params()).fit(X, y, sample_weight=weight, **more)
    together = model.fit(take(X), y[mine], sample_weight=None if weight is None else weight[mine], **more)
    assert len(trees(alone)) == len(trees(together)), name
    assert trees(alone) == trees(together), name
    assert max(len(tree.nodes) for trees in alone._predictors for tree in trees) > 3, name
    np.testing.assert_array_equal(alone.train_score_, together.train_score_)
    np.testing.assert_array_equal(alone.validation_score_, together.validation_score_)
    np.testing.assert_array_equal(alone.predict(X), together.predict(X))


def main(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    classifier, regressor = HistGradientBoostingClassifier, HistGradientBoostingRegressor
    X, y = make_classification(3001, 11, n_informative=8, random_state=0)
    X[np.random.default_rng(0).random(X.shape) < 0.05] = np.nan
    weight = np.random.default_rng(1).random(3001)
    target = np.nan_to_num(X[:, 0]) * 3 + weight
    compare("two classes", rank, classifier(random_state=0, max_iter=3), X, y, 1700)
    compare("one row", rank, regressor(random_state=0, max_iter=2), X, target, 1)
    far = target.copy()
    far[2500] = 1e10  # sums of long integers, because of a row that one process has
    compare("far apart", rank, regressor(random_state=0, max_iter=3, learning_rate=0.9), X, far, 2000)
    compare(
        "weights",
        rank,
        classifier(random_state=0, max_iter=2, max_depth=4, class_weight="balanced"),
        X,
        y,
        1000,
        weight,
    )
    compare("labels", rank, classifier(random_state=0, max_iter=3), X, np.array(["a", "bcd"])[y], 1000)
    compare("drawn", rank, regressor(random_state=0, max_iter=2, max_features=0.3, max_depth=4), X, target, 2000)
    compare("median", rank, regressor(random_state=0, max_iter=2, loss="absolute_error"), X, target, 500, weight)
    compare("interactions", rank, regressor(random_state=0, max_iter=2, interaction_cst="pairwise"), X, target, 500)
    for scoring in ("loss", "accuracy", lambda e, X, y: e.score(X, y)):
        stops = classifier(random_state=0, max_iter=4, early_stopping=True, scoring=scoring, learning_rate=0.5)
        compare(f"early stopping, {scoring}", rank, stops, X, y, 1700)
    compare(
        "given rows",
        rank,
        regressor(random_state=0, early_stopping=True, max_iter=2),
        X,
        target,
        9,
        X_val=X,
        y_val=target,
    )
    labels = np.where(np.arange(3001) < 1000, 0, 1 + y)  # a class that only one process has
    compare("three classes", rank, classifier(random_state=0, max_iter=3), X, labels, 1200)

    wide, side = make_classification(210_007, 4, n_informative=3, n_redundant=1, random_state=0)
    compare("more rows than the sample", rank, classifier(random_state=0, max_iter=2), wide, side, 100_000)

    rng = np.random.default_rng(2)
    numbered = np.column_stack([rng.standard_normal(2003), np.arange(2003) // 100, rng.integers(0, 5, 2003)])
    category = regressor(random_state=0, max_iter=2, categorical_features=[1, 2])
    compare("categories", rank, category, numbered, np.sin(numbered[:, 1]) + numbered[:, 0], 1111)
    try:
        import pandas
    except ImportError:
        pass
    else:
        frame = pandas.DataFrame(
            {"x": numbered[:, 0], "kind": pandas.Categorical([f"k{int(v)}" for v in numbered[:, 1]])}
        )
        compare("frame", rank, regressor(random_state=0, max_iter=2), frame, np.sin(numbered[:, 1]), 1111)

    # What one process cannot do stops both, with what it was.
    for bad, message in ((X[:, : 11 - rank], "number of features differ"), (X[: 50 - rank], "inconsistent numbers")):
        try:
            classifier().fit(bad, y[:50] if len(bad) < 100 else y)
        except (ValueError, RuntimeError) as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)
    try:
        regressor(max_iter=1 + rank).fit(X, target)
    except ValueError as error:
        assert "parameters differ" in str(error), error
    else:
        raise AssertionError("other parameters")
    dist.barrier()
    dist.destroy_process_group()
    print("trees agree")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
