"""ENAT engines: export them from a checkpoint, run them anywhere. Importing this costs nothing; the parts load when they are used."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from .errors import BackendError, EnatError, EngineError, InputError, Stopped

if TYPE_CHECKING:
    from .runtime.pictures import to_pil
    from .runtime.pipeline import Callback, Drawing, Images, Pipeline, Preview, Tokens

__all__ = [
    "BackendError",
    "Callback",
    "Drawing",
    "EnatError",
    "EngineError",
    "Images",
    "InputError",
    "Pipeline",
    "Preview",
    "Stopped",
    "Tokens",
    "to_pil",
]
__version__ = "0.1.0"

# ONNX Runtime and OpenVINO tell their makers how they are used, unless told otherwise before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


if not TYPE_CHECKING:  # where it would let any name pass

    def __getattr__(name: str) -> Any:
        if name == "to_pil":
            from .runtime.pictures import to_pil

            return to_pil
        if name in __all__:
            from .runtime import pipeline

            return getattr(pipeline, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return [*__all__, "__version__"]
