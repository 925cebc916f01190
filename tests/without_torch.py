"""Run by `make test` in an environment with nothing but the runtime: the commands work there, and say what they lack."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

assert importlib.util.find_spec("torch") is None, "this environment has PyTorch"
commands = Path(sys.executable).parent


def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(commands / command), *arguments], capture_output=True, text=True, check=False)


with tempfile.TemporaryDirectory() as folder:
    out = Path(folder, "r.png")
    drawn = run("enat-run", "--class", "R", "--num", "8", "--seed", "7", "--out", str(out), "--grid")
    assert drawn.returncode == 0, drawn.stderr
    assert out.stat().st_size > 1000
    refused = run("enat-export", "--ckpt", str(out), "--out", str(Path(folder, "engine")))
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert 'pip install "enat[export]"' in line, line
    refused = run("enat-export", "--engine", folder, "--precision", "int8", "--out", str(Path(folder, "engine")))
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert 'pip install "enat[calibration]"' in line, line
    refused = run("enat-verify", folder, "--against", folder)
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert 'pip install "enat[calibration]"' in line, line
print("the runtime works without PyTorch")
