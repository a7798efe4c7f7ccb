"""Measure how often ``marref compare --diagnose`` names the mistake that was made.

    python -m benchmarks.diagnosis [NUM] [--kind KIND] [--framework NAME] [--subset NAME]
                                   [--precision NAME] [--seed N] [--only N]

Draws NUM random models a kind, puts mistakes into a PyTorch or Flax program (none, one, two or
three: "right", "single", "pair", "triple"), and diagnoses what it hands over, once for each subset
of the arrays that people typically save.  A mistake that does not show within the budgets of those
arrays is not counted.  Every answer that is not right is printed with its seed, for ``--only``.
"""

import argparse
import collections
import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from benchmarks.budgets import FRAMEWORKS, NUM_FLAX_MODELS, parsed, random_model
from benchmarks.ports import faulty, in_torch
from marref.verify import golden
from marref.verify.comparison import Comparison, Golden, compare
from marref.verify.diagnosis import Diagnosis, diagnose
from marref.verify.rounding import MIXED, PRECISIONS
from marref.verify.search import Explanation, Partial

KINDS = {"right": 0, "single": 1, "pair": 2, "triple": 3}
"""How many mistakes there are."""

SUBSETS = {
    "logits": ("activations/logits",),
    "logits + loss": ("activations/logits", "loss"),
    "logits + loss + gradients": ("activations/logits", "loss", "gradients/"),
    "activations + loss + gradients": ("activations/", "loss", "gradients/"),
    "all": ("",),
}
"""What people save, by the prefixes of the names."""

ANSWERS = ("right", "right, and others", "half", "empty", "coarser", "wrong", "error")

Arrays = dict[str, np.ndarray]
Names = frozenset[str]


def score(diagnosis: Diagnosis, acceptable: set[Names]) -> str:
    """Judge the first explanation by the sets of mistakes that compute these arrays.

    "half" names some of the mistakes and nothing else, as does what reaches up to some array;
    "coarser" names none, but a precision; "right, and others" goes on to name what was not made.
    """
    made = max(acceptable, key=len)
    found = [*diagnosis.explanations, *([diagnosis.partial] if diagnosis.partial else [])]
    if not found:
        return "coarser" if diagnosis.coarser else "empty"
    first, *others = found
    if alternatives(first) & acceptable:
        right = all(alternatives(other) & acceptable for other in others)
        return "right" if right else "right, and others"
    return "half" if any(names < made for names in alternatives(first)) else "wrong"


def alternatives(explanation: Explanation | Partial) -> set[Names]:
    """What an explanation names, and what it names as computing the same."""
    return {
        frozenset(fault.name for fault in faults)
        for faults in (explanation.faults, *explanation.same)
    }


def score_right(diagnosis: Diagnosis) -> str:
    """Judge what is said of a right program, whose precision was perhaps not said."""
    return "wrong" if diagnosis.explanations else "right"


def model_vectors(seed: int, framework: str) -> Golden:
    """Golden vectors of a random model, one in five with an epsilon of 1e-6; of few for Flax."""
    model = random_model(seed % NUM_FLAX_MODELS if framework == "flax" else seed)
    if seed % 5 == 4:
        model = dataclasses.replace(model, layer_norm_epsilon=1e-6)
    return Golden(*golden.make(model, seed))


class Program:
    """A program in a framework, with any mistakes, on the golden inputs of a seed."""

    def __init__(self, framework: str, precision: str, seed: int, kind: str) -> None:
        self.framework, self.precision, self.seed, self.kind = framework, precision, seed, kind
        self.vectors = model_vectors(seed, framework)

    def run(self, mistakes: Names) -> Arrays:
        """What it hands over."""
        if self.framework == "flax":
            from benchmarks.ports import in_flax

            port = in_flax.FlaxPort(self.vectors, self.precision, mistakes)
            return port.arrays(optimisers=False)
        draw = in_torch.Style.draw if self.kind == "right" else in_torch.Style.draw_by_hand
        style = draw(np.random.default_rng(self.seed))
        port = faulty.faulty(sorted(mistakes))(self.vectors, style, self.precision)
        return port.arrays(in_torch.SECTIONS)

    def catalogue(self) -> list[str]:
        """The names of the mistakes that can be made."""
        if self.framework == "flax":
            from benchmarks.ports import in_flax

            return list(in_flax.FAULTS)
        return list(faulty.FAULTS)

    def compatible(self, mistakes: Names) -> bool:
        """Whether they can be made together."""
        return self.framework == "flax" or faulty.compatible(mistakes)


def drawn(program: Program) -> Names:
    """Draw mistakes; single ones take turns."""
    names, kind = program.catalogue(), program.kind
    if kind == "single":
        return frozenset({names[program.seed % len(names)]})
    rng = np.random.default_rng([program.seed, KINDS[kind]])
    while True:
        mistakes = frozenset(map(str, rng.choice(names, KINDS[kind], replace=False)))
        if program.compatible(mistakes):
            return mistakes


@dataclasses.dataclass(frozen=True)
class Case:
    """What was answered for one program and one subset of its arrays.

    ``shown`` is how many of the mistakes it takes to compute these arrays.
    """

    subset: str
    mistakes: Names
    shown: int
    answer: str
    said: str
    seconds: float


def judged(program: Program, subsets: Iterable[str]) -> Iterator[Case]:
    """Diagnose a random program for each subset in which its mistakes show."""
    mistakes = drawn(program)
    with np.errstate(all="ignore"):
        runs = {names: program.run(names) for names in subsets_of(mistakes)}
    for subset in subsets:
        given = {names: chosen(arrays, subset) for names, arrays in runs.items()}
        yield _judged(program, subset, mistakes, given)


