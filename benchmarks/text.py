"""Train marref and PyTorch on a text, for as many minutes each, and see what both have learnt.

    python -m benchmarks.text [PATHS] --minutes 10

Without PATHS the text is Python's own documentation: the topics of ``help()``, which are its
language reference, and the docstrings of its standard library, about 1.7 MB.

marref trains as ``marref train`` does without options.  The model in PyTorch is the same: it starts
at the same parameters, and has the same data, split, schedule, batch, dtype, optimiser and average.
How many steps fit into the minutes is found for each by taking some; both schedules then end when
the minutes do.  Both are validated ten times, by the same function on the same windows behind the
same masks, and their best is reported.  They run one after the other, each in a process of its own.
"""

import argparse
import ast
import concurrent.futures
import dataclasses
import functools
import math
import multiprocessing
import re
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases import Config as Sizes
from marref import chance, data, fast, sinusoidal_table, training, trees
from marref.training import loop, runs
from marref.training.runs import VALIDATION_RATIOS, Config, spread

CALIBRATION = 0.05
"""The share of the time in which steps are counted."""

_NUM_BLANKS = 200
_SHOWN = 6
_TESTS = {"test", "tests", "idlelib", "site-packages", "pydoc_data"}
_LONG = 200


class Result(NamedTuple):
    """What one of both has come to.

    Parameters
    ----------
    name : str
    seconds : float
        Of training and validating.
    num_steps : int
    tokens_per_second : float
        Of training alone.
    bits : list of float
        Per masked token, by `VALIDATION_RATIOS`, of the best validation.
    """

    name: str
    seconds: float
    num_steps: int
    tokens_per_second: float
    bits: list[float]


def documentation() -> str:
    """Collect Python's own documentation."""
    from pydoc_data.topics import topics

    folder = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in folder.rglob("*.py") if not _TESTS & {*path.parts}]
    strings = [text for path in sorted(paths) for text in _docstrings(path)]
    return "\n\n".join([*(topics[name] for name in sorted(topics)), *strings])


def _docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a file that are prose, and not a line."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text) > _LONG:
                yield text


def in_marref(dataset: data.Dataset, config: Config, seconds: float, out: Path) -> Result:
    """Train as `marref.training.runs` does."""
    options = config.resolved(dataset)
    model = options.model(dataset.vocab_size)
    train, validation = dataset.split(options.validation_fraction, options.seed)
    held_out = spread(validation, runs.VALIDATION_SEQUENCES)
    state = loop.init(options, model)
    predict = functools.partial(fast.logits, model, state.params, num_threads=options.num_threads)

    def step(number: int) -> None:
        nonlocal state
        state, _ = loop.step(options, model, train, state, number)

    num_steps = steps_in(seconds, step, lambda: validated(predict, held_out, options))
    options = dataclasses.replace(config, num_steps=num_steps).resolved(dataset)
    start = time.perf_counter()
    run = runs.start(dataset, out, options)
    taken = time.perf_counter() - start
    best = runs.best(out)
    predict = functools.partial(fast.logits, run.model, best.state.averaged)
    speeds = [record.tokens_per_second for record in run.history]
    bits = validated(predict, held_out, options)
    return Result("marref", taken, num_steps, float(np.median(speeds)), bits)


