"""The coordinator: makes data, starts workers, checks that they agree, and takes turns."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Container, Iterator
from pathlib import Path

import numpy as np

import marref
from benchmarks.cases import (
    BEST,
    CHECKED_STEPS,
    CONFIGS,
    EAGER,
    LOOP_MASK_RATIO,
    LOOP_SEQUENCES,
    LOOP_STEPS,
    MARREF,
    MASK_RATIO,
    MASK_TOKEN,
    NUM_STEPS,
    NUMPY,
    Case,
    needed_flops,
)
from marref import chance, data
from marref.training.runs import Config

GROWTH_ROUNDS = 5
ARRAYS = "arrays.npz"
# Idle threads of the worker before may spin for a while before they sleep.
PAUSE = 0.05

# Without these there is nothing to report; a run goes on without another that fails.
NEEDED = (EAGER, MARREF, BEST, NUMPY)

# These catch contestants that compute another model; `marref compare` is the fine instrument.
TOLERANCES = {"float32": 1e-3, "float64": 1e-9}
# Near ties go either way in float32, and after one token has, others follow.
EQUAL_TOKENS = {"float32": 0.5, "float64": 1.0}


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
    """What was measured in a case, by contestant; those that failed are in the case alone.

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


class FailedError(Exception):
    """A contestant's process has ended; its message is on the standard error."""


class Worker:
    """A contestant in its process; see `benchmarks.worker`."""

    def __init__(self, contestant: str, case: Case, folder: Path):
        arguments = [contestant, json.dumps(dataclasses.asdict(case)), str(folder / ARRAYS)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Of its own, since what an earlier run tuned beside other work would stay.
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")},
        )

    def ask(self, command: str) -> float:
        """Give a command and wait for what comes of it."""
        # If the process has ended, there is no answer either.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{command}\n")
            self.process.stdin.flush()
        return self.answer()

    def answer(self) -> float:
        """Wait for the next answer; the first comes without a command, when all is ready."""
        line = self.process.stdout.readline()
        if not line:
            raise FailedError
        return json.loads(line)


class Team:
    """The workers of a case, by name; one that fails leaves."""

    def __init__(self, case: Case, folder: Path):
        self.case = case
        self.workers = {name: Worker(name, case, folder) for name in case.contestants}

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_exception: object) -> None:
        for worker in self.workers.values():
            worker.process.communicate()

    def wait(self) -> None:
        """Wait until all are ready."""
        for name, worker in list(self.workers.items()):
            with self._leaving(name):
                worker.answer()

    def ask(self, command: str, turn: int = 0) -> dict[str, float]:
        """Give a command to one after the other, while nothing else runs; answers by name.

        Parameters
        ----------
        command : str
        turn : int
            Who comes first; one further with every turn.
        """
        names = list(self.workers)
        start = turn % len(names)
        answers = {}
        for name in (*names[start:], *names[:start]):
            time.sleep(PAUSE)
            with self._leaving(name):
                answers[name] = self.workers[name].ask(command)
        return answers

    @contextlib.contextmanager
    def _leaving(self, name: str) -> Iterator[None]:
        """Let a contestant that fails leave; raise SystemExit if it is needed."""
        try:
            yield
        except FailedError:
            message = f"{name} failed in {self.case.name}; its message is above."
            if name in NEEDED:
                raise SystemExit(message) from None
            say(f"{message} Going on without it.")
            self.workers.pop(name).process.communicate()


@contextlib.contextmanager
def start(case: Case, folder: Path) -> Iterator[Team]:
    """Start all contestants of a case, and wait until they are ready."""
    write_arrays(case, folder)
    with Team(case, folder) as team:
        team.wait()
        yield team


def say(message: str) -> None:
    """Report progress."""
    print(message, file=sys.stderr, flush=True)


def measure(cases: list[Case], rounds: int) -> tuple[list[Agreement], list[Result]]:
    """Check that the contestants agree, and then measure in every case those that were checked."""
    checked: dict[tuple[str, str, str], set[str]] = {}
    agreements, results = [], []
    with tempfile.TemporaryDirectory() as folder:
        for case in _to_check(cases):
            rows = _check(case, Path(folder))
            checked[_kind(case)] = {EAGER, *(row.contestant for row in rows)}
            agreements += rows
        for number, case in enumerate(cases, 1):
            able = checked.get(_kind(case), set(case.contestants))
            progress = f"[{number} of {len(cases)}]"
            results.append(_measure_case(case, able, rounds, Path(folder), progress))
    return agreements, results


