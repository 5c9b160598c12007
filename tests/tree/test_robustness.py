"""What users do to estimators: any kind of array or frame, several threads at once, arrays of a tree that are written to."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pytest
import scipy.sparse
import sklearn.ensemble
import sklearn.tree
import torch
from sklearn.datasets import make_classification
from sklearn.model_selection import cross_val_predict

import fastnn.tree

NAMES = [
    "DecisionTreeClassifier",
    "DecisionTreeRegressor",
    "RandomForestClassifier",
    "RandomForestRegressor",
    "AdaBoostClassifier",
    "GradientBoostingClassifier",
    "GradientBoostingRegressor",
    "HistGradientBoostingClassifier",
    "HistGradientBoostingRegressor",
]
SMALL = {"n_estimators": 3, "max_iter": 3, "random_state": 0}
X, Y = make_classification(300, 6, n_informative=4, random_state=0)


def new(name, ours=True):
    """The estimator, fastnn's or scikit-learn's."""
    cls = getattr(fastnn.tree, name) if ours else getattr(sklearn.tree, name, getattr(sklearn.ensemble, name, None))
    return cls(**{key: value for key, value in SMALL.items() if key in cls().get_params()})


def outcome(call, *arguments):
    """The result or the error, and the warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            result = call(*arguments)
        except Exception as error:
            result = (type(error), str(error))
    return result, [(each.category, str(each.message)) for each in seen]


def fit_and_predict(model, given):
    return model.fit(given, Y).predict(given)


def odd_strides():
    record = np.zeros(len(X), dtype=[("before", "u1"), ("x", "f8", X.shape[1])])
    record["x"] = X
    return record["x"]


def read_only():
    array = X.astype(np.float32)
    array.setflags(write=False)
    return array


def with_number(value):
    array = X.copy()
    array[5, 2] = value
    return array


ARRAYS = {
    "not contiguous": lambda: np.repeat(np.repeat(X, 2, 0), 2, 1)[::2, ::2],
    "negative strides": lambda: X[::-1, ::-1],
    "one row": lambda: np.broadcast_to(X[0], X.shape),
    "one column": lambda: np.broadcast_to(X[:, :1], X.shape),
    "odd strides": odd_strides,
    "read only": read_only,
    "big-endian": lambda: X.astype(">f8"),
    "big-endian float32": lambda: X.astype(">f4"),
    "long double": lambda: X.astype(np.longdouble),
    "objects": lambda: X.astype(object),
    "strings of numbers": lambda: X.astype(str),
    "strings": lambda: np.full(X.shape, "a"),
    "complex": lambda: X.astype(complex),
    "NaN": lambda: with_number(np.nan),
    "infinity": lambda: with_number(np.inf),
    "beyond float32": lambda: with_number(1e300),
    "one dimension": lambda: X[:, 0],
    "three dimensions": lambda: X.reshape(300, 2, 3),
    "no row": lambda: X[:0],
    "no feature": lambda: X[:, :0],
    "masked": lambda: np.ma.masked_array(X),
    "csr": lambda: scipy.sparse.csr_array(X),
    "None": lambda: None,
}


@pytest.mark.parametrize("name", NAMES)
def test_arrays_of_any_kind(name):
    """Predictions, errors and warnings are scikit-learn's."""
    fitted = [new(name, ours).fit(X, Y) for ours in (True, False)]
    for kind, make in ARRAYS.items():
        given = make()
        results = [
            (outcome(fit_and_predict, new(name, ours), given), outcome(model.predict, given))
            for ours, model in zip((True, False), fitted, strict=True)
        ]
        for (got, seen), (expected, theirs) in zip(*results, strict=True):
            assert seen == theirs, kind
            if isinstance(expected, tuple):
                assert got == expected, kind
            else:
                np.testing.assert_allclose(got, expected, rtol=1e-12, err_msg=kind)


@pytest.mark.parametrize("name", NAMES)
def test_small_integers_and_booleans(name):
    """Many splits tie, so that trees may differ: these are those of the same numbers as floats."""
    for given in ((X * 10).astype(np.int8), X > 0, (X * 10).astype(">i8")):
        floats = given.astype(np.float64)
        model = new(name).fit(given, Y)
        np.testing.assert_array_equal(model.predict(given), new(name).fit(floats, Y).predict(floats))


@pytest.mark.parametrize("name", NAMES)
def test_names_of_features(name):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=list("abcdef"))
    models = [new(name, ours).fit(frame, Y) for ours in (True, False)]
    for call in (
        lambda m: m.feature_names_in_,
        lambda m: m.predict(frame),
        lambda m: m.predict(X),  # warns
        lambda m: m.predict(frame[list("bacdef")]),
        lambda m: m.predict(frame.rename(columns={"a": "z"})),
        lambda m: m.predict(frame.assign(z=1)),
        lambda m: m.fit(X, Y).predict(frame),  # warns
    ):
        (got, seen), (expected, theirs) = (outcome(call, model) for model in models)
        assert seen == theirs
        assert got == expected if isinstance(expected, tuple) else np.array_equal(got, expected)


