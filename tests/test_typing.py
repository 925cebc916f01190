"""What a type checker says of programs that use enat as its pages show."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Unpack

import numpy as np
from enat import Callback, Drawing, EnatError, Images, Pipeline, Preview, Tokens, to_pil


def watch(step: int, steps: int, preview: Preview) -> bool | np.bool_:
    return preview.masked().any() and preview().shape[0] > steps


def draw(pipe: Pipeline, **settings: Unpack[Drawing]) -> Iterator[Images]:
    with contextlib.closing(pipe.stream(["R", 7, np.int64(3)], **settings)) as batches:
        yield from batches


with Pipeline.load(Path("engine"), "onnxruntime", threads=2, slots=2) as pipe:
    chosen: Callback = watch
    for images in draw(pipe, num=2, seed=np.arange(6), steps=4, guidance=np.float32(2), callback=chosen, batch_size=3):
        to_pil(images)[0].save("a.png")
    tokens: Tokens = pipe.encode(pipe.generate(3, seed=1))
    pipe.decode(tokens, batch_size=1)
"""
WRONG = """
import enat
from enat import Pipelin

pipe = enat.Pipeline.load(verify="yes")
pipe.generate([1], guidance_scale=3)
pipe.generate([1], steps="8")
enat.stoped
"""


def check(program: str, folder: Path) -> list[str]:
    """The lines of the program that mypy objects to."""
    (folder / "program.py").write_text(program)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", folder / "cache", "program.py"]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert not found.stderr, found.stderr
    return [program.splitlines()[int(number) - 1] for number in re.findall(r"^program\.py:(\d+): error", found.stdout, re.M)]


def test_programs_are_checked(tmp_path: Path) -> None:
    assert check(PROGRAM, tmp_path) == []
    assert check(WRONG, tmp_path) == [line for line in WRONG.splitlines() if line and line != "import enat"]
