"""A cascade of boosted trees, as used in particle physics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import HasMethods, Interval
from sklearn.utils._tags import get_tags
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import (
    _check_sample_weight,
    check_is_fitted,
    column_or_1d,
    has_fit_parameter,
    validate_data,
)

from ._gradient_boosting import GradientBoostingClassifier
from ._tensors import TensorMixin

__all__ = ["CascadeClassifier", "FittedStage", "Stage", "StageReport"]


@dataclass
class Stage:
    """One stage of a :class:`CascadeClassifier`.

    Attributes:
        background: the label of the background that the stage is trained against, or a list of such; None for everything
            that is not signal.
        features: the columns it sees, by number or by name; None for all.
        efficiency: the share of the signal entering the stage that its cut keeps.
        cut: the cut itself, on the stage's probability of signal; not with `efficiency`. With neither it is 0.5.
        estimator: a classifier with `predict_proba`, instead of the cascade's own.
    """

    background: Any = None
    features: Sequence[Any] | None = None
    efficiency: float | None = None
    cut: float | None = None
    estimator: Any = None


@dataclass(frozen=True)
class StageReport:
    """What a stage did to the rows that entered it; S and B are sums of weights.

    Attributes:
        signal_in, background_in, signal_out, background_out: S and B before and after the cut, all backgrounds together.
        efficiency: S_out / S_in.
        background_efficiency: B_out / B_in; 1 minus it is the rejection.
        purity: S_out / (S_out + B_out).
        total_efficiency: the product of the efficiencies up to here.
    """

    signal_in: float
    background_in: float
    signal_out: float
    background_out: float
    efficiency: float
    background_efficiency: float
    purity: float
    total_efficiency: float


@dataclass
class FittedStage:
    """A stage after `fit`.

    Attributes:
        estimator: fitted; its class 1 is the signal. None where no background was left to train against: then every row passes.
        features: the numbers of the columns that it sees, or None for all.
        background: the labels that it was trained against.
        rejected: the label of what its cut rejects.
        cut: what the probability of signal must be greater than.
    """

    estimator: Any
    features: np.ndarray | None
    background: np.ndarray
    rejected: Any
    cut: float

    def probability(self, X: np.ndarray) -> np.ndarray:
        """The probability of signal, (rows,)."""
        if self.estimator is None or not len(X):
            return np.ones(len(X))
        proba = self.estimator.predict_proba(X if self.features is None else X[:, self.features])
        return np.asarray(proba)[:, 1]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def _cut_for(efficiency: float, p: np.ndarray, weight: np.ndarray) -> float:
    """The largest c for which the weight where p > c is at least that share of all of it."""
    order = np.argsort(-p, kind="stable")
    kept = np.cumsum(weight[order])
    # Of sums that are equal but for roundings the first.
    last = int(np.searchsorted(kept, efficiency * kept[-1] * (1 - 1e-12)))
    return float(np.nextafter(p[order[last]], -np.inf))


class CascadeClassifier(TensorMixin, ClassifierMixin, BaseEstimator):
    """A sequence of boosted trees, each trained against one kind of background with its own features; its cut purifies
    the sample that the next one is trained on.

    Stage s is trained on the signal and the background b_s among the rows that passed the cuts of all stages before it, and
    gives p_s(x), the probability of signal there. A row passes where p_s(x) > c_s. With a target efficiency e, c_s is the
    largest cut that keeps a share of at least e of the signal (by weight) that enters the stage.

    ================================ =====================================================
    efficiency of stage s            ε_s = S_out / S_in
    background efficiency            B_out / B_in, over all backgrounds
    purity after stage s             S_out / (S_out + B_out)
    efficiency of the cascade        Π ε_s
    ``predict``                      signal where every cut is passed; otherwise the background of the first stage whose
                                     cut is not (of a stage against several, the one most frequent in training)
    ``decision_function``            min_s (p_s − c_s): positive exactly where every cut is passed
    ``predict_proba``                P(signal) = Π_s p_s, P(b_s) = (1 − p_s) Π_{t<s} p_t, which sum up to 1
    ================================ =====================================================

    Parameters
    ----------
    stages : list of Stage or dict, default=None
        The stages in their order; a dict has the attributes of :class:`Stage`. None is one stage against everything, for
        two classes.
    estimator : classifier with ``predict_proba``, default=None
        What stages are made of that do not name their own. None is ``GradientBoostingClassifier()``.
    signal : label, default=None
        The signal's label in ``y``; None is the last of the sorted labels.
    validation_fraction : float, default=None
        Share of the rows that no stage is trained on, on which cuts and figures are computed. None computes them on the
        training rows: cuts are then tighter than they seem, since the trees know the rows.
    random_state : int, RandomState instance or None, default=None
        Of the split, and of those estimators that have a ``random_state`` which is None.

    Attributes
    ----------
    classes_ : ndarray
        The labels.
    signal_ : label
    stages_ : list of FittedStage
    cuts_, efficiency_, background_efficiency_, purity_ : ndarray of shape (n_stages,)
        As defined above, on the rows that cuts were chosen on.
    report_ : list of StageReport
        The same with the sums of weights.
    """

    _parameter_constraints: ClassVar[dict] = {
        "stages": [list, tuple, None],
        "estimator": [HasMethods(["fit", "predict_proba"]), None],
        "signal": "no_validation",
        "validation_fraction": [Interval(Real, 0.0, 1.0, closed="neither"), None],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        stages=None,
        *,
        estimator=None,
        signal=None,
        validation_fraction=None,
        random_state=None,
    ):
        self.stages = stages
        self.estimator = estimator
        self.signal = signal
        self.validation_fraction = validation_fraction
        self.random_state = random_state

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = self.stages is not None
        tags.input_tags.allow_nan = all(
            get_tags(estimator).input_tags.allow_nan
            for estimator in (stage.estimator or self._default() for stage in self._given_stages())
        )
        return tags

    def _default(self) -> Any:
        return GradientBoostingClassifier() if self.estimator is None else self.estimator

    def _given_stages(self) -> list[Stage]:
        stages = []
        known = {field.name for field in fields(Stage)}
        for i, stage in enumerate([Stage()] if self.stages is None else self.stages):
            if isinstance(stage, Mapping):
                if not set(stage) <= known:
                    raise ValueError(
                        f"stages[{i}]: unknown {sorted(set(stage) - known)}; expected some of {sorted(known)}"
                    )
                stage = Stage(**stage)
            if not isinstance(stage, Stage):
                raise TypeError(f"stages[{i}]: expected a Stage or a dict, got {type(stage).__name__}")
            for name in ("cut", "efficiency"):
                value = getattr(stage, name)
                if value is not None and (not isinstance(value, Real) or np.isnan(value)):
                    raise ValueError(f"stages[{i}]: expected a number as {name}, got {value!r}")
            if stage.cut is not None and stage.efficiency is not None:
                raise ValueError(f"stages[{i}]: expected a cut or an efficiency, not both")
            if stage.efficiency is not None and not 0 < stage.efficiency <= 1:
                raise ValueError(f"stages[{i}]: expected an efficiency in (0, 1], got {stage.efficiency!r}")
            stages.append(stage)
        if not stages:
            raise ValueError("stages: expected at least one")
        return stages

    def fit(self, X, y, sample_weight=None):
        """Trains the stages one after the other.

        X is (rows, features), y (rows,) with the labels of the signal and of every background, and sample_weight (rows,),
        not negative. Raises ValueError for labels, features or stages that cannot be.
        """
        self._validate_params()
        stages = self._given_stages()
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32], ensure_all_finite=self._finite())
        check_classification_targets(y)
        kind = type_of_target(y, input_name="y", raise_unknown=True)
        if self.stages is None and kind != "binary":
            raise ValueError(f"Only binary classification is supported. The type of the target is {kind}.")
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y has only one class, {self.classes_[0]!r}; a cascade needs signal and background")
        signal = self.classes_[-1] if self.signal is None else self.signal
        self.signal_ = self.classes_[self._codes_of(signal, "signal")[0]]

        rng = check_random_state(self.random_state)
        train = judged = (X, y == self.signal_, codes, weight)
        if self.validation_fraction is not None:
            parts = train_test_split(
                *train, test_size=self.validation_fraction, random_state=rng.randint(2**31 - 1), stratify=codes
            )
            train, judged = parts[0::2], parts[1::2]
        whole = judged
        self.stages_ = []
        for i, stage in enumerate(stages):
            fitted = self._fit_stage(i, stage, *train, rng, sample_weight is not None)
            p = fitted.probability(judged[0])
            if stage.efficiency is not None:
                is_signal = judged[1] & (judged[3] > 0)
                if not is_signal.any():
                    raise ValueError(f"stages[{i}]: no signal is left to choose its cut on")
                fitted.cut = _cut_for(stage.efficiency, p[is_signal], judged[3][is_signal])
            self.stages_.append(fitted)
            if self.validation_fraction is None:
                passed = p > fitted.cut
                train = judged = tuple(part[passed] for part in judged)
            else:
                inside = fitted.probability(train[0]) > fitted.cut
                train = tuple(part[inside] for part in train)
                passed = p > fitted.cut
                judged = tuple(part[passed] for part in judged)
        self.report_ = self._report(whole[0], whole[1], whole[3])
        self.cuts_ = np.array([stage.cut for stage in self.stages_])
        for name in ("efficiency", "background_efficiency", "purity"):
            setattr(self, f"{name}_", np.array([getattr(stage, name) for stage in self.report_]))
        return self

    def _finite(self) -> Any:
        return "allow-nan" if get_tags(self).input_tags.allow_nan else True

    def _codes_of(self, labels: Any, what: str) -> np.ndarray:
        """Places in classes_."""
        known = list(self.classes_)
        several = isinstance(labels, (list, tuple, set, frozenset, np.ndarray))
        missing = [label for label in (labels if several else [labels]) if label not in known]
        if missing:
            raise ValueError(f"{what}: {missing[0]!r} is no label in y; there are {known}")
        return np.array([known.index(label) for label in (labels if several else [labels])])

    def _columns(self, i: int, features: Sequence[Any] | None) -> np.ndarray | None:
        if features is None:
            return None
        if isinstance(features, str) or not np.iterable(features):
            raise ValueError(f"stages[{i}]: expected a list of features, got {features!r}")
        columns = []
        for feature in features:
            if isinstance(feature, bool):  # of a mask, and an Integral
                raise ValueError(f"stages[{i}]: expected numbers or names of features, got {feature}")
            if isinstance(feature, str):
                names = list(getattr(self, "feature_names_in_", ()))
                if feature not in names:
                    raise ValueError(f"stages[{i}]: X has no feature named {feature!r}")
                columns.append(names.index(feature))
            elif isinstance(feature, Integral) and -self.n_features_in_ <= feature < self.n_features_in_:
                columns.append(int(feature) % self.n_features_in_)
            else:
                raise ValueError(f"stages[{i}]: no feature {feature!r}; X has {self.n_features_in_} features")
        if not columns:
            raise ValueError(f"stages[{i}]: expected at least one feature")
        return np.array(columns)

    def _fit_stage(
        self,
        i: int,
        stage: Stage,
        X: np.ndarray,
        is_signal: np.ndarray,
        codes: np.ndarray,
        weight: np.ndarray,
        rng: np.random.RandomState,
        weighted: bool,
    ) -> FittedStage:
        features = self._columns(i, stage.features)
        if stage.background is None:
            background = np.flatnonzero(self.classes_ != self.signal_)
        else:
            background = self._codes_of(stage.background, f"stages[{i}].background")
        if (self.classes_[background] == self.signal_).any():
            raise ValueError(f"stages[{i}]: its background is the signal, {self.signal_!r}")
        mine = np.isin(codes, background)
        amounts = [weight[codes == code].sum() for code in background]
        rejected = self.classes_[background[int(np.argmax(amounts))]]
        cut = 0.5 if stage.cut is None else float(stage.cut)
        fitted = FittedStage(None, features, self.classes_[background], rejected, cut)
        if not is_signal.any():
            raise ValueError(f"stages[{i}]: no signal is left to train it with")
        if not mine.any():
            return fitted
        estimator = clone(self._default() if stage.estimator is None else stage.estimator)
        unset = [name for name, value in estimator.get_params().items() if _is_seed(name) and value is None]
        estimator.set_params(**{name: rng.randint(2**31 - 1) for name in sorted(unset)})
        rows = is_signal | mine
        given = {"sample_weight": weight[rows]} if weighted else {}
        if given and not has_fit_parameter(estimator, "sample_weight"):
            raise ValueError(f"{type(estimator).__name__} doesn't support sample_weight.")
        seen = X[rows] if features is None else X[np.ix_(rows, features)]
        fitted.estimator = estimator.fit(seen, is_signal[rows].astype(np.int64), **given)
        return fitted

    def _checked(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return validate_data(self, X, dtype=[np.float64, np.float32], reset=False, ensure_all_finite=self._finite())

    def _stage_proba(self, X: np.ndarray) -> np.ndarray:
        return np.stack([stage.probability(X) for stage in self.stages_], axis=1)

    def stage_proba(self, X):
        """The probability of signal in each stage, (rows, stages), of every row, whether it passes the stages before or not."""
        return self._stage_proba(self._checked(X))

    def decision_function(self, X):
        """min over the stages of p_s − c_s, (rows,): positive where every cut is passed."""
        return (self._stage_proba(self._checked(X)) - self._cuts()).min(axis=1)

    def predict(self, X):
        """The signal's label where every cut is passed; elsewhere that of the first stage whose cut is not."""
        passed = self._stage_proba(self._checked(X)) > self._cuts()
        rejected = np.array([self._codes_of(stage.rejected, "rejected")[0] for stage in self.stages_])
        codes = rejected[np.argmin(passed, axis=1)]
        codes[passed.all(axis=1)] = self._codes_of(self.signal_, "signal")[0]
        return self.classes_[codes]

    def predict_proba(self, X):
        """P(signal) = Π_s p_s, and of each background the sum of (1 − p_s) Π_{t<s} p_t over the stages that reject it: (rows,
        classes)."""
        p = self._stage_proba(self._checked(X))
        reached = np.cumprod(np.concatenate([np.ones((len(p), 1)), p], axis=1), axis=1)
        proba = np.zeros((len(p), len(self.classes_)))
        for s, stage in enumerate(self.stages_):
            proba[:, self._codes_of(stage.rejected, "rejected")[0]] += reached[:, s] * (1 - p[:, s])
        proba[:, self._codes_of(self.signal_, "signal")[0]] = reached[:, -1]
        return proba

    def _cuts(self) -> np.ndarray:
        return np.array([stage.cut for stage in self.stages_])

    def report(self, X, y, sample_weight=None):
        """What each stage does to these rows: a list of :class:`StageReport`."""
        X = self._checked(X)
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        return self._report(X, column_or_1d(y) == self.signal_, weight)

    def _report(self, X: np.ndarray, is_signal: np.ndarray, weight: np.ndarray) -> list[StageReport]:
        reports = []
        total = 1.0
        for stage in self.stages_:
            before = weight[is_signal].sum(), weight[~is_signal].sum()
            passed = stage.probability(X) > stage.cut
            X, is_signal, weight = X[passed], is_signal[passed], weight[passed]
            after = weight[is_signal].sum(), weight[~is_signal].sum()
            efficiency = _share(after[0], before[0])
            total *= efficiency
            purity = _share(after[0], after[0] + after[1])
            figures = (*before, *after, efficiency, _share(after[1], before[1]), purity, total)
            reports.append(StageReport(*map(float, figures)))
        return reports


def _is_seed(name: str) -> bool:
    return name == "random_state" or name.endswith("__random_state")
