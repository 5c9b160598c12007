"""Cross-layer equalization: layers that lose less to quantization, and compute what they did before.

Source: Nagel, van Baalen, Blankevoort, Welling 2019, "Data-free quantization through weight equalization and bias
correction" (ICCV, arXiv:1906.04721), section 4.1. Between two layers lies a function with f(s x) = s f(x) for s > 0, such
as relu, so that W₂ f(W₁ x + b₁) = W₂S f(S⁻¹W₁ x + S⁻¹b₁) for any positive diagonal S. Channel i of both weights spans the
same range, √(r₁ r₂), with s = √(r₁ / r₂), r₁ and r₂ being the largest magnitudes of row i of W₁ and of column i of W₂. Layers
may be both a first and a second one, so that the steps are repeated until nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .._modules import Model, check_model
from .links import LAYERS, Link, Use, channels_in, channels_out, find_links, owners_of, why_not_changed

#: Nothing changes any more when no factor of a sweep is further from 1 than this.
_SETTLED = 1e-3
_SWEEPS = 100
#: No channel is scaled by more: beyond, float16 could leave its range.
_LARGEST = 2.0**12


def equalize_(model: Model, *, pairs: Iterable[Sequence[str]] | None = None) -> Model:
    """Gives the channels between linear layers or convolutions equal ranges in both weights, in place; returns the model.

    Call it before :func:`quantize_`. The model computes what it did, to the rounding of each weight, in training as well;
    what changes is the scale of the values between two layers, channel by channel. It helps where channels are very
    unequal, and where inputs are quantized as well (:class:`Int8Dynamic`, :class:`Int8Static`). Each row of a weight
    has a scale of its own here, so that the first of two layers has nothing to gain; a weight-only scheme can lose by
    it (see docs/quantization.md).

    Args:
        model: a float model. Where a batch norm follows a layer its weight and bias are scaled, and the ranges are those of
            the filters with the norm folded into them; such a model should be in eval mode when it is used.
        pairs: names of layers ``(first, second)`` that follow each other with a positively homogeneous function, and nothing
            else, between them; nothing checks that. All pairs that ``torch.fx`` can find are taken by default: relu, leaky
            relu, PReLU, pooling, dropout and flattening may lie between, and a channel may be taken in by several layers.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``pairs`` names a layer that there is not, is neither linear nor a convolution, shares its weight, or
            does not take in as many channels as the other hands on; or a weight is not finite. The model is as it was.
    """
    check_model("equalize_", model)
    if pairs is None:
        links = [link for link in find_links(model, homogeneous=True).values() if isinstance(link, Link)]
    else:
        links = _named_links(model, pairs)
    for name, module in {
        use.name: use.module for link in links for use in [*link.uses, Use(link.name, link.module)]
    }.items():
        if not module.weight.isfinite().all():
            raise ValueError(f"equalize_: the weight of {name} has values that are not finite")
    _apply(links, _factors(links))
    return model


def _named_links(model: torch.nn.Module, pairs: Iterable[Sequence[str]]) -> list[Link]:
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = owners_of(model)
    links: dict[str, Link] = {}
    if not isinstance(pairs, Iterable):
        raise ValueError(f"equalize_: pairs must hold pairs of names, got {pairs!r}")
    for pair in pairs:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"equalize_: pairs must hold pairs of names, got {pair!r}")
        for name in pair:
            if name not in modules:
                raise ValueError(f"equalize_: pairs names {name!r}, which is no module of the model")
            if type(modules[name]) not in LAYERS:
                kind = type(modules[name]).__name__
                raise ValueError(
                    f"equalize_: pairs names {name!r}, a {kind}; expected Linear, Conv1d, Conv2d or Conv3d"
                )
            reason = why_not_changed(modules[name], owners)
            if reason is not None:
                raise ValueError(f"equalize_: {name} cannot be scaled: {reason}")
        first, second = (modules[name] for name in pair)
        repeat, rest = divmod(channels_in(second), channels_out(first))
        if rest or repeat == 0 or first is second:
            raise ValueError(
                f"equalize_: {pair[0]} hands on {channels_out(first)} channels and {pair[1]} takes {channels_in(second)} in"
            )
        if any(use.name == pair[1] for link in links.values() for use in link.uses):
            raise ValueError(f"equalize_: pairs names {pair[1]!r} twice as the second")
        links.setdefault(pair[0], Link(pair[0], first)).uses.append(Use(pair[1], second, repeat))
    return list(links.values())


def _magnitudes(module: torch.nn.Module) -> Tensor:
    """The largest magnitude with which each output sees each of its inputs: of all the taps of a filter."""
    return module.weight.detach().abs().flatten(2).amax(2) if module.weight.dim() > 2 else module.weight.detach().abs()


def _largest_columns(use: Use, magnitudes: Tensor) -> Tensor:
    """The largest of them for each channel."""
    groups = getattr(use.module, "groups", 1)
    by_input = magnitudes.view(groups, magnitudes.shape[0] // groups, -1).amax(1).flatten()
    return by_input.view(-1, use.repeat).amax(1)


def _by_column(use: Use, factor: Tensor) -> Tensor:
    """The factor of each channel, as a matrix that multiplies (outputs, inputs)."""
    weight = use.module.weight
    groups = getattr(use.module, "groups", 1)
    by_group = factor.repeat_interleave(use.repeat).view(groups, 1, -1)
    return by_group.expand(-1, weight.shape[0] // groups, -1).reshape(weight.shape[:2])


def _rows(factor: Tensor, weight: Tensor) -> Tensor:
    return factor.view(-1, *[1] * (weight.dim() - 1))


def _folded(link: Link) -> Tensor:
    """What the batch norm after a layer multiplies each of its channels with."""
    norm = link.norm
    if norm is None:
        return torch.ones(link.channels, dtype=torch.float64, device=link.module.weight.device)
    return norm.weight.detach().double().abs() * (norm.running_var.double() + norm.eps).rsqrt()


@torch.no_grad()
def _factors(links: list[Link]) -> list[Tensor]:
    """S of each link, in float64."""
    total = [torch.ones(link.channels, dtype=torch.float64, device=link.module.weight.device) for link in links]
    # Each link's first layer may be another's second: its columns grow with that one's factors.
    incoming = {id(use.module): (index, use) for index, link in enumerate(links) for use in link.uses}
    outgoing = {id(link.module): index for index, link in enumerate(links)}
    sizes = {
        id(m): _magnitudes(m).double() for link in links for m in [link.module, *(use.module for use in link.uses)]
    }
    norms = [_folded(link) for link in links]
    for _ in range(_SWEEPS):
        furthest = 1.0
        for index, link in enumerate(links):
            size = sizes[id(link.module)]
            if id(link.module) in incoming:
                before, use = incoming[id(link.module)]
                size = size * _by_column(use, total[before])
            first = size.amax(1) * norms[index] / total[index]
            second = torch.zeros_like(first)
            for use in link.uses:
                size = sizes[id(use.module)]
                if id(use.module) in outgoing:
                    after = outgoing[id(use.module)]
                    size = size * (norms[after] / total[after]).unsqueeze(1)
                second = second.maximum(_largest_columns(use, size) * total[index])
            # A channel that is zero on either side has no range to give away.
            alive = (first > 0) & (second > 0)
            new = (total[index] * torch.where(alive, (first / second).sqrt(), 1.0)).clamp(1 / _LARGEST, _LARGEST)
            furthest = max(furthest, (new / total[index]).log().abs().max().exp().item())
            total[index] = new
        if math.log(furthest) <= _SETTLED:
            break
    return total


@torch.no_grad()
def _apply(links: list[Link], factors: list[Tensor]) -> None:
    # First all products, then all writes, so that a failure changes nothing; each weight is rounded once.
    columns = {id(use.module): _by_column(use, s) for link, s in zip(links, factors, strict=True) for use in link.uses}
    rows = {id(link.module): (link, 1 / s) for link, s in zip(links, factors, strict=True)}
    writes: list[tuple[Tensor, Tensor]] = []
    layers = {id(m): m for link in links for m in [link.module, *(use.module for use in link.uses)]}
    for key, module in layers.items():
        weight = module.weight.double()
        if key in columns:
            by_column = columns[key]
            weight = weight * by_column.view(*by_column.shape, *[1] * (weight.dim() - 2))
        if key in rows:
            link, inverse = rows[key]
            if link.norm is None:
                weight = weight * _rows(inverse, weight)
            held = module if link.norm is None else link.norm
            if link.norm is not None:
                writes.append((held.weight, held.weight.double() * inverse))
            if held.bias is not None:
                writes.append((held.bias, held.bias.double() * inverse))
        writes.append((module.weight, weight))
    for parameter, value in writes:
        parameter.copy_(value)
