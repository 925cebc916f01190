"""Calibration, whole: what a float32 engine's own runs say about ranges, smoothing and which layers to leave alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ExportError, InputError
from ..runtime.files import WholeFile
from ..runtime.manifest import Manifest
from ..runtime.pipeline import image_seeds
from ..runtime.progress import Report, progress_bar
from ..runtime.schedule import Step
from .products import GRAPHS, NETWORK, Graphs, Group, find_groups, find_products, multiply_adds
from .quantize import WEIGHT_LIMITS, quantize, quantize_tables, shuffle_levels
from .sensitivity import SwitchedLane, harms, keep_float
from .smooth import ALPHA, Factors, factors, foldable, smooth
from .statistics import METHODS, Statistic
from .tapped import watch_runs
from .trajectory import Trajectory

# What NumPy, zipfile (NotImplementedError: a method that no zip has) and zlib raise for a file that is cut off, altered or none of enat's;
# and what comes of JSON that is other than it should be.
DAMAGED = (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError, zipfile.BadZipFile, zlib.error)

LEAST_IMAGES = 8
SENSITIVITY_BATCHES = 1
SHARED_SETTINGS = ("method", "smoothquant", "images", "classes", "seed")  # what the ranges depend on


@dataclass(frozen=True)
class Settings:
    """How to calibrate. smoothquant: its exponent alpha, 0 for none. float_layers: kept in float, None to choose by sensitivity."""

    method: str = "percentile"
    smoothquant: float = ALPHA
    weight_bits: int = 8
    images: int = 64
    classes: tuple[str | int, ...] | None = None  # numbers, names and ranges; None: spread over all
    seed: int = 0
    modulation: str = "int8"  # or "float"
    float_layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"unknown calibration method {self.method!r}; expected one of {', '.join(METHODS)}")
        if not 0 <= self.smoothquant <= 1:
            raise InputError(f"expected a SmoothQuant exponent of 0 (none) to 1, got {self.smoothquant}")
        if self.weight_bits not in WEIGHT_LIMITS:
            raise InputError(f"expected {' or '.join(map(str, WEIGHT_LIMITS))} bits for weights, got {self.weight_bits}")
        if self.modulation not in ("int8", "float"):
            raise InputError(f"unknown type of the modulation table {self.modulation!r}; expected int8 or float")
        image_seeds(self.seed, 1)
        if self.images < LEAST_IMAGES:
            raise InputError(f"{self.images} calibration images are too few; expected at least {LEAST_IMAGES}")


@dataclass(frozen=True)
class Calibration:
    """What was found, for one float32 engine (`fingerprint`) and settings: enough to write the quantized graphs."""

    fingerprint: str
    settings: Settings
    factors: dict[str, NDArray[np.float32]]  # by group
    ranges: dict[tuple[str, str], float]  # (graph, value) → largest magnitude; not of what no run reached, as with very few steps
    harm: dict[str, float]  # of every group alone; empty where it was not asked for


def fingerprint(manifest: Manifest) -> str:
    """Identifies an engine by its graphs, its weights and how it samples."""
    entries = {name: manifest.files[name]["sha256"] for graph in (*GRAPHS, "condition") for name in manifest.files_of(graph)}
    return hashlib.sha256(json.dumps([entries, vars(manifest.sampling)], sort_keys=True).encode()).hexdigest()


def calibrate(
    manifest: Manifest,
    graphs: Graphs,
    trajectories: Sequence[Trajectory],
    settings: Settings,
    scratch: Path,
    report: Report = lambda line: None,
    progress: bool = False,
) -> Calibration:
    """Calibrates a float32 engine on recorded runs of its own. scratch: a folder for copies of the graphs."""
    groups = find_groups(find_products(graphs))
    report("calibration: watching the inputs of the products")
    statistics = observe(manifest, {name: graphs[name] for name in GRAPHS if name in graphs}, groups, trajectories, scratch, progress)
    chosen: list[Factors] = []
    if settings.smoothquant:
        found = [factors(graphs, group, statistics[group.graph, group.input], settings.smoothquant) for group in groups]
        chosen = [one for one in found if one]
        graphs = smooth(graphs, chosen, manifest.model)
        report("calibration: watching again, smoothed")
        network = [group for group in groups if group.graph in NETWORK]
        smoothed = {name: graphs[name] for name in (*NETWORK, "condition")}
        statistics |= observe(manifest, smoothed, network, trajectories, scratch, progress)
    report(f"calibration: ranges by {settings.method}")
    ranges = {key: METHODS[settings.method](statistic) for key, statistic in statistics.items() if statistic.values}
    groups = reached(groups, ranges)
    harm: dict[str, float] = {}
    if settings.float_layers is None:
        report(f"calibration: sensitivity of {len(groups)} groups of layers")
        harm = sensitivity(manifest, graphs, groups, ranges, settings, trajectories, scratch, progress)
    return Calibration(fingerprint(manifest), settings, {one.group.name: one.values for one in chosen}, ranges, harm)


def measure_harm(
    calibration: Calibration, manifest: Manifest, graphs: Graphs, trajectories: Sequence[Trajectory], scratch: Path, progress: bool = False
) -> Calibration:
    """A calibration with the harm of every group, in weights of as many bits as its settings say. graphs: the engine's own."""
    groups = reached(find_groups(find_products(graphs)), calibration.ranges)
    smoothed = smooth(graphs, own_factors(calibration, groups), manifest.model)
    harm = sensitivity(manifest, smoothed, groups, calibration.ranges, calibration.settings, trajectories, scratch, progress)
    return replace(calibration, harm=harm)


