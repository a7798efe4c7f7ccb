"""Kill runs again and again, at random moments, and see that they end as if nobody had.

    python -m benchmarks.killed [KILLS]

A run goes on in one child process after another.  They are killed with SIGKILL, KILLS times in all
(100), until one reaches the end; then the next run begins.  What each leaves is compared, bit for
bit, with a run that nobody killed.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from marref import data
from marref.training import checkpoints, runs


class Report(NamedTuple):
    """What became of the runs; ``kills`` of each, ``differing`` the files that are not as meant."""

    kills: list[int]
    without_checkpoint: int
    differing: list[str]


def counting(first: np.ndarray, num_ids: int = 5) -> data.Dataset:
    """Sequences of 8 ids that count on from these: data that need no file."""
    ids = (first[:, np.newaxis] + np.arange(8)) % num_ids
    return data.Dataset(ids, data.Ids(num_ids), length=8)


FIRST = np.random.default_rng(0).integers(5, size=100)
DATASET = counting(FIRST)


def config(num_steps: int) -> runs.Config:
    """Choose a tiny model that validates and saves often."""
    return runs.Config(
        embed_dim=16,
        num_layers=1,
        num_heads=2,
        num_steps=num_steps,
        batch_size=8,
        accumulate=2,
        checkpoint_every=5,
        validate_every=10,
        num_threads=2,
    )


def go_on(out: Path, num_steps: int) -> None:
    """Start a run or, where there is one, resume it: what a child process does."""
    if (out / "config.json").exists():
        runs.resume(out, DATASET)
    else:
        runs.start(DATASET, out, config(num_steps))


def run(kills: int, num_steps: int, folder: Path, rng: random.Random) -> Report:
    """Kill runs so many times in all, let each end, and compare it with one that was not killed."""
    child = _child(folder / "whole", num_steps)
    start = time.perf_counter()
    _ended(child, None)
    longest = (time.perf_counter() - start) / 2
    report = Report([], 0, [])
    while sum(report.kills) < kills:
        out = folder / f"killed-{len(report.kills)}"
        report.kills.append(0)
        while not _ended(_child(out, num_steps), rng.random() * longest):
            report.kills[-1] += 1
            if not checkpoints.found(out / "checkpoints"):
                report = report._replace(without_checkpoint=report.without_checkpoint + 1)
            if sum(report.kills) == kills:
                _ended(_child(out, num_steps), None)
                break
        report.differing.extend(differences(folder / "whole", out))
    return report


def _ended(child: subprocess.Popen, patience: float | None) -> bool:
    """Whether a child ends by itself in some seconds; it is killed otherwise."""
    with child:
        try:
            status = child.wait(patience)
        except subprocess.TimeoutExpired:
            child.kill()
            return False
    if status:
        raise RuntimeError(f"a child failed with status {status}")
    return True


def differences(one: Path, other: Path) -> list[str]:
    """Name the files in which two runs differ, of the history all but the speed."""
    names = sorted(
        {str(path.relative_to(top)) for top in (one, other) for path in top.rglob("*.*")}
    )
    return [name for name in names if _content(one / name) != _content(other / name)]


def _content(path: Path) -> object:
    if not path.exists():
        return None
    if path.name == "history.csv":
        lines = [line.split(",") for line in path.read_text("utf-8").splitlines()]
        return [[*columns[:4], *columns[5:]] for columns in lines]
    return path.read_bytes()


def _child(out: Path, num_steps: int) -> subprocess.Popen:
    command = (
        "from pathlib import Path; from benchmarks import killed; print(flush=True); "
        f"killed.go_on(Path({str(out)!r}), {num_steps})"
    )
    child = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE)
    child.stdout.readline()
    return child


def main() -> None:
    """Kill, resume, compare, and print what became of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.killed", description=__doc__)
    parser.add_argument("kills", type=int, nargs="?", default=100)
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as folder:
        report = run(kills, 100, Path(folder), random.Random(0))
    print(
        f"{len(report.kills)} runs, {sum(report.kills)} kills, {report.without_checkpoint} of them "
        "before the first checkpoint"
    )
    if report.differing:
        sys.exit(f"different: {', '.join(report.differing)}")
    print("config, history, parameters, moments and average are those of the run that was not")


if __name__ == "__main__":
    main()
