"""The CUDA runtime's calls, against cuda-python: right functions, right arguments. What they do, only a GPU can tell."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cuda.bindings import runtime as cudart

from enat.errors import BackendError, InputError
from enat.runtime.backends import cuda
from enat.runtime.backends.device import DeviceMemoryError

SUCCESS = cudart.cudaError_t.cudaSuccess


class Calls:
    """In place of the module `cudart`: its functions with their real signatures, which do nothing and give what they are told."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.results = results
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(cudart, name)
        if not callable(real) or inspect.isclass(real):
            return real
        return self.function(name, inspect.signature(real))

    def function(self, name: str, signature: inspect.Signature) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, dict(signature.bind(*arguments).arguments)))
            result = self.results.get(name, ())
            return result if isinstance(result, tuple) and result and isinstance(result[0], cudart.cudaError_t) else (SUCCESS, *result)

        call.__name__ = name
        return call


def properties(name: str, major: int, minor: int) -> Any:
    found = cudart.cudaDeviceProp()
    found.name, found.major, found.minor = name.encode().ljust(256, b"\0"), major, minor
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    memory = np.zeros(4096, np.uint8)  # what pinned memory is, for the time of the test
    found = Calls(
        {
            "cudaStreamCreateWithFlags": (5,),
            "cudaMalloc": (4096,),
            "cudaMallocHost": (memory.ctypes.data,),
            "cudaMemGetInfo": (10, 20),
            "cudaStreamEndCapture": (6,),
            "cudaGraphInstantiate": (7,),
            "cudaGetDeviceProperties": (properties("NVIDIA H200", 9, 0),),
        }
    )
    monkeypatch.setattr(cuda, "cudart", found)
    yield found
    del memory


def test_every_call_is_one_of_cuda_python(calls: Calls) -> None:
    device = cuda.CudaDevice(1)
    assert device.allocate(100) == 4096
    assert device.free_memory() == 10
    pinned = device.pinned(64)
    pinned[:] = 3
    device.copy_in(4096, pinned)
    device.copy_out(pinned, 4096)
    device.copy_rows(4096, 32, 8192, 16, 8, 2)
    run = device.record(lambda: device.copy_rows(4096, 32, 8192, 16, 8, 2))
    run()
    run()
    del run
    device.synchronize()
    device.free(4096)
    device.close()
    names = [name for name, _ in calls.calls]
    arguments = dict(calls.calls)
    host, kinds = pinned.ctypes.data, cudart.cudaMemcpyKind
    assert [tuple(given.values()) for name, given in calls.calls if name == "cudaMemcpyAsync"] == [
        (4096, host, 64, kinds.cudaMemcpyHostToDevice, 5),
        (host, 4096, 64, kinds.cudaMemcpyDeviceToHost, 5),
    ]
    assert arguments["cudaSetDevice"] == {"device": 1}
    assert arguments["cudaStreamCreateWithFlags"] == {"flags": cudart.cudaStreamNonBlocking}  # waits for no other
    relaxed = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed  # others may allocate meanwhile
    assert arguments["cudaStreamBeginCapture"] == {"stream": 5, "mode": relaxed}
    assert names[-4:] == ["cudaStreamSynchronize", "cudaStreamSynchronize", "cudaFreeHost", "cudaStreamDestroy"]
    assert arguments["cudaMemcpy2DAsync"] == {
        "dst": 4096,
        "dpitch": 32,
        "src": 8192,
        "spitch": 16,
        "width": 8,
        "height": 2,
        "kind": cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice,
        "stream": 5,
    }
    start = names.index("cudaStreamBeginCapture")
    assert names[start : start + 8] == [
        "cudaStreamBeginCapture",
        "cudaMemcpy2DAsync",
        "cudaStreamEndCapture",
        "cudaGraphInstantiate",
        "cudaGraphDestroy",
        "cudaGraphLaunch",
        "cudaGraphLaunch",
        "cudaGraphExecDestroy",
    ]


