"""Which way a call goes: the question every op asks first, and the errors it answers bad input with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .. import _state
from ..backends import cpu, supports

is_dynamo_compiling = torch.compiler.is_dynamo_compiling
is_compiling = torch.compiler.is_compiling
is_grad_enabled = torch.is_grad_enabled
is_autocast_enabled = torch.is_autocast_enabled
is_any_autocast_enabled = torch._C._is_any_autocast_enabled
dispatch_modes = torch._C._len_torch_dispatch_stack
functorch_active = torch._C._are_functorch_transforms_active
tracing_state = torch._C._get_tracing_state
# What torch.autograd.grad(is_grads_batched=True) gives a backward: it knows torch's own ops alone.
is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor

#: The types that hold data as torch knows it. Anything else may compute something else. (A tuple: Dynamo before torch 2.10
#: does not see into a set of types.)
PLAIN = (Tensor, Parameter)

#: Ordinary tensors, ordinary mode: kernels straight, with a classic autograd.Function where a gradient is wanted.
EAGER = "eager"
#: Something traces or has no data (compile, export, fake, meta, dispatch modes): the ops in torch.ops.fastnn.
LIBRARY = "library"
#: torch.func transforms and forward-mode AD: autograd.Functions that have vmap and jvp rules.
TRANSFORM = "transform"
#: The formula in plain torch, asked for by ``backend("reference")``.
REFERENCE = "reference"


#: What can be asked for without changing the way of a CPU tensor.
_ON_CPU = (None, "cpu")


class Unsupported(Exception):
    """The op cannot take this call; args[0] says why."""


def route(op: str, *tensors: Tensor | None) -> str:
    """The way of a call whose arguments are well formed. Raises :class:`Unsupported` where it is torch's."""
    transformed = functorch_active() or forward_ad._current_level >= 0
    library = is_dynamo_compiling()
    if library and transformed:
        # Dynamo traces a transform's inside; the rules of an op in torch.library end at vmap.
        raise Unsupported("a torch.func transform inside of torch.compile")
    if not transformed:
        library = library or is_compiling() or dispatch_modes() > 0 or tracing_state() is not None
    for tensor in tensors:
        if tensor is None:
            continue
        kind = type(tensor)
        if kind not in PLAIN:
            if issubclass(kind, (FakeTensor, FunctionalTensor)):
                library = not transformed
            elif not is_compiling() and not _is_plain_subclass(kind):
                raise Unsupported(f"a tensor of type {kind.__name__}, which answers torch's functions itself")
        if tensor.is_meta and not transformed:
            library = True
        if not library and is_legacy_batched(tensor):
            raise Unsupported("a batch of gradients (is_grads_batched)")
        if not library and not transformed and not _has_memory(tensor):
            raise Unsupported("a tensor without memory of its own")
    reason = supports(op, *tensors)
    if reason is not None:
        raise Unsupported(reason)
    if library:
        return LIBRARY
    if transformed:
        return TRANSFORM
    if _state.settings().backend == "reference":
        return REFERENCE
    return EAGER


def _has_memory(tensor: Tensor) -> bool:
    """False for what escaped from a transform, and for the zeros that forward mode makes."""
    return not (is_wrapped(tensor) or torch._is_functional_tensor(tensor) or tensor._is_zerotensor())


def is_straight(op: str, *tensors: Tensor) -> bool:
    """In a backward: whether the kernels of ``op`` can be called on these as they are, with nothing looking on."""
    return (
        not is_dynamo_compiling()
        and not is_grad_enabled()
        and not functorch_active()
        # Both go on where gradients are off.
        and forward_ad._current_level < 0
        and tracing_state() is None
        and dispatch_modes() == 0
        and _runs(op, *tensors)
        and all(
            type(tensor) in PLAIN
            and tensor.layout is torch.strided
            and tensor.dtype is tensors[0].dtype
            and tensor.dtype in cpu.FLOAT
            and not is_legacy_batched(tensor)
            and _has_memory(tensor)
            for tensor in tensors
        )
    )


def _runs(op: str, *tensors: Tensor) -> bool:
    backend = _state.settings().backend
    if backend in _ON_CPU and all(tensor.is_cpu for tensor in tensors):
        return True  # the kernels of a CPU are complete
    return backend != "reference" and supports(op, *tensors) is None


def _is_plain_subclass(kind: type) -> bool:
    """Such as torch.nn.Buffer: a name for a tensor, with nothing of its own."""
    return (
        kind.__torch_function__ is torch._C._disabled_torch_function_impl
        and getattr(kind, "__torch_dispatch__", None) is torch._C._disabled_torch_dispatch_impl
    )


def needs_library(*tensors: Tensor) -> bool:
    """Below the transforms: whether these tensors are traced, or have no data."""
    return dispatch_modes() > 0 or any(tensor.is_meta or type(tensor) not in PLAIN for tensor in tensors)


def wants_grad(*tensors: Tensor | None) -> bool:
    return is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as torch.autocast hands them to a matrix product, where it is on for the device of the first one."""
    device = autocast_device(*tensors)
    if not is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(cast(tensor, dtype) for tensor in tensors)


def autocast_device(*tensors: Tensor | None) -> str:
    return "cuda" if any(tensor is not None and tensor.is_cuda for tensor in tensors) else "cpu"


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or not tensor.is_floating_point() or tensor.dtype is torch.float64:
        return tensor
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def resolve(tensor: Tensor | None) -> Tensor | None:
    """A kernel reads memory, which a lazily negated view (of a conjugate's imaginary part) does not hold."""
    return tensor.resolve_neg() if tensor is not None and tensor.is_neg() else tensor


def fall_back(op: str, reason: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """torch's answer to a call that the kernels do not take, counted; or torch's exception with our reason added."""
    result = ask_torch(op, reason, function, *args, **kwargs)
    _state.count_fallback(op, reason)
    return result


def ask_torch(op: str, reason: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if is_compiling():
        return function(*args, **kwargs)
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise_as(error, f"fastnn.{op}: {reason} (torch: {error})")


def raise_as(error: Exception, message: str) -> NoReturn:
    """Raises the type of torch's own error, so that code which catches it goes on doing so."""
    try:
        clearer = type(error)(message)
    except Exception:  # a type with a constructor of its own
        raise error from None
    raise clearer from error


def describe(name: str, value: Any) -> str:
    """An argument in an error message: its name, shape and dtype."""
    if is_dynamo_compiling():  # sizes may be symbols, of which Dynamo makes no text
        return name
    if isinstance(value, Tensor):
        try:
            shape = tuple(value.shape)
        except RuntimeError:  # nested tensors have no shape
            shape = ("?",)
        return f"{name} {str(shape).replace(',)', ')')} {str(value.dtype).removeprefix('torch.')}"
    return (
        f"{name} {value!r}"
        if isinstance(value, (int, float, str, type(None)))
        else f"{name} of type {type(value).__name__}"
    )
