"""One line that makes an existing model faster: ``model = fastnn.convert(model)``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from . import _state, backends, nn
from ._modules import Model, Selection, check_model, class_name, named_modules, selected
from .fuse import fuse_, is_fused
from .nn.conv1d import conv1d_class, is_conv1d
from .nn.dot_product_attention import dot_product_attention_class, is_dot_product_attention
from .nn.named_activation import NAMED_ACTIVATIONS, is_named_activation, named_activation_class
from .nn.own_attention import has_own_attention, own_attention_class
from .nn.rms_norm import is_named_rms_norm, is_rms_norm, rms_norm_class

#: Which class takes the place of which. A new family adds its layers here, one line each.
REPLACEMENTS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.Linear: nn.Linear,
    torch.nn.Bilinear: nn.Bilinear,
    torch.nn.Conv1d: nn.Conv1d,
    torch.nn.Conv2d: nn.Conv2d,
    torch.nn.Conv3d: nn.Conv3d,
    torch.nn.ConvTranspose1d: nn.ConvTranspose1d,
    torch.nn.ConvTranspose2d: nn.ConvTranspose2d,
    torch.nn.ConvTranspose3d: nn.ConvTranspose3d,
    torch.nn.ReLU: nn.ReLU,
    torch.nn.ReLU6: nn.ReLU6,
    torch.nn.GELU: nn.GELU,
    torch.nn.SiLU: nn.SiLU,
    torch.nn.Sigmoid: nn.Sigmoid,
    torch.nn.Tanh: nn.Tanh,
    torch.nn.Embedding: nn.Embedding,
    torch.nn.Dropout: nn.Dropout,
    torch.nn.AvgPool1d: nn.AvgPool1d,
    torch.nn.AvgPool2d: nn.AvgPool2d,
    torch.nn.AvgPool3d: nn.AvgPool3d,
    torch.nn.MaxPool1d: nn.MaxPool1d,
    torch.nn.MaxPool2d: nn.MaxPool2d,
    torch.nn.MaxPool3d: nn.MaxPool3d,
    torch.nn.AdaptiveAvgPool1d: nn.AdaptiveAvgPool1d,
    torch.nn.AdaptiveAvgPool2d: nn.AdaptiveAvgPool2d,
    torch.nn.AdaptiveAvgPool3d: nn.AdaptiveAvgPool3d,
    torch.nn.AdaptiveMaxPool1d: nn.AdaptiveMaxPool1d,
    torch.nn.AdaptiveMaxPool2d: nn.AdaptiveMaxPool2d,
    torch.nn.AdaptiveMaxPool3d: nn.AdaptiveMaxPool3d,
    torch.nn.BatchNorm1d: nn.BatchNorm1d,
    torch.nn.BatchNorm2d: nn.BatchNorm2d,
    torch.nn.BatchNorm3d: nn.BatchNorm3d,
    torch.nn.Softmax: nn.Softmax,
    torch.nn.Softmax2d: nn.Softmax2d,
    torch.nn.Softmin: nn.Softmin,
    torch.nn.LogSoftmax: nn.LogSoftmax,
    torch.nn.CrossEntropyLoss: nn.CrossEntropyLoss,
    torch.nn.MultiheadAttention: nn.MultiheadAttention,
    torch.nn.modules.linear.NonDynamicallyQuantizableLinear: nn.NonDynamicallyQuantizableLinear,
    torch.nn.TransformerEncoderLayer: nn.TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: nn.TransformerDecoderLayer,
    torch.nn.TransformerEncoder: nn.TransformerEncoder,
    torch.nn.TransformerDecoder: nn.TransformerDecoder,
    torch.nn.Transformer: nn.Transformer,
    torch.nn.LayerNorm: nn.LayerNorm,
    torch.nn.RMSNorm: nn.RMSNorm,
    torch.nn.GroupNorm: nn.GroupNorm,
    torch.nn.InstanceNorm1d: nn.InstanceNorm1d,
    torch.nn.InstanceNorm2d: nn.InstanceNorm2d,
    torch.nn.InstanceNorm3d: nn.InstanceNorm3d,
}

if hasattr(torch.nn, "LinearCrossEntropyLoss"):  # since torch 2.13
    REPLACEMENTS[torch.nn.LinearCrossEntropyLoss] = nn.LinearCrossEntropyLoss

#: Classes recognised by name, because their package is not imported: the test, and the maker of the fast class.
REPLACEMENTS_BY_NAME: dict[
    str,
    tuple[Callable[[torch.nn.Module], bool], Callable[[type[torch.nn.Module]], type[torch.nn.Module]]],
] = {
    "Conv1D": (is_conv1d, conv1d_class),
    **dict.fromkeys(NAMED_ACTIVATIONS, (is_named_activation, named_activation_class)),
    # What `revert` makes of nn.DotProductAttention.
    "TorchDotProductAttention": (is_dot_product_attention, dot_product_attention_class),
    "*RMSNorm": (is_rms_norm, rms_norm_class),  # and T5LayerNorm
}

#: Blocks of fastnn alone, and the torch class that holds the same layers.
BLOCKS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {nn.MLP: torch.nn.Sequential}

_FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Leaves of torch.nn that compute nothing worth a kernel: they are neither replaced nor complained about.
_STRUCTURAL = (
    torch.nn.Identity,
    torch.nn.Flatten,
    torch.nn.Unflatten,
    torch.nn.Sequential,
    torch.nn.ModuleList,
    torch.nn.ModuleDict,
    torch.nn.modules.dropout._DropoutNd,
)


# Made of layers with names, which they call; a forward that a subclass gives one of them is its own affair.
_AROUND_OTHERS = (
    torch.nn.TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer,
    torch.nn.TransformerEncoder,
    torch.nn.TransformerDecoder,
    torch.nn.Transformer,
)


class ConversionError(RuntimeError):
    """``convert(..., strict=True)`` met modules that fastnn cannot replace; :attr:`rows` lists them."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        lines = "\n".join(f"  {row.name}: {row.kind}: {row.reason}" for row in rows)
        super().__init__(f"convert(strict=True): {len(rows)} modules cannot be replaced:\n{lines}")


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one module."""

    #: Its name in the model, or ``(model)`` for the model itself. A shared module has all its names, comma-separated.
    name: str
    #: Its class, or the torch class that it had before it was replaced.
    kind: str
    #: ``replaced``; ``quantized``; ``available`` (``convert`` would replace it); ``kept`` (fastnn cannot replace it); or
    #: ``note``.
    status: str
    #: The fastnn class that runs it or would run it; empty if there is none.
    replacement: str
    #: Why it was kept, or what else there is to know; may be empty.
    reason: str
    #: How many numbers its own parameters hold, or held before they were quantized.
    parameters: int
    #: Whether ``prepack_`` keeps a packed copy of its weight.
    prepacked: bool = False
    #: Of a quantized layer: ‖Ŵ - W‖ / ‖W‖ of its weight, None where the one that it was made of is not known.
    error: float | None = None
    #: Of a quantized layer: the memory of its weight, scales and bias.
    bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`report` found: :attr:`rows`, one a module, and the calls that fell back to torch so far."""

    rows: list[Row]
    #: (op, reason) -> number of calls that went to torch in this process.
    fallbacks: dict[tuple[str, str], int]

    def with_status(self, status: str) -> list[Row]:
        """The rows that have this status."""
        return [row for row in self.rows if row.status == status]

    @property
    def replaced(self) -> list[Row]:
        """The modules that fastnn runs."""
        return [row for row in self.rows if row.status in ("replaced", "quantized")]

    @property
    def not_replaced(self) -> list[Row]:
        """The modules that torch runs, whether fastnn could replace them or not."""
        return [row for row in self.rows if row.status in ("available", "kept")]

    def __str__(self) -> str:
        done, total = len(self.replaced), len(self.replaced) + len(self.not_replaced)
        numbers = sum(row.parameters for row in self.rows)
        covered = sum(row.parameters for row in self.replaced)
        share = f", {100 * covered / numbers:.1f} % of {numbers:,} parameters" if numbers else ""
        lines = [f"fastnn runs {done} of {total} modules{share}"]
        if self.rows:
            cells = [("module", "class", "status", "runs as", "remark")]
            for row in self.rows:
                more = ["weight prepacked"] if row.prepacked else []
                if row.error is not None:
                    more.append(f"error {row.error:.2%}")
                if row.bytes is not None:
                    more.append(f"{row.bytes:,} bytes")
                remark = "; ".join(part for part in (row.reason, *more) if part)
                cells.append((row.name, row.kind, row.status, row.replacement, remark))
            widths = [max(len(line[column]) for line in cells) for column in range(4)]
            cells.insert(1, (*tuple("-" * width for width in widths), "-" * 6))
            for line in cells:
                padded = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
                lines.append("  ".join([*padded, line[4]]).rstrip())
        if self.fallbacks:
            lines.append("calls that went to torch in this process:")
            lines += [f"  {op}: {reason}: {count}" for (op, reason), count in sorted(self.fallbacks.items())]
        return "\n".join(lines)


