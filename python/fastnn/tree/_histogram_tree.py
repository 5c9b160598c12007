"""A tree grown on binned rows, and scikit-learn's ``TreePredictor`` of it."""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
from sklearn.ensemble._hist_gradient_boosting.common import PREDICTOR_RECORD_DTYPE
from sklearn.ensemble._hist_gradient_boosting.predictor import TreePredictor

from fastnn import _cpu

from ._binning import empty_bins
from ._distributed import Alone

# GrownNode in src/cpp/tree/grow.hpp.
NODE = np.dtype(
    [(name, "f8") for name in ("value", "gain", "gradient", "hessian")]
    + [(name, "i8") for name in ("count", "begin", "end")]
    + [(name, "i4") for name in ("feature", "bin", "left", "right", "depth")]
    + [(name, "u1") for name in ("leaf", "missing_left", "categorical", "unused")]
    + [("set", "u4", 8)]
)

#: More leaves, or levels, than any tree has.
_NO_LIMIT = 2**31 - 1


@dataclasses.dataclass
class GrowthLimits:
    """What bounds a tree; scikit-learn's names."""

    max_leaf_nodes: int | None = None
    max_depth: int | None = None
    min_samples_leaf: int = 20
    l2_regularization: float = 0.0
    min_hessian_to_split: float = 1e-3
    min_gain_to_split: float = 0.0
    shrinkage: float = 1.0


def _has_spare_bytes(binned: np.ndarray) -> bool:
    """Whether the 3 bytes behind the last bin, which the kernels load, are of the same memory."""
    owner = binned
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    ends = [array.ctypes.data + array.nbytes for array in (binned, owner)]
    return binned.flags.f_contiguous and owner.flags.owndata and owner.flags.c_contiguous and ends[1] - ends[0] >= 3


class HistogramGrower:
    """Grows trees on ``binned`` (rows, features): uint8 in Fortran order, read in place if it is of ``empty_bins``.

    ``n_bins`` counts the bins of each feature without that of missing values, ``missing``. ``interaction_cst`` is a list
    of sets of features, ``max_features`` the share of features that each node looks at, drawn from ``rng``. In a
    :class:`~fastnn.tree._distributed.Group` every process has rows of its own and all grow the same tree.
    """

    def __init__(
        self,
        binned: np.ndarray,
        n_bins: np.ndarray,
        missing: int,
        *,
        categorical=None,
        monotonic=None,
        interaction_cst: list[set[int]] | None = None,
        max_features: float = 1.0,
        rng: np.random.Generator | None = None,
        group: Alone | None = None,
    ) -> None:
        rows, features = binned.shape
        if binned.dtype != np.uint8 or (binned.size and (binned.strides[0] != 1 or binned.strides[1] < rows)):
            raise ValueError("HistogramGrower: binned: expected uint8 in Fortran order")
        if not _has_spare_bytes(binned):
            given, binned = binned, empty_bins(rows, features)
            binned[:] = given
        self.binned = binned
        self.n_bins = np.ascontiguousarray(n_bins, dtype=np.uint32)
        self.categorical = None if categorical is None else np.ascontiguousarray(categorical, dtype=np.uint8)
        monotonic = None if monotonic is None else np.ascontiguousarray(monotonic, dtype=np.int8)
        if monotonic is not None and self.categorical is not None and np.any(monotonic[self.categorical != 0]):
            raise ValueError("Categorical features cannot have monotonic constraints.")
        self.group = group if group is not None else Alone()
        self._grower = _cpu.HistogramGrower(
            binned.ctypes.data,
            binned.strides[1] if binned.size else rows,
            rows,
            features,
            missing,
            self.n_bins.ctypes.data,
            0 if self.categorical is None else self.categorical.ctypes.data,
            0 if monotonic is None else monotonic.ctypes.data,
        )
        if self.group.size > 1:
            marks = self.group.largest(np.frombuffer(self._grower.missing(), dtype=np.uint8))
            self._grower.set_missing(marks.tobytes())
        self.rows = rows
        self._all_rows = sum(self.group.each(rows))
        self._sets = interaction_cst
        self._states: list[tuple[list[int], list[int]]] = []
        self._known: dict[tuple[int, int], int] = {}
        if interaction_cst is not None:
            self._state(list(range(len(interaction_cst))), None)
        self._max_features, self._rng = max_features, rng

    def _state(self, groups: list[int], feature: int | None) -> int:
        allowed: set[int] = set()
        kept = []
        for g in groups:
            if feature is None or feature in self._sets[g]:
                kept.append(g)
                allowed.update(self._sets[g])
        self._states.append((kept, list(allowed)))
        return len(self._states) - 1

    def _interact(self, state: int, feature: int) -> tuple[int, list[int]]:
        key = (state, feature)
        if key not in self._known:
            self._known[key] = self._state(self._states[state][0], feature)
        return self._known[key], self._states[self._known[key]][1]

    def _subsample(self, count: int) -> bytes:
        chosen = np.full(count, False)
        chosen[: max(1, int(np.ceil(self._max_features * count)))] = True
        self._rng.shuffle(chosen)
        return chosen.tobytes()

    def grow(self, gradient: np.ndarray, hessian: np.ndarray | None, limits: GrowthLimits) -> np.ndarray:
        """The nodes (of dtype ``NODE``) of a tree on float32 gradients and hessians; None where all hessians are 1.

        Where one of them is not finite the tree is a leaf of value 0, as scikit-learn's: no sum tells a split from another.
        """
        gradient = np.ascontiguousarray(gradient, dtype=np.float32)
        parts = [gradient]
        if hessian is not None:
            hessian = np.ascontiguousarray(hessian, dtype=np.float32)
            parts.append(hessian)
        for part in parts:
            if part.shape != (self.rows,):
                raise ValueError(f"HistogramGrower.grow: expected {self.rows} gradients and hessians, got {part.shape}")
        largest = [_cpu.largest_magnitude(part.ctypes.data, len(part)) for part in parts]
        largest = self.group.largest(np.array(largest, dtype=np.float64)).tolist()
        nodes = self._grower.grow(
            gradient.ctypes.data,
            0 if hessian is None else hessian.ctypes.data,
            largest[0],
            largest[-1] if hessian is not None else 1.0,
            self._all_rows,
            min(limits.max_leaf_nodes or 0, _NO_LIMIT),
            min(limits.max_depth or 0, _NO_LIMIT),
            limits.min_samples_leaf,
            limits.l2_regularization,
            limits.min_hessian_to_split,
            limits.min_gain_to_split,
            limits.shrinkage,
            self._states[0][1] if self._sets is not None else [],
            self.group.reduce,
            self._subsample if self._max_features < 1 else None,
            self._interact if self._sets is not None else None,
        )
        return np.frombuffer(bytearray(nodes), dtype=NODE)

    def leaf_of_rows(self, nodes: np.ndarray) -> np.ndarray:
        """The node of the last tree that each row of this process ends in."""
        memory = (ctypes.c_uint32 * self.rows).from_address(self._grower.partition())
        partition = np.frombuffer(memory, dtype=np.uint32)
        out = np.empty(self.rows, dtype=np.int32)
        for node in np.flatnonzero(nodes["leaf"]):
            out[partition[nodes["begin"][node] : nodes["end"][node]]] = node
        return out

    def add_values(self, nodes: np.ndarray, prediction: np.ndarray) -> None:
        """Adds to the float64 ``prediction`` of each row the value of its leaf in the last tree."""
        if prediction.dtype != np.float64 or prediction.shape != (self.rows,) or not prediction.flags.c_contiguous:
            raise ValueError(f"HistogramGrower.add_values: expected {self.rows} contiguous float64")
        values = np.ascontiguousarray(nodes["value"])
        self._grower.add_values(values.ctypes.data, len(values), prediction.ctypes.data)


