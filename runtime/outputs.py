"""What a request's pictures are written as: one file of any kind, or a folder that an interrupted run goes on filling."""

from __future__ import annotations

import itertools
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .files import PARTIAL, WholeFile
from .manifest import SETTINGS, Sampling
from .pictures import (
    IMAGE_SUFFIXES,
    METADATA_KEY,
    RUN_RECORD,
    Images,
    check_fits,
    save_gif,
    save_image,
    save_npz,
    save_tokens,
    sheet,
    sheet_size,
    to_pil,
)
from .pipeline import Pipeline, Preview, image_seeds

LONGEST_WRITE = 60  # seconds that a process may take to write a file; after that it was killed
MOST_BYTES = 120  # of a class's name in a file's; file systems take 255 in all
HIDDEN = np.array([128, 128, 128], np.uint8)  # the colour of tokens that are not revealed yet


@dataclass(frozen=True)
class Request:
    """Images to draw: a label and a seed each, and the settings of the loop that they share."""

    labels: tuple[int, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance: float
    mask_temperature: float
    sampling_temperature: float

    @property
    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SETTINGS}

    @property
    def arguments(self) -> dict[str, Any]:
        """For Pipeline.generate and generate_tokens."""
        return {"classes": self.labels, "seed": self.seeds, **self.settings}

    def only(self, indices: Sequence[int]) -> Request:
        return Request(tuple(self.labels[i] for i in indices), tuple(self.seeds[i] for i in indices), **self.settings)

    def metadata(self, pipeline: Pipeline, columns: int | None = None) -> dict[str, Any]:
        """What is written into a file so that the request can be made again."""
        names = pipeline.manifest.model.class_names
        images = [
            {"class": label, **({"name": names[label]} if names else {}), "seed": seed}
            for label, seed in zip(self.labels, self.seeds, strict=True)
        ]
        return {
            "producer": METADATA_KEY,
            "engine": pipeline.manifest.hash,
            "backend": pipeline.backend.name,
            "images": images,
            "settings": self.settings,
            "columns": columns,
        }


def request_for(sampling: Sampling, labels: Sequence[int], seeds: Sequence[int], settings: Mapping[str, Any]) -> Request:
    """A request with these settings; what is missing or None is the engine's own."""
    return Request(tuple(labels), tuple(seeds), **sampling.settings(**settings))


def request_of(metadata: dict[str, Any], file: Path) -> Request:
    """The request that a file's metadata describe. Raises InputError where they are not complete."""
    try:
        images, settings = metadata["images"], dict(metadata["settings"])
        if not images:
            raise ValueError("no images")
        labels, seeds = (tuple(number(image[name], int) for image in images) for name in ("class", "seed"))
        image_seeds(seeds, len(seeds))  # raises for what is out of its range
        return Request(labels, seeds, **{name: number(value, int if name == "steps" else float) for name, value in settings.items()})
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{file}: the record of how it was made is damaged ({type(error).__name__}: {error})") from error


def number(value: Any, kind: type) -> Any:
    """Raises TypeError where a record holds no number of that kind."""
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        raise TypeError(f"expected a number, got {value!r:.40}")
    kind(value)  # an integer may be too large for a float
    return value


def write_file(pipeline: Pipeline, request: Request, out: Path, columns: int | None, **drawing: Any) -> None:
    """Draws a request into one file, by its ending: a picture or (with `columns`) a sheet, an animation, `.npz` or tokens as `.npy`."""
    suffix = out.suffix.lower()
    metadata = request.metadata(pipeline, columns)
    size = pipeline.manifest.model.image_size
    if size:
        check_fits(out, sheet_size(len(request.labels), size, size, columns or 1), metadata)
    if suffix == ".npy":
        save_tokens(pipeline.generate_tokens(**request.arguments, **drawing), out, metadata)
    elif suffix == ".npz":
        save_npz(pipeline.stream(**request.arguments, **drawing), len(request.labels), out, metadata)
    elif suffix == ".gif":
        save_gif([sheet(frame, columns or 1) for frame in draw_frames(pipeline, request, **drawing)], out, metadata)
    else:
        save_image(sheet(pipeline.generate(**request.arguments, **drawing), columns or 1), out, metadata)


def sheet_columns(request: Request, out: Path, grid: bool) -> int | None:
    """How many columns the sheet of a request has (None: it is no sheet). Raises InputError where one picture must hold several."""
    count = len(request.labels)
    if not grid:
        if count > 1 and out.suffix.lower() not in (".npz", ".npy"):
            raise InputError(f"{out}: {count} pictures do not fit into one file; --grid makes a sheet of them, or name a folder")
        return None
    # A row for every class where each has as many pictures, else about square.
    runs = [len(list(run)) for _, run in itertools.groupby(request.labels)]
    if len(runs) > 1 and runs[0] > 1 and len(set(runs)) == 1:
        return runs[0]
    return count if count <= 8 else math.ceil(math.sqrt(count))


