from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tensorrt_stand_in import import_tensorrt

from enat import Pipeline
from enat.export.directory import write_manifest
from enat.runtime.manifest import FILE, Manifest, read_manifest
from enat.runtime.pipeline import BUNDLED_ENGINE

# Machines may be slow at times, for drawing examples too; and fixtures of one test serve all of its examples.
settings.register_profile("enat", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile("enat")

pytest_plugins = ["cpp_library"]

DATA = Path(__file__).parent / "data"

Make = Callable[..., Path]


@dataclass(frozen=True)
class Golden:
    """A reference case: a small network, and what the reference implementation computed with it."""

    folder: Path
    case: dict[str, Any]

    @property
    def ckpt(self) -> Path:
        return self.folder / "nnet_ema.pth"

    @property
    def vqgan(self) -> Path:
        return self.folder / "vqgan.ckpt"

    def load(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.folder / f"{name}.npz") as data:
            return {key: data[key].astype(np.int64) if data[key].dtype == np.int16 else data[key] for key in data.files}

    @property
    def split(self) -> dict[str, int]:
        return {"heads": self.case["heads"], "encoder_depth": self.case["encoder_depth"]}

    @property
    def sampling(self) -> dict[str, float]:
        return {name: self.case[name] for name in ("steps", "cfg_scale", "mask_temp", "samp_temp")}


def read_golden(name: str) -> Golden:
    return Golden(DATA / name, json.loads((DATA / name / "case.json").read_text()))


@pytest.fixture(scope="session", params=["tiny", "odd"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return read_golden(request.param)


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The golden cases as engines, each exported once."""
    made: dict[str, Path] = {}

    def engine(name: str) -> Path:
        if name not in made:
            from enat.export.engine import export_engine

            case = read_golden(name)
            made[name] = tmp_path_factory.mktemp("engines") / name
            export_engine(case.ckpt, made[name], vqgan=case.vqgan, sampling=case.sampling, **case.split)
        return made[name]

    return engine


@pytest.fixture(scope="session")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Arguments of enat-export for a network of one block a half: where an export is waited for, but not what it exports."""
    import torch

    path = tmp_path_factory.mktemp("smallest") / "net.pth"
    state = torch.load(read_golden("tiny").ckpt, weights_only=True)
    torch.save({key: value for key, value in state.items() if not re.search(r"\bblocks\.[2-9]", key)}, path)
    return "--ckpt", path, "--heads", 3, "--encoder-depth", 1


@pytest.fixture
def engine_copy(engines: Callable[[str], Path], tmp_path: Path) -> Path:
    """An engine to damage."""
    return Path(shutil.copytree(engines("tiny"), tmp_path / "engine"))


@pytest.fixture(scope="session")
def manifest(engines: Callable[[str], Path]) -> Manifest:
    return read_manifest(engines("tiny"))


def modulation(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Shapes of the modulation beyond its rows."""
    graph = onnx.load(manifest.path("condition.onnx")).graph
    return {one.name: tuple(dim.dim_value for dim in one.type.tensor_type.shape.dim[1:]) for one in graph.output}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The bundled engine in other precisions, each made once; the calibration is shared."""
    from enat.export.cli import main as export_main

    folder = tmp_path_factory.mktemp("precisions")
    engines: dict[str, Path] = {}

    def engine(name: str, *options: str) -> Path:
        if name not in engines:
            if "int8" in options and "--calibration-images" not in options:
                options += ("--calibration", str(folder / "calibration.npz"))
            result = invoke(export_main, "--engine", BUNDLED_ENGINE, "--out", folder / name, *options)
            assert result.exit_code == 0, result.stderr
            engines[name] = folder / name
        return engines[name]

    return engine


@pytest.fixture(scope="session")
def fp16(made: Make) -> Path:
    return made("fp16", "--precision", "fp16")


@pytest.fixture(scope="session")
def int8(made: Make) -> Path:
    return made("int8", "--precision", "int8")


@pytest.fixture(scope="session")
def int8_fp16(made: Make, int8: Path) -> Path:
    return made("int8-fp16", "--precision", "int8", "--float-type", "fp16")


@pytest.fixture(scope="session")
def int7(made: Make) -> Path:
    return made("int7", "--precision", "int8", "--weight-bits", "7", "--calibration-images", "8", "--float-layers", "none")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where OpenVINO keeps its compiled graphs."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENAT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def openvino(cache: Path) -> Iterator[Pipeline]:
    with Pipeline.load(backend="openvino") as pipeline:
        yield pipeline


@pytest.fixture(scope="session")
def reference() -> Iterator[Pipeline]:
    """The bundled engine on ONNX Runtime, whatever else is installed."""
    with Pipeline.load(backend="onnxruntime") as pipeline:
        yield pipeline


@pytest.fixture(scope="session")
def precisions(fp16: Path, int8: Path, int8_fp16: Path) -> dict[str, Path]:
    return {"fp16": fp16, "int8": int8, "int8-fp16": int8_fp16}


@pytest.fixture(scope="session")
def bundled() -> Iterator[Pipeline]:
    """The bundled engine."""
    with Pipeline.load() as pipeline:
        yield pipeline


@pytest.fixture(scope="session")
def trt() -> Any:
    """The module `tensorrt`, as far as it is there."""
    return import_tensorrt()


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """Calls what handles the signal, which is Python's own handler at first: what runs in the background ignores it. No signal is sent:
    pytest and the libraries of other tests may leave a process without the stack that signals are handled on.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def arrive() -> None:
        handler = signal.getsignal(signal.SIGINT)
        assert callable(handler)
        handler(signal.SIGINT, None)

    yield arrive
    signal.signal(signal.SIGINT, before)


def with_initializers(model: ir.Model, arrays: Mapping[str, np.ndarray]) -> ir.Model:
    """A copy of a graph with other constants under the same names."""
    copy = model.clone()
    for name, values in arrays.items():
        copy.graph.initializers[name].const_value = ir.tensor(values, name=name)
    return copy


def list_anew(engine: Path) -> Path:
    """Has the manifest list the files as they are now."""
    write_manifest(engine, json.loads((engine / FILE).read_text()))
    return engine


def put_anything_anywhere(manifest: dict[str, Any], data: st.DataObject, numbers: st.SearchStrategy[float]) -> None:
    """Puts some value, of such numbers where it holds any, at some place of a manifest or other record."""
    section: Any = manifest
    while True:
        key = data.draw(st.sampled_from(sorted(section) if isinstance(section, dict) else range(len(section))))
        if not (isinstance(section[key], dict | list) and section[key] and data.draw(st.booleans())):
            break
        section = section[key]
    text = st.text(max_size=5)
    values = st.recursive(
        st.none() | st.booleans() | numbers | text,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
        max_leaves=5,
    )
    section[key] = data.draw(values)


def invoke(command: click.Command, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


NOT_ERRORS = ("[", "seed ", "no --engine", "backend auto: ", "Warning: ")  # progress and notes on stderr


def refused(result: Result, *parts: str, code: int = 2) -> None:
    """One line on stderr that says what was wrong, and the exit code."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith(NOT_ERRORS)]
    assert result.exit_code == code, result.stderr
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
    for part in parts:
        assert part in lines[0]
