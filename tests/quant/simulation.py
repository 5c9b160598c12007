"""The schemes of fastnn.quant in numpy, written from the formulas: codes in float32 arithmetic, where rounding decides, all
else in float64."""

from __future__ import annotations

import numpy as np
import torch

RANGES = {"int8": (-128, 127), "uint8": (0, 255), "int4": (-8, 7), "uint4": (0, 15)}
E4M3_MAX = 448.0


def e4m3(y):
    """float32 numbers rounded to float8 e4m3fn, halves to even, as float64: three binary places after the leading one, the
    smallest step 2^-9."""
    y = np.clip(y.astype(np.float64), -E4M3_MAX, E4M3_MAX)
    exponent = np.maximum(np.frexp(np.abs(y))[1] - 1, -6)
    step = np.exp2(exponent - 3.0)
    return np.round(y / step) * step


def scale_and_zero(runs, kind, symmetric):
    """Of rows that share a scale each: float32 scales and integer zero points."""
    runs = np.where(np.isfinite(runs), runs, 0).astype(np.float32)
    lo, hi = np.minimum(runs.min(-1), 0), np.maximum(runs.max(-1), 0)
    if kind == "float8_e4m3fn":
        scale = np.maximum(hi, -lo) / np.float32(E4M3_MAX)
        zero = np.zeros(scale.shape, np.int64)
    elif symmetric:
        scale = np.maximum(hi, -lo) / np.float32(RANGES[kind][1])
        zero = np.zeros(scale.shape, np.int64)
    else:
        steps = np.float32(RANGES[kind][1] - RANGES[kind][0])
        scale = hi / steps - lo / steps
    scale = np.maximum(np.where(scale == 0, np.float32(1), scale), np.float32(2.0**-126))
    if kind in RANGES and not symmetric:
        zero = np.clip(RANGES[kind][0] - np.round(lo / scale).astype(np.int64), *RANGES[kind])
    return scale, zero


def rounded(runs, scale, zero, kind):
    """What is left of the numbers, in float64."""
    inverse = (np.float32(1) / scale)[..., None]
    y = runs.astype(np.float32) * inverse
    if kind == "float8_e4m3fn":
        return e4m3(y) * scale[..., None].astype(np.float64)
    q = np.clip(np.round(y).astype(np.int64) + zero[..., None], *RANGES[kind])
    return (q - zero[..., None]) * scale[..., None].astype(np.float64)


def as_numpy(x):
    return x.detach().float().numpy()


def weight(w, kind="int8", group_size=None, symmetric=True):
    """The weight (N, K) that the integers stand for."""
    w = as_numpy(w)
    runs = w.reshape(*w.shape[:-1], -1, group_size or max(w.shape[-1], 1))
    if w.size == 0:
        return w.astype(np.float64)
    return rounded(runs, *scale_and_zero(runs, kind, symmetric), kind).reshape(w.shape)


def dynamic_input(x):
    """Each row as uint8 with its own scale and zero point."""
    x = as_numpy(x)
    return rounded(x, *scale_and_zero(x, "uint8", False), "uint8")


def static_input(x, lo, hi):
    scale, zero = scale_and_zero(np.array([[lo, hi]]), "uint8", False)
    x = as_numpy(x)
    return rounded(x.reshape(1, -1), scale, zero, "uint8").reshape(x.shape)


def linear(x, w, bias=None):
    """Float64; with the magnitude Σ |x| |w| + |bias|, of which rounding errors are a share."""
    y, magnitude = x @ w.T, np.abs(x) @ np.abs(w).T
    if bias is not None:
        y, magnitude = y + as_numpy(bias), magnitude + np.abs(as_numpy(bias))
    return torch.from_numpy(y), torch.from_numpy(magnitude)
