"""Checkpoints in: published state dicts (`.pth`, `.ckpt`) and `.safetensors` become models. Every size is read off the shapes."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .config import NetworkConfig
from .network import Network
from .presets import Preset
from .tokenizer import Tokenizer, TokenizerConfig

StateDict = dict[str, Tensor]

HEAD_DIM = 64  # of the published networks
DECODER_DEPTH = 2
# How the names begin of what is left out: in every published checkpoint, used by nothing; and a buffer of older trainings.
UNUSED = ("prev_embedder.", "x_embedder.position_ids")
TRAINING = ("loss.",)  # of a tokenizer: what its training alone uses
WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel and AveragedModel, torch.compile, Lightning
SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors")


def read_state_dict(path: Path, unused: tuple[str, ...] = ()) -> StateDict:
    """Reads tensors and nothing else, in float32: a file that would run code is refused. unused: how names begin that are left out.

    Raises CheckpointError where the file is missing, truncated, unsafe or holds no state dict, or more than one.
    """
    if path.is_dir():
        inside = sorted(one.name for one in path.iterdir() if one.suffix in SUFFIXES)
        raise CheckpointError(f"{path}: is a folder; expected a checkpoint{', one of ' + ', '.join(inside[:5]) if inside else ''}")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        if is_safetensors(path):
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickle protocols, of files that are refused anyway
                check_records(path)
                state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not loaded, it is damaged or holds more than tensors (loading it could run code); "
            "expected a plain state dict saved with torch.save, or a .safetensors file"
        ) from error
    except PermissionError as error:
        raise CheckpointError(f"{path}: cannot be read: no permission") from error
    except Exception as error:  # torch, zipfile and safetensors each have their own for a damaged file
        if "can't allocate memory" in str(error):
            raise MemoryError from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: not a readable checkpoint, truncated or of another format ({reason})") from error
    found = without(bare(without(unwrapped(state, path), unused)), unused)  # a wrapper's name may be before those, or not
    return float32(found, path)


def without(state: StateDict, unused: tuple[str, ...]) -> StateDict:
    return {key: value for key, value in state.items() if not str(key).startswith(unused)}


def is_safetensors(path: Path) -> bool:
    """By how it begins, whatever its name: the length of a header, little-endian, and the header, JSON."""
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or (start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size)


def check_records(path: Path) -> None:
    """Raises BadZipFile where values are not those that were saved, which torch.load does not look at."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        records = [record for record in archive.infolist() if record.file_size]
        damaged = [record.filename for record in records if not is_whole(archive, record)]
    if damaged and len(damaged) < len(records):  # all of them: torch.save was told to write no checksums
        raise zipfile.BadZipFile(f"the checksum of {damaged[0]} is another: the file is damaged")


