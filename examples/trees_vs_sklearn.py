"""Trees and forests on breast cancer and digits, fastnn beside scikit-learn: accuracy on rows unseen, and time.

python examples/trees_vs_sklearn.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import sklearn.ensemble
import sklearn.tree
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split

import fastnn.tree

MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "DecisionTreeClassifier": (sklearn.tree, {}),
    "RandomForestClassifier": (sklearn.ensemble, {"n_estimators": 100}),
    "GradientBoostingClassifier": (sklearn.ensemble, {"n_estimators": 10}),
}


def seconds(repeats: int, call: Callable[..., Any], *arguments: Any) -> float:
    """The median time of a call."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call(*arguments)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    print(f"{'':44} {'accuracy':^17} {'fit, ms':^17} {'predict, ms':^17}")
    print(f"{'':44}" + 3 * f" {'fastnn':>8} {'sklearn':>8}")
    for data, load in (("breast cancer", load_breast_cancer), ("digits", load_digits)):
        X, y = load(return_X_y=True)
        X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.3, stratify=y, random_state=0)
        for name, (module, parameters) in MODELS.items():
            classes = getattr(fastnn.tree, name), getattr(module, name)
            models = [cls(random_state=0, **parameters).fit(X_train, y_train) for cls in classes]
            accuracy = [model.score(X_test, y_test) for model in models]
            fit = [seconds(options.repeats, model.fit, X_train, y_train) for model in models]
            predict = [seconds(options.repeats, model.predict, X_test) for model in models]
            figures = f" {accuracy[0]:8.3f} {accuracy[1]:8.3f}"
            for pair in (fit, predict):
                figures += f" {1e3 * pair[0]:8.2f} {1e3 * pair[1]:8.2f}"
            print(f"{data + ', ' + name:44}{figures}")
            # The same algorithm: only exact ties may be broken in another way.
            assert abs(accuracy[0] - accuracy[1]) < 0.03

            # The same estimator takes and returns tensors, and becomes scikit-learn's.
            tensor = models[0].predict(torch.from_numpy(X_test))
            assert isinstance(tensor, torch.Tensor) and np.array_equal(tensor.numpy(), models[0].predict(X_test))
            assert np.array_equal(models[0].to_sklearn().predict(X_test), models[0].predict(X_test))


if __name__ == "__main__":
    main()
