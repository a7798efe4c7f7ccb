"""Measure every rule of the decoder on digits: how good, in how many forward passes, how long.

    python -m benchmarks.samplers [--models FOLDER]
    python -m benchmarks.samplers --draw docs/samplers.png [--models FOLDER]
    python -m benchmarks.samplers --text RUN

The first trains the demo's model and a wider one that judges it, generates with every rule in 1 to
64 steps, and prints tables for docs/decoding.md: the two-sample statistic against held-out digits,
and the bits that a generated token costs the judge, with those of a held-out one beside them.  The
second draws what rules reveal in each step; the third prints it for a text, of which RUN is a
folder of ``marref train``.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import digits, pictures
from marref import chance, data, demo, fast, training
from marref.cli.pictures import shown
from marref.decoding import (
    P2,
    Edit,
    EntropyBounded,
    Factor,
    Independent,
    QuotaOrThreshold,
    ReMDMCap,
    ReMDMConf,
    ReMDMLoop,
    ReMDMRescale,
    Threshold,
)
from marref.demo import quality
from marref.model import MAR
from marref.schedules import SCHEDULES
from marref.training import runs
from marref.trees import Array, Tree

STEPS = (1, 2, 4, 8, 16, 32, 64)
DRAWN_STEPS = 8
SHOWN_STEPS = 4
JUDGE: dict[str, Any] = {"embed_dim": 64, "num_layers": 3, "num_steps": 3000}
RANDOM: dict[str, Any] = {"order": "random"}
NOISY: dict[str, Any] = {"choice_temperature": 4.5}
PLANNED: dict[str, dict[str, Any]] = {
    "random": RANDOM,
    "random, temperature 0.7": {**RANDOM, "temperature": 0.7},
    "random, arg max": {**RANDOM, "temperature": 0.0},
    "random, top_k 4": {**RANDOM, "top_k": 4},
    "random, top_p 0.9": {**RANDOM, "top_p": 0.9},
    "random, min_p 0.1": {**RANDOM, "min_p": 0.1},
    "halton": {"order": "halton"},
    "left-to-right": {"order": "left-to-right"},
    "confidence": {},
    "confidence, temperature 0.7": {"temperature": 0.7},
    "confidence, temperature 0.7, scored at 1": {"temperature": 0.7, "score_temperature": 1.0},
    "confidence, arg max": {"temperature": 0.0},
    "confidence, noise 4.5": NOISY,
    "confidence, noise 30": {"choice_temperature": 30.0},
    "confidence, order temperature 0.1": {"order_temperature": 0.1},
    "margin": {"order": "margin"},
    "entropy": {"order": "entropy"},
    **{
        f"random, {schedule}": {**RANDOM, "schedule": schedule}
        for schedule in SCHEDULES
        if schedule != "cosine"
    },
    "random, blocks of 16": {**RANDOM, "block_length": 16},
    "confidence, blocks of 16": {"block_length": 16},
    "quota or threshold 0.95": {"reveal": QuotaOrThreshold(0.95)},
    "independent": {**RANDOM, "reveal": Independent()},
    "ReMDM, cap 0.008": {**RANDOM, "remask": ReMDMCap(0.008)},
    "ReMDM, rescale 0.015": {**RANDOM, "remask": ReMDMRescale(0.015)},
    "ReMDM, confidence": {**RANDOM, "remask": ReMDMConf()},
    "ReMDM, loop": {**RANDOM, "remask": ReMDMLoop()},
    "P2": {"remask": P2()},
    "P2, noise 4.5": {**NOISY, "remask": P2()},
    "edit 0.9, random": {**RANDOM, "remask": Edit(0.9)},
}
"""Arguments of `iterative_decode`, with as many steps as are asked for."""
UNPLANNED: dict[str, dict[str, Any]] = {
    **{f"threshold {p}": {"reveal": Threshold(p)} for p in (0.5, 0.7, 0.9, 0.99)},
    **{f"factor {f}": {"reveal": Factor(f)} for f in (0.1, 0.3, 1.0, 3.0)},
    **{
        f"entropy bounded by {bound}": {"order": "entropy", "reveal": EntropyBounded(bound)}
        for bound in (0.1, 1.0, 4.0, 16.0)
    },
}
"""Those of rules that take as many steps as they need."""
DRAWN = (
    "random",
    "random, square-root",
    "random, exp",
    "halton",
    "left-to-right",
    "confidence",
    "confidence, noise 4.5",
    "margin",
    "entropy",
    "confidence, blocks of 16",
    "threshold 0.5",
    "factor 1.0",
    "entropy bounded by 4.0",
    "independent",
    "ReMDM, loop",
    "P2",
    "P2, noise 4.5",
    "edit 0.9, random",
)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What rules are measured with."""

    model: MAR
    params: Tree
    judge: MAR
    judging: Tree
    asked: Array
    """The class of each digit to generate."""
    real: Array
    """The digits that were held out."""
    seed: int

    def generate(self, num_steps: int, **options: Any) -> tuple[Array, dict[str, Array]]:
        """Generate a digit of each class that is asked for, always from the same numbers."""
        rng = chance.generator(self.seed, "sample")
        tokens, steps = fast.iterative_decode(
            self.model,
            self.params,
            labels=self.asked,
            num_steps=num_steps,
            rng=rng,
            return_steps=True,
            **options,
        )
        return tokens, steps

    def bits(self, tokens: Array, labels: Array) -> training.Estimate:
        """Estimate what a token costs the judge, in any order."""
        return training.any_order_bits(
            functools.partial(fast.logits, self.judge, self.judging),
            tokens,
            chance.generator(self.seed, "validation"),
            num_orders=2,
            labels=labels,
        )


