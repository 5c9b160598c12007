"""Modules as graphs of ``torch.fx``: forwards that can be followed, and what refuses others."""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from ._graphs import APPLIED, is_alone, written
from ._snapshots import DEEPEST, changes_of, put_back, same, snapshot, tensors_in


class _Unwritten:
    """What a forward cannot write down to see what it is."""

    def __repr__(self) -> str:
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("torch.fx"):
            raise TypeError("a forward that asks how a value is written")
        return super().__repr__()

    __str__ = __repr__

    def __format__(self, how: str) -> str:
        raise TypeError("a forward that asks how a value is written")


class _Attribute(_Unwritten, fx.proxy.Attribute):
    """Of a proxy, a shape for example; what kind of object it is nobody is told."""

    @property
    def __class__(self) -> type:
        if not sys._getframe(1).f_globals.get("__name__", "").startswith(("torch.", "fastnn.")):
            raise TypeError("a forward that asks what kind of object an attribute is")
        return _Attribute


class _Proxy(_Unwritten, fx.Proxy):
    """A proxy for which ``a += b`` changes a. For those of torch.fx it is another name for a + b; and in the code that torch.fx
    writes for ``operator.iadd`` a number that is read again would be the sum, hence functions of our own.

    For ``isinstance`` in a forward it is the tensor that it stands for. Where it may stand for something else, that is refused.
    """

    @property
    def __class__(self) -> type:
        asking = sys._getframe(1).f_globals.get("__name__", "")
        if asking.startswith(("torch.fx", "torch.nn.parameter", __name__)):
            return _Proxy
        asked = not asking.startswith(("torch.", "fastnn."))  # by the forward, perhaps through torch.is_tensor
        if asked and self.node.op not in ("placeholder", "get_attr"):
            raise TypeError("a forward that asks what kind of object a result is")
        return torch.Tensor

    def __getattr__(self, name: str) -> Any:
        # What modules return may be anything.
        if self.node.op != "call_module" and not hasattr(torch.Tensor, name):
            raise AttributeError(f"a tensor has no {name}")
        return _Attribute(self, name)

    @property
    def dtype(self) -> Any:
        return self.tracer.dtype_of(self)


class UnexpectedDtype(Exception):
    """A value has not the dtype that the forward's Python was followed for."""


def expect_dtype(value: torch.Tensor, dtype: torch.dtype) -> None:
    if value.dtype is not dtype:
        raise UnexpectedDtype


for _name, _function in APPLIED.items():
    setattr(
        _Proxy,
        f"__{_name}__",
        lambda self, other, apply=_function: self.tracer.create_proxy("call_function", apply, (self, other), {}),
    )


class _Tracer(fx.Tracer):
    #: The graph reads a buffer when it runs, whatever the forward makes of it first.
    proxy_buffer_attributes = True

    def __init__(self, inline: bool = True, dtype: torch.dtype | None = None) -> None:
        """``dtype``: what a forward is told that asks for one, with a node of :func:`expect_dtype` that makes sure."""
        super().__init__()
        self._inline = inline
        self._dtype = dtype
        #: The addresses of tensors that modules hold otherwise than as attributes of theirs.
        self.held: set[int] = set()
        #: Tensors that forwards have made: themselves, what counts their changes, and the copies that the graph makes.
        self._made: list[tuple[torch.Tensor, int, fx.Node]] = []
        self._state: tuple[bool, bool] | None = None

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if self._state is not None and _grad_and_autocast() != self._state:
            raise TypeError("a context within the forward, which the graph would not have")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def dtype_of(self, proxy: fx.Proxy) -> Any:
        if self._dtype is None:
            return _Attribute(proxy, "dtype")
        self.create_node("call_function", expect_dtype, (proxy.node, self._dtype), {})
        return self._dtype

    def _copied(self, tensor: torch.Tensor) -> fx.Node:
        """A copy of a tensor that a forward has made: anew in each call, whose caller may be given it."""
        for made, _, node in self._made:
            if made is tensor:
                return node
        if tensor.untyped_storage().data_ptr() in self.held:
            raise TypeError("a tensor that a module's attribute leads to")
        for made, *_ in self._made:
            if made.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() and made.numel():
                raise TypeError("a view of a tensor that the forward has made")
        node = self.create_node("call_method", "clone", (super().create_arg(tensor),), {})
        self._made.append((tensor, changes_of(tensor), node))
        return node

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        graph = super().trace(*args, **kwargs)
        if any(changes_of(tensor) != changes for tensor, changes, _ in self._made):
            raise TypeError("a tensor that the forward has made, and goes on changing")
        # It may have been there before, and be there for the next call to read.
        copies = {node for *_, node in self._made}
        modules = dict(self.root.named_modules())
        if any(value in copies for node in graph.nodes for value in written(node, modules)):
            raise TypeError("a tensor that is no module's, and is changed in place")
        return graph

    def create_arg(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
            made = any(value is tensor for tensor, *_ in self._made)
            of_module = value in self.tensor_attrs or any(value is buffer for buffer in self.root.buffers())
            return self._copied(value) if made or not of_module else super().create_arg(value)
        # torch.fx would make a plain dict of all of them, also of what transformers' models return, which has attributes.
        if type(value) is collections.OrderedDict:
            pairs = [(key, self.create_arg(item)) for key, item in value.items()]
            return self.create_node("call_function", collections.OrderedDict, (pairs,), {})
        if (isinstance(value, dict) and type(value) is not dict) or hasattr(type(value), "__dataclass_fields__"):
            raise TypeError(f"a {type(value).__name__} among the values")
        return super().create_arg(value)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        self._state = _grad_and_autocast()
        # A proxy is neither None nor False: what has a default is left to it.
        required = _required(inspect.signature(root_fn))
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in required)]

    def is_leaf_module(self, module: torch.nn.Module, name: str) -> bool:
        ours = module.__class__.__module__.startswith(("fastnn.nn.", "fastnn.quant."))
        return ours or not self._inline or super().is_leaf_module(module, name)


