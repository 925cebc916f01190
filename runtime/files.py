"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import sys
from pathlib import Path

from ..errors import InputError, reason

MOST_BYTES = 200  # of a file's name in that of what is written before
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder, or is it, wherever links lead."""
    return path.resolve().is_relative_to(folder.resolve())


def check_writable(path: Path, file: bool = False) -> None:
    """Raises InputError where `path`, a file or a folder, can't be written, before any work is done for it."""
    try:
        if file and path.is_symlink():
            path = path.resolve()
        found = is_there(path)
        parent = next((folder for folder in path.absolute().parents if is_there(folder)), path.absolute())
    except OSError as error:  # a name that no file can have
        raise InputError(f"{path}: cannot be written: {reason(error)}") from error
    if file and found and path.is_dir():
        raise InputError(f"{path}: is a folder; expected a file to write")
    if not parent.is_dir():
        raise InputError(f"{path}: cannot be written: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK) or (found and not os.access(path, os.W_OK)):
        why = "the file system is read-only" if is_read_only(path if found else parent) else "no permission"
        raise InputError(f"{path}: cannot be written: {why}")


def is_mount(path: Path) -> bool:
    """Whether something is mounted at a folder, of the same file system too (mount --bind), which os.path.ismount does not see."""
    if os.path.ismount(path):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()  # proc(5): the fifth word, with spaces and the like as \040
    except OSError:
        return False
    mounted = (re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), line.split()[4]) for line in lines)
    return os.fsencode(path.resolve()) in mounted


def is_there(path: Path) -> bool:
    """Raises OSError where that cannot be told, which Path.exists takes for no from Python 3.14 on."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_read_only(path: Path) -> bool:
    """Whether it lies on a file system that takes no files from anyone, as far as the system tells."""
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except (AttributeError, OSError):
        return False


PARTIAL = re.compile(r"\..*\.[0-9a-f]{8}\.partial")  # what a process that was killed leaves of them


class WholeFile:
    """`with WholeFile(path) as partial`: what is written to `partial` appears at `path`, or where that link leads, at the end, or not
    at all."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve() if path.is_symlink() else path

    def __enter__(self) -> Path:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            name = os.fsencode(self.path.name)[:MOST_BYTES].decode(errors="ignore")  # file systems take 255 in all
            self.partial = self.path.with_name(f".{name}.{secrets.token_hex(4)}.partial")
            self.partial.open("x").close()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {reason(error)}") from error
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(self.partial)):
            error.filename = str(self.path)  # for the message
        if kind is None:
            try:
                self.partial.replace(self.path)
            except BaseException:
                self.partial.unlink(missing_ok=True)
                raise
        else:
            self.partial.unlink(missing_ok=True)


def exchange(one: Path, other: Path) -> bool:
    """Two folders change their names in one moment, so that there is none without either. False where that cannot be done."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0)


def replace_folder(out: Path, new: Path, old: Path) -> None:
    """Puts the folder `new` at `out`; what was there is moved to `old`, and back where that fails or is interrupted. All on one file
    system; `old` is not there, or empty.
    """
    if not out.exists():
        new.rename(out)
        return
    if exchange(new, out):
        try:
            new.rename(old)
        except BaseException:
            exchange(new, out)
            raise
        return
    try:
        out.rename(old)
        new.rename(out)
    except BaseException:
        if not out.exists():
            old.rename(out)
        raise
