"""Statistics, smoothing, quantization and sensitivity: properties, and graphs that must compute the same."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from conftest import read_golden
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from enat import Pipeline
from enat.calibration.calibrate import (
    Settings,
    calibrate,
    fingerprint,
    load_calibration,
    measure_harm,
    named_groups,
    quantized_graphs,
    save_calibration,
    shared_settings,
)
from enat.calibration.products import Graphs, Group, Product, find_groups, find_products, int8_share, load_graphs, multiply_adds
from enat.calibration.quantize import INPUT_LIMIT, WEIGHT_LIMITS, constant, quantize, quantize_channels, quantize_columns, quantize_tables
from enat.calibration.sensitivity import NOTABLE, PICTURE_ERROR, SwitchedLane, harms, keep_float
from enat.calibration.smooth import LARGEST_FACTOR, Factors, factors, smooth
from enat.calibration.statistics import BINS, Statistic, entropy, min_max, percentile
from enat.calibration.tapped import TappedLane
from enat.calibration.trajectory import Trajectory, divergence, guided, record, replay, replayed_logits, spread_labels
from enat.errors import ExportError, InputError
from enat.export.convert import Precision, calibration_labels, convert_engine
from enat.export.directory import write_manifest
from enat.export.layers import layer_errors
from enat.runtime.backends.onnxruntime_cpu import OnnxRuntimeLane
from enat.runtime.manifest import FILE
from enat.runtime.schedule import schedule

SEED = 7


def filled(values: np.ndarray) -> Statistic:
    result = Statistic()
    result.add(values.astype(np.float32)[:, None], -1)
    return result


# Statistics


@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 40), st.integers(1, 4)), elements=st.floats(-1e4, 1e4, width=32)),
    st.lists(st.integers(0, 40), max_size=4),
)
def test_a_statistic_does_not_depend_on_the_chunks(values: np.ndarray, cuts: Sequence[int]) -> None:
    whole, parts = Statistic(), Statistic()
    whole.add(values, -1)
    for chunk in np.split(values, sorted(cuts)):
        parts.add(chunk, -1)
    assert parts.values == whole.values == values.size
    assert np.array_equal(parts.channel_max, np.abs(values).max(0))  # type: ignore[arg-type]
    assert parts.counts.sum() == values.size
    assert parts.limit == whole.limit
    for share in (10, 50, 90):  # a value may fall beside a bin's edge when the range was narrower before
        assert percentile(parts, share) == pytest.approx(percentile(whole, share), abs=1.01 * whole.limit / BINS)


def test_channels_of_pictures() -> None:
    statistic = Statistic()
    statistic.add(np.arange(24, dtype=np.float32).reshape(1, 3, 2, 4), 1)
    assert statistic.channel_max is not None
    assert statistic.channel_max.tolist() == [7, 15, 23]
    statistic.add(np.zeros((1, 3, 0, 4), np.float32), 1)
    assert statistic.values == 24


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        filled(np.array([1.0, value]))


def test_ranges() -> None:
    values = np.random.default_rng(0).normal(size=200_000)
    statistic = filled(values)
    assert min_max(statistic) == pytest.approx(np.abs(values).max(), rel=1e-6)
    for share in (50, 99, 99.99):
        assert percentile(statistic, share) == pytest.approx(np.percentile(np.abs(values), share), abs=2 * statistic.limit / BINS)
    assert percentile(statistic) == percentile(statistic, 99.99)
    assert min_max(Statistic()) == entropy(Statistic()) == 0
    assert min_max(filled(np.zeros(5))) == percentile(filled(np.zeros(5))) == 0


@pytest.mark.parametrize("distribution", ["normal", "laplace", "outliers"])
def test_entropy_agrees_with_onnxruntime(distribution: str) -> None:
    """ONNX Runtime's search on a histogram of the signed values, with as many levels, ends at nearly the same range."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    rng = np.random.default_rng(1)
    values = {
        "normal": rng.normal(size=100_000),
        "laplace": rng.laplace(size=100_000),
        "outliers": np.append(rng.normal(size=100_000), [12.0, -15.0, 15.9]),
    }[distribution].astype(np.float32)
    limit = float(2 ** np.ceil(np.log2(np.abs(values).max())))
    counts, edges = np.histogram(values, bins=2 * 512, range=(-limit, limit))
    collector = HistogramCollector("entropy", True, 1024, 255, 99.99, "same")
    low, high = collector.get_entropy_threshold((counts, edges, values.min(), values.max(), limit), 255)
    assert entropy(filled(values)) == pytest.approx(max(-low, high), rel=0.15)


