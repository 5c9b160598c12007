"""``fastnn.quant.report(model, data, reference=float_model)``: what quantization costs and what it gains."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._modules import check_model
from ..bench.engine import compare
from ..bench.table import duration
from .calibration import in_eval_mode, run_on
from .config import inputs_of
from .modules import Quantized, QuantizedMultiheadAttention
from .quantize import dequantize_

#: Before and after.
Pair = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One quantized layer: its name, its scheme, and

    - ``snr``: signal to noise of its results in decibels, 10 log10(Σ y² / Σ (ŷ - y)²), y in the reference and ŷ in the
      quantized model, where the errors of the layers before it are in its inputs;
    - ``own_snr``: the same where it gets the reference's inputs, so that its own error is left;
    - ``bytes``: of its weights, before and after.
    """

    name: str
    scheme: str
    snr: float
    own_snr: float
    bytes: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class QuantReport:
    """What :func:`report` found. ``print`` it for text, :meth:`show` it as a table in colours, :meth:`plot` it."""

    #: One a quantized layer, in the model's order.
    layers: list[LayerReport]
    #: Of the model's results, in decibels.
    snr: float
    #: ‖ŷ - y‖ / ‖y‖ of the model's results.
    error: float
    #: The share of right answers, before and after; None without labels.
    accuracy: Pair | None
    #: How often the two models' largest output is the same one; None where outputs have no last dimension.
    agreement: float | None
    #: Of all parameters and buffers, before and after.
    bytes: tuple[int, int]
    #: What the kernels keep of the quantized weights in an order of their own, beside them.
    packed_bytes: int
    #: The median of a call's time, before and after.
    seconds: Pair
    #: The ratio of these medians, and the quartiles of the rounds' ratios.
    faster: tuple[float, float, float]
    #: What "before" is.
    reference: str

    def totals(self) -> list[tuple[str, str, str, str]]:
        """The model as a whole: what is compared, before, after, and the change."""
        rows = []
        if self.accuracy is not None:
            before, after = self.accuracy
            rows.append(("accuracy", f"{before:.2%}", f"{after:.2%}", f"{100 * (after - before):+.2f} points"))
        rows.append(("relative error", "", f"{self.error:.3g}", f"{_decibels(self.snr)} signal to noise"))
        if self.agreement is not None:
            rows.append(("same largest output", "", f"{self.agreement:.2%}", ""))
        before, after = self.bytes
        rows.append(("bytes", f"{before:,}", f"{after:,}", f"{_times(before, after)} smaller"))
        if self.packed_bytes:
            rows.append(("bytes kept by kernels", "", f"{self.packed_bytes:,}", "beside the weights, made by a call"))
        rows.append(("time of a call", *map(duration, self.seconds), _faster(self.faster)))
        return rows

    def __str__(self) -> str:
        cells = [("layer", "scheme", "SNR", "own SNR", "bytes", "before")]
        cells += [
            (
                layer.name or "(model)",
                layer.scheme,
                _decibels(layer.snr),
                _decibels(layer.own_snr),
                f"{layer.bytes[1]:,}",
                f"{layer.bytes[0]:,}",
            )
            for layer in self.layers
        ]
        parts = [_aligned(cells, right=2), _aligned([("model", "before", "after", ""), *self.totals()], right=1)]
        return "\n\n".join([*parts, f"before: {self.reference}"])

    def show(self, console: Any = None) -> None:
        """Prints both tables with rich, to a ``rich.console.Console`` or to the terminal."""
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        console = console or Console()
        table = Table(title="Quantized layers", title_justify="left")
        for name in ("layer", "scheme"):
            table.add_column(name, overflow="fold")
        for name in ("SNR", "own SNR", "bytes", "before"):
            table.add_column(name, justify="right", no_wrap=True)
        for layer in self.layers:
            colour = "green" if layer.own_snr >= 30 else "yellow" if layer.own_snr >= 15 else "red"
            table.add_row(
                escape(layer.name or "(model)"),
                layer.scheme,
                _decibels(layer.snr),
                f"[{colour}]{_decibels(layer.own_snr)}[/]",
                f"{layer.bytes[1]:,}",
                f"{layer.bytes[0]:,}",
            )
        console.print(table)
        table = Table(title=f"Before: {self.reference}", title_justify="left")
        table.add_column("model")
        for name in ("before", "after", "change"):
            table.add_column(name, justify="right")
        for row in self.totals():
            table.add_row(*row)
        console.print(table)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Writes a picture: signal to noise and bytes of each layer, and accuracy, bytes and time of the model."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(14, max(3.5, 1.2 + 0.22 * len(self.layers))), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(3, 2, 2))
        names = [layer.name or "(model)" for layer in self.layers]
        places = range(len(names))
        below = {"fontsize": 7, "loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "ncols": 2}
        # What is exact has no noise.
        highest = max([x for y in self.layers for x in (y.snr, y.own_snr) if math.isfinite(x)], default=0.0) + 10
        for offset, label, colour in ((-0.2, "snr", "tab:blue"), (0.2, "own_snr", "tab:orange")):
            heights = [min(getattr(layer, label), highest) for layer in self.layers]
            title = "with the errors before it" if label == "snr" else "its own error"
            left.barh([place + offset for place in places], heights, 0.4, color=colour, label=title)
        left.set_yticks(places, names, fontsize=7)
        left.invert_yaxis()
        left.set(title="Signal to noise of each layer, dB")
        left.legend(**below)
        for offset, which, label, colour in ((-0.2, 0, "before", "0.7"), (0.2, 1, "after", "tab:blue")):
            sizes = [layer.bytes[which] for layer in self.layers]
            middle.barh([place + offset for place in places], sizes, 0.4, color=colour, label=label)
        middle.set_yticks(places, [])
        middle.invert_yaxis()
        middle.set(title="Bytes of each layer")
        middle.legend(**below)
        shares = {"bytes": self.bytes[1] / max(self.bytes[0], 1), "time": self.seconds[1] / self.seconds[0]}
        if self.accuracy is not None:
            shares["accuracy"] = self.accuracy[1] / self.accuracy[0] if self.accuracy[0] else math.nan
        right.bar(list(shares), [1.0] * len(shares), 0.7, color="0.85", label="before")
        bars = right.bar(list(shares), list(shares.values()), 0.5, color="tab:blue", label="after")
        right.bar_label(bars, [f"{value:.2f}" for value in shares.values()])
        right.margins(y=0.1)
        right.set(title="The model, before = 1")
        right.legend(**below)
        figure.savefig(path, dpi=110, format=None if os.path.splitext(path)[1] else "png")


def report(
    model: torch.nn.Module,
    data: Iterable[Any],
    *,
    reference: torch.nn.Module | None = None,
    labels: Iterable[Tensor] | None = None,
    seconds: float = 2.0,
) -> QuantReport:
    """Compare a quantized model with the one that it was made of: accuracy, errors a layer, size and speed.

    ::

        quantized = quantize_(copy.deepcopy(model), Int8Dynamic())
        print(fastnn.quant.report(quantized, inputs, reference=model, labels=labels))

    Both run in eval mode without gradients, and are left as they were.

    Args:
        model: has layers that :func:`quantize_` made.
        data: inputs, as for :class:`Int8Static`: tensors, tuples of positional or mappings of keyword arguments.
        reference: the model before it was quantized, with the same names of layers. Without it, ``model`` with its weights
            dequantized takes its place: the rounding of the weights is then in both, and what is left is that of the
            activations.
        labels: one tensor of classes an input, of the shape of the outputs (the logits) but for the last dimension; for one
            input alone, that tensor. Gives the accuracy.
        seconds: how long both models are timed, by turns, after a warm-up.

    Where a model returns more than one tensor, the first one is looked at.

    Raises:
        TypeError: ``model`` or ``reference`` is no module; ``labels`` are no iterable; an input is of no known kind; a
            model returns no tensor.
        ValueError: ``model`` has no quantized layer; ``reference`` lacks one of the layers; there is no data; labels
            that are not as many, or of another shape.
    """
    check_model("quant.report", model)
    if reference is not None:
        check_model("quant.report", reference, "reference")
    name = "the model given as reference"
    if reference is None:
        reference, name = dequantize_(copy.deepcopy(model)), "the same weights, dequantized: activations alone differ"
    layers = _layers(model)
    if not layers:
        raise ValueError("quant.report: model has no quantized layer; call quantize_ first")
    twins = {}
    for path, _ in layers:
        try:
            twins[path] = reference.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f"quant.report: reference has no layer {path!r}, which model has quantized") from error
    inputs = list(inputs_of(data, "quant.report: data"))
    if not inputs:
        raise ValueError("quant.report: data is empty")
    if labels is not None:
        if not isinstance(labels, Iterable):
            raise TypeError(f"quant.report: labels must be an iterable of tensors, got {type(labels).__name__}")
        labels = [labels] if isinstance(labels, Tensor) and isinstance(data, (Tensor, Mapping)) else list(labels)
        if len(labels) != len(inputs):
            raise ValueError(f"quant.report: expected as many labels as inputs, {len(inputs)}, got {len(labels)}")
    with in_eval_mode(model), in_eval_mode(reference):
        # torch's encoders would hand nested tensors from layer to layer.
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            found = _compare(model, reference, dict(layers), twins, inputs, labels)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        contestants = {
            "before": lambda input: run_on(reference, input),
            "after": lambda input: run_on(model, input),
        }
        timing = compare(contestants, [(input,) for input in inputs], seconds=seconds)
    packed = sum(layer.packed_bytes() for layer in model.modules() if isinstance(layer, Quantized))
    return QuantReport(
        layers=[
            LayerReport(
                path,
                _scheme(layer),
                found.own[path][0].decibels(),
                found.own[path][1].decibels(),
                (_bytes(twins[path]), _bytes(layer)),
            )
            for path, layer in layers
        ],
        snr=found.whole.decibels(),
        error=found.whole.relative(),
        accuracy=None if labels is None else tuple(right / max(found.count, 1) for right in found.right),
        agreement=found.same / found.answers if found.answers else None,
        bytes=(_bytes(reference), _bytes(model)),
        packed_bytes=packed,
        seconds=(timing.median("before"), timing.median("after")),
        faster=timing.ratio("after", "before"),
        reference=name,
    )


