"""enat-bench: real runs of small engines, and the figures that it makes of them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import invoke, read_golden, refused
from PIL import Image

from enat import Pipeline
from enat.benchmarks import slots
from enat.benchmarks.checkpoints import write_checkpoints
from enat.benchmarks.cli import load_compared, main, matrix_shares
from enat.benchmarks.footprint import Footprint, footprint
from enat.benchmarks.footprint import main as in_the_process
from enat.benchmarks.machine import CPU_TIMES, CpuTimes
from enat.benchmarks.measure import Case, Engine, Launch, Measurement, WatchedBackend, break_down, measure
from enat.benchmarks.reference import Branch, generate_tokens, run_network
from enat.benchmarks.report import growth
from enat.benchmarks.torch_contenders import CompiledBackend, Reference, TorchModels, torch_contender
from enat.errors import BackendError
from enat.export.directory import write_manifest
from enat.models.checkpoint import load_network, load_tokenizer
from enat.models.config import NetworkConfig
from enat.models.network import Network
from enat.models.tokenizer import TokenizerConfig
from enat.runtime.manifest import read_manifest
from enat.runtime.schedule import schedule

Engines = Callable[[str], Path]


def bench(*arguments: object) -> Result:
    return invoke(main, *arguments)


def figures(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def with_torch(name: str = "tiny") -> list[object]:
    case = read_golden(name)
    return ["--ckpt", case.ckpt, "--vqgan", case.vqgan]


def test_figures_of_engines_and_of_the_reference(engines: Engines) -> None:
    engine = engines("tiny")
    asked = ["--engine", engine, "--backend", "onnxruntime", "--backend", "openvino", "--batch", "1,3", "--steps", "2,4", "--repeats", 3]
    found = figures(bench(*asked, "--compare", "reference", "--compare", "reference-bfloat16", *with_torch(), "--json"))
    names = [f"reference, {precision}" for precision in ("float32", "bfloat16")]
    names += [f"{engine} (fp32), {backend}" for backend in ("onnxruntime", "openvino")]
    head = {"format", "enat", "machine", "device", "threads", "versions", "warmup", "matrix_rate", "others", "engines"}
    assert found.keys() == head | {"measurements", "footprints"} and found["format"] == 1 and found["threads"] >= 1
    assert [one["name"] for one in found["engines"]] == names[2:]
    assert found["engines"][0] == {
        "name": names[2],
        "engine": str(engine),
        "hash": read_manifest(engine).hash,
        "precision": "fp32",
        "backend": "onnxruntime",
    }
    assert found["measurements"][0].keys() == {
        *("name", "batch", "steps", "pictures", "seconds", "median", "pictures_per_second", "graphs", "by_step", "times_faster"),
        "matrix_share",
    }
    assert found["footprints"][0].keys() == {
        *("name", "batch", "steps", "pictures", "load", "first", "peak_memory", "memory", "device_memory")
    }
    measurements = found["measurements"]
    assert [(one["name"], one["batch"], one["steps"]) for one in measurements] == [
        (name, batch, steps) for steps in (2, 4) for batch in (1, 3) for name in names
    ]
    for i, one in enumerate(measurements):
        assert len(one["seconds"]) == 3 and one["median"] == statistics.median(one["seconds"])
        assert one["pictures_per_second"] == pytest.approx(one["batch"] / one["median"])
        assert list(one["times_faster"]) == names[:2]
        base = measurements[i - i % 4]
        ratios = [theirs / mine for theirs, mine in zip(base["seconds"], one["seconds"], strict=True)]
        assert one["times_faster"]["reference, float32"] == pytest.approx(statistics.median(ratios))
        if one["name"].startswith("reference"):
            assert not one["graphs"] and not one["by_step"]
        else:
            assert set(one["graphs"]) == {"condition", "encoder", "decoder", "sampler", "image_decoder"}
            assert len(one["by_step"]) == one["steps"]
            inside = sum(one["graphs"][graph] for graph in ("encoder", "decoder", "sampler"))
            assert sum(one["by_step"]) == pytest.approx(inside)
    assert {(one["name"], one["batch"], one["steps"]) for one in found["footprints"]} == {
        (name, n, 2) for name in names[2:] for n in (1, 3)
    }
    for one in found["footprints"]:
        assert 0 < one["load"] < one["first"]
        assert 20e6 < one["memory"] <= one["peak_memory"] < 2e9  # a process with NumPy and a backend; torch is not in it
    assert found["versions"].keys() >= {"onnxruntime", "openvino", "torch"} and "core" in found["machine"]


@pytest.mark.skipif(not CPU_TIMES.exists(), reason="the system does not tell")
def test_what_others_had_of_the_cpus() -> None:
    """Another process at work."""
    before = CpuTimes.now()
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(1.5)
        after = CpuTimes.now()
    finally:
        other.kill()
        other.wait()
    assert before and after
    share = before.share_until(after)
    assert share is not None and 0.3 / (os.cpu_count() or 1) < share <= 1


def test_times_of_all_cpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is idle or waits is nobody's, what a host gave to other machines is others'."""
    monkeypatch.setattr("enat.benchmarks.machine.CPU_TIMES", tmp_path / "stat")
    monkeypatch.setattr("os.times", lambda: (0.0, 0.0, 0.0, 0.0, 0.0))
    tick = os.sysconf("SC_CLK_TCK")

    def now(*times: int) -> CpuTimes | None:
        (tmp_path / "stat").write_text(f"cpu  {' '.join(str(seconds * tick) for seconds in times)} 9 9\ncpu0 1 1 1 1\n")
        return CpuTimes.now()

    before, after = now(1, 1, 1, 1, 1, 1, 1, 1), now(2, 3, 4, 21, 31, 2, 3, 5)
    assert before and after and (before.others, before.passed) == (6, 8)
    assert before.share_until(after) == pytest.approx(13 / 63)
    assert before.share_until(before) is None
    for wrong in ("", "cpu a b c d e f g h\n", "cpu 1 2 3\n", "intr 1 2 3 4 5 6 7 8\n"):
        (tmp_path / "stat").write_text(wrong)
        assert CpuTimes.now() is None
    (tmp_path / "stat").unlink()
    assert CpuTimes.now() is None


