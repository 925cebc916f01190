from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import list_anew
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import enat
from enat import Pipeline, Stopped, to_pil
from enat.errors import EngineError, InputError
from enat.runtime.backends import Backend, Lane
from enat.runtime.classes import parse_classes
from enat.runtime.manifest import Manifest
from enat.runtime.pipeline import Preview


@pytest.fixture(scope="module")
def pipe(engines: Callable[[str], Path]) -> Iterator[Pipeline]:
    with Pipeline.load(engines("tiny")) as pipeline:
        yield pipeline


def test_pictures(pipe: Pipeline) -> None:
    images = pipe.generate([7, 3], seed=0)
    assert images.shape == (2, 32, 32, 3)
    assert images.dtype == np.uint8
    assert [image.size for image in to_pil(images)] == [(32, 32)] * 2
    assert isinstance(to_pil(images)[0], Image.Image)
    assert np.array_equal(images, pipe.decode(pipe.generate_tokens([7, 3], seed=0)))


requests = st.tuples(
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.integers(0, 2**64 - 1),
    st.integers(1, 64),
    st.sampled_from([0.0, 2.5]),
    st.integers(1, 4),
)


@settings(max_examples=15)
@given(requests)
def test_the_batch_does_not_matter(pipe: Pipeline, request: tuple[list[int], int, int, float, int]) -> None:
    classes, seed, steps, guidance, batch_size = request
    together = pipe.generate_tokens(classes, seed=seed, steps=steps, guidance=guidance, batch_size=8)
    assert np.array_equal(together, pipe.generate_tokens(classes, seed=seed, steps=steps, guidance=guidance, batch_size=batch_size))
    last = len(classes) - 1
    alone = pipe.generate_tokens([classes[last]], seed=(seed + last) % 2**64, steps=steps, guidance=guidance)
    assert np.array_equal(together[last], alone[0])
    assert together.min() >= 0
    assert together.max() < pipe.manifest.model.codes


def test_settings_change_the_picture(pipe: Pipeline) -> None:
    base = pipe.generate_tokens([1], seed=0)
    for changed in ({"seed": 1}, {"steps": 9}, {"guidance": 0}, {"mask_temperature": 0.1}, {"sampling_temperature": 0.1}):
        assert not np.array_equal(base, pipe.generate_tokens([1], **{"seed": 0, **changed})), changed


def test_images_are_numbered_class_by_class(pipe: Pipeline) -> None:
    images = pipe.generate([4, 2], num=2, seed=10)
    assert np.array_equal(images, pipe.generate([4, 4, 2, 2], seed=[10, 11, 12, 13]))
    assert np.array_equal(pipe.generate_tokens(1, num=2, seed=2**64 - 1), pipe.generate_tokens([1, 1], seed=[2**64 - 1, 0]))


def test_pictures_without_a_seed_differ(pipe: Pipeline) -> None:
    assert not np.array_equal(pipe.generate_tokens([1]), pipe.generate_tokens([1]))


class Recorder:
    """A backend, and its lane, that note what the loop asks of the real ones."""

    lane: Lane

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.calls: list[tuple[str, dict[str, tuple[int, ...]]]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.lane, name)

    @contextlib.contextmanager
    def lease(self) -> Iterator[Recorder]:
        with self.backend.lease() as self.lane:
            yield self

    def run(self, graph: str, inputs: dict[str, np.ndarray]) -> object:
        self.calls.append((graph, {name: value.shape for name, value in inputs.items()}))
        return self.lane.run(graph, inputs)


@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_what_the_graphs_are_given(pipe: Pipeline, guidance: float) -> None:
    """No unconditional rows at the first step, none at all without guidance; the encoder sees new tokens only."""
    recorder = Recorder(pipe.backend)
    steps = pipe.schedule(8, guidance)
    Pipeline(pipe.manifest, recorder).generate_tokens([1, 2, 3], seed=0, steps=8, guidance=guidance)  # type: ignore[arg-type]
    rows = 6 if guidance else 3
    decoder = [inputs for graph, inputs in recorder.calls if graph == "decoder"]
    encoder = [inputs for graph, inputs in recorder.calls if graph == "encoder"]
    assert len(encoder) == 7
    assert decoder[0]["features"] == (3, 0, 48)
    assert decoder[0]["decoder_modulation"][0] == 3
    for step, inputs in zip(steps[1:], encoder, strict=True):
        assert inputs["tokens"] == (3, step.new)
        assert inputs["features"] == (rows, step.seen, 48)
    for step, inputs in zip(steps[1:], decoder[1:], strict=True):
        assert inputs["positions"] == (3, step.masked)
        assert inputs["features"] == (rows, step.visible, 48)