class _Noise:
    """Sums of squares of what should have been and of what is wrong."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    def add(self, expected: Tensor, found: Tensor) -> None:
        expected, found = expected.double(), found.double()
        self.signal += expected.square().sum().item()
        self.noise += (found - expected).square().sum().item()

    def decibels(self) -> float:
        if self.noise == 0.0:
            return math.inf
        return 10.0 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    def relative(self) -> float:
        return math.sqrt(self.noise / self.signal) if self.signal else (math.inf if self.noise else 0.0)


@dataclasses.dataclass
class _Found:
    own: dict[str, tuple[_Noise, _Noise]]
    whole: _Noise
    right: list[int]
    count: int = 0
    same: int = 0
    answers: int = 0


def _compare(
    model: torch.nn.Module,
    reference: torch.nn.Module,
    layers: dict[str, torch.nn.Module],
    twins: dict[str, torch.nn.Module],
    inputs: list[Any],
    labels: list[Tensor] | None,
) -> _Found:
    found = _Found({path: (_Noise(), _Noise()) for path in layers}, _Noise(), [0, 0])
    # What became part of a layer gives the layer's result.
    ends = {path: reference.get_submodule(layer.norm) for path, layer in layers.items() if getattr(layer, "norm", None)}
    for index, input in enumerate(inputs):
        expected, before = _watched(reference, twins, input, arguments=True, ends=ends)
        answer, after = _watched(model, layers, input)
        for path, layer in layers.items():
            # A layer that the two models call differently often cannot be compared call by call.
            for (args, kwargs, theirs), (_, _, ours) in zip(before[path], after[path], strict=False):
                found.own[path][0].add(theirs, ours)
                found.own[path][1].add(theirs, _tensor(layer(*args, **kwargs)))
        found.whole.add(expected, answer)
        if answer.dim() and answer.shape[-1] > 1:
            choices = expected.argmax(-1), answer.argmax(-1)
            found.same += int((choices[0] == choices[1]).sum())
            found.answers += choices[0].numel()
        if labels is not None:
            label = labels[index]
            if not answer.dim() or label.shape != answer.shape[:-1]:
                raise ValueError(
                    f"quant.report: labels: expected the shape {tuple(answer.shape[:-1])} for outputs of "
                    f"{tuple(answer.shape)}, got {tuple(label.shape)}"
                )
            found.count += label.numel()
            for which, choice in enumerate(choices if answer.shape[-1] > 1 else (torch.zeros_like(label),) * 2):
                found.right[which] += int((choice == label).sum())
    return found


def _watched(
    model: torch.nn.Module,
    layers: dict[str, torch.nn.Module],
    input: Any,
    arguments: bool = False,
    ends: Mapping[str, torch.nn.Module] = types.MappingProxyType({}),
) -> tuple[Tensor, dict[str, list[tuple[Any, Any, Tensor]]]]:
    """The model's result, and the results (and arguments) of the calls of these layers; of some the results of the modules
    in ``ends`` that follow them."""
    begun: dict[str, tuple[Any, Any]] = {}
    calls: dict[str, list[tuple[Any, Any, Tensor]]] = {path: [] for path in layers}
    handles = []

    def begin(path: str) -> Any:
        def hook(layer: torch.nn.Module, args: Any, kwargs: Any) -> None:
            begun[path] = args, kwargs

        return hook

    def watch(path: str) -> Any:
        def hook(layer: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            kept = begun.pop(path, (args, kwargs)) if arguments else ((), {})
            # What follows may write into it.
            calls[path].append(
                (*torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, kept), _tensor(output).clone())
            )

        return hook

    try:
        for path, layer in layers.items():
            if path in ends:
                handles.append(layer.register_forward_pre_hook(begin(path), with_kwargs=True))
            handles.append(ends.get(path, layer).register_forward_hook(watch(path), with_kwargs=True))
        return _tensor(run_on(model, input)), calls
    finally:
        for handle in handles:
            handle.remove()


def _tensor(output: Any) -> Tensor:
    """The first tensor in what a module returned."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    for value in values:
        if isinstance(value, (Tensor, tuple, list, Mapping)):
            return _tensor(value)
    raise TypeError(f"quant.report: expected a module that returns tensors, got {type(output).__name__}")


