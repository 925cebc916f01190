"""TensorRT builds as values: their keys, their place in the manifest, which of them is chosen."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx
import pytest
from conftest import invoke, modulation

from enat.errors import EngineError, ExportError
from enat.runtime.builds import Build, BuiltGraph, Platform, choose_build, graph_source, read_builds, unsuited
from enat.runtime.cli import main as run_main
from enat.runtime.manifest import FILE, Manifest, file_entries, read_manifest
from enat.runtime.profiles import graph_profiles
from enat.serving.graphs import graph_configs

HERE = Platform("10.16.1.11", "NVIDIA H200", "9.0")
GRAPHS = ("condition", "encoder", "decoder", "sampler", "image_decoder", "image_encoder")


def make_build(manifest: Manifest, platform: Platform = HERE, **options: Any) -> Build:
    profiles = graph_profiles(manifest, [8], [(1, 1, 4)], modulation(manifest))
    graphs = {name: BuiltGraph(graph_source(manifest, name), tuple(own)) for name, own in profiles.items()}
    return Build(platform, {"steps": [8], "max_batch": 4, "weights": "included", **options}, graphs, {})


def listed(engine: Path, *builds: Build, own: Mapping[str, Path] | None = None) -> Manifest:
    """The engine with builds in its manifest, and plans of nothing. own: what a build has beside them, by its path in the engine."""
    from enat.export.tensorrt_build import put_in_manifest

    for build in builds:
        folder = engine / "tensorrt" / ".partial" / "plans"
        folder.mkdir(parents=True)
        for graph in build.graphs:
            (folder / f"{graph}.plan").write_bytes(f"{build.id} {graph}".encode())
        for name, source in (own or {}).items():
            shutil.copy(source, folder / Path(name).name)
        put_in_manifest(read_manifest(engine), build, folder)
        shutil.rmtree(folder.parent)
    return read_manifest(engine, verify=True)


def test_builds_are_in_the_manifest(trt: Any, engine_copy: Path) -> None:
    before = read_manifest(engine_copy)
    one, other = make_build(before), make_build(before, hardware="same")
    after = listed(engine_copy, one, other, one)
    assert after.hash == before.hash  # the engine is what it was
    assert after.files == before.files
    assert [build.id for build in read_builds(after)] == [other.id, one.id]
    for build in read_builds(after):
        assert build.graphs == one.graphs
        assert set(build.files) == {f"tensorrt/{build.id}/{graph}.plan" for graph in GRAPHS}
    assert sorted(path.name for path in (engine_copy / "tensorrt").iterdir()) == sorted((one.id, other.id))


def test_two_builds_at_once_are_both_listed(trt: Any, engine_copy: Path) -> None:
    """Whose work began before the other was there. Nothing is listed where the engine is another one by then."""
    from enat.export.tensorrt_build import put_in_manifest

    before = read_manifest(engine_copy)
    builds = [make_build(before), make_build(before, max_batch=8)]
    folder = engine_copy / "tensorrt" / ".partial" / "plans"
    for build in builds:
        folder.mkdir(parents=True)
        put_in_manifest(before, build, folder)
    assert [build.id for build in read_builds(read_manifest(engine_copy))] == [build.id for build in builds]
    content = json.loads((engine_copy / "manifest.json").read_text())
    (engine_copy / "manifest.json").write_text(json.dumps({**content, "producer": "another"}))
    folder.mkdir(parents=True)
    with pytest.raises(ExportError, match="was replaced while its plans were built"):
        put_in_manifest(before, builds[0], folder)


def test_two_builds_that_end_at_the_same_time(trt: Any, engine_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that was there already, and is listed last since somebody asked for it again."""
    from enat.export import tensorrt_build

    first = make_build(read_manifest(engine_copy), max_batch=2)
    before = listed(engine_copy, first)
    builds = [make_build(before, max_batch=size) for size in (3, 4)]
    write = tensorrt_build.write_builds

    def slowly(*arguments: Any) -> None:
        time.sleep(0.3)
        write(*arguments)

    def put(build: Build) -> None:
        folder = engine_copy / "tensorrt" / f".{build.id}.partial" / "plans"
        folder.mkdir(parents=True)
        tensorrt_build.put_in_manifest(before, build, folder)

    monkeypatch.setattr(tensorrt_build, "write_builds", slowly)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(put, builds))
    tensorrt_build.put_last(before, read_builds(before)[0])
    found = [build.id for build in read_builds(read_manifest(engine_copy))]
    assert sorted(found[:2]) == sorted(build.id for build in builds) and found[2:] == [first.id]


def test_other_programs_builds_stay(trt: Any, engine_copy: Path) -> None:
    """In a manifest that begins with a byte order mark, too."""
    file = engine_copy / FILE
    content = {**json.loads(file.read_text()), "builds": [{"backend": "other"}]}
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    build = make_build(read_manifest(engine_copy))
    assert [one.id for one in read_builds(listed(engine_copy, build))] == [build.id]
    assert [entry["backend"] for entry in json.loads(file.read_bytes())["builds"]] == ["other", "tensorrt"]


