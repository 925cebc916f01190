"""The engine's manifest: read with every check of the contract, written last."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import __version__
from ..errors import EngineError, reason

FORMAT = "enat-engine"
VERSION = 1
FILE = "manifest.json"
HASHED_AT_LOAD = 64 * 2**20  # bytes; larger files are checked by size alone unless verification is asked for

LARGEST_GRID = 4096  # grid² must be a number that memory can hold
LARGEST, LARGEST_SIZE = 2**31 - 1, 2**63 - 1  # of other numbers, and of a file's bytes
LARGEST_SETTING = 1e6  # of sampling: far beyond any that is of use, and what is computed from it stays finite in float32

REQUIRED_GRAPHS = ("condition.onnx", "encoder.onnx", "decoder.onnx", "sampler.onnx")
IMAGE_GRAPHS = ("image_decoder.onnx", "image_encoder.onnx")
ALL_GRAPHS = (*REQUIRED_GRAPHS, *IMAGE_GRAPHS)

Entries = Mapping[str, Any]  # path in the engine directory → size and sha256
Stamp = tuple[int, int, int, int]  # device, inode, bytes, time of the last change in nanoseconds: another one is another file
READINGS = 3  # of an engine that is replaced while it is read


SETTINGS = ("steps", "guidance", "mask_temperature", "sampling_temperature")  # of a run, as programs and commands call them


@dataclass(frozen=True)
class ModelInfo:
    """Sizes of the network: grid² tokens an image, `codes` entries in the codebook, `num_classes` is the null label."""

    grid: int
    dim: int
    heads: int
    encoder_depth: int
    decoder_depth: int
    codes: int
    num_classes: int
    image_size: int | None
    class_names: tuple[str, ...] | None

    @property
    def length(self) -> int:
        return self.grid**2


@dataclass(frozen=True)
class Sampling:
    """The engine's default sampling settings."""

    steps: int
    cfg_scale: float
    mask_temp: float
    samp_temp: float

    def settings(self, **chosen: Any) -> dict[str, Any]:
        """A run's settings by the names of `Pipeline.generate`: these, where they are given and not None, else the engine's own."""
        own = dict(zip(SETTINGS, (self.steps, self.cfg_scale, self.mask_temp, self.samp_temp), strict=True))
        return own | {name: value for name, value in chosen.items() if value is not None}


@dataclass(frozen=True)
class Manifest:
    """What an engine directory says of itself. `source` tells what it was made from, `weight_bits` of what size the
    quantized weights are at most (8 where nothing is said), `builds` what was built from the graphs for some machine.
    `root` is where `folder` led when it was read, wherever a link or the working directory leads later.
    `hash` is the SHA-256 of manifest.json, which holds those of all files, as `manifest_text` writes it without builds."""

    folder: Path
    model: ModelInfo
    sampling: Sampling
    precision: str
    float_type: str
    files: dict[str, dict[str, Any]]
    source: dict[str, Any]
    weight_bits: int
    builds: list[Any]
    hash: str
    root: Path
    stamps: dict[str, Stamp] = field(default_factory=dict, compare=False)  # of files as they were when checked

    def path(self, name: str) -> Path:
        """The path of a file of the engine. Raises EngineError where the engine has no such file."""
        if name not in self.files:
            raise EngineError(f"{self.folder}: this engine has no {name}")
        return self.root / name

    def has(self, name: str) -> bool:
        return name in self.files

    def require_images(self) -> None:
        """Raises EngineError where the engine cannot make pictures."""
        if not self.has("image_decoder.onnx"):
            raise EngineError(
                f"{self.folder}: this engine has no image decoder and gives tokens only; "
                "ask for tokens, or export it again with its tokenizer (--vqgan)"
            )

    def files_of(self, graph: str) -> list[str]:
        """The files that a graph ("encoder", …) may read: its own, and those that no graph's name begins."""
        return [name for name in self.files if name.startswith(f"{graph}.onnx") or not name.startswith(ALL_GRAPHS)]

    @contextlib.contextmanager
    def reading(self, graph: str, verify: bool = False) -> Iterator[Path]:
        """The path of a graph whose files are read inside the `with` block. verify: hash them first, whatever their size.

        Raises EngineError where they are not those that were loaded: another engine may have been put in its place since.
        """
        path = self.path(f"{graph}.onnx")
        with self.unchanged({name: self.files[name] for name in self.files_of(graph)}, verify):
            yield path

    @contextlib.contextmanager
    def unchanged(self, entries: Entries, verify: bool = False) -> Iterator[None]:
        """The same for any files of the engine, when the block begins and when it ends."""
        for name, entry in entries.items():
            self.check_again(name, entry, verify)
        try:
            yield
        finally:
            for name, entry in entries.items():
                self.check_again(name, entry, False)

    def check_again(self, name: str, entry: object, verify: bool) -> None:
        """Looks at a file again, and into it where it is another one than when it was checked. Raises EngineError."""
        known = self.stamps.get(name)
        if known is None or stamp_of(self.root / name) == known:
            if known is None or verify:
                check_file(self, name, entry, verify)
            return
        try:
            check_file(self, name, entry, verify=True)
        except EngineError as error:
            raise EngineError(f"{error}; it was replaced after the engine had been loaded: load it again") from error