def reached(groups: Sequence[Group], ranges: dict[tuple[str, str], float]) -> list[Group]:
    """The groups whose inputs some run had."""
    return [group for group in groups if (group.graph, group.input) in ranges]


def own_factors(calibration: Calibration, groups: Sequence[Group]) -> list[Factors]:
    return [Factors(group, calibration.factors[group.name]) for group in groups if group.name in calibration.factors]


def observe(
    manifest: Manifest, graphs: Graphs, groups: Sequence[Group], trajectories: Sequence[Trajectory], scratch: Path, progress: bool
) -> dict[tuple[str, str], Statistic]:
    """Statistics of every group's input, and of convolutions' outputs, over all steps of the trajectories: by (graph, value)."""
    axes: dict[tuple[str, str], int] = {}
    for group in groups:
        axes[group.graph, group.input] = group.channel_axis
        axes |= {(group.graph, product.output): product.channel_axis for product in group.products if product.kind == "Conv"}
    statistics = {key: Statistic() for key in axes}

    def watch(graph: str, name: str, value: NDArray[Any]) -> None:
        try:
            statistics[graph, name].add(value, axes[graph, name])
        except ValueError as error:
            raise ExportError(f"{graph}.onnx: {name} holds {error}: the float32 engine itself is broken") from error

    taps = {graph: [value for owner, value in axes if owner == graph] for graph in {graph for graph, _ in axes}}
    watch_runs(manifest, graphs, taps, watch, trajectories, scratch, progress)
    return statistics


def sensitivity(
    manifest: Manifest,
    graphs: Graphs,
    groups: Sequence[Group],
    ranges: dict[tuple[str, str], float],
    settings: Settings,
    trajectories: Sequence[Trajectory],
    scratch: Path,
    progress: bool,
) -> dict[str, float]:
    """The harm of every group, on a few of the trajectories."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        chosen = trajectories[:SENSITIVITY_BATCHES]
        lane = SwitchedLane(manifest, graphs, groups, ranges, settings.weight_bits, Path(folder))
        with contextlib.closing(lane), progress_bar(len(groups) * len(chosen), "measurement", progress) as bar:
            return harms(lane, manifest, chosen, bar.update)


def named_groups(groups: Sequence[Group], names: Sequence[str]) -> list[Group]:
    """The groups of these layers. Raises InputError for a name that no layer has."""
    layers = {product.name: group for group in groups for product in group.products}
    for name in names:
        if name not in layers:
            raise InputError(f"no layer is called {name!r}; layers are called like {', '.join(list(layers)[:3])}")
    return [group for group in groups if any(layers[name] is group for name in names)]


def quantized_graphs(graphs: Graphs, manifest: Manifest, calibration: Calibration, steps: Sequence[Step]) -> tuple[Graphs, Graphs]:
    """The engine's float32 graphs, smoothed; and from these the quantized ones. steps: of the engine's schedule."""
    settings, every = calibration.settings, find_groups(find_products(graphs))
    groups = reached(every, calibration.ranges)
    if settings.float_layers is None:
        work = {group.name: sum(multiply_adds(product, steps) for product in group.products) for group in groups}
        kept = keep_float(groups, calibration.harm, work)
    else:
        kept = named_groups(every, settings.float_layers)
    smoothed = smooth(graphs, own_factors(calibration, every), manifest.model)
    result = quantize(smoothed, [group for group in groups if group not in kept], calibration.ranges, settings.weight_bits)
    for model in result.values():
        shuffle_levels(model)
    if settings.modulation == "int8":
        result["condition"] = quantize_tables(smoothed["condition"])
    return smoothed, result


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Writes what was found as .npz, whole or not at all."""
    head = {
        "fingerprint": calibration.fingerprint,
        "settings": asdict(calibration.settings),
        "ranges": [[*key, value] for key, value in calibration.ranges.items()],
        "harm": calibration.harm,
    }
    arrays: dict[str, Any] = {f"factors:{name}": values for name, values in calibration.factors.items()}
    with WholeFile(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, head=np.array(json.dumps(head)), **arrays)


