"""Progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from tqdm import tqdm

Report = Callable[[str], None]  # takes what long work says of itself, line by line


class Bar(AbstractContextManager["Bar"], Protocol):
    n: float  # how much is done

    def update(self, n: float = 1) -> object:
        """So much more is done."""

    def close(self) -> None:
        """The bar is gone."""


class NoBar:
    """Where nothing is shown. tqdm would start a thread even then, and with some ways of starting processes one of these."""

    n = 0.0

    def __enter__(self) -> NoBar:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, n: float = 1) -> None:
        self.n += n

    def close(self) -> None: ...


def progress_bar(total: int, unit: str, shown: bool = True, description: str | None = None) -> Bar:
    """A bar that is gone when it is done; none where it is not to be shown, or where stderr is no terminal."""
    if not shown or sys.stderr is None or not sys.stderr.isatty():
        return NoBar()
    return tqdm(desc=description, total=total, unit=unit, leave=False)