def is_whole(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(record) as file:
            while file.read(1 << 24):
                pass
    except zipfile.BadZipFile:
        return False
    return True


def is_state_dict(found: object) -> bool:
    return isinstance(found, dict) and bool(found) and all(isinstance(value, Tensor) for value in found.values())


def state_dicts(found: dict[object, object]) -> dict[str, StateDict]:
    """The state dicts in what belongs to a training, or in what that holds, as of averages; by their names."""
    result: dict[str, StateDict] = {}
    for name, value in found.items():
        inside = {f"{name}.{inner}": one for inner, one in value.items()} if isinstance(value, dict) and not is_state_dict(value) else {}
        for key, one in {str(name): value, **inside}.items():
            if is_state_dict(one) and any(tensor.dim() > 1 for tensor in one.values()):  # others are counters, states of generators
                result[key] = one
    return result


def unwrapped(found: object, path: Path) -> StateDict:
    """The state dict in what a file holds: that itself, or the only one in a dict of what belongs to a training. Raises CheckpointError."""
    if isinstance(found, dict) and not is_state_dict(found):
        inside = state_dicts(found)
        if len(inside) > 1:
            raise CheckpointError(
                f"{path}: holds several state dicts ({', '.join(inside)}); expected one: save that one alone with torch.save"
            )
        if inside:
            return next(iter(inside.values()))
    if not is_state_dict(found):
        raise CheckpointError(f"{path}: expected a plain state dict of tensors, found {describe(found)}")
    return found  # type: ignore[return-value]


def describe(found: object) -> str:
    if not isinstance(found, dict):
        return f"a {type(found).__name__}"
    other = next((name for name, value in found.items() if not isinstance(value, Tensor)), None)
    if other is None:
        return "an empty dict"
    return f"a dict whose {other!r:.60} is a {type(found[other]).__name__}"


def bare(state: StateDict) -> StateDict:
    """Without the prefixes that all keys have from what the model was wrapped in, and without a wrapper's own counter."""
    state = {str(key): value for key, value in state.items() if key != "n_averaged"}
    while prefix := next((one for one in WRAPPERS if state and all(key.startswith(one) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def float32(state: StateDict, path: Path) -> StateDict:
    """The tensors in float32. Raises CheckpointError for what is no table of real numbers, all of them finite."""
    result = {}
    for key, value in state.items():
        counter = value.dim() == 0 and value.dtype == torch.int64  # of a training: no weight is one, so that its name is told
        if value.layout is not torch.strided or value.is_meta or not (value.is_floating_point() or counter):
            kind = (
                "no values"
                if value.is_meta
                else f"values of type {str(value.dtype).removeprefix('torch.')}, {str(value.layout).removeprefix('torch.')}"
            )
            raise CheckpointError(f"{path}: {key} has {kind}; expected floating-point numbers: quantized checkpoints are not read")
        result[key] = value.float()
        if not torch.isfinite(result[key]).all():
            raise CheckpointError(f"{path}: {key} holds values that are not finite in float32")
    return result


def shape_of(state: StateDict, key: str, rank: int, path: Path, kind: str) -> torch.Size:
    """The shape of one tensor that the sizes are read from."""
    if key not in state or state[key].dim() != rank:
        found = f"it has shape {list(state[key].shape)}" if key in state else f"its keys begin with {', '.join(sorted(state)[:3])}"
        raise CheckpointError(f"{path}: not {kind}: expected {key} with {rank} dimensions, but {found}")
    return state[key].shape


def count(state: StateDict, pattern: str) -> int:
    """How many consecutive numbers from 0 fill the group of `pattern` in the keys."""
    found = {int(match[1]) for key in state if (match := re.match(pattern, key)) and len(match[1]) < 10}
    return next(i for i in range(len(found) + 1) if i not in found)


def network_config(
    state: StateDict, path: Path, heads: int | None = None, encoder_depth: int | None = None, preset: Preset | None = None
) -> NetworkConfig:
    """The sizes of a network's state dict.

    `heads` and `encoder_depth` are not in it: the preset's, else head_dim 64 and two decoder blocks.
    """
    kind = "an ENAT network"
    words, dim = shape_of(state, "x_embedder.word_embeddings.weight", 2, path, kind)
    length, _ = shape_of(state, "x_embedder.position_embeddings.weight", 2, path, kind)
    classes, _ = shape_of(state, "y_embedder.embedding_table.weight", 2, path, kind)
    blocks = count(state, r"blocks\.(\d+)\.")
    grid = round(length**0.5)
    if grid**2 != length:
        raise CheckpointError(f"{path}: expected a square number of positions, found {length}")
    for name, found, least in (
        ("positions", length, 4),
        ("rows of words", words, 2),
        ("rows of classes", classes, 2),
        ("blocks", blocks, 2),
    ):
        if found < least:
            raise CheckpointError(f"{path}: not {kind}: expected {least} {name} or more, found {found}")
    if preset:
        wanted = preset.config
        sizes = {
            "grid": (grid, wanted.grid),
            "width": (dim, wanted.dim),
            "number of blocks": (blocks, wanted.encoder_depth + wanted.decoder_depth),
            "number of codes": (words - 1, wanted.codes),
            "number of classes": (classes - 1, wanted.num_classes),
        }
        for name, (found, expected) in sizes.items():
            if found != expected:
                raise CheckpointError(f"{path}: its {name} is {found}, the preset's {expected}: it is of another model")
        heads = wanted.heads if heads is None else heads
        encoder_depth = wanted.encoder_depth if encoder_depth is None else encoder_depth
    if heads is None:
        if dim % HEAD_DIM:
            raise CheckpointError(
                f"{path}: the width {dim} is not a multiple of the default head_dim {HEAD_DIM}; name the number of heads (--heads)"
            )
        heads = dim // HEAD_DIM
    if encoder_depth is None:
        encoder_depth = blocks - DECODER_DEPTH
    if not 1 <= encoder_depth < blocks:
        raise CheckpointError(
            f"{path}: {blocks} blocks: expected an encoder depth (--encoder-depth) of 1 to {blocks - 1}, got {encoder_depth}"
        )
    return NetworkConfig(grid, dim, heads, encoder_depth, blocks - encoder_depth, codes=words - 1, num_classes=classes - 1)


def tokenizer_config(state: StateDict, path: Path) -> TokenizerConfig:
    """The sizes of a VQGAN's state dict."""
    kind = "a VQGAN of MaskGIT's kind"
    codes, code_dim = shape_of(state, "quantize.embedding.weight", 2, path, kind)
    levels = count(state, r"encoder\.down\.(\d+)\.")
    channels = tuple(shape_of(state, f"encoder.down.{level}.block.0.conv1.weight", 4, path, kind)[0] for level in range(max(levels, 1)))
    return TokenizerConfig(
        channels,
        encoder_blocks=count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        decoder_blocks=count(state, r"decoder\.up\.0\.block\.(\d+)\."),
        codes=codes,
        code_dim=code_dim,
    )


def fill(model: nn.Module, state: StateDict, path: Path) -> None:
    """Puts the tensors into the model, and names what is missing, unknown or of another shape."""
    expected = {key: value.shape for key, value in model.state_dict().items()}
    missing = [key for key in expected if key not in state]
    unknown = [key for key in state if key not in expected]
    if missing or unknown:
        parts = [
            f"{len(keys)} {word} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
            for word, keys in (("missing", missing), ("unknown", unknown))
            if keys
        ]
        raise CheckpointError(f"{path}: its keys are not those of the model: {' and '.join(parts)}")
    for key, shape in expected.items():
        if state[key].shape != shape:
            raise CheckpointError(f"{path}: {key} has shape {list(state[key].shape)}, expected {list(shape)}")
    model.load_state_dict(state, assign=True)
    model.eval().requires_grad_(False)


def load_network(
    path: Path,
    heads: int | None = None,
    encoder_depth: int | None = None,
    preset: Preset | None = None,
    config: NetworkConfig | None = None,
) -> Network:
    """A network from a checkpoint, float32, ready for inference. config: the sizes that it must have, in place of those read off it.

    Raises CheckpointError.
    """
    state = read_state_dict(path, UNUSED)
    config = config or network_config(state, path, heads, encoder_depth, preset)
    with torch.device("meta"):
        model = Network(config)
    fill(model, state, path)
    return model


def load_tokenizer(path: Path) -> Tokenizer:
    """An image tokenizer from a checkpoint, float32, ready for inference. Raises CheckpointError."""
    state = read_state_dict(path, TRAINING)
    config = tokenizer_config(state, path)
    kind = "not a VQGAN of MaskGIT's kind"
    if config.encoder_blocks < 1 or config.decoder_blocks < 1:
        raise CheckpointError(f"{path}: {kind}: {config.encoder_blocks} blocks a level encode and {config.decoder_blocks} decode")
    if any(width % 32 for width in config.channels):
        raise CheckpointError(f"{path}: {kind}: widths {list(config.channels)}, expected multiples of 32")
    with torch.device("meta"):
        model = Tokenizer(config)
    fill(model, state, path)
    return model


def check_match(network: Network, tokenizer: Tokenizer) -> None:
    """Raises CheckpointError where the tokenizer's codes are not the ones that the network predicts."""
    if network.config.codes != tokenizer.config.codes:
        raise CheckpointError(
            f"the network predicts {network.config.codes} codes but the tokenizer has {tokenizer.config.codes}: they do not belong together"
        )
