"""Prediction of ``TreePredictor`` objects: values are binned by the trees' own thresholds, and trees run on the bins.

``x <= threshold`` is a comparison of float64, and binning makes it exactly, once a value and not once a tree; after that
the forest's kernels compare small integers.
"""

from __future__ import annotations

import itertools

import numpy as np

from ._binning import bin_columns
from ._predict import NODE, Forest

MISSING = 255


def _records(nodes: np.ndarray, threshold: np.ndarray, first_set) -> np.ndarray:
    """Nodes of predictors as the kernels take them; ``first_set`` is where the sets of a node's tree begin."""
    records = np.zeros(len(nodes), dtype=NODE)
    leaf = nodes["is_leaf"] != 0
    records["left_child"] = np.where(leaf, -1, nodes["left"].astype(np.int64))
    records["right_child"] = np.where(leaf, -1, nodes["right"].astype(np.int64))
    records["feature"] = nodes["feature_idx"]
    records["threshold"] = threshold
    records["missing_go_to_left"] = nodes["missing_go_to_left"]
    records["category"] = np.where(nodes["is_categorical"] != 0, first_set + nodes["bitset_idx"].astype(np.int64), -1)
    return records


class BinnedForest:
    """Trees of ``iterations``, lists of as many predictors as the prediction has columns, for rows of raw values.

    ``categories`` holds for each feature the number of its categories, 0 for numbers. ``None`` is to be used instead where
    :meth:`fits` is False: trees of several fits may have more than 254 thresholds of a feature.
    """

    def __init__(self, iterations: list[list], categories: np.ndarray) -> None:
        features = len(categories)
        trees = [tree for iteration in iterations for tree in iteration]
        nodes = np.concatenate([tree.nodes for tree in trees])
        starts = np.cumsum([0] + [len(tree.nodes) for tree in trees])
        splits = (nodes["is_leaf"] == 0) & (nodes["is_categorical"] == 0)
        finite = np.flatnonzero(splits & (nodes["num_threshold"] < np.inf))
        feature, threshold = nodes["feature_idx"][finite], nodes["num_threshold"][finite]
        order = np.lexsort((threshold, feature))
        feature, threshold = feature[order], threshold[order]
        new = np.ones(len(order), dtype=bool)
        new[1:] = (feature[1:] != feature[:-1]) | (threshold[1:] != threshold[:-1])
        counts = np.bincount(feature[new], minlength=features)
        self.fits = bool(counts.max(initial=0) < MISSING)
        if not self.fits:
            return
        begins = np.cumsum(counts) - counts
        edges = np.split(threshold[new], np.cumsum(counts)[:-1])
        self.edges = [np.arange(float(c)) if c else e for c, e in zip(categories.tolist(), edges, strict=True)]
        self.categorical = categories > 0
        threshold = np.full(len(nodes), MISSING - 1)  # whatever is not missing
        threshold[finite[order]] = (np.cumsum(new) - 1) - begins[feature]
        first_set = np.cumsum([0] + [len(tree.raw_left_cat_bitsets) for tree in trees])
        records = _records(nodes, threshold, np.repeat(first_set[:-1], np.diff(starts)))
        values = nodes["value"]
        width = len(iterations[0])
        self.forest = Forest(
            [(records[a:b], values[a:b]) for a, b in itertools.pairwise(starts)],
            features,
            columns=[k for iteration in iterations for k in range(len(iteration))],
            width=width,
            categories=np.concatenate([tree.raw_left_cat_bitsets for tree in trees]) if first_set[-1] else None,
            missing_bin=MISSING,
        )

    def bins(self, X: np.ndarray) -> np.ndarray:
        """The bins of raw values; a category that is not known is missing."""
        binned = bin_columns(X, self.edges, MISSING, self.categorical)
        for f in np.flatnonzero(self.categorical):
            column = binned[:, f]
            column[column >= len(self.edges[f])] = MISSING
        return binned

    def add(self, binned: np.ndarray, prediction: np.ndarray, trees: tuple[int, int] | None = None) -> None:
        """Adds the trees' values, or those of the trees from ``trees[0]`` to before ``trees[1]``, to ``prediction`` (rows,
        columns), tree by tree."""
        out = np.ascontiguousarray(prediction)
        self.forest.predict(binned, out=out, trees=trees)
        if out is not prediction:
            prediction[:] = out


def on_training_bins(predictors: list, features: int, missing: int) -> Forest:
    """A forest of one iteration's predictors, for rows in the bins that they were grown on."""
    sets = [predictor.binned_left_cat_bitsets for predictor in predictors]
    first_set = np.cumsum([0] + [len(s) for s in sets])
    trees = [
        (_records(predictor.nodes, predictor.nodes["bin_threshold"], first), predictor.nodes["value"])
        for predictor, first in zip(predictors, first_set.tolist(), strict=False)
    ]
    return Forest(
        trees,
        features,
        columns=range(len(trees)),
        width=len(trees),
        categories=np.concatenate(sets) if first_set[-1] else None,
        missing_bin=missing,
    )
