"""The benchmark engine behind `python -m fastnn bench`.

    results = fastnn.bench.run("matmul", shapes=[(1024, 1024, 1024)], dtypes=[torch.bfloat16])

A new family of ops adds one file here that registers its benchmarks, and its name to the imports below.
"""

from . import (
    activations,
    attention,
    conv,
    cross_entropy,
    dropout,
    embedding,
    exact_trees,
    fake_quantize,
    gemm,
    histogram_trees,
    int8_linear,
    models,
    norm,
    peers,
    pool,
    quantize,
    quantized_models,
    softmax,
    transformers,
    tree_predict,
    weight_only,
)
from .benchmark import (
    Benchmark,
    Problem,
    Result,
    WrongResult,
    benchmark,
    benchmarks,
    parse_shape,
    register,
    run,
)
from .engine import Timing, compare, quartiles

__all__ = [
    "Benchmark",
    "Problem",
    "Result",
    "Timing",
    "WrongResult",
    "activations",
    "attention",
    "benchmark",
    "benchmarks",
    "compare",
    "conv",
    "cross_entropy",
    "dropout",
    "embedding",
    "exact_trees",
    "fake_quantize",
    "gemm",
    "histogram_trees",
    "int8_linear",
    "models",
    "norm",
    "parse_shape",
    "peers",
    "pool",
    "quantize",
    "quantized_models",
    "quartiles",
    "register",
    "run",
    "softmax",
    "transformers",
    "tree_predict",
    "weight_only",
]