def test_shares_of_the_matrix_rate(engines: Engines) -> None:
    """Products with constant weights, counted by the network's own dimensions."""
    with Pipeline.load(engines("tiny")) as pipeline:
        model, engine = pipeline.manifest.model, Engine("one", pipeline)
        square, products = model.dim**2, 0
        for step in pipeline.schedule(4):
            rows = 2 if step.index else 1
            products += rows * model.encoder_depth * square * (12 * step.new + 2 * step.seen)  # q, own k and v, proj, mlp; context k and v
            products += rows * 8 * square * step.seen  # what carries features on
            products += rows * model.decoder_depth * square * (12 * step.masked + 2 * step.visible)
            products += rows * step.masked * (square + model.dim * model.codes)
        measured = Measurement("one", Case(batch=3, steps=4, pictures=False), [2.0, 2.0])
        assert matrix_shares([engine], [measured], rate=1e9) == {"one": pytest.approx(1.5 * products / 1e9)}


def test_the_reference_does_all_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both branches at every step, the first too, on the tokens that are there; guidance leads from the one to the other."""
    network = load_network(read_golden("tiny").ckpt, 3, 3)
    calls: list[tuple[list[int], int]] = []

    def counted(network: Network, ids: torch.Tensor, labels: torch.Tensor, previous: Branch | None) -> tuple[torch.Tensor, Branch]:
        calls.append((labels.tolist(), int((ids == network.config.mask_token).sum())))
        logits = torch.zeros(*ids.shape, network.config.codes)
        logits[..., 7 if labels[0] == 1 else 9] = 50
        return logits, run_network(network, ids, labels, previous)[1]

    monkeypatch.setattr("enat.benchmarks.reference.run_network", counted)
    steps = schedule(64, 3, 2.0, 0.0, 1.0)
    assert (generate_tokens(network, [1], steps) == 7).all()
    assert calls == [(labels, step.masked) for step in steps for labels in ([1], [network.config.null_class])]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_reference_decodes_in_its_own_precision(engines: Engines, dtype: torch.dtype | None) -> None:
    case = read_golden("tiny")
    with Pipeline.load(engines("tiny")) as pipeline:
        models = TorchModels(case.ckpt, case.vqgan, pipeline.manifest.model, "cpu")
        seen: set[torch.dtype] = set()
        for module in (models.network.decoder_blocks[0].mlp.fc1, models.tokenizer.decoder.conv_in):  # type: ignore[union-attr]
            module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))  # type: ignore[operator, union-attr]
        Reference("", models, pipeline.schedule, dtype).draw(Case(batch=1, steps=2, pictures=True))
    assert seen == {dtype or torch.float32}


def test_pytorch_gets_as_many_threads(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no tokenizer where pictures are not decoded."""
    case = read_golden("tiny")
    seen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    with Pipeline.load(engines("tiny"), "onnxruntime") as pipe:
        for tokens in (False, True):
            (reference,), _ = load_compared(["reference"], case.ckpt, case.vqgan, pipe, "cpu", 3, tokens)
            assert isinstance(reference, Reference) and (reference.models.tokenizer is None) == tokens
    assert seen == [3, 3]


