"""Model repositories for Triton Inference Server, and what deploys them."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import http.server
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import tomllib
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from conftest import invoke, refused
from test_tensorrt_builds import listed, make_build

from enat.runtime.manifest import read_manifest
from enat.runtime.pipeline import BUNDLED_ENGINE
from enat.serving.cli import main
from enat.serving.config import Word, pbtxt
from enat.serving.graphs import files


def write(out: Path, *arguments: object) -> Any:
    return invoke(main, "--out", out, *arguments)


def test_a_repository_has_all_that_a_server_needs(tmp_path: Path) -> None:
    assert write(tmp_path / "models", "--graphs", "--gpus", "0,1", "--priorities", 3, "--queue-size", 64, "--threads", 4).exit_code == 0
    folder = tmp_path / "models" / "enat" / "1"
    assert {path.name for path in folder.iterdir()} == {"model.py", "engine", "runtime"}
    for path in BUNDLED_ENGINE.iterdir():
        assert (folder / "engine" / path.name).read_bytes() == path.read_bytes()
    assert not list((tmp_path / "models").rglob("__pycache__"))
    config = (tmp_path / "models" / "enat" / "config.pbtxt").read_text()
    for part in ("kind: KIND_GPU", "gpus: [0, 1]", "priority_levels: 3", "default_priority_level: 2", "max_queue_size: 64"):
        assert part in config
    encoding = (tmp_path / "models" / "enat_png" / "config.pbtxt").read_text()  # where requests wait first
    for part in ("max_queue_size: 64", "priority_levels: 3", "count: 2"):  # one for each GPU
        assert part in encoding
    sampler = (tmp_path / "models" / "enat_sampler" / "config.pbtxt").read_text()
    assert 'platform: "onnxruntime_onnx"' in sampler
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_what_no_server_could_start_is_refused(tmp_path: Path) -> None:
    for arguments, message in (
        (("--gpus", "0,0"), "expected each GPU once, got 0,0"),
        (("--gpus", ""), "--gpus: expected a number, or numbers with commas between, got ''"),
        (("--gpus", 2**40), "expected GPUs of 0 to 2147483647, got 1099511627776"),
        (("--max-batch", 3000000000), "expected max batch of 1 to 2147483647, got 3000000000"),
        (("--queue-delay", 10**30), "expected queue delay of 0 to 9223372036854775807, got 1000"),
        (("--name", "bücher"), "expected a model name of ASCII letters, digits, _, - and ., got 'bücher'"),
        (("--name", "."), "expected a model name of ASCII letters, digits, _, - and ., got '.'"),
        (("--name", "a" * 201), "expected a model name of at most 200 characters, got 201"),
        (("--env", "/tmp/\udcff"), "expected an environment whose path is text, got '/tmp/\\udcff'"),
        (("--gpus", "-1"), "expected GPUs of 0 or more, got -1"),
        (("--backend", "tensorrt"), "the backend tensorrt needs --gpus"),
        (("--backend", "openvino", "--gpus", 0), "the backend openvino does not run on GPUs"),
        (("--backend", "tensorrt", "--gpus", 0), "has no TensorRT build; expected one for 8 pictures at once"),
    ):
        refused(write(tmp_path / "models", *arguments), message)
    assert not (tmp_path / "models").exists()


def test_an_engine_s_builds_bring_nothing_from_elsewhere(tmp_path: Path, engine_copy: Path) -> None:
    """Files that builds list are checked like all others; those of other programs' builds are not taken along."""
    manifest = json.loads((engine_copy / "manifest.json").read_text())
    (tmp_path / "model.py").write_text("raise SystemExit")
    (engine_copy / "extra").write_text("")
    for builds, message in (
        ([{"backend": "tensorrt", "platform": {}}], "is damaged"),
        ([1], "is damaged"),
        ([{"backend": "other", "files": {"../model.py": {}, "../../config.pbtxt": {}}}], None),
    ):
        (engine_copy / "manifest.json").write_text(json.dumps({**manifest, "builds": builds}))
        result = write(tmp_path / "models", "--engine", engine_copy)
        if message:
            refused(result, message)
            assert not (tmp_path / "models" / "enat").exists()
    assert result.exit_code == 0
    version = tmp_path / "models" / "enat" / "1"
    assert "enat.serving.triton_model" in (version / "model.py").read_text()
    assert {path.name for path in (version / "engine").iterdir()} == {path.name for path in engine_copy.iterdir()} - {"extra"}


