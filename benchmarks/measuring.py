"""The coordinator: makes data, starts workers, checks that they agree, and takes turns."""

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import marref
from benchmarks.cases import (
    CONFIGS,
    EAGER,
    MASK_RATIO,
    MASK_TOKEN,
    NUM_STEPS,
    Case,
    needed_flops,
)

GROWTH_ROUNDS = 5
# Idle threads of the worker before may spin for a while before they sleep.
PAUSE = 0.05

# These catch contestants that compute another model; `marref compare` is the fine instrument.
TOLERANCES = {"float32": 1e-3, "float64": 1e-9}


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What a contestant computes beside PyTorch eager; training or decoding, else None.

    Parameters
    ----------
    case, contestant : str
    loss : float or None
        Relative difference of the loss at the initial weights.
    gradients : float or None
        The largest difference of a gradient, relative to the largest entry of its array.
    loss_after : float or None
        Relative difference of the loss after a few steps of Adam.
    tokens : float or None
        Fraction of equal tokens.
    """

    case: str
    contestant: str
    loss: float | None = None
    gradients: float | None = None
    loss_after: float | None = None
    tokens: float | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured in a case, by contestant.

    Parameters
    ----------
    case : Case
    flops : float
        Floating-point operations that the case needs.
    seconds : dict of str to list
        Of every round.
    busy_seconds : dict of str to list
        The same beside a busy process, in the case of the neighbour.
    memory : dict of str to int
        The largest memory in bytes, beyond that after the imports.
    """

    case: Case
    flops: float
    seconds: dict[str, list[float]]
    busy_seconds: dict[str, list[float]]
    memory: dict[str, int]


class Worker:
    """A contestant in its process; see `benchmarks.worker`."""

    def __init__(self, contestant: str, case: Case, arrays_file: Path):
        self.name = f"{contestant} ({case.name})"
        arguments = [contestant, json.dumps(dataclasses.asdict(case)), str(arrays_file)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.process.communicate()

    def tell(self, command: str) -> None:
        """Give a command; `answer` waits for what comes of it."""
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def answer(self) -> float:
        """Wait for the next answer; the first comes without a command, when all is ready."""
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} failed; its message is above.")
        return json.loads(line)


@contextlib.contextmanager
def _start(case: Case, arrays_file: Path) -> Iterator[dict[str, Worker]]:
    """Start all contestants of a case, by name, and wait until they are ready."""
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(name, case, arrays_file)) for name in case.contestants
        }
        for worker in workers.values():
            worker.answer()
        yield workers


def _measure_one(worker: Worker) -> float:
    """Measure while nothing else runs."""
    time.sleep(PAUSE)
    worker.tell("measure")
    return worker.answer()


def say(message: str) -> None:
    """Report progress."""
    print(message, file=sys.stderr, flush=True)


def measure(cases: list[Case], rounds: int) -> tuple[list[Agreement], list[Result]]:
    """Check that the contestants agree, and then measure every case."""
    with tempfile.TemporaryDirectory() as folder:
        agreements = [row for case in _to_check(cases) for row in _check(case, Path(folder))]
        results = [
            _measure_case(case, rounds, Path(folder), f"[{number} of {len(cases)}]")
            for number, case in enumerate(cases, 1)
        ]
    return agreements, results


def _to_check(cases: list[Case]) -> list[Case]:
    """One case for every model, dtype and task, without dropout and with all contestants."""
    chosen: dict[tuple[str, str, str], Case] = {}
    for case in cases:
        key = (case.task, case.config, case.dtype)
        known = chosen.get(key, case)
        contestants = dict.fromkeys((*known.contestants, *case.contestants))
        chosen[key] = dataclasses.replace(known, contestants=tuple(contestants), dropout=0.0)
    return [case for case in chosen.values() if case.task != "product"]


