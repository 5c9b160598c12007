"""``HistGradientBoosting*`` against scikit-learn's: parameters, scores, stages and early stopping."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import sklearn
import torch
from sklearn import ensemble
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, make_classification, make_regression
from sklearn.inspection import partial_dependence
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from fastnn.tree import HistGradientBoostingClassifier, HistGradientBoostingRegressor

OURS = {"classifier": HistGradientBoostingClassifier, "regressor": HistGradientBoostingRegressor}
THEIRS = {"classifier": ensemble.HistGradientBoostingClassifier, "regressor": ensemble.HistGradientBoostingRegressor}


def two_classes(rows=4001, **more):
    return make_classification(rows, 20, n_informative=8, random_state=0, **more)


def three_classes(rows=2003):
    return make_classification(rows, 20, n_informative=8, n_classes=3, random_state=0)


def numbers(rows=3001):
    return make_regression(rows, 10, noise=5, random_state=0)


def with_missing(X):
    X = X.copy()
    X[np.random.default_rng(0).random(X.shape) < 0.1] = np.nan
    return X


def negative_log_loss(estimator, X, y):
    return -log_loss(y, estimator.predict_proba(X))


WEIGHT = np.random.default_rng(3).random(5000)

# name: kind, data, parameters, further arguments of fit
CASES = {
    "two classes": ("classifier", two_classes, {"max_iter": 30}, {}),
    "three classes": ("classifier", three_classes, {"max_iter": 30}, {}),
    "labels": (
        "classifier",
        lambda: (two_classes()[0], np.array(["no", "yes"])[two_classes()[1]]),
        {"max_iter": 20},
        {},
    ),
    "class_weight": (
        "classifier",
        lambda: two_classes(weights=[0.9]),
        {"class_weight": "balanced", "max_iter": 30},
        {},
    ),
    "weights": ("classifier", two_classes, {"max_iter": 30}, {"sample_weight": WEIGHT[:4001]}),
    "missing": ("classifier", lambda: (with_missing(two_classes()[0]), two_classes()[1]), {"max_iter": 30}, {}),
    "features drawn": ("classifier", two_classes, {"max_features": 0.4, "max_iter": 30}, {}),
    "few bins": (
        "classifier",
        two_classes,
        {"max_bins": 15, "max_depth": 4, "l2_regularization": 2.0, "max_iter": 30},
        {},
    ),
    "interactions": ("regressor", numbers, {"interaction_cst": "pairwise", "max_iter": 30}, {}),
    "no interactions": ("regressor", numbers, {"interaction_cst": "no_interactions", "max_iter": 30}, {}),
    "monotonic": ("regressor", numbers, {"monotonic_cst": [1, 0, -1, 0, 0, 1, 0, 0, 0, 0], "max_iter": 30}, {}),
    "numbers": ("regressor", numbers, {"max_iter": 30}, {}),
    "depth 6": ("regressor", numbers, {"max_leaf_nodes": None, "max_depth": 6, "max_iter": 30}, {}),
    "absolute error": ("regressor", numbers, {"loss": "absolute_error", "max_iter": 30}, {}),
    "quantile, weights": (
        "regressor",
        numbers,
        {"loss": "quantile", "quantile": 0.3, "max_iter": 30},
        {"sample_weight": WEIGHT[:3001]},
    ),
    "poisson": ("regressor", lambda: (numbers()[0], np.abs(numbers()[1])), {"loss": "poisson", "max_iter": 30}, {}),
    "gamma": ("regressor", lambda: (numbers()[0], np.abs(numbers()[1]) + 1), {"loss": "gamma", "max_iter": 30}, {}),
    "stops by loss": ("classifier", lambda: two_classes(12_007), {"learning_rate": 0.5}, {}),
    "stops by accuracy": (
        "classifier",
        lambda: two_classes(12_007),
        {"scoring": "accuracy", "n_iter_no_change": 5, "max_iter": 40},
        {},
    ),
    "stops by a function": (
        "classifier",
        three_classes,
        {"scoring": negative_log_loss, "early_stopping": True, "max_iter": 15},
        {},
    ),
    "stops by training": (
        "regressor",
        numbers,
        {"early_stopping": True, "validation_fraction": None, "tol": 0.5, "n_iter_no_change": 3},
        {"sample_weight": WEIGHT[:3001]},
    ),
    "stops by given rows": (
        "regressor",
        numbers,
        {"early_stopping": True, "max_iter": 40},
        {"X_val": numbers()[0][::7], "y_val": numbers()[1][::7]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_scikit_learns(case):
    kind, data, parameters, more = CASES[case]
    X, y = data()
    # On one thread: scikit-learn's loops wait long for each other where other programs use the cores.
    with threadpool_limits(1, user_api="openmp"):
        ours, theirs = (models[kind](random_state=0, **parameters).fit(X, y, **more) for models in (OURS, THEIRS))
    assert ours.n_iter_ == theirs.n_iter_
    assert ours.n_trees_per_iteration_ == theirs.n_trees_per_iteration_
    assert ours.do_early_stopping_ == theirs.do_early_stopping_
    # Sums are rounded otherwise, so that equal gains may be told apart otherwise: nearly all rows agree closely.
    difference = np.abs(ours._raw_predict(X) - theirs._raw_predict(X))
    spread = np.std(theirs._raw_predict(X))
    assert np.mean(difference > 1e-4 * spread) < 0.01
    assert abs(ours.score(X, y) - theirs.score(X, y)) < 0.005
    np.testing.assert_allclose(ours.train_score_, theirs.train_score_, rtol=5e-3)
    np.testing.assert_allclose(ours.validation_score_, theirs.validation_score_, rtol=5e-3)
    for name in vars(theirs):
        assert hasattr(ours, name), name
    # The plain estimator, of the same trees.
    plain = ours.to_sklearn()
    assert type(plain) is THEIRS[kind]
    np.testing.assert_allclose(plain._raw_predict(X), ours._raw_predict(X), rtol=1e-13, atol=1e-13)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(ours)).predict(X), ours.predict(X))
    for a, b in zip(ours.staged_predict(X[:50]), plain.staged_predict(X[:50]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("data", "kind"), [(load_breast_cancer, "classifier"), (load_iris, "classifier"), (load_diabetes, "regressor")]
)
def test_scores_on_unseen_rows(data, kind):
    X, y = data(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X, y, random_state=0)
    ours, theirs = (models[kind](random_state=0).fit(X, y).score(X_test, y_test) for models in (OURS, THEIRS))
    assert abs(ours - theirs) <= 0.005


def test_categories():
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    frame = pandas.DataFrame(
        {
            "x": rng.standard_normal(3001),
            "kind": pandas.Categorical(rng.choice(["a", "b", "c", None, "d"], 3001)),
            "z": with_missing(rng.standard_normal((3001, 1)))[:, 0],
            "place": pandas.Categorical(rng.integers(0, 60, 3001)),
        }
    )
    y = frame["x"] + (frame["kind"] == "b") * 3 + np.sin(frame["place"].astype(int)) + rng.standard_normal(3001) / 5
    for X, categorical in ((frame, "from_dtype"), (frame[["x", "z", "place"]], ["place"])):
        ours, theirs = (
            m(random_state=0, categorical_features=categorical).fit(X, y)
            for m in (OURS["regressor"], THEIRS["regressor"])
        )
        np.testing.assert_array_equal(ours.is_categorical_, theirs.is_categorical_)
        assert abs(ours.score(X, y) - theirs.score(X, y)) < 0.002
        plain = ours.to_sklearn()
        unknown = X.iloc[:100].copy()
        unknown["place"] = 1000  # a category that was never seen
        for rows in (X, unknown):
            np.testing.assert_allclose(plain.predict(rows), ours.predict(rows), rtol=1e-12)
    with pytest.raises(ValueError, match="Categorical features cannot have monotonic constraints"):
        OURS["regressor"](monotonic_cst=[0, 1, 0, 0]).fit(frame, y)
    with pytest.raises(ValueError, match="is expected to have a cardinality <= 20"):
        OURS["regressor"](max_bins=20).fit(frame, y)


def test_monotonic_predictions_are():
    X, _ = numbers()
    y = 3 * X[:, 0] - 2 * X[:, 1] - X[:, 2] + np.random.default_rng(0).standard_normal(len(X))
    model = HistGradientBoostingRegressor(monotonic_cst=[1] + [-1] * 2 + [0] * 7, max_iter=50).fit(X, y)
    for feature, sign in ((0, 1), (1, -1), (2, -1)):
        rows = np.repeat(X[:40], 50, axis=0)
        rows[:, feature] = np.tile(np.linspace(-3, 3, 50), 40)
        steps = np.diff(model.predict(rows).reshape(40, 50), axis=1) * sign
        assert (steps >= 0).all() and (steps > 0).any()


def test_warm_start():
    X, y = two_classes()
    parameters = dict(random_state=0, max_features=0.5, early_stopping=True, n_iter_no_change=1000)
    at_once = HistGradientBoostingClassifier(max_iter=12, **parameters).fit(X, y)
    in_steps = HistGradientBoostingClassifier(max_iter=5, warm_start=True, **parameters).fit(X, y)
    in_steps.set_params(max_iter=12).fit(X, y)
    np.testing.assert_array_equal(at_once._raw_predict(X), in_steps._raw_predict(X))
    np.testing.assert_array_equal(at_once.validation_score_, in_steps.validation_score_)
    with pytest.raises(ValueError, match="max_iter=3 must be larger than or equal to n_iter_=12 when warm_start==True"):
        in_steps.set_params(max_iter=3).fit(X, y)


def test_threads_and_repetition_change_nothing():
    X, y = two_classes(20_011)
    results = set()
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        model = HistGradientBoostingClassifier(random_state=0, max_iter=10).fit(X, y)
        results.add(b"".join(tree.nodes.tobytes() for trees in model._predictors for tree in trees))
    assert len(results) == 1


def structure(model):
    names = ["feature_idx", "bin_threshold", "left", "right", "is_leaf", "count", "missing_go_to_left"]
    return [tree.nodes[names].tolist() for trees in model._predictors for tree in trees]


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_targets_of_other_scales(rate):
    """One target dwarfs the others: its gradients are 1e10 times as large."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((2000, 5))
    y = X[:, 0] + np.sin(3 * X[:, 1]) + rng.standard_normal(2000) / 10
    y[7] = 1e10
    parameters = dict(learning_rate=rate, max_iter=10, early_stopping=False)
    ours, theirs = (model(**parameters).fit(X, y) for model in (OURS["regressor"], THEIRS["regressor"]))
    assert structure(ours) == structure(theirs)
    np.testing.assert_allclose(ours.predict(X), theirs.predict(X), rtol=1e-12)


