"""The results as a picture."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, Locator, LogLocator, NullLocator

from benchmarks.cases import CONTESTANTS, EAGER, MARREF
from benchmarks.measuring import Result
from benchmarks.report import LIMIT, MIB, Measurements, ratios, size

STYLES = ("black |", "C0 o", "C9 s", "C2 D", "C8 d", "C5 ^", "C4 v", "C3 *", "C1 X", "grey P")
COLOURS, MARKERS = (
    dict(zip(CONTESTANTS, parts, strict=True))
    for parts in zip(*(style.split() for style in STYLES), strict=True)
)
LIMIT_STYLE = {"color": "0.45", "linestyle": "--"}


def draw(path: Path, results: Sequence[Result]) -> None:
    """Draw ratios of training and decoding above, growth below."""
    measurements = Measurements(results)
    figure = Figure(figsize=(13, 10), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(3, 2))
    training, decoding = upper.subplots(1, 2)
    _draw_ratios(training, measurements, "training")
    _draw_ratios(decoding, measurements, "decoding")
    columns = lower.subplots(1, 4)
    _draw_growth(*columns[:2], measurements, "length")
    _draw_growth(*columns[2:], measurements, "batch")
    entries: dict[str, Any] = {}
    for axes in (training, decoding):
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    upper.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)


def _draw_ratios(axes: Any, measurements: Measurements, section: str) -> None:
    """Draw a row for each case: medians as markers, smallest to largest as lines."""
    results = measurements.section(section)
    names = [name for name in CONTESTANTS if any(name in result.seconds for result in results)]
    for offset, name in enumerate(names):
        label: str | None = name
        for row, result in enumerate(results):
            if name not in result.seconds:
                continue
            values = ratios(result, name)
            height = row + 0.7 * ((offset + 0.5) / len(names) - 0.5)
            axes.plot([min(values), max(values)], [height] * 2, color=COLOURS[name])
            axes.plot(
                statistics.median(values),
                height,
                MARKERS[name],
                color=COLOURS[name],
                label=label,
            )
            label = None
    for row, result in enumerate(results):
        axes.plot(
            [measurements.limit_ratio(result)] * 2,
            [row - 0.4, row + 0.4],
            label=LIMIT if row == 0 else None,
            **LIMIT_STYLE,
        )
    prefix = f"{section}, "
    axes.set_yticks(range(len(results)), [r.case.name.removeprefix(prefix) for r in results])
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis, LogLocator(subs=(1, 2, 5)))
    axes.grid(axis="x", color="0.9")
    axes.set_title(section)
    axes.set_xlabel(f"time / {EAGER}, logarithmic")


def _draw_growth(time_axes: Any, memory_axes: Any, measurements: Measurements, grown: str) -> None:
    results = measurements.section(grown)
    sizes = [size(result.case) for result in results]
    for name in (EAGER, MARREF):
        seconds = [statistics.median(result.seconds[name]) for result in results]
        memory = [result.memory[name] / MIB for result in results]
        for axes, values in ((time_axes, seconds), (memory_axes, memory)):
            axes.plot(sizes, values, color=COLOURS[name], marker=MARKERS[name])
    time_axes.plot(sizes, [measurements.limit_seconds(result) for result in results], **LIMIT_STYLE)
    for axes, what in (
        (time_axes, "training step, seconds"),
        (memory_axes, "training step, peak MiB"),
    ):
        axes.set_xscale("log")
        axes.set_yscale("log")
        _plain_ticks(axes.xaxis, FixedLocator(sizes))
        _plain_ticks(axes.yaxis, LogLocator(subs=(1, 2, 5)))
        axes.grid(color="0.9")
        axes.set_xlabel(grown)
        axes.set_title(what)


def _plain_ticks(axis: Any, locator: Locator) -> None:
    """Label an axis with numbers written out."""
    axis.set_major_locator(locator)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
