"""From an engine directory to pictures, in one object."""

from __future__ import annotations

import inspect
import itertools
import os
import secrets
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsIndex, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError, InputError, Stopped
from .backends import Backend, Lane, Tensor, open_backend
from .classes import class_index, whole
from .loop import OnStep, sample
from .manifest import SETTINGS, Manifest, read_manifest
from .progress import progress_bar
from .schedule import Step, schedule

Images = NDArray[np.uint8]  # [N, height, width, 3], RGB
Tokens = NDArray[np.int64]  # [N, grid, grid]

Classes = SupportsIndex | str | Iterable[SupportsIndex | str]
Seed = SupportsIndex | Iterable[SupportsIndex] | None

BUNDLED_ENGINE = Path(__file__).parent.parent / "demo" / "engine"
BATCH_SIZE = 8
MOST_PICTURES = 1_000_000  # of one request, whose records and numbers name each


class Preview:
    """The pictures of the batch being drawn, as they would be if the run ended after this step. Made only when asked for, by the callback
    that got it and in its thread: elsewhere the batch goes on meanwhile."""

    def __init__(self, pipeline: Pipeline, lane: Lane, tokens: Tensor, positions: Tensor, masked_positions: Tensor) -> None:
        self.pipeline, self.lane = pipeline, lane
        self.tokens, self.positions, self.masked_positions = tokens, positions, masked_positions
        self.thread: int | None = threading.get_ident()  # None: the callback has returned

    def __call__(self) -> Images:
        """uint8 [batch, height, width, 3]. Raises EngineError where the engine has no image decoder, InputError outside the callback."""
        self.pipeline.manifest.require_images()
        self.require_callback()
        (images,) = self.lane.run("image_decoder", {"tokens": self.tokens, "positions": self.positions})
        return self.lane.download(images)

    def require_callback(self) -> None:
        if self.thread != threading.get_ident():
            raise InputError("a preview is for the callback that got it, and for its thread; keep the pictures that it gives there")

    def masked(self) -> NDArray[np.bool_]:
        """Which tokens are not revealed yet: [batch, grid, grid]. Raises InputError outside the callback."""
        self.require_callback()
        positions = self.lane.download(self.masked_positions)
        grid = self.pipeline.manifest.model.grid
        result = np.zeros((len(positions), grid * grid), bool)
        np.put_along_axis(result, positions, True, axis=1)
        return result.reshape(-1, grid, grid)


# Called after every step with (step, steps, preview): steps are counted from 0, over all batches. Returning True stops the run. It must
# not ask the pipeline for other pictures (InputError), nor wait for a thread that does: the run holds a slot meanwhile.
Callback = Callable[[int, int, Preview], bool | np.bool_ | None]


class Drawing(TypedDict, total=False):
    """Settings of a run, as `Pipeline.generate` explains them."""

    num: int
    seed: Seed
    steps: int | None
    guidance: float | np.floating[Any] | None
    mask_temperature: float | np.floating[Any] | None
    sampling_temperature: float | np.floating[Any] | None
    batch_size: int
    callback: Callback | None
    progress: bool


DEFAULTS: dict[str, Any] = {**dict.fromkeys(Drawing.__annotations__), "num": 1, "batch_size": BATCH_SIZE, "progress": False}


def spell_out(method: Callable[..., Any]) -> None:
    """Shows the settings one by one where help() and notebooks ask for a method's signature."""
    own = inspect.signature(method)
    *plain, _ = own.parameters.values()
    keyword, hints = inspect.Parameter.KEYWORD_ONLY, Drawing.__annotations__
    settings = [inspect.Parameter(name, keyword, default=DEFAULTS[name], annotation=hints[name].__forward_arg__) for name in hints]
    method.__signature__ = own.replace(parameters=[*plain, *settings])  # type: ignore[attr-defined]