def test_a_batch_is_of_different_classes() -> None:
    assert Case(5, 1, False).labels(3) == [0, 1, 2, 0, 1]


def test_contenders_and_cases_take_turns() -> None:
    drawn: list[tuple[str, Case]] = []

    class One:
        def __init__(self, name: str) -> None:
            self.name = name

        def draw(self, case: Case) -> None:
            drawn.append((self.name, case))

    cases, ticks = [Case(1, 8, False), Case(1, 16, False)], []
    found = measure([One("a"), One("b")], cases, warmup=2, repeats=3, advance=lambda: ticks.append(1))
    turn = [(name, case) for case in cases for name in "ab"]
    assert drawn == [pair for pair in turn for _ in range(2)] + turn * 3 and len(ticks) == len(drawn)
    assert [[(one.name, one.case) for one in row] for row in found] == [turn[:2], turn[2:]]
    assert all(len(one.seconds) == 3 for row in found for one in row)


def test_what_more_steps_cost() -> None:
    def row(batch: int, steps: int, *seconds: list[float]) -> list[Measurement]:
        return [Measurement(name, Case(batch, steps, True), one) for name, one in zip("ab", seconds, strict=True)]

    found = [row(1, 8, [1, 2, 9], [2, 2, 2]), row(4, 8, [4, 4, 4], [8, 8, 8])]
    assert growth(found) == ""
    found += [row(1, 16, [2, 3, 9], [4, 4, 4]), row(4, 16, [7, 7, 7], [8, 8, 8])]
    head, _, *lines = (line.split("|")[1:-1] for line in growth(found).splitlines())
    assert [cell.strip() for cell in head] == ["times as long as with 8 steps", "1 picture, 16 steps", "4 pictures, 16 steps"]
    assert [[cell.strip() for cell in line] for line in lines] == [["a", "1.50", "1.75"], ["b", "2.00", "1.00"]]


def test_tables_and_chart(engines: Engines, tmp_path: Path) -> None:
    chart = tmp_path / "chart.png"
    asked = ["--engine", engines("odd"), "--batch", 2, "--steps", "3,4", "--repeats", 2, "--tokens", "--plot", chart]
    result = bench(*asked, "--compare", "reference", "--ckpt", read_golden("odd").ckpt)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert "2 pictures, 3 steps, tokens only" in result.stdout
    assert "× reference, float32" in lines[0] and lines[2].split("|")[5].strip() == "1.00"
    tables = [list(table) for shown, table in itertools.groupby(result.stdout.splitlines(), lambda line: line.startswith("|")) if shown]
    assert len(tables) == 6 and "times as long as with 3 steps" in tables[4][0]
    for table in tables:
        assert len({len(line) for line in table}) == len({line.count("|") for line in table}) == 1
    with Image.open(chart) as picture:
        assert picture.width > 800 and len(picture.getcolors(1 << 24) or []) > 50


