"""TensorRT and ONNX Runtime's CUDA provider without a GPU: graphs that they take, and profiles that cover the loop."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from conftest import list_anew, modulation
from host_device import HostBackend, HostDevice, HostLane
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime_cuda_kernels import KERNELS
from operator_types import not_in_table, with_types
from tensorrt_operators import objections

from enat import Pipeline
from enat.calibration.calibrate import Settings
from enat.errors import InputError
from enat.export.convert import Precision, convert_engine
from enat.export.tensorrt_graphs import count_rows_once, prepare
from enat.graph_file import save
from enat.runtime.backends.contract import output_shapes
from enat.runtime.builds import covering_profile
from enat.runtime.manifest import Manifest, read_manifest
from enat.runtime.pipeline import BUNDLED_ENGINE
from enat.runtime.profiles import TOPK_LIMIT, graph_profiles
from enat.runtime.schedule import schedule

GRAPHS = ("condition", "encoder", "decoder", "sampler", "image_decoder", "image_encoder")
PRECISIONS = {"fp16": Precision("fp16"), "int8": Precision("int8"), "int8-fp16": Precision("int8", "fp16")}


@pytest.fixture(scope="module")
def precisions(engines: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An engine in every precision."""
    folder = tmp_path_factory.mktemp("precisions")
    few = Settings(images=10, float_layers=())
    for name, precision in PRECISIONS.items():
        convert_engine(engines("tiny"), folder / name, precision, few if precision.name == "int8" else None)
    return {"fp32": engines("tiny"), "odd": engines("odd"), **{name: folder / name for name in PRECISIONS}}


# Graphs


@pytest.mark.parametrize("name", ["fp32", "odd", *PRECISIONS])
def test_tensorrt_takes_every_graph(precisions: dict[str, Path], tmp_path: Path, name: str) -> None:
    manifest = read_manifest(precisions[name])
    own = ("sampler", "image_encoder") if name.startswith("int8") else ("condition", "sampler", "image_decoder", "image_encoder")
    for graph in GRAPHS:
        prepared = prepare(manifest, graph, tmp_path / "graphs")
        assert objections(onnx.load(prepared.path)) == [], graph
        assert (prepared.path.parent == manifest.folder) == (graph in own), graph


def test_tensorrt_takes_the_bundled_engine(fp16: Path, int8: Path, int8_fp16: Path, int7: Path, tmp_path: Path) -> None:
    """In every precision, with the layers in float that the recipe leaves so."""
    for engine in (BUNDLED_ENGINE, fp16, int8, int8_fp16, int7):
        for graph in GRAPHS:
            prepared = prepare(read_manifest(engine), graph, tmp_path / engine.name)
            assert objections(onnx.load(prepared.path)) == [], (engine.name, graph)


def test_every_graph_has_kernels_for_cuda(fp16: Path, int8: Path, int8_fp16: Path) -> None:
    """On ONNX Runtime, whose CUDA provider runs engines as they are."""
    for engine in (BUNDLED_ENGINE, fp16, int8, int8_fp16):
        for graph in GRAPHS:
            model, types = with_types(onnx.load(engine / f"{graph}.onnx"))
            assert [imported.version for imported in model.opset_import] == [20]  # which the table is of
            assert [line for node in model.graph.node for line in not_in_table(node, types, KERNELS)] == [], (engine.name, graph)


def test_the_tables_object(precisions: dict[str, Path]) -> None:
    """The checks themselves: int8 graphs as they are for CPUs do not pass, nor does an operator that TensorRT lacks."""
    found = objections(onnx.load(precisions["int8"] / "encoder.onnx"))
    assert any("the zero point is 0" in line for line in found) and any("UINT8 inside" in line for line in found)
    text = '<ir_version: 10, opset_import: ["": 20]> g (float[n] x) => (int64[m, n] y) { y = NonZero(x) }'
    assert objections(onnx.parser.parse_model(text)) == ["NonZero y: no such operator"]
    text = '<ir_version: 10, opset_import: ["": 20]> g (uint8[1, 4, 2, 2] x) => (uint8[1, 1, 4, 4] y) { y = DepthToSpace<blocksize=2>(x) }'
    model, types = with_types(onnx.parser.parse_model(text))
    assert not_in_table(model.graph.node[0], types, KERNELS) == ["DepthToSpace y: UINT8 x"]


