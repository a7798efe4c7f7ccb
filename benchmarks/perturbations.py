"""Measure whether ``marref compare --diagnose`` keeps silent about what it does not know.

    python -m benchmarks.perturbations [NUM] [--kind NAME] [--subset NAME] [--precision NAME]
                                       [--seed N] [--only N] [--quick]

Draws NUM random models, perturbs a PyTorch program at a random place (the kinds take turns), and
diagnoses subsets of what it hands over, and all of it where these do not show anything.  No name of
the catalogue may be given, unless that mistake, made in PyTorch, computes the same arrays.  What is
said of the first difference is judged by the kind.
"""

import argparse
import collections
import dataclasses

import numpy as np

from benchmarks.budgets import parsed, random_model
from benchmarks.diagnosis import SUBSETS, Arrays, Names, alternatives, chosen, same, told
from benchmarks.ports import faulty, in_torch, perturbed
from marref.verify import golden
from marref.verify.comparison import Comparison, Golden
from marref.verify.diagnosis import Diagnosis, diagnose
from marref.verify.rounding import MIXED, PRECISIONS

QUICK = ("logits", "logits + loss + gradients", "activations + loss + gradients")
"""Subsets that are diagnosed by default."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What was said of a perturbed program, of one subset of its arrays."""

    names: str
    said: str
    hints: tuple[tuple[str, bool | None], ...]


class Patient:
    """A perturbed program on the golden inputs of a seed."""

    def __init__(self, kind: str, seed: int, precision: str) -> None:
        model = random_model(seed)
        self.vectors = Golden(*golden.make(model, seed))
        self.precision = precision
        config = model.as_dict()
        index = list(perturbed.KINDS).index(kind)
        self.fits = perturbed.NEEDS[kind](config)
        if self.fits:
            self.perturbation = perturbed.KINDS[kind](perturbed.Draw(config, [seed, index]))
        self.style = in_torch.Style.draw_by_hand(np.random.default_rng(seed))

    def run(self, program: type, subset: str) -> Arrays:
        """Run a program as far as a subset asks for it."""
        sections = [name for name in in_torch.SECTIONS if name.startswith(_sections(subset))]
        port = type("Port", (program, in_torch.TorchPort), {})
        with np.errstate(all="ignore"):
            arrays = port(self.vectors, self.style, self.precision).arrays(sections)
        return chosen(arrays, subset)

    def judged(self, subset: str) -> Result | None:
        """Diagnose what the program hands over; None if nothing shows."""
        arrays = self.run(self.perturbation.program, subset)
        said = self.precision if self.precision in MIXED else None
        diagnosis = diagnose(self.vectors, arrays, said)
        if diagnosis.agrees:
            return None
        sentences = getattr(diagnosis, "hints", ())
        hints = tuple((sentence, self.perturbation.truth(sentence)) for sentence in sentences)
        return Result(self.verdict(diagnosis, arrays, subset), told(diagnosis), hints)

    def verdict(self, diagnosis: Diagnosis, arrays: Arrays, subset: str) -> str:
        """Judge the names: "none", "equal" if all compute the same arrays, or "wrong".

        "unchecked" names what cannot be made together in PyTorch, and has to be looked at.
        """
        if not diagnosis.explanations:
            return "coarser" if diagnosis.coarser else "none"
        named = [alternatives(explanation) for explanation in diagnosis.explanations]
        judged = [
            {self.computes(names, arrays, subset, diagnosis.comparison) for names in one}
            for one in named
        ]
        if all(True in verdicts for verdicts in judged):
            return "equal"
        return "wrong" if any(verdicts == {False} for verdicts in judged) else "unchecked"

    def computes(
        self, names: Names, arrays: Arrays, subset: str, comparison: Comparison
    ) -> bool | None:
        """Whether mistakes in PyTorch compute these arrays; None if they exclude each other."""
        if not (names <= set(faulty.FAULTS) and faulty.compatible(names)):
            return None
        return same(self.run(faulty.faulty(sorted(names)), subset), arrays, comparison)


def _sections(subset: str) -> tuple[str, ...]:
    return tuple(prefix.split("/")[0] for prefix in SUBSETS[subset])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.perturbations")
    parser.add_argument("num", nargs="?", type=int, default=len(perturbed.KINDS))
    parser.add_argument("--kind", choices=perturbed.KINDS)
    parser.add_argument("--subset", action="append", choices=SUBSETS)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument(
        "--quick", action="store_true", help="without all, of what the subsets do not show"
    )
    options, seeds = parsed(parser)
    counts: dict[str, collections.Counter[str]] = {}
    for seed in seeds:
        kinds = list(perturbed.KINDS)
        kind = options.kind or kinds[seed % len(kinds)]
        patient = Patient(kind, seed, options.precision)
        if not patient.fits:
            continue
        seen = False
        subsets = options.subset or QUICK
        if not options.quick and options.only is None:
            subsets = dict.fromkeys((*subsets, "all"))
        for subset in subsets:
            if subset == "all" and seen:
                continue
            result = patient.judged(subset)
            seen |= result is not None
            counter = counts.setdefault(subset, collections.Counter())
            counter[result.names if result else "unseen"] += 1
            if result is not None:
                report(patient, kind, seed, subset, result, options.only is not None)
                verdicts = [verdict for _, verdict in result.hints]
                counter["a true sentence"] += any(verdict is True for verdict in verdicts)
                counter["a false sentence"] += any(verdict is False for verdict in verdicts)
    print(f"\n{options.precision}, {len(perturbed.KINDS)} kinds")
    columns = (
        "none",
        "equal",
        "unchecked",
        "coarser",
        "wrong",
        "a true sentence",
        "a false sentence",
    )
    for subset, counter in counts.items():
        seen_here = sum(counter[column] for column in columns[:5])
        cells = ", ".join(f"{column} {counter[column]}" for column in columns)
        print(f"{subset}: {seen_here} seen, {counter['unseen']} unseen: {cells}")


def report(
    patient: Patient, kind: str, seed: int, subset: str, result: Result, always: bool
) -> None:
    """Print names, and sentences that are false or that nobody could judge."""
    place = f"--kind {kind} --only {seed} --subset {subset!r} ({patient.perturbation.place})"
    if result.names != "none" or always:
        print(f"{result.names}: {place}: {result.said}", flush=True)
    for sentence, verdict in result.hints:
        if verdict is not True or always:
            word = {None: "unjudged", False: "false", True: "true"}[verdict]
            print(f"  {word} sentence: {place}: {sentence}", flush=True)


if __name__ == "__main__":
    main()
