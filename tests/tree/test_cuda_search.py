"""Trees grown on a GPU (``max_bins`` and a tensor there): scikit-learn's trees where each value has a bin of its own, the
CPU's histogram search elsewhere, node for node and to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.tree
import torch
from sklearn.base import clone
from sklearn.datasets import make_classification

import fastnn.tree
from fastnn import _cpu, _state
from fastnn.backends import _tree, cuda, file_of
from fastnn.tree import _device_search
from fastnn.tree._binning import bin_columns, bin_edges

from .compare import assert_same

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.fixture
def gpu(request):
    """Runs the test on CUDA's kernels or, where it says so, on Triton's."""
    backend = getattr(request, "param", "cuda")
    request.getfixturevalue(f"on_{backend}")
    return backend


on_both = pytest.mark.parametrize("gpu", ["cuda", "triton"], indirect=True)


def data(rows, columns=7, n_classes=2, seed=0, few=True, missing=False):
    x, y = make_classification(
        rows,
        columns,
        n_informative=columns,
        n_redundant=0,
        n_classes=n_classes,
        n_clusters_per_class=1,
        flip_y=0.1,
        random_state=seed,
    )
    if few:
        x = np.round(x * 4)
        x[:, 0] = x[:, 0] > 0
    if missing:
        x = np.where(np.random.RandomState(seed).rand(*x.shape) < 0.1, np.nan, x)
    return x.astype(np.float32), y


def on_device(x):
    return torch.tensor(x)  # on the GPU, inside the fixture


def check(x, y, sample_weight=None, max_bins=255, exact=True, **parameters):
    """The tree from a tensor is that from the array, and with `exact` scikit-learn's."""
    parameters = {"random_state": 3, **parameters}
    ours = fastnn.tree.DecisionTreeClassifier(max_bins=max_bins, **parameters)
    tree = clone(ours).fit(on_device(x), y, sample_weight).tree_
    assert_same(tree, ours.fit(x, y, sample_weight).tree_)
    if exact:
        assert_same(tree, sklearn.tree.DecisionTreeClassifier(**parameters).fit(x, y, sample_weight).tree_)
    return tree


