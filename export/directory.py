"""Engine directories are written beside their place and put there whole, or not at all."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import ExportError, InputError, reason
from ..runtime.builds import FOLDER
from ..runtime.files import PARTIAL, check_writable, is_inside, is_mount, replace_folder
from ..runtime.manifest import FILE, FORMAT, file_entries, manifest_text, read_manifest


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Writes the manifest of what lies in `folder`, which is then a whole engine."""
    content = {**content, "files": file_entries(folder)}
    (folder / FILE).write_bytes(manifest_text(content))
    read_manifest(folder, verify=False)


def producer() -> str:
    from .. import __version__

    return f"enat {__version__}"


def check_target(out: Path, force: bool, reads: Iterable[Path | None] = ()) -> None:
    """Raises InputError where `out` exists and may not be replaced, or cannot be made. reads: what the work needs, which must not go with
    what was there.
    """
    if out.name == "..":
        raise InputError(f"{out}: expected a folder by its own name")
    if out.is_symlink():
        raise InputError(f"{out}: is a link, to {out.resolve()}; name what it leads to")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: exists and is not a directory")
    if out.exists() and is_inside(Path.cwd(), out):
        raise InputError(f"{out}: is or holds the working directory, which cannot be replaced; choose a folder in it")
    if is_mount(out):
        raise InputError(f"{out}: a mount point cannot be replaced; choose a folder in it")
    if out.exists() and any(out.iterdir()):
        if not force:
            raise InputError(f"{out}: exists; --force replaces it")
        if not is_engine(out):
            raise InputError(f"{out}: exists and is not an engine; it is not replaced, remove it yourself or choose another folder")
        for path in filter(None, reads):
            if is_inside(path, out):
                raise InputError(f"{path}: lies in {out}, which would be replaced; choose another folder for the engine")
        if others := foreign_files(out):
            shown = f"{', '.join(others[:3])}{', …' if len(others) > 3 else ''}"
            raise InputError(f"{out}: holds what is no part of the engine ({shown}); it is not replaced, remove that yourself")
    holder = next(filter(is_engine, out.resolve().parents), None)
    if holder:
        raise InputError(f"{out}: lies in {holder}, which is an engine; choose a folder outside")
    check_writable(out)


def is_engine(folder: Path) -> bool:
    """Whether its manifest is one of an engine: other programs' files are called so too."""
    return content_of(folder).get("format") == FORMAT


def content_of(folder: Path) -> dict[str, Any]:
    """Of its manifest; nothing where there is none."""
    try:
        content = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def foreign_files(engine: Path) -> list[str]:
    """What lies in an engine's folder and its manifest does not list, but for what processes that were killed leave there, as of builds."""
    files = content_of(engine).get("files")
    listed = {FILE, *files} if isinstance(files, dict) else {FILE}
    found = sorted(path.relative_to(engine).as_posix() for path in engine.rglob("*") if path.is_symlink() or not path.is_dir())
    ours = re.compile(rf"{FOLDER}/.*|{PARTIAL.pattern}|(.*/)?\.DS_Store")  # which Finder makes
    return [name for name in found if name not in listed and not ours.fullmatch(name)]


KINDS = ("partial", "old", "float32")  # a new engine, the one that was there, the one that a new one is made from


def beside(out: Path, kind: str) -> Path:
    """A name for a folder that work on `out` needs for its time."""
    assert kind in KINDS
    return out.with_name(f".{out.name}.{secrets.token_hex(4)}.{kind}")


def name_leftovers(out: Path, own: Path | None = None) -> None:
    """Warns of such folders that are there before the work begins: only a process that was killed leaves them behind. own: not of this."""
    pattern = rf"(\.{re.escape(out.name)}|\.\.{re.escape(out.name)}\.[0-9a-f]{{8}}\.float32)\.[0-9a-f]{{8}}\.({'|'.join(KINDS)})"
    parent = out.absolute().parent
    for left in sorted(path for path in parent.iterdir() if path != own and re.fullmatch(pattern, path.name)) if parent.is_dir() else ():
        then = "move back or remove the engine that was there" if left.suffix == ".old" else "remove it"
        warnings.warn(f"{left}: another export writes here, or was killed and left this; then {then}", RuntimeWarning, stacklevel=3)


@contextlib.contextmanager
def put_in_place(out: Path, force: bool) -> Iterator[Path]:
    """A new directory beside `out` that takes its place when the block ends well, and is gone when it does not."""
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial, old = beside(out, "partial"), beside(out, "old")
        partial.mkdir()
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}") from error
    try:
        try:
            yield partial
            check_target(out, force)
            replace_folder(out, partial, old)
        except OSError as error:
            if isinstance(error.filename, str) and not is_inside(Path(error.filename), partial):
                raise ExportError(f"{error.filename}: {reason(error)}") from error
            raise ExportError(f"{out}: not written: {reason(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