def test_weights_of_other_scales():
    X, y = two_classes()
    weight = np.where(X[:, 2] > 0, 1e6, 1.0)
    parameters = dict(learning_rate=0.5, max_iter=5, max_depth=5, early_stopping=False)
    for kind in ("classifier", "regressor"):
        ours, theirs = (models[kind](**parameters).fit(X, y, sample_weight=weight) for models in (OURS, THEIRS))
        assert structure(ours) == structure(theirs)
        np.testing.assert_allclose(ours._raw_predict(X), theirs._raw_predict(X), rtol=1e-8)


@pytest.mark.filterwarnings("ignore:invalid value")  # of the mean of such numbers
def test_targets_beyond_float32():
    """Gradients that are infinite in float32 give stumps."""
    X, y = numbers(101)
    for far in (np.where(y > 0, 1e300, -1e300), np.where(np.arange(101) == 3, 1e39, y)):
        ours, theirs = (
            model(max_iter=2, early_stopping=False).fit(X, far) for model in (OURS["regressor"], THEIRS["regressor"])
        )
        assert structure(ours) == structure(theirs) and len(ours._predictors[0][0].nodes) == 1
        np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))


def test_layouts_and_types():
    X, y = numbers(1009)
    X = X.astype(np.float32).astype(np.float64)
    expected = HistGradientBoostingRegressor(max_iter=10).fit(X, y).predict(X)
    strided = np.zeros((2018, 20))
    strided[::2, 1::2] = X
    for same in (X.astype(np.float32), np.asfortranarray(X), strided[::2, 1::2], X.tolist(), X.astype(">f8")):
        model = HistGradientBoostingRegressor(max_iter=10).fit(same, y)
        np.testing.assert_array_equal(model.predict(same), expected)


