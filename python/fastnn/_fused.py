"""The calls of a fused forward: a convolution or a linear layer with what follows it, the blocks of MobileNetV2, and chains
of convolutions, such blocks and poolings.

The kernels read filters in an order of their own and keep them so. Once they have, the folded filters are let go of; what
else may need them (an input of another size, whose kernel reads them in another order) has them folded again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import _cpu, nn
from ._folding import empty_filters, fold_batch_norm
from ._guards import Guards
from ._snapshots import Place, changes_of
from .backends import cpu
from .backends._conv import is_channels_last
from .backends.cpu import empty_image
from .ops._route import is_straight
from .ops.activation import activation as apply_activation
from .ops.conv import FusedLayer, activation_number, conv_fused, inverted_residual
from .ops.pool import AVERAGE, MAXIMUM

#: A convolution's attributes that its fused call was chosen by.
_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")

_steps = 0


def _count_step(*_: Any) -> None:
    """The fused steps of torch's optimizers change parameters without counting a version."""
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class Folded:
    """The folded filters of some parameters, and what the kernels made of them."""

    def __init__(
        self, sources: tuple[Tensor | None, ...], eps: float | None, channels_last: bool, activation: str
    ) -> None:
        # Held, so that no other parameters can lie where these did; and for the next fold.
        self._sources = tuple(None if s is None else s.detach() for s in sources)
        self._eps = eps
        self._channels_last = channels_last
        weight, bias = self._fold()
        #: Whether the filters are a copy, that can be made again.
        self._copied = weight.data_ptr() != self._sources[0].data_ptr()
        self.layer: FusedLayer = weight, bias, activation_number(activation), _cpu.Prepared()

    def _fold(self) -> tuple[Tensor, Tensor | None]:
        # Channels next to each other suit the kernels best, and the results follow the filters.
        layout = torch.channels_last if self._channels_last else torch.preserve_format
        if self._eps is not None:
            return fold_batch_norm(*self._sources, self._eps, layout)
        weight, bias = self._sources
        if self._channels_last and not weight.is_contiguous(memory_format=layout):
            weight = empty_filters(weight, layout).copy_(weight)
        return weight, bias

    def whole(self) -> FusedLayer:
        """The layer with its filters, which may be gone from the one that is kept."""
        return self.layer if self.layer[0] is not None else (self._fold()[0], *self.layer[1:])

    def keep(self, layer: FusedLayer, prepared_more: bool) -> None:
        """Keeps the layer that a call was made with, without its filters if the call had the kernels keep them in another
        form: the next one like it will not read them. Otherwise it does."""
        if prepared_more and self._copied and cpu.has_table:
            layer = None, *layer[1:]
        self.layer = layer


