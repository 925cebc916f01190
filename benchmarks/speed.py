"""Engines against the reference, in one run on one machine: alternating, medians. Network and sampling only, no image decoding.

python -m benchmarks.speed --ckpt work/l/nnet_ema.pth --engine work/l/engine --engine work/l/int8
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import onnxruntime
import torch

from enat import Pipeline
from enat.models.checkpoint import load_network

from .reference import generate_tokens


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def machine() -> str:
    """The processor and how many cores of it there are."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    features = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if flag in flags]
    return f"{model}, {torch.get_num_threads()} cores, {' '.join(features)}"


@click.command()
@click.option("--ckpt", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--engine", "engines", type=click.Path(exists=True, path_type=Path), multiple=True, required=True, help="May be repeated.")
@click.option("--heads", type=int, default=None)
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 4), show_default=True)
@click.option("--steps", type=int, default=8, show_default=True)
@click.option("--repeats", default=5, show_default=True)
def main(ckpt: Path, engines: tuple[Path, ...], heads: int | None, batches: tuple[int, ...], steps: int, repeats: int) -> None:
    """Print seconds and ratios to the reference, batch by batch."""
    network = load_network(ckpt, heads)
    pipes = {f"{engine} ({(pipe := Pipeline.load(engine)).manifest.precision})": pipe for engine in engines}
    schedule, *others = (pipe.schedule(steps) for pipe in pipes.values())
    if any(other != schedule for other in others):
        raise click.ClickException("the engines sample differently by default; expected engines of one model")
    click.echo(f"{machine()}; PyTorch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}; {steps} steps, reference in float32")
    for batch in batches:
        labels = [i % network.config.num_classes for i in range(batch)]
        runs: dict[str, Callable[[], object]] = {"reference": partial(generate_tokens, network, labels, schedule)}
        runs |= {name: partial(pipe.generate_tokens, labels, seed=0, steps=steps, batch_size=batch) for name, pipe in pipes.items()}
        for run in runs.values():
            run()
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                times[name].append(timed(run))
        click.echo(f"batch {batch}")
        for name, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(times["reference"], values, strict=True))
            click.echo(f"  {name:40} {statistics.median(values):6.2f} s ({min(values):.2f}-{max(values):.2f})  {ratio:.2f}x")


if __name__ == "__main__":
    main()
