"""Pruning: weights that are zero, and models with fewer channels.

:func:`prune_magnitude_` sets the smallest weights to zero (Han, Pool, Tran, Dally 2015, "Learning both weights and connections
for efficient neural networks", NeurIPS, arXiv:1506.02626). The kernels multiply by zeros like by anything else: it saves
no time and, until the file is compressed, no memory.

:func:`prune_channels_` removes whole output channels together with the inputs of the layers that read them (Li, Kadav,
Durdanovic, Samet, Graf 2017, "Pruning filters for efficient ConvNets", ICLR, arXiv:1608.08710). What is left is a smaller
dense model, which runs faster on the same kernels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils import prune

from .._modules import Model, Selection, check_model, selected
from .links import BATCH_NORM, CONV, LAYERS, LINEAR, Link, Use, find_links


def prune_magnitude_(
    model: Model,
    sparsity: float,
    *,
    scope: str = "layer",
    only: Selection | None = None,
    skip: Selection | None = None,
) -> Model:
    """Sets the weights of smallest magnitude to zero, and keeps them there, in place; returns the model.

    As by :mod:`torch.nn.utils.prune`: each layer's parameter is now ``weight_orig``, there is a buffer ``weight_mask``, and the
    weight is their product, computed at each call, so that what is pruned stays zero in training. Called again with more
    sparsity, what was zero stays so. :func:`remove_masks_` makes ``weight`` a parameter again. **It saves no time**: the
    kernels are dense. :func:`prune_channels_` does.

    Args:
        sparsity: the share of weights that become zero, 0 to 1; their number is rounded to the nearest. Of equal ones the
            first.
        scope: ``"layer"``: this share of each layer; ``"model"``: of all of them, by one threshold.
        only, skip: which modules, as for :func:`fastnn.convert`. Linear layers and convolutions among them are pruned.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: another sparsity or scope, no layer to prune, or a weight that is parametrized already, shared, or not
            finite. The model is as it was.
    """
    _check("prune_magnitude_", model, sparsity)
    if scope not in ("layer", "model"):
        raise ValueError(f"prune_magnitude_: scope must be 'layer' or 'model', got {scope!r}")
    chosen = selected("prune_magnitude_", model, only, skip)
    layers = {name: module for name, module in model.named_modules() if type(module) in LAYERS and id(module) in chosen}
    if not layers:
        raise ValueError("prune_magnitude_: the model has no linear layer or convolution to prune")
    for name, module in layers.items():
        masked = any(isinstance(hook, prune.BasePruningMethod) for hook in module._forward_pre_hooks.values())
        if "weight" not in module._parameters and not masked:
            raise ValueError(f"prune_magnitude_: the weight of {name} is computed at each call")
        if not module.weight.isfinite().all():
            raise ValueError(f"prune_magnitude_: the weight of {name} has values that are not finite")
    sizes = [module.weight.detach().abs().flatten() for module in layers.values()]
    if scope == "layer":
        masks = [_mask(size, sparsity) for size in sizes]
    else:
        masks = list(_mask(torch.cat(sizes), sparsity).split([len(size) for size in sizes]))
    for module, mask in zip(layers.values(), masks, strict=True):
        prune.custom_from_mask(module, "weight", mask.view_as(module.weight).to(module.weight.dtype))
    return model


def _mask(size: Tensor, sparsity: float) -> Tensor:
    mask = torch.ones_like(size, dtype=torch.bool)
    mask[size.argsort(stable=True)[: round(sparsity * len(size))]] = False
    return mask


def remove_masks_(model: Model) -> Model:
    """Makes the pruned weights parameters again, with their zeros, which training may change from now on; returns the model.

    Raises TypeError if ``model`` is no module.
    """
    check_model("remove_masks_", model)
    for module in model.modules():
        if hasattr(module, "weight_mask") and prune.is_pruned(module):
            prune.remove(module, "weight")
    return model


def prunable_channels(model: torch.nn.Module) -> dict[str, str]:
    """For each linear layer and convolution an empty string if :func:`prune_channels_` can remove its channels, or why not.

    Raises TypeError if ``model`` is no module.
    """
    check_model("prunable_channels", model)
    links = find_links(model, homogeneous=False)
    return {name: link if isinstance(link, str) else "" for name, link in links.items()}


def prune_channels_(
    model: Model,
    sparsity: float,
    *,
    multiple: int = 1,
    only: Selection | None = None,
    skip: Selection | None = None,
) -> Model:
    """Removes output channels of linear layers and convolutions, and the inputs that they were, in place; returns the model.

    The layers are as narrow as if they had been made so: other sizes, other parameters (make optimizers after it). Which
    layers read a channel is found by ``torch.fx``. Batch norms, PReLU and depthwise convolutions on the way lose the
    channel as well; activations, pooling, dropout and flattening may lie between. What it costs in accuracy a few epochs
    of training mostly bring back.

    A channel counts by the norm of the weights that make it (times the batch norm's factor) times that of the weights that
    read it: how the two share its scale, which :func:`equalize_` changes, makes no difference.

    Args:
        sparsity: the share of each layer's channels that is removed, 0 to 1, rounded down; one channel at least is left.
        multiple: the number of channels that are left is rounded up to a multiple of this: of 16 for full vectors, of 32 if the
            groups of :class:`Int4WeightOnly` are to divide what the next layers take in.
        only, skip: which modules, as for :func:`fastnn.convert`. By default all layers whose channels can be removed
            (:func:`prunable_channels`).

    Raises:
        TypeError: ``model`` is no module.
        ValueError: another sparsity or multiple; no layer's channels can be removed; or those of a layer that ``only``
            asks for cannot: the last layer's, which are the model's result, those that are added to others in a residual
            connection, those whose way cannot be followed; it names each layer and the reason. The model is as it was.
    """
    _check("prune_channels_", model, sparsity)
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"prune_channels_: multiple must be a positive integer, got {multiple!r}")
    chosen = selected("prune_channels_", model, only, skip)
    found = {
        name: link
        for name, link in find_links(model, homogeneous=False).items()
        if id(model.get_submodule(name)) in chosen
    }
    refused = {name: reason for name, reason in found.items() if isinstance(reason, str)}
    links = [link for link in found.values() if isinstance(link, Link)]
    if refused and (only is not None or not links):
        lines = "".join(f"\n  {name}: {reason}" for name, reason in refused.items())
        raise ValueError(f"prune_channels_: the channels of these layers cannot be removed:{lines}")
    if not links:
        raise ValueError("prune_channels_: the model has no linear layer or convolution to prune")
    changes = [change for link in links for change in _narrowed(link, _kept(link, sparsity, multiple))]
    # A layer may lose inputs by one change and outputs by another, in either order.
    for module, name, dim, keep in changes:
        tensor = getattr(module, name)
        narrow = tensor.detach().index_select(dim, keep)
        if name in module._parameters:
            narrow = torch.nn.Parameter(narrow, requires_grad=tensor.requires_grad)
        setattr(module, name, narrow)
    for link in links:
        _set_sizes(link)
    return model


def _check(function: str, model: torch.nn.Module, sparsity: float) -> None:
    check_model(function, model)
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity <= 1:
        raise ValueError(f"{function}: sparsity must be a number from 0 to 1, got {sparsity!r}")


@torch.no_grad()
def _kept(link: Link, sparsity: float, multiple: int) -> Tensor:
    """The channels that stay, in order."""
    channels = link.channels
    left = max(1, channels - int(sparsity * channels))
    left = min(channels, -(-left // multiple) * multiple)
    importance = link.module.weight.double().flatten(1).norm(dim=1)
    for module in [link.norm, *link.between]:
        if type(module) in BATCH_NORM and module.weight is not None:
            importance = importance * module.weight.double().abs() * (module.running_var.double() + module.eps).rsqrt()
        elif type(module) in CONV:
            importance = importance * module.weight.double().flatten(1).norm(dim=1)
    # A linear layer that reads a map has several columns for it.
    squares = [use.module.weight.double().square().sum(0).view(channels, -1).sum(1) for use in link.uses]
    importance = importance * torch.stack(squares).sum(0).sqrt()
    return importance.argsort(descending=True, stable=True)[:left].sort().values


def _narrowed(link: Link, keep: Tensor) -> Iterable[tuple[torch.nn.Module, str, int, Tensor]]:
    """What becomes narrower: the module, the name of its tensor, the dimension, and the indices that stay."""
    for module in [link.module, link.norm, *link.between]:
        if module is not None:
            for name in ("weight", "bias", "running_mean", "running_var"):
                if getattr(module, name, None) is not None:
                    yield module, name, 0, keep
    for use in link.uses:
        columns = (keep.unsqueeze(1) * use.repeat + torch.arange(use.repeat, device=keep.device)).flatten()
        yield use.module, "weight", 1, columns


def _set_sizes(link: Link) -> None:
    channels = link.module.weight.shape[0]
    if type(link.module) in LINEAR:
        link.module.out_features = channels
    else:
        link.module.out_channels = channels
    for module in [link.norm, *link.between]:
        if type(module) in BATCH_NORM:
            module.num_features = channels
        elif type(module) is torch.nn.PReLU:
            module.num_parameters = channels
        elif module is not None:
            module.in_channels = module.out_channels = module.groups = channels
    for use in link.uses:
        _set_inputs(use)


def _set_inputs(use: Use) -> None:
    inputs = use.module.weight.shape[1]
    if type(use.module) in LINEAR:
        use.module.in_features = inputs
    else:
        use.module.in_channels = inputs
