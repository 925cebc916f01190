"""enat-run as its users call it."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from conftest import invoke, put_anything_anywhere, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

import enat
from enat import InputError, Pipeline
from enat.runtime import outputs
from enat.runtime.backends import Backend, open_backend
from enat.runtime.cli import main
from enat.runtime.files import WholeFile
from enat.runtime.manifest import Manifest, read_manifest
from enat.runtime.outputs import request_for
from enat.runtime.pictures import check_fits, read_metadata, save_image
from enat.runtime.pipeline import BUNDLED_ENGINE

Run = Callable[..., Result]


@pytest.fixture
def run(engines: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, engine: Path | None = None) -> Result:
        return invoke(main, "--engine", engine or engines("tiny"), *arguments)

    return call


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_one_picture(run: Run, engines: Callable[[str], Path], suffix: str) -> None:
    assert run("--class", 3, "--seed", 7, "--out", f"a{suffix}").exit_code == 0
    expected = Pipeline.load(engines("tiny")).generate([3], seed=7)[0]
    with Image.open(f"a{suffix}") as image:
        found = np.asarray(image.convert("RGB"))
    if suffix == ".jpg":
        assert np.abs(found.astype(int) - expected).mean() < 8
    else:
        assert np.array_equal(found, expected)
    metadata = read_metadata(Path(f"a{suffix}"))
    assert metadata["images"] == [{"class": 3, "seed": 7}]
    assert metadata["settings"]["steps"] == 8
    assert metadata["engine"] == Pipeline.load(engines("tiny")).manifest.hash
    assert list(Path().iterdir()) == [Path(f"a{suffix}")]


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.gif", "a.npz", "a.npy"])
def test_replay(run: Run, name: str) -> None:
    grid = [] if name.endswith((".npz", ".npy")) else ["--grid"]
    assert run("--class", "0-2", "--num", 3, "--seed", 5, "--steps", 5, "--guidance", 1, "--out", name, *grid).exit_code == 0
    again = f"again{Path(name).suffix}"
    assert run("--replay", name, "--out", again).exit_code == 0
    assert Path(name).read_bytes() == Path(again).read_bytes()


def test_replay_with_another_engine_or_of_another_file(run: Run, engines: Callable[[str], Path]) -> None:
    run("--class", 1, "--seed", 5, "--out", "a.png")
    refused(run("--replay", "a.png", "--out", "b.png", engine=engines("odd")), "a.png: made by the engine", "--force")
    refused(run("--replay", "a.png", "--class", 2, "--out", "b.png"), "--replay takes classes")
    refused(run("--replay", "none.png", "--out", "b.png"), "none.png: no such file")
    Image.new("RGB", (8, 8)).save("plain.png")
    refused(run("--replay", "plain.png", "--out", "b.png"), "plain.png: holds no record")
    Path("text.png").write_text("no picture")
    refused(run("--replay", "text.png", "--out", "b.png"), "text.png: not a readable picture")
    assert not Path("b.png").exists()


def test_the_backend_is_named_and_taken_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends round differently: what was begun with one is made again, and gone on with, by the same."""
    monkeypatch.setenv("ENAT_CACHE", "")
    asked = ("--class", "1-2", "--seed", 5)
    assert "backend auto: onnxruntime\n" in run(*asked, "--grid", "--out", "auto.png").stderr  # of a network so small
    assert "backend auto" not in run(*asked, "--grid", "--out", "a.png", "--backend", "openvino").stderr
    assert run(*asked, "--out", "folder", "--backend", "openvino").exit_code == 0
    assert [read_metadata(Path(name))["backend"] for name in ("auto.png", "a.png")] == ["onnxruntime", "openvino"]
    replay = run("--replay", "a.png", "--out", "again.png")
    assert "backend auto" not in replay.stderr and Path("again.png").read_bytes() == Path("a.png").read_bytes()
    first = next(Path("folder").glob("*.png"))
    before = first.read_bytes()
    first.unlink()
    assert run(*asked, "--out", "folder", "--resume").exit_code == 0
    assert first.read_bytes() == before
    refused(run(*asked, "--out", "folder", "--resume", "--backend", "onnxruntime"), "has other backend")
    record = Path("folder", "run.json")
    record.write_text(record.read_text().replace("openvino", "tensorrt"))  # begun on a GPU: here there is none to choose
    refused(run(*asked, "--out", "folder", "--resume"), "has other backend")