def _judged(program: Program, subset: str, mistakes: Names, given: Mapping[Names, Arrays]) -> Case:
    arrays, start = given[mistakes], time.perf_counter()
    said = program.precision if program.precision in MIXED and mistakes else None
    comparison = compare(program.vectors, arrays, said)
    acceptable = {names for names, other in given.items() if same(other, arrays, comparison)}
    if mistakes and frozenset() in acceptable:
        return Case(subset, mistakes, 0, "unseen", "", 0.0)
    shown = min(map(len, acceptable))
    try:
        diagnosis = diagnose(program.vectors, arrays, said)
    except Exception as error:
        return Case(subset, mistakes, shown, "error", repr(error), time.perf_counter() - start)
    answer = score(diagnosis, acceptable) if mistakes else score_right(diagnosis)
    if answer == "wrong" and mistakes:
        answer = _computed(program, subset, diagnosis, arrays, comparison)
    return Case(subset, mistakes, shown, answer, told(diagnosis), time.perf_counter() - start)


def _computed(
    program: Program, subset: str, diagnosis: Diagnosis, arrays: Arrays, comparison: Comparison
) -> str:
    """Judge other mistakes than those that were made: "wrong", unless they compute the same arrays.

    What is said to reach up to some array must compute the arrays before it, and is "half" then.
    """
    found, until = [*diagnosis.explanations, diagnosis.partial][0], None
    assert found is not None
    if found is diagnosis.partial and diagnosis.partial.left.first:
        until = diagnosis.partial.left.first.name
    for names in alternatives(found):
        if names <= set(program.catalogue()) and program.compatible(names):
            with np.errstate(all="ignore"):
                computed = chosen(program.run(names), subset)
            if same(computed, arrays, comparison, until):
                return "half" if until else "right"
    return "wrong"


def subsets_of(mistakes: Names) -> list[Names]:
    """All sets of some of the mistakes, also of none."""
    sizes = range(len(mistakes) + 1)
    return [frozenset(some) for size in sizes for some in itertools.combinations(mistakes, size)]


def chosen(arrays: Arrays, subset: str) -> Arrays:
    """Keep the arrays of a subset."""
    return {name: array for name, array in arrays.items() if name.startswith(SUBSETS[subset])}


def same(one: Arrays, other: Arrays, comparison: Comparison, until: str | None = None) -> bool:
    """Whether arrays, all or those before one, are the same within the budgets of a comparison."""
    for row in comparison.rows:
        if row.name == until:
            break
        if one[row.name].shape != other[row.name].shape:
            return False
        a, b = (arrays[row.name].astype(np.float64) for arrays in (one, other))
        with np.errstate(invalid="ignore"):
            near = np.abs(a - b) <= row.budget
        if not (near | (a == b) | (np.isnan(a) & np.isnan(b))).all():
            return False
    return True


def told(diagnosis: Diagnosis) -> str:
    """What a diagnosis says, in a line."""
    first = diagnosis.comparison.first
    found = [
        " = ".join("+".join(sorted(names)) for names in alternatives(one)) + f" ({one.ratio:.2g})"
        for one in diagnosis.explanations[:3]
    ]
    near = [
        "+".join(fault.name for fault in one.faults) + f" ({one.ratio:.2g})"
        for one in diagnosis.near[:2]
    ]
    if diagnosis.partial:
        reached = " = ".join("+".join(sorted(names)) for names in alternatives(diagnosis.partial))
        left = diagnosis.partial.left.first
        found.append(f"{reached} up to {left.name if left else None}")
    said = "; ".join(found) or f"near {', '.join(near) or 'none'}, coarser {diagnosis.coarser}"
    return f"first {first.name if first else None}; {said}"


def table(counts: Mapping[tuple[str, int], collections.Counter[str]]) -> str:
    """Write how often each answer was given, in percent, by subset and how many mistakes show."""
    lines = [f"{'subset':<32}{'show':>5}{'seen':>6}" + "".join(f"{a:>18}" for a in ANSWERS)]
    for (subset, shown), counter in sorted(counts.items()):
        shares = "".join(f"{100 * counter[a] / counter.total():>17.1f}%" for a in ANSWERS)
        lines.append(f"{subset:<32}{shown:>5}{counter.total():>6}{shares}")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.diagnosis")
    parser.add_argument("num", nargs="?", type=int, default=100, help="programs of each kind")
    parser.add_argument("--kind", action="append", choices=KINDS)
    parser.add_argument("--framework", choices=FRAMEWORKS, default="torch")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--subset", action="append", choices=SUBSETS)
    options, seeds = parsed(parser)
    for kind in options.kind or KINDS:
        counts: dict[tuple[str, int], collections.Counter[str]] = {}
        unseen = 0
        for seed in seeds:
            program = Program(options.framework, options.precision, seed, kind)
            for case in judged(program, options.subset or SUBSETS):
                if case.answer == "unseen":
                    unseen += 1
                    continue
                counts.setdefault((case.subset, case.shown), collections.Counter())[
                    case.answer
                ] += 1
                if case.answer != "right" or options.only is not None:
                    print(
                        f"{case.answer}: --kind {kind} --only {seed} --subset {case.subset!r} "
                        f"({case.seconds:.0f} s): {'+'.join(sorted(case.mistakes))}: {case.said}",
                        flush=True,
                    )
        print(f"\n{kind}, {options.framework}, {options.precision}; {unseen} unseen")
        print(table(counts), flush=True)


if __name__ == "__main__":
    main()
