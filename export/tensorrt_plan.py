"""One graph's TensorRT plan, built with Polygraphy.

Networks are strongly typed: precision is what the graphs say (docs/PRECISION.md), and no builder flag changes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import tensorrt as trt
from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork
from polygraphy.backend.trt import Profile as PolygraphyProfile
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

from ..errors import BackendError, ExportError, first_line
from ..runtime.backends.tensorrt import LOGGER, load_plan, refit, start_runtime
from ..runtime.builds import Profile
from ..runtime.interrupts import held_back
from .progress_monitor import ProgressMonitor
from .tensorrt_graphs import Prepared
from .tensorrt_options import Options

# Scratch memory by the shapes of the moment, not those of the largest profile; and what Polygraphy turns off where any is named, though it
# is on by default.
PREVIEW_FEATURES = ("RUNTIME_ACTIVATION_RESIZE_10_10", "PROFILE_SHARING_0806")


def built(graph: Prepared, profiles: Sequence[Profile], options: Options, timing_cache: Path | None, progress: bool) -> bytes:
    """A graph's plan. Raises ExportError with TensorRT's reason."""
    compatibility = {
        "this": trt.HardwareCompatibilityLevel.NONE,
        "same": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
        "ampere+": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
    }
    cache = str(timing_cache) if timing_cache else None
    preview = [getattr(trt.PreviewFeature, name, None) for name in PREVIEW_FEATURES]
    LOGGER.listen()
    plan = why = None
    with held_back() as interrupted, G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):  # nothing on the terminal
        # Polygraphy's own loggers of TensorRT turn Ctrl-C into SIGTERM.
        builder = trt.Builder(LOGGER)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, LOGGER)
        if parser.parse(graph.path.read_bytes(), str(graph.data_of)):
            try:
                config = CreateConfig(
                    tf32=options.tf32,
                    profiles=[polygraphy_profile(profile) for profile in profiles],
                    load_timing_cache=cache if timing_cache and timing_cache.is_file() else None,
                    refittable=options.weights == "refittable",
                    strip_plan=options.weights == "stripped",
                    builder_optimization_level=options.level,
                    hardware_compatibility_level=compatibility[options.hardware],
                    version_compatible=options.version_compatible,
                    progress_monitor=ProgressMonitor(graph.path.stem, interrupted, progress),
                    preview_features=[feature for feature in preview if feature is not None],
                    profiling_verbosity=trt.ProfilingVerbosity.LAYER_NAMES_ONLY,  # with more of it launches take longer
                )
                plan = EngineBytesFromNetwork((builder, network, parser), config=config, save_timing_cache=cache)()
            except PolygraphyException as error:
                why = LOGGER.first or str(error)
        else:
            why = parser.get_error(0).desc() if parser.num_errors else LOGGER.first
    if plan is None:
        raise ExportError(f"{graph.path.name}: TensorRT {trt.__version__} cannot build it: {first_line(str(why))}")
    return bytes(memoryview(plan))


def polygraphy_profile(profile: Profile) -> Any:
    result = PolygraphyProfile()
    for name, (least, best, most) in profile.items():
        result.add(name, min=least, opt=best, max=most)
    return result


def refitted(plan: Path, old: Prepared, new: Prepared) -> bytes:
    """The plan of the graph `old` with the weights of another one of the same form. Raises BackendError where it has another one, or the
    plan would keep old weights."""
    if form(old) != form(new):
        raise BackendError(f"{new.data_of}: has other layers than the graph that the plan was built of; build it anew, without --refit")
    engine = load_plan(start_runtime(), plan)
    refit(engine, new.path, new.data_of, changed_weights(old, new))
    config = engine.create_serialization_config()
    if hasattr(trt.SerializationFlag, "INCLUDE_REFIT"):
        config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)  # so that it takes the next weights, too
    return bytes(memoryview(engine.serialize_with_config(config)))


def form(graph: Prepared) -> list[object]:
    """All of a graph but its weights."""
    model = graph.load()
    constants = [(name, value.dtype, value.shape) for name, value in sorted(model.graph.initializers.items())]
    nodes = [
        (
            node.op_type,
            [str(value.name) if value else "" for value in node.inputs],
            [str(value.name) for value in node.outputs],
            sorted((name, written(attribute)) for name, attribute in node.attributes.items()),
        )
        for node in model.graph
    ]
    return [constants, nodes]


def written(attribute: ir.Attr) -> str:
    value = attribute.value
    return repr(value.numpy().tolist() if isinstance(value, ir.TensorProtocol) else value)


def changed_weights(old: Prepared, new: Prepared) -> list[str]:
    """Names of a graph's constants, scales of 8-bit values among them, that differ from those of another graph."""
    before, after = (graph.load().graph.initializers for graph in (old, new))
    return [name for name, value in after.items() if not (name in before and same_values(before[name], value))]


def same_values(one: ir.Value, other: ir.Value) -> bool:
    if one.const_value is None or other.const_value is None:
        return False
    return one.const_value.dtype == other.const_value.dtype and np.array_equal(one.const_value.numpy(), other.const_value.numpy())