def test_a_build_that_leads_out_of_its_engine(tmp_path: Path, engine_copy: Path) -> None:
    from enat.runtime.builds import Build, Platform

    (tmp_path / "model.py").write_text("")
    entry = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    build = Build(Platform("10.16.1.11", "NVIDIA H200", "9.0"), {}, {}, {"../model.py": entry})
    manifest = json.loads((engine_copy / "manifest.json").read_text())
    (engine_copy / "manifest.json").write_text(json.dumps({**manifest, "builds": [build.as_json()]}))
    refused(write(tmp_path / "models", "--engine", engine_copy), "expected a path inside the engine directory")
    assert not list((tmp_path / "models").iterdir())


def test_force_replaces_models_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "enat").mkdir()
    (tmp_path / "enat" / "thesis.txt").write_text("years of work")
    refused(write(tmp_path, "--force"), "enat: exists and is not a model")
    assert (tmp_path / "enat" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("model", ["enat", "enat_png"])
@pytest.mark.parametrize("at_once", [True, False])
def test_all_models_are_replaced_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, at_once: bool) -> None:
    """Interrupted while one of them is put in place: the old ones are there, whether or not the system exchanges folders at once."""
    models = tmp_path / "models"
    assert write(models).exit_code == 0
    for name in ("enat", "enat_png"):
        (models / name / "mark").write_text("old")
    rename = Path.rename
    if not at_once:
        monkeypatch.setattr("enat.runtime.files.exchange", lambda one, other: False)

    def interrupted(self: Path, target: Path) -> Path:
        if target.name == f"{model}.old" if at_once else target == models / model and ".old" not in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    assert write(models, "--force").exit_code == 130
    assert [(models / name / "mark").read_text() for name in ("enat", "enat_png")] == ["old"] * 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_models_of_an_earlier_engine_do_not_stay_beside_it(tmp_path: Path) -> None:
    assert write(tmp_path, "--graphs").exit_code == 0
    refused(write(tmp_path, "--force"), "enat_condition: would stay, and serve an earlier engine beside this one")
    assert write(tmp_path, "--force", "--graphs").exit_code == 0


def test_an_old_model_that_cannot_be_put_back_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = tmp_path / "models"
    assert write(models).exit_code == 0
    (models / "enat" / "mark").write_text("old")
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if target == models / "enat":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr("enat.runtime.files.exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fails)
    assert write(models, "--force").exit_code == 1
    assert [path.read_text() for path in tmp_path.rglob("mark")] == ["old"]


@pytest.mark.parametrize("mounted", [True, False])
def test_nothing_is_written_beside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounted: bool) -> None:
    """That is a mount point, or whose own folder may not be written."""
    access = os.access
    if mounted:
        monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "models")
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    (tmp_path / "models").mkdir()
    rename = Path.rename

    def within(self: Path, target: Path) -> Path:
        inside = [(tmp_path / "models") in path.parents for path in (self, target)]
        assert inside[0] == inside[1], "another file system"
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", within)
    assert write(tmp_path / "models").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["enat", "enat_png"]


def test_a_repository_that_is_bound_to_a_place(tmp_path: Path) -> None:
    """As into a container: on the same file system, and nothing can be moved there from elsewhere."""
    (tmp_path / "source").mkdir()
    (tmp_path / "here and there").mkdir()
    code = "import sys; from enat.serving.cli import main; main(sys.argv[1:])"
    script = 'mount --bind source "$2" && exec "$0" -c "$1" --out "$2"'
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        subprocess.run([*namespace, "mount", "--bind", "source", "here and there"], cwd=tmp_path, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no mounts of its own")
    command = [*namespace, "bash", "-c", script, sys.executable, code, "here and there"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "source").iterdir()) == ["enat", "enat_png"]


def test_a_disk_that_gets_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copyfile

    def full(source: Path, target: Path) -> Any:
        if Path(target).name == "noise.py":
            raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", full)
    result = write(tmp_path / "models")
    assert result.exit_code == 1 and result.stderr.endswith("runtime/noise.py: the disk is full\n") and result.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.py"))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_graphs_of_their_own_have_their_ports(tmp_path: Path, request: pytest.FixtureRequest, precision: str) -> None:
    """Names, types and dimensions of the configs are those of the graphs: a server refuses others. Scalars are single numbers to it."""
    import onnx

    engine: Path = BUNDLED_ENGINE if precision == "fp32" else request.getfixturevalue(precision)
    write(tmp_path, "--engine", engine, "--graphs")
    kinds = {"TYPE_INT64": "INT64", "TYPE_FP32": "FLOAT", "TYPE_FP16": "FLOAT16", "TYPE_UINT8": "UINT8"}
    for path in engine.glob("*.onnx"):
        config = (tmp_path / f"enat_{path.stem}" / "config.pbtxt").read_text()
        graph = onnx.load(tmp_path / f"enat_{path.stem}" / "1" / "model.onnx").graph
        rows = re.findall(r'name: "(\w+)"\n  data_type: (\w+)\n  dims: \[([-\d, ]+)\]\n}', config)
        found = [(name, kinds[kind], [int(dim) for dim in dims.split(",")]) for name, kind, dims in rows]
        tensors = [(port.name, port.type.tensor_type) for port in (*graph.input, *graph.output)]
        assert found == [
            (name, onnx.TensorProto.DataType.Name(tensor.elem_type), [dim.dim_value or -1 for dim in tensor.shape.dim] or [1])
            for name, tensor in tensors
        ], path.stem