class Pipeline:
    """An engine, loaded. One pipeline may be used from several threads at once."""

    def __init__(self, manifest: Manifest, backend: Backend) -> None:
        self.manifest = manifest
        self.backend = backend

    @classmethod
    def load(
        cls,
        engine: str | Path | None = None,
        backend: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
        verify: bool = False,
        slots: int = 1,
    ) -> Pipeline:
        """Loads an engine directory; without one, the engine that comes with the package (letters and digits).

        device: cpu, or cuda:0 for the first GPU. threads: on the CPU; by default one for each core that the process may use, which in a
        container are fewer than the machine has. verify: hash files over 64 MiB too.
        slots: batches in flight at once, each with memory of its own; further threads wait in turn. On a CPU they share `threads`:
        docs/SPEED.md has figures.
        Raises EngineError for an engine that is incomplete, altered or too new, BackendError where the backend cannot run it.
        """
        manifest = read_manifest(BUNDLED_ENGINE if engine is None else as_path(engine), verify)
        return cls(manifest, open_backend(backend, manifest, device, threads, slots))

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.backend.close()

    def generate(self, classes: Classes, **settings: Unpack[Drawing]) -> Images:
        """Draws pictures: uint8 [N, height, width, 3], RGB, class by class.

        classes: numbers or names, or one of them. Settings, all optional:
        num (1): images a class. seed: image i of the request has seed + i (mod 2⁶⁴); or a sequence of seeds, one an image; drawn
        at random without one. steps: 1 … length. guidance: scale of the classifier-free guidance, 0 for none.
        mask_temperature, sampling_temperature: at the first step, falling to 0. Their defaults are the engine's.
        batch_size (8): images drawn at once. callback: see Callback. progress (False): a bar on stderr where that is a terminal.
        Raises EngineError where the engine has no image decoder, InputError for a setting out of its range, Stopped where the callback
        stopped the run, BackendError where the backend fails or the pipeline was closed.
        """
        return np.concatenate(list(self.stream(classes, **settings)))

    def stream(self, classes: Classes, **settings: Unpack[Drawing]) -> Generator[Images, None, None]:
        """The pictures of `generate`, batch by batch as they are drawn, for more than memory holds. Arguments are checked at once; between
        batches others may use the pipeline. `close()` ends it early.
        """
        self.manifest.require_images()
        return (images for (images,) in self.batches(classes, settings, images=True))

    def generate_tokens(self, classes: Classes, **settings: Unpack[Drawing]) -> Tokens:
        """Draws tokens: int64 [N, grid, grid]. Arguments and errors as of `generate`; no image decoder is needed."""
        grid = self.manifest.model.grid
        return np.concatenate([in_raster(tokens, positions, grid) for tokens, positions in self.batches(classes, settings)])

    def schedule(
        self,
        steps: int | None = None,
        guidance: float | None = None,
        mask_temperature: float | None = None,
        sampling_temperature: float | None = None,
    ) -> list[Step]:
        """The steps of a run with these settings, the engine's own where None. Raises InputError."""
        chosen = self.manifest.sampling.settings(
            steps=steps, guidance=guidance, mask_temperature=mask_temperature, sampling_temperature=sampling_temperature
        )
        return schedule(self.manifest.model.length, **chosen)

    def batches(self, classes: Classes, settings: Drawing, images: bool = False) -> Iterator[list[NDArray[Any]]]:
        """Draws batch by batch: what `loop.sample` gives for each. Arguments are checked before the first is drawn."""
        for name in settings:
            if name not in Drawing.__annotations__:
                raise InputError(f"unknown setting {name!r}; expected {', '.join(Drawing.__annotations__)}")
        chosen: dict[str, Any] = {**DEFAULTS, **settings}
        steps = self.schedule(**{name: chosen[name] for name in SETTINGS})
        num = whole(chosen["num"], "a whole number of images")
        if num < 1:
            raise InputError(f"expected 1 or more images a class, got {num}")
        batch_size = check_batch_size(chosen["batch_size"])
        if chosen["callback"] is not None and not callable(chosen["callback"]):
            raise InputError(f"expected a callback that can be called, or None, got {chosen['callback']!r:.60}")
        several: Any = classes if is_several(classes) else [classes]
        labels = [class_index(self.manifest.model, wanted) for wanted in itertools.islice(several, MOST_PICTURES + 1)]
        if not labels:
            raise InputError("expected at least one class")
        check_count(len(labels) * num, "request")
        labels = [label for label in labels for _ in range(num)]
        seeds = image_seeds(chosen["seed"], len(labels))
        return self.draw(labels, seeds, steps, batch_size, images, chosen["callback"], chosen["progress"])

    def draw(
        self,
        labels: Sequence[int],
        seeds: Sequence[int],
        steps: Sequence[Step],
        batch_size: int = BATCH_SIZE,
        images: bool = False,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Iterator[list[NDArray[Any]]]:
        starts = range(0, len(labels), batch_size)
        total = len(starts) * len(steps)
        with progress_bar(total, "step", progress) as bar:

            def on_step(step: Step, tokens: Tensor, positions: Tensor, masked_positions: Tensor) -> None:
                bar.update()
                if callback is None:
                    return
                preview = Preview(self, lane, tokens, positions, masked_positions)
                try:
                    stop = callback(bar_start + step.index, total, preview)
                finally:
                    preview.thread = None
                if not isinstance(stop, bool | np.bool_ | None):
                    if inspect.iscoroutine(stop):
                        stop.close()  # Python would warn of it, too
                    raise InputError(f"expected a callback that returns True, to stop the run, False or None, got {stop!r:.60}")
                if stop:
                    raise Stopped(f"stopped after step {bar_start + step.index + 1} of {total}")

            for number, first in enumerate(starts):
                bar_start = number * len(steps)
                chosen = slice(first, first + batch_size)
                with self.backend.lease() as lane:  # for this batch alone: who waits for the next one may use the pipeline meanwhile
                    hook: OnStep | None = on_step if callback is not None or (progress and not lane.records) else None
                    drawn = sample(lane, self.manifest, labels[chosen], seeds[chosen], steps, images, hook)
                bar.update(bar_start + len(steps) - bar.n)
                yield drawn

    def decode(self, tokens: NDArray[np.integer[Any]], batch_size: int = BATCH_SIZE) -> Images:
        """tokens [N, grid, grid], whole numbers → pictures, uint8 [N, height, width, 3]; so many at once."""
        self.manifest.require_images()
        model = self.manifest.model
        tokens = as_array(tokens)
        if tokens.shape[1:] != (model.grid, model.grid) or tokens.dtype.kind not in "iu":
            raise InputError(f"expected whole numbers of shape [N, {model.grid}, {model.grid}], got {tokens.dtype} {list(tokens.shape)}")
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < model.codes):
            raise InputError(f"expected tokens of 0 to {model.codes - 1}, got {tokens.min()} to {tokens.max()}")
        if not len(tokens):
            return np.empty((0, model.image_size or 0, model.image_size or 0, 3), np.uint8)
        flat = np.ascontiguousarray(tokens.reshape(len(tokens), -1), np.int64)
        positions = np.tile(np.arange(model.length, dtype=np.int64), (len(flat), 1))
        return self.run_graph("image_decoder", {"tokens": flat, "positions": positions}, batch_size)

    def encode(self, images: Images, batch_size: int = BATCH_SIZE) -> Tokens:
        """pictures, uint8 [N, height, width, 3] → tokens [N, grid, grid]; so many at once. Raises EngineError without an image encoder."""
        model = self.manifest.model
        if not self.manifest.has("image_encoder.onnx"):
            raise EngineError(f"{self.manifest.folder}: this engine has no image encoder")
        expected = (model.image_size, model.image_size, 3)
        images = as_array(images)
        if images.dtype != np.uint8 or images.shape[1:] != expected:
            raise InputError(
                f"expected uint8 images of shape [N, {', '.join(map(str, expected))}], got {images.dtype} {list(images.shape)}"
            )
        if not len(images):
            return np.empty((0, model.grid, model.grid), np.int64)
        return self.run_graph("image_encoder", {"images": images}, batch_size).reshape(-1, model.grid, model.grid)

    def run_graph(self, graph: str, arrays: Mapping[str, NDArray[Any]], batch_size: int) -> NDArray[Any]:
        """Runs a graph with one output, batch by batch."""
        batch_size = check_batch_size(batch_size)
        count = len(next(iter(arrays.values())))
        results = []
        for first in range(0, count, batch_size):
            chosen = {name: array[first : first + batch_size] for name, array in arrays.items()}
            with self.backend.lease() as lane:
                results += lane.compute(None, chosen, lambda inputs: lane.run(graph, inputs))
        return np.concatenate(results)