@pytest.mark.parametrize(("classes", "columns", "rows"), [("1,1,1,4,4,4", 3, 2), ("1,1,1,4,4", 5, 1), ("0-9", 4, 3)])
def test_a_sheet_has_a_row_a_class(run: Run, classes: str, columns: int, rows: int) -> None:
    """Where each has as many pictures; else it is about square, or one row of few."""
    assert run("--class", classes, "--seed", 0, "--steps", 2, "--grid", "--out", "a.png").exit_code == 0
    with Image.open("a.png") as image:
        assert image.size == (columns * 34 - 2, rows * 34 - 2)


def test_columns_of_a_sheet(run: Run) -> None:
    assert run("--class", "0-5", "--num", 2, "--seed", 0, "--grid", "--columns", 4, "--out", "a.png").exit_code == 0
    with Image.open("a.png") as image:
        assert image.size == (4 * 34 - 2, 3 * 34 - 2)
    refused(run("--class", 1, "--grid", "--columns", 0, "--out", "b.png"), "1 or more columns")
    refused(run("--class", 1, "--columns", 2, "--out", "b.png"), "--grid")
    refused(run("--replay", "a.png", "--columns", 2, "--out", "folder"), "folder: is no sheet; --columns goes with --grid")
    assert not Path("folder").exists()
    assert run("--replay", "a.png", "--columns", 6, "--out", "wide.png").exit_code == 0
    with Image.open("wide.png") as image:
        assert image.size == (6 * 34 - 2, 2 * 34 - 2)
    assert run("--class", 1, "--seed", 0, "--out", "one.png").exit_code == 0
    refused(run("--replay", "one.png", "--columns", 2, "--out", "b.png"), "one.png: is no sheet; --columns goes with --grid")
    assert run("--class", 1, "--seed", 0, "--out", "a.npy").exit_code == 0
    record = json.loads(Path("a.npy.json").read_text())
    for columns in (0, -1, "2", 1.5):
        Path("a.npy.json").write_text(json.dumps({**record, "columns": columns}))
        refused(run("--replay", "a.npy", "--out", "b.npy"), "a.npy: its record is damaged: columns is")


def test_animation(run: Run, engines: Callable[[str], Path]) -> None:
    assert run("--class", 1, "--seed", 3, "--gif", "--out", "a.gif").exit_code == 0
    with Image.open("a.gif") as image:
        assert image.n_frames == 8 and image.info["loop"] == 0  # again and again
        for step in Pipeline.load(engines("tiny")).schedule():
            image.seek(step.index)
            assert image.info["duration"] == (2000 if step.index == 7 else 400)
            frame = np.asarray(image.convert("RGB")).astype(int)
            hidden = (frame == 128).all(-1).mean()
            assert abs(hidden - step.keep / 64) < 0.005  # grey where a token is not revealed yet
    # 1000 colours became 256
    assert np.abs(frame - Pipeline.load(engines("tiny")).generate([1], seed=3)[0]).mean() < 12


