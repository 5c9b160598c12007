"""The numerical-equivalence suite, for fastnn's ops and for anyone's.

    report = fastnn.testing.verify(my_matmul, "matmul")     # or a Case of your own
    report.raise_if_failed()

    print(fastnn.testing.verify_model(model, converted, inputs))

`python -m fastnn verify [op]` runs it on fastnn's own functions. A new family of ops adds one file here that registers its
cases, and its name to the imports below.
"""

from . import (
    activations,
    attention,
    conv,
    cross_entropy,
    dropout,
    embedding,
    gemm,
    integers,
    norm,
    pool,
    quantize,
    softmax,
)
from .case import FLOATS, Case, Sample, case, cases, register
from .errors import gamma, relative_error, roundoff
from .inputs import LAYOUTS, VALUES, Maker, poisoned, surroundings_intact
from .model import ModelReport, verify_model
from .verify import Finding, Report, Row, verify, verify_all

__all__ = [
    "FLOATS",
    "LAYOUTS",
    "VALUES",
    "Case",
    "Finding",
    "Maker",
    "ModelReport",
    "Report",
    "Row",
    "Sample",
    "activations",
    "attention",
    "case",
    "cases",
    "conv",
    "cross_entropy",
    "dropout",
    "embedding",
    "gamma",
    "gemm",
    "integers",
    "norm",
    "poisoned",
    "pool",
    "quantize",
    "register",
    "relative_error",
    "roundoff",
    "softmax",
    "surroundings_intact",
    "verify",
    "verify_all",
    "verify_model",
]
