"""Diagnosis: which known mistakes or conventions make marref compute exactly your numbers.

Every fault of the catalogue, alone and then in pairs, is made in marref itself, on the golden
inputs.  It explains a comparison if

- it changes the first array that differs, by more than the budget;
- marref with it comes to your arrays, all of them, within budgets that are derived anew for the
  faulty model, whose rounding is its own;
- in a pair, neither of the two can be left out.

Explanations that compute the same arrays are one, with several names.  What comes near and not
within budget is no finding, and is said as such.
"""

import dataclasses
import itertools
import json
import math
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from marref.trees import Array
from marref.verify import faults, measure
from marref.verify.comparison import Comparison, Golden, budgets_by_array, compare
from marref.verify.faults import CATALOGUE, Fault
from marref.verify.rounding import MIXED

_MOST_SHOWN = 3
_NEAR = 8.0
"""Within so many budgets of the right model, those of the faulty model are worked out."""
_HINTS = {
    "tf32": "is TensorFloat-32 switched on? In PyTorch torch.backends.cuda.matmul.allow_tf32 and "
    "torch.set_float32_matmul_precision, in JAX jax_default_matmul_precision, decide it",
    "fp16-mixed": "do matrix products run in float16, as under autocast?",
    "bf16-mixed": "do matrix products run in bfloat16, as under autocast, or on a TPU by default?",
}
_SAME = 1e-9
"""Arrays that differ by less, relative to the largest entry, are the same in float64."""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A fault, or several together, with which marref computes your numbers.

    Parameters
    ----------
    faults : tuple of Fault
    ratio : float
        The largest difference over its budget, over all arrays; below 1 is within budget.
    same : tuple of tuples of Fault
        Others that compute the same, in the arrays that were given.
    """

    faults: tuple[Fault, ...]
    ratio: float
    same: tuple[tuple[Fault, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What a comparison found, and what explains it, best first.

    Parameters
    ----------
    comparison : Comparison
    explanations : tuple of Explanation
        Empty where nothing in the catalogue fits, or nothing differs.
    near : tuple of Explanation
        Without an explanation: what comes near, best first.  It is no finding.
    coarser : str or None
        Without an explanation: a precision of matrix products within whose rounding all agree.
    """

    comparison: Comparison
    explanations: tuple[Explanation, ...]
    near: tuple[Explanation, ...] = ()
    coarser: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether nothing differs."""
        return self.comparison.agrees

    def as_table(self, colour: bool = False) -> str:
        """Write the comparison, and what explains it."""
        lines = [self.comparison.as_table(colour)]
        for explanation in self._different()[:_MOST_SHOWN]:
            alternatives = (explanation.faults, *explanation.same)
            lines.append(
                f"\nyour arrays are what marref computes with {_or(alternatives)} "
                f"(all {len(self.comparison.rows)} within {explanation.ratio:.2g} of the budget)"
            )
            if explanation.same:
                lines.append("  which compute the same, in the arrays that were given")
            lines += [
                textwrap.fill(fault.summary, 96, initial_indent="  ", subsequent_indent="  ")
                for fault in explanation.faults
            ]
        if self.coarser:
            lines.append(
                f"\nall agree within the rounding of {self.coarser}: {_HINTS[self.coarser]}"
            )
        elif self.comparison.first and not self.explanations:
            lines.append(
                f"\nnothing in the catalogue of {len(CATALOGUE)} known mistakes explains it, "
                f"alone or in pairs; look at {self.comparison.first.name}"
            )
            lines += [
                f"  no finding, but near: {_and(found.faults)}, off by {found.ratio:.2g} budgets"
                for found in self.near[:_MOST_SHOWN]
            ]
        return "\n".join(lines)

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
            "near": [_as_dict(found) for found in self.near],
            "coarser": self.coarser,
        }
        return json.dumps(report, indent=1)


def _and(together: tuple[Fault, ...]) -> str:
    return " and ".join(fault.name for fault in together)


def _or(alternatives: tuple[tuple[Fault, ...], ...]) -> str:
    return ", or with ".join(map(_and, alternatives))


def _as_dict(found: Explanation) -> dict[str, Any]:
    return {
        "faults": [fault.name for fault in found.faults],
        "ratio": found.ratio if math.isfinite(found.ratio) else None,
        "same": [[fault.name for fault in faults] for faults in found.same],
    }


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
    patient = _Patient(golden_vectors, arrays, comparison)
    unfaulted = patient.examine(())
    singles = [patient.examine((fault,)) for fault in CATALOGUE.values()]
    near = [result for result in singles if result.near]
    found = patient.confirmed(near)
    if not found and pairs:
        results = map(patient.examine, _pairs(singles, unfaulted))
        near_pairs = [result for result in results if result.near]
        found = patient.confirmed(near_pairs)
        near += near_pairs
    explanations = [Explanation(result.faults, result.ratio) for result in near]
    coarser = None if found else _coarser(golden_vectors, arrays, comparison)
    nearest = () if found else tuple(sorted(explanations, key=lambda result: result.ratio))
    return Diagnosis(comparison, tuple(found), nearest, coarser)


def _coarser(
    golden_vectors: Golden, arrays: Mapping[str, Array], comparison: Comparison
) -> str | None:
    """Name a precision of matrix products within whose rounding float32 arrays agree."""
    if comparison.precision != "float32":
        return None
    return next((one for one in MIXED if compare(golden_vectors, arrays, one).agrees), None)


def _pairs(singles: list["_Result"], unfaulted: "_Result") -> list[tuple[Fault, ...]]:
    """Choose the pairs to try: one of the two explains the first difference, or both change it."""
    helping = [result for result in singles if result.reach > unfaulted.reach]
    changing = [result for result in singles if result.reach == unfaulted.reach and result.changes]
    pairs = {
        frozenset((*first.faults, *second.faults)): (*first.faults, *second.faults)
        for first, second in (
            *itertools.product(helping, singles),
            *itertools.combinations(changing, 2),
        )
        if first is not second and faults.compatible(*first.faults, *second.faults)
    }
    return list(pairs.values())


class _Result(NamedTuple):
    """How far marref with some faults comes to the given arrays.

    ``reach`` counts the arrays explained before the first that is not; ``changes`` says whether
    the faults change that one at all; ``starts`` whether they change the first array that differs;
    ``ratio`` is the largest difference over its budget.
    """

    faults: tuple[Fault, ...]
    reach: int
    changes: bool
    starts: bool
    ratio: float

    @property
    def near(self) -> bool:
        return self.starts and self.ratio <= _NEAR


class _Patient(NamedTuple):
    """The arrays to be explained, and what was found when they were compared."""

    golden_vectors: Golden
    arrays: Mapping[str, Array]
    comparison: Comparison

    def examine(self, candidate: tuple[Fault, ...]) -> _Result:
        """Compare with marref under some faults, up to the first array that is far off."""
        rows = {row.name: row for row in self.comparison.rows}
        worst, reach, starts = 0.0, 0, False
        with faults.applied(*candidate), np.errstate(all="ignore"):
            for stage in self.golden_vectors.stages(self.arrays):
                try:
                    computed = stage()
                except (ValueError, FloatingPointError, KeyError):
                    # Not finite; or, of two faults, one leaves out what the other looks for.
                    return _Result(candidate, reach, True, starts, math.inf)
                for name, array in computed.items():
                    if name not in rows or not math.isfinite(rows[name].budget):
                        continue
                    if array.shape != self.arrays[name].shape:
                        return _Result(candidate, reach, True, starts, math.inf)
                    budget = max(rows[name].budget, np.finfo(np.float64).tiny)
                    expected = self.golden_vectors.arrays[name]
                    change = measure.difference(array, expected)
                    starts |= rows[name] is self.comparison.first and change > budget
                    worst = max(worst, _distance(self.arrays[name], array) / budget)
                    if worst > _NEAR:
                        return _Result(candidate, reach, change > budget, starts, worst)
                    reach += 1
        return _Result(candidate, reach, False, starts, worst)

    def confirmed(self, results: list[_Result]) -> list[Explanation]:
        """Keep what explains the arrays within budgets of its own; what is the same, once."""
        kept: list[tuple[Explanation, dict[str, Array]]] = []
        for result in results:
            own = self._own(result.faults)
            if own is None:
                continue
            computed, allowed = own
            ratios = [
                _distance(self.arrays[name], computed[name]) / max(budget, np.finfo(float).tiny)
                for name, budget in allowed.items()
                if name in computed and math.isfinite(budget)
            ]
            ratio = max(ratios, default=0.0)
            if ratio <= 1.0 and self._needed(result.faults, computed, allowed):
                kept.append((Explanation(result.faults, ratio), computed))
        kept.sort(key=lambda pair: pair[0].ratio)
        return [
            dataclasses.replace(
                explanation,
                same=tuple(
                    other.faults
                    for other, arrays in kept
                    if other is not explanation and self._same(computed, arrays)
                ),
            )
            for explanation, computed in kept
        ]

    def _same(self, computed: dict[str, Array], arrays: dict[str, Array]) -> bool:
        return all(_same(computed[name], arrays[name]) for name in self.arrays if name in arrays)

    def _own(
        self, candidate: tuple[Fault, ...]
    ) -> tuple[dict[str, Array], dict[str, float]] | None:
        """Compute the arrays under some faults, and the budgets of that faulty model."""
        computed = self._computed(candidate)
        if computed is None:
            return None
        precisions = {name: self.comparison.precision_of(name) for name in self.arrays}
        with faults.applied(*candidate), np.errstate(all="ignore"):
            try:
                return computed, budgets_by_array(self.golden_vectors, precisions)
            except (ValueError, FloatingPointError, KeyError):
                return None

    def _computed(self, candidate: tuple[Fault, ...]) -> dict[str, Array] | None:
        """Compute the arrays under some faults alone."""
        with faults.applied(*candidate), np.errstate(all="ignore"):
            try:
                return self.golden_vectors.compute(self.arrays)
            except (ValueError, FloatingPointError, KeyError):
                return None

    def _needed(
        self, together: tuple[Fault, ...], computed: dict[str, Array], allowed: dict[str, float]
    ) -> bool:
        """Whether each of several faults changes something that the others do not."""
        for fault in together if len(together) > 1 else ():
            others = self._computed(tuple(other for other in together if other is not fault))
            if others is not None and not any(
                _distance(array, others[name]) > allowed[name]
                for name, array in computed.items()
                if name in self.arrays and math.isfinite(allowed[name])
            ):
                return False
        return True


def _distance(actual: Array, expected: Array) -> float:
    """Return the largest difference; NaN is no difference to NaN."""
    both_nan = np.isnan(actual) & np.isnan(expected)
    return measure.difference(np.where(both_nan, 0.0, actual), np.where(both_nan, 0.0, expected))


def _same(actual: Array, expected: Array) -> bool:
    return actual.shape == expected.shape and (
        _distance(actual, expected) <= _SAME * measure.largest(np.nan_to_num(expected))
    )