# Quantized numbers


@given(
    arrays.arrays(np.float32, (6, 5), elements=st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-20)),
    st.sampled_from([0, 1]),
    st.sampled_from([7, 8]),
)
def test_weights_are_rounded_to_the_nearest_level(weights: np.ndarray, axis: int, bits: int) -> None:
    levels, scales = quantize_channels(weights, axis, WEIGHT_LIMITS[bits])
    assert levels.dtype == np.int8
    assert np.abs(levels.astype(int)).max() <= WEIGHT_LIMITS[bits]
    shape = (-1, 1) if axis == 0 else (1, -1)
    error = np.abs(levels * scales.reshape(shape) - weights)
    assert (error <= 0.5001 * scales.reshape(shape)).all()


def test_channels_that_are_dead_but_for_their_bias() -> None:
    """ONNX Runtime takes a bias in 32 bits, in steps of the input's scale times the weights' scale of the channel."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(8, 4, 3, 3)).astype(np.float32)
    weights[::2] *= 1e-12
    bias = rng.normal(size=8).astype(np.float32)
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 20]> g (float[1, 4, 6, 6] a) => (float[1, 8, 6, 6] y) {
        x = Identity(a)
        z = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w, b)
        y = Neg(z)
    }""")
    model.graph.initializer.extend([onnx.numpy_helper.from_array(weights, "w"), onnx.numpy_helper.from_array(bias, "b")])
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    next(node for node in graph.graph if node.op_type == "Conv").name = "conv"
    graph.graph.initializers["w"].name = "conv.weight"
    product = Product("conv", "image_decoder", "Conv", "x", "z", weights.size, False, 36)
    ranges = {("image_decoder", "x"): 4.0, ("image_decoder", "z"): 40.0}
    quantized = quantize({"image_decoder": graph}, [Group("image_decoder", "x", (product,))], ranges)["image_decoder"]
    inputs = {"a": rng.normal(size=(1, 4, 6, 6)).astype(np.float32)}
    expected, found = (ort.InferenceSession(ir.to_proto(one).SerializeToString()).run(None, inputs)[0] for one in (graph, quantized))
    assert np.abs(found - expected).max() < 0.4


def test_a_convolution_behind_another_one() -> None:
    """What the first gives is quantized once."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 20]> g (float[1, 2, 4, 4] a) => (float[1, 2, 4, 4] y) {
        x = Identity(a)
        z = Conv<kernel_shape = [1, 1]>(x, v)
        w = Conv<kernel_shape = [1, 1]>(z, u)
        y = Neg(w)
    }""")
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    products = []
    for node, name, (value, result) in zip(list(graph.graph)[1:3], ("first", "second"), (("x", "z"), ("z", "w")), strict=True):
        node.name = name
        own = constant(graph.graph, f"{name}.weight", rng.normal(size=(2, 2, 1, 1)).astype(np.float32))
        node.replace_input_with(1, own)
        products.append(Product(name, "image_decoder", "Conv", value, result, 4, False, 16))
    groups = [Group("image_decoder", product.input, (product,)) for product in products]
    quantized = quantize({"image_decoder": graph}, groups, ranges_of(groups))["image_decoder"]
    assert [str(node.inputs[0].name) for node in quantized.graph if node.op_type == "QuantizeLinear" and node.inputs[0]] == ["x", "z", "w"]


@given(arrays.arrays(np.float32, (7, 3, 2), elements=st.floats(-10, 10, width=32)))
def test_tables_are_rounded_to_the_nearest_level(table: np.ndarray) -> None:
    levels, scales, middle = quantize_columns(table)
    assert (np.abs(levels * scales + middle - table) <= 0.5001 * scales + 1e-5).all()


# Graphs


@pytest.fixture(scope="module")
def pipe(engines: Callable[[str], Path]) -> Pipeline:
    return Pipeline.load(engines("odd"))


@pytest.fixture(scope="module")
def graphs(pipe: Pipeline) -> Graphs:
    return load_graphs(pipe.manifest)


