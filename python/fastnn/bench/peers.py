"""Whole models in inference by other means than torch's eager mode: torch.compile, ONNX Runtime and OpenVINO.

Each peer is at its best: torch.compile and OpenVINO may treat the parameters as constants, ONNX Runtime optimizes the
whole graph, all use as many threads as torch has, and results are given back without a copy. A model is compiled at the
first call, for the shape and dtype of its input.

ONNX Runtime and OpenVINO are the extra `fastnn[bench]`. Where a package is missing its peer does not take part, and
:func:`absent` says so.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["absent", "contestants", "int8_onnxruntime", "versions"]

Call = Callable[[Tensor], Tensor]

#: The packages that a peer needs beside torch.
_PACKAGES = {"torch.compile": (), "onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "openvino": ("openvino",)}


def contestants(model: torch.nn.Module, dtype: torch.dtype, *, channels_last: bool = True) -> dict[str, Call]:
    """What computes the model in `torch.inference_mode()`, by name, for a contiguous input: images of the dtype, or tokens.

    Args:
        model: in eval mode, contiguous, with parameters of the dtype, from one tensor to one tensor.
        dtype: float32 or bfloat16.
        channels_last: whether torch.compile gets the model in that layout as well.
    """
    # What was compiled for other models would otherwise be looked through, and count toward torch's limit for one function.
    torch.compiler.reset()
    makers = {
        "torch.compile": lambda x: _compiled(model, torch.contiguous_format),
        "torch.compile channels_last": lambda x: _compiled(model, torch.channels_last),
        "onnxruntime": lambda x: _onnxruntime(model, x),
        "openvino": lambda x: _openvino(model, x, dtype),
    }
    if not channels_last:
        del makers["torch.compile channels_last"]
    without = absent(dtype)
    return {name: _at_first_call(make) for name, make in makers.items() if name.split()[0] not in without}


def absent(dtype: torch.dtype) -> dict[str, str]:
    """The peers that cannot run models of this dtype here, each with the reason."""
    reasons = {}
    for peer, packages in _PACKAGES.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            reasons[peer] = f"not installed: {', '.join(missing)}"
        elif peer == "onnxruntime" and dtype == torch.bfloat16:
            reasons[peer] = "has no bfloat16 convolution or matrix product for CPUs"
    return reasons


def versions() -> dict[str, str]:
    """Of the peers' packages that are installed."""
    packages = {package for needed in _PACKAGES.values() for package in needed}
    return {
        package: importlib.metadata.version(package)
        for package in sorted(packages)
        if importlib.util.find_spec(package) is not None
    }


def _at_first_call(make: Callable[[Tensor], Call]) -> Call:
    call: Call | None = None

    def compute(x: Tensor) -> Tensor:
        nonlocal call
        with torch.inference_mode():
            if call is None:
                call = make(x)
            return call(x)

    return compute


def _compiled(model: torch.nn.Module, layout: torch.memory_format) -> Call:
    model = copy.deepcopy(model).to(memory_format=layout)
    # Freezing makes constants of the parameters: batch norm is folded and the filters are packed at compile time.
    # For this shape alone, and all of the model or an error.
    compiled = torch.compile(model, fullgraph=True, dynamic=False, options={"freezing": True})
    return lambda x: compiled(x.contiguous(memory_format=layout))


def _onnxruntime(model: torch.nn.Module, example: Tensor) -> Call:
    program = torch.onnx.export(model, (example,), dynamo=True, verbose=False)
    return _session(program.model_proto.SerializeToString())


def _session(model: bytes | str) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads wait for work by spinning: within a call that makes it faster, after it everyone else slower.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def int8_onnxruntime(model: torch.nn.Module, calibration: Sequence[Tensor] | None = None) -> Call:
    """ONNX Runtime's own int8: dynamic, or static where there is calibration data, in the forms that are the fastest on CPUs:
    weights int8 a channel, activations uint8, operators that take integers. For models as in :func:`contestants`."""
    return _at_first_call(lambda x: _quantized_onnxruntime(model, x, calibration))


def _quantized_onnxruntime(model: torch.nn.Module, example: Tensor, calibration: Sequence[Tensor] | None) -> Call:
    from onnxruntime import quantization

    program = torch.onnx.export(model, (example,), dynamo=True, verbose=False)
    forms = {"weight_type": quantization.QuantType.QInt8, "per_channel": True}
    with tempfile.TemporaryDirectory() as folder:
        source, target = os.path.join(folder, "float.onnx"), os.path.join(folder, "int8.onnx")
        with open(source, "wb") as file:
            file.write(program.model_proto.SerializeToString())
        if calibration is None:
            quantization.quantize_dynamic(source, target, **forms)
        else:
            name = program.model_proto.graph.input[0].name
            quantization.quantize_static(
                source,
                target,
                _batches(quantization.CalibrationDataReader, name, calibration),
                quant_format=quantization.QuantFormat.QOperator,
                activation_type=quantization.QuantType.QUInt8,
                **forms,
            )
        return _session(target)


def _batches(base: type, name: str, data: Sequence[Tensor]) -> Any:
    batches = iter([{name: batch.numpy()} for batch in data])
    return type("Batches", (base,), {"get_next": lambda self: next(batches, None)})()


def _openvino(model: torch.nn.Module, example: Tensor, dtype: torch.dtype) -> Call:
    # Importing OpenVINO reports that over the network, by this package; it does without where the package is missing.
    sys.modules.setdefault("openvino_telemetry", None)
    import openvino

    # numpy has no bfloat16: its bits pass as integers.
    types = {
        torch.float32: (openvino.Type.f32, torch.float32),
        torch.bfloat16: (openvino.Type.bf16, torch.int16),
        torch.int64: (openvino.Type.i64, torch.int64),
    }
    precision, bits = types[example.dtype]
    result_bits = torch.empty(0, dtype=types[dtype][1]).numpy().dtype
    graph = openvino.convert_model(model, example_input=example, input=list(example.shape))
    options = {
        "INFERENCE_PRECISION_HINT": types[dtype][0],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = openvino.compile_model(graph, "CPU", options).create_infer_request()

    def compute(x: Tensor) -> Tensor:
        array = x.view(bits).numpy()
        request.set_input_tensor(openvino.Tensor(array, list(x.shape), precision))
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data.view(result_bits)).view(dtype)

    return compute