@pytest.mark.parametrize("name", ["DecisionTreeClassifier", "RandomForestClassifier", "HistGradientBoostingClassifier"])
def test_tensors_of_any_kind(name):
    model = new(name).fit(X, Y)
    tensor = torch.from_numpy(X)
    for given in (
        tensor.clone().requires_grad_(),
        tensor.bfloat16(),
        tensor.t().contiguous().t(),
        tensor[:1].expand(9, 6),
    ):
        result = model.predict(given)
        assert isinstance(result, torch.Tensor) and not result.requires_grad
        np.testing.assert_array_equal(result.numpy(), model.predict(given.detach().double().numpy()))
    new(name).fit(tensor.clone().requires_grad_(), torch.from_numpy(Y))
    for given, error in (
        (tensor.to("meta"), NotImplementedError),
        (tensor.to_sparse(), TypeError),
        (tensor.to(torch.complex64), ValueError),
    ):
        with pytest.raises(error):
            model.predict(given)


def test_memory_mapped_rows(tmp_path):
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for name in ("RandomForestClassifier", "HistGradientBoostingClassifier"):
        expected = cross_val_predict(new(name), X, Y, cv=2)
        np.testing.assert_array_equal(new(name).fit(mapped, Y).predict(mapped), new(name).fit(X, Y).predict(X))
        # joblib hands arrays of more than a byte to its processes as read-only maps.
        with joblib.parallel_config("loky", n_jobs=2, max_nbytes=1):
            np.testing.assert_array_equal(cross_val_predict(new(name), X, Y, cv=2), expected)


@pytest.mark.parametrize("name", NAMES)
def test_several_threads(name):
    """Fits of estimators of their own, and predictions by one that has not predicted before."""
    expected = new(name).fit(X, Y).predict(X)
    model = new(name).fit(X, Y)
    with ThreadPoolExecutor(4) as pool:
        for fitted in pool.map(lambda _: new(name).fit(X, Y), range(8)):
            np.testing.assert_array_equal(fitted.predict(X), expected)
        for i, part in enumerate(pool.map(lambda i: model.predict(X[i::20]), range(20))):
            np.testing.assert_array_equal(part, expected[i::20])


# ---- arrays of a tree that are written to


def trees_of(model):
    if hasattr(model, "_predictors"):
        return [tree for trees in model._predictors for tree in trees]
    return [tree.tree_ for tree in np.ravel(model.estimators_)] if hasattr(model, "estimators_") else [model.tree_]


@pytest.mark.parametrize("name", NAMES)
def test_other_values_are_noticed(name):
    model = new(name).fit(X, Y)
    method = "decision_function" if hasattr(model, "decision_function") else "predict"
    method = "predict_proba" if name in ("DecisionTreeClassifier", "RandomForestClassifier") else method
    before = getattr(model, method)(X)
    tree = trees_of(model)[-1]
    if hasattr(tree, "nodes"):
        tree.nodes["value"] += 0.25
    elif name == "AdaBoostClassifier":
        tree.value[...] = tree.value[..., ::-1]
    else:
        tree.value[...] += 0.25
    after = getattr(model, method)(X)
    assert not np.array_equal(after, before)
    np.testing.assert_array_equal(after, getattr(model.to_sklearn(), method)(X))


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("Hist")])
def test_a_pruned_tree_is_noticed(name):
    """As in many a recipe: a node becomes a leaf, and what was below it stays in the arrays."""
    model = new(name)
    if name == "AdaBoostClassifier":
        model.set_params(estimator=fastnn.tree.DecisionTreeClassifier(max_depth=3))
    model.fit(X, Y)
    before = model.predict(X)
    for tree in trees_of(model):
        tree.children_left[1] = tree.children_right[1] = -1
    after = model.predict(X)
    assert not np.array_equal(after, before)
    np.testing.assert_array_equal(after, model.to_sklearn().predict(X))


def test_other_votes_of_adaboost_are_noticed():
    model = new("AdaBoostClassifier").fit(X, Y)
    before = model.decision_function(X)
    model.estimator_weights_[1:] = 0
    assert not np.array_equal(model.decision_function(X), before)
    np.testing.assert_array_equal(model.decision_function(X), model.to_sklearn().decision_function(X))


def test_any_word_that_changes_is_noticed():
    array = np.random.default_rng(0).random(100_003)
    watch = fastnn._cpu.TreeWatch([(array.ctypes.data, array.nbytes), (Y.ctypes.data, Y.nbytes)])
    assert not watch.changed()
    for i in (0, 1, 7, 8, 32_767, 32_768, 100_000, 100_002):
        was = array[i]
        array[i] = np.nextafter(was, 1)
        assert watch.changed()
        array[i] = was
        assert not watch.changed()
    array[[5, 13]] = array[[13, 5]]
    assert watch.changed()
    assert not fastnn._cpu.TreeWatch([]).changed()
    with pytest.raises(ValueError):
        fastnn._cpu.TreeWatch([(0, 8)])
