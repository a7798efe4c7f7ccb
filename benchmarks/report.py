"""The results as text: the machine, what agreed, tables of time and memory."""

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.cases import BEST, CONTESTANTS, EAGER, MARREF, Case
from benchmarks.measuring import Agreement, Result

LIMIT = "physical limit"
PEER = "peer at its best"
FAILED = "failed"
MIB = 2**20
SECTIONS = {"training": "Training", "loop": "The training loop", "decoding": "Decoding"}
GROWTHS = {"length": "Growth with length", "batch": "Growth with batch size"}


def machine() -> dict[str, str]:
    """Describe the machine and the software, without names of hosts and folders."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    versions = {
        name: importlib.metadata.version(package)
        for name, package in (("SciPy", "scipy"), ("PyTorch", "torch"), ("JAX", "jax"))
    }
    return {
        "CPU": f"{_cpu()}, {os.cpu_count()} cores",
        "system": f"{_system()}, {platform.machine()}",
        "Python": platform.python_version(),
        "NumPy": f"{np.__version__} with {blas['name']} {blas['version']}",
        **versions,
    }


def _cpu() -> str:
    """Find the model of the CPU, where the system tells."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return f"{platform.system()} {platform.release()}"


class Measurements:
    """The results, by case, and what is derived from them."""

    def __init__(self, results: Sequence[Result]):
        self.results = results
        # Floating-point operations per second at the peak, by dtype.
        self.peaks: dict[str, float] = {}
        for result in self.section("product"):
            fastest = min(min(seconds) for seconds in result.seconds.values())
            self.peaks[result.case.dtype] = result.flops / fastest

    def section(self, *names: str) -> list[Result]:
        """Results of some sections."""
        return [result for result in self.results if result.case.section in names]

    def limit_seconds(self, result: Result) -> float:
        """Time for the floating-point operations that are needed, at the measured peak."""
        return result.flops / self.peaks[result.case.dtype]

    def limit_ratio(self, result: Result) -> float:
        """Divide the same by the time of PyTorch eager."""
        return self.limit_seconds(result) / statistics.median(result.seconds[EAGER])


def ratios(result: Result, contestant: str) -> list[float]:
    """Time over that of PyTorch eager in the same round, for every round."""
    pairs = zip(result.seconds[contestant], result.seconds[EAGER], strict=True)
    return [mine / eager for mine, eager in pairs]


def best_peer(result: Result) -> str:
    """Name the contestant with the smallest median ratio that is not marref."""
    peers = [name for name in result.seconds if name not in (MARREF, BEST)]
    return min(peers, key=lambda name: statistics.median(ratios(result, name)))


def _spread(values: Sequence[float]) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.{1 if seconds < 0.1 else 0}f}"


def _memory(result: Result, contestant: str) -> str:
    return f"{result.memory[contestant] / MIB:.0f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render(
    described: dict[str, str],
    agreements: Sequence[Agreement],
    results: Sequence[Result],
) -> str:
    """Write everything that was measured as Markdown."""
    measurements = Measurements(results)
    parts = [
        "### The machine",
        "\n".join(f"- {name}: {value}" for name, value in described.items()),
        _peaks(measurements),
        _rounds(results),
    ]
    for section, title in SECTIONS.items():
        if found := measurements.section(section):
            parts += [f"### {title}", _overview(measurements, found)]
    for section, title in GROWTHS.items():
        if found := measurements.section(section):
            parts += [f"### {title}", _growth(measurements, section, found)]
    for result in measurements.section("neighbour"):
        parts += ["### Beside a busy process", _neighbour(result)]
    if found := measurements.section(*SECTIONS):
        parts.append("### Every contestant of every case")
        for result in found:
            parts += [f"**{_capitalised(result.case.name)}**", _details(measurements, result)]
    return "\n\n".join([*parts, "### Agreement", *_agreement(agreements)])


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def _peaks(measurements: Measurements) -> str:
    lines = []
    for result in measurements.section("product"):
        case = result.case
        speeds = ", ".join(
            f"{'PyTorch' if name == EAGER else name} {result.flops / min(seconds) / 1e9:.0f}"
            for name, seconds in result.seconds.items()
        )
        lines.append(
            f"- Largest product speed, {case.seq_len}×{case.seq_len} {case.dtype}, in 10⁹ "
            f"floating-point operations a second: {speeds}"
        )
    return "\n".join(lines)