def _kind(case: Case) -> tuple[str, str, str]:
    """Return what the outcome of a check depends on."""
    return case.task, case.config, case.dtype


def _to_check(cases: list[Case]) -> list[Case]:
    """One case for every model, dtype and task, without dropout and with all contestants."""
    chosen: dict[tuple[str, str, str], Case] = {}
    for case in cases:
        known = chosen.get(_kind(case), case)
        contestants = dict.fromkeys((*known.contestants, *case.contestants))
        chosen[_kind(case)] = dataclasses.replace(
            known, contestants=tuple(contestants), dropout=0.0
        )
    return [case for case in chosen.values() if case.task != "product"]


def _check(case: Case, folder: Path) -> list[Agreement]:
    """Hold what contestants compute to PyTorch eager; raise SystemExit if it is not the same."""
    name = ", ".join(_kind(case))
    say(f"checking {name}")
    if case.task == "loop":
        # The first steps of a warm-up are small: float32 would not see what a loop leaves out.
        case = dataclasses.replace(case, dtype="float64")
    outcomes = {}
    with start(case, folder) as team:
        for contestant in team.ask(f"check {folder}"):
            with np.load(folder / f"{contestant}.npz") as outcome:
                outcomes[contestant] = dict(outcome)
    reference = outcomes.pop(EAGER)
    if case.task == "decoding":
        rows = [
            Agreement(name, contestant, tokens=float((found["tokens"] == expected).mean()))
            for expected in [reference["tokens"]]
            for contestant, found in outcomes.items()
        ]
        wrong = [row for row in rows if row.tokens < EQUAL_TOKENS[case.dtype]]
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


def _measure_case(
    case: Case, able: Container[str], rounds: int, folder: Path, progress: str
) -> Result:
    """Let every contestant that is able run once a round, in an order that rotates."""
    if case.section in ("length", "batch"):
        rounds = min(rounds, GROWTH_ROUNDS)
    started = time.perf_counter()
    alone, busy = [], []
    names = tuple(name for name in case.contestants if name in able)
    with start(dataclasses.replace(case, contestants=names), folder) as team:
        # The first warm-up compiles, and what it tunes it chooses by time.
        for _ in range(2):
            team.ask("measure")
        for turn in range(rounds):
            alone.append(team.ask("measure", turn))
            if case.section == "neighbour":
                with _busy_process():
                    busy.append(team.ask("measure", turn))
        memory = {name: int(answer) for name, answer in team.ask("memory").items()}
    say(f"{progress} {case.name}: {time.perf_counter() - started:.0f} s")
    mask_ratio = LOOP_MASK_RATIO if case.task == "loop" else MASK_RATIO
    flops = needed_flops(case, round(mask_ratio * case.seq_len), _reveal_counts(case).tolist())
    seconds, busy_seconds = (
        {name: [answers[name] for answers in measured] for name in memory}
        for measured in (alone, busy)
    )
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


def write_arrays(case: Case, folder: Path) -> None:
    """Write the weights and the batch that all contestants of a case share."""
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
    if case.task == "loop":
        arrays |= _of_loop(case)
    np.savez(folder / ARRAYS, **arrays)


def _of_loop(case: Case) -> dict[str, np.ndarray]:
    """Make the data, the options, and the batches that marref draws in its first steps.

    The options are those that a run of these sizes gets.
    """
    sizes = CONFIGS[case.config]
    num_ids = sizes.vocab_size - 1
    ids = np.random.default_rng(1).integers(num_ids, size=(LOOP_SEQUENCES, case.seq_len))
    dataset = data.Dataset(ids, data.Ids(num_ids), length=case.seq_len)
    config = Config(
        embed_dim=sizes.embed_dim,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        dropout=case.dropout,
        num_steps=LOOP_STEPS,
        batch_size=case.batch,
        dtype=case.dtype,
    ).resolved(dataset)
    arrays = {"ids": ids, "options": np.array(json.dumps(dataclasses.asdict(config)))}
    for number in range(CHECKED_STEPS):
        targets = dataset.draw(chance.generator(config.seed, "batch", number), case.batch)
        rng = chance.generator(config.seed, "mask", number)
        ratio = marref.sample_mask_ratio(rng, config.mask_schedule, size=case.batch)
        tokens, mask = marref.mask_tokens(targets, ratio, rng)
        of_step = {"tokens": tokens, "targets": targets, "mask": mask}
        arrays |= {f"{name}/{number}": array for name, array in of_step.items()}
    return arrays


def _reveal_counts(case: Case) -> np.ndarray:
    return marref.schedules.cosine(case.seq_len, NUM_STEPS)
