"""Gradients and hessians of scikit-learn's losses; those of the commonest two by kernels of `src/cpp/tree`.

scikit-learn's loops run on the threads of its own OpenMP runtime. Where they and ours take turns, each waits for cores on
which the other's threads are still looking for work.
"""

from __future__ import annotations

import numpy as np
from sklearn._loss.loss import BaseLoss, HalfBinomialLoss, HalfSquaredError

from fastnn import _cpu

_KERNELS = {HalfSquaredError: "squared_error", HalfBinomialLoss: "half_binomial"}


def gradients(
    loss: BaseLoss,
    y: np.ndarray,
    raw: np.ndarray,
    weight: np.ndarray | None,
    gradient: np.ndarray,
    hessian: np.ndarray | None,
    threads: int,
) -> None:
    """Fills ``gradient``, and ``hessian`` unless it is None, float32 in the shape of ``raw`` or without its second axis."""
    kernel = _KERNELS.get(type(loss))
    inputs = [y, raw] if weight is None else [y, raw, weight]
    outputs = [gradient] if hessian is None else [gradient, hessian]
    if (
        kernel
        and all(array.dtype == np.float64 and array.size == len(y) and array.flags.forc for array in inputs)
        and all(array.dtype == np.float32 and array.size == len(y) and array.flags.forc for array in outputs)
    ):
        _cpu.loss_gradients(
            kernel,
            y.ctypes.data,
            raw.ctypes.data,
            0 if weight is None else weight.ctypes.data,
            gradient.ctypes.data,
            0 if hessian is None else hessian.ctypes.data,
            len(y),
        )
    elif hessian is None:
        loss.gradient(y_true=y, raw_prediction=raw, sample_weight=weight, gradient_out=gradient, n_threads=threads)
    else:
        loss.gradient_hessian(
            y_true=y,
            raw_prediction=raw,
            sample_weight=weight,
            gradient_out=gradient,
            hessian_out=hessian,
            n_threads=threads,
        )