def check_count(pictures: int, of: str) -> None:
    if pictures > MOST_PICTURES:
        raise InputError(f"{pictures} pictures are too many for one {of}; expected at most {MOST_PICTURES}")


def check_batch_size(value: SupportsIndex) -> int:
    """The number as an int. Raises InputError."""
    number = whole(value, "a whole number as batch size")
    if number < 1:
        raise InputError(f"expected a batch size of 1 or more, got {number}")
    return number


def as_path(given: Any) -> Path:
    """Raises InputError for what no file can be called."""
    try:
        if given != "" and b"\0" not in os.fsencode(path := Path(given)):
            return path
    except (TypeError, ValueError):
        pass
    raise InputError(f"expected the path of an engine directory, got {given!r:.80}")


def as_array(given: Any) -> NDArray[Any]:
    """Arrays, and lists of what becomes one. Raises InputError."""
    try:
        return np.asarray(given)
    except (TypeError, ValueError) as error:  # of rows that differ in length, say
        raise InputError(f"expected an array ({error})") from error


def in_raster(tokens: NDArray[np.int64], positions: NDArray[np.int64], grid: int) -> Tokens:
    """tokens at positions, [N, grid²] each in any order → [N, grid, grid]."""
    result = np.empty_like(tokens)
    np.put_along_axis(result, positions, tokens, axis=1)
    return result.reshape(-1, grid, grid)


def is_several(value: object) -> bool:
    """Whether it is an iterable of values, and no word; an array without dimensions is one value."""
    return isinstance(value, Iterable) and not isinstance(value, str | bytes) and getattr(value, "shape", None) != ()


def image_seeds(seed: Seed, count: int) -> list[int]:
    """One seed an image, each in [0, 2⁶⁴). Raises InputError."""
    given: Any = seed
    if is_several(given):
        seeds = [whole(one, "a seed that is a whole number") for one in itertools.islice(given, count + 1)]
        if len(seeds) != count:
            raise InputError(f"expected one seed for each of {count} images, got {len(seeds)}")
    else:
        first = secrets.randbits(32) if given is None else whole(given, "a seed that is a whole number")
        if not 0 <= first < 2**64:
            raise InputError(f"expected a seed of 0 to 2**64 - 1, got {first}")
        seeds = [(first + i) % 2**64 for i in range(count)]
    if not all(0 <= s < 2**64 for s in seeds):
        raise InputError("expected seeds of 0 to 2**64 - 1")
    return seeds


for method in (Pipeline.generate, Pipeline.stream, Pipeline.generate_tokens):
    spell_out(method)
