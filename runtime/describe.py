"""What an engine directory holds, and its classes, for people and for machines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from .builds import read_builds
from .manifest import Manifest


def engine_info(manifest: Manifest) -> dict[str, Any]:
    """What the manifest says, as plain values; sampling settings by the names that `enat-run` and `Pipeline` use."""
    model = {name: value for name, value in asdict(manifest.model).items() if name != "class_names"}
    return {
        "engine": str(manifest.folder),
        "hash": manifest.hash,
        "bytes": sum(entry["size"] for entry in manifest.files.values()),
        "model": model,
        "named_classes": manifest.model.class_names is not None,
        "precision": manifest.precision,
        "float_type": manifest.float_type,
        "sampling": manifest.sampling.settings(),
        "graphs": [name.removesuffix(".onnx") for name in manifest.files if name.endswith(".onnx")],
        "source": manifest.source,
        "builds": [{"id": build.id, **asdict(build.platform), "options": dict(build.options)} for build in read_builds(manifest)],
    }


def info_text(manifest: Manifest) -> str:
    """The same to be read: a line a subject."""
    return "\n".join(f"{name:<10}{printable(text)}" for name, text in info_lines(manifest))


def info_lines(manifest: Manifest) -> Iterator[tuple[str, str]]:
    model, info = manifest.model, engine_info(manifest)
    yield "engine", f"{manifest.folder}, {info['bytes'] / 1e9:.2f} GB"
    yield "hash", manifest.hash
    size = f"{model.image_size}×{model.image_size}" if manifest.has("image_decoder.onnx") else "none, tokens only"
    yield "pictures", f"{size}; {model.num_classes} classes{', named' if model.class_names else ''}"
    yield "tokens", f"{model.grid}×{model.grid} of {model.codes} codes"
    yield "network", f"{model.encoder_depth} + {model.decoder_depth} blocks, width {model.dim}, {model.heads} heads"
    yield "precision", manifest.precision + (f", the rest {manifest.float_type}" if manifest.precision == "int8" else "")
    yield "sampling", ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in info["sampling"].items())
    yield "graphs", ", ".join(info["graphs"])
    for name, value in manifest.source.items():
        yield "source", f"{name} {value}"
    for build in info["builds"]:
        options = json.dumps({name: build["options"][name] for name in ("steps", "max_batch") if name in build["options"]})
        yield "build", f"TensorRT {build['tensorrt']}, {build['device']} ({build['capability']}), {options}"


def classes_text(manifest: Manifest, as_json: bool) -> str:
    """Every class's number and name, a line each."""
    model = manifest.model
    names = model.class_names or (None,) * model.num_classes
    if as_json:
        return json.dumps([{"class": i, "name": name} for i, name in enumerate(names)])
    return "\n".join(f"{i}\t{printable(name)}" if name else str(i) for i, name in enumerate(names))


def printable(text: str) -> str:
    """Without what a terminal would act on or cannot show: a manifest may come from anywhere."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
