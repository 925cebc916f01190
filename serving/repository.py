"""A Triton model repository around an engine: the engine and the runtime inside, ready to be mounted or copied to a server."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EngineError, InputError
from ..runtime.backends import BACKENDS, MOST_IMAGES, check_precision
from ..runtime.builds import read_builds
from ..runtime.files import is_mount, replace_folder
from ..runtime.manifest import ALL_GRAPHS, FILE, SETTINGS, Manifest, read_manifest
from .config import Word, parameters, pbtxt
from .graphs import graph_configs

CONFIG = "config.pbtxt"
LONGEST_NAME = 200  # of a model; file systems take 255, with what is put behind it
LARGEST, LARGEST_TIME = 2**31 - 1, 2**63 - 1  # numbers that Triton's configuration holds
PACKAGE = Path(__file__).parent.parent
PACKAGE_FILES = ("__init__.py", "errors.py", "py.typed", "runtime", "serving")  # what a server needs of enat
MODEL = '''"""Written by enat-triton."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "runtime"))

from enat.serving.triton_model import {cls} as TritonPythonModel  # noqa: E402, F401
'''
INPUT_TYPES = {
    "class_id": "TYPE_INT64",
    "class_name": "TYPE_STRING",
    "seed": "TYPE_UINT64",
    "steps": "TYPE_INT32",
    **{name: "TYPE_FP32" for name in SETTINGS if name != "steps"},
}


@dataclass(frozen=True)
class Options:
    """How Triton is to run an engine.

    name: of the model; the one of PNG files is called so with `_png` behind. max_batch: pictures drawn at once. queue_delay_us: how long
    a request waits for others to be drawn with. instances: processes, each with the engine in memory; on `gpus`, or on the CPU without
    any. png_instances: of the model that encodes, as many as draw by default. priorities: levels, 0 for none. queue_size,
    queue_timeout_us: requests that wait at most, and how long; 0 for no limit. env: EXECUTION_ENV_PATH, a packed or unpacked environment
    with the wheels. threads: of an instance on the CPU; by default they share all.
    """

    name: str = "enat"
    max_batch: int = 8
    queue_delay_us: int = 5000
    instances: int = 1
    gpus: tuple[int, ...] = ()
    png_instances: int | None = None
    priorities: int = 0
    queue_size: int = 0
    queue_timeout_us: int = 0
    env: str | None = None
    backend: str = "auto"
    threads: int | None = None
    warmup: bool = True
    graphs: bool = False

    def __post_init__(self) -> None:
        least = {"max_batch": 1, "instances": 1, "png_instances": 0, "threads": 1}
        for option in (*least, "queue_delay_us", "priorities", "queue_size", "queue_timeout_us"):
            value, lowest, largest = getattr(self, option), least.get(option, 0), LARGEST_TIME if option.endswith("_us") else LARGEST
            if value is not None and not lowest <= value <= largest:
                name = option.removesuffix("_us").replace("_", " ")
                raise InputError(f"expected {name} of {lowest} {'or more' if value < lowest else f'to {largest}'}, got {value}")
        if not re.fullmatch(r"\w[\w.-]*", self.name, re.ASCII):
            raise InputError(f"expected a model name of ASCII letters, digits, _, - and ., got {self.name!r}")
        if len(self.name) > LONGEST_NAME:
            raise InputError(f"expected a model name of at most {LONGEST_NAME} characters, got {len(self.name)}")
        if self.env and not self.env.isprintable():  # bytes that are no text are not, either
            raise InputError(f"expected an environment whose path is text, got {self.env!r}")
        if self.backend != "auto" and self.backend not in BACKENDS:
            raise InputError(f"unknown backend {self.backend!r}; expected auto or one of {', '.join(BACKENDS)}")
        for gpu in self.gpus:
            if not 0 <= gpu <= LARGEST:
                raise InputError(f"expected GPUs of 0 {'or more' if gpu < 0 else f'to {LARGEST}'}, got {gpu}")
        if len(set(self.gpus)) < len(self.gpus):
            raise InputError(f"expected each GPU once, got {','.join(map(str, self.gpus))}")
        if self.backend != "auto" and ("cuda" if self.gpus else "cpu") not in BACKENDS[self.backend]:
            raise InputError(f"the backend {self.backend} {'does not run on GPUs' if self.gpus else 'needs --gpus'}")

    @property
    def encoders(self) -> int:
        """Each waits for the batch that its pictures are drawn in, so that fewer than draw would leave some without work."""
        return self.instances * max(1, len(self.gpus)) if self.png_instances is None else self.png_instances


def write_repository(engine: Path, out: Path, options: Options, force: bool = False) -> list[str]:
    """Writes a model repository for an engine. Returns the names of its models.

    Models of other names that are in `out` stay. Raises InputError where one of these names is taken and `force` is not given,
    EngineError where the engine has no image decoder.
    """
    manifest = read_manifest(engine)
    manifest.require_images()
    built = [build.options.get("max_batch") for build in read_builds(manifest)]
    if options.backend == "tensorrt" and not any(isinstance(most, int) and most >= options.max_batch for most in built):
        found = f"builds for at most {', '.join(map(str, built))}" if built else "no TensorRT build"
        raise InputError(f"{engine}: has {found}; expected one for {options.max_batch} pictures at once")
    check_precision(options.backend, manifest)
    most = MOST_IMAGES.get(options.backend)
    if most and options.max_batch > most:
        raise InputError(f"{options.backend} draws at most {most} pictures at once, got a max batch of {options.max_batch}")
    models: dict[str, dict[str, Any]] = {options.name: picture_config(manifest, options)}
    if options.encoders:
        models[f"{options.name}_png"] = png_config(options)
    graphs = graph_configs(manifest, options.name, options.gpus) if options.graphs else {}
    names = [*models, *graphs]
    if (out / FILE).is_file():
        raise InputError(f"{out}: has a {FILE}, as engines do; expected a model repository, or a new folder")
    for name in names:
        if (out / name).exists() and not force:
            raise InputError(f"{out / name}: exists; --force replaces it")
        if (out / name).exists() and not (out / name / CONFIG).is_file():
            raise InputError(f"{out / name}: exists and is not a model; it is not replaced, remove it yourself or choose another --name")
    for kind in ("png", *(Path(graph).stem for graph in ALL_GRAPHS)):
        left = out / f"{options.name}_{kind}"
        if left.name not in names and (left / CONFIG).is_file():
            raise InputError(f"{left}: would stay, and serve an earlier engine beside this one; remove it, or write it anew too")
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    # Beside the repository, where a server that polls it does not look; if that is another file system, in it.
    place = out if is_mount(out) or not os.access(out.parent, os.W_OK) else out.parent
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=place))
    try:
        for name, config in models.items():
            version = partial / name / "1"
            version.mkdir(parents=True)
            (partial / name / CONFIG).write_text(pbtxt(config), "utf-8")
            cls = "PictureModel" if name == options.name else "PngModel"
            (version / "model.py").write_text(MODEL.format(cls=cls), "utf-8")
            copy_package(version / "runtime" / "enat")
        copy_engine(manifest, partial / options.name / "1" / "engine")
        for name, (config, files) in graphs.items():
            version = partial / name / "1"
            version.mkdir(parents=True)
            (partial / name / CONFIG).write_text(pbtxt(config), "utf-8")
            for target, source in files.items():
                (version / target).parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(partial / options.name / "1" / "engine" / source, version / target)
        replace_models(out, names, partial)
    finally:
        if all((out / name).exists() or not (partial / f"{name}.old").exists() for name in names):
            shutil.rmtree(partial, ignore_errors=True)
    return names


def replace_models(out: Path, names: Sequence[str], partial: Path) -> None:
    """Puts models in their place, all of them or none: those that were there are moved to `partial`, with `.old` behind their names."""
    done: list[str] = []
    try:
        for name in names:
            replace_folder(out / name, partial / name, partial / f"{name}.old")
            done.append(name)
    except BaseException:
        for name in reversed(done):
            (out / name).rename(partial / name)
            if (partial / f"{name}.old").exists():
                (partial / f"{name}.old").rename(out / name)
        raise


def dynamic_batching(options: Options) -> dict[str, Any]:
    """Of the model that draws and of the one that encodes, which a request waits in first."""
    batching: dict[str, Any] = {"max_queue_delay_microseconds": options.queue_delay_us}
    if options.priorities:
        batching |= {"priority_levels": options.priorities, "default_priority_level": (options.priorities + 1) // 2}
    if options.queue_size or options.queue_timeout_us:
        batching["default_queue_policy"] = {
            "timeout_action": Word("REJECT"),
            "default_timeout_microseconds": options.queue_timeout_us,
            "allow_timeout_override": True,
            "max_queue_size": options.queue_size,
        }
    return batching


def picture_config(manifest: Manifest, options: Options) -> dict[str, Any]:
    size = manifest.model.image_size
    return {
        "name": options.name,
        "backend": "python",
        "max_batch_size": options.max_batch,
        "input": inputs(),
        "output": [
            {"name": "image", "data_type": Word("TYPE_UINT8"), "dims": [size, size, 3]},
            {"name": "seed", "data_type": Word("TYPE_UINT64"), "dims": [1]},
            {"name": "metadata", "data_type": Word("TYPE_STRING"), "dims": [1]},
        ],
        "dynamic_batching": dynamic_batching(options),
        "instance_group": [
            {
                "count": options.instances,
                "kind": Word("KIND_GPU" if options.gpus else "KIND_CPU"),
                "gpus": list(options.gpus) or None,
            }
        ],
        "model_warmup": [warmup(batch) for batch in dict.fromkeys((1, options.max_batch))] if options.warmup else None,
        "parameters": parameters(
            {
                "EXECUTION_ENV_PATH": options.env,
                "backend": options.backend,
                "threads": None if options.threads is None else str(options.threads),
            }
        ),
    }


def png_config(options: Options) -> dict[str, Any]:
    return {
        "name": f"{options.name}_png",
        "backend": "python",
        "max_batch_size": options.max_batch,
        "input": inputs(),
        "output": [
            {"name": "png", "data_type": Word("TYPE_STRING"), "dims": [1]},
            {"name": "seed", "data_type": Word("TYPE_UINT64"), "dims": [1]},
        ],
        # It waits for pictures most of the time, so it takes what has come together while it did.
        "dynamic_batching": dynamic_batching(options),
        "instance_group": [{"count": options.encoders, "kind": Word("KIND_CPU")}],
        "parameters": parameters({"EXECUTION_ENV_PATH": options.env, "pictures": options.name}),
    }


def inputs() -> list[dict[str, Any]]:
    return [{"name": name, "data_type": Word(kind), "dims": [1], "optional": True} for name, kind in INPUT_TYPES.items()]


def warmup(batch: int) -> dict[str, Any]:
    """A batch of pictures of class 0, drawn before the model is ready: sessions are made, memory is taken, GPUs have seen the shapes."""
    zeros = {"class_id": "TYPE_INT64", "seed": "TYPE_UINT64"}
    return {
        "name": f"batch of {batch}",
        "batch_size": batch,
        "count": 3,  # run, recorded, launched
        "inputs": [{"key": name, "value": {"data_type": Word(kind), "dims": [1], "zero_data": True}} for name, kind in zeros.items()],
    }


def copy_package(target: Path) -> None:
    for name in PACKAGE_FILES:
        for source in sorted((PACKAGE / name).rglob("*")) if (PACKAGE / name).is_dir() else [PACKAGE / name]:
            part = source.relative_to(PACKAGE)
            if source.is_file() and "__pycache__" not in part.parts:
                (target / part).parent.mkdir(parents=True, exist_ok=True)
                copy_file(source, target / part)


def copy_engine(manifest: Manifest, target: Path) -> None:
    """The engine's files, and its builds. Raises EngineError where they are not, or not any more, those that the manifest lists."""
    target.mkdir()
    builds = {name: entry for build in read_builds(manifest) for name, entry in build.files.items()}
    with manifest.unchanged({**manifest.files, **builds}):
        for name in (*manifest.files, *builds, FILE):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(manifest.root / name, target / name)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system has them, as engines are large. Raises EngineError where `target` is there already."""
    try:
        target.hardlink_to(source.resolve())  # a link to a link leads nowhere elsewhere
    except FileExistsError as error:
        raise EngineError(f"{source}: listed twice in {FILE}") from error
    except OSError:
        copy_file(source, target)


def copy_file(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        error.filename, error.filename2 = str(target), None  # it names the source first, which may lie on another disk
        raise
