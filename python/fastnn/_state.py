"""What a thread has asked of fastnn (backend, batch invariance, strictness), and the count of what fell back to torch.

The settings live in one :class:`contextvars.ContextVar` that holds an immutable tuple: reading it costs 30 ns, which the
fast path of each op does once, and threads and asyncio tasks do not see each other's ``with`` blocks.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
from collections.abc import Iterator
from typing import NamedTuple

#: The backends that can be asked for by name. Without a name, the tensors' device chooses.
BACKENDS = ("cpu", "cuda", "triton", "reference")


class Settings(NamedTuple):
    backend: str | None = None
    batch_invariant: bool = False
    strict: bool = False


class FallbackError(RuntimeError):
    """Raised under :func:`strict` where fastnn would have handed a call to torch."""


#: The settings under which an op may take its shortest way; compared by identity.
PLAIN = Settings()


def _check_backend(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _from_environment() -> Settings:
    name = os.environ.get("FASTNN_BACKEND", "")
    return Settings(backend=_check_backend(name)) if name else PLAIN


_variable: contextvars.ContextVar[Settings] = contextvars.ContextVar(
    "fastnn_settings",
    default=_from_environment(),  # noqa: B039 - a tuple of immutables
)
settings = _variable.get


@contextlib.contextmanager
def _changed(**changes: object) -> Iterator[None]:
    value = settings()._replace(**changes)
    token = _variable.set(PLAIN if value == PLAIN else value)
    try:
        yield
    finally:
        _variable.reset(token)


def backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Inside ``with fastnn.backend(name):`` this thread's ops run on the named backend, whatever the tensors' device.

    ``"cpu"``, ``"cuda"`` and ``"triton"`` are the kernels of this package, of which each reads the tensors of its own device;
    ``"reference"`` is the formula in plain torch, computed in float64. The variable ``FASTNN_BACKEND`` does the same for a
    whole process. Raises ValueError for another name.
    """
    return _changed(backend=_check_backend(name))


def batch_invariant() -> contextlib.AbstractContextManager[None]:
    """Inside this block, the bits of a row do not depend on how many other rows are in the batch."""
    return _changed(batch_invariant=True)


def strict() -> contextlib.AbstractContextManager[None]:
    """Inside this block, a call that would fall back to torch raises :class:`FallbackError` instead."""
    return _changed(strict=True)


_lock = threading.Lock()
_fallbacks: dict[tuple[str, str], int] = {}


def _after_fork() -> None:
    global _lock
    # Another thread of the parent may have held it.
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def count_fallback(op: str, reason: str) -> None:
    """Notes that ``op`` ran in torch, and why. Raises :class:`FallbackError` under :func:`strict`."""
    with _lock:
        key = (op, reason)
        _fallbacks[key] = _fallbacks.get(key, 0) + 1
    if settings().strict:
        raise FallbackError(f"fastnn.{op}: would run in torch: {reason}")


# Under torch.compile it runs once, while the graph is made: the graph then holds torch's op. This is all that
# torch.compiler.assume_constant_result does, which imports the compiler for it: 1.3 s on top of the 0.8 s of `import fastnn`.
count_fallback._dynamo_marked_constant = True


def fallbacks() -> dict[tuple[str, str], int]:
    """How often each ``(op, reason)`` fell back to torch in this process, since :func:`reset_fallbacks`."""
    with _lock:
        return dict(_fallbacks)


def reset_fallbacks() -> None:
    with _lock:
        _fallbacks.clear()
