"""Calibration: the model runs on some of its inputs, in eval mode, while observers look at what the layers are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .chain import Part
from .config import Int8Static
from .layers import Rule, joined
from .observers import Observer


def run_on(model: torch.nn.Module, input: Any) -> Any:
    """``model``'s answer to one of the inputs of a calibration: a tensor, positional arguments, or keyword arguments."""
    if isinstance(input, Tensor):
        return model(input)
    if isinstance(input, Mapping):
        return model(**input)
    if isinstance(input, (tuple, list)):
        return model(*input)
    raise TypeError(f"expected a tensor, a tuple, a list or a mapping as the model's input, got {type(input).__name__}")


class in_eval_mode:
    """Inside of it the model is in eval mode and no gradients are recorded; after it every module is in the mode it had."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._modes = {module: module.training for module in self._model.modules()}
        self._no_grad = torch.no_grad()
        self._no_grad.__enter__()
        self._model.eval()

    def __exit__(self, *error: Any) -> None:
        self._no_grad.__exit__(*error)
        for module, mode in self._modes.items():
            module.training = mode


def calibrate(
    model: torch.nn.Module,
    config: Int8Static,
    layers: list[tuple[str, torch.nn.Module, Rule]],
    parts: Sequence[Part] = (),
) -> dict[str, Observer]:
    """What each layer's observer has seen of its inputs while the model ran on the data; by the layers' names. The parts make
    their layers from what they have seen."""
    observers = {name: config.make_observer() for name, _, _ in layers}
    if config.ranges is not None:
        try:
            for name, observer in observers.items():
                observer.observe(torch.tensor(config.ranges[joined(name, "input")]))
            for part in parts:
                part.take_ranges(config.ranges)
                part.make()
        except KeyError as error:
            raise ValueError(
                f"quantize_: {error.args[0]}_scale is missing in the state_dict that Int8Static was given: that of another model"
            ) from None
        return observers
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            observers[name].observe(args[0] if args else next(iter(kwargs.values())))

        return hook

    count = 0
    try:
        for name, layer, _ in layers:
            handles.append(layer.register_forward_pre_hook(watch(name), with_kwargs=True))
        with in_eval_mode(model):
            for input in config.inputs():
                run_on(model, input)
                count += 1
            # By themselves: while a part is looked into its layers are called twice.
            for handle in handles:
                handle.remove()
            handles = [part.module.register_forward_pre_hook(part.observe, with_kwargs=True) for part in parts]
            for input in config.inputs() if parts else ():
                run_on(model, input)
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise ValueError(
            "quantize_: Int8Static needs calibration_data, got none: it is empty, or was used up before (the state of a model that"
            " is quantized already does without: Int8Static.from_state_dict)"
        )
    for name, observer in observers.items():
        try:
            observer.range()
        except ValueError as error:
            raise ValueError(
                f"quantize_: {name or 'the model'} saw no finite value while the model ran on {count} inputs of"
                " calibration_data; leave it with skip=, or give data that reaches it"
            ) from error
    try:
        for part in parts:
            part.make()
    except ValueError as error:
        raise ValueError(
            f"quantize_: a convolution saw no finite value while the model ran on {count} inputs of calibration_data; leave it"
            " with skip=, or give data that reaches it"
        ) from error
    return observers
