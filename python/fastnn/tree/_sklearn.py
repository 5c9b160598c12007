"""What depends on scikit-learn's private parts."""

from __future__ import annotations

import numpy as np
import sklearn
from sklearn.tree._tree import NODE_DTYPE, Tree

VERSION = tuple(int(part) for part in sklearn.__version__.split(".")[:2])

# As the kernels lay out a node.
_NODE = np.dtype(
    {
        "names": [
            "left_child",
            "right_child",
            "feature",
            "threshold",
            "impurity",
            "n_node_samples",
            "weighted_n_node_samples",
            "missing_go_to_left",
        ],
        "formats": ["<i8", "<i8", "<i8", "<f8", "<f8", "<i8", "<f8", "u1"],
        "offsets": [0, 8, 16, 24, 32, 40, 48, 56],
        "itemsize": 64,
    }
)


def tree_of(grown, n_features: int, n_classes: np.ndarray, n_outputs: int) -> Tree:
    """A scikit-learn ``Tree`` of what the kernels have grown."""
    tree = Tree(n_features, n_classes, n_outputs)
    nodes = np.empty(grown.count, _NODE)
    values = np.empty((grown.count, n_outputs, int(n_classes.max())))
    grown.copy_to(nodes.ctypes.data, values.ctypes.data)
    if nodes.dtype != NODE_DTYPE:
        given, nodes = nodes, np.zeros(grown.count, NODE_DTYPE)
        for name in NODE_DTYPE.names:
            nodes[name] = given[name]
    tree.__setstate__({"max_depth": grown.max_depth, "node_count": grown.count, "nodes": nodes, "values": values})
    return tree
