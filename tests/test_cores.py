"""CPU threads of a process that may not use all of the machine's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from enat.runtime import cores
from enat.runtime.backends.onnxruntime_cpu import session_threads

# Control groups as systems show them: /proc/self/cgroup, the files of /sys/fs/cgroup, and the quota in cores.
CONTROL_GROUPS = {
    "a container, version 2": ("0::/\n", {"cpu.max": "250000 100000\n"}, 2.5),
    "no quota, version 2": ("0::/\n", {"cpu.max": "max 100000\n"}, None),
    "a group in a group": (
        "0::/user.slice/one.scope\n",
        {"user.slice/cpu.max": "150000 100000\n", "user.slice/one.scope/cpu.max": "400000 100000\n"},
        1.5,
    ),
    "a name outside the container": ("0::/../../pod7/abc\n", {"cpu.max": "50000 100000\n"}, 0.5),
    "version 1": (
        "5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n0::/\n",
        {"cpu,cpuacct/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        3.0,
    ),
    "version 1, a name of its own": (
        "1:cpu:/one\n0::/\n",
        {
            "cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n",
            "cpu/one/cpu.cfs_quota_us": "90000\n", "cpu/one/cpu.cfs_period_us": "50000\n", "unified/cgroup.procs": "",
        },
        1.8,
    ),
    "both": ("2:cpu:/\n0::/x\n", {"cpu/cpu.cfs_quota_us": "-1\n", "unified/x/cpu.max": "700000 100000\n"}, 7.0),
    "cpusets alone": ("3:cpuset:/x\n", {"cpuset/cpu.max": "100000 100000\n"}, None),
    "neither": ("", {}, None),
}  # fmt: skip


def system(folder: Path, name: str) -> Path:
    groups, files, _ = CONTROL_GROUPS[name]
    for path, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{file}": text for file, text in files.items()}}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


@pytest.mark.parametrize("name", CONTROL_GROUPS)
def test_quotas(name: str, tmp_path: Path) -> None:
    assert cores.least_quota(system(tmp_path, name)) == CONTROL_GROUPS[name][2]


def test_without_control_groups(tmp_path: Path) -> None:
    assert cores.least_quota(tmp_path) is None


def test_control_groups_of_any_name(tmp_path: Path) -> None:
    """Bytes that are no text, and what Python takes for the end of a line."""
    folder = tmp_path / "sys/fs/cgroup" / os.fsdecode(b"\xff\x0bx")
    folder.mkdir(parents=True)
    (folder / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_bytes(b"0::/\xff\x0bx\n")
    assert cores.least_quota(tmp_path) == 1.5


# What the first five CPUs name as those of the same core, as far as the system tells, and how many cores these are.
SIBLINGS = {
    ("0-1", "0-1", "2-3", "2-3", "4-5"): 3,
    ("0,4", "1,5", "2,6", "3,7", "0,4"): 4,
    ("0", "1", "2", "3", "4"): 5,
    ("0-1", "0-1"): 4,
    (): 5,
}


def processors(folder: Path, siblings: tuple[str, ...]) -> Path:
    for cpu, text in enumerate(siblings):
        file = folder / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        file.parent.mkdir(parents=True)
        file.write_text(f"{text}\n")
    return folder


@pytest.mark.parametrize("siblings", SIBLINGS)
def test_cores(siblings: tuple[str, ...], tmp_path: Path) -> None:
    assert cores.core_count(range(5), processors(tmp_path, siblings)) == SIBLINGS[siblings]


def a_thread_a_core(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """As if the machine had so many CPUs, each a core of its own."""
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    monkeypatch.setattr(cores, "core_count", lambda cpus: len(set(cpus)))


@pytest.mark.parametrize(
    ("affinity", "quota", "allowed"), [(64, None, None), (64, 80.0, None), (16, None, 16), (64, 7.65, 8), (4, 7.65, 4), (64, 0.5, 1)]
)
def test_what_is_allowed(monkeypatch: pytest.MonkeyPatch, affinity: int, quota: float | None, allowed: int | None) -> None:
    a_thread_a_core(monkeypatch, 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))
    monkeypatch.setattr(cores, "least_quota", lambda: quota)
    assert cores.allowed_threads() == allowed


def test_two_threads_of_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """They count once, in what is allowed and in what the machine has."""
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(cores, "core_count", lambda cpus: len({cpu // 2 for cpu in cpus}))
    for affinity, quota, allowed in ((16, None, None), (16, 12.0, None), (16, 7.5, None), (16, 6.5, 7), (12, 7.0, 6), (2, None, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, affinity=affinity: set(range(affinity)))
        monkeypatch.setattr(cores, "least_quota", lambda quota=quota: quota)
        assert cores.allowed_threads() == allowed
    assert session_threads(None, 2) == 7


def test_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    a_thread_a_core(monkeypatch, 64)
    for allowed, expected in ((None, [None, 32, 21, 1]), (6, [None, 3, 2, 1])):
        monkeypatch.setattr(cores, "allowed_threads", lambda allowed=allowed: allowed)
        assert [cores.part_of_threads(processes) for processes in (1, 2, 3, 100)] == expected


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_a_pipeline_starts_no_more_threads(backend: str) -> None:
    """A process held to one core draws with one thread."""
    code = f"""if True:
        import os
        os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
        from enat import Pipeline
        pipe = Pipeline.load(backend={backend!r})
        pipe.generate([1], seed=0)
        if {backend!r} == "openvino":
            print(pipe.backend.graphs.loading["encoder"].result().model.get_property("INFERENCE_NUM_THREADS"))
        else:
            print(pipe.backend.sessions.options.intra_op_num_threads)
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "1\n", result.stderr


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_some_threads_are_not_those_of_other_processes(backend: str) -> None:
    """A process that uses some of the cores leaves it to the system which."""
    code = f"""if True:
        import os
        from enat import Pipeline
        pipe = Pipeline.load(backend={backend!r}, threads=1)
        pipe.generate([1], seed=0)
        print(all(os.sched_getaffinity(int(task)) == os.sched_getaffinity(0) for task in os.listdir("/proc/self/task")))
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "True\n", result.stderr


def test_threads_of_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that run a session work beside its own: together as many as are asked for."""
    a_thread_a_core(monkeypatch, 16)
    for threads, slots, own in ((None, 1, 0), (3, 1, 3), (None, 2, 15), (4, 2, 3), (4, 4, 1), (4, 9, 1)):
        assert session_threads(threads, slots) == own