def stamp_of(path: Path) -> Stamp | None:
    """None where there is no such file."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_hash(*modules: ModuleType) -> str:
    """Of modules' sources, for what is kept of what they made; where there are no sources, as in frozen programs, enat's version."""
    try:
        return hashlib.sha256("".join(map(inspect.getsource, modules)).encode()).hexdigest()
    except OSError:
        return __version__


def manifest_text(content: dict[str, Any]) -> bytes:
    """manifest.json as enat writes it."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def read_manifest(folder: Path, verify: bool = False) -> Manifest:
    """Reads and checks an engine directory: format, version, sizes and hashes (of files over 64 MiB only with `verify`).

    Raises EngineError that names the file, what was found and what was expected.
    """
    for last in (False,) * (READINGS - 1) + (True,):
        before = stamp_of(folder / FILE)
        try:
            try:
                return checked_manifest(folder, verify)
            except OSError as error:
                raise EngineError(f"{error.filename or folder}: {reason(error)}") from error
        except EngineError:
            if last or stamp_of(folder / FILE) == before:
                raise  # else another engine was put in its place meanwhile
    raise AssertionError


def checked_manifest(folder: Path, verify: bool) -> Manifest:
    file, root = folder / FILE, folder.resolve()
    if not file.is_file():
        found = "no such directory" if not folder.exists() else f"it has no {FILE}" if folder.is_dir() else "a file"
        raise EngineError(f"{folder}: not an engine directory: {found}")
    try:
        data = json.loads((root / FILE).read_bytes().decode("utf-8-sig"), parse_constant=no_number)
        own = manifest_text({name: value for name, value in data.items() if name != "builds"} if isinstance(data, dict) else {})
    except (ValueError, RecursionError) as error:  # not JSON, or brackets without end
        raise EngineError(f"{file}: not valid JSON ({error})") from error
    reader = Reader(file)
    reader.expect(isinstance(data, dict), "the manifest", data, "an object")
    if data.get("format") != FORMAT:
        raise EngineError(f"{file}: format is {data.get('format')!r}, expected {FORMAT!r}")
    version = reader.integer(data, "version", 1, most=LARGEST_SIZE)
    if version > VERSION:
        raise EngineError(f"{file}: format version {version} is newer than this program reads (up to {VERSION}); update enat")
    model = reader.section(data, "model")
    sampling = reader.section(data, "sampling")
    files = reader.section(data, "files")
    calibration = reader.section(data, "calibration") if "calibration" in data else {}
    manifest = Manifest(
        folder=folder,
        model=read_model(reader, model),
        sampling=Sampling(
            reader.integer(sampling, "steps", 1),
            *(reader.setting(sampling, name) for name in ("cfg_scale", "mask_temp", "samp_temp")),
        ),
        precision=reader.text(data, "precision"),
        float_type=reader.choice(data, "float_type", ("float32", "float16")),
        files=files,
        source=reader.section(data, "source") if "source" in data else {},
        weight_bits=reader.integer(calibration, "weight_bits", 1) if "weight_bits" in calibration else 8,
        builds=reader.items(data, "builds") if "builds" in data else [],
        hash=hashlib.sha256(own).hexdigest(),
        root=root,
    )
    reader.expect(
        manifest.sampling.steps <= manifest.model.length, "sampling.steps", manifest.sampling.steps, f"at most {manifest.model.length}"
    )
    for name in IMAGE_GRAPHS:
        reader.expect(manifest.model.image_size is not None or name not in files, "model.image_size", None, f"a number, as {name} is there")
    for name in REQUIRED_GRAPHS:
        reader.expect(name in files, "files", sorted(files), f"{name} among them")
    for name, entry in files.items():
        check_file(manifest, name, entry, verify)
    return manifest


