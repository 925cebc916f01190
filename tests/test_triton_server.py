"""Engines on a real Triton server: the same pictures, under load and after bad requests."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import invoke
from PIL import Image
from test_triton_repository import write

from enat import Pipeline
from enat.benchmarks.triton_server import Server
from enat.runtime.backends.numpy_lane import NumpyLane
from enat.runtime.loop import sample
from enat.runtime.pictures import read_metadata
from enat.serving.batches import Picture, draw_all

ENVIRONMENT = "ENAT_TRITON_ENVIRONMENT"  # a virtual environment with nvidia-pytriton and what `enat[cpu]` needs; make test sets it
TYPES = {"class_id": np.int64, "class_name": np.object_, "seed": np.uint64, "steps": np.int32}


def environment() -> Path:
    """The environment of server and model. Skips the test where there is none."""
    name = os.environ.get(ENVIRONMENT)
    if not name or not (Path(name) / "bin" / "python").exists():
        pytest.skip(f"{ENVIRONMENT} names no environment with nvidia-pytriton; make test makes one with Python 3.11 or 3.12")
    return Path(name)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("triton") / "models"
    result = write(out, "--env", environment(), "--max-batch", 8)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Server]:
    running = Server(repository, repository.parent, environment())
    yield running
    running.stop()


@dataclass(frozen=True)
class Client:
    """HTTP or gRPC, by the same few calls."""

    module: Any
    address: str

    def __enter__(self) -> Any:
        return self.open()

    def __exit__(self, *error: object) -> None: ...

    def open(self) -> Any:
        return self.module.InferenceServerClient(self.address)

    def ask(self, client: Any, model: str = "enat", **values: Any) -> Any:
        inputs = []
        for name, value in values.items():
            array = np.array(value, TYPES.get(name, np.float32))
            array = array.reshape(-1, 1) if array.ndim < 2 else array
            tensor = self.module.InferInput(
                name,
                array.shape,
                {"int64": "INT64", "uint64": "UINT64", "int32": "INT32", "float32": "FP32", "object": "BYTES"}[str(array.dtype)],
            )
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        return client.infer(model, inputs)


@pytest.fixture(scope="module", params=["http", "grpc"])
def client(request: pytest.FixtureRequest, server: Server) -> Client:
    if request.param == "http":
        import tritonclient.http as module

        return Client(module, server.http)
    import tritonclient.grpc as module

    return Client(module, server.grpc)


@pytest.fixture
def grpc(server: Server) -> Client:
    import tritonclient.grpc as module

    return Client(module, server.grpc)


def test_a_picture_is_the_one_of_the_pipeline(client: Client, bundled: Pipeline) -> None:
    one = client.open()
    answer = client.ask(one, class_name="R", seed=7)
    assert (answer.as_numpy("image") == bundled.generate(["R"], seed=7)).all()
    assert answer.as_numpy("seed").tolist() == [[7]]
    answer = client.ask(one, class_id=[3, 35, 3], seed=[1, 2**64 - 1, 3], steps=[4] * 3, guidance=[2.0] * 3)
    assert (answer.as_numpy("image") == bundled.generate([3, 35, 3], seed=[1, 2**64 - 1, 3], steps=4, guidance=2.0)).all()


def test_a_seed_of_the_server_s_own_is_told(client: Client, bundled: Pipeline) -> None:
    one = client.open()
    answers = [client.ask(one, class_id=5) for _ in range(2)]
    seeds = [int(answer.as_numpy("seed")[0, 0]) for answer in answers]
    assert seeds[0] != seeds[1]
    for seed, answer in zip(seeds, answers, strict=True):
        assert (answer.as_numpy("image") == bundled.generate([5], seed=seed)).all()


def test_png(client: Client, bundled: Pipeline) -> None:
    answer = client.ask(client.open(), "enat_png", class_name=["A", "7"], seed=[1, 2])
    expected = bundled.generate(["A", "7"], seed=[1, 2])
    for (file,), picture in zip(answer.as_numpy("png"), expected, strict=True):
        with Image.open(io.BytesIO(file)) as image:
            assert image.format == "PNG" and (np.asarray(image) == picture).all()


def test_a_server_s_picture_says_how_it_was_made(client: Client, tmp_path: Path) -> None:
    """What enat-run says of the same picture, so that it can be made again from the file alone."""
    from enat.runtime.cli import main as run

    asked: dict[str, Any] = {"class_name": "R", "seed": 11, "steps": 5, "guidance": 2.7}
    ((file,),) = client.ask(client.open(), "enat_png", **asked).as_numpy("png")
    ((metadata,),) = client.ask(client.open(), **asked).as_numpy("metadata")
    served, ours = tmp_path / "served.png", tmp_path / "ours.png"
    served.write_bytes(file)
    arguments = ("--backend", "onnxruntime", "--class", "R", "--seed", 11, "--steps", 5, "--guidance", 2.7)
    assert invoke(run, *arguments, "--out", ours).exit_code == 0
    assert read_metadata(served) == read_metadata(ours) == json.loads(metadata)
    assert invoke(run, "--replay", served, "--out", tmp_path / "again.png").exit_code == 0
    assert (tmp_path / "again.png").read_bytes() == ours.read_bytes()


KINDS: tuple[dict[str, float], ...] = (
    {},
    {},
    {"steps": 4},
    {"guidance": 2.7, "steps": 6},
    {"mask_temperature": 1.1, "sampling_temperature": 0.3},
)


@dataclass(frozen=True)
class Request:
    label: int
    seed: int
    settings: dict[str, float]


def requests(count: int, seed: int, different: int = 10**6) -> list[Request]:
    """Requests of mixed settings; of at most so many different ones."""
    rng = random.Random(seed)
    kinds = [Request(rng.randrange(36), rng.randrange(2**63), rng.choice(KINDS)) for _ in range(min(count, different))]
    return [kinds[i] if i < len(kinds) else rng.choice(kinds) for i in range(count)]


def expected_pictures(bundled: Pipeline, wanted: Sequence[Request]) -> dict[int, np.ndarray]:
    """Each request's picture, by its identity; drawn in batches, which changes nothing."""
    unique = list({id(request): request for request in wanted}.values())
    drawn = draw_all(bundled, [Picture(request.label, request.seed, tuple(request.settings.items())) for request in unique], 8)
    return {id(request): image for request, image in zip(unique, drawn, strict=True) if isinstance(image, np.ndarray)}


