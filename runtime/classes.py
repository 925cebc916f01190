"""Which classes a request means: by number, name, range or `all`."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable
from typing import SupportsIndex

from ..errors import InputError
from .manifest import ModelInfo

MOST_DIGITS = 18
MOST_BITS = 200


def class_index(model: ModelInfo, wanted: SupportsIndex | str) -> int:
    """The index of one class. A string is a name (case does not count), else a number; `#7` is always number 7.

    Raises InputError for what is unknown or ambiguous.
    """
    if isinstance(wanted, str):
        found = by_name(model, wanted)
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(f"class {wanted!r} is ambiguous: numbers {', '.join(map(str, found))} are called so; give the number")
        digits = wanted.removeprefix("#")
        if not is_number(digits):
            raise InputError(unknown(model, wanted))
        digits = digits.lstrip("0") or "0"
        if len(digits) > MOST_DIGITS:
            raise InputError(f"expected a class of 0 to {model.num_classes - 1}, got {digits[:MOST_DIGITS]}…")
        wanted = int(digits)
    number = whole(wanted, "a class by its number or name")
    if not 0 <= number < model.num_classes:
        raise InputError(f"expected a class of 0 to {model.num_classes - 1}, got {number}")
    return number


def whole(value: SupportsIndex, what: str) -> int:
    """A whole number of any kind, NumPy's too, as an int. Raises InputError for what is none, or larger than any that is of use."""
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"expected {what}, got {value!r:.40}") from None
    if number.bit_length() > MOST_BITS:  # Python does not print the largest
        raise InputError(f"expected {what}, got one of {number.bit_length()} bits")
    return number


def by_name(model: ModelInfo, wanted: str) -> list[int]:
    names = [name.strip().casefold() for name in model.class_names or ()]
    return [i for i, name in enumerate(names) if name == wanted.strip().casefold()]


def unknown(model: ModelInfo, wanted: str) -> str:
    return f"unknown class {wanted!r:.100}{suggestion(model, wanted)}"


def suggestion(model: ModelInfo, wanted: str) -> str:
    if not wanted.strip():
        return "; expected a name or a number"
    if not model.class_names:
        return f": this engine's classes have no names; expected a number of 0 to {model.num_classes - 1}"
    names = {name.casefold(): name for name in model.class_names}
    near = difflib.get_close_matches(wanted.casefold(), names, n=3)
    near += [name for name in names if wanted.casefold() in name and name not in near][:3]
    return f"; did you mean {', '.join(repr(names[name]) for name in near[:3])}?" if near else ""


def parse_classes(model: ModelInfo, wanted: Iterable[int | str]) -> list[int]:
    """The classes that the words of a command line name, in their order: `207`, `golden retriever`, `10-19`, `A-F`, `#7`, `all`, and
    several of them with commas between.
    """
    result: list[int] = []
    for word in wanted:
        if isinstance(word, int):
            result.append(class_index(model, word))
            continue
        if word.casefold() == "all" and not by_name(model, word):
            result += range(model.num_classes)
            continue
        if "," in word and not by_name(model, word):
            parts = [part.strip() for part in word.split(",")]
            if not all(parts):
                raise InputError(f"expected classes with commas between, got {word!r:.100}")
            result += parse_classes(model, parts)
            continue
        first, dash, last = word.partition("-")
        if dash and first and last and not by_name(model, word) and is_class(model, first) and is_class(model, last):
            start, end = class_index(model, first), class_index(model, last)
            named = [bool(by_name(model, one)) for one in (first, last)]
            if named[0] != named[1]:
                name, number = (first, last) if named[0] else (last, first)
                numbers = f"#{first.removeprefix('#')}-#{last.removeprefix('#')}"
                hint = f"; {numbers} is one of numbers" if is_number(name) else ""
                raise InputError(f"expected a range of names or of numbers, got {word!r}: {name!r} is a name, {number!r} a number{hint}")
            if start > end:
                raise InputError(f"expected a range from a lower class to a higher one, got {word!r} ({start} to {end})")
            result += range(start, end + 1)
        else:
            if not is_class(model, word) and model.class_names:
                raise InputError(f"{unknown(model, word)}; --list-classes shows them all")
            result.append(class_index(model, word))
    return result


def is_class(model: ModelInfo, word: str) -> bool:
    return bool(by_name(model, word)) or is_number(word.removeprefix("#"))


def is_number(word: str) -> bool:
    return word.isascii() and word.isdigit()
