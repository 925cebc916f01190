"""Measurements as tables to read, and as a chart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runtime.files import WholeFile
from .footprint import Footprint
from .measure import Case, Measurement

GRAPHS = ("condition", "encoder", "decoder", "sampler", "image_decoder")
LEGEND: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 5, "fontsize": 8, "frameon": False}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its columns lined up."""
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines)


def title(case: Case) -> str:
    images = f"{case.batch} picture{'s' if case.batch > 1 else ''}"
    return f"{images}, {case.steps} steps{'' if case.pictures else ', tokens only'}"


def times(measurements: Sequence[Measurement], compared: Sequence[str], shares: Mapping[str, float]) -> str:
    """Of one case. compared: names of contenders that all are set against; shares: of the matrix rate, by name."""
    head = ["", "seconds", "range", "pictures/s", *(f"× {name}" for name in compared), *(["of the matrix rate"] if shares else [])]
    by_name = {one.name: one for one in measurements}
    rows = []
    for one in measurements:
        ratios = [f"{one.times_faster(by_name[name]):.2f}" for name in compared]
        share = [f"{shares[one.name]:.1%}" if one.name in shares else ""] if shares else []
        spread = f"{min(one.seconds):.3g} to {max(one.seconds):.3g}"
        rows.append([one.name, f"{one.median:.3g}", spread, f"{one.rate:.3g}", *ratios, *share])
    return table(head, rows)


def breakdown(measurements: Sequence[Measurement]) -> str:
    """Where engines spend a batch's time; empty without any."""
    rows = []
    for one in measurements:
        if one.graphs:
            graphs = [f"{1000 * one.graphs[graph]:.1f}" if graph in one.graphs else "" for graph in GRAPHS]
            rows.append([one.name, *graphs, " ".join(f"{1000 * seconds:.0f}" for seconds in one.steps)])
    return table(["milliseconds", *(graph.replace("_", " ") for graph in GRAPHS), "by step"], rows) if rows else ""


def growth(found: Sequence[Sequence[Measurement]]) -> str:
    """How many times as long a batch takes with every further number of steps as with the first; empty for one number of steps."""
    first = found[0][0].case.steps
    several = [row for row in found if row[0].case.steps != first]
    short = {(one.name, one.case.batch): one for row in found for one in row if one.case.steps == first}
    head = [f"times as long as with {first} steps", *(title(row[0].case) for row in several)]
    lines = zip(*([f"{short[one.name, one.case.batch].times_faster(one):.2f}" for one in row] for row in several), strict=True)
    return table(head, ([one.name, *line] for one, line in zip(found[0], lines, strict=True))) if several else ""


def footprints(found: Mapping[str, Mapping[Case, Footprint]]) -> str:
    """Load time and memory of engines; cases are columns."""
    cases = list(dict.fromkeys(case for ones in found.values() for case in ones))
    on_device = any(one.device_memory is not None for ones in found.values() for one in ones.values())
    head = ["", "load", "to the first batch"]
    for case in cases:
        head += [f"memory at {case.batch} (peak)", *([f"of the GPU at {case.batch}"] if on_device else [])]
    rows = []
    for name, ones in found.items():
        first = next(iter(ones.values()))
        row = [name, f"{first.load:.2f} s", f"{first.first:.2f} s"]
        for case in cases:
            row += [f"{size(ones[case].memory)} ({size(ones[case].peak_memory)})", *([size(ones[case].device_memory)] if on_device else [])]
        rows.append(row)
    return table(head, rows)


def size(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e9:.2f} GB"


def plain(text: str) -> str:
    """Without what no font has: bytes of paths that are no UTF-8."""
    return text.encode(errors="replace").decode()


def draw_chart(cases: Sequence[Sequence[Measurement]], compared: Sequence[str], heading: str, path: Path) -> None:
    """Pictures a second of every contender, and where engines spend a picture's time; a colour a case, a colour a graph."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [one.name for one in cases[0]]
    engines = [(case, one) for case in cases for one in case if one.graphs]
    heights = (0.3 + 0.3 * len(names) * len(cases), 0.6 + 0.3 * len(engines))
    figure, (speed, parts) = plt.subplots(
        2, 1, figsize=(10, 1.6 + sum(heights)), layout="constrained", gridspec_kw={"height_ratios": heights}
    )
    figure.suptitle(plain(heading), fontsize=9, parse_math=False)
    bar = 0.8 / len(cases)
    for number, case in enumerate(cases):
        places = [i + number * bar for i in range(len(names))]
        drawn = speed.barh(places, [one.rate for one in case], height=bar * 0.9, label=title(case[0].case))
        base = next((one for one in case if one.name in compared), None)
        labels = [f"{one.rate:.3g}" + (f"  ({one.times_faster(base):.2f}×)" if base and one is not base else "") for one in case]
        speed.bar_label(drawn, labels, padding=3, fontsize=8)
    speed.set_yticks([i + bar * (len(cases) - 1) / 2 for i in range(len(names))], list(map(plain, names)), fontsize=8, parse_math=False)
    speed.set(xlabel="pictures a second" + (f" (× {compared[0]})" if compared else ""))
    speed.margins(x=0.18)
    speed.invert_yaxis()
    speed.legend(**LEGEND)
    rows = [f"{one.name}, {title(case[0].case)}" for case, one in engines]
    left = [0.0] * len(engines)
    for graph in GRAPHS:
        widths = [1000 * one.graphs.get(graph, 0) / one.case.batch for _, one in engines]
        if any(widths):
            parts.barh(range(len(engines)), widths, left=left, height=0.7, label=graph.replace("_", " "))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    parts.set_yticks(range(len(engines)), list(map(plain, rows)), fontsize=8, parse_math=False)
    parts.set(xlabel="milliseconds a picture")
    parts.invert_yaxis()
    parts.legend(**LEGEND)
    with WholeFile(path) as partial:
        figure.savefig(partial, dpi=120, format=path.suffix[1:].lower())
    plt.close(figure)