def test_numbers_of_any_kind(pipe: Pipeline) -> None:
    """NumPy's are as good as Python's; what is no whole number is refused, not cut off."""
    wanted = pipe.generate_tokens([3, 3], seed=[5, 6])
    numbers: list[tuple[Any, Any]] = [
        (np.array([3, 3]), np.int64(5)), ((np.int32(3), "3"), np.array([5, 6])), (iter([3, 3]), np.array([5, 6], np.uint64))
    ]  # fmt: skip
    for classes, seed in numbers:
        assert np.array_equal(pipe.generate_tokens(classes, seed=seed), wanted)
    for one in (3, "3", range(3, 4), np.int16(3), np.array(3)):
        assert np.array_equal(pipe.generate_tokens(one, seed=5), wanted[:1])
    narrow = {"num": np.int8(1), "batch_size": np.uint8(100), "steps": np.int8(4), "guidance": np.uint8(100)}
    half = np.float16(2.7)
    for chosen, plain in ((narrow, {"batch_size": 100, "steps": 4, "guidance": 100}), ({"guidance": half}, {"guidance": float(half)})):
        assert np.array_equal(pipe.generate_tokens([1] * 150, seed=0, **chosen), pipe.generate_tokens([1] * 150, seed=0, **plain))  # type: ignore[arg-type]
    for arguments, message in (
        ({"classes": [7.9]}, "expected a class by its number or name, got 7.9"),
        ({"classes": [1], "seed": 1.5}, "expected a seed that is a whole number, got 1.5"),
        ({"classes": [1], "seed": [None]}, "expected a seed that is a whole number, got None"),
        ({"classes": [1], "num": 2.0}, "expected a whole number of images, got 2.0"),
        ({"classes": [1], "num": 10**5000}, "expected a whole number of images, got one of 16610 bits"),
        ({"classes": [10**5000]}, "expected a class by its number or name, got one of 16610 bits"),
        ({"classes": [1], "steps": 10**5000}, "expected 1 to 64 steps, got one of 16610 bits"),
        ({"classes": [1], "guidance": np.float16("inf")}, "expected a guidance of 0 to 1e6"),
        ({"classes": [1], "callback": "no"}, "expected a callback that can be called, or None, got 'no'"),
        ({"classes": [1], "batch_size": "2"}, "expected a whole number as batch size, got '2'"),
        ({"classes": [1], "seed": itertools.count(5)}, "expected one seed for each of 1 images, got 2"),
        ({"classes": "all"}, "unknown class 'all'"),
        ({"classes": [1], "steps": "8"}, "expected 1 to 64 steps, got '8'"),
        ({"classes": [1], "guidance": "a"}, "expected a guidance of 0 to 1e6, got 'a'"),
        ({"classes": ["9" * 5000]}, "expected a class of 0 to 9, got 9"),
        ({"classes": b"3"}, "expected a class by its number or name, got b'3'"),
        ({"classes": [1], "guidance": 1e39}, "expected a guidance of 0 to 1e6, got 1e+39"),
        ({"classes": [1], "guidance": 10**400}, "expected a guidance of 0 to 1e6, got inf"),
        ({"classes": [1], "guidance_scale": 3}, "unknown setting 'guidance_scale'; expected num, seed, steps, guidance"),
        ({"classes": [1], "images": True}, "unknown setting 'images'"),
        ({"classes": [1, 2], "num": 10**9}, "2000000000 pictures are too many for one request; expected at most 1000000"),
        ({"classes": itertools.repeat(1)}, "1000001 pictures are too many for one request"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            pipe.generate_tokens(**arguments)  # type: ignore[arg-type]
    assert np.array_equal(pipe.generate_tokens(["0" * 5000 + "3"], seed=np.array(5)), wanted[:1])


def test_no_pictures_at_all(pipe: Pipeline) -> None:
    pictures = pipe.decode(np.empty((0, 8, 8), np.int64))
    assert pictures.shape == (0, *pipe.generate([1]).shape[1:]) and pipe.encode(pictures).shape == (0, 8, 8)


def test_pictures_come_as_they_are_drawn(pipe: Pipeline) -> None:
    steps: list[int] = []
    batches = pipe.stream([1, 2, 3], seed=0, steps=4, batch_size=2, callback=lambda step, total, preview: steps.append(step))
    assert steps == []
    first = next(batches)
    assert len(first) == 2 and steps == [0, 1, 2, 3]
    assert np.array_equal(np.concatenate([first, *batches]), pipe.generate([1, 2, 3], seed=0, steps=4))
    with pytest.raises(InputError, match="expected a batch size of 1 or more"):
        pipe.stream([1], batch_size=0)


def test_callback(pipe: Pipeline) -> None:
    seen = []

    def watch(step: int, total: int, preview: Preview) -> None:
        seen.append((step, total, preview(), preview.masked()))

    images = pipe.generate([1, 2, 3], seed=0, steps=4, batch_size=2, callback=watch)
    assert [(step, total) for step, total, *_ in seen] == [(i, 8) for i in range(8)]
    masked = [int(masked[0].sum()) for *_, masked in seen]
    assert masked == [step.keep for step in pipe.schedule(4)] * 2
    assert np.array_equal(seen[3][2], images[:2])  # the last preview of a batch is the picture
    assert np.array_equal(seen[7][2], images[2:])


def test_what_a_callback_returns(pipe: Pipeline, recwarn: pytest.WarningsRecorder) -> None:
    async def later(step: int, steps: int, preview: Preview) -> None: ...

    for callback, shown in ((later, "<coroutine"), (lambda *_: "no", "'no'"), (lambda *_: np.zeros(2), "array")):
        with pytest.raises(InputError, match=f"expected a callback that returns True, to stop the run, False or None, got {shown}"):
            pipe.generate([1], callback=callback)  # type: ignore[arg-type]
    assert not recwarn.list  # of a coroutine that nobody waited for
    assert len(pipe.generate([1], callback=lambda *_: np.False_)) == 1

    class Frames(list[int]):
        """One that is false as long as it is empty."""

        def __call__(self, step: int, total: int, preview: Preview) -> None:
            self.append(step)

    frames = Frames()
    pipe.generate([1], steps=3, callback=frames)
    assert frames == [0, 1, 2]


def test_a_callback_may_stop_the_run(pipe: Pipeline) -> None:
    steps = []
    with pytest.raises(Stopped, match="stopped after step 3 of 8"):
        pipe.generate([1], seed=0, callback=lambda step, total, preview: steps.append(step) or step == 2)
    assert steps == [0, 1, 2]


@pytest.mark.parametrize("slots", [1, 4])
def test_threads_share_a_pipeline(pipe: Pipeline, slots: int) -> None:
    expected = [pipe.generate([i], seed=i) for i in range(8)]
    with Pipeline.load(pipe.manifest.folder, slots=slots) as shared, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: shared.generate([i], seed=i), range(8)))
        assert shared.backend.lanes.open == slots  # type: ignore[attr-defined]
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


