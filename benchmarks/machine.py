"""The machine and the programs that figures were measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ..runtime.cores import usable_cores

CPU_INFO = Path("/proc/cpuinfo")
CPU_TIMES = Path("/proc/stat")
WORTH_KNOWING = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16")
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-cu13", "tensorrt", "torch")


def processor() -> str:
    """The processor, how many cores of it there are to use, and what matters here of its instructions."""
    facts: dict[str, str] = {}
    for line in CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    model = facts.get("model name") or platform.processor() or platform.machine()
    family = f" (family {facts['cpu family']})" if "cpu family" in facts else ""
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return f"{model}{family}, {usable_cores()} cores, {' '.join(flag for flag in WORTH_KNOWING if flag in flags)}".rstrip(", ")


def device_name(device: str) -> str:
    """What a device is: the processor, or the GPU's name."""
    if device == "cpu":
        return processor()
    from ..runtime.backends.cuda import device_facts, device_index

    return device_facts(device_index(device))[0]


@dataclass(frozen=True)
class CpuTimes:
    """Seconds of all CPUs together since the machine started. others: spent on other processes than this one and its children, or taken
    by the host of a virtual machine; passed: all there were."""

    others: float
    passed: float

    @classmethod
    def now(cls) -> Self | None:
        """None where the system does not tell."""
        try:
            name, *words = CPU_TIMES.read_text().partition("\n")[0].split()
            # user, nice, system, idle, waiting, two kinds of interrupts, stolen by the host; what follows is a part of these
            times = [int(word) / os.sysconf("SC_CLK_TCK") for word in words[:8]]
            busy = sum(times) - times[3] - times[4]
        except (OSError, ValueError, IndexError):
            return None
        return cls(busy - sum(os.times()[:4]), sum(times)) if name == "cpu" else None

    def share_until(self, later: Self) -> float | None:
        """What others had of the CPUs' time from now until then: 0 … 1."""
        passed = later.passed - self.passed
        return min(1.0, max(0.0, (later.others - self.others) / passed)) if passed > 0 else None


def versions() -> dict[str, str]:
    """Of the packages that run networks, as far as they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
