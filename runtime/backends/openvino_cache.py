"""OpenVINO's compiled graphs, kept in files.

OpenVINO's own cache reads and hashes a graph before it looks for it, and leaves every page of its file in memory beside the weights as
the kernels have packed them. Here the manifest's hash stands for the graphs, and pages that were packed are given back.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import mmap
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from ...errors import reason as system_reason
from ..files import WholeFile
from ..manifest import Manifest, source_hash
from . import openvino_graphs
from .cache_folder import cache_folder

UNUSED = 90 * 24 * 3600  # seconds
THREADS = ("INFERENCE_NUM_THREADS", "ENABLE_CPU_PINNING")  # options that leave a compiled graph as it is


class CompiledGraph:
    """A graph that can be run, and the file that its weights are read from, if it came from one."""

    def __init__(self, model: Any, mapping: mmap.mmap | None = None, tensor: Any = None) -> None:
        self.model = model
        self.mapping = mapping
        self.tensor = tensor  # OpenVINO does not keep the mapping alive
        self.packed = False

    def ran(self) -> None:
        """To be called after every run: in the first one, kernels pack the weights."""
        if not self.packed:
            self.packed = True
            self.give_back()

    def give_back(self) -> None:
        """The file's pages, for the system to reuse. What is needed again is read again."""
        if self.mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED)


class GraphCache:
    """Compiled graphs of one engine."""

    def __init__(
        self,
        core: ov.Core,
        manifest: Manifest,
        options: Callable[[str], Mapping[str, Any]],
        form: Callable[[str], Mapping[str, Any]],
        graphs: Sequence[str],
    ) -> None:
        """options: gives OpenVINO's, to run a graph with; form: gives what it was rewritten with; graphs: that will be looked for."""
        self.core, self.manifest, self.options, self.form = core, manifest, options, form
        self.folder = cache_folder(manifest, "openvino", lambda folder: all((folder / self.name(graph)).is_file() for graph in graphs))

    @functools.cached_property
    def shared_key(self) -> list[str]:
        """What decides how all graphs are compiled."""
        properties = (self.core.get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES"))
        return [self.manifest.hash, ov.__version__, source_hash(openvino_graphs), *map(str, properties)]

    def name(self, graph: str) -> str:
        """Of a graph's file, with a hash of all that decides how it is compiled."""
        options = {name: value for name, value in self.options(graph).items() if name not in THREADS}
        decided = [f"{name}={value}" for name, value in sorted({**options, **self.form(graph)}.items())]
        key = hashlib.sha256(repr([*self.shared_key, *decided]).encode()).hexdigest()[:16]
        return f"{graph}-{key}.blob"

    def file(self, graph: str) -> Path | None:
        """Where a graph is kept; None where none is."""
        return self.folder and self.folder / self.name(graph)

    def keeps(self, graph: str) -> bool:
        file = self.file(graph)
        return file is not None and file.is_file()

    def get(self, graph: str, compile_graph: Callable[[Path], Any]) -> CompiledGraph:
        """A graph from its file; where there is none that this OpenVINO takes, it is compiled and kept first.

        Raises RuntimeError where OpenVINO cannot compile it, EngineError where its files are not those that the manifest lists.
        """
        file = self.file(graph)
        if file is None:
            with self.manifest.reading(graph) as path:
                return CompiledGraph(compile_graph(path))
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # missing, cut short, unreadable
            return self.read(graph, file)
        with self.manifest.reading(graph, verify=True) as path:  # large files are not hashed at load: what is wrong must not be kept
            model = compile_graph(path)
        remove_unused(file.parent.parent)
        try:
            with WholeFile(file) as partial:
                partial.write_bytes(model.export_model().getbuffer())
            return self.read(graph, file)  # it has the weights once, what was compiled twice
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            why = system_reason(error) if isinstance(error, OSError) else reason(error)
            warnings.warn(f"{file}: not usable, the graph is compiled again at the next start: {why}", RuntimeWarning, stacklevel=2)
            return CompiledGraph(model)

    def read(self, graph: str, file: Path) -> CompiledGraph:
        """Raises OSError, ValueError or RuntimeError for a file that is missing, empty, or not what OpenVINO expects."""
        with contextlib.suppress(OSError):  # where it may only be read
            os.utime(file)
        with file.open("rb") as opened:
            mapping = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        tensor = ov.Tensor(np.frombuffer(mapping, np.uint8), shared_memory=True)
        return CompiledGraph(self.core.import_model(tensor, "CPU", self.options(graph)), mapping, tensor)


def remove_unused(folder: Path) -> None:
    """Takes away what nobody has read for long: graphs of engines that are gone, and of earlier versions."""
    for file in folder.glob("*/*-*.blob"):
        with contextlib.suppress(OSError):
            found = file.stat()
            if time.time() - max(found.st_atime, found.st_mtime) > UNUSED:  # readers who may not write leave the time of access alone
                file.unlink()


def reason(error: Exception) -> str:
    """What OpenVINO says behind the places in its sources that it was thrown from."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")]
    return (lines or [type(error).__name__])[0]
