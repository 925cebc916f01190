"""The C++ library for the tests: built once, in .venv/cpp; its enat-run-cpp; engines to damage.

Without a compiler or the packages that it needs the tests are skipped, with the reason.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from enat.runtime.manifest import FILE, REQUIRED_GRAPHS, file_entries
from enat.runtime.pipeline import BUNDLED_ENGINE

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".venv" / "cpp" / onnxruntime.__version__  # a library is linked with one version
SEARCHED = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
GRAPHS = (*REQUIRED_GRAPHS, "image_decoder.onnx")

Edit = Callable[[dict[str, Any]], object]
Result = subprocess.CompletedProcess[str]


def call(*command: object, **options: Any) -> Result:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)


def done(*command: object, **options: Any) -> str:
    """What a command that must succeed says on stdout."""
    result = call(*command, **options)
    assert result.returncode == 0, f"{command}: {result.returncode}\n{result.stdout}{result.stderr}"
    return result.stdout


@pytest.fixture(scope="session")
def dependencies() -> Path:
    """Headers and the shared library of ONNX Runtime."""
    folder = CACHE / "dependencies"
    found = call(ROOT / "cpp" / "dependencies.sh", folder, env={**os.environ, "PYTHON": sys.executable})
    if found.returncode:
        pytest.skip(f"the C++ library cannot be built here: {found.stderr.strip()}")
    return folder


@pytest.fixture(scope="session")
def cmake() -> str:
    found = shutil.which("cmake", path=SEARCHED)
    if not found:
        pytest.skip("the C++ library cannot be built here: no cmake; pip install cmake")
    return found


def build(cmake: str, dependencies: Path, name: str, *options: str) -> Path:
    folder = CACHE / name
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=SEARCHED) else []
    places = [f"-DONNXRUNTIME_ROOT={dependencies}", f"-DCMAKE_PREFIX_PATH={dependencies}"]
    common = ["-DENAT_BUILD_TESTS=ON", "-DCMAKE_CXX_FLAGS=-Werror"]
    environment = {**os.environ, "PATH": SEARCHED}
    done(cmake, "-S", ROOT / "cpp", "-B", folder, *generator, *places, *common, *options, env=environment)
    done(cmake, "--build", folder, "--parallel", env=environment)
    return folder


@pytest.fixture(scope="session")
def plain(cmake: str, dependencies: Path) -> Path:
    return build(cmake, dependencies, "plain")


@pytest.fixture(scope="session")
def sanitized(cmake: str, dependencies: Path) -> Path:
    return build(cmake, dependencies, "sanitized", "-DENAT_SANITIZE=address,undefined", "-DCMAKE_BUILD_TYPE=Debug")


@pytest.fixture(scope="session", params=["plain", pytest.param("sanitized", marks=pytest.mark.slow)])
def built(request: pytest.FixtureRequest) -> Path:
    """The build folder; with sanitizers too in the slow tests."""
    folder: Path = request.getfixturevalue(request.param)
    return folder


def enat_run(built: Path, *arguments: object, engine: Path = BUNDLED_ENGINE, **options: Any) -> Result:
    return call(built / "enat-run-cpp", "--engine", engine, *arguments, **options)


def tokens_of(built: Path, folder: Path, *arguments: object, engine: Path = BUNDLED_ENGINE) -> np.ndarray:
    result = enat_run(built, *arguments, "--out", folder / "tokens.npy", engine=engine)
    assert result.returncode == 0, result.stderr
    return np.load(folder / "tokens.npy")


def refused(result: Result, *parts: object, codes: tuple[int, ...] = (2,)) -> None:
    """One line that says what was wrong, and the exit code; never a signal."""
    assert result.returncode in codes, f"{result.returncode}: {result.stderr}"
    assert re.fullmatch(r"Error: [^\n]+\n", result.stderr), result.stderr
    for part in parts:
        assert str(part) in result.stderr


def engine_of(folder: Path, edit: Edit = lambda data: None, graphs: bool = False) -> Path:
    """A copy of the bundled engine, or only its manifest with graphs of a few bytes; its manifest edited last."""
    if graphs:
        shutil.copytree(BUNDLED_ENGINE, folder)
    else:
        folder.mkdir()
        for name in GRAPHS:
            (folder / name).write_bytes(name.encode())
    return rewritten(folder, edit)


def rewritten(engine: Path, edit: Edit = lambda data: None) -> Path:
    """A manifest that fits to the files as they are, then edited."""
    data = json.loads((BUNDLED_ENGINE / FILE).read_text())
    data["files"] = file_entries(engine)
    edit(data)
    (engine / FILE).write_text(json.dumps(data))
    return engine
