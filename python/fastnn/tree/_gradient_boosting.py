"""Gradient boosting: scikit-learn's estimators, whose trees are fastnn's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.sparse
import sklearn.ensemble
from sklearn._loss.loss import ExponentialLoss, HalfBinomialLoss, HalfMultinomialLoss, HalfSquaredError, HuberLoss
from sklearn.ensemble._gb import set_huber_delta
from sklearn.utils.validation import check_is_fitted

from .. import _state
from ._decision_tree import DecisionTreeRegressor
from ._predict import Forest, SklearnMixin, cached_forest
from ._progress import progress_bar

__all__ = ["GradientBoostingClassifier", "GradientBoostingRegressor", "SortedOnce"]


class SortedOnce:
    """What the trees of one ensemble share while it is fitted, one after the other: their parameters, and the sorted columns
    of X, whose numbers do not change."""

    encodes = False

    def __init__(self) -> None:
        self.settings: Any = None
        self._sorted: Any = None

    def columns(self, X: np.ndarray, make: Any, threads: int) -> Any:
        if self._sorted is None:
            self._sorted = (make(X, threads=threads), X)
        return self._sorted[0]


def _quotient(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator; 0 where the denominator is as good as 0, since the loss cannot be lowered there."""
    tiny = np.abs(denominator) < 1e-150
    return np.where(tiny, 0.0, numerator / np.where(tiny, 1.0, denominator))


def _newton_steps(
    loss: Any, y: np.ndarray, gradient: np.ndarray, weight: np.ndarray, leaf: np.ndarray, nodes: int
) -> np.ndarray:
    """Of each leaf: sum w g / sum w h, where g is the negative gradient and h the hessian at the leaf's rows (Friedman,
    Hastie, Tibshirani 2000). Sums are in the order of the rows."""
    if isinstance(loss, ExponentialLoss):
        hessian = np.where(y == 0, -gradient, gradient)
    else:
        probability = y - gradient
        hessian = probability * (1 - probability)
    total = np.bincount(leaf, weight, nodes)
    total[total == 0] = 1  # no leaf
    numerator = np.bincount(leaf, weight * gradient, nodes) / total
    if isinstance(loss, HalfMultinomialLoss):
        numerator *= (loss.n_classes - 1) / loss.n_classes
    return _quotient(numerator, np.bincount(leaf, weight * hessian, nodes) / total)