def no_number(word: str) -> None:
    """What Python's reader takes for a number, and JSON does not know."""
    raise ValueError(f"{word} is no number")


def read_model(reader: Reader, model: dict[str, Any]) -> ModelInfo:
    sizes = {"grid": reader.integer(model, "grid", 1, most=LARGEST_GRID)}
    sizes |= {name: reader.integer(model, name, 1) for name in ("dim", "heads", "encoder_depth", "decoder_depth", "codes", "num_classes")}
    image_size = None if model.get("image_size") is None else reader.integer(model, "image_size", 1)
    names = model.get("class_names")
    if names is not None:
        valid = isinstance(names, list) and len(names) == sizes["num_classes"] and all(isinstance(n, str) for n in names)
        found = f"{len(names)} entries" if isinstance(names, list) else names
        reader.expect(valid, "model.class_names", found, f"{sizes['num_classes']} strings or null")
    return ModelInfo(**sizes, image_size=image_size, class_names=None if names is None else tuple(names))


def check_file(manifest: Manifest, name: str, entry: object, verify: bool) -> None:
    """Raises EngineError unless the file lies inside the engine directory with the size and hash of its entry."""
    reader, where = Reader(manifest.folder / FILE), f"files[{name!r}]"
    plain = all(part not in ("", ".", "..") for part in name.split("/")) and "\\" not in name and "\0" not in name
    reader.expect(plain, where, name, "a path inside the engine directory")
    reader.expect(isinstance(entry, dict), where, entry, "an object with size and sha256")
    assert isinstance(entry, dict)
    size = reader.integer(entry, "size", 0, where, LARGEST_SIZE)
    digest = reader.text(entry, "sha256", where)
    path, shown = manifest.root / name, manifest.folder / name
    try:
        found = path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        found = False
    if not found:
        raise EngineError(f"{shown}: missing; the manifest lists it with {size} bytes")
    if not path.resolve().is_relative_to(manifest.root):
        raise EngineError(f"{shown}: leads out of the engine directory, to {path.resolve()}; cp -rL copies what links lead to")
    stamp = stamp_of(path)
    actual_size = path.stat().st_size
    if actual_size != size:
        raise EngineError(f"{shown}: {actual_size} bytes, expected {size}: the file is truncated or from another engine")
    if (verify or size <= HASHED_AT_LOAD) and (actual := sha256(path)) != digest:
        raise EngineError(f"{shown}: sha256 {actual[:16]}…, expected {digest[:16]}…: the file was altered or is from another engine")
    if stamp:
        manifest.stamps[name] = stamp


class Reader:
    """Typed access to parsed JSON; every refusal names the file, the key, what was found and what was expected."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def expect(self, condition: bool, key: str, found: object, expected: str) -> None:
        if not condition:
            shown = repr(found)
            raise EngineError(f"{self.file}: {key} is {shown if len(shown) < 80 else shown[:77] + '…'}, expected {expected}")

    def section(self, data: dict[str, Any], key: str) -> dict[str, Any]:
        value = data.get(key)
        self.expect(isinstance(value, dict), key, value, "an object")
        assert isinstance(value, dict)
        return value

    def items(self, data: dict[str, Any], key: str) -> list[Any]:
        value = data.get(key)
        self.expect(isinstance(value, list), key, value, "an array")
        assert isinstance(value, list)
        return value

    def integer(self, data: dict[str, Any], key: str, least: int, where: str = "", most: int = LARGEST) -> int:
        value = data.get(key)
        beyond = type(value) is int and value > most
        expected = f"an integer of {least} to {most}" if most < LARGEST or beyond else f"an integer of at least {least}"
        self.expect(type(value) is int and least <= value <= most, f"{where} {key}".strip(), value, expected)
        assert isinstance(value, int)
        return value

    def setting(self, data: dict[str, Any], key: str) -> float:
        value = data.get(key)
        valid = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LARGEST_SETTING
        self.expect(valid, key, value, "a number of 0 to 1e6")
        assert isinstance(value, int | float)
        return float(value)

    def text(self, data: dict[str, Any], key: str, where: str = "") -> str:
        value = data.get(key)
        self.expect(isinstance(value, str), f"{where} {key}".strip(), value, "a string")
        assert isinstance(value, str)
        return value

    def choice(self, data: dict[str, Any], key: str, allowed: tuple[str, ...]) -> str:
        value = self.text(data, key)
        self.expect(value in allowed, key, value, " or ".join(allowed))
        return value


def file_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifest's `files` for everything that lies in an engine directory now."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILE)
    return {path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)} for path in paths}