def _layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The quantized layers, attention as one of them."""
    found: list[tuple[str, torch.nn.Module]] = []
    inside: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, (Quantized, QuantizedMultiheadAttention)) and id(module) not in inside:
            found.append((path, module))
            inside.update(map(id, module.modules()))
    return found


def _scheme(layer: torch.nn.Module) -> str:
    if isinstance(layer, QuantizedMultiheadAttention):
        return "attention: " + ", ".join(
            dict.fromkeys(_scheme(inner) for inner in layer.modules() if isinstance(inner, Quantized))
        )
    return layer.scheme()


def _bytes(module: torch.nn.Module) -> int:
    """Of all parameters and buffers; memory that several share counts once."""
    held = {}
    for tensor in (*module.parameters(), *module.buffers()):
        held[tensor.data_ptr() if tensor.numel() else id(tensor)] = tensor.nbytes
    return sum(held.values())


def _decibels(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f} dB"


def _times(before: float, after: float) -> str:
    return f"{before / after:.2f}x" if after else "-"


def _faster(ratio: tuple[float, float, float]) -> str:
    middle, low, high = ratio
    if middle >= 1.0:
        return f"{middle:.2f}x faster ({low:.2f} to {high:.2f})"
    return f"{1 / middle:.2f}x slower ({1 / high:.2f} to {1 / low:.2f})"


def _aligned(cells: list[tuple[str, ...]], right: int) -> str:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    rule = tuple("-" * width for width in widths)
    lines = []
    for row in (cells[0], rule, *cells[1:]):
        padded = [
            cell.ljust(width) if column < right or (column == len(row) - 1 and right == 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


__all__ = ["LayerReport", "QuantReport", "report"]
