"""Diagnosis: which known mistakes or conventions make marref compute exactly your numbers.

Every fault of the catalogue, alone and then in sets of two and three, is made in marref itself, on
the golden inputs; see `marref.verify.search`.  Faults explain a comparison if

- they change the first array that differs, by more than the budget;
- marref with them comes to your arrays, all of them, within budgets that are derived anew for the
  faulty model, whose rounding is its own;
- none of them can be left out.

Explanations that compute the same arrays are one, with several names, and an array is named that
would tell them apart.  What explains the arrays up to some array only is said as such, with what is
left over; what comes near and not within budget is no finding.  Of what is left unexplained,
`marref.verify.structure` says what its first array is.
"""

import dataclasses
import json
import math
import textwrap
from collections.abc import Mapping
from typing import Any

from marref import checks
from marref.trees import Array
from marref.verify import faults, structure
from marref.verify.comparison import Comparison, Golden, compare
from marref.verify.faults import CATALOGUE
from marref.verify.rounding import MIXED
from marref.verify.search import LATE, Explanation, Partial, Progress, Search, Together

_MOST_SHOWN = 3
_INEXACT = 1 / 256
"""The largest error of 16 numbers or more is above this part of its budget, 8 of such errors."""
_MANY = 4
"""Fewer arrays tell a coarse precision from a mistake by chance alone."""
_HINTS = {
    "tf32": "is TensorFloat-32 switched on? In PyTorch torch.backends.cuda.matmul.allow_tf32 and "
    "torch.set_float32_matmul_precision, in JAX jax_default_matmul_precision, decide it",
    "fp16-mixed": "do matrix products run in float16, as under autocast?",
    "bf16-mixed": "do matrix products run in bfloat16, as under autocast, or on a TPU by default?",
}


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What a comparison found, and what explains it, best first.

    Parameters
    ----------
    comparison : Comparison
    explanations : tuple of Explanation
        Empty where nothing in the catalogue fits, or nothing differs.
    partial : Partial or None
        Without an explanation: what explains the arrays up to some array.
    hints : tuple of str
        Without an explanation: sentences about the first array that is left unexplained, see
        `marref.verify.structure.hints`.
    near : tuple of Explanation
        Without an explanation: what comes near, best first.  It is no finding.
    coarser : str or None
        Without an explanation: a precision of matrix products within whose rounding all agree.
    thin : bool
        Only integers differ, or so few numbers that much would fit by chance: faults of the section
        itself were tried alone.
    num_known : int
        How many mistakes the catalogue has for such a model.
    """

    comparison: Comparison
    explanations: tuple[Explanation, ...]
    partial: Partial | None = None
    hints: tuple[str, ...] = ()
    near: tuple[Explanation, ...] = ()
    coarser: str | None = None
    thin: bool = False
    num_known: int = len(CATALOGUE)

    @property
    def agrees(self) -> bool:
        """Whether nothing differs."""
        return self.comparison.agrees

    def as_table(self, colour: bool = False) -> str:
        """Write the comparison, and what explains it."""
        lines = [self.comparison.as_table(colour)]
        for explanation in self._different()[:_MOST_SHOWN]:
            lines += self._explained(explanation)
        if self.coarser:
            lines.append(
                f"\nall agree within the rounding of {self.coarser}: {_HINTS[self.coarser]}"
            )
        elif self.partial:
            lines += self._explained_partly(self.partial)
        elif self.comparison.first and not self.explanations:
            lines.append(
                f"\nnothing in the catalogue of {self.num_known} known mistakes explains it; look "
                f"at {self.comparison.first.name}"
            )
            lines += [
                f"  no finding, but near: {_and(found.faults)}, off by {found.ratio:.2g} budgets"
                for found in self.near[:_MOST_SHOWN]
            ]
        lines += [_filled(hint) for hint in self.hints]
        if self.thin:
            lines.append("  the evidence is thin: give more arrays than these, logits for a start")
        return "\n".join(lines)

    def _explained(self, explanation: Explanation) -> list[str]:
        lines = [
            f"\nyour arrays are what marref computes with "
            f"{_or((explanation.faults, *explanation.same))} "
            f"(all {len(self.comparison.rows)} within {explanation.ratio:.2g} of the budget)"
        ]
        if explanation.same:
            told_apart = explanation.decides or "nothing in the golden vectors"
            lines.append(
                "  which compute the same, in the arrays that were given; "
                f"{told_apart} would tell them apart"
            )
        return lines + _summaries(explanation.faults)

    def _explained_partly(self, partial: Partial) -> list[str]:
        names = [row.name for row in partial.left.rows]
        first = partial.left.differing[0].name
        count = names.index(first)
        return [
            f"\nup to {names[count - 1]}, the first {count} of {len(names)}, your arrays are what "
            f"marref computes with {_or((partial.faults, *partial.same[: _MOST_SHOWN - 1]))}",
            *_summaries(partial.faults),
            f"  the first left over is {first}, in which nothing more in the catalogue explains it",
        ]

    def _different(self) -> list[Explanation]:
        """Leave out what computes the same as one before it."""
        different: list[Explanation] = []
        for explanation in self.explanations:
            if not any(explanation.faults in earlier.same for earlier in different):
                different.append(explanation)
        return different

    def as_json(self) -> str:
        """Write the same for machines."""
        report = {
            **self.comparison.as_dict(),
            "explanations": [_as_dict(found) for found in self.explanations],
            "partial": None if self.partial is None else _partial_as_dict(self.partial),
            "hints": list(self.hints),
            "near": [_as_dict(found) for found in self.near],
            "coarser": self.coarser,
            "thin": self.thin,
        }
        return json.dumps(report, indent=1)


def _summaries(together: Together) -> list[str]:
    return [_filled(fault.summary) for fault in together]


def _filled(text: str) -> str:
    return textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  ")


def _and(together: Together) -> str:
    return " and ".join(fault.name for fault in together)


def _or(alternatives: tuple[Together, ...]) -> str:
    return ", or with ".join(map(_and, alternatives))


def _as_dict(found: Explanation) -> dict[str, Any]:
    return {
        "faults": _names(found.faults),
        "ratio": found.ratio if math.isfinite(found.ratio) else None,
        "same": [_names(same) for same in found.same],
        "decides": found.decides,
    }


def _partial_as_dict(found: Partial) -> dict[str, Any]:
    return {
        "faults": _names(found.faults),
        "same": [_names(same) for same in found.same],
        "left": found.left.differing[0].name,
    }


def _names(together: Together) -> list[str]:
    return [fault.name for fault in together]


def diagnose(
    golden_vectors: Golden,
    arrays: Mapping[str, Array],
    precision: str | None = None,
    *,
    most_together: int = 3,
    progress: Progress = lambda what, done, total: None,
) -> Diagnosis:
    """Compare, and name the faults that explain what differs.

    Parameters
    ----------
    golden_vectors : Golden
    arrays : dict of str to array
    precision : str, optional
        See `marref.verify.comparison.compare`.
    most_together : int
        Where fewer explain nothing, so many faults are tried together: 1, 2 or 3.
    progress : callable, optional
        Called with what is being tried, how many of these have been, and how many there are.

    Returns
    -------
    Diagnosis
    """
    checks.integer("most_together", most_together, 1, 3)
    comparison = compare(golden_vectors, arrays, precision)
    if comparison.agrees:
        return Diagnosis(comparison, ())
    search = Search(golden_vectors, arrays, comparison, progress)
    found = search.explanations(most_together)
    if found:
        return Diagnosis(comparison, tuple(found), thin=search.thin)
    coarser = _coarser(golden_vectors, arrays, comparison)
    partial = None if coarser else search.partial()
    if coarser:
        hints: tuple[str, ...] = ()
    elif partial:
        with faults.applied(*partial.faults):
            hints = structure.hints(partial.vectors, arrays, partial.left, faulty=True)
    else:
        hints = structure.hints(golden_vectors, arrays, comparison)
    near = tuple(search.near())
    num_known = len(faults.of_model(golden_vectors.model))
    return Diagnosis(comparison, (), partial, hints, near, coarser, search.thin, num_known)


def _coarser(
    golden_vectors: Golden, arrays: Mapping[str, Array], comparison: Comparison
) -> str | None:
    """Name a precision of matrix products within whose rounding float32 arrays agree."""
    if comparison.precision != "float32":
        return None
    # The steps of optimisers and decoders take longest, and what is before them rules most out.
    early = {name: a for name, a in arrays.items() if name.split("/")[0] not in LATE}
    for one in MIXED:
        if early and not _rounded_throughout(comparison, compare(golden_vectors, early, one)):
            continue
        mixed = compare(golden_vectors, arrays, one)
        if _rounded_throughout(comparison, mixed, at_least=_MANY):
            return one
    return None


def _rounded_throughout(comparison: Comparison, mixed: Comparison, at_least: int = 0) -> bool:
    """Whether all agree, and are as inexact as products that round their inputs make them.

    A mistake may be too small for the budgets of a coarse precision, but it leaves some arrays as
    exact as float32 is.
    """
    fine = {row.name: row.budget for row in comparison.rows}
    concerned = [
        row
        for row in mixed.rows
        if math.prod(row.shape) >= 16 and 4.0 * fine[row.name] < row.budget < math.inf
    ]
    is_inexact = all(row.difference > _INEXACT * row.budget for row in concerned)
    return mixed.agrees and is_inexact and len(concerned) >= at_least
