"""One graph's TensorRT plan, built with Polygraphy.

Networks are strongly typed: precision is what the graphs say (docs/PRECISION.md), and no builder flag changes it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import tensorrt as trt
from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, NetworkFromOnnxPath
from polygraphy.backend.trt import Profile as PolygraphyProfile
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

from ..errors import ExportError
from ..runtime.backends.tensorrt import Logger, load_plan, refit, start_runtime
from ..runtime.builds import Profile
from .progress_monitor import ProgressMonitor
from .tensorrt_options import Options


def built(path: Path, profiles: Sequence[Profile], options: Options, timing_cache: Path | None, progress: bool) -> bytes:
    """A graph's plan. Raises ExportError with TensorRT's reason."""
    compatibility = {
        "this": trt.HardwareCompatibilityLevel.NONE,
        "same": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
        "ampere+": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
    }
    cache = str(timing_cache) if timing_cache else None
    monitor = ProgressMonitor(path.stem) if progress else None
    with polygraphy_errors() as errors:
        try:
            network = NetworkFromOnnxPath(str(path), strongly_typed=True)
            config = CreateConfig(
                tf32=options.tf32,
                profiles=[polygraphy_profile(profile) for profile in profiles],
                load_timing_cache=cache if timing_cache and timing_cache.is_file() else None,
                refittable=options.weights == "refittable",
                strip_plan=options.weights == "stripped",
                builder_optimization_level=options.level,
                hardware_compatibility_level=compatibility[options.hardware],
                version_compatible=options.version_compatible,
                progress_monitor=monitor,
            )
            plan = EngineBytesFromNetwork(network, config=config, save_timing_cache=cache)()
            if monitor and monitor.interrupted:  # after the last step
                raise KeyboardInterrupt
        except PolygraphyException as error:
            if monitor and monitor.interrupted:
                raise KeyboardInterrupt from error
            why = (errors or [str(error)])[0].strip().splitlines()[0]
            raise ExportError(f"{path.name}: TensorRT {trt.__version__} cannot build it: {why}") from error
    return bytes(memoryview(plan))


@contextlib.contextmanager
def polygraphy_errors() -> Iterator[list[str]]:
    """What Polygraphy and TensorRT report as errors, in a list, and none of it on the terminal."""
    errors: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: errors.append(record.getMessage()) if record.levelno == logging.ERROR else None  # type: ignore[method-assign]
    logger = logging.getLogger("Polygraphy")
    settings = {"use_python_logging_system": True, "colors": False, "letter": False}
    before, propagate = {name: getattr(G_LOGGER, name) for name in settings}, logger.propagate
    logger.addHandler(handler)
    try:
        logger.propagate = False
        for name, value in settings.items():
            setattr(G_LOGGER, name, value)
        with G_LOGGER.verbosity(G_LOGGER.ERROR):
            yield errors
    finally:
        for name, value in before.items():
            setattr(G_LOGGER, name, value)
        logger.propagate = propagate
        logger.removeHandler(handler)


def polygraphy_profile(profile: Profile) -> Any:
    result = PolygraphyProfile()
    for name, (least, best, most) in profile.items():
        result.add(name, min=least, opt=best, max=most)
    return result


def refitted(plan: Path, old: Path, graph: Path) -> bytes:
    """The plan of the graph `old` with the weights of another one of the same form. Raises BackendError where it would keep old ones."""
    logger = Logger()
    engine = load_plan(start_runtime(logger), plan, logger)
    refit(engine, graph, logger, changed_weights(old, graph))
    config = engine.create_serialization_config()
    if hasattr(trt.SerializationFlag, "INCLUDE_REFIT"):
        config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)  # so that it takes the next weights, too
    return bytes(memoryview(engine.serialize_with_config(config)))


def changed_weights(old: Path, new: Path) -> list[str]:
    """Names of a graph's constants, scales of 8-bit values among them, that differ from those of another graph."""
    before, after = (ir.load(path).graph.initializers for path in (old, new))
    return [name for name, value in after.items() if not (name in before and same_values(before[name], value))]


def same_values(one: ir.Value, other: ir.Value) -> bool:
    if one.const_value is None or other.const_value is None:
        return False
    return one.const_value.dtype == other.const_value.dtype and np.array_equal(one.const_value.numpy(), other.const_value.numpy())