def test_evaluation_file(run: Run, engines: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as changed:
        changed.delattr(Pipeline, "generate")  # of very many pictures, more than memory holds
        assert run("--class", "all", "--num", 2, "--seed", 3, "--out", "a.npz").exit_code == 0
    with np.load("a.npz") as data:
        assert np.array_equal(data["arr_0"], Pipeline.load(engines("tiny")).generate(range(10), num=2, seed=3))
        assert len(json.loads(str(data["metadata"]))["images"]) == 20


def test_a_folder_goes_on_where_it_stopped(run: Run) -> None:
    arguments = ("--class", "0-3", "--num", 2, "--seed", 9, "--batch-size", 3)
    assert run(*arguments, "--out", "whole").exit_code == 0
    assert run(*arguments, "--out", "part").exit_code == 0
    names = sorted(path.name for path in Path("whole").glob("*.png"))
    assert len(names) == 8
    for name in names[3:6]:
        Path("part", name).unlink()
    kept = Path("part", names[0]).stat().st_mtime_ns
    refused(run(*arguments, "--out", "part"), "part: exists", "--resume", "--force")
    refused(run("--class", "0-3", "--num", 2, "--seed", 10, "--out", "part", "--resume"), "other images")
    refused(run(*arguments, "--steps", 3, "--out", "part", "--resume"), "other settings")
    assert run("--class", "0-3", "--num", 2, "--out", "part", "--resume").exit_code == 0  # the seed is the first run's
    assert Path("part", names[0]).stat().st_mtime_ns == kept
    for name in names:
        assert Path("part", name).read_bytes() == Path("whole", name).read_bytes()
    Path("part", names[2]).unlink()
    for force in ([], ["--force"]):
        refused(run("--out", "part", "--resume", *force, engine=BUNDLED_ENGINE), "part: made by the engine", "or choose another folder")
    assert run("--out", "part", "--resume").exit_code == 0  # its record says what was asked for
    assert Path("part", names[2]).read_bytes() == Path("whole", names[2]).read_bytes()
    for out, record in (("again", "whole"), ("again 2", "whole/run.json")):
        assert run("--replay", record, "--out", out).exit_code == 0
        assert all(Path(out, name).read_bytes() == Path("whole", name).read_bytes() for name in names)


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_run_that_is_ended_leaves_whole_files(engines: Callable[[str], Path], tmp_path: Path, how: signal.Signals, code: int) -> None:
    """Ended in the middle of a folder: every picture is whole; and where the program could, it cleaned up and said so in one line."""
    out = tmp_path / "samples"
    program = "from enat.runtime.cli import main; main()"
    command = [sys.executable, "-c", program, "--engine", str(engines("tiny")), "--class", "all", "--num", "40"]
    command += ["--seed", "1", "--steps", "64", "--batch-size", "2", "--out", str(out)]
    # What nohup, or a shell's &, has the tests ignore is ignored by what they start, too.
    heed = None if how == signal.SIGKILL else lambda: signal.signal(how, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    deadline = time.monotonic() + 60
    while len(list(out.glob("[0-9]*.png"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(how)
    _, errors = process.communicate()
    assert process.returncode == code
    assert "Traceback" not in errors
    written = list(out.glob("[0-9]*.png"))
    assert 4 <= len(written) < 400
    for path in written:
        with Image.open(path) as image:
            image.load()
    if how != signal.SIGKILL:
        assert list(out.glob(".*")) == []


def test_a_folder_of_tokens(run: Run, engines: Callable[[str], Path]) -> None:
    assert run("--class", "1-2", "--seed", 4, "--format", "npy", "--out", "tokens").exit_code == 0
    found = np.concatenate([np.load(path) for path in sorted(Path("tokens").glob("*.npy"))])
    assert np.array_equal(found, Pipeline.load(engines("tiny")).generate_tokens([1, 2], seed=4))


def test_seed_is_drawn_and_printed(run: Run) -> None:
    result = run("--class", 1, "--out", "a.png")
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("seed ")]
    assert read_metadata(Path("a.png"))["images"][0]["seed"] == int(line.split()[1])


def test_json(run: Run) -> None:
    result = run("--class", 1, "--num", 2, "--out", "d", "--json")
    summary = json.loads(result.stdout)
    assert [Path(file).exists() for file in summary["files"]] == [True, True]
    assert summary["images"][1]["seed"] == summary["images"][0]["seed"] + 1
    assert len(json.loads(run("--list-classes", "--json").stdout)) == 10


def test_what_an_engine_is(run: Run, engines: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without loading it into a backend."""
    monkeypatch.setattr("enat.runtime.pipeline.open_backend", None)
    manifest = read_manifest(engines("tiny"))
    found = json.loads(run("--info", "--json").stdout)
    assert found["hash"] == manifest.hash and found["bytes"] == sum(file.stat().st_size for file in manifest.folder.glob("*.onnx*"))
    assert found["sampling"] == {"steps": 8, "guidance": 2.5, "mask_temperature": 1.5, "sampling_temperature": 6.0}
    assert found["model"]["image_size"] == 32 and not found["named_classes"] and found["builds"] == []
    lines = dict(line.split(maxsplit=1) for line in run("--info").stdout.splitlines() if not line.startswith("source"))
    assert lines["pictures"] == "32×32; 10 classes"
    assert lines["sampling"] == "steps 8, guidance 2.5, mask temperature 1.5, sampling temperature 6"
    assert set(lines["graphs"].split(", ")) == set(found["graphs"]) == {path.stem for path in manifest.folder.glob("*.onnx")}
    assert run("--list-classes").stdout.split() == [str(i) for i in range(10)]


def test_an_output_that_does_not_know_every_letter() -> None:
    """As consoles and files of Windows; nothing ends for it."""
    code = "import sys; from enat.runtime.cli import main; main(['--info'])"
    environment = {**os.environ, "PYTHONIOENCODING": "cp1251", "PYTHONUTF8": "0"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert result.returncode == 0 and b"64?64; 36 classes" in result.stdout, result.stderr


def test_what_an_engine_from_anywhere_says_of_itself(run: Run, engine_copy: Path) -> None:
    content = json.loads((engine_copy / "manifest.json").read_text())
    content["model"]["class_names"] = ["\x1b[31mred", "two\nlines", "\udc80", *"abcdefg"]
    content["source"] = {"note": "\x07", "list": [1, None]}
    content["builds"] = [{"backend": "other"}]
    (engine_copy / "manifest.json").write_text(json.dumps(content))
    assert run("--list-classes", engine=engine_copy).stdout.splitlines()[:4] == ["0\t?[31mred", "1\ttwo?lines", "2\t?", "3\ta"]
    listed = json.loads(run("--list-classes", "--json", engine=engine_copy).stdout)
    assert listed == [{"class": i, "name": name} for i, name in enumerate(content["model"]["class_names"])]
    assert run("--info", engine=engine_copy).stdout.splitlines()[-2:] == ["source    note ?", "source    list [1, None]"]
    content["builds"] = [{"backend": "tensorrt"}]
    (engine_copy / "manifest.json").write_text(json.dumps(content))
    refused(run("--info", engine=engine_copy), "builds[0] is damaged")


def test_tokens(run: Run, engines: Callable[[str], Path]) -> None:
    assert run("--class", 1, "--seed", 4, "--out", "a.npy").exit_code == 0
    assert np.array_equal(np.load("a.npy"), Pipeline.load(engines("tiny")).generate_tokens([1], seed=4))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--class", "cat", "--out", "a.png"], ["unknown class 'cat'"]),
        (["--class", "10", "--out", "a.png"], ["0 to 9, got 10"]),
        (["--class", "5-3", "--out", "a.png"], ["'5-3'"]),
        (["--out", "a.png"], ["at least one --class"]),
        (["--class", "1"], ["expected --out"]),
        (["--class", "1", "--num", "2", "--out", "a.png"], ["a.png: 2 pictures", "--grid"]),
        (["--class", "1", "--num", "0", "--out", "a.png"], ["1 or more pictures"]),
        (["--class", "1", "--num", "9" * 4300, "--out", "folder"], ["expected a whole number of pictures a class, got one of 14285 bits"]),
        (["--class", "1", "--grid", "--out", "folder"], ["--grid makes one picture"]),
        (["--class", "1", "--gif", "--out", "a.png"], [".gif"]),
        (["--class", "1", "--out", "a.bmp"], ["a.bmp: expected a folder, or a file that ends in .png"]),
        (["--class", "1", "--out", "a.pn"], ["a.pn: expected a folder, or a file that ends in .png", "did you mean .png?"]),
        (["--class", "1", "--columns", "2", "--out", "a.png"], ["--columns goes with --grid"]),
        (["--class", "", "--out", "a.png"], ["unknown class ''; expected a name or a number"]),
        (["--engine", "", "--class", "1", "--out", "a.png"], ["expected the name of a file or a folder to read, got ''"]),
        (["--class", "1", "--out", "a.png", "--device", "cuda:x"], ["unknown device 'cuda:x'; expected cpu, cuda or cuda:N"]),
        (["--replay", "/dev/null", "--out", "a.png"], ["/dev/null: not a regular file"]),
        (["--class", "1", "--out", "-"], ["expected the name of a file or a folder to write, got '-'"]),
        (["--class", "1", "--out", ""], ["expected the name of a file or a folder to write, got ''"]),
        (["--class", "1", "--resume", "--out", "a.png"], ["--resume"]),
        (["--class", "1", "--resume", "--out", "folder"], ["no run to go on with"]),
        (["--class", "1", "--steps", "65", "--out", "a.png"], ["1 to 64 steps, got 65"]),
        (["--class", "1", "--seed", "-1", "--out", "a.png"], ["seed of 0"]),
        (["--class", "1", "--batch-size", "0", "--out", "a.png"], ["batch size"]),
        (["--class", "1", "--steps", "x", "--out", "a.png"], ["--steps"]),
        (["--class", "1", "--out", "file/a.png"], ["file/a.png: cannot be written"]),
        (["--class", "1", "--out", "file"], ["file: exists and is not a folder; a single picture's file ends in .png"]),
        (["--nonsense"], ["--nonsense"]),
    ],
)
def test_bad_input_gets_one_line(run: Run, arguments: list[str], parts: list[str]) -> None:
    Path("file").write_text("")
    refused(run(*arguments), *parts)
    assert list(Path().iterdir()) == [Path("file")]


def test_an_engine_that_is_none(run: Run, tmp_path: Path) -> None:
    refused(run("--class", 1, "--out", "a.png", engine=tmp_path / "none"), "none: not an engine directory")


def test_debug_shows_the_traceback(run: Run) -> None:
    result = run("--class", "cat", "--out", "a.png", "--debug")
    assert result.exc_info is not None
    assert result.exc_info[0].__name__ == "InputError"


@settings(max_examples=60)
@given(data=st.data())
def test_any_record_is_replayed_or_refused(run: Run, data: st.DataObject) -> None:
    if not Path("a.png").exists():
        assert run("--class", "1-2", "--seed", 3, "--steps", 2, "--grid", "--out", "a.png").exit_code == 0
    metadata = read_metadata(Path("a.png"))
    put_anything_anywhere(metadata, data, st.integers() | st.floats())
    save_image(Image.new("RGB", (1, 1)), Path("b.png"), metadata)
    for engine in (None, BUNDLED_ENGINE):
        result = run("--replay", "b.png", "--out", "again.png", *(["--force"] if engine else []), engine=engine)
        if result.exit_code:
            refused(result)


def test_classes_that_another_engine_does_not_have(run: Run) -> None:
    assert run("--class", "R", "--seed", 1, "--out", "a.png", engine=BUNDLED_ENGINE).exit_code == 0
    refused(run("--replay", "a.png", "--out", "b.png", "--force"), "expected a class of 0 to 9, got 17")


@pytest.mark.parametrize("text", ["[" * 100_000, "", "{}", "\ud800", '{"images": [], "settings": {}}'])
def test_text_that_is_no_record(run: Run, text: str) -> None:
    for name in ("a.png", "a.npy.json", "run.json"):
        if name == "a.png":
            info = PngImagePlugin.PngInfo()
            info.add(b"tEXt", b"enat\0" + text.encode("latin-1", "replace"))
            Image.new("RGB", (1, 1)).save(name, pnginfo=info)
        else:
            Path(name).write_text(text, "utf-8", "replace")
    Path("a.npy").write_text("")
    for name in ("a.png", "a.npy"):
        refused(run("--replay", name, "--out", "b.png"))
    refused(run("--out", ".", "--class", 1, "--resume"))


def test_files_that_cannot_be_replayed(run: Run) -> None:
    """What NumPy would run as a program, too."""

    class Program:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, ("made",)

    np.savez("program.npz", metadata=np.array([Program()], object))
    Path("empty.npz").write_bytes(b"")
    Path("bad.npz").write_bytes(b"PK\3\4" + bytes(100))
    Path("bad.gif").write_bytes(b"GIF89a")
    Path("bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    for path in sorted(Path().glob("*.*")):
        refused(run("--replay", path, "--out", "b.png"), f"{path}: not a readable picture")
    assert not Path("made").exists()


@pytest.mark.parametrize("name", ["a.NPZ", "a.NPY", "a.PNG", "a.Jpg"])
def test_endings_in_capitals(run: Run, name: str) -> None:
    assert run("--class", 3, "--seed", 1, "--out", name).exit_code == 0
    assert run("--replay", name, "--out", f"b{Path(name).suffix}").exit_code == 0
    assert Path(f"b{Path(name).suffix}").read_bytes() == Path(name).read_bytes()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif"])
def test_large_sheets_are_replayed(run: Run, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """Pillow refuses to open pictures of too many pixels."""
    arguments = ("--class", "0-9", "--seed", 1, "--steps", 2, "--grid")
    assert run(*arguments, "--out", f"a{suffix}").exit_code == 0
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(f"a{suffix}")
    assert run("--replay", f"a{suffix}", "--out", f"b{suffix}").exit_code == 0
    assert Path(f"b{suffix}").read_bytes() == Path(f"a{suffix}").read_bytes()
    Path(f"a{suffix}").rename("renamed.png")  # what a file is, it says itself
    assert read_metadata(Path("renamed.png")) == read_metadata(Path(f"b{suffix}"))


def test_what_does_not_fit_into_a_format(run: Run) -> None:
    """Said before anything is drawn."""
    for suffix in (".jpg", ".jpeg"):
        asked = run("--class", 1, "--num", 3000, "--grid", "--out", f"a{suffix}")
        refused(asked, f"3000 pictures does not fit into {suffix}; expected .png or .webp")
    refused(run("--class", 1, "--num", 2000, "--grid", "--columns", 1, "--out", "a.webp"), "pixels; .webp holds at most 16383 each way")
    with pytest.raises(InputError, match="16000×12000 pixels are too many for"):
        check_fits(Path("a.webp"), (16_000, 12_000), {})
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--class", "all", "--num", 10**24, "--out", "x"], "pictures are too many for one run; expected at most 1000000"),
        (["--class", 1, "--num", 0, "--out", "x"], "expected 1 or more pictures a class, got 0"),
        (["--class", 1, "--format", "webp", "--out", "x.png"], "x.png: --format goes with a folder of pictures"),
        (["--class", 1, "--format", "webp", "--gif", "--out", "x"], "x: --format goes with a folder of pictures"),
        (["--class", 1, "--out", "x.mp4"], "x.mp4: expected a folder, or a file that ends in .png"),
        (["--class", 1, "--out", "there.png"], "there.png: is a folder; expected a file to write"),
        (["--class", 1, "--out", "x.txt"], "x.txt: expected a folder, or a file that ends in .png"),
        (["--class", 1, "--guidance", "nan", "--out", "x.png"], "expected a guidance of 0 to 1e6, got nan"),
    ],
)
def test_more_that_is_refused(run: Run, arguments: list[object], message: str) -> None:
    Path("there.png").mkdir()
    refused(run(*arguments), message)
    assert not list(Path("there.png").iterdir()) and len(list(Path().iterdir())) == 1


def test_a_folder_of_very_many_pictures(engines: Callable[[str], Path]) -> None:
    """What is written into each file does not grow with how many there are."""
    with Pipeline.load(engines("tiny")) as pipeline:
        request = request_for(pipeline.manifest.sampling, [1] * 200_000, range(200_000), {})
        started = time.perf_counter()
        for i in range(1000):
            request.only([i]).metadata(pipeline)
        assert time.perf_counter() - started < 2  # 0.02 s; a copy of all labels each would take 200


def test_a_folder_goes_on_with_its_own_pictures(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that --force begins where another was, and that is interrupted: --resume does not keep the other's pictures."""
    arguments = ("--class", "0-3", "--seed", 9, "--batch-size", 1)
    assert run(*arguments, "--steps", 2, "--out", "folder").exit_code == 0
    save, count = outputs.save_image, itertools.count()

    def interrupted(*rest: Any) -> None:
        if next(count) == 2:
            raise KeyboardInterrupt
        save(*rest)

    with monkeypatch.context() as changed:
        changed.setattr(outputs, "save_image", interrupted)
        assert run(*arguments, "--steps", 4, "--out", "folder", "--force").exit_code == 130
    refused(run(*arguments, "--steps", 2, "--out", "folder", "--resume", "--force"), "other settings")
    assert run(*arguments, "--steps", 4, "--out", "folder", "--resume").exit_code == 0
    steps = [read_metadata(path)["settings"]["steps"] for path in Path("folder").glob("*.png")]
    assert steps == [4] * 4


def test_a_folder_goes_on_in_its_own_format(run: Run) -> None:
    assert run("--class", 1, "--seed", 1, "--out", "folder").exit_code == 0
    again = ("--class", 1, "--seed", 1, "--out", "folder", "--resume")
    refused(run(*again, "--format", "webp"), "has the format 'png', not 'webp'")
    assert run("--class", 1, "--seed", 1, "--out", "other", "--format", "webp").exit_code == 0
    (file,) = Path("other").glob("*.webp")
    file.unlink()
    assert run("--class", 1, "--seed", 1, "--out", "other", "--resume").exit_code == 0 and file.exists()
    assert run("--class", "1-2", "--seed", 1, "--out", "moving", "--gif", "--steps", 2).exit_code == 0
    first, second = sorted(Path("moving").glob("*.gif"))
    first.unlink()
    assert run("--out", "moving", "--resume").exit_code == 0 and first.exists()
    assert run("--replay", "moving", "--out", "again").exit_code == 0
    assert {path.name: path.read_bytes() for path in Path("again").glob("*.gif")} == {one.name: one.read_bytes() for one in (first, second)}
    record = json.loads(Path("folder/run.json").read_text())
    del record["format"]  # as earlier versions wrote it
    Path("folder/run.json").write_text(json.dumps(record))
    assert run(*again).exit_code == 0


def test_what_a_killed_run_left_is_cleared_away(run: Run) -> None:
    arguments = ("--class", "1-2", "--seed", 1, "--out", "folder")
    Path("folder").mkdir()
    left = Path("folder/.run.json.0123abcd.partial")
    left.touch()
    result = run(*arguments)
    refused(result, "folder: exists and is not empty; --force writes into it")
    left.unlink()
    assert run(*arguments).exit_code == 0
    left.touch()
    assert run(*arguments, "--resume").exit_code == 0 and left.exists()  # of a process that runs, maybe
    os.utime(left, (0, 0))
    assert run(*arguments, "--resume").exit_code == 0 and not left.exists()
    for file in Path("folder").iterdir():
        file.unlink()
    left.touch()  # all that there is: it was killed when it began
    assert run(*arguments, "--resume").exit_code == 0 and len(list(Path("folder").glob("*.png"))) == 2


def test_pictures_without_content_are_drawn_again(run: Run) -> None:
    """As some file systems leave them when the power fails."""
    arguments = ("--class", "1-2", "--seed", 1, "--out", "folder", "--resume")
    assert run(*arguments).exit_code == 0
    first, second = sorted(Path("folder").glob("*.png"))
    content = [path.read_bytes() for path in (first, second)]
    second.write_bytes(b"")
    assert run(*arguments).exit_code == 0
    assert [path.read_bytes() for path in (first, second)] == content


def test_a_record_with_a_seed_that_is_none(run: Run) -> None:
    assert run("--class", 1, "--seed", 1, "--out", "folder").exit_code == 0
    record = json.loads(Path("folder/run.json").read_text())
    for seed in (-1, 2**64):
        record["images"][0]["seed"] = seed
        Path("folder/run.json").write_text(json.dumps(record))
        refused(run("--replay", "folder", "--out", "new"), "folder: the record of how it was made is damaged", "expected seeds of 0 to")
        assert not Path("new").exists()


def test_what_a_file_says_reaches_no_terminal(run: Run) -> None:
    assert run("--class", 1, "--seed", 1, "--out", "a.npy").exit_code == 0
    record = json.loads(Path("a.npy.json").read_text())
    record["settings"]["\x1b]0;title\x07\nError"] = 1
    Path("a.npy.json").write_text(json.dumps(record))
    result = run("--replay", "a.npy", "--out", "b.npy")
    refused(result, "?]0;title??Error")
    assert "\x1b" not in result.stderr


def test_tokens_whose_record_is_gone(run: Run) -> None:
    assert run("--class", 1, "--seed", 1, "--out", "a.npy").exit_code == 0
    Path("a.npy.json").unlink()
    refused(run("--replay", "a.npy", "--out", "b.npy"), "a.npy: its record is missing: a.npy.json, which enat-run wrote beside it")


def test_a_link_is_written_through(run: Run) -> None:
    Path("elsewhere").mkdir()
    Path("a.png").symlink_to("elsewhere/b.png")
    assert run("--class", 1, "--seed", 1, "--out", "a.png").exit_code == 0
    assert Path("a.png").is_symlink() and [path.name for path in Path("elsewhere").iterdir()] == ["b.png"]
    assert run("--class", 1, "--seed", 1, "--out", "elsewhere/b.npy").exit_code == 0
    Path("a.npy").symlink_to("elsewhere/b.npy")
    assert run("--class", 2, "--seed", 2, "--out", "a.npy").exit_code == 0
    assert Path("a.npy").is_symlink() and not Path("a.npy.json").exists()
    for name in ("a.npy", "elsewhere/b.npy"):  # the record is that of the tokens
        assert read_metadata(Path(name))["images"] == [{"class": 2, "seed": 2}]
    Path("elsewhere/b.npy").rename("elsewhere/one")  # as stores that go by content have them
    Path("elsewhere/b.npy.json").rename("elsewhere/two")
    Path("a.npy").unlink()
    Path("a.npy").symlink_to("elsewhere/one")
    Path("a.npy.json").symlink_to("elsewhere/two")
    assert read_metadata(Path("a.npy"))["images"] == [{"class": 2, "seed": 2}]
    assert run("--class", 3, "--seed", 3, "--out", "a.npy").exit_code == 0
    assert read_metadata(Path("a.npy"))["images"] == [{"class": 3, "seed": 3}]
    Path("round.png").symlink_to("round.png")
    refused(run("--class", 1, "--out", "round.png"), "round.png: not a path that leads anywhere")


def test_what_cannot_be_written_is_known_before_anything_is_drawn(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "draw", lambda *_: pytest.fail("drawn"))
    Path("a.npy.json").mkdir()
    refused(run("--class", 1, "--out", "a.npy"), "a.npy.json: is a folder; expected a file to write")
    Path("file").touch()
    Path("b.png").symlink_to("file/b.png")
    refused(run("--class", 1, "--out", "b.png"), "b.png: cannot be written", "is not a folder")
    refused(run("--class", 1, "--out", "x" * 300 + ".png"), "cannot be written: File name too long")


def test_names_as_long_as_a_file_system_takes(run: Run) -> None:
    no_text = os.fsdecode(b"\xff" * 250) if sys.platform == "linux" else "y"
    for name in ("x" * 251 + ".png", "あ" * 83 + ".png", no_text + ".png"):
        assert run("--class", 1, "--out", name).exit_code == 0 and Path(name).exists()


def test_a_file_that_cannot_be_put_in_its_place(tmp_path: Path) -> None:
    """Nothing is left of it."""
    with pytest.raises(IsADirectoryError), WholeFile(tmp_path / "a") as partial:
        partial.write_text("x")
        (tmp_path / "a").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_class_names_that_no_file_may_have(run: Run, engine_copy: Path) -> None:
    """Pictures of such classes lie in their folder all the same."""
    content = json.loads((engine_copy / "manifest.json").read_text())
    content["model"]["class_names"] = ["../../up", "/etc", "x" * 300, "あ" * 200, *"abcdef"]
    (engine_copy / "manifest.json").write_text(json.dumps(content))
    assert run("--class", "#0-#3", "--seed", 1, "--steps", 1, "--out", "new/folder", engine=engine_copy).exit_code == 0
    assert {path.name for path in Path().iterdir()} == {"engine", "new"} and len(list(Path().rglob("*.png"))) == 4
    assert len(list(Path("new/folder").glob("*.png"))) == 4


def test_options_reach_whom_they_are_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    drawn: list[int] = []
    draw = Pipeline.draw

    def opened(name: str, manifest: Manifest, *rest: Any) -> Backend:
        asked.append((name, *rest))
        return open_backend(name, manifest, *rest)

    def drawing(self: Pipeline, labels: Any, seeds: Any, steps: Any, batch_size: int, *rest: Any) -> Any:
        drawn.append(batch_size)
        return draw(self, labels, seeds, steps, batch_size, *rest)

    monkeypatch.setattr("enat.runtime.cli.open_backend", opened)
    monkeypatch.setattr(Pipeline, "draw", drawing)
    options = ("--class", "1-4", "--steps", 2, "--backend", "onnxruntime", "--threads", 1, "--batch-size", 3)
    for made in (["--grid", "--out", "a.png"], ["--out", "pictures"], ["--gif", "--out", "animations"], ["--format", "npy", "--out", "d"]):
        assert run(*options, *made).exit_code == 0
    assert asked == [("onnxruntime", "cpu", 1)] * 4 and set(drawn) == {3}


def test_memory_that_is_used_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Pipeline, "draw", short)
    refused(run("--class", 1, "--out", "a.png"), "not enough memory", code=1)
    assert not list(Path().iterdir())


def test_without_stderr(tmp_path: Path) -> None:
    code = "from enat.runtime.cli import main; main()"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} --class R --seed 1 --out r.png --json 2>&-"
    found = subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True, stdout=subprocess.PIPE)
    assert json.loads(found.stdout)["files"] == ["r.png"] and (tmp_path / "r.png").is_file()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_nobody_is_told(tmp_path: Path, backend: str) -> None:
    """ONNX Runtime and OpenVINO, which report to their makers by themselves, leave none of the files that they do it with."""
    unset = {"ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "ENAT_CACHE", "CI", "TF_BUILD", "JENKINS_URL"}
    environment = {name: value for name, value in os.environ.items() if name not in unset} | {"HOME": str(tmp_path)}
    code = f"import enat; enat.Pipeline.load(backend={backend!r}).generate([1], seed=1)"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert {path.name for path in tmp_path.glob(".cache/*")} <= {"enat"}
    assert {path.name for path in tmp_path.iterdir()} <= {".cache"}


def test_the_root_is_no_place_for_pictures(run: Run) -> None:
    refused(run("--class", 1, "--out", "/"))


def test_tokens_appear_after_what_made_them(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies between the two files: the picture is not taken for done."""
    replace = Path.replace

    def dies(self: Path, target: Path) -> Path:
        if target.suffix == ".npy":
            raise KeyboardInterrupt
        return replace(self, target)

    assert run("--class", 2, "--seed", 2, "--out", "a.npy").exit_code == 0
    with monkeypatch.context() as changed:
        changed.setattr(Path, "replace", dies)
        assert run("--class", 1, "--seed", 1, "--format", "npy", "--out", "folder").exit_code == 130
        assert run("--class", 1, "--seed", 1, "--out", "a.npy").exit_code == 130
    assert not list(Path("folder").glob("*.npy"))
    assert Path("a.npy.json").exists() and not Path("a.npy").exists()  # which would be others than the record says
    assert run("--class", 1, "--seed", 1, "--format", "npy", "--out", "folder", "--resume").exit_code == 0
    (file,) = Path("folder").glob("*.npy")
    assert run("--replay", file, "--out", "again.npy").exit_code == 0


def test_versions() -> None:
    from enat.benchmarks.cli import main as bench
    from enat.export.cli import main as export
    from enat.export.verify_cli import main as verify
    from enat.serving.cli import main as triton

    for command in (main, bench, export, verify, triton):
        assert invoke(command, "--version").output == f"enat {enat.__version__}\n"


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.npz", "a.npy"])
def test_a_full_disk(engines: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """No file may grow beyond 100 bytes: one line that names it, exit code 1, nothing left."""
    code = "from enat.runtime.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "--engine", str(engines("tiny")), "--class", "1", "--seed", "1", "--out", str(tmp_path / name)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == f"Error: {tmp_path / name}: File too large"
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
