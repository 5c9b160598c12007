"""AdaBoost: scikit-learn's estimator, whose trees are fastnn's."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import sklearn.ensemble
from sklearn.ensemble._weight_boosting import BaseWeightBoosting
from sklearn.tree import BaseDecisionTree
from sklearn.utils.validation import check_is_fitted, has_fit_parameter

from ._decision_tree import DecisionTreeClassifier, ExactTree
from ._gradient_boosting import SortedOnce
from ._predict import Forest, TreesMixin, cached_forest, through_forest

__all__ = ["AdaBoostClassifier"]


class AdaBoostClassifier(TreesMixin, sklearn.ensemble.AdaBoostClassifier):
    __doc__ = sklearn.ensemble.AdaBoostClassifier.__doc__

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> AdaBoostClassifier:
        """As scikit-learn's; all trees share the sorted columns of X."""
        self._sorted_once = SortedOnce()
        try:
            return super().fit(X, y, sample_weight)
        finally:
            del self._sorted_once
            for estimator in getattr(self, "estimators_", ()):
                estimator.__dict__.pop("_shared", None)

    def _validate_estimator(self) -> None:
        BaseWeightBoosting._validate_estimator(self, default=DecisionTreeClassifier(max_depth=1))
        if not has_fit_parameter(self.estimator_, "sample_weight"):
            raise ValueError(f"{self.estimator.__class__.__name__} doesn't support sample_weight.")

    def _make_estimator(self, append: bool = True, random_state: Any = None) -> Any:
        estimator = super()._make_estimator(append, random_state)
        if isinstance(estimator, ExactTree) and hasattr(self, "_sorted_once"):
            estimator._shared = self._sorted_once
        return estimator

    def _votes(self) -> Forest | None:
        """The trees with their votes as values: the weight for the class that a leaf stands for, and -weight / (classes - 1)
        for each other. None where an estimator is no tree that knows all classes and no others."""
        estimators = self.estimators_
        for estimator in estimators:
            if not isinstance(estimator, BaseDecisionTree) or not np.array_equal(estimator.classes_, self.classes_):
                return None

        def build() -> Forest:
            trees = []
            for estimator, weight in zip(estimators, self.estimator_weights_, strict=False):
                state = estimator.tree_.__getstate__()
                votes = np.full((len(state["nodes"]), self.n_classes_), -1 / (self.n_classes_ - 1) * weight)
                best = np.argmax(state["values"][:, 0, : self.n_classes_], axis=1)
                votes[np.arange(len(votes)), best] = weight
                trees.append((state["nodes"], votes))
            return Forest(trees, self.n_features_in_)

        key = [estimator.tree_ for estimator in estimators]
        return cached_forest(self, [*key, self.estimator_weights_], build)

    def decision_function(self, X: Any) -> np.ndarray:
        """As scikit-learn's."""
        check_is_fitted(self)
        if self.n_classes_ > 1 and not scipy.sparse.issparse(X):
            forest = self._votes()
            if forest is not None:
                norm = self.estimator_weights_.sum()
                votes = through_forest(
                    self, forest, X, lambda X, **allow: forest.predict(X, divisor=norm, **allow), self._validated
                )
                if self.n_classes_ > 2:
                    return votes
                votes[:, 0] *= -1
                return votes.sum(axis=1)
        return super().decision_function(X)

    def _validated(self, X: Any) -> np.ndarray:
        return self.estimators_[0]._validate_X_predict(self._check_X(X), True)