def test_encode_and_decode(pipe: Pipeline) -> None:
    images = pipe.generate([1, 2], seed=3)
    tokens = pipe.encode(images)
    assert tokens.shape == (2, 8, 8)
    assert pipe.decode(tokens).shape == images.shape
    with pytest.raises(InputError, match="expected uint8 images"):
        pipe.encode(images[:, :16])
    with pytest.raises(InputError, match=r"expected uint8 images .*, got float32"):
        pipe.encode(images.astype(np.float32))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected tokens of 0 to 255"):
        pipe.decode(tokens + 256)
    with pytest.raises(InputError, match="expected tokens of 0 to 255, got -1 to"):
        pipe.decode(np.where(tokens == tokens.min(), -1, tokens))
    with pytest.raises(InputError, match=r"expected whole numbers of shape .*, got bool"):
        pipe.decode(tokens > 3)
    for dtype in (np.uint8, np.int32, np.uint64, ">i8"):
        assert np.array_equal(pipe.decode(tokens.astype(dtype)), pipe.decode(tokens))
    with pytest.raises(InputError, match=r"expected whole numbers of shape \[N, 8, 8\], got float64 \[2, 8, 8\]"):
        pipe.decode(tokens + 0.5)
    with pytest.raises(InputError, match="expected a batch size of 1 or more, got 0"):
        pipe.decode(tokens, batch_size=0)
    assert np.array_equal(pipe.encode(to_pil(images), batch_size=1), tokens)
    assert np.array_equal(pipe.decode(tokens.tolist(), batch_size=1), pipe.decode(tokens))
    with pytest.raises(InputError, match=r"expected pictures, uint8 \[N, height, width, 3\], got uint8 \[32, 32, 3\]"):
        to_pil(images[0])


def test_outputs_are_asked_for_by_name(engine_copy: Path, pipe: Pipeline) -> None:
    """They may stand in any order in a graph."""
    model = onnx.load(engine_copy / "sampler.onnx")
    outputs = list(model.graph.output)[::-1]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    onnx.save(model, engine_copy / "sampler.onnx")
    list_anew(engine_copy)
    for backend in ("onnxruntime", "openvino"):
        found = Pipeline.load(engine_copy, backend).generate_tokens([1, 2], seed=3)
        assert (found == pipe.generate_tokens([1, 2], seed=3)).mean() > 0.99


