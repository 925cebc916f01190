"""The rooms keep to themselves: data flows one way."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

PACKAGE = Path(next(iter(importlib.util.find_spec("enat").submodule_search_locations)))  # type: ignore[union-attr, arg-type]

# What each room may import of the others, and what it must not import at all.
ROOMS = {
    "runtime": (set(), {"torch", "onnx", "onnx_ir", "onnxscript"}),
    "models": (set(), {"onnx", "onnx_ir", "onnxruntime"}),
    "calibration": ({"runtime"}, {"torch"}),
    "serving": ({"runtime"}, {"torch", "onnx", "onnx_ir", "onnxscript"}),
    "export": ({"models", "runtime", "calibration"}, set()),
}


def imports(file: Path) -> set[str]:
    """Names of everything that a file imports, relative ones from the package's root."""
    found = set()
    inside = file.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ("enat", *inside[: len(inside) - node.level + 1]) if node.level else ()
            names = [*base, *(node.module.split(".") if node.module else [])]
            found |= {".".join(names)} if node.module else {".".join((*names, alias.name)) for alias in node.names}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    allowed, forbidden = ROOMS[room]
    rooms = {"models", "export", "calibration", "runtime", "serving", "demo", "benchmarks"}
    files = list((PACKAGE / room).rglob("*.py"))
    assert files
    for file in files:
        for name in imports(file):
            top, _, rest = name.partition(".")
            assert top not in forbidden, f"{file}: {name}"
            other = rest.split(".")[0]
            assert top != "enat" or other not in rooms - allowed - {room}, f"{file}: {name}"
