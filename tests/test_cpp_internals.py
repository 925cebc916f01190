"""What the C++ library computes inside, number for number as in Python: noise, schedules, threads, folders, profiles."""

from __future__ import annotations

import ctypes
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from cpp_library import engine_of
from test_cores import CONTROL_GROUPS, SIBLINGS, processors, system
from test_noise import VECTORS

from enat.runtime.backends import MOST_IMAGES
from enat.runtime.backends.cache_folder import cache_folder
from enat.runtime.backends.onnxruntime_cpu import pictures_at_once
from enat.runtime.backends.onnxruntime_cuda import joined
from enat.runtime.cores import allowed_threads
from enat.runtime.manifest import FILE, manifest_text, read_manifest
from enat.runtime.noise import noise
from enat.runtime.pipeline import BUNDLED_ENGINE
from enat.runtime.profiles import general_profile
from enat.runtime.schedule import schedule


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


@pytest.mark.parametrize("siblings", SIBLINGS)
def test_cores(internals: ctypes.CDLL, siblings: tuple[str, ...], tmp_path: Path) -> None:
    assert internals.test_core_count(str(processors(tmp_path, siblings)).encode()) == SIBLINGS[siblings]


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

    def found(engine: Path = BUNDLED_ENGINE) -> str:
        return str(internals.test_cache_folder(str(engine).encode()).decode())

    def numbers(content: dict[str, Any]) -> None:
        """Of all sizes, which are written in the same way again; and letters beyond ASCII."""
        values = np.random.default_rng(0).normal(size=500) * 10.0 ** np.arange(-12, 13).repeat(20)
        content["calibration"] = {
            "harm": dict(zip(map(str, range(500)), values.tolist(), strict=True)),
            "classes": ["é", "\u2028", 1, None],
        }

    manifest = read_manifest(BUNDLED_ENGINE)
    built = engine_of(tmp_path / "built", numbers)
    before = read_manifest(built).hash
    content = json.loads((built / FILE).read_text())
    (built / FILE).write_bytes(manifest_text({**content, "builds": [{"backend": "other", "files": {}}]}))
    monkeypatch.delenv("ENAT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name in ("HOME", "XDG_CACHE_HOME", "ENAT_CACHE"):  # each goes before those before it
        monkeypatch.setenv(name, str(tmp_path / name))
        assert found() == str(cache_folder(manifest, "kind"))
        assert found().startswith(str(tmp_path / name)) and Path(found()).is_dir()
    assert read_manifest(built).hash == before and found(built) == str(cache_folder(read_manifest(built), "kind"))  # builds change nothing
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ENAT_CACHE", str(tmp_path / "file"))
    assert found() == f"{tmp_path / 'file'}: the cache folder (ENAT_CACHE) cannot be written: Not a directory"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENAT_CACHE", "here")
    assert found() == str(cache_folder(manifest, "kind")) and found().startswith(str(tmp_path / "here"))
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
        assert all(map(np.array_equal, (choice[None], confidence[None]), noise([int(seed) for seed in seeds], [step], length)))


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


def test_batches_that_are_drawn_in_smaller_ones(internals: ctypes.CDLL) -> None:
    """As in Python, and on GPUs never."""
    internals.test_pictures_at_once.restype = ctypes.c_uint64
    manifest = read_manifest(BUNDLED_ENGINE)
    for grid, dim, threads, slots in ((8, 256, 1, 1), (16, 1024, 2, 1), (16, 1024, 1, 2), (16, 768, 16, 3), (32, 1024, 1, 1)):
        model = replace(manifest.model, grid=grid, dim=dim)
        found = [internals.test_pictures_at_once(*map(ctypes.c_int64, (grid, dim)), device, threads, slots) for device in (b"cpu", b"cuda")]
        assert found == [pictures_at_once(replace(manifest, model=model), threads / slots), 0]


def test_what_tensorrt_builds_for(internals: ctypes.CDLL) -> None:
    """ONNX Runtime's provider: as in Python."""
    internals.test_general_profile.restype = ctypes.c_char_p
    manifest = read_manifest(BUNDLED_ENGINE)
    modulation = {one.name: tuple(one.shape[1:]) for one in ort.InferenceSession(manifest.path("condition.onnx")).get_outputs()}
    most = MOST_IMAGES["onnxruntime-tensorrt"]
    for number, graph in enumerate(("condition", "encoder", "decoder", "", "image_decoder")):
        if graph:
            profile = general_profile(manifest, graph, (1, 1, most), modulation)
            expected = "".join(f"{joined(profile, which)}\n" for which in range(3))
            found = internals.test_general_profile(str(BUNDLED_ENGINE).encode(), number, f"{graph}_modulation".encode())
            assert found.decode() == expected
    internals.test_most_pictures.restype = ctypes.c_uint64
    assert [internals.test_most_pictures(provider) for provider in (b"tensorrt", b"cuda", b"")] == [most, 0, 0]
