"""A checkpoint becomes an engine directory: traced, verified, and only then put in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from ..errors import InputError
from ..graph_file import save
from ..models.checkpoint import check_match, load_network, load_tokenizer
from ..models.network import MODULATIONS, Network
from ..models.presets import Sampling, preset, preset_class_names
from ..models.tokenizer import Tokenizer
from ..runtime.manifest import FORMAT, VERSION, ModelInfo, sha256
from ..runtime.progress import Report
from ..runtime.schedule import schedule
from . import verify
from .directory import check_target, name_leftovers, producer, put_in_place, write_manifest
from .graphs import DecoderGraph, EncoderGraph, ImageDecoderGraph, ImageEncoderGraph, lean, lean_decoder
from .tables import OPSET, condition_graph, sampler_graph
from .trace import Port, trace


def export_engine(
    ckpt: Path,
    out: Path,
    vqgan: Path | None = None,
    preset_name: str | None = None,
    heads: int | None = None,
    encoder_depth: int | None = None,
    sampling: dict[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    image_encoder: bool = True,
    force: bool = False,
    report: Report = lambda line: None,
    check: Callable[[ModelInfo], object] = lambda model: None,
) -> list[verify.Check]:
    """Exports a network, and with `vqgan` its image tokenizer, as the float32 engine directory `out`. Returns the verification's figures.

    heads, encoder_depth: as in the preset, else head_dim 64 and two decoder blocks. sampling: defaults (steps, cfg_scale, mask_temp,
    samp_temp) in place of the preset's. image_encoder: export the tokenizer's encoder too. force: replace an engine at `out`. check:
    called with what the engine's model will be, before the work begins; what it raises ends it.
    Raises CheckpointError, InputError, ExportError; whatever happens, `out` is a whole engine, or as it was.
    """
    chosen = preset(preset_name) if preset_name else None
    settings = Sampling(**{**vars(chosen.sampling if chosen else Sampling()), **(sampling or {})})
    check_target(out, force, (ckpt, vqgan))
    name_leftovers(out)
    report(f"reading {ckpt}")
    network = load_network(ckpt, heads, encoder_depth, chosen)
    config = network.config
    if "steps" not in (sampling or {}) and settings.steps > config.length:
        raise InputError(
            f"{ckpt}: its pictures have {config.length} tokens, too few for {settings.steps} steps, the default; choose --steps"
        )
    schedule(config.length, settings.steps, settings.cfg_scale, settings.mask_temp, settings.samp_temp)  # refuses what is out of range
    names = class_names if class_names is not None else preset_class_names(chosen) if chosen else None
    if names is not None and len(names) != config.num_classes:
        raise InputError(f"expected {config.num_classes} class names, got {len(names)}")
    tokenizer = None
    if vqgan:
        report(f"reading {vqgan}")
        tokenizer = load_tokenizer(vqgan)
        check_match(network, tokenizer)
    image_size = config.grid * tokenizer.config.factor if tokenizer else None
    model = ModelInfo(**vars(config), image_size=image_size, class_names=None if names is None else tuple(names))
    check(model)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "model": asdict(model),
        "sampling": vars(settings),
        "precision": "fp32",
        "float_type": "float32",
        "opset": OPSET,
        "source": {"checkpoint_sha256": sha256(ckpt), "tokenizer_sha256": sha256(vqgan) if vqgan else None},
        "producer": producer(),
    }
    with put_in_place(out, force) as folder:
        checks = write_graphs(folder, network, tokenizer, image_encoder, report)
        report("writing the manifest")
        write_manifest(folder, manifest)
    return checks


def write_graphs(folder: Path, network: Network, tokenizer: Tokenizer | None, image_encoder: bool, report: Report) -> list[verify.Check]:
    """Traces, writes and verifies every graph, one after the other so that no more than one is in memory twice."""
    config = network.config
    checks: list[verify.Check] = []

    def add(name: str, graph: ir.Model, check: Callable[..., verify.Check], *arguments: Any) -> None:
        path = folder / f"{name}.onnx"
        save(graph, path)
        checks.append(check(path, *arguments))
        report(f"  {checks[-1]}")

    modulation = network.modulation
    rng = verify.generator()

    report("condition")
    with torch.inference_mode():
        tables = modulation(torch.arange(config.num_classes + 1))
    graph = condition_graph(*(table.numpy() for table in tables))
    add("condition", graph, verify.check_graph, modulation, verify.condition_cases(config))
    del tables, graph

    report("encoder")
    encoder = EncoderGraph(network)
    with lean(network), torch.inference_mode():
        graph = trace(
            encoder,
            verify.encoder_inputs(config, modulation, rng, batch=2, rows=4, new=2, seen=3),
            [
                Port("tokens", ("batch", "new")),
                Port("positions", ("batch", "new")),
                Port("features", ("rows", "seen", config.dim)),
                Port("encoder_modulation", ("rows", config.encoder_depth, len(MODULATIONS), config.dim)),
            ],
            [Port("visible_features", ("rows", "visible", config.dim))],
        )
    add("encoder", graph, verify.check_graph, encoder, verify.encoder_cases(config, modulation))
    del graph

    report("decoder")
    decoder = DecoderGraph(network)
    with lean(network), torch.inference_mode():
        graph = trace(
            decoder,
            verify.decoder_inputs(config, modulation, rng, batch=2, rows=4, masked=2, visible=3),
            [
                Port("positions", ("batch", "masked")),
                Port("features", ("rows", "visible", config.dim)),
                Port("decoder_modulation", ("rows", config.decoder_depth, len(MODULATIONS), config.dim)),
            ],
            [Port("logits", ("rows", "masked", config.codes))],
        )
    add("decoder", graph, verify.check_graph, decoder, verify.decoder_cases(config, modulation))
    del graph

    report("sampler")
    add("sampler", sampler_graph(config.length, config.codes), verify.check_sampler, verify.sampler_cases(config))

    if tokenizer:
        size = config.grid * tokenizer.config.factor
        report("image decoder")
        tokens, positions = (Port(name, ("batch", config.length)) for name in ("tokens", "positions"))
        example = next(verify.image_decoder_cases(config.codes, config.length, batches=(2,)))
        with lean_decoder(tokenizer), torch.inference_mode():
            graph = trace(ImageDecoderGraph(tokenizer), example, [tokens, positions], [Port("images", ("batch", size, size, 3))])
        cases = verify.image_decoder_cases(config.codes, config.length)
        add("image_decoder", graph, verify.check_graph, ImageDecoderGraph(tokenizer), cases)
        if image_encoder:
            report("image encoder")
            images = Port("images", ("batch", size, size, 3))
            graph = trace(ImageEncoderGraph(tokenizer), next(verify.image_encoder_cases(size, batches=(2,))), [images], [tokens])
            add("image_encoder", graph, verify.check_image_encoder, tokenizer, verify.image_encoder_cases(size))
    return checks