@dataclasses.dataclass(frozen=True)
class Result:
    """What a rule comes to; ``num_steps`` is None if it takes what it needs."""

    rule: str
    num_steps: int | None
    statistic: float
    noise: float
    bits: float
    error: float
    passes: float
    """Forward passes, the mean over the digits."""
    positions: float
    """Positions at which something was predicted, over the length: the mean over the digits."""
    seconds: float


def measured(bench: Bench, rule: str, num_steps: int | None, **options: Any) -> Result:
    """Generate with a rule, and judge what comes of it."""
    start = time.perf_counter()
    tokens, steps = bench.generate(num_steps or 1, **options)
    seconds = time.perf_counter() - start
    predicted = ~np.isneginf(steps["score"])
    found = quality.two_samples(tokens, bench.real, chance.generator(bench.seed, "validation"))
    bits = bench.bits(tokens, bench.asked)
    passes = predicted.any(axis=2).sum(axis=0).mean()
    positions = predicted.mean(axis=(1, 2)).sum()
    print(f"{rule}, {num_steps} steps: {seconds:.1f} s", file=sys.stderr)
    return Result(rule, num_steps, *found, *bits, float(passes), float(positions), seconds)


def measure(bench: Bench, steps: Iterable[int]) -> Iterator[Result]:
    """Measure all rules."""
    for rule, options in PLANNED.items():
        for num_steps in steps:
            if num_steps * options.get("block_length", bench.model.seq_len) >= bench.model.seq_len:
                yield measured(bench, rule, num_steps, **options)
    for rule, options in UNPLANNED.items():
        yield measured(bench, rule, None, **options)


def tables(results: list[Result], held_out: training.Estimate, own: training.Estimate) -> str:
    """Write what was measured as Markdown.

    With what held-out digits cost the judge, and the model itself.
    """
    planned = [each for each in results if each.num_steps is not None]
    steps = sorted({each.num_steps for each in planned if each.num_steps is not None})
    noise = np.mean([each.noise for each in results])
    error = np.mean([each.error for each in results])
    cells = {(each.rule, each.num_steps): each for each in planned}
    rules = list(dict.fromkeys(each.rule for each in planned))

    def table(column: str) -> list[str]:
        rows = [["rule", *map(str, steps)], ["---", *["---:"] * len(steps)]]
        for rule in rules:
            found = (cells.get((rule, number)) for number in steps)
            rows.append([rule, *("" if each is None else _cell(each, column) for each in found)])
        return [_row(row) for row in rows]

    last = [cells[rule, steps[-1]] for rule in rules]
    costs = [each for each in results if each.num_steps is None]
    return "\n".join(
        [
            f"1000 MMD², in so many steps (of real digits 0 ± {1000 * noise:.1f}):\n",
            *table("statistic"),
            f"\nBits per token (± {error:.2f}; of held-out digits {held_out.bits:.2f}, and "
            f"{own.bits:.2f} to the model itself):\n",
            *table("bits"),
            "\nWithout a number of steps:\n",
            *_costs(costs),
            f"\nThose with {steps[-1]} steps:\n",
            *_costs(last),
        ]
    )