def test_external_data_keeps_its_name(engine_copy: Path) -> None:
    """Which its graph knows it by."""
    manifest = read_manifest(engine_copy)
    entry = {"size": 0, "sha256": "0" * 64}
    changed = dataclasses.replace(manifest, files={**manifest.files, "encoder.onnx.data": entry})
    assert files(changed, "encoder", None) == {"model.onnx": "encoder.onnx", "encoder.onnx.data": "encoder.onnx.data"}


def test_files_that_are_links(tmp_path: Path, engine_copy: Path) -> None:
    """What they lead to inside an engine is copied."""
    (engine_copy / "decoder.onnx").rename(engine_copy / "other.onnx")
    (engine_copy / "decoder.onnx").symlink_to("other.onnx")
    assert write(tmp_path / "models", "--engine", engine_copy).exit_code == 0
    copied = tmp_path / "models" / "enat" / "1" / "engine" / "decoder.onnx"
    assert not copied.is_symlink() and copied.read_bytes() == (engine_copy / "other.onnx").read_bytes()


def test_a_build_for_fewer_pictures_is_not_enough(trt: Any, tmp_path: Path, engine_copy: Path) -> None:
    listed(engine_copy, make_build(read_manifest(engine_copy), max_batch=4))
    asked = ("--engine", engine_copy, "--backend", "tensorrt", "--gpus", 0, "--max-batch")
    refused(write(tmp_path / "models", *asked, 5), "has builds for at most 4; expected one for 5 pictures at once")
    assert write(tmp_path / "models", *asked, 4).exit_code == 0


