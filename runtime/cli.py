"""`enat-run`: pictures from an engine."""

from __future__ import annotations

import difflib
import json
import time
from pathlib import Path
from typing import Any

import click
from PIL import Image

from ..errors import InputError
from .backends import BACKENDS, open_backend
from .classes import class_index, parse_classes, whole
from .command import Command, Source, Target, backend_option
from .describe import classes_text, engine_info, info_text
from .files import check_writable
from .manifest import Manifest, read_manifest
from .outputs import Request, check_folder, open_folder, read_record, request_for, request_of, sheet_columns, write_file, write_folder
from .pictures import IMAGE_SUFFIXES, RUN_RECORD, metadata_file, read_metadata
from .pipeline import BATCH_SIZE, BUNDLED_ENGINE, Pipeline, check_batch_size, check_count, image_seeds
from .progress import progress_bar
from .schedule import schedule

FILE_SUFFIXES = (*IMAGE_SUFFIXES, ".gif", ".npz", ".npy")
FORMATS = ("png", "webp", "jpg", "npy")  # of files in a folder
OTHER_SUFFIXES = (".txt", ".mp4", ".avi", ".mov", ".svg", ".zip", ".json", ".pt")  # of files that are none of these, and no folders


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--engine", type=Source(), help="Engine directory; without it, the bundled one (letters and digits).")
@click.option(
    "--class",
    "classes",
    multiple=True,
    metavar="CLASS",
    help="Number, name, range (10-19, A-F), several of them with commas between, or all; may be repeated. #7 is always number 7.",
)
@click.option("--num", type=int, help="Pictures a class; default: 1.")
@click.option("--seed", type=int, help="Picture i has seed SEED + i; without it, one is drawn and printed.")
@click.option("--steps", type=int, help="Sampling steps, 1 to the number of tokens; default: the engine's.")
@click.option("--guidance", type=float, help="Scale of the classifier-free guidance, 0 for none; default: the engine's.")
@click.option("--mask-temperature", type=float, help="Randomness of which tokens are revealed; default: the engine's.")
@click.option("--sampling-temperature", type=float, help="Randomness of the tokens; default: the engine's.")
@click.option("--out", type=Target(), help=f"A folder, or a file that ends in {', '.join(FILE_SUFFIXES)}.")
@click.option("--grid", is_flag=True, help="All pictures on one sheet.")
@click.option("--columns", type=int, help="Columns of the sheet; default: a row a class, or about square.")
@click.option("--gif", is_flag=True, help="Animations of the tokens being revealed, step by step.")
@click.option(
    "--format",
    "suffix",
    type=click.Choice(FORMATS),
    help="Of files in a folder; default: png.",
)
@click.option("--resume", is_flag=True, help="Go on with the run that was interrupted in the folder; --engine and --out are enough.")
@click.option("--force", is_flag=True, help="Write into a folder that is not empty; replay with another engine.")
@click.option(
    "--replay",
    type=Source(),
    metavar="FILE",
    help="Make a file or a folder of enat-run again, from what it says of itself.",
)
@click.option("--batch-size", default=BATCH_SIZE, show_default=True, help="Pictures drawn at once.")
@backend_option()
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=int, help="CPU threads; default: one for each core that the process may use.")
@click.option("--verify", is_flag=True, help="Check the hashes of files over 64 MiB too.")
@click.option("--list-classes", is_flag=True, help="Show the engine's classes and end.")
@click.option("--info", is_flag=True, help="Show what the engine is and end.")
@click.option("--json", "as_json", is_flag=True, help="Say what was done as JSON on stdout.")
def main(
    engine: Path | None,
    classes: tuple[str, ...],
    num: int | None,
    seed: int | None,
    out: Path | None,
    grid: bool,
    columns: int | None,
    gif: bool,
    suffix: str | None,
    resume: bool,
    force: bool,
    replay: Path | None,
    batch_size: int,
    backend: str,
    device: str,
    threads: int | None,
    verify: bool,
    list_classes: bool,
    info: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Draw pictures with an engine."""
    if info or list_classes:
        manifest = read_manifest(engine or BUNDLED_ENGINE, verify)
        if info:
            click.echo(json.dumps(engine_info(manifest)) if as_json else info_text(manifest))
        else:
            click.echo(classes_text(manifest, as_json))
        return
    started = time.perf_counter()
    if out is None:
        raise InputError("expected --out with a folder or a file to write")
    single = check_kind(out, grid, gif, resume)
    check_writable(out, file=single)
    if out.suffix.lower() == ".npy":
        check_writable(metadata_file(out.resolve()), file=True)
    if suffix and (single or gif):
        raise InputError(f"{out}: --format goes with a folder of pictures")
    check_batch_size(batch_size)
    if columns is not None and columns < 1:
        raise InputError(f"expected 1 or more columns, got {columns}")
    if columns and not (grid or replay):
        raise InputError("--columns goes with --grid")
    earlier = earlier_run(replay, out if resume else None)
    manifest = read_manifest(engine or BUNDLED_ENGINE, verify)
    if replay:
        if classes or any(value is not None for value in (num, seed, *settings.values())):
            raise InputError("--replay takes classes, numbers, seed and settings from the file; give it none")
        request, theirs = replayed(manifest, earlier, replay, force, "--force to use this one")
        if columns and not (grid or (theirs and single)):
            raise InputError(f"{replay if single else out}: is no sheet; --columns goes with --grid")
        columns = columns or theirs
    elif resume and not classes and all(value is None for value in (num, seed, *settings.values())):
        request, _ = replayed(manifest, read_record(out), out, False, "choose another folder")
    else:
        if resume and seed is None:
            seed = request_of(earlier or read_record(out), out).seeds[0]
        request = make_request(manifest, classes, 1 if num is None else num, seed, settings)
    schedule(manifest.model.length, **request.settings)
    if single:
        columns = columns or sheet_columns(request, out, grid)
    ending = out.suffix.lower() if single else ".gif" if gif else f".{suffix or earlier_format(earlier)}"
    if ending != ".npy":
        manifest.require_images()
    if not single:
        check_folder(out, resume, force)
    chosen = backend if backend != "auto" else earlier_backend(earlier, device)
    with Pipeline(manifest, open_backend(chosen, manifest, device, threads)) as pipeline:
        if engine is None:
            click.echo("no --engine given: using the bundled one (letters A-Z and digits 0-9)", err=True)
        if not as_json:
            if chosen == "auto":
                click.echo(f"backend auto: {pipeline.backend.name}", err=True)
            if seed is None and not replay:
                click.echo(f"seed {request.seeds[0]}", err=True)
        if single:
            write_file(pipeline, request, out, columns, batch_size=batch_size, progress=True)
            files = [out]
        else:
            open_folder(out, request, pipeline, ending, resume)
            with progress_bar(len(request.labels), "picture") as bar:
                files = write_folder(pipeline, request, out, ending, batch_size, resume, lambda _: bar.update())
        seconds = time.perf_counter() - started
        if as_json:
            summary = {**request.metadata(pipeline, columns), "files": [str(file) for file in files], "seconds": round(seconds, 3)}
            click.echo(json.dumps(summary))
        else:
            what = f"{len(request.labels)} picture{'s' if len(request.labels) != 1 else ''}"
            click.echo(f"{what} in {seconds:.1f} s: {out}", err=True)


def check_kind(out: Path, grid: bool, gif: bool, resume: bool) -> bool:
    """Whether `out` is a single file (by its ending) rather than a folder. Raises InputError for options that do not go with it."""
    suffix = out.suffix.lower()
    pictures = f"a file that ends in {', '.join(IMAGE_SUFFIXES)} or .gif"
    if suffix not in FILE_SUFFIXES:
        unknown = suffix in (*Image.registered_extensions(), *OTHER_SUFFIXES)
        meant = difflib.get_close_matches(suffix, FILE_SUFFIXES, 1, cutoff=0.7)
        if (unknown or meant) and not out.is_dir():
            hint = f" (did you mean {meant[0]}?)" if meant else ""
            raise InputError(f"{out}: expected a folder, or a file that ends in {', '.join(FILE_SUFFIXES)}{hint}")
        if grid:
            raise InputError(f"{out}: --grid makes one picture; expected {pictures}")
        return False
    if resume:
        raise InputError(f"{out}: --resume goes on with a folder, this is a file")
    if grid and suffix in (".npz", ".npy"):
        raise InputError(f"{out}: --grid makes a picture; expected {pictures}")
    if gif and suffix != ".gif":
        raise InputError(f"{out}: --gif makes an animation; expected a file that ends in .gif, or a folder")
    return True


def earlier_run(replay: Path | None, folder: Path | None) -> dict[str, Any]:
    """What a file to be replayed, or the folder of a run to go on with, says of how it was made; nothing where there is no record."""
    if replay:
        return read_metadata(replay)
    return read_record(folder) if folder and (folder / RUN_RECORD).is_file() else {}


def earlier_backend(metadata: dict[str, Any], device: str) -> str:
    """The backend of an earlier run, where it runs on the device; else auto."""
    name = metadata.get("backend")
    return name if isinstance(name, str) and device.split(":")[0] in BACKENDS.get(name, ()) else "auto"


def earlier_format(metadata: dict[str, Any]) -> str:
    """The format of an earlier run's files, animations' too; else the default."""
    name = metadata.get("format")
    return name if name in (*FORMATS, "gif") else FORMATS[0]


def replayed(manifest: Manifest, metadata: dict[str, Any], file: Path, force: bool, otherwise: str) -> tuple[Request, int | None]:
    """The request that made a file or folder, and the columns of its sheet. Raises InputError where another engine made it, with what
    to do otherwise.
    """
    theirs, mine = str(metadata.get("engine")), manifest.hash
    if theirs != mine and not force:
        raise InputError(
            f"{file}: made by the engine {theirs[:12]}…, but {manifest.folder} is {mine[:12]}…; "
            f"name the right one (--engine), or {otherwise}"
        )
    columns = metadata.get("columns")
    if columns is not None and (not isinstance(columns, int) or columns < 1):
        raise InputError(f"{file}: its record is damaged: columns is {columns!r:.40}")
    request = request_of(metadata, file)
    for label in request.labels:
        class_index(manifest.model, label)
    return request, columns


def make_request(manifest: Manifest, classes: tuple[str, ...], num: int, seed: int | None, settings: dict[str, Any]) -> Request:
    """The request of a command line; draws a seed where none was given."""
    if not classes:
        raise InputError("expected at least one --class; --list-classes shows them")
    num = whole(num, "a whole number of pictures a class")
    if num < 1:
        raise InputError(f"expected 1 or more pictures a class, got {num}")
    chosen = parse_classes(manifest.model, classes)
    check_count(len(chosen) * num, "run")
    labels = [label for label in chosen for _ in range(num)]
    return request_for(manifest.sampling, labels, image_seeds(seed, len(labels)), settings)


if __name__ == "__main__":
    main()