def _costs(results: list[Result]) -> list[str]:
    """Write a row a result, with what it costs."""
    rows = [["rule", "passes", "positions", "seconds", "1000 MMD²", "bits"], ["---", *["---:"] * 5]]
    for each in results:
        columns = ("passes", "positions", "seconds", "statistic", "bits")
        rows.append([each.rule, *(_cell(each, column) for column in columns)])
    return [_row(row) for row in rows]


def _cell(result: Result, column: str) -> str:
    value = getattr(result, column)
    if column == "statistic":
        return f"{1000 * value:.1f}"
    return f"{value:.2f}" if column == "bits" else f"{value:.1f}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def prepared(seed: int, quick: bool, of_each: int, folder: Path | None) -> Bench:
    """Train both models, or load them from a folder where they are kept."""
    changed = {"num_steps": 10} if quick else {}
    model, params = _kept(folder, "model", seed, **changed)
    judge, judging = _kept(folder, "judge", seed + 1, **{**JUDGE, **changed})
    asked = np.repeat(np.arange(demo.NUM_CLASSES), 1 if quick else of_each)
    real, _ = demo.rows_and_labels(demo.digits()[1])
    return Bench(model, params, judge, judging, asked, real, seed)


def _kept(folder: Path | None, name: str, seed: int, **changed: Any) -> tuple[MAR, Tree]:
    path = None if folder is None else folder / f"{name}.npz"
    if path is not None and path.exists():
        return training.load_model(path)
    model, params = digits.trained(seed, **changed)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        training.save_model(path, model, params)
    return model, params


def draw(bench: Bench, path: Path) -> None:
    """Draw what rules reveal in each step, on the same two digits."""
    from marref import plots

    two = dataclasses.replace(bench, asked=np.array([3, 8]))
    rows = {}
    for rule in DRAWN:
        _, steps = two.generate(DRAWN_STEPS, **(PLANNED | UNPLANNED)[rule])
        rows[rule] = steps["tokens"], steps["mask"]
    plots.rules(path, rows, DRAWN_STEPS)


def print_text(run: Path, seed: int) -> None:
    """Print what rules reveal of a text."""
    checkpoint = runs.best(run)
    codec = data.codec_from_dict(checkpoint.codec)
    for rule in DRAWN:
        _, steps = fast.iterative_decode(
            checkpoint.model,
            checkpoint.state.averaged,
            num_steps=DRAWN_STEPS,
            rng=chance.generator(seed, "sample"),
            return_steps=True,
            **(PLANNED | UNPLANNED)[rule],
        )
        stages = steps["tokens"][:, 0]
        print(f"{rule}, {len(stages)} steps")
        for number in np.linspace(0, len(stages) - 1, SHOWN_STEPS).round().astype(int):
            print(f"{number + 1:4} {shown(codec, stages[number])}".replace("\n", "↵"))


def main() -> None:
    """Measure and print tables, or draw, or print a text."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.samplers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="try everything in seconds")
    parser.add_argument(
        "--of-each",
        metavar="N",
        type=int,
        default=digits.NUM_OF_EACH,
        help=f"digits of each class (default {digits.NUM_OF_EACH})",
    )
    parser.add_argument("--models", metavar="FOLDER", type=Path, help="keep the models there")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what was measured")
    parser.add_argument("--draw", metavar="FILE", type=Path, help="draw, and measure nothing")
    parser.add_argument("--text", metavar="RUN", type=Path, help="print a text, measure nothing")
    arguments = parser.parse_args()
    if arguments.text is not None:
        print_text(arguments.text, arguments.seed)
        return
    bench = prepared(arguments.seed, arguments.quick, arguments.of_each, arguments.models)
    if arguments.draw is not None:
        draw(bench, arguments.draw)
        pictures.stamp(arguments.draw, pictures.command_of("python -m benchmarks.samplers"))
        return
    results = list(measure(bench, STEPS[:3:2] if arguments.quick else STEPS))
    if arguments.json is not None:
        rows = [dataclasses.asdict(each) for each in results]
        arguments.json.write_text(json.dumps(rows, indent=1), "utf-8")
    held_out = demo.rows_and_labels(demo.digits()[1])
    itself = dataclasses.replace(bench, judge=bench.model, judging=bench.params)
    print(tables(results, bench.bits(*held_out), itself.bits(*held_out)))


if __name__ == "__main__":
    main()