def test_options_are_in_the_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the model that draws and of the one that encodes, where both have them."""
    (tmp_path / "env").mkdir()
    monkeypatch.chdir(tmp_path)
    queue = ("--queue-delay", 77, "--queue-timeout", 99, "--queue-size", 5)
    asked = ("--env", "env", "--threads", 3, "--backend", "onnxruntime", "--max-batch", 6, "--no-warmup", *queue)
    assert write(tmp_path / "models", *asked).exit_code == 0
    assert write(tmp_path / "warm", "--max-batch", 6).exit_code == 0
    drawing, encoding, warm = ((tmp_path / path / "config.pbtxt").read_text() for path in ("models/enat", "models/enat_png", "warm/enat"))

    def parameter(text: str, key: str) -> list[str]:
        return re.findall(rf'key: "{key}"\n\s*value {{\n\s*string_value: "(.*)"', text)

    assert parameter(drawing, "threads") == ["3"] and parameter(drawing, "backend") == ["onnxruntime"]
    for text in (drawing, encoding):
        assert parameter(text, "EXECUTION_ENV_PATH") == [str(tmp_path / "env")]
        for part in ("queue_delay_microseconds: 77", "timeout_microseconds: 99", "timeout_override: true", "max_batch_size: 6"):
            assert part in text
    assert "model_warmup" not in drawing
    assert re.findall(r"\n  batch_size: (\d+)\n", warm) == ["1", "6"]


def test_what_is_refused(tmp_path: Path, engine_copy: Path) -> None:
    write(tmp_path / "models")
    refused(write(tmp_path / "models"), "exists; --force replaces it")
    assert write(tmp_path / "models", "--force").exit_code == 0
    assert write(tmp_path / "models", "--name", "other").exit_code == 0  # beside it
    refused(write(tmp_path / "x", "--max-batch", 0), "expected max batch of 1 or more, got 0")
    refused(
        write(tmp_path / "x", "--max-batch", 17, "--gpus", 0, "--backend", "onnxruntime-tensorrt"), "draws at most 16 pictures at once, got"
    )
    refused(write(tmp_path / "x", "--gpus", "0,a"), "--gpus: expected a number, or numbers with commas between, got '0,a'")
    refused(write(tmp_path / "x", "--name", "a/b"), "expected a model name of ASCII letters, digits, _, - and ., got 'a/b'")
    refused(write(tmp_path / "x", "--engine", tmp_path / "nowhere"), "not an engine directory")
    (tmp_path / "file").write_text("")
    refused(write(tmp_path / "file"), "exists and is not a directory")
    refused(write(tmp_path / "file" / "models"), "enat: cannot be written")
    refused(write(engine_copy), "has a manifest.json, as engines do; expected a model repository, or a new folder")
    manifest = json.loads((engine_copy / "manifest.json").read_text())
    (engine_copy / "manifest.json").write_text(json.dumps({**manifest, "precision": "int8", "calibration": {"weight_bits": 8}}))
    asked = ("--engine", engine_copy, "--gpus", 0, "--backend", "onnxruntime-tensorrt")
    refused(write(tmp_path / "x", *asked), "onnxruntime-tensorrt runs no int8 engines")
    del manifest["files"]["image_decoder.onnx"]
    (engine_copy / "manifest.json").write_text(json.dumps(manifest))
    refused(write(tmp_path / "x", "--engine", engine_copy), "has no image decoder and gives tokens only")
    assert not (tmp_path / "x").exists()


def test_config_text() -> None:
    fields = {"name": 'a "b"', "n": 3, "on": True, "kind": Word("KIND_CPU"), "none": None, "dims": [1, 2], "in": [{"x": 1}, {"x": {}}]}
    assert pbtxt(fields) == ('name: "a \\"b\\""\nn: 3\non: true\nkind: KIND_CPU\ndims: [1, 2]\nin {\n  x: 1\n}\nin {\n  x {\n  }\n}\n')


def test_deployments() -> None:
    """What the manifests name is there, and is what the server calls it."""
    import yaml

    folder = Path(__file__).parent.parent / "serving" / "deploy"
    deployment, service = yaml.safe_load_all((folder / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"] == service["spec"]["selector"]
    *_, probe = container["livenessProbe"]["exec"]["command"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/v2/models/enat/ready"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert all(ports[port["targetPort"]] == port["port"] for port in service["spec"]["ports"])
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    (compose,) = yaml.safe_load((folder / "compose.yaml").read_text())["services"].values()
    build = compose["build"]
    assert (folder / build["context"] / build["dockerfile"]).resolve() == folder / "Dockerfile"
    dockerfile = (folder / "Dockerfile").read_text()
    assert all(f" {port}" in dockerfile for port in ports.values())
    assert probe == "/usr/local/bin/healthy.py" and probe in dockerfile
    assert f"COPY serving/deploy/{Path(probe).name} {Path(probe).parent}/\n" in dockerfile and (folder / Path(probe).name).exists()


@pytest.mark.parametrize(
    ("answer", "well"), [(400, True), (503, True), (404, False), (405, False), (500, False), (None, True), ("none", False)]
)
def test_what_the_probe_makes_of_answers(monkeypatch: pytest.MonkeyPatch, answer: int | str | None, well: bool) -> None:
    """A full queue is no failure, nor is an answer that takes too long; where the server, the model or its process is gone, it is one."""
    over = threading.Event()
    asked: list[str] = []

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            if answer is None:
                over.wait(60)
            else:
                self.send_response(int(answer))
                self.end_headers()
                said = {400: "expected a class of 0 to 35, got -1", 404: "unknown model", 405: "", 500: "stub is not healthy", 503: "full"}
                self.wfile.write(json.dumps({"error": said[int(answer)]}).encode())

        def log_message(self, format: str, *arguments: object) -> None: ...

    ask = urllib.request.OpenerDirector.open

    def impatient(self: Any, url: str, data: bytes, patience: float) -> Any:
        return ask(self, url, data, 0.1 if answer is None else patience)

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", impatient)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        if answer == "none":
            server.socket.close()
        else:
            thread.start()
        monkeypatch.setattr("sys.argv", ["healthy.py", f"127.0.0.1:{server.server_port}"])
        monkeypatch.setenv("ENAT_MODEL", "other")
        try:
            runpy.run_path(str(Path(__file__).parent.parent / "serving" / "deploy" / "healthy.py"))
            said = None
        except SystemExit as error:
            said = error.code
        finally:
            over.set()
            if thread.is_alive():
                server.shutdown()
    assert (said is None) == well, said
    assert answer is None or asked == ["/v2/models/other/infer"] * (answer != "none")


def test_the_image_holds_the_package_and_nothing_else() -> None:
    """Of what lies in the folder: neither checkpoints nor engines."""
    root = Path(__file__).parent.parent
    everything, *allowed, caches = [line for line in (root / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert (everything, caches) == ("*", "**/__pycache__")
    packages = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = {name.split(".")[1] for name in packages if "." in name}
    assert set(allowed) == {
        f"!{name}" for name in (*rooms, "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "py.typed", "*.py")
    }