class FusedConv:
    """One convolution and what follows it, with the folded filters of the parameters as they were last seen."""

    def __init__(
        self,
        conv: torch.nn.Module,
        norm: torch.nn.Module | None,
        activation: str,
        after: torch.nn.Module | None,
        in_place: bool,
    ) -> None:
        self.conv = conv
        self.norm = norm
        self.activation = activation
        #: Whether the residual is added in place.
        self.in_place = in_place
        #: The activation's module, if it is one.
        self.after = after
        #: Whether all that read the result take it in any layout, so that the kernels may choose.
        self.any_layout = False
        #: Whether this call is the last that sees its residual, whose memory may then be the result's.
        self.ends_residual = False
        self._kind = type(conv)
        self._geometry = self._read_geometry()
        self._key: tuple[Any, ...] = ()
        self.folded: Folded

    def modules(self) -> list[torch.nn.Module]:
        return [module for module in (self.conv, self.norm) if module is not None]

    def kept(self) -> list[torch.nn.Module]:
        return [] if self.after is None else [self.after]

    def _read_geometry(self) -> list[Any]:
        return [self.conv.__dict__.get(name) for name in _GEOMETRY]

    def as_traced(self) -> bool:
        """Whether the convolution has the class and geometry that it had, and parameters (not a parametrization's attributes), and
        the norm its statistics."""
        if type(self.conv) is not self._kind or self._read_geometry() != self._geometry:
            return False
        norm = self.norm
        there = norm is None or (norm.running_mean is not None and norm.running_var is not None)
        return there and all(name in place for place, name in self.places())

    def places(self) -> list[Place]:
        """Where all lies that the filters are made of, and how they are used."""
        found = [(self.conv._parameters, name) for name in ("weight", "bias")]
        found += [(self.conv.__dict__, name) for name in _GEOMETRY]
        if self.norm is not None:
            found += [(self.norm._parameters, name) for name in ("weight", "bias")]
            found += [(self.norm._buffers, name) for name in ("running_mean", "running_var")]
            found.append((self.norm.__dict__, "eps"))
        return found

    def forget(self) -> None:
        self._key = ()

    def see(self) -> None:
        """Makes the filters anew if what they are made of has changed."""
        conv, norm = self.conv, self.norm
        if norm is None:
            sources, eps = (conv.weight, conv.bias), None
        else:
            sources = (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
            eps = norm.eps
        key = (_steps, eps, *[None if s is None else (s.data_ptr(), changes_of(s), s.dtype) for s in sources])
        if key == self._key:
            return
        self.folded = Folded(sources, eps, conv.weight.dim() == 4 and self.any_layout, self.activation)
        self._key = key

    def __call__(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.laid_out(_computed([self], self._compute, input, residual))

    def layers(self) -> list[FusedLayer]:
        return [self.folded.layer]

    def arguments(self) -> tuple[Any, ...]:
        """Those of a step of a chain."""
        conv = self.conv
        weight, bias, activation, prepared = self.folded.layer
        return (weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups, activation, prepared)

    def _compute(self, input: Tensor, residual: Tensor | None, layer: FusedLayer) -> Tensor | None:
        conv = self.conv
        weight, bias, _, prepared = layer
        return conv_fused(
            *(input, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups),
            *(self.activation, residual, prepared, self.ends_residual, self.in_place),
        )

    def unfused(self, input: Tensor, residual: Tensor | None) -> Tensor:
        y = self.conv(input)
        if self.norm is not None:
            y = self.norm(y)
        if residual is not None:
            y = y.add_(residual) if self.in_place else y + residual
        return apply_activation(self.activation, y)

    def laid_out(self, result: Tensor) -> Tensor:
        if self.any_layout or result.dim() != 4 or is_channels_last(self.conv.weight):
            return result
        # The model's own code may ask for a view of it.
        return result.contiguous()


class FusedLinear:
    """One linear layer, and the activation or the sum that follows it."""

    def __init__(self, linear: nn.Linear, activation: str, after: torch.nn.Module | None, in_place: bool) -> None:
        self.linear = linear
        self.activation = activation
        #: Whether the residual is added in place.
        self.in_place = in_place
        #: The activation's module, if it is one.
        self.after = after

    def __call__(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return self.linear.forward_act(input, self.activation)
        return self.linear.forward_add(input, residual, self.in_place)

    def modules(self) -> list[torch.nn.Module]:
        return [self.linear]

    def kept(self) -> list[torch.nn.Module]:
        return [] if self.after is None else [self.after]

    def as_traced(self) -> bool:
        return type(self.linear) is nn.Linear  # it may have been quantized

    def places(self) -> list[Place]:
        return []  # of its weights it knows itself whether a packed copy is that of this one


class InvertedResidual:
    """Two or three convolutions that one kernel computes, each with what follows it: one to many channels, if there is one,
    a depthwise and a pointwise one."""

    #: Its kernel reads the residual while it writes: the result never lies there.
    ends_residual = False

    def __init__(self, layers: list[FusedConv]) -> None:
        self._calls = layers

    def __call__(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.laid_out(_computed(self._calls, self._compute, input, residual))

    def laid_out(self, result: Tensor) -> Tensor:
        return self._calls[-1].laid_out(result)

    def layers(self) -> list[FusedLayer]:
        return [call.folded.layer for call in self._calls]

    @property
    def any_layout(self) -> bool:
        return self._calls[-1].any_layout

    def arguments(self) -> tuple[Any, ...]:
        """Those of a step of a chain."""
        return self._arguments(self.layers())

    def _arguments(self, layers: Sequence[FusedLayer]) -> tuple[Any, ...]:
        conv = self._calls[0].conv
        first = (layers[0], conv.stride, conv.padding) if len(layers) == 3 else (None, 1, 0)
        return (*first, layers[-2], self._calls[-2].conv.stride[0], layers[-1])

    def _compute(self, input: Tensor, residual: Tensor | None, *layers: FusedLayer) -> Tensor | None:
        return inverted_residual(input, residual, *self._arguments(layers), self._calls[-1].in_place)


class Pool:
    """A pooling within a chain."""

    any_layout, ends_residual = True, False

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    @classmethod
    def of(cls, module: torch.nn.Module) -> Pool | None:
        """None where the kernels take no such windows."""
        if type(module) not in (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d):
            return None
        if getattr(module, "return_indices", False):
            return None
        pool = cls(module)
        numbers = [n for each in pool.arguments()[1] for n in (each if type(each) is tuple else (each,))]
        return pool if all(n is None or type(n) in (int, bool) for n in numbers) else None

    def __call__(self, input: Tensor, residual: None = None) -> Tensor:
        return self.module(input)

    def laid_out(self, result: Tensor) -> Tensor:
        return result

    def layers(self) -> list[FusedLayer]:
        return []

    def arguments(self) -> tuple[Any, ...]:
        """Those of a step of a chain."""
        m = self.module
        if isinstance(m, nn.AdaptiveAvgPool2d):
            return AVERAGE, (m.output_size,)
        if isinstance(m, nn.AvgPool2d):
            counted = (m.count_include_pad, m.divisor_override)
            return AVERAGE, (m.kernel_size, m.stride, m.padding, 1, m.ceil_mode, *counted)
        return MAXIMUM, (m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, True, None)


class Step(NamedTuple):
    """A call of a chain, and the values that it reads: first the chain's inputs are counted, then the results."""

    call: FusedConv | InvertedResidual | Pool
    input: int
    residual: int | None
    #: Which values nothing reads after it.
    ended: list[int]


class _Whole:
    """The one call that a chain is, made of some layers."""

    def __init__(self) -> None:
        self.layers: list[FusedLayer] = []
        self.chain: _cpu.Chain | None = None


class Chain:
    """Fused calls of which only the last's result is read by others: one call, where the kernels take all of them."""

    def __init__(self, inputs: int, steps: list[Step]) -> None:
        self._inputs = inputs
        self._steps = steps
        self.forget()

    def forget(self) -> None:
        """To be called when filters were made anew."""
        # What another thread makes of the old ones meanwhile goes with this.
        self._whole = _Whole()

    def __call__(self, *inputs: Tensor) -> Tensor:
        whole = self._whole
        if whole.chain is not None:
            result = whole.chain.run(empty_image, *inputs)
            if result is not None:
                return self._steps[-1].call.laid_out(result)
        result = self._one_by_one(inputs)
        self._see(whole)
        return result

    def _one_by_one(self, inputs: tuple[Tensor, ...]) -> Tensor:
        values: list[Tensor | None] = list(inputs)
        for call, input, residual, ended in self._steps:
            result = call(values[input], None if residual is None else values[residual])
            for number in ended:
                values[number] = None
            values.append(result)
        return result

    def _see(self, whole: _Whole) -> None:
        """Makes the one call of what the kernels keep, if that has changed."""
        layers = [layer for step in self._steps for layer in step.call.layers()]
        if not cpu.has_table or list(map(id, layers)) == list(map(id, whole.layers)):
            return
        steps = [
            (input, -1 if residual is None else residual, call.ends_residual, call.arguments())
            for call, input, residual, _ in self._steps
        ]
        whole.layers, whole.chain = layers, _cpu.Chain.of(steps, self._inputs)


def _computed(
    calls: list[FusedConv], compute: Callable[..., Tensor | None], input: Tensor, residual: Tensor | None
) -> Tensor:
    """compute's result for the input, the residual and the layers of these calls, of which that of the last is returned."""
    folded = [call.folded for call in calls]
    layers = [one.layer for one in folded]
    before = [layer[3].nbytes for layer in layers]
    result = compute(input, residual, *layers)
    if result is None:
        if not is_straight("conv", input):
            # What looks on would see the folding.
            for call in calls:
                input = call.unfused(input, residual if call is calls[-1] else None)
            return input
        layers = [one.whole() for one in folded]
        result = compute(input, residual, *layers)
    for one, layer, size in zip(folded, layers, before, strict=True):
        prepared_more = layer[3].nbytes > size
        if prepared_more or layer is not one.layer:
            one.keep(layer, prepared_more)
    return result


class Calls:
    """All fused calls of a forward, and whether they are of the model as it is now."""

    def __init__(
        self,
        guards: Guards,
        convolutions: list[FusedConv],
        linears: list[FusedLinear],
        chains: list[Chain],
        kept: list[torch.nn.Module],
    ) -> None:
        """``kept``: modules that are not called any more, or of which it was assumed what they do."""
        self.convolutions = convolutions
        self.linears = linears
        self._chains = chains
        self._calls = [*convolutions, *linears]
        self._guards = guards
        guards.pin(module for call in self._calls for module in call.modules())
        guards.keep([module for call in self._calls for module in call.kept()] + kept)
        self._seen = _steps
        self._watch: _cpu.Watch | None = None

    def unchanged(self) -> bool:
        """Whether the modules are what they were when they were traced, but for modes and hooks."""
        return self._guards.unchanged() and all(call.as_traced() for call in self._calls)

    def as_traced(self) -> bool:
        """Whether they do what they did, and nobody watches."""
        return self._guards.as_traced() and all(call.as_traced() for call in self._calls)

    def are_current(self) -> bool:
        """The same; makes the filters then, if anything has changed."""
        watch = self._watch
        if watch is not None and self._seen == _steps and watch.same():
            return True
        # Before the rest: a change meanwhile is seen by the next call.
        seen, watch = _steps, _cpu.Watch(self._places())
        if not self.as_traced():
            return False
        for call in self.convolutions:
            call.see()
        for chain in self._chains:
            chain.forget()
        self._seen, self._watch = seen, watch
        return True

    def refute(self) -> None:
        """To be called where the graph has turned out not to hold good."""
        self._guards.refute()
        self._watch = None

    def make_anew(self) -> None:
        """Folds all filters again, where the model can be run so now."""
        for call in self.convolutions:
            call.forget()
        self._watch = None
        self.are_current()

    def _places(self) -> list[Place]:
        """Where all lies on which it depends whether and how these are run."""
        return self._guards.places() + [place for call in self._calls for place in call.places()]
