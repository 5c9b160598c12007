"""The ops as torch.library knows them: ``torch.ops.fastnn.*``, which compile, export and every tracer can see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _route

_LIBRARY = torch.library.Library("fastnn", "DEF")
#: The device of torch.autocast and its dispatch key.
_AUTOCAST = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}


def define(
    schema: str,
    *,
    impl: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    vmap: Callable[..., tuple[Tensor, int | None]],
    autocast: bool,
) -> None:
    """Registers ``fastnn::<schema>``.

    ``impl`` takes plain tensors on a CPU or a GPU, ``fake`` tensors without data. ``setup_context`` and ``backward`` are as in
    torch.library.register_autograd, ``vmap`` as in torch.library.register_vmap. With ``autocast``, tensors take the
    dtype of torch.autocast (torch.library.register_autocast knows one dtype only, fixed at registration).
    """
    name = schema[: schema.index("(")]
    qualified = f"fastnn::{name}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, impl, "CPU")
    _LIBRARY.impl(name, impl, "CUDA")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    torch.library.register_vmap(qualified, vmap, lib=_LIBRARY)
    if autocast:
        op = getattr(torch.ops.fastnn, name).default

        def cast_and_call(device: str) -> Callable[..., Tensor]:
            keys = torch._C.DispatchKeySet(_AUTOCAST[device])

            def call(*args: Any, **kwargs: Any) -> Tensor:
                dtype = torch.get_autocast_dtype(device)
                with torch._C._ExcludeDispatchKeyGuard(keys):
                    args = tuple(_route.cast(arg, dtype) if isinstance(arg, Tensor) else arg for arg in args)
                    return op(*args, **kwargs)

            return call

        for device, key in _AUTOCAST.items():
            _LIBRARY.impl(name, cast_and_call(device), key.name)
