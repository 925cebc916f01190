"""A Triton server against the bare pipeline, in one run: many clients at once, one after the other, and no server at all.

python -m enat.benchmarks.triton --environment .venv/triton          # what `make test` sets up
"""

from __future__ import annotations

import os
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np
import tritonclient.grpc as grpc

from ..runtime.command import Command
from ..runtime.pipeline import BUNDLED_ENGINE, Pipeline
from ..serving.repository import Options, write_repository
from .machine import processor
from .triton_server import Server


def cpu_seconds() -> float:
    """What this process has used of all cores."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def send(address: str, labels: list[int], clients: int) -> None:
    """A request a picture, from so many clients at once, each with a connection of its own."""
    own = threading.local()

    def one(label: int) -> None:
        if not hasattr(own, "client"):
            own.client = grpc.InferenceServerClient(address)
        inputs = []
        for name, kind, array in (("class_id", "INT64", np.array([[label]])), ("seed", "UINT64", np.array([[label]], np.uint64))):
            inputs.append(grpc.InferInput(name, [1, 1], kind))
            inputs[-1].set_data_from_numpy(array)
        own.client.infer("enat", inputs).as_numpy("image")

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, labels))


@click.command(cls=Command)
@click.option(
    "--environment", type=click.Path(exists=True, path_type=Path), required=True, help="With nvidia-pytriton and enat[cpu]'s needs."
)
@click.option("--engine", type=click.Path(exists=True, path_type=Path), default=BUNDLED_ENGINE)
@click.option("--images", default=256, show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--clients", default=32, show_default=True)
@click.option("--repeats", default=3, show_default=True)
def main(environment: Path, engine: Path, images: int, batch: int, clients: int, repeats: int) -> None:
    """Print pictures a second: the pipeline's, and the server's, as measured and without the clients' own work."""
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name, Pipeline.load(engine) as pipe:
        folder = Path(name)
        write_repository(engine, folder / "models", Options(max_batch=batch, env=str(environment.absolute()), png_instances=0))
        server = Server(folder / "models", folder, environment)
        labels = [i % pipe.manifest.model.num_classes for i in range(images)]
        runs: dict[str, Callable[[], object]] = {
            "bare pipeline": lambda: pipe.generate(labels, seed=0, batch_size=batch),
            f"server, {clients} clients": lambda: send(server.grpc, labels, clients),
            "server, one by one": lambda: send(server.grpc, labels, 1),
        }
        try:
            for run in runs.values():
                run()
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
            for _ in range(repeats):
                for name, run in runs.items():
                    start, used = time.perf_counter(), cpu_seconds()
                    run()
                    times[name].append((time.perf_counter() - start, cpu_seconds() - used))
        finally:
            server.stop()
    click.echo(f"{processor()}; {images} pictures, batches of {batch}")
    bare = statistics.median(seconds for seconds, _ in times["bare pipeline"])
    click.echo(f"  {'bare pipeline':24} {images / bare:6.1f} pictures/s, {1000 * bare * batch / images:.0f} ms a batch")
    for name, pairs in times.items():
        if name != "bare pipeline":
            seconds, used = (statistics.median(column) for column in zip(*pairs, strict=True))
            without = seconds - used / cores
            click.echo(
                f"  {name:24} {images / seconds:6.1f} pictures/s, {bare / seconds:.0%} of it; "
                f"{images / without:6.1f} and {bare / without:.0%} without the clients' {used:.1f} s of CPU"
            )


if __name__ == "__main__":
    main()