def send(client: Client, wanted: Sequence[Request], workers: int) -> list[np.ndarray]:
    """All requests from so many clients at once, each with a connection of its own."""
    own = threading.local()

    def one(request: Request) -> np.ndarray:
        if not hasattr(own, "client"):
            own.client = client.open()
        answer = client.ask(own.client, class_id=request.label, seed=request.seed, **request.settings)
        return answer.as_numpy("image")[0]  # type: ignore[no-any-return]

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, wanted))


def test_thirty_two_clients(client: Client, bundled: Pipeline, server: Server) -> None:
    wanted = requests(96, seed=1)
    found = send(client, wanted, workers=32)
    expected = expected_pictures(bundled, wanted)
    for request, image in zip(wanted, found, strict=True):
        assert (image == expected[id(request)]).all(), request


def test_requests_with_the_same_inputs_are_drawn_together(server: Server, grpc: Client) -> None:
    name = 'nv_inference_exec_count{model="enat",version="1"}'
    before = server.metrics()[name]
    send(grpc, [Request(label % 36, label, {"steps": 4 + label % 3}) for label in range(128)], workers=32)
    assert server.metrics()[name] - before <= 40  # batches of 8, but for the first


BAD: list[tuple[dict[str, Any], str]] = [
    ({"class_name": "nothing", "seed": 0}, "unknown class 'nothing'"),
    ({"class_id": 36}, "expected a class of 0 to 35, got 36"),
    ({"class_name": "9" * 5000}, "expected a class of 0 to 35, got 999999999999999999…"),
    ({"class_id": -1}, "expected a class of 0 to 35, got -1"),
    ({"seed": 1}, "expected either class_id or class_name"),
    ({"class_id": 1, "class_name": "A"}, "expected either class_id or class_name"),
    ({"class_id": 1, "steps": 0}, "expected 1 to 64 steps, got 0"),
    ({"class_id": 1, "steps": 65}, "expected 1 to 64 steps, got 65"),
    ({"class_id": 1, "guidance": -1.0}, "expected a guidance of 0 to 1e6, got -1.0"),
    ({"class_id": 1, "guidance": float("nan")}, "expected a guidance of 0 to 1e6, got nan"),
    ({"class_id": [[1, 2]]}, "shape"),
    ({"class_id": [1] * 9}, "batch-size"),
    ({"class_id": 1, "colour": 3.0}, "colour"),
]