def _rounds(results: Sequence[Result]) -> str:
    counts = sorted({len(result.seconds[EAGER]) for result in results}, reverse=True)
    return (
        f"Medians of {' or '.join(map(str, counts))} rounds; in parentheses the smallest and the "
        f"largest. A ratio divides by the time of {EAGER} in the same round."
    )


def _overview(measurements: Measurements, results: Sequence[Result]) -> str:
    """Median ratios: a row for each case, a column for each contestant."""
    everyone = [
        name
        for name in CONTESTANTS
        if name != EAGER and any(name in result.case.contestants for result in results)
    ]
    rows = []
    for result in results:
        peer = best_peer(result)
        rows.append(
            [
                _short(result.case),
                *(_median_ratio(result, name) for name in everyone),
                f"{_median_ratio(result, peer)} ({peer})",
                f"{measurements.limit_ratio(result):.2f}",
            ]
        )
    return _table([f"time / {EAGER}", *everyone, PEER, LIMIT], rows)


def _median_ratio(result: Result, contestant: str) -> str:
    if contestant in result.seconds:
        return f"{statistics.median(ratios(result, contestant)):.2f}"
    return FAILED if contestant in result.case.contestants else ""


def _short(case: Case) -> str:
    """Name a case without its section, which the heading tells."""
    return case.name.removeprefix(f"{case.section}, ")


def _details(measurements: Measurements, result: Result) -> str:
    rows = [_detail(result, name) for name in result.case.contestants]
    limit = measurements.limit_seconds(result)
    rows.append(
        [LIMIT, f"{measurements.limit_ratio(result):.2f}", _milliseconds(limit), "", ""],
    )
    header = ["", f"time / {EAGER}", "milliseconds", "peak MiB", f"memory / {EAGER}"]
    return _table(header, rows)


def _detail(result: Result, name: str) -> list[str]:
    if name not in result.seconds:
        return [name, FAILED, "", "", ""]
    return [
        name,
        _spread(ratios(result, name)),
        _milliseconds(statistics.median(result.seconds[name])),
        _memory(result, name),
        f"{result.memory[name] / result.memory[EAGER]:.2f}",
    ]


def _growth(measurements: Measurements, section: str, results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        medians = {name: statistics.median(values) for name, values in result.seconds.items()}
        rows.append(
            [
                str(size(result.case)),
                _spread(ratios(result, MARREF)),
                _spread(ratios(result, BEST)),
                f"{measurements.limit_ratio(result):.2f}",
                _milliseconds(medians[MARREF]),
                _milliseconds(medians[EAGER]),
                _memory(result, MARREF),
                _memory(result, EAGER),
                f"{result.memory[MARREF] / result.memory[EAGER]:.2f}",
            ]
        )
    header = [
        section,
        f"{MARREF} time / {EAGER}",
        f"{BEST} time / {EAGER}",
        LIMIT,
        f"{MARREF} ms",
        f"{EAGER} ms",
        f"{MARREF} MiB",
        f"{EAGER} MiB",
        f"memory / {EAGER}",
    ]
    return _table(header, rows)


def size(case: Case) -> int:
    """Return what grows in a case of growth."""
    return case.seq_len if case.section == "length" else case.batch


def _neighbour(result: Result) -> str:
    rows = []
    for name, alone in result.seconds.items():
        busy = result.busy_seconds[name]
        slower = [beside / by_itself for beside, by_itself in zip(busy, alone, strict=True)]
        rows.append(
            [
                name,
                _milliseconds(statistics.median(alone)),
                _milliseconds(statistics.median(busy)),
                _spread(slower),
            ]
        )
    return _table(["", "ms alone", "ms beside it", "beside it / alone"], rows)


def _agreement(agreements: Sequence[Agreement]) -> list[str]:
    def number(value: float | None) -> str:
        return f"{value:.0e}"

    trained = [
        [row.case, row.contestant, *map(number, (row.loss, row.gradients, row.loss_after))]
        for row in agreements
        if row.tokens is None
    ]
    decoded = [
        [row.case, row.contestant, f"{row.tokens:.1%}"]
        for row in agreements
        if row.tokens is not None
    ]
    tables = []
    if trained:
        header = ["", "contestant", "loss", "gradients", "loss after 3 steps"]
        tables.append(_table(header, trained))
    if decoded:
        tables.append(_table(["", "contestant", "equal tokens"], decoded))
    return tables