def test_tensors_in_tensors_out():
    X, y = two_classes(601)
    model = HistGradientBoostingClassifier(max_iter=5).fit(torch.from_numpy(X), torch.from_numpy(y))
    given = torch.from_numpy(X)
    for method in ("predict", "predict_proba", "decision_function"):
        result = getattr(model, method)(given)
        assert isinstance(result, torch.Tensor)
        np.testing.assert_array_equal(result.numpy(), getattr(model, method)(X))
    assert model.score(given, torch.from_numpy(y)) == model.score(X, y)


def test_in_scikit_learns_company(capsys):
    X, y = two_classes(601)
    model = HistGradientBoostingClassifier(max_iter=5, random_state=0)
    assert clone(model).get_params() == model.get_params()
    search = GridSearchCV(
        make_pipeline(StandardScaler(), model), {"histgradientboostingclassifier__max_depth": [2, 3]}, cv=2
    )
    assert search.fit(X, y).best_score_ > 0.7
    model.fit(X, y)
    dependence = partial_dependence(model, X, [0], method="recursion")["average"]
    np.testing.assert_allclose(
        dependence, partial_dependence(model.to_sklearn(), X, [0], method="recursion")["average"]
    )


def test_what_fit_prints(capsys):
    X, y = two_classes(601)
    HistGradientBoostingClassifier(max_iter=5, verbose=1).fit(X, y)
    out, err = capsys.readouterr()
    assert out == "" and "HistGradientBoostingClassifier: 100%" in err and "5/5" in err
    HistGradientBoostingClassifier(max_iter=2, verbose=2).fit(X, y)
    out, err = capsys.readouterr()
    assert err == "" and "[2/2] 1 tree, " in out and "Fit 2 trees in" in out
    HistGradientBoostingClassifier(max_iter=2).fit(X, y)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["max_depth", "max_leaf_nodes"])