def _line_searches(
    loss: Any, residual: np.ndarray, weight: np.ndarray, leaf: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """Of each leaf the constant that minimizes the loss of its rows."""
    order = np.argsort(leaf, kind="stable")
    numbers, begins = np.unique(leaf[order], return_index=True)
    values = values.copy()
    for number, rows in zip(numbers, np.split(order, begins[1:]), strict=True):
        values[number] = loss.fit_intercept_only(y_true=residual[rows], sample_weight=weight[rows])
    return values


class _GradientBoosting(SklearnMixin):
    """What fitting and prediction have of their own."""

    def _fit_stages(
        self,
        X: Any,
        y: Any,
        raw_predictions: Any,
        sample_weight: Any,
        random_state: Any,
        X_val: Any,
        y_val: Any,
        sample_weight_val: Any,
        begin_at_stage: int = 0,
        monitor: Any = None,
    ) -> int:
        arguments = (
            X,
            y,
            raw_predictions,
            sample_weight,
            random_state,
            X_val,
            y_val,
            sample_weight_val,
            begin_at_stage,
        )
        self._sorted_once = SortedOnce()
        try:
            if self.verbose != 1:
                return super()._fit_stages(*arguments, monitor)
            with progress_bar(type(self).__name__, total=self.n_estimators, begin=begin_at_stage) as bar:

                def shown(i: int, model: Any, variables: dict[str, Any]) -> Any:
                    bar.set_postfix(loss=f"{self.train_score_[i]:.4g}", refresh=False)
                    bar.update(1)
                    return monitor is not None and monitor(i, model, variables)

                # The bar is instead of the lines that scikit-learn prints.
                self.verbose = 0
                try:
                    return super()._fit_stages(*arguments, shown)
                finally:
                    self.verbose = 1
        finally:
            del self._sorted_once

    def _fit_stage(
        self,
        i: int,
        X: Any,
        y: np.ndarray,
        raw_predictions: np.ndarray,
        sample_weight: np.ndarray,
        sample_mask: np.ndarray,
        random_state: Any,
        X_csc: Any = None,
        X_csr: Any = None,
    ) -> np.ndarray:
        """One tree an output on the negative gradients."""
        if X_csc is not None:
            _state.count_fallback(f"tree.{type(self).__name__}", "a sparse X")
            return super()._fit_stage(
                i, X, y, raw_predictions, sample_weight, sample_mask, random_state, X_csc=X_csc, X_csr=X_csr
            )
        loss = self._loss
        if isinstance(loss, HuberLoss):
            set_huber_delta(loss=loss, y_true=y, raw_prediction=raw_predictions, sample_weight=sample_weight)
        gradients = -loss.gradient(y_true=y, raw_prediction=raw_predictions, sample_weight=None)
        gradients = gradients.reshape(len(X), -1)
        inside = slice(None)
        if self.subsample < 1.0:
            sample_weight = sample_weight * sample_mask
            inside = sample_mask
        for k in range(self.n_trees_per_iteration_):
            target = (y == k).astype(np.float64) if loss.is_multiclass else y
            gradient = np.ascontiguousarray(gradients[:, k])
            tree = self._tree(X, gradient, sample_weight, random_state)
            leaf = Forest([tree.tree_]).apply(X)[:, 0]
            values = tree.tree_.value[:, 0, 0]
            if isinstance(loss, (HalfBinomialLoss, HalfMultinomialLoss, ExponentialLoss)):
                at, weight = leaf[inside], sample_weight[inside]
                steps = _newton_steps(loss, target[inside], gradient[inside], weight, at, len(values))
                is_leaf = tree.tree_.children_left < 0
                values[is_leaf] = steps[is_leaf]
            elif not isinstance(loss, HalfSquaredError):
                residual = (target - raw_predictions[:, k])[inside]
                values[...] = _line_searches(loss, residual, sample_weight[inside], leaf[inside], values)
            raw_predictions[:, k] += self.learning_rate * values.take(leaf)
            self.estimators_[i, k] = tree
        return raw_predictions

    def _tree(self, X: np.ndarray, target: np.ndarray, weight: np.ndarray, random_state: Any) -> DecisionTreeRegressor:
        tree = DecisionTreeRegressor(
            criterion="squared_error",
            splitter="best",
            max_depth=self.max_depth,
            min_samples_split=self.min_samples_split,
            min_samples_leaf=self.min_samples_leaf,
            min_weight_fraction_leaf=self.min_weight_fraction_leaf,
            min_impurity_decrease=self.min_impurity_decrease,
            max_features=self.max_features,
            max_leaf_nodes=self.max_leaf_nodes,
            random_state=random_state,
            ccp_alpha=self.ccp_alpha,
        )
        tree._shared = self._sorted_once
        try:
            tree.fit(X, target, sample_weight=None if (weight == 1).all() else weight, check_input=False)
        finally:
            del tree._shared
        return tree

    def _forest_of(self, stages: np.ndarray) -> Forest:
        trees = [tree.tree_ for tree in stages.ravel()]
        width = stages.shape[1]
        columns = np.tile(np.arange(width), len(stages))
        return Forest(trees, columns=columns, width=width, scale=self.learning_rate)

    def _whole_forest(self) -> Forest:
        check_is_fitted(self)
        key = [tree.tree_ for tree in self.estimators_.ravel()]
        # The learning rate is in the values.
        return cached_forest(self, [*key, self.learning_rate], lambda: self._forest_of(self.estimators_))

    def _raw_predict(self, X: Any) -> np.ndarray:
        if scipy.sparse.issparse(X):
            return super()._raw_predict(X)
        check_is_fitted(self)
        raw = np.ascontiguousarray(self._raw_predict_init(X))
        return self._whole_forest().predict(X, out=raw)

    def _staged_raw_predict(self, X: Any, check_input: bool = True) -> Iterator[np.ndarray]:
        if scipy.sparse.issparse(X):
            yield from super()._staged_raw_predict(X, check_input)
            return
        if check_input:
            X = self._validated(X)
        raw = np.ascontiguousarray(self._raw_predict_init(X))
        stages, trees = self.estimators_.shape
        # In a fit that may stop early the stages are asked for while they are made.
        forest = None if None in self.estimators_ else self._whole_forest()
        for i in range(stages):
            if forest is None:
                self._forest_of(self.estimators_[i : i + 1]).predict(X, out=raw)
            else:
                forest.predict(X, out=raw, trees=(i * trees, (i + 1) * trees))
            yield raw.copy()

    def _validated(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return self.estimators_[0, 0]._validate_X_predict(X, check_input=True)

    def apply(self, X: Any) -> np.ndarray:
        """As scikit-learn's: the numbers of the leaves, (rows, stages, trees of a stage), in float64."""
        check_is_fitted(self)
        if scipy.sparse.issparse(X):
            return super().apply(X)
        X = self._validated(X)
        return self._whole_forest().apply(X).reshape(len(X), *self.estimators_.shape).astype(np.float64)

    def plot(self, stage: int = 0, output: int = 0, **options: Any) -> Any:
        """Draws one of the trees with matplotlib: `sklearn.tree.plot_tree`, with its options."""
        check_is_fitted(self)
        return self.estimators_[stage, output].plot(**options)

    def export_text(self, stage: int = 0, output: int = 0, **options: Any) -> str:
        """The rules of one of the trees as text: `sklearn.tree.export_text`, with its options."""
        check_is_fitted(self)
        return self.estimators_[stage, output].export_text(**options)


class GradientBoostingClassifier(_GradientBoosting, sklearn.ensemble.GradientBoostingClassifier):
    __doc__ = sklearn.ensemble.GradientBoostingClassifier.__doc__


class GradientBoostingRegressor(_GradientBoosting, sklearn.ensemble.GradientBoostingRegressor):
    __doc__ = sklearn.ensemble.GradientBoostingRegressor.__doc__

    def apply(self, X: Any) -> np.ndarray:
        """As scikit-learn's: the numbers of the leaves, (rows, stages), in float64."""
        leaves = _GradientBoosting.apply(self, X)
        return leaves.reshape(len(leaves), -1)
