"""TensorRT's Python bindings without its libraries: what they document is real, nothing of it can be run.

The bindings are on PyPI, the libraries are not. Empty ones with the nine entry points that the bindings link to make them importable
on any machine; `StandIn` objects then hold code to what the real classes have and what arguments their signatures take.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ENTRY_POINTS = """
createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL createNvOnnxParser_INTERNAL
createNvOnnxParserRefitter_INTERNAL getBuilderPluginRegistry getNvOnnxParserVersion getPluginRegistry initLibNvInferPlugins
""".split()
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")


@functools.cache
def import_tensorrt() -> Any:
    """The module `tensorrt`: the installed one where there is one, else the bindings on empty libraries. Skips the test without them."""
    if importlib.util.find_spec("tensorrt"):
        return importlib.import_module("tensorrt")
    if not importlib.util.find_spec("tensorrt_bindings"):
        pytest.skip("TensorRT's bindings are not installed")
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler to link empty libraries for TensorRT's bindings")
    (found,) = Path(importlib.util.find_spec("tensorrt_bindings").submodule_search_locations[0]).glob("tensorrt*.so")  # type: ignore[union-attr, index]
    (major,) = {int(number) for number in re.findall(rb"libnvinfer\.so\.(\d+)", found.read_bytes())}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "empty.c"
        source.write_text("\n".join(f"void *{entry}(void) {{ return 0; }}" for entry in ENTRY_POINTS))
        for library in LIBRARIES:
            file = folder / f"lib{library}.so.{major}"
            subprocess.run([compiler, "-shared", "-fPIC", f"-Wl,-soname,{file.name}", "-o", file, source], check=True)
            ctypes.CDLL(str(file), ctypes.RTLD_GLOBAL)
        sys.modules["tensorrt"] = importlib.import_module("tensorrt_bindings")
    return sys.modules["tensorrt"]


def signatures(function: Any) -> list[inspect.Signature]:
    """What a bound C++ function takes, one signature an overload, read off its docstring."""
    name = function.__name__
    lines = [re.sub(r"^\d+\. ", "", line) for line in (function.__doc__ or "").splitlines()]
    found = [match[1] for line in lines if (match := re.match(rf"{name}\((.*)\)(?: -> .*)?$", line.strip()))]
    return [inspect.Signature(list(map(parameter, split(text)))) for text in found if text != "*args, **kwargs"]


def split(text: str) -> list[str]:
    """Parts between commas that lie in no brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{<") - (character in ")]}>")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def parameter(text: str) -> inspect.Parameter:
    name = re.split(r"[:=]", text)[0].strip()
    default = None if " = " in text else inspect.Parameter.empty
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)


class StandIn:
    """In place of an object of a TensorRT class: has the attributes of that class alone, and takes what they take.

    results: what attributes are and what calls give, by name: a value, or a function of the arguments. `calls`: (name, arguments).
    """

    def __init__(self, cls: Any, **results: Any) -> None:
        for name in results:
            assert hasattr(cls, name), f"{cls.__name__} has no {name}"
        self.__dict__.update(_cls=cls, _results=results, calls=[])

    def twin(self) -> StandIn:
        """Another one that knows what this one is asked, and does not keep it alive."""
        twin = StandIn(self._cls)
        object.__setattr__(twin, "__dict__", self.__dict__)
        return twin

    def __getattr__(self, name: str) -> Any:
        if not hasattr(self._cls, name):
            raise AttributeError(f"{self._cls.__name__} has no {name}")
        member = inspect.getattr_static(self._cls, name)
        if isinstance(member, property):
            return self._results.get(name)
        return self._callable(name, getattr(self._cls, name))

    def _callable(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            documented = signatures(function)
            assert documented, f"{name}: no signature"
            errors = []
            for signature in documented:
                try:
                    _, *values = signature.bind(self, *arguments, **named).arguments.values()
                    break
                except TypeError as error:
                    errors.append(f"{signature}: {error}")
            else:
                raise AssertionError(f"{self._cls.__name__}.{name}{arguments}{named}: {errors}")
            self.calls.append((name, tuple(values)))
            result = self._results.get(name)
            return result(*arguments, **named) if callable(result) else result

        return call

    def __iter__(self) -> Iterator[Any]:
        assert hasattr(self._cls, "__getitem__"), f"{self._cls.__name__} cannot be iterated over"
        return iter(())

    def __setattr__(self, name: str, value: Any) -> None:
        member = inspect.getattr_static(self._cls, name)
        assert isinstance(member, property) and member.fset, f"{self._cls.__name__}.{name} cannot be set"
        self._results[name] = value
        self.calls.append((name, (value,)))


class Refits:
    """Stand-ins for what gives plans other weights."""

    def __init__(self, trt: Any, monkeypatch: pytest.MonkeyPatch, succeeds: bool = True) -> None:
        self.files: list[str] = []
        self.refitted = 0
        self.weights: list[str] = []  # that plans take
        refitter, parser = trt.Refitter, trt.OnnxParserRefitter
        made = {"refit_cuda_engine": self.refit, "get_all_weights": lambda: self.weights}
        monkeypatch.setattr(trt, "Refitter", lambda engine, logger: StandIn(refitter, **made))
        monkeypatch.setattr(trt, "OnnxParserRefitter", lambda refitter, logger: StandIn(parser, refit_from_bytes=self.parse))
        self.succeeds = succeeds

    def parse(self, model: bytes, path: str) -> bool:
        self.files.append(path)
        return self.succeeds

    def refit(self) -> bool:
        self.refitted += 1
        return True
