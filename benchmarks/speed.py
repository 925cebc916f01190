"""Engines against the reference, in one run on one machine: alternating, medians.

python -m benchmarks.speed --ckpt work/l/nnet_ema.pth --engine work/l/engine --engine work/l/int8
python -m benchmarks.speed --ckpt work/l/nnet_ema.pth --vqgan work/l/vqgan.ckpt --device cuda:0 --autocast float16 \\
    --engine work/l/fp16 --backend tensorrt --backend onnxruntime --batch 1 --batch 8 --batch 64
"""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import click
import onnxruntime
import torch

from enat import Pipeline
from enat.calibration.products import NETWORK, find_products, load_graphs, multiply_adds
from enat.models.checkpoint import load_network, load_tokenizer
from enat.models.network import Network
from enat.models.tokenizer import Tokenizer, to_uint8
from enat.runtime.backends import BACKENDS
from enat.runtime.schedule import Step

from .reference import generate_tokens


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def processor() -> str:
    """The processor, how many cores of it there are, and what matters here of its instructions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    features = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if flag in flags]
    return f"{model}, {torch.get_num_threads()} cores, {' '.join(features)}"


def machine(device: torch.device) -> str:
    return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}" if device.type == "cuda" else processor()


def reference(
    network: Network, tokenizer: Tokenizer | None, labels: Sequence[int], steps: Sequence[Step], device: torch.device, autocast: str | None
) -> object:
    """Tokens, or pictures where there is a tokenizer, on the host."""
    precision = torch.autocast(device.type, getattr(torch, autocast)) if autocast else contextlib.nullcontext()
    with device, precision, torch.inference_mode():
        tokens = generate_tokens(network, labels, steps)
        if tokenizer is None:
            return tokens.cpu()
        return to_uint8(tokenizer.decode(tokens).float()).cpu()


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """Multiply-adds a second that a large matrix product reaches."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        a @ b
        torch.cuda.synchronize(device)

    product()
    return size**3 / statistics.median(timed(product) for _ in range(10))


def work(pipe: Pipeline, steps: Sequence[Step], images: bool) -> float:
    """Multiply-adds with constant weights of one picture."""
    products = find_products(load_graphs(pipe.manifest))
    return sum(multiply_adds(product, steps) for product in products if images or product.graph in NETWORK)


@click.command()
@click.option("--ckpt", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--vqgan", type=click.Path(exists=True, path_type=Path), help="With it pictures are decoded too.")
@click.option("--engine", "engines", type=click.Path(exists=True, path_type=Path), multiple=True, required=True, help="May be repeated.")
@click.option("--backend", "backends", type=click.Choice(["auto", *BACKENDS]), multiple=True, default=("auto",), help="May be repeated.")
@click.option("--device", "device_name", default="cpu", show_default=True)
@click.option("--autocast", type=click.Choice(["float16", "bfloat16"]), help="Of the reference; without it, float32.")
@click.option("--heads", type=int, default=None)
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 4), show_default=True)
@click.option("--steps", type=int, default=8, show_default=True)
@click.option("--repeats", default=5, show_default=True)
def main(
    ckpt: Path,
    vqgan: Path | None,
    engines: tuple[Path, ...],
    backends: tuple[str, ...],
    device_name: str,
    autocast: str | None,
    heads: int | None,
    batches: tuple[int, ...],
    steps: int,
    repeats: int,
) -> None:
    """Print seconds and ratios to the reference, batch by batch."""
    device = torch.device(device_name)
    network = load_network(ckpt, heads).to(device)
    tokenizer = load_tokenizer(vqgan).to(device) if vqgan else None
    pipes: dict[str, Pipeline] = {}
    for engine in engines:
        for backend in backends:
            pipe = Pipeline.load(engine, backend, device_name)
            pipes[f"{engine} ({pipe.manifest.precision}, {pipe.backend.name})"] = pipe
    schedule, *others = (pipe.schedule(steps) for pipe in pipes.values())
    if any(other != schedule for other in others):
        raise click.ClickException("the engines sample differently by default; expected engines of one model")
    what = f"{steps} steps, {'pictures' if vqgan else 'tokens'}, reference in {f'{autocast} autocast' if autocast else 'float32'}"
    click.echo(f"{machine(device)}; PyTorch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}; {what}")
    rate = matrix_rate(device, torch.float16) if device.type == "cuda" else None
    adds = work(next(iter(pipes.values())), schedule, bool(vqgan))
    if rate:
        click.echo(f"float16 matrix products: {2 * rate / 1e12:.0f} TFLOP/s")
    for batch in batches:
        labels = [i % network.config.num_classes for i in range(batch)]
        runs: dict[str, Callable[[], object]] = {"reference": partial(reference, network, tokenizer, labels, schedule, device, autocast)}
        for name, pipe in pipes.items():
            draw = pipe.generate if vqgan else pipe.generate_tokens
            runs[name] = partial(draw, labels, seed=0, steps=steps, batch_size=batch)
        for run in runs.values():
            for _ in range(3 if device.type == "cuda" else 1):  # the first runs set up, and record
                run()
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                times[name].append(timed(run))
        click.echo(f"batch {batch}")
        for name, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(times["reference"], values, strict=True))
            median = statistics.median(values)
            line = f"  {name:40} {median:8.4g} s ({min(values):.4g}-{max(values):.4g})  {ratio:.2f}x  {batch / median:.4g} pictures/s"
            if rate:
                line += f"  {adds * batch / median / rate:.1%} of the matrix rate"
            click.echo(line)
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            click.echo(f"  device memory in use, by all of them: {(total - free) / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