@pytest.mark.parametrize("values, message", BAD)
def test_bad_requests_are_answered(client: Client, bundled: Pipeline, values: dict[str, Any], message: str) -> None:
    from tritonclient.utils import InferenceServerException

    one = client.open()
    for model in ("enat", "enat_png"):
        with pytest.raises(InferenceServerException, match=re.escape(message)) as refused:
            client.ask(one, model, **values)
        assert refused.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
        assert "INVALID_ARG:" not in str(refused.value)  # which is how the one model tells the other
    assert (client.ask(one, class_id=1, seed=1).as_numpy("image") == bundled.generate([1], seed=1)).all()


def test_a_wrong_type_is_answered(client: Client) -> None:
    from tritonclient.utils import InferenceServerException

    tensor = client.module.InferInput("class_id", [1, 1], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 1), np.float32))
    with pytest.raises(InferenceServerException, match="class_id"):
        client.open().infer("enat", [tensor])


def test_one_bad_request_among_good_ones(client: Client, bundled: Pipeline) -> None:
    """Drawn together with others, it fails alone."""
    from tritonclient.utils import InferenceServerException

    wanted = requests(24, seed=2)
    expected = expected_pictures(bundled, wanted)
    with ThreadPoolExecutor(8) as pool:
        bad = [pool.submit(lambda: client.ask(client.open(), class_id=99)) for _ in range(8)]
        found = send(client, wanted, workers=16)
        for one in bad:
            with pytest.raises(InferenceServerException, match="expected a class of 0 to 35, got 99"):
                one.result()
    assert all((image == expected[id(request)]).all() for request, image in zip(wanted, found, strict=True))


def test_parameters_that_are_no_text(server: Server, client: Client, bundled: Pipeline) -> None:
    """They fail no request that is answered together with them."""
    body = b'{"inputs": [{"name": "class_id", "datatype": "INT64", "shape": [1, 1], "data": [99]}], "parameters": {"x": "\xff"}}'

    def bad(model: str) -> None:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://{server.http}/v2/models/{model}/infer", body, 60)
        assert refused.value.code == 400
        assert json.loads(refused.value.read())["error"].endswith("expected a class of 0 to 35, got 99")

    wanted = requests(48, seed=5)
    expected = expected_pictures(bundled, wanted)
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(bad, model) for model in ("enat", "enat_png") * 4]
        found = send(client, wanted, workers=16)
        for one in others:
            one.result()
    assert all((image == expected[id(request)]).all() for request, image in zip(wanted, found, strict=True))


