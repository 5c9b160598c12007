"""CascadeClassifier: each stage against its own background, cuts that keep what they promise, and scikit-learn's rules."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.ensemble import GradientBoostingClassifier as PlainBoosting
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier as PlainTree

from fastnn.tree import CascadeClassifier, Stage


def events(n=900, seed=0):
    """Signal, and two backgrounds, each of which two of the five features tell from it; the last feature is noise."""
    rng = np.random.default_rng(seed)
    y = rng.choice(np.array(["signal", "top", "wjets"]), n, p=[0.3, 0.4, 0.3])
    X = rng.standard_normal((n, 5))
    X[y == "top", :2] += 1.7
    X[y == "wjets", 2:4] -= 1.7
    return X, y


STAGES = [
    {"background": "top", "features": [0, 1], "efficiency": 0.9},
    Stage("wjets", features=[2, 3], efficiency=0.8),
]


def cascade(**options):
    return CascadeClassifier(STAGES, estimator=PlainBoosting(n_estimators=20, max_depth=2), signal="signal", **options)


def test_stages_see_their_own_background_and_what_the_cuts_before_have_left():
    X, y = events()
    model = cascade(random_state=0).fit(X, y)
    first, second = model.stages_
    assert first.background.tolist() == ["top"] and second.background.tolist() == ["wjets"]
    assert first.features.tolist() == [0, 1] and second.features.tolist() == [2, 3]
    # By hand.
    seeds = np.random.RandomState(0)
    rows = y != "wjets"
    by_hand = PlainBoosting(n_estimators=20, max_depth=2, random_state=seeds.randint(2**31 - 1))
    by_hand.fit(X[rows][:, [0, 1]], (y[rows] == "signal").astype(int))
    p = by_hand.predict_proba(X[:, [0, 1]])[:, 1]
    assert np.array_equal(first.probability(X), p)
    passed = p > first.cut
    rows = passed & (y != "top")
    by_hand = PlainBoosting(n_estimators=20, max_depth=2, random_state=seeds.randint(2**31 - 1))
    by_hand.fit(X[rows][:, [2, 3]], (y[rows] == "signal").astype(int))
    assert np.array_equal(second.probability(X), by_hand.predict_proba(X[:, [2, 3]])[:, 1])


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("validation_fraction", (None, 0.4))
def test_cuts_keep_the_efficiency_and_no_more_than_they_need(weighted, validation_fraction):
    X, y = events()
    weight = np.random.default_rng(1).uniform(0.1, 2, len(y)) if weighted else None
    model = cascade(random_state=3, validation_fraction=validation_fraction).fit(X, y, sample_weight=weight)
    for efficiency, target in zip(model.efficiency_, (0.9, 0.8), strict=True):
        # One more signal event could not be cut away: an event weighs less than a hundredth.
        assert target <= efficiency * (1 + 1e-9) and efficiency < target + 0.05
    assert model.report_[1].total_efficiency == pytest.approx(model.efficiency_.prod())
    assert (np.diff([0.3, *model.purity_]) > 0).all()
    assert (model.background_efficiency_ < model.efficiency_).all()
    assert model.cuts_.tolist() == [stage.cut for stage in model.stages_]


def test_figures_are_those_of_their_formulas():
    X, y = events()
    model = cascade(random_state=0).fit(X, y)
    p, signal = model.stage_proba(X), y == "signal"
    inside = np.ones(len(X), bool)
    for s, report in enumerate(model.report_):
        after = inside & (p[:, s] > model.cuts_[s])
        assert (report.signal_in, report.background_in) == ((inside & signal).sum(), (inside & ~signal).sum())
        assert (report.signal_out, report.background_out) == ((after & signal).sum(), (after & ~signal).sum())
        assert report.efficiency == model.efficiency_[s] == (after & signal).sum() / (inside & signal).sum()
        assert report.background_efficiency == (after & ~signal).sum() / (inside & ~signal).sum()
        assert report.purity == (after & signal).sum() / after.sum()
        inside = after
    assert model.report(X, y) == model.report_
    doubled = model.report(X, y, sample_weight=np.full(len(y), 2.0))
    assert doubled[1].signal_out == 2 * model.report_[1].signal_out and doubled[1].purity == model.report_[1].purity


def test_predictions_follow_from_the_stages():
    X, y = events()
    model = cascade(random_state=0).fit(X, y)
    p = model.stage_proba(X)
    passed = p > model.cuts_
    expected = np.where(passed.all(1), "signal", np.where(passed[:, 0], "wjets", "top"))
    assert np.array_equal(model.predict(X), expected)
    decision = model.decision_function(X)
    assert np.array_equal(decision > 0, passed.all(1))
    assert np.array_equal(decision, (p - model.cuts_).min(1))
    proba = model.predict_proba(X)
    assert model.classes_.tolist() == ["signal", "top", "wjets"] and proba.shape == (len(X), 3)
    assert np.allclose(proba.sum(1), 1) and np.array_equal(proba[:, 0], p[:, 0] * p[:, 1])
    assert np.allclose(proba[:, 1], 1 - p[:, 0]) and np.allclose(proba[:, 2], p[:, 0] * (1 - p[:, 1]))


def test_two_stages_are_better_than_one():
    X, y = events(3000)
    Z, z = events(3000, seed=1)
    both = cascade(random_state=0).fit(X, y)
    one = CascadeClassifier(STAGES[:1], estimator=PlainBoosting(n_estimators=20), signal="signal").fit(X, y)
    area = [roc_auc_score(z == "signal", model.decision_function(Z)) for model in (both, one)]
    assert area[0] > 0.85 and area[0] > area[1] + 0.03
    # On rows that no tree has seen, too.
    report = both.report(Z, z)
    assert report[1].purity > report[0].purity > np.mean(z == "signal") + 0.1


def test_several_backgrounds_in_a_stage_and_given_cuts():
    X, y = events()
    model = CascadeClassifier([{"cut": 0.7, "estimator": PlainTree(max_depth=3)}], signal="signal").fit(X, y)
    assert model.cuts_ == [0.7] and isinstance(model.stages_[0].estimator, PlainTree)
    assert model.stages_[0].background.tolist() == ["top", "wjets"] and model.stages_[0].rejected == "top"
    assert set(model.predict(X)) == {"signal", "top"}
    both = CascadeClassifier([Stage(["top", "wjets"], cut=0.7, estimator=PlainTree(max_depth=3))], signal="signal").fit(
        X, y
    )
    assert np.array_equal(both.predict(X), model.predict(X))


def test_a_background_that_is_gone_lets_all_pass():
    X, y = events()
    X[y == "top", 0] += 100
    stages = [Stage("top", cut=0.5), Stage("top", cut=0.5)]
    model = CascadeClassifier(stages, estimator=PlainTree(), signal="signal").fit(X, y)
    assert model.stages_[1].estimator is None
    assert model.efficiency_[1] == 1 and (model.stage_proba(X)[:, 1] == 1).all()


def test_two_classes_by_default():
    X, y = events()
    y = np.where(y == "signal", 1, -1)
    model = CascadeClassifier(random_state=0).fit(X, y)
    assert model.signal_ == 1 and model.cuts_.tolist() == [0.5]
    assert np.array_equal(model.predict(X), model.classes_[model.predict_proba(X).argmax(1)])
    assert np.array_equal(model.predict(X) == 1, model.decision_function(X) > 0)
    assert model.score(X, y) > 0.85
    turned = CascadeClassifier(signal=-1, random_state=0).fit(X, y)
    assert turned.signal_ == -1 and np.array_equal(turned.predict(X) == -1, turned.decision_function(X) > 0)


def test_clone_pickle_search_and_pipeline():
    X, y = events(400)
    model = cascade(random_state=0)
    copy = clone(model)
    assert copy.get_params()["estimator__n_estimators"] == 20 and copy.stages is not model.stages
    assert np.array_equal(copy.fit(X, y).predict(X), model.fit(X, y).predict(X))
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.decision_function(X), model.decision_function(X))
    search = GridSearchCV(cascade(random_state=0), {"estimator__max_depth": [1, 2]}, cv=2, n_jobs=2).fit(X, y)
    assert search.best_score_ > 0.6
    piped = make_pipeline(StandardScaler(), cascade(random_state=0)).fit(X, y)
    assert piped.score(X, y) > 0.7


def test_tensors():
    X, y = events()
    y = (y == "signal").astype(np.int64)
    model = CascadeClassifier([Stage(features=[0, 1], efficiency=0.9), Stage(efficiency=0.9)], random_state=0)
    model.fit(torch.from_numpy(X), torch.from_numpy(y))
    for name in ("predict", "predict_proba", "decision_function"):
        got = getattr(model, name)(torch.from_numpy(X))
        assert isinstance(got, torch.Tensor) and np.array_equal(got.numpy(), getattr(model, name)(X))


@pytest.mark.parametrize(
    ("stages", "error", "says"),
    (
        ([], ValueError, "at least one"),
        ([{"backgrounds": "top"}], ValueError, "unknown"),
        (["top"], TypeError, "Stage or a dict"),
        ([Stage("top", cut=0.5, efficiency=0.5)], ValueError, "not both"),
        ([Stage("top", efficiency=0.0)], ValueError, "efficiency"),
        ([Stage("bottom")], ValueError, "'bottom' is no label"),
        ([Stage("signal")], ValueError, "is the signal"),
        ([Stage("top", features=[5])], ValueError, "no feature 5"),
        ([Stage("top", features=["pt"])], ValueError, "no feature named 'pt'"),
        ([Stage("top", features=[])], ValueError, "at least one feature"),
        ([Stage("top", features=1)], ValueError, "a list of features, got 1"),
        ([Stage("top", features="pt")], ValueError, "a list of features, got 'pt'"),
        ([Stage("top", features=[True, False])], ValueError, "numbers or names of features, got True"),
        ([Stage("top", cut="tight")], ValueError, "a number as cut, got 'tight'"),
        ([Stage("top", cut=float("nan"))], ValueError, "a number as cut, got nan"),
        ([Stage("top", efficiency="high")], ValueError, "a number as efficiency, got 'high'"),
        ([Stage("top", cut=1.0), Stage("wjets")], ValueError, "no signal is left"),
        (None, ValueError, "Only binary"),
        ("top", ValueError, "'stages' parameter"),
    ),
)
def test_bad_stages(stages, error, says):
    X, y = events(200)
    with pytest.raises(error, match=says):
        CascadeClassifier(stages, estimator=PlainTree(max_depth=2), signal="signal").fit(X, y)


def test_weights_that_an_estimator_cannot_use():
    from sklearn.neighbors import KNeighborsClassifier

    X, y = events(200)
    model = CascadeClassifier(STAGES, estimator=KNeighborsClassifier(), signal="signal")
    with pytest.raises(ValueError, match="doesn't support sample_weight"):
        model.fit(X, y, sample_weight=np.ones(len(y)))
    with pytest.raises(ValueError, match=r"[Nn]egative"):
        cascade().fit(X, y, sample_weight=-np.ones(len(y)))
    assert model.fit(X, y).score(X, y) > 0.6