def _grad_and_autocast() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch._C._is_any_autocast_enabled()


def _required(signature: inspect.Signature) -> list[str]:
    """Which arguments after self have no default."""
    required = []
    for parameter in list(signature.parameters.values())[1:]:
        if parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            if parameter.kind is parameter.KEYWORD_ONLY:
                raise TypeError(f"{parameter.name} cannot be given by position")
            required.append(parameter.name)
    return required


_FLAGS = (type(None), bool, int, float, str)


def arguments_of(forward: Callable[..., Any]) -> Callable[..., tuple[Any, ...] | None]:
    """A function that is called as the forward is, and gives the arguments without a default, but for self: what a graph of
    :func:`trace` takes. None where the call gives others as well, or no tensors, with which the Python that was traced may go
    another way."""
    signature = inspect.signature(forward)
    required = _required(signature)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}

    def arguments(self: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, ...] | None:
        if not kwargs and len(args) == len(required):
            return args
        try:
            _, *given = signature.bind(self, *args, **kwargs).arguments.items()
        except TypeError:
            return None  # the forward itself will say so
        if not all(name in required or _is_default(value, defaults[name]) for name, value in given):
            return None
        return tuple(value for name, value in given if name in required)

    def tensors(*args: Any, **kwargs: Any) -> tuple[Any, ...] | None:
        # In place of which a proxy went the way of a tensor.
        found = arguments(*args, **kwargs)
        return found if found is not None and all(isinstance(value, torch.Tensor) for value in found) else None

    return tensors


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and isinstance(value, _FLAGS) and value == default)


def trace(module: torch.nn.Module, training: bool = False, tracer: fx.Tracer | None = None) -> fx.Graph | None:
    """The module's computation in eval mode, or in training, or None where its Python does more than pass tensors on.

    Its inputs are the arguments without a default; the others have theirs. ``tracer`` says which modules are looked into; by
    default no layer of torch or fastnn is.
    """
    before = [(inner.__dict__, _state_of(inner)) for inner in module.modules()]
    tracer = tracer or _Tracer()
    if isinstance(tracer, _Tracer):
        tracer.held = _addresses_of(before)
    states = _random_states()
    if training:
        module.train()  # which some models override, to leave a part in eval mode
    else:
        for inner in module.modules():
            inner.training = False  # not by eval(), in which some layers change their weights
    graph = None
    try:
        with contextlib.nullcontext() if training else torch.no_grad(), _no_parameters_as_such():
            graph = tracer.trace(module)
    except Exception:  # whatever the model's code raises when it meets a proxy
        pass
    finally:
        # A graph keeps nothing from one call to the next, and draws no other numbers in the next.
        if not _same_random_states(states):
            graph = None
        for attributes, kept in before:
            if not _restored(attributes, kept):
                graph = None
    return graph