def stubs(server: Server, model: str) -> list[int]:
    """The processes in which a model runs."""
    children = " ".join(path.read_text() for path in Path(f"/proc/{server.process.pid}/task").glob("*/children")).split()
    return [int(pid) for pid in children if f"/{model}/1/model.py" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_a_full_queue_and_processes_that_are_gone(tmp_path: Path) -> None:
    import tritonclient.http as module
    from tritonclient.utils import InferenceServerException

    out = tmp_path / "models"
    assert write(out, "--env", environment(), "--max-batch", 1, "--queue-size", 2, "--no-warmup", "--png-instances", 8).exit_code == 0
    server = Server(out, tmp_path, environment())
    client = Client(module, server.http)

    def ask(model: str) -> str:
        try:
            client.ask(client.open(), model, class_id=1)
        except InferenceServerException as error:
            return str(error.status())
        return "200"

    def healthy() -> int:
        probe = Path(__file__).parent.parent / "serving" / "deploy" / "healthy.py"
        proxy = {**os.environ, "http_proxy": "http://127.0.0.1:9"}  # for what is elsewhere
        return subprocess.run([environment() / "bin" / "python", probe, server.http], capture_output=True, env=proxy).returncode

    try:
        for model in ("enat", "enat_png"):
            with ThreadPoolExecutor(16) as pool:
                assert set(pool.map(ask, [model] * 32)) == {"200", "503"}, model
        assert healthy() == 0
        (pid,) = stubs(server, "enat")
        os.kill(pid, signal.SIGKILL)
        assert ask("enat") == "500" and healthy() == 1
    finally:
        server.stop()
    assert healthy() == 1


def test_clients_that_go_away(server: Server, grpc: Client, bundled: Pipeline) -> None:
    body = json.dumps({"inputs": [{"name": "class_id", "datatype": "INT64", "shape": [8, 1], "data": list(range(8))}]})
    for cut in (10, len(body)):
        for _ in range(8):
            with socket.create_connection(("127.0.0.1", server.http_port)) as connection:
                header = f"POST /v2/models/enat/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall((header + body[:cut]).encode())
    one = grpc.open()
    tensor = grpc.module.InferInput("class_id", [8, 1], "INT64")
    tensor.set_data_from_numpy(np.arange(8).reshape(8, 1))
    for _ in range(8):
        one.async_infer("enat", [tensor], callback=lambda result, error: None).cancel()
    assert (grpc.ask(one, class_id=1, seed=1).as_numpy("image") == bundled.generate([1], seed=1)).all()
    assert server.process.poll() is None


@pytest.mark.slow
def test_two_thousand_requests_at_full_load(grpc: Client, bundled: Pipeline) -> None:
    wanted = requests(2000, seed=3, different=150)
    found = send(grpc, wanted, workers=32)
    expected = expected_pictures(bundled, wanted)
    wrong = [request for request, image in zip(wanted, found, strict=True) if not (image == expected[id(request)]).all()]
    assert len(found) == 2000 and not wrong


def test_a_reload_under_load_loses_nothing(server: Server, grpc: Client, bundled: Pipeline, repository: Path) -> None:
    """The engine is written anew and loaded while requests come in; then it is unloaded, and requests are refused."""
    from tritonclient.utils import InferenceServerException

    one = grpc.open()
    wanted = requests(200, seed=4, different=40)
    expected = expected_pictures(bundled, wanted)
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(send, grpc, wanted, 8)
        time.sleep(0.5)
        for _ in range(2):
            assert write(repository, "--env", environment(), "--force").exit_code == 0
            one.load_model("enat")
        found = load.result()
    assert all((image == expected[id(request)]).all() for request, image in zip(wanted, found, strict=True))
    one.unload_model("enat")
    started = time.monotonic()
    while one.is_model_ready("enat") and time.monotonic() - started < 30:
        time.sleep(0.1)
    with pytest.raises(InferenceServerException, match=r"unknown model|not ready|no available versions|is not found"):
        grpc.ask(one, class_id=1)
    with pytest.raises(InferenceServerException):
        grpc.ask(one, "enat_png", class_id=1)
    one.load_model("enat")
    assert (grpc.ask(one, class_id=1, seed=1).as_numpy("image") == bundled.generate([1], seed=1)).all()


STAND_IN = """
import onnxruntime
import triton_python_backend_utils as utils


class TritonPythonModel:
    def initialize(self, args):
        self.session = onnxruntime.InferenceSession(f"{args['model_repository']}/1/model.onnx")

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        given = {}
        for port in self.session.get_inputs():
            array = utils.get_input_tensor_by_name(request, port.name).as_numpy()
            given[port.name] = array if port.shape else array.reshape(())
        outputs = zip(self.session.get_outputs(), self.session.run(None, given))
        return utils.InferenceResponse([utils.Tensor(port.name, array) for port, array in outputs])
"""


class ServedLane(NumpyLane):
    """Runs an engine's graphs on the server, a model each."""

    def __init__(self, client: Any, module: Any) -> None:
        self.client, self.module = client, module
        self.outputs: dict[str, list[str]] = {}

    def run_once(self, graph: str, inputs: Mapping[str, Any]) -> list[Any]:
        from tritonclient.utils import np_to_triton_dtype

        model = f"graphs_{graph}"
        if model not in self.outputs:
            self.outputs[model] = [one.name for one in self.client.get_model_metadata(model).outputs]
        tensors = []
        for name, array in inputs.items():
            tensors.append(self.module.InferInput(name, array.shape or [1], np_to_triton_dtype(array.dtype)))
            tensors[-1].set_data_from_numpy(np.ascontiguousarray(array).reshape(array.shape or [1]))
        answer = self.client.infer(model, tensors)
        return [answer.as_numpy(name) for name in self.outputs[model]]


def test_graphs_of_their_own(tmp_path: Path, bundled: Pipeline) -> None:
    """Their configs are taken, and the loop runs on them. The server has no ONNX Runtime backend: a Python model stands in for it, which
    makes scalars of single numbers, as that does."""
    import tritonclient.grpc as module

    out = tmp_path / "models"
    assert write(out, "--graphs", "--name", "graphs").exit_code == 0
    for name in ("graphs", "graphs_png"):
        shutil.rmtree(out / name)
    for model in out.iterdir():
        config = model / "config.pbtxt"
        text = config.read_text()
        assert 'platform: "onnxruntime_onnx"' in text
        python = f'parameters {{ key: "EXECUTION_ENV_PATH" value {{ string_value: "{environment()}" }} }}'
        config.write_text(text.replace('platform: "onnxruntime_onnx"', 'backend: "python"') + python)
        (model / "1" / "model.py").write_text(STAND_IN)
    server = Server(out, tmp_path, environment())
    try:
        lane = ServedLane(module.InferenceServerClient(server.grpc), module)
        (pictures,) = sample(lane, bundled.manifest, [3, 17], [1, 2], bundled.schedule(), images=True)
        assert (pictures == bundled.generate([3, 17], seed=[1, 2])).all()
        (tokens,) = lane.run("image_encoder", {"images": pictures})
        assert (tokens == bundled.encode(pictures).reshape(tokens.shape)).all()
    finally:
        server.stop()


def test_the_page_s_client(server: Server, bundled: Pipeline) -> None:
    """The sample of docs/EMBEDDING.md as it is printed: under twenty lines, and what it gets."""
    page = (Path(__file__).parent.parent / "docs" / "EMBEDDING.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    assert code.count("\n") < 20
    found: dict[str, Any] = {}
    exec(code.replace("localhost:8001", server.grpc), found)
    (expected,) = bundled.generate([17], seed=7)
    assert (found["picture"] == expected).all()
    assert (np.asarray(Image.open(io.BytesIO(found["png"]))) == expected).all()


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
def test_the_page_s_commands(server: Server, bundled: Pipeline, tmp_path: Path) -> None:
    """curl and tail as docs/TRITON.md prints them."""
    page = (Path(__file__).parent.parent / "docs" / "TRITON.md").read_text()
    found = re.search(r"    curl .*?> r\.png\n", page, re.S)
    assert found
    commands = found[0].replace("localhost:8000", f"127.0.0.1:{server.http_port}")
    subprocess.run(["bash", "-ec", commands], cwd=tmp_path, check=True)
    with Image.open(tmp_path / "r.png") as picture:
        seed = json.loads(picture.info["enat"])["images"][0]["seed"]
        assert (np.asarray(picture) == bundled.generate("R", seed=seed)[0]).all()


def test_probes_are_what_the_server_answers(server: Server) -> None:
    for path in ("v2/health/live", "v2/health/ready", "v2/models/enat/ready"):
        assert server.get(path) is not None
    assert server.get("v2/models/other/ready") is None
    found = {name.split("{")[0] for name in server.metrics()}
    page = (Path(__file__).parent.parent / "docs" / "TRITON.md").read_text()
    named = set(re.findall(r"`(nv_\w+)`", page))
    assert len(named) > 5
    assert named - found <= {"nv_gpu_utilization", "nv_gpu_memory_used_bytes"}  # there is no GPU


def test_the_runtime_in_the_repository_is_used(repository: Path) -> None:
    """The environment of the server has no enat of its own."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('enat') is not None)"
    assert subprocess.run([environment() / "bin" / "python", "-c", code], cwd="/", check=False).returncode == 0


def test_a_numpy_that_the_server_cannot_read(tmp_path: Path) -> None:
    """With NumPy 2 a Python backend made for NumPy 1 loads, and would answer with pictures of nothing."""
    theirs = environment()
    code = "import json, numpy, site, sys; print(json.dumps([sys.version_info[:2], numpy.__version__, site.getsitepackages()[0]]))"
    found = json.loads(subprocess.check_output([theirs / "bin" / "python", "-c", code], text=True))
    if found[0] != list(sys.version_info[:2]) or found[1][0] != "1" or np.__version__[0] == "1":
        pytest.skip("no NumPy 2 at hand for the server's Python")
    subprocess.run([theirs / "bin" / "python", "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    for folder, numpy in ((Path(found[2]), False), (Path(np.__file__).parent.parent, True)):
        for path in folder.iterdir():
            if path.name.startswith("numpy") == numpy:
                (packages / path.name).symlink_to(path)
    assert write(tmp_path / "models", "--env", tmp_path / "env").exit_code == 0
    with pytest.raises(RuntimeError, match="Triton did not start"):
        Server(tmp_path / "models", tmp_path, theirs).stop()
    assert f"was built for NumPy 1, found {np.__version__}" in (tmp_path / "server.log").read_text()
