"""Where backends keep what they compile for this machine. Not in engines, whose files are listed with their hashes."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from ...errors import InputError
from ..manifest import Manifest

VARIABLE = "ENAT_CACHE"  # a folder for compiled graphs; empty for none


def cache_folder(manifest: Manifest, kind: str, filled: Callable[[Path], bool] = lambda folder: False) -> Path | None:
    """Where compiled graphs of an engine are kept: in ENAT_CACHE, else in the user's cache folder. None where that cannot be written.

    filled: whether a folder holds all that will be looked for; it need not be writable then, as in the image of a container. Raises
    InputError where ENAT_CACHE cannot be written.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen == "":
        return None
    try:
        root = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "enat")
    except RuntimeError as error:  # neither HOME nor a name for this user, as in containers
        warnings.warn(
            f"{str(error).rstrip('.')}, and {VARIABLE} is not set; graphs are compiled at every start", RuntimeWarning, stacklevel=5
        )
        return None
    root = root.absolute()  # wherever the program goes
    folder = root / kind / manifest.hash[:16]
    try:
        if filled(folder):
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        if chosen:
            raise InputError(f"{root}: the cache folder ({VARIABLE}) cannot be written: {error.strerror}") from error
        warnings.warn(f"{folder}: cannot be written ({error.strerror}); graphs are compiled at every start", RuntimeWarning, stacklevel=5)
        return None
