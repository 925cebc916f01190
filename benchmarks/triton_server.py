"""A real Triton server on loopback: the binary and the Python backend of the package nvidia-pytriton. Tests and benchmarks use it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

START_LIMIT, STOP_LIMIT = 120, 60  # seconds


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class Server:
    """A running tritonserver, stopped by its own process id.

    environment: a virtual environment with nvidia-pytriton, and with what models need. folder: for its log and its backends.
    """

    def __init__(self, repository: Path, folder: Path, environment: Path) -> None:
        code = "import json, site, sys, sysconfig; get = sysconfig.get_config_var"
        code += "; print(json.dumps([site.getsitepackages()[0], get('LIBDIR'), '.'.join(map(str, sys.version_info[:2]))]))"
        found = subprocess.run([environment / "bin" / "python", "-c", code], check=True, capture_output=True, text=True)
        packages, libraries, version = json.loads(found.stdout)
        triton = Path(packages, "pytriton", "tritonserver")
        backends = folder / "backends"
        shutil.copytree(triton / "backends", backends)
        stub = "triton_python_backend_stub"
        shutil.copy(triton / "python_backend_stubs" / version / stub, backends / "python" / stub)
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        self.http, self.grpc = f"127.0.0.1:{self.http_port}", f"127.0.0.1:{self.grpc_port}"
        self.log = folder / "server.log"
        arguments = {
            "model-repository": repository,
            "backend-directory": backends,
            "model-control-mode": "explicit",
            "load-model": "*",
            "http-address": "127.0.0.1",
            "http-port": self.http_port,
            "grpc-address": "127.0.0.1",
            "grpc-port": self.grpc_port,
            "metrics-address": "127.0.0.1",
            "metrics-port": self.metrics_port,
            "exit-timeout-secs": 20,
        }
        paths = [libraries, f"{packages}/nvidia_pytriton.libs"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(triton / "bin" / "tritonserver"), *(f"--{name}={value}" for name, value in arguments.items())],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "LD_LIBRARY_PATH": ":".join(paths)},
            )
        try:
            self.wait()
        except BaseException:
            self.stop()
            raise

    def wait(self) -> None:
        started = time.monotonic()
        while time.monotonic() - started < START_LIMIT:
            if self.process.poll() is not None:
                break
            if self.get("v2/health/ready") is not None:
                return
            time.sleep(0.2)
        raise RuntimeError(f"Triton did not start:\n{self.log.read_text()[-3000:]}")

    def get(self, path: str, port: int | None = None) -> str | None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port or self.http_port}/{path}", timeout=10) as response:
                return response.read().decode()  # type: ignore[no-any-return]
        except OSError:
            return None

    def metrics(self) -> dict[str, float]:
        """What Triton counts, by `name{labels}`."""
        text = self.get("metrics", self.metrics_port) or ""
        rows = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, _, value in rows}

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