def shared_settings(path: Path) -> dict[str, Any]:
    """The settings that a calibration's ranges depend on. Raises InputError."""
    with reading(path), np.load(path) as data:
        theirs = json.loads(str(data["head"]))["settings"]
        settings = {name: theirs[name] for name in SHARED_SETTINGS}
        settings["classes"] = settings["classes"] and tuple(settings["classes"])
        kinds = {"method": str, "smoothquant": int | float, "images": int, "seed": int}
        whole = all(isinstance(settings[name], kind) for name, kind in kinds.items())
        if not whole or not all(isinstance(one, str | int) for one in settings["classes"] or ()):
            raise TypeError(f"its settings are {settings!r:.200}")
        Settings(**settings)  # raises for what is out of its range
        return settings


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Has what damaged files raise raised as InputError."""
    try:
        yield
    except (*DAMAGED, InputError) as error:
        raise InputError(f"{path}: not a calibration written by enat-export: {type(error).__name__}: {error}") from error


def load_calibration(path: Path, manifest: Manifest, settings: Settings, graphs: Graphs) -> Calibration:
    """Reads a calibration back, for an engine with these settings; without the harm where that was measured in weights of other bits.
    graphs: the engine's own.

    Raises InputError where it is none, was made for another engine, or in another way than the settings ask for.
    """
    with reading(path):
        with np.load(path) as data:
            head = json.loads(str(data["head"]))
            found = {name.removeprefix("factors:"): data[name] for name in data.files if name != "head"}
        theirs = {name: head["settings"][name] for name in SHARED_SETTINGS}
        ranges = {(graph, value): finite(limit) for graph, value, limit in head["ranges"]}
        harm = {name: finite(value) for name, value in head["harm"].items()}
        result = Calibration(head["fingerprint"], settings, found, ranges, harm)
    if result.fingerprint != fingerprint(manifest):
        raise InputError(f"{path}: a calibration of another engine than {manifest.folder}; calibrate again, to another file")
    for name, their in theirs.items():
        asked = json.loads(json.dumps(getattr(settings, name)))
        if their != asked:
            raise InputError(f"{path}: made with the {name} {their}, asked for {asked}; calibrate again, to another file")
    if settings.float_layers is None and not result.harm:
        raise InputError(f"{path}: made without measuring sensitivity; name the layers to leave in float, or calibrate again")
    groups = {group.name: group for group in find_groups(find_products(graphs))}
    with reading(path):
        if result.harm and result.harm.keys() != {group.name for group in reached(list(groups.values()), ranges)}:
            raise ValueError("its layers are not the engine's")
        for name, values in found.items():
            group = groups[name]
            channels = graphs[group.graph].graph.initializers[f"{group.products[0].name}.weight"].shape
            if not foldable(group) or values.shape != (channels and channels[0],) or not (np.isfinite(values) & (values > 0)).all():
                raise ValueError(f"factors of {name}")
        same_bits = head["settings"]["weight_bits"] == settings.weight_bits
    return result if same_bits else replace(result, harm={})


def finite(value: object) -> float:
    """Raises TypeError or ValueError for what is no finite number of 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"expected a number, got {value!r:.40}")
    if not 0 <= value < math.inf:
        raise ValueError(f"expected a number of 0 or more, got {value!r:.40}")
    return float(value)
