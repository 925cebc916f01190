"""What runs inside Triton's Python backend: requests become batches of a pipeline, and pictures become responses."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from ..errors import EnatError, InputError
from ..runtime.classes import class_index
from ..runtime.cores import part_of_threads
from ..runtime.manifest import SETTINGS
from ..runtime.outputs import request_for
from ..runtime.pictures import png_bytes, to_pil
from ..runtime.pipeline import Pipeline
from .batches import Picture, draw_all

INPUTS = ("class_id", "class_name", "seed", *SETTINGS)


def parameter(config: dict[str, Any], name: str) -> str | None:
    value = config.get("parameters", {}).get(name)
    return value["string_value"] if value and value["string_value"] else None


def failed(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


# Triton gives a model that asks another one its error's message, and INTERNAL for whatever its code was: the code goes into the message.
WITH_CODES = {"enat_codes": 1}  # parameters of such a request
CODES = ("INVALID_ARG", "INTERNAL", "CANCELLED")
BUSY = ("Exceeds maximum queue size", "Request timeout expired")  # what Triton itself says of a full queue, and of one that waited too long
SEED_BITS = 53  # whole numbers that every reader of JSON keeps


def failed_in_words(message: str, code: str, request: Any) -> Any:
    """An error; its code is told in words too where the request asks for it."""
    try:
        asked = "enat_codes" in json.loads(request.parameters() or "{}")
    except ValueError:  # a client's, which are no UTF-8
        asked = False
    return failed(f"{code}: {message}" if asked else message, getattr(pb_utils.TritonError, code))


def failed_like(error: Any) -> Any:
    """What `failed_in_words` said, as an error of that code; and what Triton said of its queue."""
    code, _, message = error.message().partition(": ")
    if code in CODES:
        return failed(message, getattr(pb_utils.TritonError, code))
    if any(words in error.message() for words in BUSY):
        return failed(error.message(), pb_utils.TritonError.UNAVAILABLE)
    return pb_utils.InferenceResponse(error=error)


def check_numpy() -> None:
    """Raises where the server's Python backend was built for NumPy 1, and this is 2: it would send and give arrays of nothing, and say
    that all is well."""
    if int(np.__version__.split(".")[0]) > 1:  # of which it takes arrays by DLPack, too
        wanted = np.arange(1, 5)
        if not np.array_equal(pb_utils.Tensor.from_dlpack("numbers", wanted).as_numpy(), wanted):
            raise pb_utils.TritonModelException(f"this server's Python backend was built for NumPy 1, found {np.__version__}; see --env")


class PictureModel:
    """`class_id` or `class_name`, `seed` and settings, [n, 1] each, → `image` uint8 [n, height, width, 3], and
    `seed` and `metadata` of each.
    """

    def initialize(self, args: dict[str, str]) -> None:
        check_numpy()
        config = json.loads(args["model_config"])
        device = "cpu" if args["model_instance_kind"] == "CPU" else f"cuda:{args['model_instance_device_id']}"
        threads = parameter(config, "threads")
        self.batch_size = max(1, int(config["max_batch_size"]))
        self.pipeline = Pipeline.load(
            Path(args["model_repository"], args["model_version"], "engine"),
            parameter(config, "backend") or "auto",
            device,
            int(threads) if threads else part_of_threads(sum(group["count"] for group in config["instance_group"])),
        )
        self.pipeline.manifest.require_images()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        asked: list[list[Picture] | str] = [self.read(request) for request in requests]
        owners = [i for i, one in enumerate(asked) if not isinstance(one, str) for _ in one]
        pictures = [picture for one in asked if not isinstance(one, str) for picture in one]
        drawn = draw_all(self.pipeline, pictures, self.batch_size, lambda index: not requests[owners[index]].is_cancelled())
        images = iter(drawn)
        responses = []
        for request, one in zip(requests, asked, strict=True):
            if isinstance(one, str):
                responses.append(failed_in_words(one, "INVALID_ARG", request))
                continue
            own = [next(images) for _ in one]
            errors = [image for image in own if isinstance(image, EnatError)]
            if errors:
                responses.append(failed_in_words(str(errors[0]), "INTERNAL", request))
            elif any(image is None for image in own):
                responses.append(failed_in_words("cancelled", "CANCELLED", request))
            else:
                tensors = [
                    pb_utils.Tensor("image", np.stack(own)),  # type: ignore[arg-type]
                    pb_utils.Tensor("seed", np.array([[picture.seed] for picture in one], np.uint64)),
                    pb_utils.Tensor("metadata", np.array([[self.metadata(picture)] for picture in one], object)),
                ]
                responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
        return responses

    def read(self, request: Any) -> list[Picture] | str:
        """The pictures that a request asks for, or what is wrong with it."""
        try:
            tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in INPUTS}
            return self.pictures({name: tensor.as_numpy().reshape(-1) for name, tensor in tensors.items() if tensor is not None})
        except InputError as error:
            return str(error)
        except Exception as error:  # whatever it is, it must not fail the requests that are answered together with this one
            return f"the request cannot be read ({type(error).__name__}: {error!s:.200})"

    def pictures(self, given: dict[str, NDArray[Any]]) -> list[Picture]:
        if ("class_id" in given) == ("class_name" in given):
            raise InputError("expected either class_id or class_name")
        model = self.pipeline.manifest.model
        wanted = given.get("class_id", given.get("class_name"))
        assert wanted is not None
        labels = [class_index(model, one.decode("utf-8", "replace") if isinstance(one, bytes) else int(one)) for one in wanted]
        seeds = [int(seed) for seed in given["seed"]] if "seed" in given else [secrets.randbits(SEED_BITS) for _ in labels]
        # The decimal number that was meant: 0.3, and not what the nearest float32 is as a float64.
        own = {name: [int(value) if name == "steps" else float(str(value)) for value in given[name]] for name in SETTINGS if name in given}
        settings = [tuple((name, values[i]) for name, values in own.items()) for i in range(len(labels))]
        for one in dict.fromkeys(settings):
            chosen: dict[str, Any] = dict(one)
            self.pipeline.schedule(**chosen)  # raises for what is out of its range
        return [Picture(label, seed, one) for label, seed, one in zip(labels, seeds, settings, strict=True)]

    def metadata(self, picture: Picture) -> bytes:
        """What enat-run writes into a file of the picture, as JSON."""
        request = request_for(self.pipeline.manifest.sampling, [picture.label], [picture.seed], dict(picture.settings))
        return json.dumps(request.metadata(self.pipeline)).encode()

    def finalize(self) -> None:
        self.pipeline.close()


class PngModel:
    """The same inputs → `png`, an encoded file of each picture, drawn by the other model."""

    def initialize(self, args: dict[str, str]) -> None:
        check_numpy()
        self.model = parameter(json.loads(args["model_config"]), "pictures")

    async def execute(self, requests: Sequence[Any]) -> list[Any]:
        return list(await asyncio.gather(*map(self.answer, requests)))

    async def answer(self, request: Any) -> Any:
        if request.is_cancelled():
            return failed("cancelled", pb_utils.TritonError.CANCELLED)
        inputs = [tensor for name in INPUTS if (tensor := pb_utils.get_input_tensor_by_name(request, name)) is not None]
        inner = pb_utils.InferenceRequest(
            model_name=self.model,
            requested_output_names=["image", "seed", "metadata"],
            inputs=inputs,
            parameters=WITH_CODES,
            timeout=request.timeout(),
        )
        response = await inner.async_exec()
        if response.has_error():
            return failed_like(response.error())
        images = pb_utils.get_output_tensor_by_name(response, "image").as_numpy()
        seeds = pb_utils.get_output_tensor_by_name(response, "seed").as_numpy()
        records = pb_utils.get_output_tensor_by_name(response, "metadata").as_numpy()[:, 0]
        files = [png_bytes(image, json.loads(record)) for image, record in zip(to_pil(images), records, strict=True)]
        png = pb_utils.Tensor("png", np.array([[file] for file in files], object))
        return pb_utils.InferenceResponse(output_tensors=[png, pb_utils.Tensor("seed", seeds)])