def _check(case: Case, folder: Path) -> list[Agreement]:
    """Hold what contestants compute to PyTorch eager; raise SystemExit if it is not the same."""
    name = f"{case.task}, {case.config}, {case.dtype}"
    say(f"checking {name}")
    outcomes = {}
    with _start(case, _write_arrays(case, folder)) as workers:
        for contestant, worker in workers.items():
            worker.tell(f"check {folder / contestant}.npz")
        for contestant, worker in workers.items():
            worker.answer()
            with np.load(folder / f"{contestant}.npz") as outcome:
                outcomes[contestant] = dict(outcome)
    reference = outcomes.pop(EAGER)
    if case.task == "decoding":
        rows = [
            Agreement(name, contestant, tokens=float((found["tokens"] == expected).mean()))
            for expected in [reference["tokens"]]
            for contestant, found in outcomes.items()
        ]
        # Near ties go either way in float32, and after one token has, others follow.
        wrong = [row for row in rows if case.dtype == "float64" and row.tokens != 1.0]
    else:
        rows = [_agreement(name, *item, reference) for item in outcomes.items()]
        tolerance = TOLERANCES[case.dtype]
        wrong = [
            row
            for row in rows
            if not all(value <= tolerance for value in (row.loss, row.gradients, row.loss_after))
        ]
    for row in wrong:
        say(f"{row}")
    if wrong:
        raise SystemExit(f"{wrong[0].contestant} does not compute what {EAGER} computes.")
    return rows


def _agreement(
    case: str, contestant: str, found: dict[str, np.ndarray], reference: dict[str, np.ndarray]
) -> Agreement:
    def difference(name: str) -> float:
        return float(np.abs(found[name] - reference[name]).max() / np.abs(reference[name]).max())

    if set(found) != set(reference):
        raise SystemExit(f"{contestant}: other gradients: {sorted(set(found) ^ set(reference))}")
    # The gradient of a key bias is exactly 0; what is computed for it is rounding.
    gradients = [
        difference(name)
        for name in reference
        if name.startswith("gradients/") and not name.endswith(".attention.key.bias")
    ]
    return Agreement(case, contestant, difference("loss"), max(gradients), difference("loss_after"))


def _measure_case(case: Case, rounds: int, folder: Path, progress: str) -> Result:
    """Let every contestant run once a round, in an order that rotates."""
    if case.section in ("length", "batch"):
        rounds = min(rounds, GROWTH_ROUNDS)
    started = time.perf_counter()
    seconds: dict[str, list[float]] = {name: [] for name in case.contestants}
    busy_seconds: dict[str, list[float]] = {name: [] for name in case.contestants}

    with _start(case, _write_arrays(case, folder)) as workers:
        # The first warm-up compiles, which need not wait for others; the second runs alone.
        for worker in workers.values():
            worker.tell("measure")
        for worker in workers.values():
            worker.answer()
        for worker in workers.values():
            _measure_one(worker)
        for number in range(rounds):
            start = number % len(workers)
            order = (*case.contestants[start:], *case.contestants[:start])
            for name in order:
                seconds[name].append(_measure_one(workers[name]))
            if case.section == "neighbour":
                with _busy_process():
                    for name in order:
                        busy_seconds[name].append(_measure_one(workers[name]))
        for worker in workers.values():
            worker.tell("memory")
        memory = {name: int(worker.answer()) for name, worker in workers.items()}
    say(f"{progress} {case.name}: {time.perf_counter() - started:.0f} s")
    flops = needed_flops(case, round(MASK_RATIO * case.seq_len), _reveal_counts(case).tolist())
    return Result(case, flops, seconds, busy_seconds, memory)


@contextlib.contextmanager
def _busy_process() -> Iterator[None]:
    """Keep one core busy."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        time.sleep(0.2)
        try:
            yield
        finally:
            process.kill()


def _write_arrays(case: Case, folder: Path) -> Path:
    """Write the weights and the batch that all contestants of a case share."""
    path = folder / "arrays.npz"
    arrays: dict[str, np.ndarray] = {}
    if case.task != "product":
        config = CONFIGS[case.config]
        model = marref.build(**dataclasses.asdict(config))
        rng = np.random.default_rng(0)
        leaves = marref.trees.flatten(model.init(rng, case.dtype))
        targets = rng.integers(1, config.vocab_size, (case.batch, case.seq_len))
        tokens, mask = marref.mask_tokens(targets, MASK_RATIO, rng, MASK_TOKEN)
        positions = marref.sinusoidal_table(case.seq_len, config.embed_dim)
        arrays = {
            **{f"params/{name}": leaf for name, leaf in leaves.items()},
            "positions": positions.astype(case.dtype),
            "tokens": tokens,
            "targets": targets,
            "mask": mask,
            "reveal_counts": _reveal_counts(case),
        }
    np.savez(path, **arrays)
    return path


def _reveal_counts(case: Case) -> np.ndarray:
    return marref.schedules.cosine(case.seq_len, NUM_STEPS)