@pytest.fixture
def searches(monkeypatch):
    """How many roots each search had, and how many levels it went down."""
    seen = []
    plain = _tree.SplitSearch.__call__

    def counted(self, roots, weights, levels, rows):
        seen.append((len(roots) // _tree.NODE, levels))
        return plain(self, roots, weights, levels, rows)

    monkeypatch.setattr(_tree.SplitSearch, "__call__", counted)
    return seen


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(("rows", "columns", "n_classes"), [(61, 4, 2), (701, 7, 2), (499, 31, 3), (307, 33, 10)])
def test_the_same_tree(no_fallback, searches, rows, columns, n_classes, missing, weighted):
    x, y = data(rows, columns, n_classes, missing=missing)
    weights = np.random.RandomState(1).randint(0, 4, rows) if weighted else None
    check(x, y, weights, max_depth=4)
    assert searches


@pytest.mark.parametrize("gpu", ["triton"], indirect=True)
@pytest.mark.parametrize(
    ("rows", "columns", "n_classes", "weights"), [(61, 4, 2, None), (67, 3, 5, 4), (53, 3, 2, 150_000)]
)
def test_the_same_tree_of_fewer_rows(gpu, no_fallback, searches, rows, columns, n_classes, weights):
    """Where kernels are interpreted."""
    x, y = data(rows, columns, n_classes, missing=True)
    weights = None if weights is None else np.random.RandomState(1).randint(0, weights, rows)
    check(x, y, weights, max_depth=3, min_samples_leaf=2)
    assert len(searches) == 1


@pytest.mark.parametrize(
    "parameters",
    [
        {"max_depth": 3, "min_samples_leaf": 7},
        {"max_features": "sqrt", "min_samples_split": 0.1},
        {"max_features": 3, "max_leaf_nodes": 7},
        {"max_leaf_nodes": 6, "min_impurity_decrease": 0.001},
        {"min_weight_fraction_leaf": 0.06, "class_weight": {0: 3, 1: 2}},
        {"max_depth": 4, "ccp_alpha": 0.005},
        {"max_depth": 1},
    ],
    ids=str,
)
def test_parameters(no_fallback, searches, parameters):
    check(*data(401, missing=True), **parameters)
    assert searches


@pytest.mark.parametrize("max_bins", [2, 3, 37, 254, 255])
def test_continuous_values(no_fallback, max_bins):
    x, y = data(523, 5, n_classes=3 if max_bins == 37 else 2, few=False, missing=max_bins != 3)
    check(x, y, max_bins=max_bins, exact=False, max_depth=4)


def test_many_rows_and_pieces(no_fallback, searches):
    """A node's rows are counted and moved in pieces by many blocks, whose order is left to chance."""
    x, y = data(9001, 3, missing=True)
    tree = check(x, y, max_depth=3)
    assert searches[0] == (1, 3) and tree.n_node_samples.max() == 9001


@pytest.mark.parametrize("seed", [0, 2])
def test_any_order_of_threads(on_cuda, no_fallback, seed):
    on_cuda.set_seed(seed)
    x, y = data(2203, 5, n_classes=3, missing=True)
    check(x, y, np.random.RandomState(0).randint(0, 9, len(y)), max_depth=3)


def test_deep_trees_take_several_searches(no_fallback, searches, monkeypatch):
    """Nodes that the first search does not reach are roots of the next, as many at a time as there is memory for."""
    x, y = data(701, 3)
    bytes_of_level = 32 * 2 * 256 * 4 * 4 * 5 // 2  # of four nodes
    monkeypatch.setattr(_tree, "MOST_BYTES", bytes_of_level)
    tree = check(x, y)
    assert tree.max_depth > 6
    assert max(roots << levels - 1 for roots, levels in searches) == 4
    assert any(roots > 1 for roots, _ in searches)


@on_both
def test_growth_takes_another_of_equally_good_columns(gpu, no_fallback, searches):
    """Which one is drawn: the search that was ahead has gone on with the first, and starts again."""
    emulated = gpu == "cuda"
    x, y = data(307 if emulated else 41, 3)
    x = np.concatenate([x, -x, x], axis=1)
    again = 0
    for seed in range(4 if emulated else 2):
        searches.clear()
        check(x, y, random_state=seed, max_depth=3 if emulated else 2)
        again += len(searches) > 1
    assert again


@on_both
def test_the_first_of_equally_good_borders(gpu, no_fallback):
    """Which other warps have found, or which differ by the side of missing values."""
    x = np.arange(100, dtype=np.float32)[:, None]
    tree = check(x, np.repeat([0, 1, 0], [30, 40, 30]), max_depth=1)
    assert tree.threshold[0] == 29.5
    y = np.repeat([0, 1, 0, 1], [40, 40, 10, 10])
    x[80:] = np.nan
    assert not check(x, y, max_depth=1).missing_go_to_left[0]


@on_both
def test_one_class_has_everything_and_one_row(gpu, no_fallback):
    x, _ = data(53, 3)
    check(x, np.zeros(53, int), max_depth=2)
    check(x[:1], np.array([2]))
    check(x[:2], np.array([0, 1]))
    check(np.ones((5, 2), np.float32), np.array([0, 1, 0, 1, 1]))
    check(np.full((5, 1), np.nan, np.float32), np.array([0, 1, 0, 1, 1]))
    check(x, np.arange(53) % 2, np.arange(53) == 5)


def test_most_classes_and_columns_that_are_constant(no_fallback):
    x, _ = data(331, 3)
    x[:, 1] = 7
    x[:200, 2] = np.nan
    check(x, np.arange(331) % 64, max_depth=2)


def test_large_weights(no_fallback):
    x, y = data(331, 3)
    rng = np.random.RandomState(0)
    check(x, y, rng.randint(0, 150_000, 331), max_depth=3)
    weights = np.ones(331)
    weights[7] = 2**24 - 1
    check(x, y, weights, max_depth=3)


def test_memory_orders_and_types(no_fallback):
    x, y = data(211, 5, few=False)
    tree = fastnn.tree.DecisionTreeClassifier(max_bins=31, max_depth=3, random_state=0)
    expected = clone(tree).fit(x, y).tree_
    around = torch.full((213, 17), float("nan"))
    inside = around[1:-1, 3:13:2]
    inside.copy_(on_device(x))
    for given in (on_device(x).T.contiguous().T, inside, on_device(x.astype(np.float64))):
        assert_same(clone(tree).fit(given, torch.tensor(y)).tree_, expected)
    rounded = on_device(x).bfloat16()
    assert_same(clone(tree).fit(rounded, y).tree_, clone(tree).fit(rounded.float().cpu().numpy(), y).tree_)
    fitted = clone(tree).fit(on_device(x), y)
    predicted = fitted.predict(on_device(x))
    assert isinstance(predicted, torch.Tensor) and predicted.device == on_device(x).device
    np.testing.assert_array_equal(predicted.cpu().numpy(), fitted.predict(x))


@pytest.mark.parametrize(
    ("gpu", "max_bins", "columns"),
    [("triton", 100, 37), *(("cuda", bins, columns) for bins in (2, 100, 255) for columns in (1, 32, 37))],
    indirect=["gpu"],
)
def test_bins_are_the_cpus(gpu, columns, max_bins):
    rng = np.random.RandomState(0)
    x = rng.randn(2053, columns).astype(np.float32)
    x[rng.rand(*x.shape) < 0.1] = np.nan
    x[:, 0] = np.round(x[:, 0] * 3)
    edges = bin_edges(x, max_bins)
    if columns > 1:
        edges[1] = np.array([-1e300, x[3, 1] - 1e-12, np.nextafter(np.float64(x[4, 1]), 9), 1e300])[: max_bins - 1]
        edges[1].sort()
    expected = bin_columns(x, edges, missing=max_bins)
    given = on_device(x)
    bins, least, largest = file_of("tree", "bin_rows", given).bin_rows(given, edges, max_bins + 1)
    np.testing.assert_array_equal(bins.cpu().numpy()[:, :columns], expected)
    assert not bins[:, columns:].any()
    for column in range(columns):
        for b in range(max_bins + 1):
            values = x[expected[:, column] == b, column]
            if len(values) and b < max_bins:
                assert (least[column, b], largest[column, b]) == (values.min(), values.max())
            else:
                assert (least[column, b], largest[column, b]) == (np.inf, -np.inf)


@pytest.mark.parametrize("max_bins", [2, 3, 37, 255])
def test_quantiles_are_the_cpus(max_bins, monkeypatch):
    monkeypatch.setattr(_device_search, "_SORTED", 5000)  # columns in several parts
    rng = np.random.RandomState(0)
    for rows in (1, 2, 254, 255, 256, 257, 1031):
        x = rng.randn(rows, 9).astype(np.float32)
        x[:, 1] = np.round(x[:, 1] * 3)
        x[:, 2], x[:, 3] = 7, np.nan
        x[rng.rand(rows) < 0.5, 4] = np.nan
        x[:, 5] = np.arange(rows)
        x[:, 6] = rng.permutation(rows) // 3
        x[:, 7] *= 1e30
        x[:, 8] = np.where(x[:, 8] < 0, -0.0, 0.0)
        for ours, cpus in zip(_device_search.edges_of(on_device(x), max_bins), bin_edges(x, max_bins), strict=True):
            np.testing.assert_array_equal(ours, cpus)


def fallback_of(estimator, x, y, weights=None):
    _state.reset_fallbacks()
    ours = clone(estimator).fit(on_device(x), y, weights)
    (reason,) = (reason for (_, reason) in _state.fallbacks())
    _state.reset_fallbacks()
    assert_same(ours.tree_, clone(estimator).fit(x, y, weights).tree_)
    return reason


@pytest.mark.filterwarnings("ignore:The number of unique classes")
def test_what_the_cpu_grows_is_counted():
    x, y = data(101, 4)
    Tree = fastnn.tree.DecisionTreeClassifier
    tree = Tree(max_bins=9, max_depth=2, random_state=0)
    assert "entropy" in fallback_of(Tree(max_bins=9, criterion="entropy", random_state=0), x, y)
    assert "random" in fallback_of(Tree(max_bins=9, splitter="random", random_state=0), x, y)
    assert "monotonic" in fallback_of(Tree(max_bins=9, monotonic_cst=[1, 0, 0, 0], random_state=0), x, y)
    assert "not whole" in fallback_of(tree, x, y, np.full(101, 0.5))
    assert "2^26" in fallback_of(tree, x, y, np.full(101, 2.0**24))
    assert "64 classes" in fallback_of(tree, x, np.arange(101) % 65)
    assert "several outputs" in fallback_of(tree, x, np.stack([y, y], axis=1))
    close = (np.arange(404).reshape(101, 4) % 5 * 6e-8).astype(np.float32)
    assert "count as equal" in fallback_of(tree, close, y)
    with fastnn.strict(), pytest.raises(fastnn.FallbackError, match="entropy"):
        Tree(max_bins=9, criterion="entropy").fit(on_device(x), y)


def test_tensors_without_bins_go_to_the_cpu():
    x, y = data(101, 4)
    tree = fastnn.tree.DecisionTreeClassifier(random_state=0)
    assert_same(clone(tree).fit(on_device(x), y).tree_, tree.fit(x, y).tree_)


def test_bad_input():
    x, y = data(31, 3)
    tree = fastnn.tree.DecisionTreeClassifier(max_bins=9)
    infinite = on_device(x)
    infinite[3, 1] = -float("inf")
    with pytest.raises(ValueError, match="X contains infinity"):
        tree.fit(infinite, y)
    with pytest.raises(ValueError, match="Expected 2D array"):
        tree.fit(on_device(x[0]), y)
    with pytest.raises(ValueError, match=r"0 sample\(s\)"):
        tree.fit(on_device(x[:0]), y[:0])
    with pytest.raises(ValueError, match=r"0 feature\(s\)"):
        tree.fit(on_device(x[:, :0]), y)
    with pytest.raises(ValueError, match="Complex"):
        tree.fit(on_device(x).to(torch.complex64), y)
    with pytest.raises(ValueError, match="labels=30 does not match"):
        tree.fit(on_device(x), y[:-1])
    with pytest.raises(ValueError, match="NaN"):
        tree.fit(on_device(x), np.where(y, np.nan, 1.0))
    with pytest.raises(ValueError, match="sample_weight"):
        tree.fit(on_device(x), y, np.ones(30))


def test_bad_arguments_of_the_kernels():
    workspace = cuda.module().tree_split_search_workspace
    assert workspace(100, 33, 256, 2, False, 1, 8) > 0
    for sizes, name in (
        ((0, 33, 256, 2, False, 1, 8), "rows"),
        ((100, 0, 256, 2, False, 1, 8), "columns"),
        ((100, 33, 257, 2, False, 1, 8), "slots"),
        ((100, 33, 256, 65, False, 1, 8), "classes"),
        ((100, 33, 256, 2, False, 2, 9), "roots, levels"),
        ((100, 33, 256, 2, False, 1, 0), "roots, levels"),
    ):
        with pytest.raises(ValueError, match=name):
            workspace(*sizes)
    ranges = np.zeros((3, 9), np.float32)
    with pytest.raises(ValueError, match="slots"):
        _cpu.TreeAheadColumns(10, 3, 1, ranges.ctypes.data, ranges.ctypes.data, 4)
    with pytest.raises(ValueError, match="largest"):
        _cpu.TreeAheadColumns(10, 3, 9, ranges.ctypes.data, 0, 4)
    columns = _cpu.TreeAheadColumns(4, 3, 9, ranges.ctypes.data, ranges.ctypes.data, 4)
    y, classes = np.array([0.0, 1, 0, 1]), np.array([2])
    target = (0, 1, classes.ctypes.data, 2, y.ctypes.data, 0)
    settings = (3, 3, 2, 1, -1, 0.0, 0.0, 0, 1, 1)
    with pytest.raises(ValueError, match="results of"):
        _cpu.tree_grow_ahead(columns, target, settings, lambda *_: (b"", b"", b""))
    with pytest.raises(ValueError, match="three results"):
        _cpu.tree_grow_ahead(columns, target, settings, lambda *_: ())
    sizes = _cpu.tree_ahead_sizes
    for byte in (b"\x7f", b"\xff"):  # of one root and two levels: nodes, weights, candidates
        results = [byte * count for count in (7 * sizes[0], 7 * 2 * sizes[1], 3 * 3 * sizes[2])]
        with pytest.raises(RuntimeError, match="that cannot be"):
            _cpu.tree_grow_ahead(columns, target, settings, lambda *_, found=results: tuple(found))
    with pytest.raises(ZeroDivisionError):
        _cpu.tree_grow_ahead(columns, target, settings, lambda *_: 1 // 0)
    with pytest.raises(ValueError, match="Gini"):
        _cpu.tree_grow_ahead(columns, (1, *target[1:]), settings, lambda *_: ())
