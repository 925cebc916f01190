"""The machine and the programs that figures were measured with."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

from ..runtime.cores import usable_cores

CPU_INFO = Path("/proc/cpuinfo")
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


def versions() -> dict[str, str]:
    """Of the packages that run networks, as far as they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