def test_limits_beyond_any_tree(name):
    X, y = numbers(101)
    models = [
        cls(max_iter=3, **{name: 2**40}).fit(X, y) for cls in (HistGradientBoostingRegressor, THEIRS["regressor"])
    ]
    np.testing.assert_allclose(*(model.predict(X) for model in models), rtol=1e-5)


def test_bad_input():
    X, y = numbers(101)
    new = HistGradientBoostingRegressor
    for call, error in (
        (lambda m: m(max_bins=300).fit(X, y), ValueError),
        (lambda m: m(learning_rate=-1).fit(X, y), ValueError),
        (lambda m: m(loss="poisson").fit(X, -np.abs(y)), ValueError),
        (lambda m: m(interaction_cst=[[0, 99]]).fit(X, y), ValueError),
        (lambda m: m(monotonic_cst=[1]).fit(X, y), ValueError),
        (lambda m: m().fit(X, y[1:]), ValueError),
        (lambda m: m().fit(X[:0], y[:0]), ValueError),
        (lambda m: m().fit(X, np.full(101, np.nan)), ValueError),
        (lambda m: m().fit(X, y, sample_weight=y[1:]), ValueError),
        (lambda m: m().fit(X, y, X_val=X), ValueError),
        (lambda m: m(early_stopping=False).fit(X, y, X_val=X, y_val=y), ValueError),
        (lambda m: m().fit(X, y).predict(X[:, 1:]), ValueError),
        (lambda m: m().predict(X), sklearn.exceptions.NotFittedError),
        (lambda m: m().fit([["a", "b"]] * 101, y), ValueError),
    ):
        messages = []
        for model in (new, THEIRS["regressor"]):
            with pytest.raises(error) as caught:
                call(model)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    with pytest.raises(ValueError, match="monotonic constraints are not supported for multiclass"):
        HistGradientBoostingClassifier(monotonic_cst=[1] * 20).fit(*three_classes())