def test_batches_that_a_build_is_tuned_for(trt: Any) -> None:
    """Each up to its best one, above the one before; the last up to the largest."""
    from enat.export.tensorrt_options import Options

    assert Options((8,), max_batch=16, best_batch=(1, 4, 8)).batches == [(1, 1, 1), (2, 4, 4), (5, 8, 16)]


def test_the_key_of_a_build(manifest: Manifest) -> None:
    """Whatever a plan depends on makes another build."""
    base = make_build(manifest)
    assert base.id == make_build(manifest).id
    source = dataclasses.replace(base.graphs["encoder"], source="0" * 64)
    shorter = dataclasses.replace(base.graphs["encoder"], profiles=base.graphs["encoder"].profiles[1:])
    others = [
        *(make_build(manifest, dataclasses.replace(HERE, **{name: "1.2.3"})) for name in ("tensorrt", "device", "capability")),
        make_build(manifest, max_batch=8),
        make_build(manifest, tf32=True),
        dataclasses.replace(base, graphs={**base.graphs, "encoder": source}),
        dataclasses.replace(base, graphs={**base.graphs, "encoder": shorter}),
    ]
    assert len({base.id, *(build.id for build in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    "built, options, reason",
    [
        (HERE, {}, None),
        (dataclasses.replace(HERE, tensorrt="10.13.3.9"), {}, "built with TensorRT 10.13.3.9, this is 10.16.1.11"),
        (dataclasses.replace(HERE, tensorrt="10.13.3.9"), {"version_compatible": True}, None),
        (dataclasses.replace(HERE, tensorrt="10.17.0.1"), {"version_compatible": True}, "built with TensorRT 10.17.0.1"),
        (dataclasses.replace(HERE, tensorrt="9.9.0.1"), {"version_compatible": True}, "built with TensorRT 9.9.0.1"),
        (dataclasses.replace(HERE, tensorrt="10.16.1rc1"), {"version_compatible": True}, None),
        (dataclasses.replace(HERE, tensorrt="newest"), {"version_compatible": True}, "built with TensorRT newest"),
        (dataclasses.replace(HERE, device="NVIDIA H100"), {}, "built for NVIDIA H100, this is NVIDIA H200"),
        (dataclasses.replace(HERE, device="NVIDIA H100"), {"hardware": "same"}, None),
        (dataclasses.replace(HERE, device="NVIDIA L4", capability="8.9"), {"hardware": "same"}, "compute capability 8.9, this is 9.0"),
        (dataclasses.replace(HERE, device="NVIDIA L4", capability="8.9"), {"hardware": "ampere+"}, None),
    ],
)
def test_where_a_build_runs(manifest: Manifest, built: Platform, options: dict[str, Any], reason: str | None) -> None:
    found = unsuited(make_build(manifest, built, **options), manifest, HERE)
    assert found is None if reason is None else reason in str(found)


def test_turing_is_older_than_ampere(manifest: Manifest) -> None:
    build = make_build(manifest, hardware="ampere+")
    for capability, reason in (("7.5", "built for compute capability 8.0 and later, this is 7.5"), ("8.0", None), ("8.9", None)):
        assert unsuited(build, manifest, dataclasses.replace(HERE, capability=capability)) == reason


def test_a_build_is_chosen_or_refused_with_the_reason(trt: Any, engine_copy: Path) -> None:
    manifest = read_manifest(engine_copy)
    with pytest.raises(EngineError, match=r"has no TensorRT build; build it: enat-export --engine .* --tensorrt"):
        choose_build(manifest, HERE)
    elsewhere = make_build(manifest, dataclasses.replace(HERE, device="NVIDIA L4", capability="8.9"))
    manifest = listed(engine_copy, elsewhere)
    with pytest.raises(EngineError, match=r"no TensorRT build suits NVIDIA H200 .*: built for NVIDIA L4, this is NVIDIA H200; build it"):
        choose_build(manifest, HERE)
    manifest = listed(engine_copy, make_build(manifest, max_batch=2), make_build(manifest, max_batch=3))
    chosen = choose_build(manifest, HERE)
    assert chosen.options["max_batch"] == 3
    (engine_copy / chosen.plan("encoder")).write_bytes(b"damaged")
    with pytest.raises(EngineError, match=r"encoder\.plan: 7 bytes, expected"):
        choose_build(manifest, HERE)


def test_plans_that_are_not_listed_are_not_loaded(trt: Any, engine_copy: Path) -> None:
    manifest = listed(engine_copy, make_build(read_manifest(engine_copy)))
    (entry,) = manifest.builds
    plan = entry["files"].pop(f"tensorrt/{entry['id']}/encoder.plan")
    with pytest.raises(EngineError, match=r"needs 'tensorrt/.*/encoder\.plan', which is not listed"):
        choose_build(manifest, HERE)
    entry["files"][f"tensorrt/{entry['id']}/encoder.plan"] = plan
    entry["graphs"]["encoder"]["weights"] = "../elsewhere.onnx"
    with pytest.raises(EngineError, match=r"needs '\.\./elsewhere\.onnx', which is not listed"):
        choose_build(manifest, HERE)


def test_triton_serves_plans_with_all_their_profiles(trt: Any, engine_copy: Path) -> None:
    """But for the sampler's: its TensorRT backend takes no scalars."""
    build = make_build(read_manifest(engine_copy))
    configs = graph_configs(listed(engine_copy, build), "enat", (1,))
    for graph, profiles in build.profiles.items():
        config, files = configs[f"enat_{graph}"]
        if graph == "sampler":
            assert files == {"model.onnx": "sampler.onnx"} and config["platform"] == "onnxruntime_onnx"
            continue
        assert files == {"model.plan": build.plan(graph)} and config["platform"] == "tensorrt_plan"
        (group,) = config["instance_group"]
        assert group["profile"] == [str(i) for i in range(len(profiles))] and group["gpus"] == [1]
    stripped = {name: dataclasses.replace(graph, weights=f"{name}.onnx") for name, graph in build.graphs.items()}
    manifest = listed(engine_copy, dataclasses.replace(build, options={"weights": "stripped"}, graphs=stripped))
    (config, files) = graph_configs(manifest, "enat", (0,))["enat_encoder"]
    assert files == {"model.plan": build.plan("encoder")}  # the one that has its weights
    manifest = dataclasses.replace(manifest, builds=manifest.builds[1:])
    (config, files) = graph_configs(manifest, "enat", (0,))["enat_encoder"]
    assert config["platform"] == "onnxruntime_onnx" and "model.onnx" in files


def test_triton_serves_the_last_build_of_these_graphs(trt: Any, engine_copy: Path) -> None:
    """Where there is one and a GPU to run it."""
    first, last = (make_build(read_manifest(engine_copy), max_batch=size) for size in (2, 3))
    manifest = listed(engine_copy, first, last)
    config, files = graph_configs(manifest, "enat", (0,))["enat_decoder"]
    assert files == {"model.plan": last.plan("decoder")}
    entry = {**manifest.files["encoder.onnx"], "sha256": "0" * 64}
    changed = dataclasses.replace(manifest, files={**manifest.files, "encoder.onnx": entry})
    for engine, gpus in ((manifest, ()), (changed, (0,))):
        config, files = graph_configs(engine, "enat", gpus)["enat_decoder"]
        assert config["platform"] == "onnxruntime_onnx" and files == {"model.onnx": "decoder.onnx"}


def test_a_build_of_other_graphs_is_not_used(trt: Any, engine_copy: Path) -> None:
    """The plans of an encoder that has changed since: refused, and removed when the engine is built anew."""
    manifest = listed(engine_copy, make_build(read_manifest(engine_copy)))
    entry = {**manifest.files["encoder.onnx"], "sha256": "0" * 64}
    changed = dataclasses.replace(manifest, files={**manifest.files, "encoder.onnx": entry})
    with pytest.raises(EngineError, match=r"encoder\.onnx has changed since it was built"):
        choose_build(changed, HERE)
    model = onnx.load(engine_copy / "encoder.onnx")
    model.doc_string = "another"
    onnx.save(model, engine_copy / "encoder.onnx")
    content = json.loads((engine_copy / FILE).read_text())
    content["files"] |= {name: entry for name, entry in file_entries(engine_copy).items() if name == "encoder.onnx"}
    (engine_copy / FILE).write_text(json.dumps(content))
    new = make_build(read_manifest(engine_copy))
    assert [build.id for build in read_builds(listed(engine_copy, new))] == [new.id]
    assert [path.name for path in (engine_copy / "tensorrt").iterdir()] == [new.id]


@pytest.mark.parametrize(
    "key, value",
    [("id", "0" * 16), ("platform", {}), ("platform", {**vars(HERE), "tensorrt": 10}), ("graphs", 3), ("files", None)],
)
def test_damaged_entries(trt: Any, engine_copy: Path, key: str, value: object) -> None:
    manifest = listed(engine_copy, make_build(read_manifest(engine_copy)))
    manifest.builds[0][key] = value
    with pytest.raises(EngineError, match=r"manifest\.json: builds\[0\]"):
        choose_build(manifest, HERE)


@pytest.mark.parametrize("entry", [3, None, [], "x"])
def test_entries_that_are_no_builds(manifest: Manifest, entry: object) -> None:
    with pytest.raises(EngineError, match=r"manifest\.json: builds\[0\] is damaged"):
        read_builds(dataclasses.replace(manifest, builds=[entry]))


def test_an_engine_tells_of_its_builds(trt: Any, engine_copy: Path) -> None:
    listed(engine_copy, make_build(read_manifest(engine_copy)))
    shown = invoke(run_main, "--engine", engine_copy, "--info").stdout.splitlines()[-1]
    assert shown == 'build     TensorRT 10.16.1.11, NVIDIA H200 (9.0), {"steps": [8], "max_batch": 4}'
    (build,) = json.loads(invoke(run_main, "--engine", engine_copy, "--info", "--json").stdout)["builds"]
    assert build["device"] == "NVIDIA H200" and build["options"]["weights"] == "included"
