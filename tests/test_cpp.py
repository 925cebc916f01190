"""The C++ library draws what Python draws: tokens and pictures, from C++, C and another language."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpp_library import CACHE, ROOT, call, done, enat_run, engine_of, refused, tokens_of
from PIL import Image

from enat import Pipeline
from enat.calibration.calibrate import Settings
from enat.export.convert import Precision, convert_engine
from enat.runtime.backends.onnxruntime_cpu import pictures_at_once
from enat.runtime.pictures import sheet
from enat.runtime.pipeline import BUNDLED_ENGINE


@pytest.mark.parametrize(
    ("seed", "chosen"),
    [
        (0, {}),
        (7, {"steps": 1}),
        (2**64 - 20, {"steps": 8, "guidance": 0}),
        (123456789012345, {"steps": 21, "guidance": 2.5, "mask_temperature": 1.5, "sampling_temperature": 1.25}),
        (5, {"steps": 30, "guidance": 1, "sampling_temperature": 0}),
    ],
)
def test_tokens_are_those_of_python(plain: Path, bundled: Pipeline, tmp_path: Path, seed: int, chosen: dict[str, Any]) -> None:
    options = [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", value)]
    tokens = tokens_of(plain, tmp_path, "--class", "all", "--seed", seed, "--batch-size", 7, *options)
    assert tokens.dtype == np.int64
    assert np.array_equal(tokens, bundled.generate_tokens(range(36), seed=seed, **chosen))


def test_large_batches_are_drawn_in_smaller_ones(plain: Path, bundled: Pipeline, tmp_path: Path) -> None:
    """The network's features of 72 pictures do not fit into one core's caches."""
    assert pictures_at_once(bundled.manifest, 1) < 72
    tokens = tokens_of(plain, tmp_path, "--class", "all", "--num", 2, "--seed", 9, "--batch-size", 72, "--threads", 1)
    assert np.array_equal(tokens, bundled.generate_tokens(range(36), num=2, seed=9))


@pytest.mark.parametrize(
    "precision",
    [
        pytest.param(Precision("fp16"), id="fp16"),
        pytest.param(Precision("int8"), id="int8", marks=pytest.mark.slow),
        pytest.param(Precision("int8", "fp16"), id="int8 and fp16", marks=pytest.mark.slow),
    ],
)
def test_other_precisions(plain: Path, tmp_path: Path, precision: Precision) -> None:
    convert_engine(BUNDLED_ENGINE, tmp_path / "engine", precision, Settings(images=8))
    tokens = tokens_of(plain, tmp_path, "--class", "all", "--seed", 3, engine=tmp_path / "engine")
    with Pipeline.load(tmp_path / "engine") as pipeline:
        assert np.array_equal(tokens, pipeline.generate_tokens(range(36), seed=3))


def test_pictures_are_those_of_python(built: Path, bundled: Pipeline, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    result = enat_run(built, "--class", "R", "--class", "#2", "--num", 3, "--seed", 4, "--columns", 4, "--out", out)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    with Image.open(out) as drawn:
        assert drawn.mode == "RGB"
        assert np.array_equal(np.asarray(drawn), np.asarray(sheet(bundled.generate(["R", 2], num=3, seed=4), 4)))


def test_nobody_is_told(plain: Path, tmp_path: Path) -> None:
    """ONNX Runtime, which reports to its makers by itself, leaves none of the files that it does it with."""
    for home in ("given", "run"):
        (tmp_path / home).mkdir()
    arguments = ("--class=#1", "--seed=1", f"--out={tmp_path / 'given' / '1.png'}")
    result = call(plain / "enat-run-cpp", f"--engine={BUNDLED_ENGINE}", *arguments, env={"HOME": str(tmp_path / "run")})
    assert result.returncode == 0, result.stderr
    assert not list((tmp_path / "run").iterdir())


def test_a_seed_that_is_drawn_is_told(plain: Path, bundled: Pipeline, tmp_path: Path) -> None:
    result = enat_run(plain, "--class", "#1", "--out", tmp_path / "1.png")
    found = re.fullmatch(r"seed (\d+)\n", result.stderr)
    assert found, result.stderr
    with Image.open(tmp_path / "1.png") as drawn:
        assert np.array_equal(np.asarray(drawn), bundled.generate([1], seed=int(found[1]))[0])


def test_classes(plain: Path, bundled: Pipeline, tmp_path: Path) -> None:
    assert enat_run(plain, "--list-classes").stdout.splitlines()[33] == "33\t7"
    assert len(tokens_of(plain, tmp_path, "--class", "ALL", "--steps", 1, "--guidance", "1e-310")) == 36
    for word in ("r", " R", "7", "#7", "17"):
        assert np.array_equal(tokens_of(plain, tmp_path, "--class", word, "--seed", 1), bundled.generate_tokens([word], seed=1))
    unfriendly = engine_of(tmp_path / "unfriendly", lambda data: data["model"].update(class_names=["\x1b[31m\n"] * 36), graphs=True)
    assert enat_run(plain, "--list-classes", engine=unfriendly).stdout.splitlines()[0] == "0\t?[31m?"
    refused(enat_run(plain, "--class", "RR", "--out", "x.png"), "unknown class 'RR'")
    refused(enat_run(plain, "--class", "36", "--out", "x.png"), "expected a class of 0 to 35, got 36")
    same = engine_of(tmp_path / "same", lambda data: data["model"].update(class_names=["a", "A", *"c" * 34]), graphs=True)
    refused(enat_run(plain, "--class", "A", "--out", "x.png", engine=same), "'A' is ambiguous: numbers 0, 1 ")
    nameless = engine_of(tmp_path / "nameless", lambda data: data["model"].update(class_names=None), graphs=True)
    refused(enat_run(plain, "--class", "A", "--out", "x.png", engine=nameless), "this engine's classes have no names")
    assert len(tokens_of(plain, tmp_path, "--class", "all", "--steps", 1, engine=nameless)) == 36


def test_from_cpp_in_several_threads(built: Path) -> None:
    assert done(built / "tests" / "use-pipeline", BUNDLED_ENGINE) == "all holds\n"


def test_from_c(built: Path, bundled: Pipeline, tmp_path: Path) -> None:
    assert done(built / "tests" / "use-c-interface", BUNDLED_ENGINE, tmp_path / "tokens") == "all holds\n"
    tokens = np.fromfile(tmp_path / "tokens", np.int64).reshape(2, 8, 8)
    assert np.array_equal(tokens, bundled.generate_tokens([3, 4], seed=11))


class CImages(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("count", "height", "width", "grid")),
        ("pixels", ctypes.POINTER(ctypes.c_uint8)),
        ("tokens", ctypes.POINTER(ctypes.c_int64)),
        ("seeds", ctypes.POINTER(ctypes.c_uint64)),
        ("owner", ctypes.c_void_p),
    )


def test_from_another_language(plain: Path, bundled: Pipeline) -> None:
    """The C interface through ctypes, beside another ONNX Runtime in the same process."""
    library = ctypes.CDLL(str(plain / "libenat.so"))
    library.enat_last_error.restype = ctypes.c_char_p
    opened, images = ctypes.c_void_p(), CImages()
    assert library.enat_open(str(BUNDLED_ENGINE).encode(), None, ctypes.byref(opened)) == 0
    classes = (ctypes.c_int64 * 3)(1, 2, 35)
    assert library.enat_generate(opened, classes, ctypes.c_size_t(3), None, ctypes.byref(images)) == 0
    pixels = np.ctypeslib.as_array(images.pixels, (images.count, images.height, images.width, 3)).copy()
    seeds = np.ctypeslib.as_array(images.seeds, (images.count,)).tolist()
    library.enat_free_images(ctypes.byref(images))
    assert np.array_equal(pixels, bundled.generate([1, 2, 35], seed=seeds))
    classes[0] = 36
    assert library.enat_generate(opened, classes, ctypes.c_size_t(3), None, ctypes.byref(images)) == 1
    assert library.enat_last_error() == b"expected a class of 0 to 35, got 36"
    library.enat_close(opened)


def test_the_page_shows_what_works(plain: Path, cmake: str, bundled: Pipeline, tmp_path: Path) -> None:
    """docs/EMBEDDING.md: under twenty lines that find the installed package, compile without a warning and draw. And docs/CPP.md's C."""
    text = (ROOT / "docs" / "EMBEDDING.md").read_text() + (ROOT / "docs" / "CPP.md").read_text()
    samples = {name: re.search(rf"```{name}\n(.*?)```", text, re.DOTALL)[1] for name in ("cmake", "cpp", "c")}  # type: ignore[index]
    assert len(f"{samples['cmake']}{samples['cpp']}".splitlines()) < 20
    program = tmp_path / "program"
    program.mkdir()
    (program / "CMakeLists.txt").write_text(samples["cmake"])
    (program / "main.cpp").write_text(samples["cpp"])
    done(cmake, "--install", plain, "--prefix", tmp_path / "installed")
    flags = "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Wpedantic -Werror"
    done(cmake, "-S", program, "-B", program / "build", f"-DCMAKE_PREFIX_PATH={tmp_path / 'installed'}", flags)
    done(cmake, "--build", program / "build")
    (program / "engine").symlink_to(BUNDLED_ENGINE)
    done(program / "build" / "pictures", cwd=program)
    with Image.open(program / "picture.ppm") as drawn:
        assert np.array_equal(np.asarray(drawn), bundled.generate(["R"], seed=7)[0])
    (program / "main.c").write_text(samples["c"])
    (packages,) = (tmp_path / "installed").rglob("pkgconfig")
    found = [f"-I{tmp_path}/installed/include", f"-L{tmp_path}/installed/lib", "-lenat"]
    if shutil.which("pkg-config"):
        found = done("pkg-config", "--cflags", "--libs", "enat", env={**os.environ, "PKG_CONFIG_PATH": str(packages)}).split()
    done("cc", program / "main.c", "-o", program / "c", "-Wall", "-Wextra", "-Werror", f"-Wl,-rpath,{packages.parent}", *found)
    drawn_in_c = subprocess.run([program / "c"], cwd=program, check=True, capture_output=True).stdout
    assert drawn_in_c == bundled.generate(["R"], seed=7).tobytes()
    installed = enat_run(tmp_path / "installed" / "bin", "--class", "R", "--seed", 7, "--out", tmp_path / "R.png")
    assert installed.returncode == 0, installed.stderr


