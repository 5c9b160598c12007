"""The progress bar that `verbose=1` shows."""

from __future__ import annotations

from typing import Any


def progress_bar(total: int, what: str, begin: int = 0) -> Any:
    """A tqdm bar of so many steps. ImportError, saying what to install, without tqdm."""
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("verbose=1 needs tqdm: pip install fastnn[tree]") from error
    return tqdm(total=total, initial=begin, desc=what, leave=True)
