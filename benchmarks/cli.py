"""`enat-bench`: how fast engines draw, what they take, and how many times faster that is than PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..errors import EngineError, InputError
from ..runtime.backends import BACKENDS
from ..runtime.command import Command, Source, Target, needs, parse_numbers
from ..runtime.cores import allowed_threads, machine_cores
from ..runtime.files import check_writable
from ..runtime.pipeline import Pipeline
from ..runtime.progress import progress_bar
from .footprint import Footprint, footprint
from .machine import CpuTimes, device_name, versions
from .measure import Case, Contender, Engine, Measurement, measure
from .report import breakdown, draw_chart, footprints, growth, times, title

COMPARED = ("reference", "reference-bfloat16", "reference-float16", "compile", "compile-bfloat16", "compile-float16")
PLOTS = (".png", ".svg", ".pdf")
MOST_AT_ONCE = 65_536  # pictures


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--engine", "engines", type=Source(), multiple=True, help="May be repeated; default: the bundled one.")
@click.option(
    "--backend",
    "backends",
    type=click.Choice(["auto", *BACKENDS]),
    multiple=True,
    default=("auto",),
    show_default=True,
    help="May be repeated: every engine on each.",
)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=int, help="CPU threads; default: one for each core that the process may use.")
@click.option("--batch", "batch_text", metavar="N[,N…]", default="1,4", show_default=True, help="Pictures drawn at once.")
@click.option("--steps", "steps_text", metavar="N[,N…]", help="Sampling steps; default: the engine's.")
@click.option("--tokens", is_flag=True, help="Without decoding the pictures.")
@click.option("--warmup", default=1, show_default=True, help="Batches of each kind that every contender draws before it is timed.")
@click.option("--repeats", default=5, show_default=True, help="Rounds; in each one every contender draws one batch of each kind.")
@click.option("--compare", "compared", type=click.Choice(COMPARED), multiple=True, help="With PyTorch in the same run; may be repeated.")
@click.option("--ckpt", type=click.Path(exists=True, path_type=Path), help="The checkpoint that the engine was exported from.")
@click.option("--vqgan", type=click.Path(exists=True, path_type=Path), help="Its image tokenizer.")
@click.option("--plot", type=Target(), help=f"Chart to write: {', '.join(PLOTS)} (needs matplotlib).")
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON on stdout.")
def main(
    engines: tuple[Path, ...],
    backends: tuple[str, ...],
    device: str,
    threads: int | None,
    batch_text: str,
    steps_text: str | None,
    tokens: bool,
    warmup: int,
    repeats: int,
    compared: tuple[str, ...],
    ckpt: Path | None,
    vqgan: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure how fast engines draw pictures: latency by step and by graph, throughput, memory and load time.

    Contenders, batch sizes and steps take turns, so that what else the machine does meets all of them; figures are medians, ratios
    those of each round.
    """
    if warmup < 0 or repeats < 1:
        raise InputError(f"expected 0 or more warm-ups and 1 or more repeats, got {warmup} and {repeats}")
    if bool(compared) != bool(ckpt):
        raise InputError(f"--compare runs the checkpoint in PyTorch; expected {'--ckpt' if compared else '--compare'} too")
    if vqgan and not compared:
        raise InputError("--vqgan is what --compare decodes pictures with; expected --compare too")
    if compared and not tokens and not vqgan:
        raise InputError("--compare decodes pictures in PyTorch too; expected --vqgan, or --tokens to leave decoding out")
    if plot:
        if plot.suffix.lower() not in PLOTS:
            raise InputError(f"{plot}: expected a file that ends in {', '.join(PLOTS)}")
        check_writable(plot, file=True)
        with needs("plot", "--plot"):
            import matplotlib  # noqa: F401
    batches = tuple(dict.fromkeys(parse_numbers("--batch", batch_text)))
    if min(batches) < 1 or max(batches) > MOST_AT_ONCE:
        raise InputError(f"--batch: expected 1 to {MOST_AT_ONCE} pictures, got {min(batches) if min(batches) < 1 else max(batches)}")
    compared = tuple(dict.fromkeys(compared))
    pipes = load(engines or (None,), backends, device, threads, tokens)
    first = pipes[0].pipeline
    cases = [
        Case(batch, steps, not tokens)
        for steps in dict.fromkeys(parse_numbers("--steps", steps_text)) or (first.manifest.sampling.steps,)
        for batch in batches
    ]
    models = [one.pipeline.manifest.model for one in pipes]
    sizes = [replace(model, class_names=None, image_size=None if tokens else model.image_size) for model in models]
    if compared and any(size != sizes[0] for size in sizes):
        raise InputError("the engines are of different sizes, so one reference does not serve them; measure them apart")
    for case in cases:
        schedules = [one.pipeline.schedule(case.steps) for one in pipes]  # refuses what is out of range
        if compared and any(schedule != schedules[0] for schedule in schedules):
            raise InputError("the engines sample differently by default, so one reference does not serve them; measure them apart")
    others: list[Contender] = []
    rate = None
    if compared and ckpt:
        others, rate = load_compared(compared, ckpt, vqgan, first, device, threads, tokens)
    taken: dict[str, dict[Case, Footprint]] = {}
    contenders = [*others, *pipes]
    watched = sum(isinstance(one, Engine) for one in contenders)
    work = len(pipes) * len(batches) + len(cases) * (len(contenders) * (warmup + repeats) + watched)
    with progress_bar(work, "batch") as bar:
        for one in pipes:  # each in a process of its own
            for case in cases[: len(batches)]:  # with the first number of steps
                folder, backend = one.pipeline.manifest.folder, one.pipeline.backend.name
                taken.setdefault(one.name, {})[case] = footprint(folder, backend, device, threads, case)
                bar.update()
        before = CpuTimes.now()
        found = measure(contenders, cases, warmup, repeats, bar.update)
        after = CpuTimes.now()
    others_share = before.share_until(after) if before and after else None
    shares = [matrix_shares(pipes, measurements, rate) if rate else {} for measurements in found]
    names = [one.name for one in others]
    machine, installed = device_name(device), versions()
    if as_json:
        used = threads or (allowed_threads() if device == "cpu" else None) or machine_cores()
        head = {"format": 1, "enat": __version__, "machine": machine, "device": device, "threads": used, "versions": installed}
        head |= {"warmup": warmup, "matrix_rate": rate, "others": others_share, "engines": [facts(one) for one in pipes]}
        click.echo(json.dumps({**head, "measurements": summaries(found, names, shares), "footprints": summary(taken)}))
    else:
        programs = ", ".join(f"{name} {version}" for name, version in installed.items())
        click.echo(f"{machine}{f', {threads} threads' if threads else ''}; {programs}")
        known = "" if others_share is None else f"; others had {others_share:.0%} of the CPUs' time"
        click.echo(f"medians of {repeats} rounds; contenders take turns{known}")
        for case, measurements, reached in zip(cases, found, shares, strict=True):
            click.echo(f"\n{title(case)}\n\n{times(measurements, names, reached)}\n\n{breakdown(measurements)}")
        if growing := growth(found):
            click.echo(f"\n{growing}")
        click.echo(f"\nin a process of its own, files and caches warm\n\n{footprints(taken)}")
    if plot:
        draw_chart(found, names, machine, plot)