def test_inside_another_project(cmake: str, dependencies: Path, tmp_path: Path) -> None:
    """What that has set counts, from the first configuration on, and nothing of it stays; a unity build of its own is not the library's."""
    if tuple(map(int, re.findall(r"\d+", done(cmake, "--version"))[:2])) < (3, 21):
        pytest.skip("an older CMake forgets what a project has set, the first time")
    (tmp_path / "CMakeLists.txt").write_text(f"""
cmake_minimum_required(VERSION 3.18)
project(parent LANGUAGES CXX)
set(CMAKE_UNITY_BUILD ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(ENAT_SANITIZE undefined)
set(ONNXRUNTIME_ROOT "{dependencies}")
add_subdirectory("{ROOT / "cpp"}" enat)
""")
    for _ in range(2):
        done(cmake, "-S", tmp_path, "-B", tmp_path / "build", f"-DNLOHMANN_JSON_INCLUDE_DIR={dependencies / 'include'}")
        entries = json.loads((tmp_path / "build" / "compile_commands.json").read_text())
        assert {Path(entry["file"]) for entry in entries} == set((ROOT / "cpp" / "src").glob("*.cpp"))
        assert all("-fsanitize=undefined" in entry["command"] for entry in entries)


def test_start_to_first_picture(plain: Path, tmp_path: Path) -> None:
    """In a process that needs no Python: nothing of it is loaded, nothing of the environment is needed. And no slower than Python."""
    assert "python" not in done("ldd", plain / "libenat.so").replace(str(CACHE), "").lower()
    arguments = ["--class", "R", "--seed", "1", "--out"]
    commands = {
        "C++": [plain / "enat-run-cpp", "--engine", BUNDLED_ENGINE, *arguments, tmp_path / "cpp.png"],
        "Python": [Path(sys.executable).parent / "enat-run", *arguments, tmp_path / "python.png"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(5):
        for name, command in commands.items():
            start = time.perf_counter()
            done(*command, env={} if name == "C++" else None)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print("; ".join(f"{name}: {medians[name]:.2f} s ({min(times):.2f}–{max(times):.2f})" for name, times in seconds.items()))
    assert medians["C++"] < medians["Python"]
    with Image.open(tmp_path / "cpp.png") as first, Image.open(tmp_path / "python.png") as second:
        assert np.array_equal(np.asarray(first), np.asarray(second))
