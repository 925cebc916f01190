"""ENAT engines: export them from a checkpoint, run them anywhere. Importing this costs nothing; the parts load when they are used."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from .errors import BackendError, EnatError, EngineError, InputError, Stopped

if TYPE_CHECKING:
    from .runtime.pictures import to_pil
    from .runtime.pipeline import Pipeline

__all__ = ["BackendError", "EnatError", "EngineError", "InputError", "Pipeline", "Stopped", "to_pil"]
__version__ = "0.1.0"

# ONNX Runtime and OpenVINO tell their makers how they are used, unless told otherwise before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def __getattr__(name: str) -> Any:
    if name == "Pipeline":
        from .runtime.pipeline import Pipeline

        return Pipeline
    if name == "to_pil":
        from .runtime.pictures import to_pil

        return to_pil
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
