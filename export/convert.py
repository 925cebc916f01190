"""A float32 engine becomes one in float16 or 8 bits, calibrated on its own runs and compared before it is put in place."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..calibration.calibrate import (
    SENSITIVITY_BATCHES,
    Calibration,
    Settings,
    calibrate,
    load_calibration,
    measure_harm,
    named_groups,
    quantized_graphs,
    save_calibration,
)
from ..calibration.magnitudes import magnitudes
from ..calibration.products import Graphs, find_groups, find_products, int8_share, load_graphs
from ..calibration.sensitivity import LEAST_SHARE
from ..calibration.trajectory import Trajectory, record, spread_labels
from ..errors import ExportError, InputError
from ..graph_file import save
from ..runtime.classes import parse_classes
from ..runtime.files import check_writable, is_inside
from ..runtime.manifest import FILE, ModelInfo, read_manifest
from ..runtime.pipeline import Pipeline
from ..runtime.progress import Report, progress_bar
from ..runtime.schedule import Step
from .compare import Comparison, compare
from .directory import check_target, name_leftovers, producer, put_in_place, write_manifest
from .precision import CONDITION_FLOAT32_OPS, FLOAT32_OPS, LARGEST, out_of_range, to_float16

PRECISIONS = ("fp16", "int8")
FLOAT_TYPES = {"fp32": "float32", "fp16": "float16"}
WATCHED = "onnxruntime"  # the backend whose values inside can be watched
BATCH = 2  # images at once while values inside are watched
MAGNITUDE_IMAGES = 16
LEAST_STEPS, LEAST_GUIDANCE = 4, 1.0
BETWEEN_GRAPHS = ("features", "visible_features", "encoder_modulation", "decoder_modulation")
COMPARED_IMAGES = 16
COMPARED_SEED = 2**32  # far from those of calibration, which begin so much before
WORST_DIVERGENCE, WORST_PSNR = 1.0, 20.0  # nats and dB; an engine beyond is broken, not imprecise


@dataclass(frozen=True)
class Precision:
    """What an engine computes in. float_type: of whatever an int8 engine does not quantize."""

    name: str
    float_type: str = "fp32"

    def __post_init__(self) -> None:
        if self.name not in PRECISIONS:
            raise InputError(f"unknown precision {self.name!r}; expected {' or '.join(PRECISIONS)}")
        if self.float_type not in FLOAT_TYPES:
            raise InputError(f"unknown float type {self.float_type!r}; expected {' or '.join(FLOAT_TYPES)}")

    @property
    def float16(self) -> bool:
        return self.name == "fp16" or self.float_type == "fp16"


def convert_engine(
    source: Path,
    out: Path,
    precision: Precision,
    settings: Settings | None = None,
    calibration_file: Path | None = None,
    force: bool = False,
    report: Report = lambda line: None,
    progress: bool = False,
) -> Comparison:
    """Writes the float32 engine `source` in another precision to `out`. Returns how far the two are apart.

    settings: of the calibration, for int8. calibration_file: read where it exists, else written, so that variants of an engine share a
    calibration. Raises InputError, ExportError; whatever happens, `out` is a whole engine, or as it was.
    """
    settings = settings or Settings()
    check_target(out, force, (source, calibration_file))
    name_leftovers(out, source)
    manifest = read_manifest(source, verify=True)  # the new engine's hashes would vouch for what is damaged
    if manifest.precision != "fp32":
        raise InputError(f"{source}: its precision is {manifest.precision}, expected fp32: others are made from float32 engines")
    labels = calibration_labels(manifest.model, settings)
    graphs = load_graphs(manifest)
    groups = find_groups(find_products(graphs))
    named_groups(groups, settings.float_layers or ())
    if calibration_file:
        check_calibration_file(calibration_file, out)
    with put_in_place(out, force) as folder, Pipeline.load(source, WATCHED) as reference:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            section, graphs = changed_graphs(
                reference, graphs, precision, settings, labels, calibration_file, Path(scratch), report, progress
            )
        report("writing the graphs")
        for name, model in graphs.items():
            save(model, folder / f"{name}.onnx")
        as_they_are = ("sampler", "image_encoder")  # whose choices want every digit
        for name in {name for graph in as_they_are if manifest.has(f"{graph}.onnx") for name in manifest.files_of(graph)}:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, folder / name)
        theirs = json.loads((source / FILE).read_bytes())
        content = {name: theirs[name] for name in ("format", "version", "model", "sampling", "opset", "source") if name in theirs}
        content |= {"precision": precision.name, "float_type": FLOAT_TYPES["fp16" if precision.float16 else "fp32"], "producer": producer()}
        content["calibration"] = section
        write_manifest(folder, content)
        report("comparing with float32")
        other_seed = (settings.seed + COMPARED_SEED) % 2**64
        with Pipeline.load(folder, WATCHED) as engine:
            comparison = compare(engine, reference, images=COMPARED_IMAGES, seed=other_seed, batch_size=BATCH, progress=progress)
        if not comparison.divergence <= WORST_DIVERGENCE:
            raise ExportError(f"the engine's divergence from float32 is {comparison.divergence:.2g} nats: it would draw something else")
        if comparison.psnr is not None and comparison.psnr < WORST_PSNR:
            raise ExportError(f"the image decoder's pictures are {comparison.psnr:.1f} dB from float32's: something else")
        content["calibration"]["compared"] = comparison.summary()
        write_manifest(folder, content)
    report(f"engine written to {out}: {comparison}")
    return comparison


def learning_schedule(reference: Pipeline) -> list[Step]:
    """The steps of the runs to learn from: the engine's own, but guided ones and several, since others may be asked for, and what no run
    reaches is not known."""
    own = reference.manifest.sampling
    steps = min(max(own.steps, LEAST_STEPS), reference.manifest.model.length)
    return reference.schedule(steps=steps, guidance=own.cfg_scale or LEAST_GUIDANCE)


def calibration_labels(model: ModelInfo, settings: Settings) -> list[int]:
    """The classes of the pictures to learn from, in an order in which the first few are spread over all too. Raises InputError."""
    classes = parse_classes(model, settings.classes) if settings.classes else None
    labels: list[int] = np.random.default_rng(settings.seed).permutation(spread_labels(model, settings.images, classes)).tolist()
    return labels


def check_calibration_file(file: Path, out: Path) -> None:
    """Raises InputError where a calibration can be neither read nor written."""
    if is_inside(file, out):
        raise InputError(f"{file}: a calibration is not a part of the engine; expected a place outside {out}")
    if not file.is_file():
        check_writable(file, file=True)


def changed_graphs(
    reference: Pipeline,
    graphs: Graphs,
    precision: Precision,
    settings: Settings,
    labels: list[int],
    calibration_file: Path | None,
    scratch: Path,
    report: Report,
    progress: bool,
) -> tuple[dict[str, Any], Graphs]:
    """The graphs in another precision, and what the manifest says of how they came about."""
    manifest = reference.manifest
    trajectories: list[Trajectory] = []
    steps = learning_schedule(reference)

    def runs(images: int) -> list[Trajectory]:
        """The first of the engine's own runs."""
        drawn = sum(len(one.labels) for one in trajectories)
        if drawn < images:
            report(f"drawing {images - drawn} images to learn from")
            with progress_bar(images - drawn, "image", progress) as bar:
                trajectories.extend(record(reference, labels[drawn:images], (settings.seed + drawn) % 2**64, BATCH, steps, bar.update))
        return trajectories

    section: dict[str, Any] = {}
    smoothed = graphs
    if precision.name == "int8":
        if calibration_file and calibration_file.exists():
            calibration = load_calibration(calibration_file, manifest, settings, graphs)
            report(f"calibration read from {calibration_file}")
            if settings.float_layers is None and not calibration.harm:
                report(f"calibration: sensitivity with weights of {settings.weight_bits} bits")
                calibration = measure_harm(calibration, manifest, graphs, runs(SENSITIVITY_BATCHES * BATCH), scratch, progress)
        else:
            calibration = calibrate(manifest, graphs, runs(settings.images), settings, scratch, report, progress)
            if calibration_file:
                save_calibration(calibration, calibration_file)
                report(f"calibration written to {calibration_file}")
        smoothed, quantized = quantized_graphs(graphs, manifest, calibration, reference.schedule())
        unreached = [group.name for group in find_groups(find_products(graphs)) if (group.graph, group.input) not in calibration.ranges]
        if unreached:
            report(f"int8: no run reached {', '.join(unreached[:3])}{', …' if len(unreached) > 3 else ''}, which stay in float")
        section = describe_calibration(calibration, quantized, reference)
        report(f"int8: {section['int8_share']:.1%} of the multiply-adds; in float: {', '.join(section['float_layers']) or 'none'}")
        if section["int8_share"] < LEAST_SHARE:
            report(f"int8: less than {LEAST_SHARE:.0%}; 8 bits of more would change the pictures, or the options leave them in float")
        graphs = quantized
    if precision.float16:
        report("float16: watching how large values get")
        largest = magnitudes(
            manifest, smoothed, runs(min(MAGNITUDE_IMAGES, settings.images))[: MAGNITUDE_IMAGES // BATCH], scratch, progress
        )
        wide = {key for key, value in largest.items() if out_of_range(value)}
        for key in sorted(key for key in wide if key[1] in BETWEEN_GRAPHS):
            if largest[key] > LARGEST:
                raise ExportError(
                    f"{key[1]} reaches {largest[key]:.3g}, too much for float16; choose fp32, or int8 with the float type fp32"
                )
            wide.remove(key)  # small it may be
        section["float32_values"] = {graph: sorted(name for owner, name in wide if owner == graph) for graph, _ in sorted(wide)}
        section["largest_value"] = max(largest.values())
        report(f"float16: values reach {section['largest_value']:.3g}; {len(wide)} of {len(largest)} stay float32")
        graphs = {
            name: to_float16(
                model, {value for owner, value in wide if owner == name}, CONDITION_FLOAT32_OPS if name == "condition" else FLOAT32_OPS
            )
            for name, model in graphs.items()
        }
    return section, graphs


def describe_calibration(calibration: Calibration, quantized: Graphs, reference: Pipeline) -> dict[str, Any]:
    """The manifest's section."""
    settings = calibration.settings
    products = find_products(quantized)
    return {
        "method": settings.method,
        "smoothquant": settings.smoothquant,
        "images": settings.images,
        "classes": settings.classes and list(settings.classes),
        "seed": settings.seed,
        "weight_bits": settings.weight_bits,
        "modulation": settings.modulation,
        "int8_share": int8_share(products, reference.schedule()),
        "float_layers": [product.name for product in products if not product.quantized],
        "harm": calibration.harm,
    }