@pytest.fixture(scope="module")
def groups(graphs: Graphs) -> list[Group]:
    return find_groups(find_products(graphs))


@pytest.fixture(scope="module")
def trajectories(pipe: Pipeline) -> list[Trajectory]:
    return record(pipe, spread_labels(pipe.manifest.model, 8), SEED, batch_size=4)


def network_logits(pipe: Pipeline, graphs: Graphs, trajectory: Trajectory, folder: Path) -> list[np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    quantized = dataclasses.replace(pipe.manifest, precision="int8")  # so that no sum is lost where kernels saturate
    return replayed_logits(TappedLane(quantized, graphs, folder), pipe.manifest, trajectory)


def own_logits(pipe: Pipeline, trajectory: Trajectory) -> list[np.ndarray]:
    with pipe.backend.lease() as lane:
        return replayed_logits(lane, pipe.manifest, trajectory)


def test_every_product_of_the_network_is_found(pipe: Pipeline, groups: list[Group]) -> None:
    model = pipe.manifest.model
    names = [product.name for group in groups for product in group.products if product.graph in ("encoder", "decoder")]
    assert len(names) == len(set(names)) == 2 + 8 * (model.encoder_depth + model.decoder_depth) + 2
    assert "blocks.0.attn.{own_key,own_value,q}" in [group.name for group in groups]


def test_a_replay_gives_what_the_loop_saw(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits at the same positions, step by step."""
    seen: list[np.ndarray] = []
    run = OnnxRuntimeLane.run

    def listening(lane: OnnxRuntimeLane, graph: str, inputs: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        outputs = run(lane, graph, inputs)
        if graph == "decoder":
            positions = np.resize(inputs["positions"], outputs[0].shape[:2])
            raster = np.zeros((len(positions), pipe.manifest.model.length, outputs[0].shape[2]), np.float32)
            np.put_along_axis(raster, positions[..., None], outputs[0], axis=1)
            seen.append(raster)
        return outputs

    monkeypatch.setattr(OnnxRuntimeLane, "run", listening)
    (one,) = record(pipe, [1, 2], SEED, batch_size=2)
    drawn = len(seen)
    with pipe.backend.lease() as lane:
        replay(lane, pipe.manifest, one)
    assert drawn == len(one.steps) == len(seen) - drawn
    for found, expected in zip(seen[drawn:], seen[:drawn], strict=True):
        assert np.abs(found - expected).max() < 1e-5
        assert np.array_equal(found == 0, expected == 0)


def test_divergence() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 3, 10)).astype(np.float32)
    assert np.abs(divergence(logits + 3, logits)).max() < 1e-9
    other = np.random.default_rng(1).normal(size=(2, 3, 10)).astype(np.float32)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (logits.astype(np.float64), other.astype(np.float64)))
    assert np.allclose(divergence(other, logits), (p * np.log(p / q)).sum(-1))


def test_guidance_leads_from_the_logits_without_a_class() -> None:
    """As conditional + guidance · (conditional − unconditional), the conditional rows first; without guidance there are no others."""
    step = dataclasses.replace(schedule(4, 2, 1.0, 1.0, 1.0)[1], guidance=2.0)
    logits = np.array([[[1.0, 5.0]], [[0.5, 6.0]]], np.float32)
    assert guided(logits, step, 1).tolist() == [[[1 + 2 * 0.5, 5 - 2 * 1.0]]]
    assert guided(logits[:1], step, 1).tolist() == [[[1.0, 5.0]]]


def test_multiply_adds(pipe: Pipeline, graphs: Graphs, groups: list[Group], trajectories: list[Trajectory], tmp_path: Path) -> None:
    """Counted from the schedule as from the numbers that the products really give."""
    one = trajectories[0]
    products = [product for group in groups for product in group.products]
    seen = dict.fromkeys(((product.graph, product.output) for product in products), 0)

    def watch(graph: str, name: str, value: np.ndarray) -> None:
        axis = 1 if graph == "image_decoder" else -1
        seen[graph, name] += value.size // value.shape[axis]

    taps = {name: [product.output for product in products if product.graph == name] for name in ("encoder", "decoder", "image_decoder")}
    lane = TappedLane(pipe.manifest, graphs, tmp_path, taps, watch)
    replay(lane, pipe.manifest, one)
    lane.run("image_decoder", {"tokens": one.tokens, "positions": one.positions})
    for product in products:
        assert multiply_adds(product, one.steps) * len(one.labels) == seen[product.graph, product.output] * product.weights, product


def random_factors(graphs: Graphs) -> list[Factors]:
    """Of all groups whose inputs can be divided."""
    rng = np.random.default_rng(0)
    result = []
    for group in find_groups(find_products(graphs)):
        statistic = Statistic()
        weights = graphs[group.graph].graph.initializers[f"{group.products[0].name}.weight"].const_value
        assert weights is not None
        statistic.add(np.exp(2 * rng.normal(size=(3, weights.shape[0]))).astype(np.float32), -1)
        if found := factors(graphs, group, statistic, 0.5):
            result.append(found)
    layers = {product.name.rpartition(".")[2] for one in result for product in one.group.products}
    assert layers == {"q", "own_key", "own_value", "context_key", "context_value", "proj", "fc1", "fc", "words"}
    return result


def compute_the_same(pipe: Pipeline, graphs: Graphs, others: Graphs, trajectory: Trajectory, folder: Path) -> bool:
    before = network_logits(pipe, graphs, trajectory, folder / "before")
    after = network_logits(pipe, others, trajectory, folder / "after")
    return all(np.abs(one - other).max() < 1e-4 * max(1, np.abs(other).max()) for one, other in zip(after, before, strict=True))


def test_smoothing_changes_no_result(pipe: Pipeline, graphs: Graphs, trajectories: list[Trajectory], tmp_path: Path) -> None:
    smoothed = smooth(graphs, random_factors(graphs), pipe.manifest.model)
    assert compute_the_same(pipe, graphs, smoothed, trajectories[0], tmp_path)
    changed = smoothed["encoder"].graph.initializers["blocks.0.attn.q.weight"].const_value
    original = graphs["encoder"].graph.initializers["blocks.0.attn.q.weight"].const_value
    assert changed is not None and original is not None
    assert not np.allclose(changed.numpy(), original.numpy())


@pytest.mark.parametrize("layers", [r"prev_proj\.norm", r"(.*\.)?(norm|ln|LayerNorm)", r".*(norm|ln|LayerNorm|value|kv\.\w|fc1)"])
def test_smoothing_of_equal_weights(layers: str, tmp_path: Path) -> None:
    """As they are before a training, LayerNorms of ones and biases of zeros, which the exporter makes one of each: some weights are others'
    too then, some have another's name."""
    torch = pytest.importorskip("torch")
    from enat.export.engine import export_engine

    case = read_golden("odd")
    state = torch.load(case.ckpt, weights_only=True)
    for name, values in state.items():
        layer, _, part = name.rpartition(".")
        if re.fullmatch(layers, layer):
            values.fill_(0) if part == "bias" else values.fill_(1) if values.ndim == 1 else None
    torch.save(state, tmp_path / "net.pth")
    export_engine(tmp_path / "net.pth", tmp_path / "engine", sampling=case.sampling, **case.split)
    with Pipeline.load(tmp_path / "engine") as pipe:
        graphs = load_graphs(pipe.manifest)
        users = [
            len(value.uses())
            for value in graphs["encoder"].graph.initializers.values()
            if value.shape == ir.Shape([pipe.manifest.model.dim])
        ]
        assert max(users) > 1
        (trajectory,) = record(pipe, [1, 2], SEED, batch_size=2)
        smoothed = smooth(graphs, random_factors(graphs), pipe.manifest.model)
        assert compute_the_same(pipe, graphs, smoothed, trajectory, tmp_path)


@pytest.mark.parametrize("case", ["projections", "keys and values"])
def test_narrow_networks_with_equal_weights(case: str, tmp_path: Path) -> None:
    """Matrices of up to 1,024 numbers that are equal, as of zeros, the exporter makes one of, and one product of equal ones of the same
    input."""
    torch = pytest.importorskip("torch")
    from enat.export.engine import export_engine
    from enat.models.config import NetworkConfig
    from enat.models.network import Network

    torch.manual_seed(0)
    network = Network(NetworkConfig(4, 32, 2, 1, 2, 16, 3))
    for name, values in network.named_parameters():
        values.data = 0.2 * torch.randn_like(values) if values.ndim > 1 else values.data + 0.1 * torch.randn_like(values)
        if ("attn.proj.weight" if case == "projections" else "attn.kv.A.weight") in name:
            values.data.zero_()
    torch.save(network.state_dict(), tmp_path / "net.pth")
    export_engine(tmp_path / "net.pth", tmp_path / "engine", heads=2, encoder_depth=1)
    settings = Settings(images=8, float_layers=())
    convert_engine(tmp_path / "engine", tmp_path / "fp16", Precision("fp16"), settings)
    compared = convert_engine(tmp_path / "engine", tmp_path / "int8", Precision("int8"), settings)
    assert compared.divergence < 0.01


def test_smoothing_evens_channels_out(graphs: Graphs, groups: list[Group]) -> None:
    """By as much of the inputs' range as is asked for, and never by more than float16 holds."""
    group = next(group for group in groups if group.name.endswith("mlp.fc1") and group.graph == "decoder")
    weights = graphs["decoder"].graph.initializers[f"{group.name}.weight"].const_value
    assert weights is not None

    def values(channels: np.ndarray, alpha: float) -> np.ndarray:
        statistic = Statistic()
        statistic.add(channels[None], -1)
        found = factors(graphs, group, statistic, alpha)
        assert found is not None
        return found.values

    channels = np.ones(weights.shape[0], np.float32)
    channels[3] = 100
    divided = channels / values(channels, 0.5)
    assert divided.max() / np.median(divided) < 15
    assert np.exp(np.log(values(channels, 0.5)).mean()) == pytest.approx(1, rel=1e-4)
    channels = np.exp(np.random.default_rng(0).normal(size=len(channels))).astype(np.float32)
    wanted = channels**0.7 / np.abs(weights.numpy()).max(1) ** 0.3
    assert np.allclose(values(channels, 0.7), wanted / np.exp(np.log(wanted).mean()), rtol=1e-4)
    channels[3] = 1e12
    assert values(channels, 0.7).max() == LARGEST_FACTOR


def ranges_of(groups: Sequence[Group], limit: float = 4.0) -> dict[tuple[str, str], float]:
    keys = [(group.graph, name) for group in groups for name in (group.input, *(product.output for product in group.products))]
    return dict.fromkeys(keys, limit)


def test_the_form_of_quantized_graphs(graphs: Graphs, groups: list[Group]) -> None:
    """Weights symmetric, one scale an output channel; inputs unsigned with zero point 128 and one scale; matrix products give floats."""
    quantized = quantize(graphs, groups, ranges_of(groups))
    for name in ("encoder", "decoder", "image_decoder"):
        graph = quantized[name].graph
        products = [
            node for node in graph if node.op_type in ("MatMul", "Conv") and str(node.name) in {p.name for g in groups for p in g.products}
        ]
        assert products
        for node in products:
            assert node.inputs[0] is not None and node.inputs[1] is not None
            x, w = node.inputs[0].producer(), node.inputs[1].producer()
            assert x is not None and w is not None
            assert x.op_type == w.op_type == "DequantizeLinear"
            q = x.inputs[0].producer()  # type: ignore[union-attr]
            assert q is not None and q.op_type == "QuantizeLinear"
            for pair in (q, x):
                scale, zero = (value.const_value.numpy() for value in pair.inputs[1:])  # type: ignore[union-attr]
                assert scale.shape == () and zero.shape == () and zero.dtype == np.uint8 and zero == 128
            levels, scales = (value.const_value.numpy() for value in w.inputs)  # type: ignore[union-attr]
            axis = 0 if node.op_type == "Conv" else 1
            assert levels.dtype == np.int8 and scales.shape == (levels.shape[axis],)
            assert len(w.inputs) == 2 and w.attributes["axis"].as_int() == axis
            followers = {user.op_type for user, _ in node.outputs[0].uses()}
            assert ("QuantizeLinear" in followers) == (node.op_type == "Conv")
        assert not any(value.name.endswith("_float") for value in graph.initializers.values())  # type: ignore[union-attr]
    found = find_products(quantized)
    assert [product.name for product in found] == [product.name for product in find_products(graphs)]
    assert all(product.quantized for product in found)


def test_what_was_always_0(graphs: Graphs, groups: list[Group]) -> None:
    """Any scale serves, but one that float16 does not hold."""
    quantized = quantize(graphs, groups, ranges_of(groups, 0.0))["decoder"].graph
    scales = [node.inputs[1].const_value.numpy() for node in quantized if node.op_type == "QuantizeLinear"]  # type: ignore[union-attr]
    assert scales and all(scale == 1 for scale in scales)


def test_the_original_stays_as_it_was(pipe: Pipeline, graphs: Graphs, groups: list[Group]) -> None:
    quantize(graphs, groups, ranges_of(groups))
    assert find_groups(find_products(graphs)) == groups
    assert find_groups(find_products(load_graphs(pipe.manifest))) == groups


def test_modulation_tables_in_8_bits(pipe: Pipeline, graphs: Graphs, tmp_path: Path) -> None:
    lane = TappedLane(pipe.manifest, {"condition": quantize_tables(graphs["condition"])}, tmp_path)
    labels = {"labels": np.arange(pipe.manifest.model.num_classes + 1)}
    with pipe.backend.lease() as own:
        both = zip(lane.run("condition", labels), own.run("condition", labels), strict=True)
    for found, expected in both:
        assert found.shape == expected.shape and found.dtype == expected.dtype
        step = (expected.max(0) - expected.min(0)) / (2 * INPUT_LIMIT)
        assert (np.abs(found - expected) <= 0.51 * step + 1e-6).all()


def test_switches(pipe: Pipeline, graphs: Graphs, groups: list[Group], trajectories: list[Trajectory], tmp_path: Path) -> None:
    """All off, a switched graph computes what the float one does; one on, what a graph does in which that group alone is quantized."""
    one, ranges = trajectories[0], ranges_of(groups)
    (tmp_path / "switched").mkdir()
    lane = SwitchedLane(pipe.manifest, graphs, groups, ranges, 8, tmp_path / "switched")
    for found, expected in zip(replayed_logits(lane, pipe.manifest, one), own_logits(pipe, one), strict=True):
        assert np.abs(found - expected).max() < 1e-5
    for group in (groups[0], next(group for group in groups if group.name == "mlm_layer.words")):
        lane.on(group)
        alone = network_logits(pipe, quantize(graphs, [group], ranges), one, tmp_path / group.graph)
        for found, expected in zip(replayed_logits(lane, pipe.manifest, one), alone, strict=True):
            # Kernels round differently, which may turn a level of another input: a few logits may be a level apart.
            assert np.abs(found - expected).mean() < 1e-3 * np.abs(expected).mean()
    harm = harms(lane, pipe.manifest, trajectories[:1])
    assert set(harm) == {group.name for group in groups}
    assert all(value > 0 for name, value in harm.items() if not name.startswith("prev_proj"))


def product(name: str, graph: str) -> Product:
    return Product(name, graph, "MatMul", f"in {name}", f"out {name}", 1, False, "masked")


def test_what_stays_in_float() -> None:
    groups = [Group(graph, name, (product(name, graph),)) for name, graph in zip("abcdef", ("encoder",) * 4 + ("image_decoder",) * 2)]
    work = {"a": 50, "b": 4, "c": 4, "d": 42, "e": 95, "f": 5}
    # The worst does too much of the work, the mild ones too little harm.
    harm = {"a": 100.0, "b": 50.0, "c": 20.0, "d": 170 * NOTABLE / 2, "e": 0.1, "f": 5.0}
    assert [group.name for group in keep_float(groups, harm, work)] == ["b", "c", "f"]
    # Where pictures would not stay as they are, the whole image decoder stays in float.
    harm |= {"e": 2 * PICTURE_ERROR, "f": PICTURE_ERROR}
    assert {group.name for group in keep_float(groups, harm, work)} == {"b", "c", "e", "f"}


# Calibration, whole


SETTINGS = Settings(images=8, float_layers=())


def test_calibration_is_deterministic(pipe: Pipeline, graphs: Graphs, trajectories: list[Trajectory], tmp_path: Path) -> None:
    first, second = (calibrate(pipe.manifest, graphs, trajectories, SETTINGS, tmp_path) for _ in range(2))
    assert first.ranges == second.ranges
    assert all(np.array_equal(first.factors[name], second.factors[name]) for name in first.factors)
    save_calibration(first, tmp_path / "calibration.npz")
    read = load_calibration(tmp_path / "calibration.npz", pipe.manifest, SETTINGS, graphs)
    assert read.ranges == first.ranges and read.settings == first.settings
    smoothed, quantized = quantized_graphs(graphs, pipe.manifest, read, pipe.schedule())
    assert int8_share(find_products(quantized), pipe.schedule()) == 1
    assert int8_share(find_products(smoothed), pipe.schedule()) == 0
    shuffles = [sum(node.op_type == "DepthToSpace" for node in one["image_decoder"].graph) for one in (smoothed, quantized)]
    assert shuffles[0] > shuffles[1] == 0  # levels are moved to their places, not floats
    assert not any(path.is_dir() for path in tmp_path.iterdir())  # copies of graphs are gone


def test_a_calibration_of_another_engine(
    pipe: Pipeline, graphs: Graphs, trajectories: list[Trajectory], tmp_path: Path, engines: Callable[[str], Path]
) -> None:
    file = tmp_path / "calibration.npz"
    save_calibration(calibrate(pipe.manifest, graphs, trajectories, SETTINGS, tmp_path), file)
    with pytest.raises(InputError, match="a calibration of another engine"):
        load_calibration(file, Pipeline.load(engines("tiny")).manifest, SETTINGS, graphs)
    with pytest.raises(InputError, match="made with the seed 0, asked for 1"):
        load_calibration(file, pipe.manifest, dataclasses.replace(SETTINGS, seed=1), graphs)
    with pytest.raises(InputError, match="without measuring sensitivity"):
        load_calibration(file, pipe.manifest, dataclasses.replace(SETTINGS, float_layers=None), graphs)
    assert shared_settings(file) == {"method": "percentile", "smoothquant": 0.7, "images": 8, "classes": None, "seed": 0}
    with np.load(file) as data:
        arrays = dict(data)
    head, name = json.loads(str(arrays["head"])), next(name for name in arrays if name.startswith("factors:"))
    for damage in (
        {"head": {**head, "ranges": [[*head["ranges"][0][:2], "1"]]}},
        {"head": {**head, "ranges": [[*head["ranges"][0][:2], float("nan")]]}},
        {"head": {**head, "harm": ["x"]}},
        {"head": {**head, "harm": {"x": 1.0}}},
        *(
            {"head": {**head, "settings": {**head["settings"], **wrong}}}
            for wrong in ({"images": "8"}, {"method": ["a"]}, {"classes": [None]})
        ),
        {name: arrays[name][:-1]},
        {name: -arrays[name]},
        {"factors:nothing": arrays[name]},
    ):
        changed = {key: np.array(json.dumps(value)) if key == "head" else value for key, value in damage.items()}
        np.savez(tmp_path / "damaged.npz", **{**arrays, **changed})
        with pytest.raises(InputError, match=r"damaged\.npz: (not a calibration written by enat-export|made with the)"):
            shared_settings(tmp_path / "damaged.npz")
            load_calibration(tmp_path / "damaged.npz", pipe.manifest, SETTINGS, graphs)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="not a calibration"):
        load_calibration(file, pipe.manifest, SETTINGS, graphs)
    file.write_bytes(b"")
    with pytest.raises(InputError, match="not a calibration"):
        load_calibration(file, pipe.manifest, SETTINGS, graphs)


def test_engines_are_told_apart(pipe: Pipeline) -> None:
    """By how they sample, and by the condition graph too, whose tables take the smoothing up."""
    one = pipe.manifest
    entry = {**one.files["condition.onnx"], "sha256": "0" * 64}
    others = (
        dataclasses.replace(one, sampling=dataclasses.replace(one.sampling, steps=one.sampling.steps + 1)),
        dataclasses.replace(one, files={**one.files, "condition.onnx": entry}),
    )
    assert len({fingerprint(manifest) for manifest in (one, *others)}) == 3


def test_what_the_engine_s_own_settings_do_not_reach_is_learned_too(engine_copy: Path, tmp_path: Path) -> None:
    """With one step by default nothing is ever encoded, and without guidance there is no null class; but others may be asked for."""
    content = json.loads((engine_copy / FILE).read_text())
    content["sampling"] |= {"steps": 1, "cfg_scale": 0}
    write_manifest(engine_copy, content)
    for kind in ("int8", "fp16"):
        convert_engine(engine_copy, tmp_path / kind, Precision(kind), Settings(images=8))
        with Pipeline.load(tmp_path / kind) as engine, Pipeline.load(engine_copy) as reference:
            products = find_products(load_graphs(engine.manifest))
            assert any(product.quantized for product in products if product.graph == "encoder") == (kind == "int8")
            (one,) = record(reference, [1, 2], SEED, 2, reference.schedule(steps=6, guidance=2))
            both = (own_logits(pipe, one) for pipe in (engine, reference))
            assert max(divergence(found, expected).mean() for found, expected in zip(*both, strict=True)) < 0.01
            assert layer_errors(engine, reference).keys() <= {product.name for product in products if product.graph == "decoder"}


def test_harm_is_measured_again_with_weights_of_other_bits(
    pipe: Pipeline, graphs: Graphs, trajectories: list[Trajectory], tmp_path: Path
) -> None:
    chosen = dataclasses.replace(SETTINGS, float_layers=None)
    saved = calibrate(pipe.manifest, graphs, trajectories, chosen, tmp_path)
    save_calibration(saved, tmp_path / "calibration.npz")
    seven = dataclasses.replace(chosen, weight_bits=7)
    read = load_calibration(tmp_path / "calibration.npz", pipe.manifest, seven, graphs)
    assert saved.harm and not read.harm
    assert (
        measure_harm(read, pipe.manifest, graphs, trajectories, tmp_path).harm
        == calibrate(pipe.manifest, graphs, trajectories, seven, tmp_path).harm
    )
    again = load_calibration(tmp_path / "calibration.npz", pipe.manifest, chosen, graphs)
    assert again.harm == saved.harm == measure_harm(again, pipe.manifest, graphs, trajectories, tmp_path).harm


def test_labels_are_spread(pipe: Pipeline) -> None:
    model = pipe.manifest.model
    assert len(set(spread_labels(model, model.num_classes - 1))) == model.num_classes - 1
    assert set(spread_labels(model, 3 * model.num_classes)) == set(range(model.num_classes))
    assert spread_labels(model, 5, [1, 2]) == [1, 2, 1, 2, 1]
    learned, spread = calibration_labels(model, Settings()), spread_labels(model, Settings().images)
    assert sorted(learned) == sorted(spread) and learned != spread
    assert set(calibration_labels(model, Settings(images=8, classes=("1", "2")))) == {1, 2}
    with pytest.raises(InputError, match="too few"):
        spread_labels(model, 1, [1, 2])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"images": 3}, "3 calibration images are too few; expected at least 8"),
        ({"method": "best"}, "expected one of minmax, percentile, entropy"),
        ({"smoothquant": 1.5}, "0 (none) to 1, got 1.5"),
        ({"weight_bits": 4}, "expected 8 or 7 bits"),
        ({"modulation": "int4"}, "expected int8 or float"),
        ({"seed": -1}, "a seed of 0 to 2**64 - 1, got -1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], words: str) -> None:
    with pytest.raises(InputError) as error:
        Settings(**settings)  # type: ignore[arg-type]
    assert words in str(error.value)


def test_unknown_layers(groups: list[Group]) -> None:
    assert [group.name for group in named_groups(groups, ["blocks.0.attn.q"])] == ["blocks.0.attn.{own_key,own_value,q}"]
    with pytest.raises(InputError, match="no layer is called 'blocks"):
        named_groups(groups, ["blocks.99"])


def test_engines_without_names_of_layers(graphs: Graphs) -> None:
    model = graphs["decoder"].clone()
    next(node for node in model.graph if node.op_type == "MatMul").name = "node_MatMul_1"
    with pytest.raises(ExportError, match="made by an older enat"):
        find_products({"decoder": model})


def test_values_inside_have_types(graphs: Graphs) -> None:
    """What precision is chosen by."""
    for name, model in graphs.items():
        for node in model.graph:
            for output in node.outputs:
                assert output.dtype is not None, (name, output.name)
                assert isinstance(output.dtype, ir.DataType)


def test_watching_starts_no_more_threads(bundled: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enat.calibration.tapped.allowed_threads", lambda: 1)
    assert TappedLane(bundled.manifest, {}, tmp_path).sessions.options.intra_op_num_threads == 1