def facts(one: Engine) -> dict[str, Any]:
    """What an engine is that goes by this name in the measurements."""
    manifest = one.pipeline.manifest
    return {
        "name": one.name,
        "engine": str(manifest.folder),
        "hash": manifest.hash,
        "precision": manifest.precision,
        "backend": one.pipeline.backend.name,
    }


def load(engines: Sequence[Path | None], backends: Sequence[str], device: str, threads: int | None, tokens: bool) -> list[Engine]:
    """Every engine on every backend. Raises EngineError where pictures are wanted of an engine that has none."""
    found: list[Engine] = []
    for engine in engines:
        for backend in dict.fromkeys(backends):
            pipeline = Pipeline.load(engine, backend, device, threads)
            if not tokens and not pipeline.manifest.has("image_decoder.onnx"):
                raise EngineError(f"{engine}: this engine has no image decoder; --tokens measures it without")
            name = f"{'bundled engine' if engine is None else engine} ({pipeline.manifest.precision}), {pipeline.backend.name}"
            if all(one.name != name for one in found):
                found.append(Engine(name, pipeline))
    return found


def load_compared(
    kinds: Sequence[str], ckpt: Path, vqgan: Path | None, pipeline: Pipeline, device: str, threads: int | None, tokens: bool
) -> tuple[list[Contender], float | None]:
    """PyTorch's contenders; and on a GPU the multiply-adds a second of large float16 products."""
    with needs("export", "--compare"):
        import torch

        from .torch_contenders import TorchModels, matrix_rate, torch_contender
    used = threads or allowed_threads()
    if used:
        torch.set_num_threads(used)
    models = TorchModels(ckpt, None if tokens else vqgan, pipeline.manifest.model, device)
    rate = matrix_rate(models.device) if models.device.type == "cuda" else None
    return [torch_contender(kind, models, pipeline) for kind in kinds], rate


def matrix_shares(engines: Sequence[Engine], measurements: Sequence[Measurement], rate: float) -> dict[str, float]:
    """What share of the matrix rate engines reach, counting their products with constant weights alone."""
    from ..calibration.products import NETWORK, find_products, load_graphs, multiply_adds

    shares = {}
    for engine in engines:
        one = next(one for one in measurements if one.name == engine.name)
        products = find_products(load_graphs(engine.pipeline.manifest))
        steps = engine.pipeline.schedule(one.case.steps)
        adds = sum(multiply_adds(product, steps) for product in products if one.case.pictures or product.graph in NETWORK)
        shares[one.name] = adds * one.rate / rate
    return shares


def summaries(
    found: Sequence[Sequence[Measurement]], compared: Sequence[str], shares: Sequence[Mapping[str, float]]
) -> list[dict[str, Any]]:
    """All measurements as plain numbers, with how many times faster each is than those compared with, and its share of the matrix rate."""
    result = []
    for measurements, reached in zip(found, shares, strict=True):
        others = [one for one in measurements if one.name in compared]
        for one in measurements:
            ratios = {other.name: one.times_faster(other) for other in others}
            result.append({**one.summary(), "times_faster": ratios, "matrix_share": reached.get(one.name)})
    return result


def summary(taken: dict[str, dict[Case, Footprint]]) -> list[dict[str, Any]]:
    return [{"name": name, **asdict(case), **asdict(one)} for name, ones in taken.items() for case, one in ones.items()]


if __name__ == "__main__":
    main()
