"""ONNX Runtime's sessions of an engine's graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import onnxruntime as ort

from ...errors import BackendError, first_line

if not hasattr(ort, "InferenceSession"):
    raise ImportError("its files are incomplete, as onnxruntime and onnxruntime-gpu leave each other; uninstall both first")

Providers = Sequence[tuple[str, dict[str, Any]]]  # execution providers and their options
CPU: Providers = [("CPUExecutionProvider", {})]


class Sessions:
    """An engine's graphs as ONNX Runtime sessions, each made when it is first asked for."""

    def __init__(
        self, reading: Callable[[str], AbstractContextManager[Path]], options: ort.SessionOptions, providers: Callable[[str], Providers]
    ) -> None:
        self.reading = reading  # gives a graph's path for the time in which it is read
        self.options = options
        self.providers = providers  # of a graph, the first being the one that must run it
        self.sessions: dict[str, ort.InferenceSession] = {}
        self.lock = threading.RLock()  # the providers of one graph may ask for another

    def get(self, graph: str) -> ort.InferenceSession:
        """Raises BackendError where ONNX Runtime cannot load the graph, EngineError where its files are not those of the engine."""
        with self.lock:
            if graph not in self.sessions:
                providers = self.providers(graph)
                wanted, _ = providers[0]
                with self.reading(graph) as path:
                    try:
                        # ONNX Runtime's own fallback says so on stdout, and loads the graph again.
                        session = ort.InferenceSession(path, self.options, providers=list(providers), enable_fallback=0)
                    except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
                        why = first_line(error) if is_text(path) else "it takes no paths that are no UTF-8"
                        raise BackendError(f"{path}: ONNX Runtime {ort.__version__} cannot load it: {why}") from error
                if wanted not in session.get_providers():  # it falls back to the CPU with no more than a log line
                    raise BackendError(f"{path}: ONNX Runtime {ort.__version__} could not start its {wanted}")
                self.sessions[graph] = session
            return self.sessions[graph]

    def close(self) -> None:
        with self.lock:
            self.sessions.clear()


def is_text(path: Path) -> bool:
    """Whether all bytes of a path are letters."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True