def convert(
    model: Model,
    *,
    only: Selection | None = None,
    skip: Selection | None = None,
    strict: bool = False,
    fuse: bool = False,
) -> Model:
    """Replace, in place, each module that fastnn has a faster class for; return the model.

    A module is replaced by giving it another class, so that its parameters, buffers, hooks, ``state_dict`` and
    identity stay as they are; the new class is a subclass of the old one, so that ``isinstance`` stays true too.
    Modules whose type is exactly a class of ``torch.nn`` in :data:`REPLACEMENTS` are replaced, also with parametrizations
    (``weight_norm``), and transformers' ``Conv1D``, activations and rms norms. Subclasses are not: they may compute something
    else. Modules of other packages that call :func:`torch.nn.functional.scaled_dot_product_attention` in a forward of their own,
    or ask transformers for it, keep that forward, in which it is fastnn's from then on. :func:`report` tells what was left
    and why, :func:`revert` undoes it all, which ``torch.jit.script`` needs: it compiles Python source and knows no kernels.

    Args:
        model: any module; it may itself be the one replaced.
        only: replace these alone; a name pattern (``"encoder.*"``, as for :mod:`fnmatch`), a module class, a predicate
            ``f(name, module) -> bool``, or several of these. A pattern or class that meets a module means all
            modules inside it as well; a predicate is asked about each one.
        skip: leave these; the same forms.
        strict: raise, before anything is changed, if a module that was asked for computes something and cannot be
            replaced.
        fuse: for inference: run each convolution with the batch norm, the sum and the activation that follow it as one
            call, and each linear layer with the sum or the activation that follows it. It holds in eval mode with gradients
            off (``torch.no_grad`` or ``torch.inference_mode``); in training, with gradients, under autocast or
            ``torch.compile``, or with a hook on a module in question, the layers run one by one as ever. Parameters and ``state_dict`` stay as they are: the filters with the batch norm folded into them
            are kept beside them, made here where the model is in eval mode and else by the first forward, and anew when
            a parameter's address or version counter has changed or an optimizer has taken a step (writes through
            ``.data`` or numpy change neither: convert again after them). A forward has the kernels keep them in the
            order in which they read them, and lets go of them as they were; an input of another size, with which
            another kernel is called, has them folded once more.
            Which layers follow each other is found by ``torch.fx`` in eval mode; where a module's Python cannot be
            followed, its children are tried, and :func:`report` says how many calls were fused. Where a module that was
            followed is replaced later, or an attribute of one that is no parameter and no buffer changes, the layers run
            one by one again, until the model is converted again. Copies (``deepcopy``, pickle, ``torch.save``) are not
            fused.

    Raises:
        TypeError: ``model`` is no module, or ``only`` or ``skip`` none of the forms above.
        ValueError: a name pattern meets no module.
        ConversionError: under ``strict``; it names every module in question and the reason.
    """
    check_model("convert", model)
    chosen = selected("convert", model, only, skip)
    wanted = [(names, module) for names, module in named_modules(model) if id(module) in chosen]
    if strict:
        failing = [row for names, module in wanted if (row := _row(names, module)) and row.status == "kept"]
        if failing:
            raise ConversionError(failing)
    for _, module in wanted:
        target, _ = _examine(module)
        if target is not None:
            module.__class__ = target
    if fuse:
        fuse_(model, lambda module: id(module) in chosen)
    return model