def in_torch(dataset: data.Dataset, config: Config, seconds: float) -> Result:
    """Do the same in PyTorch."""
    import torch

    from benchmarks.contestants.in_torch import Trainer

    options = config.resolved(dataset)
    train, validation = dataset.split(options.validation_fraction, options.seed)
    held_out = spread(validation, runs.VALIDATION_SEQUENCES)
    stream = 1 + torch.from_numpy(train.tokens.astype(np.int64))
    window = torch.arange(dataset.length)

    def trainer_of(resolved: Config) -> Trainer:
        return Trainer(_torch_model(dataset, resolved), dataclasses.asdict(resolved), True)

    def step(trainer: Trainer, _: int = 0) -> None:
        first = torch.randint(len(train), (options.batch_size, 1))
        trainer.step(stream[first + window])

    def validate(trainer: Trainer) -> list[float]:
        average = trainer.average.module.eval()
        with torch.inference_mode():
            return validated(
                lambda tokens: average(torch.from_numpy(tokens)).numpy(), held_out, options
            )

    trial = trainer_of(options)
    num_steps = steps_in(seconds, functools.partial(step, trial), lambda: validate(trial))
    options = dataclasses.replace(config, num_steps=num_steps).resolved(dataset)
    trainer = trainer_of(options)
    found, training_seconds, start = [], 0.0, time.perf_counter()
    for number in range(1, num_steps + 1):
        before = time.perf_counter()
        step(trainer)
        training_seconds += time.perf_counter() - before
        if number % options.validate_every == 0 or number == num_steps:
            found.append(validate(trainer))
    taken = time.perf_counter() - start
    speed = num_steps * options.batch_size * dataset.length / training_seconds
    return Result("PyTorch", taken, num_steps, speed, min(found, key=sum))


def _torch_model(dataset: data.Dataset, options: Config) -> Any:
    """Make the model, with marref's initial parameters."""
    from benchmarks.contestants.in_torch import MAR

    model = options.model(dataset.vocab_size)
    leaves = trees.flatten(loop.init(options, model).params)
    arrays = {f"params/{name}": leaf for name, leaf in leaves.items()}
    table = sinusoidal_table(dataset.length, model.embed_dim, model.positions)
    sizes = Sizes(
        model.vocab_size, model.embed_dim, model.num_layers, model.num_heads, dataset.length
    )
    return MAR(sizes, model.dropout, {**arrays, "positions": table.astype(options.dtype)})


def steps_in(seconds: float, step: Callable[[int], Any], validate: Callable[[], Any]) -> int:
    """Count the steps that fit into a time, beside ten validations."""
    step(0)
    start = time.perf_counter()
    validate()
    left = seconds - 10 * (time.perf_counter() - start)
    start, number = time.perf_counter(), 0
    while number == 0 or time.perf_counter() - start < CALIBRATION * seconds:
        number += 1
        step(number)
    return max(20, int(left * number / (time.perf_counter() - start)))


def validated(predict: Callable[[Any], Any], held_out: np.ndarray, options: Config) -> list[float]:
    """Compute bits per masked token at every ratio: the same masks, whoever predicts."""
    return [
        training.bits_per_token(
            predict,
            held_out,
            ratio,
            chance.generator(options.seed, "validation", index),
            batch_size=options.batch_size,
        )
        for index, ratio in enumerate(VALIDATION_RATIOS)
    ]


def unigram_bits(dataset: data.Dataset, options: Config) -> float:
    """Compute bits per held-out token of who knows how often each occurs, and nothing else."""
    train, validation = dataset.split(options.validation_fraction, options.seed)
    ids = dataset.codec.num_ids
    counts = np.bincount(train.tokens, minlength=ids) + 1
    shares = np.bincount(validation.tokens, minlength=ids) / len(validation.tokens)
    return float(-(shares * np.log2(counts / counts.sum())).sum())


class Blank(NamedTuple):
    """A word that was hidden, with what stands before and after it, and what was filled in."""

    before: str
    word: str
    after: str
    filled: str


def fill_in(dataset: data.Dataset, out: Path, num: int) -> list[Blank]:
    """Hide a word of four to twelve letters in each of some held-out windows, and fill it in.

    The surest letter first, one at a time.
    """
    checkpoint = runs.best(out)
    config = checkpoint.config
    model = config.model(checkpoint.vocab_size)
    _, validation = dataset.split(config.validation_fraction, config.seed)
    windows = spread(validation, num)
    places = [_word(row) for row in windows]
    windows = windows[[place is not None for place in places]]
    places = [place for place in places if place is not None]
    hidden = windows.copy()
    for row, place in zip(hidden, places, strict=True):
        row[place] = 0
    filled = fast.iterative_decode(
        model, checkpoint.state.averaged, tokens=hidden, num_steps=dataset.length
    )
    return [
        Blank(
            _text(window[: place.start]),
            _text(window[place]),
            _text(window[place.stop :]),
            _text(new[place]),
        )
        for window, new, place in zip(windows, filled, places, strict=True)
    ]


