"""What the commands share: errors become one line on stderr and an exit code, `--debug` shows the traceback."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..errors import BackendError, EnatError, InputError, reason
from .backends import BACKENDS
from .describe import printable
from .interrupts import held_back

backend_option = functools.partial(click.option, "--backend", type=click.Choice(["auto", *BACKENDS]), default="auto", show_default=True)


class Command(click.Command):
    """A click command that ends with one line: 2 for wrong input, 1 for work that failed, 130 for Ctrl-C, 143 for SIGTERM (SIGHUP: 129)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(click.Option(["--debug"], is_flag=True, help="Show a traceback for errors.", expose_value=False))
        click.version_option(__version__, message="enat %(version)s")(self)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        debug = "--debug" in (kwargs.get("args") or (args[0] if args else None) or sys.argv[1:])
        if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may not know every letter
            sys.stdout.reconfigure(errors="replace")
        warnings.showwarning = lambda message, *_: click.echo(f"Warning: {printable(str(message))}", err=True)
        # They unwind like Ctrl-C, so that what is half done is cleaned up.
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, lambda number, _: sys.exit(128 + number))
        try:
            super().main(*args, **{**kwargs, "standalone_mode": False})
        except (click.Abort, KeyboardInterrupt):
            fail("interrupted", 130)
        except click.ClickException as error:
            if debug and error.__cause__:
                raise
            fail(" ".join(error.format_message().split()), 2)
        except EnatError as error:
            if debug:
                raise
            fail(str(error), error.exit_code)
        except OSError as error:
            if debug:
                raise
            fail(f"{error.filename}: {reason(error)}" if error.filename else reason(error), 1)
        except MemoryError:
            if debug:
                raise
            fail("not enough memory", 1)


class Source(click.Path):
    """What a command reads: a path, but not nothing, as an empty variable of a shell gives."""

    refused: tuple[str, ...] = ("",)
    what = "read"

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in self.refused:
            self.fail(f"expected the name of a file or a folder to {self.what}, got {value!r}", param, ctx)
        try:
            Path(os.fsdecode(value)).resolve()
        except (RuntimeError, OSError, ValueError) as error:
            self.fail(f"{value}: not a path that leads anywhere ({error})", param, ctx)
        return super().convert(value, param, ctx)


class Target(Source):
    """What a command writes: neither nothing nor -, which others take for stdout."""

    refused = ("", "-")
    what = "write"


@contextlib.contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Imports inside that fail raise BackendError, with the extra of the package that brings what is missing."""
    try:
        with held_back():
            yield
    except ModuleNotFoundError as error:
        if importlib.util.find_spec("onnxruntime"):  # onnxruntime-gpu, maybe: the other beside it would overwrite it
            extra = extra.removesuffix(",cpu")
        raise BackendError(f'{what} needs more packages ({error}); install them with: pip install "enat[{extra}]"') from error
    except ImportError as error:
        raise BackendError(f"{what} needs a package that is installed, and cannot be loaded: {error}") from error


def parse_numbers(option: str, text: str | None) -> tuple[int, ...]:
    """8,12 → (8, 12); of nothing, nothing. Raises InputError."""
    try:
        return tuple(int(word) for word in text.split(",")) if text is not None else ()
    except ValueError:
        raise InputError(f"{option}: expected a number, or numbers with commas between, got {text!r}") from None


def fail(message: str, code: int) -> None:
    click.echo(f"Error: {printable(message)}", err=True)
    sys.exit(code)
