"""The progress bar that `verbose=1` shows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def progress_bar(what: str, steps: Iterable[Any] | None = None, *, total: int | None = None, begin: int = 0) -> Any:
    """A tqdm bar over the steps, or of `total` that the caller counts. ImportError, saying what to install, without tqdm."""
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("verbose=1 needs tqdm: pip install fastnn[tree]") from error
    return tqdm(steps, total=total, initial=begin, desc=what)
