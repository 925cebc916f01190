"""The C++ library: built once, then the same tokens and pictures as Python, from C++, C and another language; and what it refuses.

It is built in .venv/cpp. Without a compiler or the packages that it needs these tests are skipped, with the reason.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import put_anything_anywhere
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_cores import CONTROL_GROUPS, system
from test_noise import VECTORS

from enat import EnatError, Pipeline
from enat.calibration.calibrate import Settings
from enat.export.convert import Precision, convert_engine
from enat.runtime.backends.cache_folder import cache_folder
from enat.runtime.cores import allowed_threads
from enat.runtime.manifest import FILE, REQUIRED_GRAPHS, file_entries, read_manifest
from enat.runtime.noise import step_noise
from enat.runtime.pictures import sheet
from enat.runtime.pipeline import BUNDLED_ENGINE
from enat.runtime.schedule import schedule

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


# Building


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


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    with Pipeline.load() as pipeline:
        yield pipeline


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


# The same as Python


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
def test_tokens_are_those_of_python(plain: Path, pipeline: Pipeline, tmp_path: Path, seed: int, chosen: dict[str, Any]) -> None:
    options = [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", value)]
    tokens = tokens_of(plain, tmp_path, "--class", "all", "--seed", seed, "--batch-size", 7, *options)
    assert tokens.dtype == np.int64
    assert np.array_equal(tokens, pipeline.generate_tokens(range(36), seed=seed, **chosen))


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


def test_pictures_are_those_of_python(built: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    result = enat_run(built, "--class", "R", "--class", "#2", "--num", 3, "--seed", 4, "--columns", 4, "--out", out)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    with Image.open(out) as drawn:
        assert drawn.mode == "RGB"
        assert np.array_equal(np.asarray(drawn), np.asarray(sheet(pipeline.generate(["R", 2], num=3, seed=4), 4)))


def test_a_seed_that_is_drawn_is_told(plain: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    result = enat_run(plain, "--class", "#1", "--out", tmp_path / "1.png")
    found = re.fullmatch(r"seed (\d+)\n", result.stderr)
    assert found, result.stderr
    with Image.open(tmp_path / "1.png") as drawn:
        assert np.array_equal(np.asarray(drawn), pipeline.generate([1], seed=int(found[1]))[0])


def test_classes(plain: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    assert enat_run(plain, "--list-classes").stdout.splitlines()[33] == "33\t7"
    for word in ("r", " R", "7", "#7", "17"):
        assert np.array_equal(tokens_of(plain, tmp_path, "--class", word, "--seed", 1), pipeline.generate_tokens([word], seed=1))
    refused(enat_run(plain, "--class", "RR", "--out", "x.png"), "unknown class 'RR'")
    refused(enat_run(plain, "--class", "36", "--out", "x.png"), "expected a class of 0 to 35, got 36")
    same = engine_of(tmp_path / "same", lambda data: data["model"].update(class_names=["a", "A", *"c" * 34]), graphs=True)
    refused(enat_run(plain, "--class", "A", "--out", "x.png", engine=same), "'A' is ambiguous: numbers 0, 1 ")
    nameless = engine_of(tmp_path / "nameless", lambda data: data["model"].update(class_names=None), graphs=True)
    refused(enat_run(plain, "--class", "A", "--out", "x.png", engine=nameless), "this engine's classes have no names")
    assert len(tokens_of(plain, tmp_path, "--class", "all", "--steps", 1, engine=nameless)) == 36


# The numbers inside


@pytest.fixture(scope="module")
def internals(plain: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(plain / "tests" / "libenat-internals.so"))


def address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors(internals: ctypes.CDLL, counter: str, key: str, expected: str) -> None:
    words = [np.array([int(word, 16) for word in text.split()], np.uint32) for text in (counter, key, expected)]
    result = np.zeros(4, np.uint32)
    internals.test_philox(address(words[0]), address(words[1]), address(result))
    assert np.array_equal(result, words[2])


def test_all_random_numbers_that_there_are(internals: ctypes.CDLL) -> None:
    """The formulas of docs/ENGINE.md as NumPy computes them, over every value that they may be given: equal to the last bit."""
    confidence = np.empty(2**23, np.float32)
    internals.test_gumbel(ctypes.c_uint32(0), ctypes.c_uint32(confidence.size), address(confidence))
    bits = np.arange(confidence.size, dtype=np.float64)
    assert np.array_equal(confidence, (-np.log(-np.log((bits + 0.5) * 2.0**-23))).astype(np.float32))
    choice = np.empty(2**24, np.float32)
    internals.test_uniform(ctypes.c_uint32(0), ctypes.c_uint32(choice.size), address(choice))
    assert np.array_equal(choice, np.arange(choice.size, dtype=np.float32) * np.float32(2.0**-24))


@pytest.mark.parametrize("name", CONTROL_GROUPS)
def test_quotas(internals: ctypes.CDLL, name: str, tmp_path: Path) -> None:
    internals.test_least_quota.restype = ctypes.c_double
    assert internals.test_least_quota(str(system(tmp_path, name)).encode()) == (CONTROL_GROUPS[name][2] or 0)


def test_threads_that_are_allowed(internals: ctypes.CDLL) -> None:
    before = os.sched_getaffinity(0)
    try:
        for cores in (before, {min(before)}):
            os.sched_setaffinity(0, cores)
            assert internals.test_allowed_threads() == (allowed_threads() or 0)
    finally:
        os.sched_setaffinity(0, before)


def test_the_cache_folder_is_that_of_python(internals: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    internals.test_cache_folder.restype = ctypes.c_char_p

    def found() -> str:
        return str(internals.test_cache_folder(str(BUNDLED_ENGINE).encode()).decode())

    manifest = read_manifest(BUNDLED_ENGINE)
    monkeypatch.delenv("ENAT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name in ("HOME", "XDG_CACHE_HOME", "ENAT_CACHE"):  # each goes before those before it
        monkeypatch.setenv(name, str(tmp_path / name))
        assert found() == str(cache_folder(manifest, "kind"))
        assert found().startswith(str(tmp_path / name)) and Path(found()).is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "file"))
    assert found() == f"{tmp_path / 'file'}: the cache folder (ENAT_CACHE) cannot be written: Not a directory"
    monkeypatch.setenv("ENAT_CACHE", "")
    assert found() == ""
    monkeypatch.delenv("ENAT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert found() == ""


def test_noise(internals: ctypes.CDLL) -> None:
    seeds = np.array([0, 1, 2**32 - 1, 2**32, 2**63 + 12345, 2**64 - 1], np.uint64)
    for step, length in ((0, 64), (7, 256), (255, 256), (1000, 1024)):
        choice, confidence = np.empty((2, len(seeds), length), np.float32)
        internals.test_step_noise(
            address(seeds), ctypes.c_uint64(len(seeds)), ctypes.c_int64(step), ctypes.c_int64(length), address(choice), address(confidence)
        )
        assert all(map(np.array_equal, (choice, confidence), step_noise([int(seed) for seed in seeds], step, length)))


def test_schedules(internals: ctypes.CDLL) -> None:
    internals.test_schedule.restype = ctypes.c_int64
    for length in (1, 2, 36, 64, 100, 256, 1024):
        for steps in range(1, length + 1, max(1, length // 256)):
            counts, scalars = np.zeros((length, 2), np.int64), np.zeros((length, 3))
            made = internals.test_schedule(
                ctypes.c_int64(length),
                ctypes.c_int64(steps),
                *(ctypes.c_double(value) for value in (2.7, 1.3, 6.1)),
                address(counts),
                address(scalars),
            )
            expected = schedule(length, steps, 2.7, 1.3, 6.1)
            assert made == len(expected)
            assert counts[:made].tolist() == [[step.masked, step.keep] for step in expected]
            assert scalars[:made].tolist() == [[step.guidance, step.sampling_temperature, step.mask_temperature] for step in expected]


# From other programs


def test_from_cpp_in_several_threads(built: Path) -> None:
    assert done(built / "tests" / "use-pipeline", BUNDLED_ENGINE) == "all holds\n"


def test_from_c(built: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    assert done(built / "tests" / "use-c-interface", BUNDLED_ENGINE, tmp_path / "tokens") == "all holds\n"
    tokens = np.fromfile(tmp_path / "tokens", np.int64).reshape(2, 8, 8)
    assert np.array_equal(tokens, pipeline.generate_tokens([3, 4], seed=11))


class CImages(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("count", "height", "width", "grid")),
        ("pixels", ctypes.POINTER(ctypes.c_uint8)),
        ("tokens", ctypes.POINTER(ctypes.c_int64)),
        ("seeds", ctypes.POINTER(ctypes.c_uint64)),
        ("owner", ctypes.c_void_p),
    )


def test_from_another_language(plain: Path, pipeline: Pipeline) -> None:
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
    assert np.array_equal(pixels, pipeline.generate([1, 2, 35], seed=seeds))
    classes[0] = 36
    assert library.enat_generate(opened, classes, ctypes.c_size_t(3), None, ctypes.byref(images)) == 1
    assert library.enat_last_error() == b"expected a class of 0 to 35, got 36"
    library.enat_close(opened)


def test_the_page_shows_what_works(plain: Path, cmake: str, pipeline: Pipeline, tmp_path: Path) -> None:
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
        assert np.array_equal(np.asarray(drawn), pipeline.generate(["R"], seed=7)[0])
    (program / "main.c").write_text(samples["c"])
    c_flags = [
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{tmp_path}/installed/include",
        f"-L{tmp_path}/installed/lib",
        f"-Wl,-rpath,{tmp_path}/installed/lib",
    ]
    done("cc", program / "main.c", "-o", program / "c", *c_flags, "-lenat")
    drawn_in_c = subprocess.run([program / "c"], cwd=program, check=True, capture_output=True).stdout
    assert drawn_in_c == pipeline.generate(["R"], seed=7).tobytes()
    installed = enat_run(tmp_path / "installed" / "bin", "--class", "R", "--seed", 7, "--out", tmp_path / "R.png")
    assert installed.returncode == 0, installed.stderr


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


# What is refused


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


def nested(engine: Path) -> None:
    deep = "[" * 200_000 + "]" * 200_000
    file = engine / FILE
    file.write_text(file.read_text().replace('"precision": "fp32"', f'"precision": {deep}'))


def linked_out(engine: Path) -> None:
    graph = engine / "decoder.onnx"
    graph.rename(engine.parent / "elsewhere.onnx")
    graph.symlink_to(engine.parent / "elsewhere.onnx")


def made_a_folder(engine: Path) -> None:
    (engine / "decoder.onnx").unlink()
    (engine / "decoder.onnx").mkdir()


ENTRY = {"size": 1, "sha256": ""}
MALFORMED: dict[str, tuple[Edit | Callable[[Path], object], str]] = {
    "another format": (lambda data: data.update(format="other"), 'format is "other", expected "enat-engine"'),
    "no format": (lambda data: data.pop("format"), "format is missing"),
    "newer": (lambda data: data.update(version=2), "newer"),
    "much newer": (lambda data: data.update(version=2**64), "version is "),
    "a version in words": (lambda data: data.update(version="1"), 'version is "1"'),
    "no model": (lambda data: data.pop("model"), "model is missing"),
    "a model that is none": (lambda data: data.update(model=[1]), "model is an array of 1"),
    "no tokens": (lambda data: data["model"].update(grid=0), "grid is 0"),
    "more tokens than fit": (lambda data: data["model"].update(grid=2**40), "grid is 1099511627776"),
    "half a token": (lambda data: data["model"].update(grid=1.5), "grid is 1.5"),
    "codes that are true": (lambda data: data["model"].update(codes=True), "codes is true"),
    "a name too few": (lambda data: data["model"].update(class_names=["a"]), "class_names is an array of 1"),
    "names that are none": (lambda data: data["model"].update(class_names=[{}] * 36), "class_names"),
    "too many steps": (lambda data: data["sampling"].update(steps=65), "steps is 65"),
    "a negative guidance": (lambda data: data["sampling"].update(cfg_scale=-1), "cfg_scale is -1"),
    "an endless guidance": (lambda data: data["sampling"].update(cfg_scale=float("inf")), "not valid JSON"),
    "a huge guidance": (lambda data: data["sampling"].update(cfg_scale=10**400), "not valid JSON"),
    "another type": (lambda data: data.update(float_type="bfloat16"), 'float_type is "bfloat16"'),
    "a long type": (lambda data: data.update(float_type="x" * 1000), "x…, expected float32"),
    "a source that is none": (lambda data: data.update(source=1), "source is 1"),
    "builds that are none": (lambda data: data.update(builds={}), "builds is an empty object"),
    "no bits": (lambda data: data.update(calibration={"weight_bits": 0}), "weight_bits is 0"),
    "no sampler": (lambda data: data["files"].pop("sampler.onnx"), "sampler.onnx among them"),
    "an entry that is none": (lambda data: data["files"].update({"sampler.onnx": 1}), 'files["sampler.onnx"] is 1'),
    "another size": (lambda data: data["files"]["sampler.onnx"].update(size=1), "sampler.onnx: 12 bytes, expected 1:"),
    "another hash": (lambda data: data["files"]["sampler.onnx"].update(sha256="0" * 64), "sampler.onnx: sha256 "),
    "a parent": (lambda data: data["files"].update({"../outside": ENTRY}), "inside the engine"),
    "an absolute path": (lambda data: data["files"].update({"/etc/passwd": ENTRY}), "inside the engine"),
    "a way round": (lambda data: data["files"].update({"a/../../b": ENTRY}), "inside the engine"),
    "no name": (lambda data: data["files"].update({"": ENTRY}), "inside the engine"),
    "the folder": (lambda data: data["files"].update({".": ENTRY}), "inside the engine"),
    "a backslash": (lambda data: data["files"].update({"a\\b": ENTRY}), "inside the engine"),
    "a zero": (lambda data: data["files"].update({"a\0b": ENTRY}), "inside the engine"),
    "a long name": (lambda data: data["files"].update({"x" * 300: ENTRY}), "missing"),
    "two lines": (lambda data: data["files"].update({"a\nb": ENTRY}), "a?b: missing"),
    "no character": (lambda data: data["files"].update({"\ud800": ENTRY}), "not valid JSON"),
    "a file that is gone": (lambda data: data["files"].update(gone=ENTRY), "gone: missing; the manifest lists it with 1 bytes"),
    "nested": (nested, "precision is an array of 1, expected a string"),
    "an end too early": (lambda engine: os.truncate(engine / FILE, 300), "not valid JSON"),
    "nothing": (lambda engine: os.truncate(engine / FILE, 0), "not valid JSON"),
    "a list": (lambda engine: (engine / FILE).write_text("[]"), "the manifest is an array of 0"),
    "bytes": (lambda engine: (engine / FILE).write_bytes(np.random.default_rng(0).bytes(999)), "not valid JSON"),
    "brackets": (lambda engine: (engine / FILE).write_text("[" * 500_000), "not valid JSON"),
    "no manifest": (lambda engine: (engine / FILE).unlink(), "it has no manifest.json"),
    "no engine": (shutil.rmtree, "no such directory"),
    "a link out": (linked_out, "decoder.onnx: leads out of the engine directory"),
    "a folder for a file": (made_a_folder, "decoder.onnx: missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_manifests(built: Path, tmp_path: Path, name: str) -> None:
    edit, message = MALFORMED[name]
    on_data = edit.__code__.co_varnames[:1] == ("data",) if hasattr(edit, "__code__") else False
    engine = engine_of(tmp_path / "engine", edit if on_data else lambda data: None)  # type: ignore[arg-type]
    if not on_data:
        edit(engine)  # type: ignore[arg-type]
    refused(enat_run(built, "--class", 0, "--out", tmp_path / "x.png", engine=engine), engine, message)


@pytest.fixture(scope="module")
def reader(plain: Path) -> Iterator[Callable[[Path], str]]:
    """Asks one process about one engine after the other."""
    with subprocess.Popen([plain / "tests" / "read-manifests"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout

        def read(engine: Path) -> str:
            process.stdin.write(f"{engine}\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            return process.stdout.readline().rstrip("\n")  # type: ignore[union-attr]

        yield read
        process.stdin.close()


@settings(max_examples=300)
@given(data=st.data())
def test_whatever_python_refuses_is_refused(reader: Callable[[Path], str], tmp_path: Path, data: st.DataObject) -> None:
    """Whatever stands at any place of the manifest: both read the engine, or both refuse it."""
    engine = tmp_path / "engine"
    if not engine.exists():
        engine_of(engine)
        assert reader(engine) == "ok"
    rewritten(engine)
    manifest = json.loads((engine / FILE).read_text())
    put_anything_anywhere(manifest, data, st.integers(-(2**70), 4096) | st.floats(allow_nan=False, allow_infinity=False))
    (engine / FILE).write_text(json.dumps(manifest))
    try:
        read_manifest(engine)
        expected = "ok"
    except EnatError:
        expected = str(engine)
    answer = reader(engine)
    assert answer.startswith(expected), answer


@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs_that_are_damaged(built: Path, tmp_path: Path, graph: str) -> None:
    """In files whose size and hash are as the manifest says."""
    engine = engine_of(tmp_path / "engine", graphs=True)
    file = engine / graph
    whole = file.read_bytes()
    noise = np.random.default_rng(1).bytes(1000)
    for damaged in (b"", whole[:1], whole[:1000], whole[: len(whole) // 2], whole[:-1], noise):
        file.write_bytes(damaged)
        result = enat_run(built, "--class", 0, "--out", tmp_path / "x.png", engine=rewritten(engine))
        refused(result, file, codes=(1, 2))
    for start in range(0, len(whole), len(whole) // 5):  # in the middle it may be weights that are lost, and other pictures
        file.write_bytes(whole[:start] + noise + whole[start + len(noise) :])
        result = enat_run(built, "--class", 0, "--seed", 0, "--out", tmp_path / "x.png", engine=rewritten(engine))
        if result.returncode:
            refused(result, engine, codes=(1, 2))
    file.write_bytes(whole[:-1])
    (engine / FILE).write_bytes((BUNDLED_ENGINE / FILE).read_bytes())
    refused(enat_run(built, "--class", 0, "--out", "x.png", engine=engine), f"{file}: {len(whole) - 1} bytes, expected {len(whole)}")
    file.write_bytes((BUNDLED_ENGINE / GRAPHS[GRAPHS.index(graph) - 1]).read_bytes())
    refused(enat_run(built, "--class", 0, "--out", "x.png", engine=rewritten(engine)), f"{file}: it has no ")


def altered(engine: Path, graph: str, output: str, kind: str, inputs: list[str], options: dict[str, Any]) -> None:
    """Sends a graph's output through one more operator, whose result takes its name."""
    model = onnx.load(engine / graph)
    for node in model.graph.node:
        node.output[:] = ["honest" if name == output else name for name in node.output]
        node.input[:] = ["honest" if name == output else name for name in node.input]
    constants = {"thousand": np.array(1000), "zero": np.array([0]), "one": np.array([1])}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    model.graph.node.append(onnx.helper.make_node(kind, inputs, [output], **options))
    for info in model.graph.output:
        if info.name == output:
            info.type.tensor_type.ClearField("shape")
    onnx.save(model, engine / graph)


