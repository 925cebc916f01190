"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

from ..errors import InputError


def check_writable(path: Path) -> None:
    """Raises InputError where `path` can't be written, before any work is done for it."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise InputError(f"{path}: cannot be written: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise InputError(f"{path}: cannot be written: no permission")


class WholeFile:
    """`with WholeFile(path) as partial`: what is written to `partial` appears at `path` at the end, or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Path:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", suffix=".partial", dir=self.path.parent)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror}") from error
        os.close(handle)
        self.partial = Path(name)
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            try:
                self.partial.chmod(0o666 & ~umask())
                self.partial.replace(self.path)
            except BaseException:
                self.partial.unlink(missing_ok=True)
                raise
        else:
            self.partial.unlink(missing_ok=True)


UMASK = threading.Lock()


def umask() -> int:
    """What new files are not allowed; the system tells it only when it is set."""
    with UMASK:
        found = os.umask(0)
        os.umask(found)
    return found
