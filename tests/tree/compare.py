"""Two trees, node for node."""

from __future__ import annotations

import numpy as np

FIELDS = ("feature", "threshold", "n_node_samples", "missing_go_to_left", "children_left", "children_right")


def assert_same(ours, theirs):
    """Every array of the trees is equal to the bit."""
    assert ours.node_count == theirs.node_count
    assert ours.max_depth == theirs.max_depth
    for name in (*FIELDS, "impurity", "weighted_n_node_samples", "value"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)


def count_ties(ours, theirs) -> int:
    """How many splits differ, where it must be because their gains are equal but for rounding; below them nothing is compared,
    as other rows stand there, and everything is in the other subtrees.

    Everywhere else features and counts are equal, and thresholds to the bit.
    """
    ties = 0
    stack = [(0, 0)]
    while stack:
        a, b = stack.pop()
        assert ours.n_node_samples[a] == theirs.n_node_samples[b]
        np.testing.assert_allclose(ours.impurity[a], theirs.impurity[b], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(ours.value[a], theirs.value[b], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(ours.weighted_n_node_samples[a], theirs.weighted_n_node_samples[b], rtol=1e-9)
        leaves = ours.children_left[a] < 0, theirs.children_left[b] < 0
        if all(leaves):
            continue
        if any(leaves):  # the impurity is 0 but for rounding
            assert ours.impurity[a] < 1e-12
            ties += 1
            continue
        same = ours.feature[a] == theirs.feature[b] and ours.threshold[a] == theirs.threshold[b]
        if same and ours.n_node_samples[ours.children_left[a]] == theirs.n_node_samples[theirs.children_left[b]]:
            assert ours.missing_go_to_left[a] == theirs.missing_go_to_left[b]
            stack.append((ours.children_left[a], theirs.children_left[b]))
            stack.append((ours.children_right[a], theirs.children_right[b]))
            continue
        np.testing.assert_allclose(_gain(ours, a), _gain(theirs, b), rtol=1e-9, atol=1e-12)
        ties += 1
    return ties


def _gain(tree, node) -> float:
    left, right = tree.children_left[node], tree.children_right[node]
    weights = tree.weighted_n_node_samples
    sides = weights[left] * tree.impurity[left] + weights[right] * tree.impurity[right]
    return tree.impurity[node] - sides / weights[node]
