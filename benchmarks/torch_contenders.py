"""What engines are compared with, in PyTorch: the reference, and the split network under torch.compile."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BackendError
from ..export.graphs import DecoderGraph, EncoderGraph, ImageDecoderGraph
from ..models.checkpoint import check_match, load_network, load_tokenizer
from ..models.config import NetworkConfig
from ..models.network import Network
from ..models.tokenizer import Tokenizer, to_uint8
from ..runtime.backends import Array, Program
from ..runtime.manifest import ModelInfo
from ..runtime.pipeline import Pipeline
from ..runtime.schedule import Step
from .measure import Case, Engine
from .reference import generate_tokens


class TorchModels:
    """The network of a checkpoint and its tokenizer, loaded once for all that run them."""

    def __init__(self, ckpt: Path, vqgan: Path | None, model: ModelInfo, device: str) -> None:
        """model: of the engine, whose sizes the checkpoint must have. Raises CheckpointError."""
        self.device = torch.device(device)
        config = NetworkConfig(**{field.name: getattr(model, field.name) for field in dataclasses.fields(NetworkConfig)})
        self.network: Network = load_network(ckpt, config=config).to(self.device)
        self.tokenizer: Tokenizer | None = load_tokenizer(vqgan).to(self.device) if vqgan else None
        if self.tokenizer:
            check_match(self.network, self.tokenizer)

    def precision(self, dtype: torch.dtype | None) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()


class Reference:
    """The published code's way, pictures decoded in the same precision."""

    def __init__(self, name: str, models: TorchModels, schedule: Callable[[int], Sequence[Step]], dtype: torch.dtype | None) -> None:
        self.name, self.models, self.schedule, self.dtype = name, models, schedule, dtype

    def draw(self, case: Case) -> Tensor:
        models = self.models
        with models.precision(self.dtype), torch.inference_mode():
            tokens = generate_tokens(models.network, case.labels(models.network.config.num_classes), self.schedule(case.steps))
            if not case.pictures:
                return tokens.cpu()
            assert models.tokenizer is not None
            return to_uint8(models.tokenizer.decode(tokens).float()).cpu()


class CompiledBackend:
    """The engine's graphs as PyTorch modules under torch.compile, in the engine's own loop: only what runs a graph differs."""

    name = "torch.compile"
    records = False
    dry = False

    def __init__(self, models: TorchModels, dtype: torch.dtype | None) -> None:
        self.models, self.dtype, self.device = models, dtype, str(models.device)
        network = models.network
        # Tables, as the engines have them.
        with torch.inference_mode():
            labels = torch.arange(network.config.num_classes + 1, device=models.device)
            self.tables = network.modulation(labels)
            decoder = DecoderGraph(network)
        modules = {"encoder": EncoderGraph(network), "decoder": decoder}
        if models.tokenizer:
            modules["image_decoder"] = ImageDecoderGraph(models.tokenizer)
        self.graphs = {name: torch.compile(module, dynamic=True) for name, module in modules.items()}

    @contextlib.contextmanager
    def lease(self) -> Iterator[CompiledBackend]:
        with torch.inference_mode(), self.models.precision(self.dtype):
            yield self

    def close(self) -> None:
        self.graphs.clear()

    def upload(self, array: Array) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        # The network's weights are float32, whatever the engine's are.
        return tensor.to(self.models.device, torch.float32 if tensor.is_floating_point() else tensor.dtype)

    def download(self, tensor: Tensor) -> Array:
        return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy())  # NumPy has no bfloat16

    def run(self, graph: str, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        if graph == "condition":
            return [table[inputs["labels"]] for table in self.tables]
        if graph == "sampler":
            return sampler(**{**inputs, "keep": torch.tensor(int(inputs["keep"]))})
        return [self.graphs[graph](**inputs)]

    def first_rows(self, tensor: Tensor, rows: int) -> Tensor:
        return tensor[:rows]

    def concatenate(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors), dim=1)

    def compute(self, key: Hashable | None, arrays: Mapping[str, Array], program: Program) -> list[Array]:
        uploaded = {name: self.upload(array) for name, array in arrays.items()}
        return [self.download(tensor) for tensor in program(uploaded)]


def torch_contender(kind: str, models: TorchModels, pipeline: Pipeline) -> Reference | Engine:
    """kind: "reference" in float32, "compile-bfloat16", …; pipeline: of the engine whose schedule and sizes are used.

    Raises BackendError where torch.compile lacks what it needs.
    """
    name, _, precision = kind.partition("-")
    dtype = getattr(torch, precision) if precision else None
    label = f"{'torch.compile' if name == 'compile' else name}, {precision or 'float32'}"
    if name == "reference":
        return Reference(label, models, pipeline.schedule, dtype)
    compiler = os.environ.get("CXX", "g++")
    if models.device.type == "cpu" and not shutil.which(compiler):
        raise BackendError(f"torch.compile needs a C++ compiler, and {compiler} is not there; install one, or name it in CXX")
    return Engine(label, Pipeline(pipeline.manifest, CompiledBackend(models, dtype)))


def matrix_rate(device: torch.device, size: int = 8192) -> float:
    """Multiply-adds a second that a large float16 product reaches on a GPU."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.float16) for _ in range(2))

    def seconds() -> float:
        start = time.perf_counter()
        a @ b
        torch.cuda.synchronize(device)
        return time.perf_counter() - start

    seconds()
    return size**3 / statistics.median(seconds() for _ in range(10))


def sampler(
    logits: Tensor,
    positions: Tensor,
    choice_noise: Tensor,
    confidence_noise: Tensor,
    guidance: Tensor,
    sampling_temperature: Tensor,
    mask_temperature: Tensor,
    keep: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sampler of docs/ENGINE.md in PyTorch."""
    batch = len(positions)
    conditional, unconditional = logits[:batch], logits[len(logits) - batch :]
    logp = (conditional + guidance * (conditional - unconditional)).log_softmax(-1)
    cumulative = (logp / sampling_temperature).softmax(-1).cumsum(-1)
    threshold = choice_noise.gather(1, positions)[..., None] * cumulative[..., -1:]
    tokens = (cumulative <= threshold).sum(-1)
    confidence = logp.gather(2, tokens[..., None]).squeeze(2) + mask_temperature * confidence_noise.gather(1, positions)
    order = confidence.argsort(1, descending=True)
    revealed, kept = order.split([positions.shape[1] - int(keep), int(keep)], dim=1)
    return tokens, tokens.gather(1, revealed), positions.gather(1, revealed), positions.gather(1, kept)
