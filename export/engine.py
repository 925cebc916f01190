"""A checkpoint becomes an engine directory: traced, verified, and only then put in place."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from ..errors import ExportError, InputError, reason
from ..models.checkpoint import check_match, load_network, load_tokenizer
from ..models.network import MODULATIONS, Network
from ..models.presets import Sampling, preset, preset_class_names
from ..models.tokenizer import Tokenizer
from ..runtime.manifest import FILE, FORMAT, VERSION, file_entries, read_manifest, sha256
from ..runtime.pictures import check_writable
from ..runtime.schedule import schedule
from . import verify
from .graphs import DecoderGraph, EncoderGraph, ImageDecoderGraph, ImageEncoderGraph, lean
from .tables import OPSET, condition_graph, reference_sampler, sampler_graph
from .trace import Port, save, trace

Report = Callable[[str], None]


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
) -> list[verify.Check]:
    """Exports a network, and with `vqgan` its image tokenizer, as the engine directory `out`. Returns the verification's figures.

    heads, encoder_depth: as in the preset, else head_dim 64 and two decoder blocks. sampling: defaults (steps, cfg_scale, mask_temp,
    samp_temp) in place of the preset's. image_encoder: export the tokenizer's encoder too. force: replace an engine at `out`.
    Raises CheckpointError, InputError, ExportError; whatever happens, `out` is a whole engine, or as it was.
    """
    chosen = preset(preset_name) if preset_name else None
    settings = Sampling(**{**vars(chosen.sampling if chosen else Sampling()), **(sampling or {})})
    check_target(out, force)
    report(f"reading {ckpt}")
    network = load_network(ckpt, heads, encoder_depth, chosen)
    config = network.config
    schedule(config.length, settings.steps, settings.cfg_scale, settings.mask_temp, settings.samp_temp)  # refuses what is out of range
    names = class_names if class_names is not None else preset_class_names(chosen) if chosen else None
    if names is not None and len(names) != config.num_classes:
        raise InputError(f"expected {config.num_classes} class names, got {len(names)}")
    tokenizer = None
    if vqgan:
        report(f"reading {vqgan}")
        tokenizer = load_tokenizer(vqgan)
        check_match(network, tokenizer)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "model": {
            **vars(config),
            "image_size": config.grid * tokenizer.config.factor if tokenizer else None,
            "class_names": None if names is None else list(names),
        },
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
        manifest["files"] = file_entries(folder)
        (folder / FILE).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")
        read_manifest(folder, verify=False)
    report(f"engine written to {out}")
    return checks


def write_graphs(folder: Path, network: Network, tokenizer: Tokenizer | None, image_encoder: bool, report: Report) -> list[verify.Check]:
    """Traces, writes and verifies every graph, one after the other so that no more than one is in memory twice."""
    config = network.config
    checks: list[verify.Check] = []

    def add(name: str, graph: ir.Model, reference: Callable[..., Any], cases: Iterator[verify.Inputs]) -> None:
        path = folder / f"{name}.onnx"
        save(graph, path)
        checks.append(verify.check_graph(path, reference, cases))
        report(f"  {checks[-1]}")

    modulation = network.modulation
    rng = verify.generator()

    report("condition")
    with torch.inference_mode():
        tables = modulation(torch.arange(config.num_classes + 1))
    add("condition", condition_graph(*tables), modulation, verify.condition_cases(config))
    del tables

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
    add("encoder", graph, encoder, verify.encoder_cases(config, modulation))
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
    add("decoder", graph, decoder, verify.decoder_cases(config, modulation))
    del graph

    report("sampler")
    add("sampler", sampler_graph(config.length, config.codes), reference_sampler, verify.sampler_cases(config))

    if tokenizer:
        size = config.grid * tokenizer.config.factor
        report("image decoder")
        tokens, positions = (Port(name, ("batch", config.length)) for name in ("tokens", "positions"))
        example = next(verify.image_decoder_cases(config.codes, config.length, batches=(2,)))
        graph = trace(ImageDecoderGraph(tokenizer), example, [tokens, positions], [Port("images", ("batch", size, size, 3))])
        add("image_decoder", graph, ImageDecoderGraph(tokenizer), verify.image_decoder_cases(config.codes, config.length))
        if image_encoder:
            report("image encoder")
            images = Port("images", ("batch", size, size, 3))
            graph = trace(ImageEncoderGraph(tokenizer), next(verify.image_encoder_cases(size, batches=(2,))), [images], [tokens])
            add("image_encoder", graph, ImageEncoderGraph(tokenizer), verify.image_encoder_cases(size))
    return checks


def producer() -> str:
    from .. import __version__

    return f"enat {__version__}"


def check_target(out: Path, force: bool) -> None:
    """Raises InputError where `out` exists and may not be replaced, or cannot be made."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out}: exists and is not a directory")
    if out.exists() and any(out.iterdir()):
        if not force:
            raise InputError(f"{out}: exists; --force replaces it")
        if not (out / FILE).is_file():
            raise InputError(f"{out}: exists and is not an engine; it is not replaced, remove it yourself or choose another folder")
    check_writable(out)


@contextlib.contextmanager
def put_in_place(out: Path, force: bool) -> Iterator[Path]:
    """A new directory beside `out` that takes its place when the block ends well, and is gone when it does not."""
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}") from error
    try:
        try:
            yield partial
            partial.chmod(0o755)
            check_target(out, force)
            replace(out, partial)
        except OSError as error:
            raise ExportError(f"{out}: not written: {reason(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace(out: Path, new: Path) -> None:
    """Puts the directory `new` at `out`; the one that was there is removed only when the new one stands."""
    if not out.exists():
        new.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
    out.rename(old)
    try:
        new.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)