LIES: dict[str, tuple[str, str, tuple[str, list[str], dict[str, Any]], str]] = {
    "positions beyond the last": ("sampler", "revealed_positions", ("Add", ["honest", "thousand"], {}), "it gave the position 10"),
    "positions before the first": ("sampler", "revealed_positions", ("Sub", ["honest", "thousand"], {}), "it gave the position -"),
    "tokens too many": ("sampler", "revealed_tokens", ("Concat", ["honest", "honest"], {"axis": 1}), "it gave revealed_tokens of"),
    "masked ones too many": ("sampler", "masked_positions", ("Concat", ["honest", "honest"], {"axis": 1}), "it gave masked_positions of"),
    "rows too few": ("condition", "decoder_modulation", ("Slice", ["honest", "zero", "one"], {}), "it gave decoder_modulation of shape"),
    "pictures in a row": ("image_decoder", "images", ("Flatten", ["honest"], {}), "it gave images of shape [1, 12288]"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_graphs_that_break_the_contract(built: Path, tmp_path: Path, lie: str) -> None:
    graph, output, node, message = LIES[lie]
    engine = engine_of(tmp_path / "engine", graphs=True)
    altered(engine, f"{graph}.onnx", output, *node)
    refused(enat_run(built, "--class", 0, "--out", tmp_path / "x.png", engine=rewritten(engine)), f"{graph}.onnx: ", message)


def test_an_engine_without_pictures(plain: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    engine = engine_of(tmp_path / "engine", graphs=True)
    (engine / "image_decoder.onnx").unlink()
    rewritten(engine)
    refused(enat_run(plain, "--class", 0, "--out", tmp_path / "x.png", engine=engine), engine, "no image decoder")
    assert np.array_equal(tokens_of(plain, tmp_path, "--class", "A", "--seed", 1, engine=engine), pipeline.generate_tokens(["A"], seed=1))


@pytest.mark.parametrize("name", ["x.png", "x.npy"])
def test_a_full_disk_leaves_the_file_that_was_there(plain: Path, tmp_path: Path, name: str) -> None:
    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    (tmp_path / name).write_text("earlier")
    refused(enat_run(plain, "--class", "1", "--out", tmp_path / name, preexec_fn=small_files), name, "cannot be written", codes=(1,))
    assert (tmp_path / name).read_text() == "earlier" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "folder.png").mkdir()
    refused(enat_run(plain, "--class", "1", "--out", tmp_path / "folder.png"), "is a folder; expected a file to write")


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--out", "x.png"], "at least one class", 2),
        (["--class", "1"], "expected --out", 2),
        (["--class", "1", "--out", "x.jpg"], "ends in .png or .npy", 2),
        (["--class", "1", "--out"], "expected a value after --out", 2),
        (["--size", "1"], "unknown argument '--size'", 2),
        (["--seed", "-1"], "expected a number for --seed, got '-1'", 2),
        (["--seed", "18446744073709551616"], "--seed", 2),
        (["--steps", "8.5"], "expected a number for --steps, got '8.5'", 2),
        (["--class", "1", "--out", "x.png", "--steps", "65"], "expected 1 to 64 steps, got 65", 2),
        (["--class", "1", "--out", "x.png", "--guidance", "nan"], "guidance of 0 or more", 2),
        (["--class", "1", "--out", "x.png", "--mask-temperature", "-0.5"], "mask temperature of 0 or more", 2),
        (["--class", "1", "--out", "x.png", "--sampling-temperature", "inf"], "sampling temperature of 0 or more", 2),
        (["--class", "1", "--out", "x.png", "--num", "0"], "1 or more images a class", 2),
        (["--class", "1", "--out", "x.png", "--batch-size", "0"], "batch size of 1 or more", 2),
        (["--class", "1", "--out", "x.png", "--columns", "0"], "1 or more for --columns", 2),
        (["--class", "1", "--out", "x.png", "--threads", "0"], "1 or more for --threads", 2),
        (["--class", "1", "--out", "x.png", "--device", "gpu"], "unknown device 'gpu'", 2),
        (["--class", "1", "--out", "x.png", "--device", "cuda:x"], "unknown device 'cuda:x'", 2),
        (["--class", "1", "--out", "x.png", "--provider", "rocm"], "unknown provider 'rocm'", 2),
        (["--class", "1", "--out", "x.png", "--device", "cuda", "--provider", "cpu"], "got the device cuda", 2),
        (["--class", "1", "--out", "x.png", "--device", "cuda:0"], "cannot use cuda:0 (cuda)", 1),
        (["--class", "1", "--out", "x.png", "--device", "cuda:0", "--provider", "tensorrt"], "cannot use cuda:0 (tensorrt)", 1),
        (["--class", "1", "--out", "/nowhere/x.png"], "/nowhere/x.png: cannot be written", 2),
        (["--class", "1", "--out", "/nowhere/x.npy", "--seed", "1"], "/nowhere/x.npy: cannot be written", 2),
    ],
)
def test_wrong_arguments(built: Path, arguments: list[str], message: str, code: int) -> None:
    refused(enat_run(built, *arguments), message, codes=(code,))


def test_no_engine(plain: Path) -> None:
    refused(call(plain / "enat-run-cpp", "--class", "1", "--out", "x.png"), "expected --engine")
    assert "usage: enat-run-cpp" in done(plain / "enat-run-cpp", "-h")