def test_a_record_that_fails_ends_the_capture(calls: Calls) -> None:
    device = cuda.CudaDevice(0)
    with pytest.raises(ZeroDivisionError):
        device.record(lambda: 1 / 0)
    assert [name for name, _ in calls.calls][-3:] == ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphDestroy"]
    calls.results["cudaStreamEndCapture"] = (cudart.cudaError_t.cudaErrorStreamCaptureInvalidated, None)
    with pytest.raises(ZeroDivisionError):
        device.record(lambda: 1 / 0)
    assert calls.calls[-1][0] == "cudaStreamEndCapture"


def test_a_record_that_memory_is_short_for(calls: Calls) -> None:
    device = cuda.CudaDevice(0)
    calls.results["cudaGraphInstantiate"] = (cudart.cudaError_t.cudaErrorMemoryAllocation, None)
    calls.results["cudaGetErrorString"] = (b"out of memory",)
    with pytest.raises(DeviceMemoryError, match="cudaGraphInstantiate"):
        device.record(lambda: None)
    assert calls.calls[-1][0] == "cudaGraphDestroy"


def test_host_memory_in_place_of_another(calls: Calls) -> None:
    """The old piece is given back, when no copy uses it any more."""
    device = cuda.CudaDevice(0)
    for size in (64, 128):
        assert len(device.pinned(size)) == size
    names = [name for name, _ in calls.calls if "Host" in name or "Synchronize" in name]
    assert names == ["cudaMallocHost", "cudaStreamSynchronize", "cudaFreeHost", "cudaMallocHost"]
    calls.results["cudaMallocHost"] = (cudart.cudaError_t.cudaErrorMemoryAllocation, None)
    calls.results["cudaGetErrorString"] = (b"out of memory",)
    with pytest.raises(DeviceMemoryError):
        device.pinned(256)
    device.close()
    assert [name for name, _ in calls.calls].count("cudaFreeHost") == 2


def test_lanes_on_a_device_share_what_they_set_up_under(calls: Calls) -> None:
    first, second, other = (cuda.CudaDevice(index) for index in (0, 0, 1))
    assert first.setting_up is second.setting_up is cuda.setting_up(0) and other.setting_up is not first.setting_up


def test_errors(calls: Calls) -> None:
    device = cuda.CudaDevice(0)
    calls.results["cudaMalloc"] = (cudart.cudaError_t.cudaErrorMemoryAllocation, None)
    calls.results["cudaGetErrorString"] = (b"out of memory",)
    with pytest.raises(DeviceMemoryError, match=r"CUDA: out of memory \(cudaMalloc\)"):
        device.allocate(10)
    calls.results["cudaFree"] = (cudart.cudaError_t.cudaErrorIllegalAddress,)
    with pytest.raises(BackendError, match="cudaFree"):
        device.free(1)


def test_devices(calls: Calls) -> None:
    calls.results["cudaGetDeviceCount"] = (2,)
    assert cuda.device_index("cuda") == 0 and cuda.device_index("cuda:1") == 1
    assert cuda.use_device("cuda:1") == 1 and calls.calls[-1] == ("cudaSetDevice", {"device": 1})
    with pytest.raises(BackendError, match="cuda:2: there is no such GPU; 2 found, cuda:0 to cuda:1"):
        cuda.device_index("cuda:2")
    assert cuda.device_facts(0) == ("NVIDIA H200", "9.0")
    calls.results["cudaGetDeviceProperties"] = (properties("Tesla V100", 7, 0),)
    with pytest.raises(BackendError, match=r"cuda: Tesla V100 is too old: its compute capability is 7\.0, expected 7\.5 or more"):
        cuda.device_index("cuda")
    for wrong in ("cuda:", "cuda:x", "gpu", "cuda:-1", "cpu:0"):
        with pytest.raises(InputError, match=f"unknown device '{wrong}'; expected cpu, cuda or cuda:N"):
            cuda.device_index(wrong)
    with pytest.raises(InputError, match="expected a GPU, cuda or cuda:N, got the device 'cpu'"):
        cuda.device_index("cpu")
    calls.results["cudaGetDeviceCount"] = (cudart.cudaError_t.cudaErrorInsufficientDriver, None)
    calls.results["cudaGetErrorString"] = (b"driver too old",)
    with pytest.raises(BackendError, match="cuda: no GPU that CUDA can use: CUDA: driver too old"):
        cuda.device_index("cuda")
