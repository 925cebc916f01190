"""Where the commands begin: what they need is imported here, so that Ctrl-C meanwhile is a line and exit code 130, too."""

from __future__ import annotations

import sys
from importlib import import_module

from .runtime.interrupts import held_back


def begin(module: str) -> None:
    """Runs the command of a module."""
    try:
        with held_back():
            command = import_module(module, __package__).main
    except KeyboardInterrupt:
        print("Error: interrupted", file=sys.stderr)
        sys.exit(130)
    command()


def run() -> None:
    begin(".runtime.cli")


def export() -> None:
    begin(".export.cli")


def verify() -> None:
    begin(".export.verify_cli")


def triton() -> None:
    begin(".serving.cli")


def bench() -> None:
    begin(".benchmarks.cli")
