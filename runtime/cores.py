"""How many CPU threads this process can keep busy: in a container fewer than the machine has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath


def allowed_threads() -> int | None:
    """The threads that the process may keep busy, where its affinity (`taskset`, `docker --cpuset-cpus`) or the quota of a control group
    (`docker --cpus`, Kubernetes' limits) allows fewer than the machine has cores; None where nothing limits it.

    ONNX Runtime and OpenVINO know nothing of quotas: of many threads each would wait for the one that is held back. A part of a core is
    worth a thread (docs/SPEED.md). Where a core runs two threads they start one for it, and so does this.
    """
    allowed, quota = usable_cores(), least_quota()
    if quota is not None:
        allowed = min(allowed, math.ceil(quota))
    return allowed if allowed < machine_cores() else None


def usable_cores() -> int:
    """Those that the process' affinity names."""
    return core_count(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine_cores()


def machine_cores() -> int:
    return core_count(range(os.cpu_count() or 1))


def core_count(cpus: Iterable[int], root: Path = Path("/")) -> int:
    """On how many cores CPUs are, of which two or more may be one core's; where the system does not tell, as many as they are."""

    def core(cpu: int) -> str | int:
        try:
            return (root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        except OSError:
            return cpu

    return len(set(map(core, cpus)))


def part_of_threads(processes: int) -> int | None:
    """The threads of each of so many processes that share what this one may use; None for one that has it for itself."""
    return max(1, (allowed_threads() or machine_cores()) // processes) if processes > 1 else None


def least_quota(root: Path = Path("/")) -> float | None:
    """The cores' worth of time that the process' control groups, versions 1 and 2, allow it; None where none sets a quota."""
    return min((quota for group in control_groups(root) if (quota := read_quota(group)) is not None), default=None)


def control_groups(root: Path) -> Iterator[Path]:
    """Folders of the groups that the process is in and that may have a quota: its own, and those around it. None but on Linux."""
    try:
        lines = os.fsdecode((root / "proc/self/cgroup").read_bytes()).split("\n")
    except OSError:
        return
    mounts = root / "sys/fs/cgroup"
    for line in filter(None, lines):
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            folders = [mounts / "unified", mounts]
        elif "cpu" in controllers.split(","):
            folders = [mounts / controllers, mounts / "cpu"]
        else:
            continue
        group = PurePosixPath(name)
        # In a container it may go by its name outside, and be mounted without it: the folder around it all is its own then.
        for folder in filter(Path.is_dir, folders):
            yield from (folder / path.relative_to("/") for path in (group, *group.parents))
            break


def read_quota(group: Path) -> float | None:
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = (int(word) for name in names for word in (group / name).read_text().split())
        except (OSError, ValueError):  # not there, or `max`
            continue
        if quota > 0 and period > 0:
            return quota / period
    return None
