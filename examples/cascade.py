"""A cascade of boosted trees on toy collisions: a signal among two kinds of background.

Each event has six numbers. The heavy background differs from the signal in transverse momenta and missing energy, the
light one in angles and in how well its tracks are isolated. One stage is trained against each, with its own features; the cut
of the first keeps 95% of the signal and purifies what the second is trained on.

    python examples/cascade.py [--events 20000] [--png cascade-roc.png]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from sklearn.metrics import roc_auc_score, roc_curve

from fastnn.tree import CascadeClassifier, HistGradientBoostingClassifier, Stage

NAMES = ("lepton pt", "jet pt", "missing energy", "delta phi", "delta eta", "isolation")


def collisions(events: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(events, 6) in GeV and radians, and the kinds: a tenth is signal, the rest heavy or light background."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(["heavy", "light", "signal"], events, p=[0.45, 0.45, 0.1])
    heavy, light = kind == "heavy", kind == "light"
    X = np.empty((events, 6), np.float32)
    X[:, 0] = rng.gamma(np.where(heavy, 3.0, 4.5), 10.0)
    X[:, 1] = rng.gamma(np.where(heavy, 5.5, 3.5), 15.0)
    X[:, 2] = rng.gamma(np.where(heavy, 2.0, 3.5), 15.0)
    X[:, 3] = np.abs(rng.vonmises(0.0, np.where(light, 0.5, 2.5)))
    X[:, 4] = np.abs(rng.normal(0.0, np.where(light, 2.2, 1.2)))
    X[:, 5] = rng.beta(np.where(light, 2.0, 5.0), 2.0)
    return X, kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--png", default="cascade-roc.png", help="where the ROC curve goes")
    options = parser.parse_args()

    X, kind = collisions(options.events, seed=0)
    X_test, kind_test = collisions(options.events, seed=1)
    trees = HistGradientBoostingClassifier(max_iter=60, max_depth=4)
    cascade = CascadeClassifier(
        [Stage("heavy", features=[0, 1, 2], efficiency=0.95), Stage("light", features=[3, 4, 5], efficiency=0.8)],
        estimator=trees,
        signal="signal",
        validation_fraction=0.3,
        random_state=0,
    )
    begin = time.perf_counter()
    cascade.fit(X, kind)
    print(f"trained on {len(X):,} events in {time.perf_counter() - begin:.2f} s\n")

    report = cascade.report(X_test, kind_test)
    print("stage                  signal efficiency  background efficiency  purity")
    start = np.mean(kind_test == "signal")
    print(f"{'before':22} {1:17.3f}  {1:21.3f}  {start:6.3f}")
    for stage, figures in zip(cascade.stages_, report, strict=True):
        name = f"against {stage.rejected}, p > {stage.cut:.2f}"
        print(f"{name:22} {figures.efficiency:17.3f}  {figures.background_efficiency:21.3f}  {figures.purity:6.3f}")
    print(f"\nthe cascade keeps {report[-1].total_efficiency:.3f} of the signal")

    signal = kind_test == "signal"
    p = cascade.stage_proba(X_test)
    scores = {"cascade": cascade.decision_function(X_test)}
    for stage, column in zip(cascade.stages_, p.T, strict=True):
        scores[f"the stage against {stage.rejected} alone"] = column

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 5))
    for name, score in scores.items():
        false, true, _ = roc_curve(signal, score)
        area = roc_auc_score(signal, score)
        print(f"area under the ROC curve, {name}: {area:.3f}")
        axes.plot(false, true, label=f"{name} ({area:.3f})")
    axes.set(xlabel="background efficiency", ylabel="signal efficiency", title="Signal against both backgrounds")
    axes.legend(loc="lower right")
    figure.savefig(options.png, format="png", dpi=120, bbox_inches="tight")

    best = max(roc_auc_score(signal, score) for name, score in scores.items() if name != "cascade")
    assert roc_auc_score(signal, scores["cascade"]) > best + 0.02
    assert report[1].purity > report[0].purity > start


if __name__ == "__main__":
    main()
