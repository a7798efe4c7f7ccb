"""Measure whether right programs stay within the budgets of ``marref compare``.

    python -m benchmarks.budgets [NUM] [--precision NAME] [--framework NAME] [--seed N] [--only N]

Draws NUM models a precision, writes each in PyTorch in random styles and in Flax, hands over all
arrays that a port has, and prints every array that is flagged, and by section the largest
difference over its budget.  The precision of a program is told by its numbers, as far as they tell
it; TF32 and mixed precisions are said, as a user would say ``--dtype tf32``.
"""

import argparse
import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np

import marref
from benchmarks.ports import in_torch
from marref.verify import golden
from marref.verify.comparison import Golden, Row, budgets, precisions_of, row_of
from marref.verify.rounding import MIXED, PRECISIONS

FRAMEWORKS = ("torch", "flax")
LONG = (64, 128, 256)
NUM_FLAX_MODELS = 4
NUM_PROGRAMS = {"torch": 12, "flax": 1}
"""Written of each model; budgets are derived for the model, once."""

Port = Callable[[Golden, str, np.random.Generator], dict[str, np.ndarray]]


def random_model(seed: int) -> marref.MAR:
    """Draw a small model."""
    rng = np.random.default_rng(seed)
    heads = int(rng.integers(1, 5))
    return marref.build(
        vocab_size=int(rng.integers(4, 20)),
        embed_dim=heads * int(rng.choice([2, 4, 8, 16])),
        num_layers=int(rng.integers(1, 4)),
        num_heads=heads,
        seq_len=int(rng.integers(2, 17)),
        dropout=0.0,
        gelu=str(rng.choice(["erf", "tanh"])),
        positions=str(rng.choice(["concatenated", "interleaved"])),
    )


def vectors_of(seed: int, framework: str) -> Golden:
    """Golden vectors of a random model, one in ten with long sequences.

    Flax compiles every operation anew for every shape: its models are a few.
    """
    if framework == "flax":
        return Golden(*golden.make(random_model(seed % NUM_FLAX_MODELS), seed))
    model = random_model(seed)
    if seed % 10 == 9:
        length = LONG[seed // 10 % len(LONG)]
        model = dataclasses.replace(model, num_layers=1, seq_len=length)
    return Golden(*golden.make(model, seed))


def run_torch(vectors: Golden, precision: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What a right PyTorch program of random style hands over."""
    style = in_torch.Style.draw(rng)
    sections = (*in_torch.SECTIONS, "samplers")
    return in_torch.TorchPort(vectors, style, precision).arrays(sections)


def run_flax(vectors: Golden, precision: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What a right Flax program hands over."""
    from benchmarks.ports import in_flax

    return in_flax.FlaxPort(vectors, precision).arrays(optimisers=rng.random() < 0.1)


PORTS: dict[str, Port] = {"torch": run_torch, "flax": run_flax}


def measured(framework: str, precision: str, seed: int) -> Iterator[list[Row]]:
    """Compare random right programs of a model with golden vectors, one after the other."""
    vectors = vectors_of(seed, framework)
    derived = functools.cache(lambda one: budgets(vectors, vectors.arrays, one))
    for program in range(NUM_PROGRAMS[framework]):
        rng = np.random.default_rng([seed, PRECISIONS.index(precision), program])
        arrays = PORTS[framework](vectors, precision, rng)
        said = precision in MIXED
        told = dict.fromkeys(arrays, precision) if said else precisions_of(vectors, arrays)
        common, _ = collections.Counter(told.values()).most_common(1)[0]
        if common != precision:
            print(f"{framework} {precision}: seed {seed}: taken for {common}")
        yield [
            row_of(name, arrays[name], vectors.arrays[name], derived(one)[name])
            for name, one in told.items()
        ]


class Tally:
    """What was found in one precision."""

    def __init__(self) -> None:
        self.ports = self.accused = self.arrays = self.flagged = self.undecided = 0
        self.worst: dict[str, tuple[float, str]] = {}

    def add(self, framework: str, seed: int, rows: list[Row]) -> None:
        """Count the arrays of a port."""
        self.ports += 1
        is_accused = False
        for row in rows:
            self.arrays += 1
            self.undecided += row.verdict == "undecided"
            if row.verdict == "DIFFERS":
                self.flagged += 1
                is_accused = True
                print(f"flagged: {framework}, seed {seed}: {row}", flush=True)
            ratio = row.difference / row.budget if row.budget else float(row.difference > 0)
            section = row.name.split("/")[0]
            if ratio > self.worst.get(section, (0.0, ""))[0]:
                self.worst[section] = ratio, f"{row.name} of {framework}, seed {seed}"
        self.accused += is_accused

    def __str__(self) -> str:
        return (
            f"{self.ports} ports, {self.accused} accused; {self.arrays} arrays, "
            f"{self.flagged} flagged, {self.undecided} undecided\n"
            + "\n".join(
                f"  {section:<21}largest difference over budget {ratio:.2g} ({name})"
                for section, (ratio, name) in self.worst.items()
            )
        )


def parsed(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, range]:
    """Read a command line with ``num``, and the seeds that it asks for."""
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--only", type=int, help="this seed alone")
    options = parser.parse_args()
    first, num = (options.seed, options.num) if options.only is None else (options.only, 1)
    return options, range(first, first + num)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.budgets")
    parser.add_argument("num", nargs="?", type=int, default=100, help="models in each precision")
    parser.add_argument("--precision", action="append", choices=PRECISIONS)
    parser.add_argument("--framework", action="append", choices=FRAMEWORKS)
    options, seeds = parsed(parser)
    for precision in options.precision or PRECISIONS:
        tally = Tally()
        for seed in seeds:
            for framework in options.framework or FRAMEWORKS:
                for rows in measured(framework, precision, seed):
                    tally.add(framework, seed, rows)
        print(f"{precision}: {tally}", flush=True)


if __name__ == "__main__":
    main()
