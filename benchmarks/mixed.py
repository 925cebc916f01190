"""Memory of a process that draws batches of many sizes and numbers of steps, one after the other.

python -m enat.benchmarks.mixed --engine work/l/int8 --backend openvino --batch 1,2,3,4 --steps 8,12,16
"""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import InputError
from ..runtime.command import Command, backend_option, parse_numbers
from ..runtime.pipeline import Pipeline
from .footprint import resident_memory
from .machine import processor
from .report import size


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--engine", type=click.Path(path_type=Path), help="Default: the bundled one.")
@backend_option()
@click.option("--batch", "batches", default="1,2,3,4,5,6,7,8", show_default=True, help="Pictures at once.")
@click.option("--steps", "numbers", default="1,2,4,8,12,16,20,24,32,40,50,64", show_default=True)
def main(engine: Path | None, backend: str, batches: str, numbers: str) -> None:
    """Print the memory that is resident after batches of each size with every number of steps."""
    counts, steps = parse_numbers("--batch", batches), parse_numbers("--steps", numbers)
    if min(counts) < 1:
        raise InputError(f"--batch: expected 1 or more pictures, got {min(counts)}")
    with Pipeline.load(engine, backend) as pipe:
        for count in steps:
            pipe.schedule(count)  # raises for what is out of range
        click.echo(f"{processor()}; {pipe.backend.name}")
        pipe.generate([0], seed=0, steps=steps[0])
        click.echo(f"after one picture         {size(resident_memory()[1])}")
        for batch in counts:
            for count in steps:
                pipe.generate([0] * batch, seed=0, steps=count, batch_size=batch)
            click.echo(f"after batches of {batch:<3}      {size(resident_memory()[1])}")


if __name__ == "__main__":
    main()