CONSTANT = "_tensor_constant"  # how torch.fx calls the tensors of a graph


def _random_states() -> tuple[Any, ...]:
    """Of torch's, Python's and NumPy's generators."""
    numpy = sys.modules.get("numpy")
    return torch.get_rng_state(), random.getstate(), None if numpy is None else numpy.random.get_state(legacy=False)


def _same_random_states(before: tuple[Any, ...]) -> bool:
    """Whether nobody has drawn a number; else the states are those of before again."""
    now = _random_states()
    if torch.equal(now[0], before[0]) and now[1] == before[1] and str(now[2]) == str(before[2]):
        return True
    torch.set_rng_state(before[0])
    random.setstate(before[1])
    if before[2] is not None:
        sys.modules["numpy"].random.set_state(before[2])
    return False


@contextlib.contextmanager
def _no_parameters_as_such() -> Iterator[None]:
    """Refuses forwards that go through parameters or buffers, which are tensors then and not what the graph reads."""
    kind, names = torch.nn.Module, ("parameters", "named_parameters", "buffers", "named_buffers", "state_dict")
    methods = {name: getattr(kind, name) for name in names}

    def refusing(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def ask(*args: Any, **kwargs: Any) -> Any:
            if not sys._getframe(1).f_globals.get("__name__", "").startswith(("torch.", "fastnn.")):
                raise TypeError("a forward that goes through its parameters")
            return method(*args, **kwargs)

        return ask

    try:
        for name, method in methods.items():
            setattr(kind, name, refusing(method))
        yield
    finally:
        for name, method in methods.items():
            setattr(kind, name, method)


def _addresses_of(states: list[tuple[dict[str, Any], dict[str, Any]]]) -> set[int]:
    """Of the memory of all tensors that attributes are or lead to."""
    found = set()
    for _, state in states:
        for name, (value, *_) in state.items():
            if name not in ("_parameters", "_buffers", "_modules"):
                found |= {t.untyped_storage().data_ptr() for t in tensors_in(value) if t.layout is torch.strided}
    return found - {0}


def _state_of(module: torch.nn.Module) -> dict[str, Any]:
    """The module's attributes as they are, with copies of those that are tensors."""
    state = {}
    for name, value in module.__dict__.items():
        copied = value.detach().clone() if isinstance(value, torch.Tensor) else None
        # The tables of a module hold what has a state of its own.
        state[name] = value, snapshot(value, DEEPEST - 1 if name in _TABLES else 0), copied
    return state


_TABLES = frozenset(torch.nn.Module().__dict__)


def _restored(attributes: dict[str, Any], kept: dict[str, Any]) -> bool:
    """Makes a module's attributes what they were. False if a forward has changed any of them."""
    unchanged = True
    for name in attributes.keys() - kept.keys():
        if not name.startswith(CONSTANT):
            del attributes[name]
            unchanged = False
    for name, (value, before, copied) in kept.items():
        unchanged &= name == "training" or attributes.get(name) is value
        attributes[name] = value
        if not same(value, before):
            unchanged = False
            if copied is not None:
                value.detach().copy_(copied)
            else:
                put_back(value, before)
    return unchanged


def trace_whole(model: torch.nn.Module, inline: bool = True, expect: bool = False) -> fx.Graph | None:
    """As :func:`trace`; None as well for torch's layers around others, which do not run them one after the other, except for
    Sequential. Modules inside of it are looked into if ``inline``. If ``expect``, forwards that ask for a dtype are followed
    for that of the model's parameters, and the graph raises :exc:`UnexpectedDtype` before it has changed anything if a value has
    another."""
    if type(model).__module__.startswith(("torch.nn.", "fastnn.nn.", "fastnn.quant.")) and not isinstance(
        model, torch.nn.Sequential
    ):
        return None
    dtypes = {p.dtype for p in model.parameters() if p.dtype.is_floating_point} if expect else set()
    graph = trace(model, tracer=_Tracer(inline, dtypes.pop() if len(dtypes) == 1 else None))
    if graph is None or not any(node.target is expect_dtype for node in graph.nodes):
        return graph
    modules = dict(model.named_modules())
    return graph if all(is_alone(v, modules) for node in graph.nodes for v in written(node, modules)) else None
