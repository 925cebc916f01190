"""Triton's config.pbtxt, from Python values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Word(str):
    """A name of Triton's own (TYPE_UINT8, KIND_CPU), which stands without quotes."""


def pbtxt(fields: Mapping[str, Any]) -> str:
    """Protocol buffer text: mappings are messages, sequences are repeated fields, None is left out."""
    return "".join(lines(fields, ""))


def lines(fields: Mapping[str, Any], indent: str) -> list[str]:
    result = []
    for name, value in fields.items():
        if value is None:
            continue
        if isinstance(value, Mapping):
            result += [f"{indent}{name} {{\n", *lines(value, indent + "  "), f"{indent}}}\n"]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            if all(not isinstance(one, Mapping) for one in value):
                result.append(f"{indent}{name}: [{', '.join(map(scalar, value))}]\n")
            else:
                for one in value:
                    result += lines({name: one}, indent)
        else:
            result.append(f"{indent}{name}: {scalar(value)}\n")
    return result


def scalar(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Word) or not isinstance(value, str):
        return str(value)
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def parameters(values: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """Triton's `parameters`, a map of strings."""
    return [{"key": name, "value": {"string_value": value}} for name, value in values.items() if value is not None]
