"""Progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from tqdm import tqdm

Report = Callable[[str], None]  # takes what long work says of itself, line by line


def progress_bar(total: int, unit: str, shown: bool = True) -> tqdm[NoReturn]:
    """A bar that is gone when it is done; none where it is not to be shown, or where stderr is no terminal."""
    return tqdm(total=total, unit=unit, disable=None if shown and sys.stderr is not None else True, leave=False)