def test_footprints_in_a_table(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every batch, with the threads that were asked for."""
    asked: list[tuple[object, ...]] = []

    def taken(engine: Path, backend: str, device: str, threads: int | None, case: Case) -> Footprint:
        asked.append((backend, threads, case))
        return Footprint(0.25, 0.5, 4 * 10**9, 10**9, None)

    monkeypatch.setattr("enat.benchmarks.cli.footprint", taken)
    options = ("--backend", "onnxruntime", "--threads", 1, "--batch", "1,2", "--steps", 1, "--repeats", 1, "--warmup", 0)
    result = bench("--engine", engines("tiny"), *options)
    assert result.exit_code == 0, result.output
    assert asked == [("onnxruntime", 1, Case(batch, 1, True)) for batch in (1, 2)]
    row = [cell.strip() for cell in result.stdout.splitlines()[-1].split("|")]
    assert row[2:6] == ["0.25 s", "0.50 s", "1.00 GB (4.00 GB)", "1.00 GB (4.00 GB)"]


def test_a_footprint_is_that_of_a_second_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one finds cold files and caches."""
    asked: list[object] = []

    def run(command: list[str], **options: object) -> SimpleNamespace:
        asked.append(json.loads(command[-1]))
        facts = {"load": len(asked), "first": 9, "peak_memory": 1, "memory": 1, "device_memory": None}
        return SimpleNamespace(returncode=0, stdout=f"{json.dumps(facts)}\n", stderr="")

    monkeypatch.setattr("enat.benchmarks.footprint.subprocess", SimpleNamespace(run=run))
    assert footprint(Path("e"), "openvino", "cpu", 3, Case(2, 4, True)).load == 2
    case = {"batch": 2, "steps": 4, "pictures": True}
    assert asked == [{"engine": "e", "backend": "openvino", "device": "cpu", "threads": 3, "case": case, "free": None}] * 2


def test_a_footprint_whose_process_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for want of memory: the signal is told, and not what it said before."""
    died = SimpleNamespace(returncode=-9, stdout="", stderr="Warning: slow\n  the line that warned\n")
    monkeypatch.setattr("enat.benchmarks.footprint.subprocess", SimpleNamespace(run=lambda *rest, **options: died))
    with pytest.raises(BackendError, match=r"^a process that loads e was ended by signal 9, for want of memory, maybe$"):
        footprint(Path("e"), "openvino", "cpu", 3, Case(2, 4, True))


def test_what_the_process_of_a_footprint_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws the batch three times; what it takes at best is no part of loading."""
    loaded: list[tuple[object, ...]] = []
    drawn: list[Case] = []

    def load(*arguments: object) -> contextlib.nullcontext[None]:
        loaded.append(arguments)
        return contextlib.nullcontext()

    clock = iter([0.0, 5.0, 10.0, 12.0, 20.0, 21.0])
    monkeypatch.setattr("enat.benchmarks.footprint.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(Pipeline, "load", load)
    monkeypatch.setattr(Engine, "draw", lambda self, case: drawn.append(case))
    case = {"batch": 2, "steps": 4, "pictures": True}
    monkeypatch.setattr("enat.benchmarks.footprint.free_device_memory", lambda device: 700)
    found = in_the_process({"engine": "e", "backend": "openvino", "device": "cpu", "threads": 3, "case": case, "free": 1000})
    assert found.device_memory == 300
    assert loaded == [("e", "openvino", "cpu", 3)] and drawn == [Case(2, 4, True)] * 3
    assert (found.load, found.first) == (4, 5)


def test_what_slots_bring_is_counted_in_pictures(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by one whenever it is read: twice a picture, and at the end."""
    load, clock = Pipeline.load, itertools.count()
    asked: list[dict[str, object]] = []

    def loaded(*arguments: Any, **options: Any) -> Pipeline:
        asked.append(options)
        return load(*arguments, **options)

    monkeypatch.setattr(Pipeline, "load", loaded)
    monkeypatch.setattr(slots, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    rate, wait, _ = slots.serve(engines("tiny"), "onnxruntime", "cpu", 2, 2, 6)
    assert asked == [{"slots": 2}] and rate == 6 / 13 and 1 <= wait < 13


def test_checkpoints_that_are_there_are_kept(tmp_path: Path) -> None:
    (tmp_path / "nnet_ema.pth").write_bytes(b"mine")
    sizes = NetworkConfig(2, 64, 1, 1, 1, 4, 3), TokenizerConfig((32,), 1, 1, 4, 8)
    written = write_checkpoints(tmp_path, *sizes)
    assert written[0].read_bytes() == b"mine" and load_tokenizer(written[1]).config == sizes[1]


def test_names_of_any_kind_and_steps_named_twice(engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be mathematics to Matplotlib; in a folder with modules of names that programs import."""
    engine = tmp_path / "a$x^$"
    engine.symlink_to(engines("odd"))
    (tmp_path / "numpy.py").write_text("raise SystemExit('the one of the working directory')")
    monkeypatch.chdir(tmp_path)
    asked = [
        "--engine",
        engine,
        "--batch",
        1,
        "--steps",
        "3,2,3",
        "--repeats",
        1,
        "--warmup",
        0,
        "--tokens",
        "--plot",
        "chart.svg",
        "--json",
    ]
    result = bench(*asked)
    assert result.exit_code == 0, result.output
    assert [one["steps"] for one in json.loads(result.stdout)["measurements"]] == [3, 2]
    assert Path("chart.svg").stat().st_size > 1000


def test_the_bundled_engine_needs_no_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "onnx", "onnx_ir"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "bundled engine (fp32)" in bench("--batch", 1, "--repeats", 1, "--warmup", 0, "--steps", 1).stdout


def test_watching_changes_nothing(engines: Engines) -> None:
    with Pipeline.load(engines("tiny")) as pipe:
        backend = WatchedBackend(pipe.backend)
        watched = Pipeline(pipe.manifest, backend)
        for _ in range(2):
            assert (watched.generate([1, 2], seed=5, steps=3) == pipe.generate([1, 2], seed=5, steps=3)).all()
        one = [("condition", None), ("decoder", 0), ("sampler", 0)]
        one += [(graph, step) for step in (1, 2) for graph in ("encoder", "decoder", "sampler")]
        assert [(launch.graph, launch.step) for launch in backend.launches] == [*one, ("image_decoder", None)] * 2


def test_breaking_down_takes_medians_launch_by_launch() -> None:
    def run(*seconds: float) -> list[Launch]:
        places = [("decoder", 0), ("sampler", 0), ("encoder", 1), ("decoder", 1), ("sampler", 1), ("image_decoder", None)]
        return [Launch(graph, step, one) for (graph, step), one in zip(places, seconds, strict=True)]

    graphs, steps = break_down([run(1, 2, 3, 4, 5, 6), run(9, 2, 3, 4, 5, 6), run(2, 2, 3, 8, 5, 0)])
    assert graphs == {"decoder": 2 + 4, "sampler": 2 + 5, "encoder": 3, "image_decoder": 6}
    assert steps == [2 + 2, 3 + 4 + 5]


def test_ratios_are_those_of_the_rounds() -> None:
    case = Case(1, 8, True)
    slow, fast = Measurement("slow", case, [4, 40, 6]), Measurement("fast", case, [2, 10, 1])  # the machine was busy in the second
    assert fast.times_faster(slow) == 4 and slow.times_faster(fast) == 1 / 4


@pytest.mark.parametrize("kind", ["reference", "reference-bfloat16"])
def test_the_reference_draws_pictures_and_tokens(engines: Engines, kind: str) -> None:
    """What it computes, test_golden.py holds against the published network; its noise is its own."""
    case = read_golden("tiny")
    with Pipeline.load(engines("tiny")) as pipe:
        models = TorchModels(case.ckpt, case.vqgan, pipe.manifest.model, "cpu")
        contender = torch_contender(kind, models, pipe)
        assert isinstance(contender, Reference)
        size = pipe.manifest.model.image_size
        pictures = contender.draw(Case(2, 3, True))
        assert pictures.shape == (2, size, size, 3) and pictures.dtype == torch.uint8
        tokens = contender.draw(Case(2, 3, False))
        assert tokens.shape == (2, pipe.manifest.model.length) and tokens.min() >= 0 and tokens.max() < pipe.manifest.model.codes


@pytest.mark.slow
def test_the_compiled_network_draws_the_same_tokens(engines: Engines) -> None:
    case = read_golden("tiny")
    with Pipeline.load(engines("tiny")) as pipe:
        contender = torch_contender("compile", TorchModels(case.ckpt, case.vqgan, pipe.manifest.model, "cpu"), pipe)
        assert isinstance(contender, Engine) and isinstance(contender.pipeline.backend, CompiledBackend)
        found = contender.pipeline.generate_tokens(range(4), seed=1)
        assert (found == pipe.generate_tokens(range(4), seed=1)).mean() > 0.99
        pictures = contender.pipeline.decode(found).astype(int)
        assert np.abs(pictures - pipe.decode(found)).max() <= 1


@pytest.mark.slow
def test_the_compiled_network_in_bfloat16(engines: Engines) -> None:
    """Not even NumPy has numbers of that type."""
    case = read_golden("tiny")
    with Pipeline.load(engines("tiny")) as pipe:
        contender = torch_contender("compile-bfloat16", TorchModels(case.ckpt, case.vqgan, pipe.manifest.model, "cpu"), pipe)
        assert isinstance(contender, Engine)
        graphs = [launch.graph for launch in contender.watch(Case(1, 2, True))]
        assert graphs == ["condition", "decoder", "sampler", "encoder", "decoder", "sampler", "image_decoder"]


def test_wrong_input(engines: Engines, engine_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ["--engine", engines("tiny")]
    refused(bench("--engine", tmp_path / "none"), "not an engine directory")
    refused(bench(*engine, "--batch", "1,x"), "--batch: expected a number, or numbers with commas between, got '1,x'")
    refused(bench(*engine, "--batch", "4,0"), "--batch: expected 1 to 65536 pictures, got 0")
    refused(bench(*engine, "--batch", 10**12), "--batch: expected 1 to 65536 pictures, got 1000000000000")
    refused(bench(*engine, "--steps", "500"), "500")
    refused(bench(*engine, "--repeats", 0), "expected 0 or more warm-ups and 1 or more repeats, got 1 and 0")
    refused(bench(*engine, "--plot", tmp_path / "chart.txt"), "expected a file that ends in .png")
    (tmp_path / "file").touch()
    refused(bench(*engine, "--plot", tmp_path / "file" / "chart.png"), "file is not a folder")
    refused(bench(*engine, "--compare", "reference"), "expected --ckpt too")
    refused(bench(*engine, "--ckpt", read_golden("tiny").ckpt), "expected --compare too")
    refused(bench(*engine, "--vqgan", read_golden("tiny").vqgan), "expected --compare too")
    refused(bench(*engine, "--compare", "reference", "--ckpt", read_golden("tiny").ckpt), "expected --vqgan, or --tokens")
    refused(bench(*engine, "--compare", "reference", *with_torch("odd")), "nnet_ema.pth: its keys are not those of the model")
    others = ["--engine", engines("odd"), "--compare", "reference", "--steps", 2]
    refused(bench(*engine, *others, *with_torch()), "the engines are of different sizes, so one reference does not serve them")
    tokens_alone = Path(shutil.copytree(engines("tiny"), tmp_path / "tokens alone"))
    manifest = json.loads(without_images(tokens_alone))
    manifest["model"]["image_size"] = None
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if not name.startswith("image")}
    (tokens_alone / "manifest.json").write_text(json.dumps(manifest))
    both = [*engine, "--engine", tokens_alone, "--tokens", "--compare", "reference", "--ckpt", read_golden("odd").ckpt]
    refused(bench(*both), "nnet_ema.pth: its keys are not those of the model")  # the sizes that count are the same
    refused(invoke(slots.main, "--clients", 0), "--clients: expected 1 or more, got 0")
    refused(bench(*engine, "--backend", "tensorrt"), "the backend tensorrt runs on cuda, got the device 'cpu'")
    content = json.loads((engine_copy / "manifest.json").read_text())
    content["sampling"]["cfg_scale"] = 9.0
    write_manifest(engine_copy, content)
    differ = ("--engine", engine_copy, "--compare", "reference", *with_torch())
    refused(bench(*engine, *differ), "the engines sample differently by default, so one reference does not serve them")
    (engine_copy / "manifest.json").write_text(without_images(engine_copy))
    (engine_copy / "image_decoder.onnx").unlink()
    refused(bench("--engine", engine_copy), "has no image decoder; --tokens measures it without")
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused(bench(*engine, "--compare", "compile", *with_torch()), "no-such-compiler is not there", code=1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(bench(*engine, "--plot", tmp_path / "chart.png"), 'pip install "enat[plot]"', code=1)


def without_images(engine: Path) -> str:
    manifest = json.loads((engine / "manifest.json").read_text())
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if not name.startswith("image_decoder")}
    return json.dumps(manifest)


def test_a_process_that_fails_says_why(engines: Engines, engine_copy: Path) -> None:
    (engine_copy / "decoder.onnx").write_bytes(b"damaged")
    with pytest.raises(BackendError, match=r"a process that loads .* failed: .*decoder\.onnx"):
        footprint(engine_copy, "onnxruntime", "cpu", None, Case(1, 2, True))
