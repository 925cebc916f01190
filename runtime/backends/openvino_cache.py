"""OpenVINO's compiled graphs, kept in files.

OpenVINO's own cache reads and hashes a graph before it looks for it, and leaves every page of its file in memory beside the weights as
the kernels have packed them. Here the manifest's hash stands for the graphs, and pages that were packed are given back.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from ...errors import InputError
from ..files import WholeFile
from ..manifest import Manifest
from . import openvino_graphs

VARIABLE = "ENAT_CACHE"  # a folder for compiled graphs; empty for none


class CompiledGraph:
    """A graph that can be run, and the file that its weights are read from, if it came from one."""

    def __init__(self, model: Any, mapping: mmap.mmap | None = None, tensor: Any = None) -> None:
        self.model = model
        self.mapping = mapping
        self.tensor = tensor  # OpenVINO does not keep the mapping alive

    def give_back(self) -> None:
        """The file's pages, for the system to reuse. What is needed again is read again."""
        if self.mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED)


class GraphCache:
    """Compiled graphs of one engine."""

    def __init__(self, core: ov.Core, manifest: Manifest, precision: str) -> None:
        """precision: OpenVINO's name of what floats are computed in."""
        self.core = core
        self.folder = writable_folder(manifest)
        made_of = [
            manifest.hash,
            precision,
            ov.__version__,
            Path(openvino_graphs.__file__).read_text("utf-8"),
            *(str(core.get_property("CPU", name)) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")),
        ]
        self.key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]

    def file(self, graph: str) -> Path | None:
        return self.folder and self.folder / f"{graph}-{self.key}.blob"

    def keeps(self, graph: str) -> bool:
        file = self.file(graph)
        return file is not None and file.is_file()

    def get(self, graph: str, options: Mapping[str, Any], compile_graph: Callable[[], Any]) -> CompiledGraph:
        """A graph from its file; where there is none that this OpenVINO takes, it is compiled and kept first.

        options: OpenVINO's, to run it with. Raises RuntimeError where OpenVINO cannot compile it.
        """
        file = self.file(graph)
        if file is None:
            return CompiledGraph(compile_graph())
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # missing, empty, damaged
            return self.read(file, options)
        model = compile_graph()
        try:
            with WholeFile(file) as partial:
                partial.write_bytes(model.export_model().getbuffer())
            return self.read(file, options)  # it has the weights once, what was compiled twice
        except (OSError, ValueError, RuntimeError, InputError) as error:
            warnings.warn(f"{file}: not kept, it is compiled again at the next start: {reason(error)}", RuntimeWarning, stacklevel=2)
            return CompiledGraph(model)

    def read(self, file: Path, options: Mapping[str, Any]) -> CompiledGraph:
        """Raises OSError, ValueError or RuntimeError for a file that is missing, empty, or not what OpenVINO expects."""
        with file.open("rb") as opened:
            mapping = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        tensor = ov.Tensor(np.frombuffer(mapping, np.uint8), shared_memory=True)
        return CompiledGraph(self.core.import_model(tensor, "CPU", dict(options)), mapping, tensor)


def writable_folder(manifest: Manifest) -> Path | None:
    """Where compiled graphs of an engine are kept: in ENAT_CACHE, else in the user's cache folder. None where that cannot be written."""
    chosen = os.environ.get(VARIABLE)
    if chosen == "":
        return None
    root = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "enat")
    folder = root / "openvino" / manifest.hash[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        if chosen:
            raise InputError(f"{root}: the cache folder ({VARIABLE}) cannot be written: {error.strerror}") from error
        warnings.warn(f"{folder}: cannot be written ({error.strerror}); graphs are compiled at every start", RuntimeWarning, stacklevel=5)
        return None


def reason(error: Exception) -> str:
    """What OpenVINO says behind the places in its sources that it was thrown from."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")]
    return (lines or [type(error).__name__])[0]
