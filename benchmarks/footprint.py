"""What an engine takes before and beside its time: load time and memory, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import BackendError
from ..runtime.pipeline import Pipeline
from .measure import Case, Engine

STATUS, MEMORY = Path("/proc/self/status"), ("VmHWM", "VmRSS")  # of Linux


@dataclass(frozen=True)
class Footprint:
    """load: seconds from Pipeline.load to the first batch, without what a batch takes afterwards at best; memory in bytes, None where the
    system does not tell; device_memory: that the process took of a GPU, whose allocators keep what they took at the peak."""

    load: float
    first: float  # seconds from Pipeline.load to the end of the first batch
    peak_memory: int | None
    memory: int | None
    device_memory: int | None


def footprint(engine: Path, backend: str, device: str, threads: int | None, case: Case) -> Footprint:
    """Loads an engine in a new process and draws three batches there, twice over: the second process finds files and caches warm.

    Raises BackendError where the process fails, with what it said.
    """
    asked: dict[str, Any] = {"engine": str(engine), "backend": backend, "device": device, "threads": threads, "case": asdict(case)}
    # With this process's modules, wherever they are, and not with what the working directory has of the same name.
    path = os.pathsep.join(one or str(Path.cwd()) for one in sys.path)
    for _ in range(2):
        asked["free"] = free_device_memory(device)  # before the process begins to use it, which takes some, too
        command = [sys.executable, "-P", "-m", __name__, json.dumps(asked)]
        found = subprocess.run(command, capture_output=True, text=True, errors="replace", env={**os.environ, "PYTHONPATH": path})
        if found.returncode < 0:
            raise BackendError(f"a process that loads {engine} was ended by signal {-found.returncode}, for want of memory, maybe")
        if found.returncode:
            raise BackendError(f"a process that loads {engine} failed: {(found.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    return Footprint(**json.loads(found.stdout.splitlines()[-1]))


def resident_memory() -> tuple[int | None, int | None]:
    """Of this process: the most that was resident, and what is now, bytes."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    sizes = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines) if name in MEMORY}
    return sizes.get(MEMORY[0]), sizes.get(MEMORY[1])


def free_device_memory(device: str) -> int | None:
    """Bytes of a GPU that no program uses."""
    if device == "cpu":
        return None
    from ..runtime.backends.cuda import CudaDevice, device_index

    with contextlib.closing(CudaDevice(device_index(device))) as found:
        return found.free_memory()


def seconds(engine: Engine, case: Case) -> float:
    start = time.perf_counter()
    engine.draw(case)
    return time.perf_counter() - start


def main(asked: dict[str, Any]) -> Footprint:
    """What the new process does."""
    case, device, before = Case(**asked["case"]), asked["device"], asked["free"]
    start = time.perf_counter()
    with Pipeline.load(asked["engine"], asked["backend"], device, asked["threads"]) as pipeline:
        engine = Engine("", pipeline)
        engine.draw(case)
        first = time.perf_counter() - start
        again = min(seconds(engine, case) for _ in range(2))  # other programs may get in the way of one
        after = free_device_memory(device)
        taken = None if before is None or after is None else before - after
        return Footprint(first - again, first, *resident_memory(), taken)


if __name__ == "__main__":
    print(json.dumps(asdict(main(json.loads(sys.argv[1])))))
