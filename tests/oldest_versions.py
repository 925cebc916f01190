"""The oldest versions that pyproject.toml allows of what enat runs and is built with, as constraints for pip; for `make test-oldest`."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

EXTRAS = ("cpu", "openvino", "export", "calibration", "plot")


def oldest(requirements: Iterable[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for requirement in requirements:
        if match := re.match(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)", requirement):
            yield match[1], tuple(int(part) for part in match[2].split("."))


project = tomllib.loads(Path(__file__).parent.parent.joinpath("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
versions = dict(oldest(project["dependencies"] + [one for extra in EXTRAS for one in extras[extra]]))
versions |= {
    name: version for name, version in oldest(extras["test"]) if name in versions or name == "cmake"
}  # the tests may need a newer one
for name, version in versions.items():
    print(f"{name}=={'.'.join(map(str, version))}.*")
