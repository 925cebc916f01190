"""Pictures of letters: 64×64 RGB, one of 36 classes, in a random font, place, size, slant and colours on a random background."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ..runtime.files import WholeFile
from .fonts import CLASSES, read_fonts

IMAGE_SIZE = 64
CANVAS = 128  # glyphs are kept at twice the pictures' resolution
CAP_HEIGHT = 76  # of the letter H on the canvas
LARGEST = 112  # no glyph is wider or higher than this on the canvas

Pictures = NDArray[np.uint8]


class Glyphs:
    """The masks of every class in every font of one split, uint8 [fonts, 36, CANVAS, CANVAS], grouped by family."""

    def __init__(self, folder: Path, split: str) -> None:
        fonts = [font for font in read_fonts(folder) if font.split == split]
        cache = folder / f"glyphs-{split}.npy"
        if not cache.exists():
            masks = np.stack([draw_font(folder / font.path) for font in tqdm(fonts, desc=f"drawing {split} fonts")])
            with WholeFile(cache) as partial, partial.open("wb") as file:
                np.save(file, masks)
        self.masks: Pictures = np.load(cache, mmap_mode="r")
        names = sorted({font.family for font in fonts})
        self.families = [[i for i, font in enumerate(fonts) if font.family == name] for name in names]


def draw_font(path: Path) -> Pictures:
    """Every class in one font at a common scale, centred → uint8 [36, CANVAS, CANVAS]."""
    probe = ImageFont.truetype(str(path), 100)
    left, top, right, bottom = probe.getbbox("H")
    size = 100 * CAP_HEIGHT / max(bottom - top, 1)
    boxes = [ImageFont.truetype(str(path), size).getbbox(letter) for letter in CLASSES]
    largest = max(max(box[2] - box[0], box[3] - box[1]) for box in boxes)
    font = ImageFont.truetype(str(path), size * min(1.0, LARGEST / largest))
    masks = np.zeros((len(CLASSES), CANVAS, CANVAS), np.uint8)
    for mask, letter in zip(masks, CLASSES, strict=True):
        image = Image.new("L", (CANVAS, CANVAS))
        left, top, right, bottom = font.getbbox(letter)
        ImageDraw.Draw(image).text(((CANVAS - left - right) / 2, (CANVAS - top - bottom) / 2), letter, 255, font)
        mask[:] = np.asarray(image)
    return masks


def luminance(colour: NDArray[np.float32]) -> float:
    return float(colour @ np.array([0.299, 0.587, 0.114], np.float32))


def draw_colour(rng: np.random.Generator) -> NDArray[np.float32]:
    return np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.beta(2, 1.5), rng.beta(2.5, 1.2)), np.float32)


def draw_background(rng: np.random.Generator, colour: NDArray[np.float32]) -> NDArray[np.float32]:
    """Plain, a linear or a radial gradient, or stripes, around one colour → [64, 64, 3] in [0, 1]."""
    kind = rng.choice(4, p=[0.42, 0.32, 0.18, 0.08])
    if kind == 0:
        return np.broadcast_to(colour, (IMAGE_SIZE, IMAGE_SIZE, 3))
    other = np.clip(colour + rng.normal(0, 0.14, 3).astype(np.float32), 0, 1)
    y, x = np.mgrid[-1 : 1 : IMAGE_SIZE * 1j, -1 : 1 : IMAGE_SIZE * 1j].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    if kind == 1:
        blend = np.clip(along / 2.4 + 0.5, 0, 1)
    elif kind == 2:
        blend = np.clip(np.hypot(x - rng.uniform(-0.5, 0.5), y - rng.uniform(-0.5, 0.5)) / 1.6, 0, 1)
    else:
        blend = np.clip(np.sin(along * rng.uniform(6, 12) + rng.uniform(0, 6)) * 3 + 0.5, 0, 1)
    return colour + blend[..., None] * (other - colour)


def draw_letter(rng: np.random.Generator, mask: Pictures) -> Pictures:
    """One picture of the glyph `mask` uint8 [CANVAS, CANVAS] → uint8 [64, 64, 3]."""
    while True:  # colours far enough apart to be read, of gradients and stripes too
        foreground, background = draw_colour(rng), draw_colour(rng)
        if abs(luminance(foreground) - luminance(background)) > 0.32:
            break
    turn, slant = rng.normal(0, 0.07), rng.normal(0, 0.08)
    scale_x, scale_y = np.exp(rng.normal(0, 0.09) + rng.normal(0, 0.06, 2)) * CANVAS / IMAGE_SIZE / 1.08
    shift = rng.normal(0, 2.2, 2).clip(-5, 5)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ np.array([[1, slant], [0, 1]])
    matrix = matrix * [scale_x, scale_y]  # from a picture's pixels to the canvas's
    offset = CANVAS / 2 - matrix @ (IMAGE_SIZE / 2 + shift)
    affine = (*matrix[0], offset[0], *matrix[1], offset[1])
    # Drawn at twice the size and averaged, against jagged edges.
    half = tuple(v / 2 if i % 3 < 2 else v for i, v in enumerate(affine))
    large = Image.fromarray(mask).transform((2 * IMAGE_SIZE,) * 2, Image.Transform.AFFINE, half, Image.Resampling.BILINEAR)
    alpha = np.asarray(large.reduce(2), np.float32)[..., None] / 255
    picture = draw_background(rng, background) * (1 - alpha) + foreground * alpha
    return np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8)


def draw_pictures(glyphs: Glyphs, count: int, seed: int) -> tuple[Pictures, NDArray[np.int64]]:
    """`count` pictures a class → uint8 [36·count, 64, 64, 3] and their classes, class by class. Families are equally likely."""
    rng = np.random.default_rng(seed)
    pictures = np.empty((len(CLASSES) * count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    labels = np.repeat(np.arange(len(CLASSES)), count)
    for i in tqdm(range(len(labels)), desc="drawing letters", mininterval=1):
        family = glyphs.families[rng.integers(len(glyphs.families))]
        pictures[i] = draw_letter(rng, glyphs.masks[rng.choice(family), labels[i]])
    return pictures, labels
