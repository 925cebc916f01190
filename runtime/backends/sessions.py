"""ONNX Runtime's sessions of an engine's graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from ...errors import BackendError


class Sessions:
    """An engine's graphs as ONNX Runtime sessions, each made when it is first asked for."""

    def __init__(self, path: Callable[[str], Path], options: ort.SessionOptions, providers: Sequence[Any], wanted: str) -> None:
        self.path, self.options, self.providers = path, options, list(providers)
        self.wanted = wanted  # the provider that must run them
        self.sessions: dict[str, ort.InferenceSession] = {}
        self.lock = threading.Lock()

    def get(self, graph: str) -> ort.InferenceSession:
        """Raises BackendError where ONNX Runtime cannot load the graph."""
        with self.lock:
            if graph not in self.sessions:
                path = self.path(graph)
                try:
                    session = ort.InferenceSession(path, self.options, providers=self.providers)
                except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
                    raise BackendError(f"{path}: ONNX Runtime {ort.__version__} cannot load it: {first_line(error)}") from error
                if self.wanted not in session.get_providers():  # it falls back to the CPU with no more than a log line
                    raise BackendError(f"{path}: ONNX Runtime {ort.__version__} could not start its {self.wanted}")
                self.sessions[graph] = session
            return self.sessions[graph]

    def close(self) -> None:
        with self.lock:
            self.sessions.clear()


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
