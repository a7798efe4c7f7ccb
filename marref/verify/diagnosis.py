"""Diagnosis: which known mistakes or conventions make marref compute exactly your numbers.

Every fault of the catalogue, alone and then in pairs, is made in marref itself, on the golden
inputs.  A fault explains a comparison if marref with it comes to your arrays, all of them, within
the budgets of the precision; how well, is the largest ratio of difference to budget.
"""

import dataclasses
import itertools
import json
import math
import textwrap
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from marref.trees import Array
from marref.verify import faults
from marref.verify.comparison import Comparison, Golden, compare, row_of
from marref.verify.faults import CATALOGUE, Fault

_MOST_SHOWN = 3
_SLACK = 8.0
"""A fault may make a model more sensitive to rounding than the budgets, which are without it."""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A fault, or several together, with which marref computes your numbers.

    Parameters
    ----------
    faults : tuple of Fault
    ratio : float
        The largest difference over its budget, over all arrays; below 1 is within budget.
    """

    faults: tuple[Fault, ...]
    ratio: float


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What a comparison found, and what explains it, best first.

    Parameters
    ----------
    comparison : Comparison
    explanations : tuple of Explanation
        Empty where nothing in the catalogue fits, or nothing differs.
    """

    comparison: Comparison
    explanations: tuple[Explanation, ...]

    @property
    def agrees(self) -> bool:
        """Whether nothing differs."""
        return self.comparison.agrees

    def as_table(self, colour: bool = False) -> str:
        """Write the comparison, and what explains it."""
        lines = [self.comparison.as_table(colour)]
        for explanation in self.explanations[:_MOST_SHOWN]:
            names = " and ".join(fault.name for fault in explanation.faults)
            lines.append(
                f"\nyour arrays are what marref computes with {names} "
                f"(all {len(self.comparison.rows)} within {explanation.ratio:.2g} of the budget)"
            )
            lines += [
                textwrap.fill(fault.summary, 96, initial_indent="  ", subsequent_indent="  ")
                for fault in explanation.faults
            ]
        if self.comparison.first and not self.explanations:
            lines.append(
                f"\nnothing in the catalogue of {len(CATALOGUE)} known mistakes explains it, "
                f"alone or in pairs; look at {self.comparison.first.name}"
            )
        return "\n".join(lines)

    def as_json(self) -> str:
        """Write the same for machines."""
        explanations = [
            {"faults": [fault.name for fault in found.faults], "ratio": found.ratio}
            for found in self.explanations
        ]
        report = {**self.comparison.as_dict(), "explanations": explanations}
        return json.dumps(report, indent=1)


def diagnose(
    golden_vectors: Golden,
    arrays: Mapping[str, Array],
    precision: str | None = None,
    *,
    pairs: bool = True,
) -> Diagnosis:
    """Compare, and name the faults that explain what differs.

    Parameters
    ----------
    golden_vectors : Golden
    arrays : dict of str to array
    precision : str, optional
        See `marref.verify.comparison.compare`.
    pairs : bool
        Try two faults at a time where none explains the difference alone.

    Returns
    -------
    Diagnosis
    """
    comparison = compare(golden_vectors, arrays, precision)
    if comparison.agrees:
        return Diagnosis(comparison, ())
    allowed = {row.name: row.budget for row in comparison.rows}

    def examine(*candidate: Fault) -> _Result:
        return _examine(candidate, golden_vectors, arrays, allowed)

    unfaulted = examine()
    singles = [examine(fault) for fault in CATALOGUE.values()]
    found = [result for result in singles if result.explains]
    if not found and pairs:
        # A pair explains the first difference: one of the two does alone, or both change it.
        helping = [result for result in singles if result.reach > unfaulted.reach]
        changing = [
            result for result in singles if result.reach == unfaulted.reach and result.changes
        ]
        candidates = {
            frozenset((first.faults[0], second.faults[0])): (first.faults[0], second.faults[0])
            for first, second in (
                *itertools.product(helping, singles),
                *itertools.combinations(changing, 2),
            )
            if first is not second and faults.compatible(first.faults[0], second.faults[0])
        }
        results = (examine(*pair) for pair in candidates.values())
        found = [result for result in results if result.explains]
    explanations = [Explanation(result.faults, result.ratio) for result in found]
    return Diagnosis(comparison, tuple(sorted(explanations, key=lambda found: found.ratio)))


class _Result(NamedTuple):
    """How far marref with some faults comes to the given arrays.

    ``reach`` counts the arrays explained before the first that is not; ``changes`` says whether
    the faults change that one at all; ``ratio`` is the largest difference over its budget.
    """

    faults: tuple[Fault, ...]
    reach: int
    changes: bool
    ratio: float

    @property
    def explains(self) -> bool:
        return self.ratio <= _SLACK


def _examine(
    candidate: tuple[Fault, ...],
    golden_vectors: Golden,
    arrays: Mapping[str, Array],
    allowed: dict[str, float],
) -> _Result:
    worst, reach = 0.0, 0
    with faults.applied(*candidate), np.errstate(all="ignore"):
        for stage in golden_vectors.stages(arrays):
            try:
                computed = stage()
            except (ValueError, FloatingPointError, KeyError):
                # Not finite; or, of two faults, one leaves out what the other looks for.
                return _Result(candidate, reach, True, math.inf)
            for name, array in computed.items():
                if name not in arrays or not math.isfinite(allowed[name]):
                    continue
                if array.shape != arrays[name].shape:
                    return _Result(candidate, reach, True, math.inf)
                budget = max(allowed[name], np.finfo(np.float64).tiny)
                both_nan = np.isnan(arrays[name]) & np.isnan(array)
                yours = np.where(both_nan, 0.0, arrays[name])
                array = np.where(both_nan, 0.0, array)
                worst = max(worst, row_of(name, yours, array, 0.0).difference / budget)
                if worst > _SLACK:
                    expected = golden_vectors.arrays[name]
                    change = row_of(name, array, expected, 0.0).difference
                    return _Result(candidate, reach, change > budget, worst)
                reach += 1
    return _Result(candidate, reach, False, worst)