def revert(model: Model) -> Model:
    """Undo :func:`convert`, fusion and :func:`fastnn.prepack_`, in place: every layer gets torch's class; return the model.

    Layers that were made as ``fastnn.nn`` layers from the start become torch's as well, and an ``MLP`` a
    ``torch.nn.Sequential`` of the same layers. Subclasses that a program defined itself stay.

    Raises:
        TypeError: ``model`` is no module.
    """
    check_model("revert", model)
    for _, module in named_modules(model):
        original = original_class(type(module))
        if original is not None and not _is_quantized_chain(type(module)):
            module.__dict__.pop("_packed_weight", None)
            module.__class__ = original
    return model


def report(model: torch.nn.Module) -> Report:
    """Tell which modules of the model fastnn runs, which it does not, and why; ``print`` it for a table.

    Containers and modules that compute nothing of their own (flatten, identity) have no row.

    Raises:
        TypeError: ``model`` is no module.
    """
    check_model("report", model)
    rows = [row for names, module in named_modules(model) if (row := _row(names, module))]
    return Report(rows, dict(_state.fallbacks()))


def _examine(module: torch.nn.Module) -> tuple[type[torch.nn.Module] | None, str]:
    """The class to give to the module, or None and the reason (empty if there is nothing to replace)."""
    kind = type(module)
    if hasattr(kind, "quantized_row") or "_original_class" in kind.__dict__:
        return None, ""  # converted already
    if isinstance(module, torch.jit.ScriptModule):
        return None, "TorchScript: its code is compiled already"
    target = _parametrized_replacement(module) if parametrize.is_parametrized(module) else REPLACEMENTS.get(kind)
    if target is None:
        by_name = "*RMSNorm" if is_named_rms_norm(kind) else kind.__name__
        matches, make = REPLACEMENTS_BY_NAME.get(by_name, (None, None))
        target = make(kind) if matches and matches(module) else None
    if target is None and has_own_attention(module) and not (_is_parametrized(kind) or _is_fully_sharded(kind)):
        try:
            target = own_attention_class(kind)
        except Exception as error:  # a class that refuses to have subclasses
            return None, f"no subclass of it can be made: {error}"
    if target is None:
        return None, _why_kept(module)
    if "forward" in module.__dict__:
        return None, "its forward was set on the instance, which would go on calling torch"
    for parameter in _own_parameters(module):
        if parameter.dtype not in _FLOAT_DTYPES:
            return None, f"{str(parameter.dtype).removeprefix('torch.')} parameters"
    return target, ""


