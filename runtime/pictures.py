"""Pictures to files: one image or a sheet, in any of the usual formats, with what made them as metadata; and back."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin

from ..errors import InputError
from .files import WholeFile

Images = NDArray[np.uint8]  # [N, height, width, 3], RGB

IMAGE_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
METADATA_KEY = "enat"
RUN_RECORD = "run.json"  # of a folder of pictures
EXIF_DESCRIPTION = 0x010E
LARGEST = {".webp": 16383, ".jpg": 65500, ".jpeg": 65500, ".gif": 65535}  # pixels each way
MOST_WEBP = 178_000_000  # pixels; Pillow opens no WebP that is larger
LONGEST_EXIF = 65_000  # bytes of JSON; a JPEG's Exif segment holds 65,533 with what is around it
OPENERS: dict[bytes, Callable[[Path], Image.Image]] = {  # by how files begin
    rb"\x89PNG": PngImagePlugin.PngImageFile,
    rb"\xff\xd8": JpegImagePlugin.JpegImageFile,
    rb"GIF8": GifImagePlugin.GifImageFile,
}
GAP = 2  # pixels between the pictures of a sheet


def to_pil(images: Images) -> list[Image.Image]:
    """uint8 [N, height, width, 3] → N PIL images. Raises InputError for anything else, a single picture too."""
    found = np.asarray(images)
    if found.dtype != np.uint8 or found.ndim != 4 or found.shape[3] != 3:
        raise InputError(f"expected pictures, uint8 [N, height, width, 3], got {found.dtype} {list(found.shape)}")
    return [Image.fromarray(image) for image in found]


def sheet_size(count: int, width: int, height: int, columns: int) -> tuple[int, int]:
    """Width and height of a contact sheet."""
    columns = min(columns, count)
    return columns * (width + GAP) - GAP, -(-count // columns) * (height + GAP) - GAP


def sheet(images: Images, columns: int) -> Image.Image:
    """A contact sheet of at most so many columns, row by row, with a thin white line between the pictures."""
    count, height, width, _ = images.shape
    columns = min(columns, count)
    result = Image.new("RGB", sheet_size(count, width, height, columns), "white")
    for i, image in enumerate(to_pil(images)):
        result.paste(image, (i % columns * (width + GAP), i // columns * (height + GAP)))
    return result


def check_fits(path: Path, size: tuple[int, int], metadata: dict[str, Any]) -> None:
    """Raises InputError where a picture of that size, or its metadata, do not fit into a file of that format."""
    suffix = path.suffix.lower()
    most = LARGEST.get(suffix)
    if most and max(size) > most:
        raise InputError(f"{path}: {size[0]}×{size[1]} pixels; {suffix} holds at most {most} each way, .png more")
    if suffix == ".webp" and size[0] * size[1] > MOST_WEBP:
        raise InputError(f"{path}: {size[0]}×{size[1]} pixels are too many for {suffix}; expected .png")
    if suffix in (".jpg", ".jpeg") and len(json.dumps(metadata)) > LONGEST_EXIF:
        raise InputError(f"{path}: what made {len(metadata['images'])} pictures does not fit into {suffix}; expected .png or .webp")


def save_image(image: Image.Image, path: Path, metadata: dict[str, Any]) -> None:
    """Writes PNG, WebP (lossless) or JPEG by the ending, whole or not at all."""
    suffix = path.suffix.lower()
    options: dict[str, Any]
    content = io.BytesIO()  # Pillow does not notice where a disk is full
    if suffix == ".png":
        options = png_options(metadata)
    else:
        exif = Image.Exif()
        exif[EXIF_DESCRIPTION] = json.dumps(metadata)
        options = {"format": "WEBP", "lossless": True} if suffix == ".webp" else {"format": "JPEG", "quality": 95, "subsampling": 0}
        options["exif"] = exif
    image.save(content, **options)
    write_whole(content, path)


def write_whole(content: io.BytesIO, path: Path) -> None:
    with WholeFile(path) as partial:
        partial.write_bytes(content.getbuffer())


def png_options(metadata: dict[str, Any]) -> dict[str, Any]:
    info = PngImagePlugin.PngInfo()
    info.add_text(METADATA_KEY, json.dumps(metadata))
    return {"format": "PNG", "pnginfo": info}


def png_bytes(image: Image.Image, metadata: dict[str, Any]) -> bytes:
    """A PNG file, in memory."""
    file = io.BytesIO()
    image.save(file, **png_options(metadata))
    return file.getvalue()


def save_gif(frames: Sequence[Image.Image], path: Path, metadata: dict[str, Any]) -> None:
    """Writes an animation; the last frame stays longer."""
    durations = [400] * (len(frames) - 1) + [2000]
    content = io.BytesIO()
    comment = json.dumps(metadata).encode()
    frames[0].save(content, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, comment=comment)
    write_whole(content, path)


def save_npz(batches: Iterable[Images], count: int, path: Path, metadata: dict[str, Any]) -> None:
    """Writes `arr_0`, uint8 [count, height, width, 3], as the usual evaluation scripts read it, and the metadata. Batches of pictures
    are written as they come: none but the last is in memory.
    """
    with WholeFile(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for i, images in enumerate(batches):
                if i == 0:
                    shape = (count, *images.shape[1:])
                    header = {"descr": np.lib.format.dtype_to_descr(images.dtype), "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(images).data)
        with archive.open("metadata.npy", "w") as file:
            np.save(file, np.array(json.dumps(metadata)))


def save_tokens(tokens: NDArray[np.int64], path: Path, metadata: dict[str, Any]) -> None:
    """Writes tokens [N, grid, grid] as .npy; the metadata go beside it, into a file of its name with `.json` behind. Both where a link
    leads."""
    content = io.BytesIO()
    np.save(content, tokens)
    target = path.resolve() if path.is_symlink() else path
    with WholeFile(target) as partial:
        partial.write_bytes(content.getbuffer())
        with WholeFile(metadata_file(target)) as record:
            record.write_text(json.dumps(metadata, indent=1) + "\n", "utf-8")
            target.unlink(missing_ok=True)  # tokens never lie beside the record of others
            if target != path:
                metadata_file(path).unlink(missing_ok=True)


def metadata_file(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def record_of_tokens(path: Path) -> Path:
    """The file beside them, or beside what a link leads to."""
    own = metadata_file(path)
    return metadata_file(path.resolve()) if path.is_symlink() and not own.is_file() else own


def read_metadata(path: Path) -> dict[str, Any]:
    """What `enat-run` wrote into a file that it made, or of a folder's run. Raises InputError where there is nothing of the kind."""
    if path.is_dir():
        path = path / RUN_RECORD
    if not path.is_file():
        raise InputError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    if path.suffix.lower() == ".npy" and not record_of_tokens(path).is_file():
        raise InputError(f"{path}: its record is missing: {record_of_tokens(path).name}, which enat-run wrote beside it")
    try:
        text = metadata_text(path)
        metadata = json.loads(text) if text else None
    except Exception as error:  # whatever readers of many formats raise for files that are damaged
        raise InputError(f"{path}: not a readable picture ({str(error) or type(error).__name__:.200})") from error
    if not isinstance(metadata, dict) or "images" not in metadata:
        raise InputError(f"{path}: holds no record of how it was made; expected a file made by enat-run")
    return metadata


def metadata_text(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as data:
            return str(data["metadata"])
    if suffix == ".npy":
        return record_of_tokens(path).read_text("utf-8")
    if suffix == ".json":
        return path.read_text("utf-8")
    with path.open("rb") as file:
        start = file.read(12)
    # Image.open refuses pictures of very many pixels, which large sheets may have; here no pixel is read.
    opener = next((opener for pattern, opener in OPENERS.items() if re.match(pattern, start, re.DOTALL)), Image.open)
    with opener(path) as image:
        if image.format == "PNG":
            return image.info.get(METADATA_KEY)
        if image.format == "GIF":
            return bytes(image.info.get("comment", b"")).decode()
        return image.getexif().get(EXIF_DESCRIPTION)