def test_previews_are_for_their_callback(pipe: Pipeline) -> None:
    """Outside of it, or in another thread, other batches may have the lane."""
    kept: list[Callable[[], Any]] = []
    elsewhere: list[str] = []

    def watch(step: int, total: int, preview: Preview) -> None:
        kept.extend((preview, preview.masked))
        thread = threading.Thread(target=lambda: elsewhere.extend(map(refusal, kept)))
        thread.start()
        thread.join()

    def refusal(ask: Callable[[], Any]) -> str:
        with pytest.raises(InputError) as found:
            ask()
        return str(found.value)

    pipe.generate([1], seed=0, steps=2, callback=watch)
    assert set(map(refusal, kept)) | set(elsewhere) == {
        "a preview is for the callback that got it, and for its thread; keep the pictures that it gives there"
    }


def test_the_settings_are_shown(pipe: Pipeline) -> None:
    """By help() and notebooks, with their defaults."""
    shown = inspect.signature(pipe.generate).parameters
    assert list(shown)[:4] == ["classes", "num", "seed", "steps"] and shown["batch_size"].default == 8
    assert shown.keys() == inspect.signature(pipe.generate_tokens).parameters.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": []}, "at least one class"),
        ({"classes": [10]}, "0 to 9, got 10"),
        ({"classes": ["cat"]}, "unknown class 'cat'"),
        ({"classes": [1], "num": 0}, "1 or more images"),
        ({"classes": [1], "seed": -1}, "seed of 0 to"),
        ({"classes": [1], "seed": 2**64}, "seed of 0 to"),
        ({"classes": [1, 2], "seed": [1]}, "one seed for each of 2"),
        ({"classes": [1], "steps": 65}, "1 to 64 steps, got 65"),
        ({"classes": [1], "batch_size": 0}, "batch size"),
        ({"classes": [1], "guidance": float("nan")}, "guidance"),
    ],
)
def test_arguments_out_of_range(pipe: Pipeline, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe.generate(**arguments)


def test_an_engine_without_images(engine_copy: Path) -> None:
    import json

    manifest = json.loads((engine_copy / "manifest.json").read_text())
    for name in ("image_decoder.onnx", "image_encoder.onnx"):
        (engine_copy / name).unlink()
        manifest["files"].pop(name)
    (engine_copy / "manifest.json").write_text(json.dumps(manifest))
    pipeline = Pipeline.load(engine_copy)
    assert pipeline.generate_tokens([1], seed=0).shape == (1, 8, 8)
    with pytest.raises(EngineError, match="no image decoder"):
        pipeline.generate([1], seed=0)
    with pytest.raises(EngineError, match="no image decoder and gives tokens only"):
        pipeline.generate_tokens([1], seed=0, callback=lambda step, total, preview: bool(preview().size))
    with pytest.raises(EngineError, match="no image encoder"):
        pipeline.encode(np.zeros((1, 32, 32, 3), np.uint8))


def test_class_names_with_blanks_around_them(engine_copy: Path) -> None:
    manifest = json.loads((engine_copy / "manifest.json").read_text())
    manifest["model"]["class_names"] = [f" class {i}\t" for i in range(10)]
    (engine_copy / "manifest.json").write_text(json.dumps(manifest))
    pipeline = Pipeline.load(engine_copy)
    assert np.array_equal(pipeline.generate_tokens(["class 3"], seed=1), pipeline.generate_tokens([3], seed=1))


def test_class_names_that_look_like_something_else(manifest: Manifest) -> None:
    """A name comes before what else the words of a command line may mean; one that several classes have means none of them."""
    names = ("a-b", "a", "b", "crane, bird", "All", "crane", "crane", "7", "8", "9")
    model = dataclasses.replace(manifest.model, class_names=names)
    assert parse_classes(model, ["a-b", "crane, bird", "all"]) == [0, 3, 4]
    for word, message in (
        ("crane", "class 'crane' is ambiguous: numbers 5, 6 are called so; give the number"),
        ("1,,2", "expected classes with commas between, got '1,,2'"),
        ("²", "unknown class '²'"),  # digits to Python, and no numbers
        ("٣", "unknown class '٣'"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            parse_classes(model, [word])


def test_the_runtime_never_imports_pytorch(engines: Callable[[str], Path]) -> None:
    """Not even where it is installed; and importing enat alone loads nothing heavy."""
    code = (
        "import sys, enat; assert not {'numpy', 'onnxruntime', 'PIL'} & set(sys.modules), 'import enat is heavy';"
        f"enat.Pipeline.load({str(engines('tiny'))!r}).generate([1], seed=0); import enat.runtime.cli;"
        "assert not {'torch', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("engine", [3, b"engine", "a\0b", "\ud800", ["engine"]])
def test_what_no_engine_can_be_called(engine: Any) -> None:
    with pytest.raises(InputError, match="expected the path of an engine directory, got"):
        Pipeline.load(engine)


def test_names_of_the_package() -> None:
    """For completion in shells and editors."""
    assert {"Pipeline", "to_pil", "EnatError"} <= set(dir(enat))
    assert all(hasattr(enat, name) for name in dir(enat))