def draw_frames(pipeline: Pipeline, request: Request, **drawing: Any) -> list[Images]:
    """The pictures after every step, tokens that are not revealed yet in grey."""
    steps = len(pipeline.schedule(**request.settings))
    frames: list[list[Images]] = [[] for _ in range(steps)]

    def keep(step: int, total: int, preview: Preview) -> None:
        images, masked = preview(), preview.masked()
        cell = images.shape[1] // masked.shape[1]
        hidden = masked.repeat(cell, 1).repeat(cell, 2)
        frames[step % steps].append(np.where(hidden[..., None], HIDDEN, images))

    pipeline.generate_tokens(**request.arguments, callback=keep, **drawing)
    return [np.concatenate(frame) for frame in frames]


def file_name(pipeline: Pipeline, request: Request, index: int, suffix: str) -> str:
    names = pipeline.manifest.model.class_names
    label = request.labels[index]
    name = re.sub(r"[^\w]+", "_", names[label]).strip("_") if names else ""
    name = name.encode()[:MOST_BYTES].decode(errors="ignore")
    return f"{index:06d}-{label}{'-' + name if name else ''}-{request.seeds[index]}{suffix}"


def check_folder(out: Path, resume: bool, force: bool) -> None:
    """Raises InputError where a run may not write into a folder."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: exists and is not a folder; a single picture's file ends in {', '.join(IMAGE_SUFFIXES)}")
    began = (out / RUN_RECORD).is_file()
    # A run that was killed before its record was written leaves a part of that.
    filled = out.is_dir() and any(not (resume and PARTIAL.fullmatch(path.name)) for path in out.iterdir())
    if filled and not (resume and began) and not force:
        if not resume:
            hint = "--resume goes on with the run that began there, " if began else ""
            raise InputError(f"{out}: exists and is not empty; {hint}--force writes into it")
        raise InputError(f"{out}: no run began there ({RUN_RECORD} is missing); --force writes into it all the same")


def open_folder(out: Path, request: Request, pipeline: Pipeline, suffix: str, resume: bool) -> None:
    """Makes the folder of a run and its record, or checks that the run that began there is this one. What bears the names of its files
    and is not its own is removed, so that a later --resume does not take it for done. Raises InputError.
    """
    record = out / RUN_RECORD
    mine = {**request.metadata(pipeline), "format": suffix.removeprefix(".")}
    if resume and record.is_file():
        theirs = read_record(out)
        for key, value in mine.items():
            if theirs.get(key, value if key == "format" else None) != value:
                found = f"the format {theirs.get(key)!r:.20}, not {value!r}" if key == "format" else f"other {key}"
                raise InputError(f"{out}: the run that began there has {found} (in its {RUN_RECORD}); expected the same")
        for path in out.iterdir():
            if PARTIAL.fullmatch(path.name) and path.is_file() and time.time() - path.stat().st_mtime > LONGEST_WRITE:
                path.unlink(missing_ok=True)
    elif out.is_dir():
        for i in range(len(request.labels)):
            (out / file_name(pipeline, request, i, suffix)).unlink(missing_ok=True)
    with WholeFile(record) as partial:
        partial.write_text(json.dumps(mine, indent=1) + "\n", "utf-8")


def read_record(out: Path) -> dict[str, Any]:
    """The record of the run that began in a folder. Raises InputError where there is none."""
    if not out.exists():
        raise InputError(f"{out}: no run to go on with: there is no such folder; classes and a --seed begin one")
    try:
        record = json.loads((out / RUN_RECORD).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{out}: no run to go on with: {RUN_RECORD} is missing or damaged") from error
    if not isinstance(record, dict):
        raise InputError(f"{out}: no run to go on with: {RUN_RECORD} is damaged")
    return record


def is_written(path: Path) -> bool:
    """Whether a picture's file is there; where the power failed, some file systems keep its name and not its bytes."""
    return path.is_file() and path.stat().st_size > 0


def write_folder(
    pipeline: Pipeline, request: Request, out: Path, suffix: str, batch_size: int, resume: bool, on_written: Callable[[Path], object]
) -> list[Path]:
    """Draws a request into a folder, a file an image, each written as soon as its batch is done. Returns all paths.

    With `resume` files that are there already are left as they are; files appear whole or not at all.
    """
    paths = [out / file_name(pipeline, request, i, suffix) for i in range(len(request.labels))]
    missing = [i for i, path in enumerate(paths) if not (resume and is_written(path))]
    for i in set(range(len(paths))) - set(missing):
        on_written(paths[i])
    for start in range(0, len(missing), batch_size):
        chosen = missing[start : start + batch_size]
        batch = request.only(chosen)
        drawn: Sequence[Any]
        save: Callable[[Any, Path, dict[str, Any]], None]
        if suffix == ".gif":
            frames = draw_frames(pipeline, batch, batch_size=batch_size)
            drawn, save = list(zip(*map(to_pil, frames), strict=True)), save_gif
        elif suffix == ".npy":
            drawn, save = list(pipeline.generate_tokens(**batch.arguments, batch_size=batch_size)[:, None]), save_tokens
        else:
            drawn, save = to_pil(pipeline.generate(**batch.arguments, batch_size=batch_size)), save_image
        for i, one in zip(chosen, drawn, strict=True):
            save(one, paths[i], request.only([i]).metadata(pipeline))
            on_written(paths[i])
    return paths