def all_words(blank: Blank, known: set[str]) -> bool:
    """Whether all words that the letters filled in are part of are known, and there are some."""
    start, end = len(blank.before), len(blank.before) + len(blank.filled)
    found = re.finditer("[A-Za-z]+", blank.before + blank.filled + blank.after)
    touching = [match[0] for match in found if match.start() < end and match.end() > start]
    return bool(touching) and known.issuperset(touching)


def _word(row: np.ndarray) -> slice | None:
    """Find the word that is nearest to the middle of a window."""
    found = re.finditer(r"(?<![A-Za-z])[A-Za-z]{4,12}(?![A-Za-z])", _text(row))
    inside = [match for match in found if match.start() > 0 and match.end() < len(row)]
    middle = min(inside, key=lambda match: abs(match.start() - len(row) / 2), default=None)
    return None if middle is None else slice(*middle.span())


def _text(tokens: np.ndarray) -> str:
    """Write tokens of bytes, a character each."""
    return bytes((tokens - 1).astype(np.uint8)).decode("latin-1")


def known_words(dataset: data.Dataset, options: Config) -> set[str]:
    """Collect the words of the training text."""
    train, _ = dataset.split(options.validation_fraction, options.seed)
    return set(re.findall(r"[A-Za-z]+", _text(train.tokens.astype(np.int64) + 1)))


def compare(
    paths: list[Path], minutes: float, config: Config, length: int | None = None
) -> Iterator[str]:
    """Train both, and tell line by line what came of it."""
    dataset = data.load(paths, kind="bytes", length=length)
    options = config.resolved(dataset)
    yield (
        f"{len(dataset.tokens):,} bytes; windows of {dataset.length}, {options.batch_size} a step; "
        f"width {options.embed_dim}, {options.num_layers} layers, learning rate "
        f"{options.learning_rate:.2g}, {options.num_threads} threads"
    )
    yield f"unigram entropy: {unigram_bits(dataset, options):.3f} bits per byte"
    header = "".join(f"{ratio:>8.0%}" for ratio in VALIDATION_RATIOS)
    yield f"\n{'':<9}{'minutes':>8}{'steps':>8}{'tokens/s':>10}{'mean':>8}{header}  masked"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        for train, arguments in ((in_marref, (out,)), (in_torch, ())):
            result = _apart(train, dataset, config, 60 * minutes, *arguments)
            bits = "".join(f"{each:>8.3f}" for each in (np.mean(result.bits), *result.bits))
            yield (
                f"{result.name:<9}{result.seconds / 60:>8.1f}{result.num_steps:>8,}"
                f"{result.tokens_per_second:>10,.0f}{bits}"
            )
        blanks = fill_in(dataset, out, _NUM_BLANKS)
    known = known_words(dataset, options)
    words = np.mean([all_words(blank, known) for blank in blanks])
    right = np.mean([blank.filled == blank.word for blank in blanks])
    yield (
        f"\nof {len(blanks)} hidden words {words:.0%} are filled in with words of the training "
        f"text and nothing else, {right:.0%} with the one that stood there:"
    )
    for blank in blanks[:: math.ceil(len(blanks) / _SHOWN)]:
        line = f"{blank.before[-24:]}[{blank.filled}]{blank.after[:24]}"
        yield f"  {' '.join(line.split())}    ({blank.word})"


def _apart(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as process:
        return process.submit(function, *arguments).result()


def main() -> None:
    """Train both and print what came of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.text", description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0, help="of each, default: 10")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = options.paths
        if not paths:
            paths = [Path(folder) / "documentation.txt"]
            paths[0].write_text(documentation(), "utf-8")
        for line in compare(paths, options.minutes, Config()):
            print(line, flush=True)


if __name__ == "__main__":
    main()