@pytest.mark.parametrize("name", ["fp32", "odd", *PRECISIONS])
def test_graphs_for_tensorrt_give_the_same_values(precisions: dict[str, Path], tmp_path: Path, name: str) -> None:
    """A whole run on graphs as TensorRT gets them, every node computed as it is written: nothing differs."""
    manifest = read_manifest(precisions[name])
    signed = Path(shutil.copytree(precisions[name], tmp_path / "signed"))
    for graph in GRAPHS:
        path = prepare(manifest, graph, tmp_path / "graphs").path
        if path.parent != manifest.folder:
            shutil.copy(path, signed / path.name)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    found = []
    for folder in (precisions[name], signed):
        backend = HostBackend(dataclasses.replace(manifest, folder=folder), options=options)
        with Pipeline(manifest, backend) as pipeline:
            found.append((pipeline.generate_tokens([1, 2, 3], seed=0), pipeline.generate([1, 2, 3], seed=0)))
    for one, other in zip(*found, strict=True):
        assert (one == other).all()


@pytest.mark.parametrize("name", ["fp32", *PRECISIONS])
def test_graphs_have_the_form_that_tensorrt_fuses(precisions: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Queries and keys with the same rows, products and softmax of one type, and a name for every weight."""
    manifest = read_manifest(precisions[name])
    for graph, depth in (("encoder", manifest.model.encoder_depth), ("decoder", manifest.model.decoder_depth)):
        own, model = ir.load(manifest.path(f"{graph}.onnx")).graph, prepare(manifest, graph, tmp_path).load().graph
        wanted = ir.DataType.FLOAT16 if name in ("fp16", "int8-fp16") else ir.DataType.FLOAT
        softmaxes = [node for node in model if node.op_type == "Softmax"]
        assert len(softmaxes) == depth
        for node in softmaxes:
            scores, (product,) = node.inputs[0].producer(), [user for user, _ in node.outputs[0].uses()]
            assert scores.op_type == product.op_type == "MatMul"
            assert {value.dtype for value in (*scores.inputs, *node.inputs, *node.outputs, *product.inputs)} == {wanted}
        assert sum(node.op_type == "Min" for node in own) == 1 and not any(node.op_type == "Min" for node in model)
        norms = [node for node in model if node.op_type == "LayerNormalization"]
        assert norms and all(len(node.inputs) == 3 and node.inputs[2].is_initializer() for node in norms)


def test_graphs_that_say_it_otherwise_stay_as_they_are() -> None:
    """An engine may hold graphs that were not traced here."""
    text = """<ir_version: 10, opset_import: ["": 20]> g (float[batch, n] x, float[rows, 1] decoder_modulation) => (float[rows, n] y) {
        twice = Concat <axis = 0> (x, x)
        y = Mul (twice, decoder_modulation)
    }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    count_rows_once(model)
    assert [node.op_type for node in model.graph] == ["Concat", "Mul"]


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_weights_are_not_written_again(precisions: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """External data of an engine stays where it is."""
    monkeypatch.setattr("enat.graph_file.EXTERNAL_DATA_FROM", 0)
    engine = Path(shutil.copytree(precisions[name], tmp_path / "engine"))
    for graph in ("encoder", "decoder"):
        save(ir.load(engine / f"{graph}.onnx"), engine / f"{graph}.onnx")
    manifest = read_manifest(list_anew(engine))
    for graph in ("encoder", "decoder"):
        whole = onnx.load(engine / f"{graph}.onnx")
        (tmp_path / f"{graph}, another name").hardlink_to(engine / f"{graph}.onnx.data")  # as a model repository has of an engine's files
        prepared = prepare(manifest, graph, tmp_path / "graphs")
        assert prepared.data_of == engine / f"{graph}.onnx"
        assert prepared.path.stat().st_size < 0.7 * (engine / f"{graph}.onnx.data").stat().st_size
        assert not (tmp_path / "graphs" / f"{graph}.onnx.data").exists()
        found = {name: value.const_value.numpy() for name, value in prepared.load().graph.initializers.items()}
        for one in whole.graph.initializer:
            if one.name in found:
                assert np.array_equal(found[one.name], onnx.numpy_helper.to_array(one)), one.name


# Profiles


def test_profiles_follow_the_schedule(manifest: Manifest) -> None:
    length = manifest.model.length
    profiles = graph_profiles(manifest, [8], [(1, 4, 16)], modulation(manifest))
    steps = schedule(length, 8, 1, 1, 1)
    assert {name: len(own) for name, own in profiles.items()} == {
        "condition": 1,
        "encoder": 8,
        "decoder": 9,
        "sampler": 9,
        "image_decoder": 1,
        "image_encoder": 1,
    }
    first, *later, general = profiles["decoder"]
    assert first["features"] == ((1, 0, 48), (4, 1, 48), (16, 1, 48))  # no guidance at step 0, and nothing visible: 0 or 1
    for step, one in zip(steps[1:], later, strict=True):
        assert one["positions"] == ((1, step.masked), (4, step.masked), (16, step.masked))
        assert one["features"] == ((1, step.visible, 48), (8, step.visible, 48), (32, step.visible, 48))
    for step, one in zip(steps[1:], profiles["encoder"]):
        assert [shape[1] for shape in one["tokens"]] == [step.new] * 3
        assert [shape[1] for shape in one["features"]] == ([step.seen] * 3 if step.seen else [0, 1, 1])
    for step, one in zip(steps, profiles["sampler"]):
        assert one["keep"] == (((step.keep,),) * 3 if step.keep else ((0,), (1,), (1,)))
    assert general["features"][0][1] == 0 and general["features"][2] == (32, length, 48)


def test_every_range_of_batches_has_profiles(manifest: Manifest) -> None:
    """Of every graph; one for anything else covers them all."""
    profiles = graph_profiles(manifest, [4], [(1, 1, 1), (2, 4, 16)], modulation(manifest))
    rows = {"condition": "labels", "image_encoder": "images"}
    for graph, own in profiles.items():
        sizes = [tuple(shape[0] for shape in one[rows.get(graph, "positions")]) for one in own]
        if graph == "condition":
            assert sizes == [(1, 2, 2), (2, 8, 32)]
        elif graph.startswith("image"):
            assert sizes == [(1, 1, 1), (2, 4, 16)]
        else:
            assert {(1, 1, 1), (2, 4, 16)} == set(sizes[:-1]) and sizes[-1] == (1, 1, 16), graph


def test_runs_of_other_lengths_share_what_they_can(manifest: Manifest) -> None:
    both = graph_profiles(manifest, [4, 8, 8], [(1, 1, 4)], modulation(manifest))
    separate = [graph_profiles(manifest, [number], [(1, 1, 4)], modulation(manifest)) for number in (4, 8)]
    for graph, own in both.items():
        assert len(own) == len({json.dumps(one) for one in own})
        for others in separate:
            assert all(one in own for one in others[graph])


@given(steps=st.integers(1, 64), batch=st.integers(1, 6), guidance=st.sampled_from([0.0, 2.5]))
@settings(max_examples=25)
def test_profiles_cover_whatever_the_loop_asks(engines: Callable[[str], Path], steps: int, batch: int, guidance: float) -> None:
    """Every call of a real run lies within a profile: of its own step where steps were named, else within the general one."""
    manifest = read_manifest(engines("tiny"))
    exact = graph_profiles(manifest, [steps], [(1, 2, 6)], modulation(manifest))
    general = {graph: own[-1:] for graph, own in graph_profiles(manifest, [], [(1, 2, 6)], modulation(manifest)).items()}
    for graph, shapes in calls(manifest, steps, batch, guidance):
        found = covering_profile(exact[graph], shapes)
        assert found is not None
        if graph in ("encoder", "decoder", "sampler"):
            assert found < len(exact[graph]) - 1, f"{graph} {shapes} has no profile of its own"
        assert covering_profile(general[graph], shapes) == 0


def calls(manifest: Manifest, steps: int, batch: int, guidance: float) -> list[tuple[str, dict[str, tuple[int, ...]]]]:
    result = []

    class Listening(HostLane):
        def run(self, graph: str, inputs: Mapping[str, Any]) -> Any:
            values = {name: (int(one),) if isinstance(one, np.ndarray) else one.shape for name, one in inputs.items()}
            result.append((graph, values))
            return super().run(graph, inputs)

    backend = HostBackend(manifest)
    backend.lanes.make = lambda: Listening(manifest, HostDevice(), backend.sessions, "cpu")
    with Pipeline(manifest, backend) as pipeline:
        pipeline.generate(list(range(batch)), seed=0, steps=steps, guidance=guidance, batch_size=batch)
    return result


@pytest.mark.parametrize("name", ["fp32", "odd", *PRECISIONS])
def test_profiles_shapes(precisions: dict[str, Path], tmp_path: Path, name: str) -> None:
    """The least, best and largest shapes of every profile, on graphs as TensorRT gets them: ONNX's shape inference agrees with them, and so
    does a run.
    """
    manifest = read_manifest(precisions[name])
    profiles = graph_profiles(manifest, [2, 8], [(1, 2, 4)], modulation(manifest))
    for graph, own in profiles.items():
        original = onnx.load(prepare(manifest, graph, tmp_path).path)
        session = ort.InferenceSession(original.SerializeToString(), providers=["CPUExecutionProvider"])
        for one in own:
            for which in range(3):
                shapes = {name: shapes[which] for name, shapes in one.items()}
                inputs = arrays(session, shapes)
                wanted = output_shapes(manifest, graph, inputs, lambda: modulation(manifest))
                found = session.run(None, inputs)
                assert [(value.shape, value.dtype) for value in found] == [(shape, np.dtype(dtype)) for shape, dtype in wanted.values()]
                for port, (shape, _) in zip(inferred(original, shapes).output, wanted.values(), strict=True):
                    known = [dim.dim_value if dim.HasField("dim_value") else None for dim in port.type.tensor_type.shape.dim]
                    assert all(size in (None, right) for size, right in zip(known, shape, strict=True)), (graph, shapes, port.name)


def arrays(session: ort.InferenceSession, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Inputs of these shapes: every position once, else zeros and halves. `keep` is what its shape says."""
    result = {}
    for port in session.get_inputs():
        dtype = {"tensor(int64)": np.int64, "tensor(uint8)": np.uint8, "tensor(float16)": np.float16}.get(port.type, np.float32)
        shape = shapes.get(port.name, ())
        if port.name == "keep":
            result[port.name] = np.array(shape[0], np.int64)
        elif port.name == "positions":
            result[port.name] = np.tile(np.arange(shape[1]), (shape[0], 1))
        else:
            result[port.name] = np.full(shape, 0.5, dtype)
    return result


def inferred(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> onnx.GraphProto:
    """What follows from these shapes of a graph's inputs. Its own dimensions must agree with them."""
    changed = onnx.ModelProto.FromString(model.SerializeToString())
    del changed.graph.value_info[:]
    for port in changed.graph.input:
        if port.name in shapes and port.name != "keep":
            for dim, size in zip(port.type.tensor_type.shape.dim, shapes[port.name], strict=True):
                assert not dim.dim_value or dim.dim_value == size, port.name
                dim.dim_value = size
    for port in changed.graph.output:
        for dim in port.type.tensor_type.shape.dim:
            dim.ClearField("dim_param")
    return onnx.shape_inference.infer_shapes(changed, strict_mode=True, data_prop=True).graph


def test_what_profiles_refuse(manifest: Manifest) -> None:
    with pytest.raises(InputError, match="expected 1 to 64 steps, got 65"):
        graph_profiles(manifest, [65], [(1, 1, 1)], modulation(manifest))
    with pytest.raises(InputError, match="1 ≤ least ≤ best ≤ most, got 1, 8, 4"):
        graph_profiles(manifest, [8], [(1, 8, 4)], modulation(manifest))
    large = dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, grid=62))
    with pytest.raises(InputError, match=f"3844 tokens an image; TensorRT sorts at most {TOPK_LIMIT}"):
        graph_profiles(large, [8], [(1, 1, 1)], modulation(manifest))
