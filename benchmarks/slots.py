"""Many requests at once: what it costs or brings to draw several batches at the same time.

python -m enat.benchmarks.slots --engine work/l/int8 --slots 1,2,8 --clients 8 --images 16
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import click

from ..errors import InputError
from ..runtime.command import Command, parse_numbers
from ..runtime.pipeline import BUNDLED_ENGINE, Pipeline
from .footprint import resident_memory
from .machine import device_name
from .report import size


def serve(engine: Path, backend: str, device: str, slots: int, clients: int, images: int) -> tuple[float, float, int | None]:
    """Requests for a picture each, so many at once → pictures a second, the median wait for one in seconds, resident memory in bytes at
    its peak, None where the system does not tell."""
    with Pipeline.load(engine, backend, device, slots=slots) as pipe, ThreadPoolExecutor(clients) as pool:
        classes = pipe.manifest.model.num_classes

        def one(number: int) -> float:
            start = time.perf_counter()
            pipe.generate([number % classes], seed=number)
            return time.perf_counter() - start

        list(pool.map(one, range(clients)))  # loads the graphs and makes slots
        start = time.perf_counter()
        waits = list(pool.map(one, range(images)))
        rate = images / (time.perf_counter() - start)
        return rate, statistics.median(waits), resident_memory()[0]


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--engine", type=click.Path(exists=True, path_type=Path), default=BUNDLED_ENGINE)
@click.option("--backend", default="auto", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--slots", default="1,2,8", show_default=True)
@click.option("--clients", default=8, show_default=True)
@click.option("--images", default=64, show_default=True)
@click.option("--repeats", default=3, show_default=True)
def main(engine: Path, backend: str, device: str, slots: str, clients: int, images: int, repeats: int) -> None:
    """Print throughput, waiting and memory by number of slots, each time in a process of its own, in turn."""
    counts = parse_numbers("--slots", slots)
    for name, value in (("clients", clients), ("images", images), ("repeats", repeats)):
        if value < 1:
            raise InputError(f"--{name}: expected 1 or more, got {value}")
    found: dict[int, list[tuple[float, float, int | None]]] = {count: [] for count in counts}
    for _ in range(repeats):
        for count in counts:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                found[count].append(process.submit(serve, engine, backend, device, count, clients, images).result())
    click.echo(f"{device_name(device)}; {engine}, {backend}, {clients} clients, {images} pictures, medians of {repeats}")
    for count, rows in found.items():
        rate, wait = statistics.median(rate for rate, *_ in rows), statistics.median(wait for _, wait, _ in rows)
        known = [memory for *_, memory in rows if memory is not None]
        peak = size(statistics.median_low(known) if known else None)
        click.echo(f"  {count:2} slots: {rate:.2f} pictures/s, {wait:.2f} s a request, {peak} at the peak")


if __name__ == "__main__":
    main()
