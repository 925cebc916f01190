"""`enat-triton`: a Triton model repository from an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from ..runtime.command import Command, Source, Target, backend_option, parse_numbers
from ..runtime.files import check_writable
from ..runtime.pipeline import BUNDLED_ENGINE
from .repository import Options, write_repository


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--engine", type=Source(), help="Engine directory; without it, the bundled one (letters and digits).")
@click.option("--out", type=Target(), required=True, help="The model repository; other models in it stay.")
@click.option("--name", default="enat", show_default=True, help="Of the model; the one that gives PNG files has _png behind.")
@click.option("--max-batch", default=8, show_default=True, help="Pictures drawn at once.")
@click.option("--queue-delay", "queue_delay_us", default=5000, show_default=True, help="Microseconds that a request waits for others.")
@click.option("--instances", default=1, show_default=True, help="Processes, each with the engine in memory.")
@click.option("--gpus", help="Numbers of the GPUs to run on, with commas; default: the CPU.")
@click.option("--png-instances", type=int, help="Processes that encode PNG files, 0 for no such model; default: as many as draw.")
@click.option("--priorities", default=0, show_default=True, help="Levels of priority that requests may ask for.")
@click.option("--queue-size", default=0, show_default=True, help="Requests that may wait; more are refused. 0: any number.")
@click.option("--queue-timeout", "queue_timeout_us", default=0, show_default=True, help="Microseconds that a request may wait, 0: any.")
@click.option("--env", help="EXECUTION_ENV_PATH: an environment with the wheels; default: that of the server.")
@backend_option()
@click.option("--threads", type=int, help="CPU threads of an instance; default: its part of all that may be used.")
@click.option("--warmup/--no-warmup", default=True, show_default=True, help="Draw before the model is ready.")
@click.option("--graphs", is_flag=True, help="Every graph as a model of its own too, for services that run the loop themselves.")
@click.option("--force", is_flag=True, help="Replace models that exist.")
def main(engine: Path | None, out: Path, gpus: str | None, env: str | None, force: bool, **options: Any) -> None:
    """Write a model repository for Triton Inference Server, with the engine and the runtime inside."""
    numbers = parse_numbers("--gpus", gpus)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: exists and is not a directory")
    check_writable(out / options["name"])
    if env and Path(env).exists():
        env = str(Path(env).absolute())  # of this machine; what is not here may be on the server's
    names = write_repository(engine or BUNDLED_ENGINE, out, Options(gpus=numbers, env=env, **options), force)
    click.echo(f"models {', '.join(names)} in {out}", err=True)


if __name__ == "__main__":
    main()