def _parametrized_replacement(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    """The class that ``register_parametrization`` made for the module alone, on top of fastnn's layer."""
    kind = type(module)
    fast = REPLACEMENTS.get(kind.__bases__[0]) if _is_parametrized(kind) else None
    return None if fast is None else _on_top_of(kind, (fast,))


def _own_parameters(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """With those from which a parametrization computes the module's."""
    yield from module.parameters(recurse=False)
    if parametrize.is_parametrized(module):
        yield from module.parametrizations.parameters()


def _why_kept(module: torch.nn.Module) -> str:
    """Why a module whose class is not in the tables stays; empty if it computes nothing of its own."""
    kind = type(module)
    base = next((known for known in REPLACEMENTS if issubclass(kind, known)), None)
    if isinstance(module, LazyModuleMixin):
        become = getattr(kind, "cls_to_become", None)
        if become in REPLACEMENTS:
            return f"lazy: it becomes {become.__name__} on its first call; convert after that"
        return "lazy: its shape is not known before its first call"
    if parametrize.is_parametrized(module):
        return "parametrized: register_parametrization gave it a class of its own, on top of one that is not replaced"
    if _is_fully_sharded(kind):
        return "fully_shard gave it a class of its own; convert before sharding" if base else ""
    if kind.__module__.startswith(("torch.ao.", "torch.nn.quantized", "torch.nn.qat", "torch.nn.intrinsic")):
        return "quantized module" if "quantized" in kind.__module__ else "module of torch.ao"
    if isinstance(module, _AROUND_OTHERS):
        if kind.forward in (torch.nn.TransformerEncoder.forward, torch.nn.TransformerEncoderLayer.forward):
            return (
                f"subclass of torch.nn.{base.__name__}: in eval mode without gradients torch runs its layers as one call of its"
                " own, or on nested tensors"
            )
        return ""
    if base is not None:
        forward = "with a forward of its own" if kind.forward is not base.forward else "(only exact types are replaced)"
        return f"subclass of torch.nn.{base.__name__} {forward}"
    if isinstance(module, _STRUCTURAL):
        return ""
    has_own_state = any(True for _ in module.parameters(recurse=False))
    if kind.__module__.startswith("torch."):
        if kind.__name__.startswith("_"):
            return ""  # such as the function inside a parametrization: part of something with a name
        return f"fastnn has no {kind.__name__}" if has_own_state or not module._modules else ""
    if has_own_state:
        return "fastnn does not know what it computes with its parameters"
    # A module around others mostly calls them; one without any must compute something itself.
    return "" if module._modules else "fastnn does not know what it computes"


def _is_parametrized(kind: type) -> bool:
    """Whether register_parametrization made the class."""
    return kind.__name__.startswith("Parametrized") and len(kind.__bases__) == 1


def _on_top_of(kind: type, bases: tuple[type, ...]) -> type:
    """A class like this one, which was made at run time, on top of other bases."""
    prefix = "FSDP" if _is_fully_sharded(kind) else "Parametrized"
    body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(prefix + bases[-1].__name__, bases, body)


def _is_fully_sharded(kind: type) -> bool:
    # By name: importing torch.distributed.fsdp takes a second, and not every build of torch has it.
    return any(base.__name__ == "FSDPModule" for base in kind.__bases__)


def original_class(kind: type) -> type | None:
    """The class a fastnn layer had before, or None for any other class.

    ``register_parametrization`` and ``fully_shard`` put a class made at run time on top of a layer's class; the answer
    is then the same class on top of torch's.
    """
    for torch_class, fast_class in REPLACEMENTS.items():
        if kind is fast_class:
            return torch_class
    if kind in BLOCKS:
        return BLOCKS[kind]
    original = kind.__dict__.get("_original_class")
    if original is not None:
        return original
    if _is_fully_sharded(kind) or _is_parametrized(kind):
        bases = tuple(original_class(base) or base for base in kind.__bases__)
        if bases != kind.__bases__:
            return _on_top_of(kind, bases)
    return None


_CHANGED = "changed since, or not called as its layers were made to run as one: they run one by one; convert or quantize it again"


def _is_quantized_chain(kind: type) -> bool:
    """Whether the class is that of a model whose convolutions fastnn.quant has made integers, which dequantize_ undoes."""
    return "_is_chain" in kind.__dict__


def _row(names: list[str], module: torch.nn.Module) -> Row | None:
    """The report's row for a module; None if it computes nothing of its own."""
    kind = type(module)
    name = ", ".join(name or "(model)" for name in names)
    if hasattr(kind, "quantized_row"):
        return module.quantized_row(name)
    own = sum(parameter.numel() for parameter in _initialized(module))
    original = original_class(kind)
    if is_fused(kind):
        calls = kind._fused_calls
        counts = (len(calls.convolutions), "convolution"), (len(calls.linears), "linear layer")
        several = " and ".join(f"{n} {noun}{'s' * (n > 1)}" for n, noun in counts if n)
        reason = f"{several}, each with what follows it as one call, in eval mode without gradients"
        return Row(name, class_name(original), "note", "", reason if calls.unchanged() else _CHANGED, own)
    if _is_quantized_chain(kind):
        reason = "its convolutions hand integers to each other, in eval mode"
        return Row(name, class_name(original), "note", "", reason if module._is_current_chain() else _CHANGED, own)
    if original is not None:
        prepacked = "_packed_weight" in module.__dict__
        fast = _fast_half(kind)
        remark = _where_it_runs(module) or getattr(fast, "remark", "")
        return Row(name, class_name(original), "replaced", f"fastnn.nn.{fast.__name__}", remark, own, prepacked)
    target, reason = _examine(module)
    if target is not None:
        fast = _fast_half(target)
        return Row(name, class_name(kind), "available", f"fastnn.nn.{fast.__name__}", getattr(fast, "remark", ""), own)
    if reason:
        return Row(name, class_name(kind), "kept", "", reason, own)
    return None


def _fast_half(kind: type) -> type:
    """The class of fastnn's by which people know the replacement."""
    return next(base for base in kind.__mro__ if base.__module__.startswith("fastnn."))


def _initialized(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    for parameter in module.parameters(recurse=False):
        if not isinstance(parameter, torch.nn.parameter.UninitializedTensorMixin):
            yield parameter


def _where_it_runs(module: torch.nn.Module) -> str:
    """A warning if the layer's parameters are such that its calls go to torch."""
    for parameter in module.parameters(recurse=False):
        if parameter.dtype not in _FLOAT_DTYPES:
            return f"runs on torch: {str(parameter.dtype).removeprefix('torch.')} parameters"
        if type(parameter) not in (torch.Tensor, torch.nn.Parameter):
            return f"runs on torch while its parameters are {type(parameter).__name__}"
        reason = backends.supports("gemm", parameter)  # which every backend has
        if reason is not None:
            return f"runs on torch: {reason}"
    if "forward" in module.__dict__:
        return "its forward was set on the instance: what that calls runs"
    return ""