def make_predictor(nodes: np.ndarray, edges: list[np.ndarray], n_bins: np.ndarray) -> TreePredictor:
    """scikit-learn's predictor of a grown tree, whose bins lie between ``edges``."""
    out = np.zeros(len(nodes), dtype=PREDICTOR_RECORD_DTYPE)
    for ours, theirs in (
        ("value", "value"),
        ("count", "count"),
        ("feature", "feature_idx"),
        ("missing_left", "missing_go_to_left"),
        ("left", "left"),
        ("right", "right"),
        ("gain", "gain"),
        ("depth", "depth"),
        ("leaf", "is_leaf"),
        ("bin", "bin_threshold"),
        ("categorical", "is_categorical"),
    ):
        out[theirs] = nodes[ours]
    inner = np.flatnonzero(nodes["leaf"] == 0)
    sets = np.flatnonzero(nodes["categorical"])
    thresholds = np.zeros(len(nodes))
    for node in inner.tolist():
        feature, last = nodes["feature"][node], nodes["bin"][node]
        if nodes["categorical"][node]:
            continue
        # Missing values alone go to the right of the last bin.
        thresholds[node] = np.inf if last == n_bins[feature] - 1 else edges[feature][last]
    out["num_threshold"] = thresholds
    binned = np.zeros((len(sets), 8), dtype=np.uint32)
    raw = np.zeros((len(sets), 8), dtype=np.uint32)
    out["bitset_idx"][sets] = np.arange(len(sets))
    for i, node in enumerate(sets.tolist()):
        binned[i] = nodes["set"][node]
        categories = np.asarray(edges[nodes["feature"][node]]).astype(np.intp)
        bits = np.unpackbits(binned[i].view(np.uint8), bitorder="little")
        of_raw = np.zeros(256, dtype=np.uint8)
        of_raw[categories] = bits[: len(categories)]
        raw[i] = np.packbits(of_raw, bitorder="little").view(np.uint32)
    return TreePredictor(out, binned, raw)
