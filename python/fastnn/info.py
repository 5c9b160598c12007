"""``fastnn.info()``: what runs here, and how."""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

from . import _openmp, _state
from .backends import cpu, cuda, triton
from .backends.cpu import attention

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PRODUCTS = (
    "linear",
    "linear_act",
    "bilinear",
    "matmul",
    "mm",
    "bmm",
    "mv",
    "addmm",
    "baddbmm",
    "linear_cross_entropy",
)
_CONVOLUTIONS = tuple(f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3))
_ACTIVATIONS = ("relu", "relu6", "gelu", "silu", "sigmoid", "tanh")
_EMBEDDINGS = ("embedding", "rotary_embedding")
_POOLS = tuple(f"{kind}_pool{dims}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for dims in (1, 2, 3))
_ATTENTION = ("scaled_dot_product_attention", "attention", "multi_head_attention_forward")
_SOFTMAX = ("softmax", "log_softmax", "softmin", "cross_entropy")
_INTEGER_CONVOLUTIONS = ("int8_conv1d", "int8_conv2d", "int8_conv3d")
_QUANTIZATION = ("quantize", "quantize_dynamic", "choose_scale", "dequantize")
_NORMS = ("batch_norm", "batch_norm_act", "layer_norm", "rms_norm", "group_norm", "instance_norm")
#: Family -> its ops, where a family has one kernel an instruction set, for every dtype.
_FAMILIES = {
    "elementwise": _ACTIVATIONS,
    "dropout": ("dropout",),
    "embedding": _EMBEDDINGS,
    "pool": _POOLS,
    "norm": _NORMS,
    "softmax": _SOFTMAX,
    "weight_only": ("weight_only_linear",),
    "fake_quantize": ("fake_quantize", "fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine"),
}


class Info(dict):
    """What :func:`info` found: a dict of plain values, ready for JSON, whose ``str`` is a page to read."""

    def __str__(self) -> str:
        isa = self["instruction_sets"]
        lines = [
            f"fastnn {self['version']}, torch {self['torch']}, Python {self['python']}, {self['machine']}",
            f"instruction sets: {isa['active']} active; {', '.join(isa['available'])} available",
            f"CPU: {', '.join(name for name, there in self['cpu_features'].items() if there)}",
            f"threads: {self['threads']} of {self['cores']} cores",
            f"OpenMP runtime: {', '.join(self['openmp']) or 'none loaded'}",
            f"backends: {', '.join(self['backends'])}; asked for: {self['backend'] or 'by the device of the tensors'}",
            f"float32 matmul precision: {self['float32_matmul_precision']}",
        ]
        if len(self["openmp"]) > 1:
            lines.append("  more than one OpenMP runtime: their threads wait for each other's cores")
        allocator = ", ".join(f"{name} {value:,}" for name, value in self["allocator"].items())
        lines += [f"allocator of large outputs: {allocator}", "", "what runs on a CPU tensor:"]
        dtypes = list(next(iter(self["ops"].values())))
        cells = [("op", *dtypes)]
        cells += [(op, *(paths[dtype] for dtype in dtypes)) for op, paths in self["ops"].items()]
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        for row in cells:
            line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append(f"  {line}".rstrip())
        lines += [
            "",
            f"what runs on a CUDA tensor, of which torch has {self['gpu']['devices']} devices here, in float32, bfloat16, float16:",
        ]
        for name in ("cuda", "triton"):
            kernels = self["gpu"][name]
            lines.append(f"  {name}: {kernels['why_not'] or ', '.join(kernels['ops'])}")
        lines += ["", "calls of each kernel path:" if self["kernel_calls"] else "no kernel was called yet"]
        lines += [f"  {count:>10,}  {path}" for path, count in self["kernel_calls"].items()]
        if self["fallbacks"]:
            lines += ["", "calls that went to torch:"]
            lines += [f"  {f['count']:>10,}  {f['op']}: {f['reason']}" for f in self["fallbacks"]]
        else:
            lines += ["", "no call went to torch"]
        return "\n".join(lines)


def info() -> Info:
    """Versions, instruction sets, threads, OpenMP runtime, backends, the kernel of each op and dtype, and what fell back.

    The result is a dict: ``version``, ``torch``, ``python``, ``machine``; ``instruction_sets`` (``active``,
    ``available``); ``cpu_features``; ``threads``, ``cores``; ``openmp`` (the runtimes mapped into this process: more than
    one is a mistake); ``backends`` and ``backend`` (the one asked for, or None); ``float32_matmul_precision``;
    ``allocator``; ``ops`` (op -> dtype -> backend and kernel path of a CPU tensor, under the present settings); ``gpu``
    (``devices``, and for ``cuda`` and ``triton`` the ``ops`` there are kernels for, or ``why_not``); ``kernel_calls`` (path ->
    calls so far); ``fallbacks`` (a list of ``op``, ``reason``, ``count``).
    """
    settings = _state.settings()
    return Info(
        version=_version(),
        torch=torch.__version__,
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
        instruction_sets={"active": cpu.isa(), "available": list(cpu.available_isas())},
        cpu_features=dict(cpu.cpu_features()),
        threads=cpu.max_threads(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        openmp=_openmp.loaded(),
        backends=list(_state.BACKENDS),
        backend=settings.backend,
        float32_matmul_precision=torch.get_float32_matmul_precision(),
        allocator=dict(cpu.allocator_stats()),
        ops=_paths(settings.backend),
        gpu={
            "devices": torch.cuda.device_count(),
            **{
                name: {"why_not": module.why_not(), "ops": [] if module.why_not() else sorted(module.OPS)}
                for name, module in (("cuda", cuda), ("triton", triton))
            },
        },
        kernel_calls=_nonzero(cpu.counters()),
        fallbacks=[
            {"op": op, "reason": reason, "count": count} for (op, reason), count in sorted(_state.fallbacks().items())
        ],
    )


def _version() -> str:
    try:
        return metadata.version("fastnn")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


def _paths(backend: str | None) -> dict[str, dict[str, str]]:
    """Op -> dtype -> what runs it."""
    if backend == "reference":
        names = [str(dtype).removeprefix("torch.") for dtype in _FLOATS]
        every = (
            *_QUANTIZATION,
            "int8_linear",
            "pack_int8_weight",
            "scaled_mm",
            *_INTEGER_CONVOLUTIONS,
            *_PRODUCTS,
            *_CONVOLUTIONS,
            *itertools.chain.from_iterable(_FAMILIES.values()),
            *_ATTENTION,
        )
        return {op: dict.fromkeys(names, "reference") for op in every}
    ops: dict[str, dict[str, str]] = {}
    products = {_name(dtype): f"cpu: {cpu.gemm_path(dtype)}" for dtype in _FLOATS}
    for op in (*_PRODUCTS, *_CONVOLUTIONS):
        ops[op] = {**products, "int8": "torch"}
    ops["int_mm"] = {**{_name(dtype): "-" for dtype in _FLOATS}, "int8": f"cpu: {cpu.gemm_path(torch.int8)}"}
    of_float8 = f"cpu: {cpu.gemm_path(torch.float8_e4m3fn)}"
    ops["scaled_mm"] = {**{_name(dtype): "-" for dtype in _FLOATS}, "int8": "-", "float8": of_float8}
    for family, members in _FAMILIES.items():
        for op in members:
            ops[op] = {**{_name(dtype): f"cpu: {cpu.isa()} {family}" for dtype in _FLOATS}, "int8": "torch"}
    ops["weight_only_linear"]["float64"] = "-"
    for op in _QUANTIZATION:  # of these dtypes, or to them
        ops[op] = {**{_name(dtype): f"cpu: {cpu.isa()} quantize" for dtype in _FLOATS}, "int8": "-"}
    of_integers = f"cpu: {cpu.gemm_path(torch.int8)}"
    ops["int8_linear"] = {**{_name(dtype): of_integers for dtype in _FLOATS}, "float64": "-", "int8": "-"}
    ops["pack_int8_weight"] = {**{_name(dtype): "-" for dtype in _FLOATS}, "int8": of_integers}
    for op in _INTEGER_CONVOLUTIONS:
        ops[op] = {**{_name(dtype): "-" for dtype in _FLOATS}, "int8": f"cpu: {cpu.isa()} int8 convolution"}
    for op in _ATTENTION:
        ops[op] = {**{_name(dtype): f"cpu: {attention.path(dtype)}" for dtype in _FLOATS}, "int8": "torch"}
    for paths in ops.values():
        paths.setdefault("float8", "-")
    return ops


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _nonzero(counts: Mapping[str, Any]) -> dict[str, Any]:
    return {path: count for path, count in sorted(counts.items()) if count}


__all__ = ["Info", "info"]
