"""The search for faults with which marref computes given arrays.

`Search.explanations` tries every fault of the catalogue, then sets of two and of three.  A set
grows from one that explains more of the arrays, in the order of computation, than without its last
fault; or from several that change the same array, which none of them explains alone.  (All sets of
three are too many: 200,000.)
"""

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from marref import trees
from marref.trees import Array
from marref.verify import faults, golden, measure
from marref.verify.comparison import Comparison, Golden, Row, budgets_by_array, row_of
from marref.verify.faults import STAGES, Fault, continuous
from marref.verify.rounding import EPSILON

_T = TypeVar("_T")

Together: TypeAlias = tuple[Fault, ...]
Stages: TypeAlias = dict[Any, Callable[[], dict[str, Array]]]
Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with what is tried, how many of these have been, and how many there are."""

_NEAR = 8.0
"""Within so many budgets of the right model, those of the faulty model are worked out."""
_SAME = 1e-9
"""Arrays that differ by less, relative to the largest entry, are the same in float64."""
_WIDTH = 12
"""So many sets of faults, those that explain most, are tried with one more."""
_THIN = 4
"""Fewer numbers than this that differ could fit two faults of anything by chance."""

_TINY = sys.float_info.min
_SETS = {1: "single mistakes", 2: "pairs", 3: "sets of three"}

_AFTER_LOSS = ("gradients/", *(f"{name}/" for name in golden.OPTIMISERS))
_SECTIONS = {
    "loss": ("loss", *_AFTER_LOSS),
    "diffusion loss": ("loss", *_AFTER_LOSS),
    "gradients": _AFTER_LOSS,
    "optimiser": _AFTER_LOSS[1:],
    "weight decay": _AFTER_LOSS[1:],
    "decoding": ("schedule/", "decode/", "ties/", "guidance/", "samplers/", "sampling/"),
    "guidance": ("guidance/",),
    "samplers": ("samplers/",),
    "sampling": ("sampling/",),
    "masking": (),
}
"""The sections that the faults of a stage can change; those of other stages can change any."""

_STAGES = {
    "loss": ("loss", "diffusion loss"),
    **dict.fromkeys(("schedule", "decode", "ties"), ("decoding",)),
    "guidance": ("decoding", "guidance"),
    "samplers": ("decoding", "samplers"),
    "masking": ("masks",),
    "noise_schedule": ("noise schedule",),
}
"""Where a section's faults are; of other sections, anywhere."""
LATE = (*golden.OPTIMISERS, "schedule", "decode", "ties", "guidance", "samplers", "sampling")
"""Sections whose steps or integers differ by much where what comes before differs by little."""
_STAGE_OF = {
    fault: stage
    for stages in (STAGES, continuous.STAGES)
    for stage, of_stage in stages.items()
    for fault in of_stage
}


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
    decides : str or None
        An array that was not given, in which the first of these differs.
    """

    faults: Together
    ratio: float
    same: tuple[Together, ...] = ()
    decides: str | None = None


@dataclasses.dataclass(frozen=True)
class Partial:
    """Faults with which marref computes your numbers up to some array, and no further.

    Parameters
    ----------
    faults : tuple of Fault
    same : tuple of tuples of Fault
        Others that come as far.
    vectors : Golden
        What marref computes with the faults.
    left : Comparison
        Of your arrays with these; `Comparison.first` is the first that the faults leave over.
    """

    faults: Together
    same: tuple[Together, ...]
    vectors: Golden
    left: Comparison


class _Result(NamedTuple):
    """How far marref with some faults comes to the given arrays.

    ``reach`` counts the arrays explained before the first that is not; ``changes`` says whether
    the faults change that one at all; ``starts`` whether they change the first array that differs;
    ``ratio`` is the largest difference over its budget.
    """

    faults: Together
    reach: int
    changes: bool
    starts: bool
    ratio: float

    @property
    def near(self) -> bool:
        return self.starts and self.ratio <= _NEAR


class _Judged(NamedTuple):
    """What marref computes with some faults, and the given arrays compared with that.

    ``near`` is that of the `_Result` by which they were chosen.
    """

    faults: Together
    computed: dict[str, Array]
    left: Comparison
    near: bool

    @property
    def ratio(self) -> float:
        ratios = [
            math.inf if math.isnan(row.difference) else row.difference / max(row.budget, _TINY)
            for row in self.left.rows
            if math.isfinite(row.budget)
        ]
        return max(ratios, default=0.0)


class Search:
    """The arrays to be explained, and what has been tried.

    Parameters
    ----------
    golden_vectors : Golden
    arrays : dict of str to array
    comparison : Comparison
        Of these, in which something differs.
    progress : callable
        See `Progress`.
    """

    def __init__(
        self,
        golden_vectors: Golden,
        arrays: Mapping[str, Array],
        comparison: Comparison,
        progress: Progress,
    ) -> None:
        self.golden_vectors = golden_vectors
        self.arrays = {name: np.asarray(array) for name, array in arrays.items()}
        self.comparison = comparison
        self.progress = progress
        self.first = comparison.differing[0].name
        self.stages = golden_vectors.stages(arrays)
        is_fine = any(comparison.precision_of(name) == "float64" for name in self.arrays)
        self.one_sequence: Stages | None = None
        if not golden_vectors.is_continuous:
            dtype = np.float64 if is_fine else np.float32
            self.one_sequence = _of_one_sequence(golden_vectors, dtype)
        self.pristine: dict[Any, dict[str, Array]] = {}
        self.tried: dict[frozenset[Fault], _Result] = {}
        self.judged: dict[frozenset[Fault], _Judged] = {}

    @property
    def thin(self) -> bool:
        """Whether what differs are integers, or so few numbers that much would fit by chance."""
        differing = [self.arrays[row.name] for row in self.comparison.differing]
        return sum(array.size for array in differing if array.dtype.kind == "f") < _THIN

    def explanations(self, most_together: int) -> list[Explanation]:
        """Find what explains all arrays, with as few faults as possible; best first."""
        self._try(())
        # Of an optimiser that differs first there are thousands of sets of three, each as slow.
        limit = 2 if self.thin or self.first.startswith(_SECTIONS["optimiser"]) else 3
        for size in range(1, min(most_together, limit) + 1):
            sets = self._sets(size)
            results = []
            for done, together in enumerate(sets):
                self.progress(_SETS[size], done, len(sets))
                results.append(self._try(together))
            found = self._confirmed([result for result in results if result.near])
            if found:
                return found
        return []

    def near(self) -> list[Explanation]:
        """List what came near all arrays, and not within budget; best first."""
        near = [one for one in self.judged.values() if not one.left.agrees and one.near]
        return [Explanation(one.faults, one.ratio) for one in sorted(near, key=lambda x: x.ratio)]

    def partial(self) -> Partial | None:
        """Find what explains the arrays up to the furthest, if anything explains the first."""
        gaining = [
            result for result in self.tried.values() if result.starts and self._gains(result)
        ]
        gaining.sort(key=lambda result: (-result.reach, len(result.faults)))
        by_reach: dict[int, list[_Judged]] = {}
        for result in gaining[:_WIDTH]:
            judged = self._judge(result.faults)
            if judged is None or judged.left.agrees:
                continue
            explained = self._explained(judged)
            if self._telling(explained) and self._needed(judged, explained):
                by_reach.setdefault(len(explained), []).append(judged)
        if not by_reach:
            return None
        best, *others = by_reach[max(by_reach)]
        arrays = {**self.golden_vectors.arrays, **best.computed}
        vectors = Golden(arrays, self.golden_vectors.metadata)
        return Partial(best.faults, tuple(other.faults for other in others), vectors, best.left)

    def _candidates(self) -> list[Fault]:
        """List the faults to try.

        Where the evidence is thin, or a sampler is wrong whose first logits are right, those of the
        section itself; those of samplers only where one of their arrays is given.
        """
        found = faults.of_model(self.golden_vectors.model)
        if not any(name.startswith("samplers/") for name in self.arrays):
            found = [fault for fault in found if _STAGE_OF[fault] != "samplers"]
        if not (self.thin or self._starts_right()):
            return found
        stages = _STAGES.get(self.first.split("/")[0], tuple(STAGES))
        return [fault for fault in found if _STAGE_OF[fault] in stages]

    def _starts_right(self) -> bool:
        """Whether a sampler differs first, and not in the logits that it starts with."""
        section, _, rest = self.first.partition("/")
        logits = f"samplers/{rest.partition('/')[0]}/steps/logits"
        if section != "samplers" or logits not in self.arrays:
            return False
        budget = next(row.budget for row in self.comparison.rows if row.name == logits)
        right = self.golden_vectors.arrays[logits][0]
        return measure.difference(self.arrays[logits][0], right) <= budget < math.inf

    def _sets(self, size: int) -> list[Together]:
        """Choose the sets of so many faults to try; see the head of this module."""
        candidates = self._candidates()
        sets: list[Together] = [
            (*base.faults, fault) for base in self._helping(size - 1) for fault in candidates
        ]
        for base in self._helping(size - 2) if size > 1 else ():
            changing = [fault for fault in candidates if self._changes_next(base, fault)]
            sets += [(*base.faults, *pair) for pair in itertools.combinations(changing, 2)]
        unique = {frozenset(together): together for together in sets}
        return [
            together
            for key, together in unique.items()
            if len(key) == size and faults.compatible(*together)
        ]

    def _helping(self, size: int) -> list[_Result]:
        """List the sets of so many faults that explain more than with one fewer, best first.

        Where no two explain more than one, those that come nearest stand in.
        """
        of_size = [result for result in self.tried.values() if len(result.faults) == size]
        helping = [result for result in of_size if self._gains(result)]
        if not helping and size == 2:
            helping = [result for result in of_size if result.starts]
        return sorted(helping, key=lambda result: (-result.reach, result.ratio))[:_WIDTH]

    def _gains(self, result: _Result) -> bool:
        """Whether a set of faults explains more than each of the smaller sets that were tried."""
        smaller = [frozenset(result.faults) - {fault} for fault in result.faults]
        return all(self.tried[key].reach < result.reach for key in smaller if key in self.tried)

    def _changes_next(self, base: _Result, fault: Fault) -> bool:
        """Whether a fault changes the first array that a set leaves over, without explaining it."""
        result = self.tried.get(frozenset((*base.faults, fault)))
        return result is not None and result.changes and result.reach == base.reach

    def _try(self, together: Together) -> _Result:
        """Examine faults, in both orders where they change one function; keep the better."""
        orders = [together, together[::-1]] if _entangled(together) else [together]
        results = [self._examine(order) for order in orders]
        best = max(results, key=lambda result: (result.reach, -result.ratio))
        self.tried[frozenset(together)] = best
        return best

    def _examine(self, together: Together) -> _Result:
        """Compare with marref under some faults, up to the first array that is far off.

        Of the many sets of several, what one sequence shows in the forward pass rules out most.
        """
        of_activations = self.one_sequence if self.first.startswith("activations/") else None
        if len(together) > 1 and of_activations is not None:
            result = self._compared(together, of_activations, slice(1, 2))
            if result.ratio > _NEAR:
                return result
        return self._compared(together, self.golden_vectors.stages(self.arrays), ...)

    def _compared(self, together: Together, stages: Stages, sequences: Any) -> _Result:
        budgets = self._budgets(together)
        worst, reach, starts = 0.0, 0, False
        for key, stage in stages.items():
            if any(can_change(fault, key) for fault in together):
                computed = _under(together, stage)
            else:
                if key not in self.pristine:
                    self.pristine[key] = self.stages[key]()
                computed = {name: array[sequences] for name, array in self.pristine[key].items()}
            if computed is None:
                return _Result(together, reach, True, starts, math.inf)
            for name, array in computed.items():
                if name not in budgets or not math.isfinite(budgets[name]):
                    continue
                yours = self.arrays[name][sequences]
                if array.shape != yours.shape:
                    return _Result(together, reach, True, starts, math.inf)
                budget = max(budgets[name], _TINY)
                change = measure.difference(array, self.golden_vectors.arrays[name][sequences])
                starts |= name == self.first and change > budget
                worst = max(worst, _distance(yours, array) / budget)
                if worst > _NEAR:
                    return _Result(together, reach, change > budget, starts, worst)
                reach += 1
        return _Result(together, reach, False, starts, worst)

    def _budgets(self, together: Together) -> dict[str, float]:
        """Choose the budgets by which to examine some faults.

        Those of the set without the last fault, if they have been derived.  Else those of the right
        model; but what a mistake further up does to the steps of an optimiser, or to a decoder, is
        judged by budgets of its own alone.
        """
        judged = self.judged.get(frozenset(together[:-1])) if len(together) > 1 else None
        return {row.name: row.budget for row in judged.left.rows} if judged else self.screening

    @functools.cached_property
    def screening(self) -> dict[str, float]:
        """The budgets of the right model, as far as they may rule a mistake out; see `_budgets`."""
        budgets = {row.name: row.budget for row in self.comparison.rows}
        for name in budgets if self.first.split("/")[0] not in LATE else ():
            section = name.split("/")[0]
            if section in golden.OPTIMISERS:
                rate = golden.OPTIMISERS[section]["learning_rate"]
                whole_steps = 2.0 * rate * int(name.split("/")[1])
                budgets[name] = max(budgets[name], whole_steps / _NEAR)
            elif section in ("decode", "guidance", "samplers", "sampling"):
                budgets[name] = math.inf
        return budgets

    def _judge(self, together: Together) -> _Judged | None:
        """Compare with marref under some faults, within budgets of that faulty model."""
        key = frozenset(together)
        if key in self.judged:
            return self.judged[key]
        computed = self._compute(together, self.arrays)
        names = [row.name for row in self.comparison.rows]
        precisions = {name: self.comparison.precision_of(name) for name in names}
        allowed = _under(together, lambda: budgets_by_array(self.golden_vectors, precisions))
        if computed is None or allowed is None:
            return None
        expected = {**self.golden_vectors.arrays, **computed}
        rows = []
        for row in self.comparison.rows:
            # Coarse as a budget may be: no explanation moves marref away from what was right.
            budget = allowed[row.name]
            if math.isfinite(budget):
                budget = min(budget, max(2.0 * row.difference, budget / 4.0))
            rows.append(_row(row.name, self.arrays[row.name], expected[row.name], budget))
        left = dataclasses.replace(self.comparison, rows=tuple(rows))
        near = key in self.tried and self.tried[key].near
        self.judged[key] = _Judged(together, computed, left, near)
        return self.judged[key]

    def _compute(self, together: Together, names: Mapping[str, Any]) -> dict[str, Array] | None:
        return _under(together, lambda: self.golden_vectors.compute(names))

    def _confirmed(self, results: list[_Result]) -> list[Explanation]:
        """Keep what explains the arrays within budgets of its own, and name what is the same."""
        judged = [one for result in results if (one := self._judge(result.faults))]
        for one in judged:
            if not one.left.agrees:
                key, reach = frozenset(one.faults), len(self._explained(one))
                self.tried[key] = _Result(one.faults, reach, True, True, one.ratio)
        names = [row.name for row in self.comparison.rows]
        kept = [
            one
            for one in judged
            if one.left.agrees and self._decided(one) and self._needed(one, names)
        ]
        kept.sort(key=lambda one: one.ratio)
        found = []
        for one in kept:
            same = [other for other in kept if other is not one and self._same(one, other)]
            decides = self._deciding(one, same)
            found.append(Explanation(one.faults, one.ratio, tuple(x.faults for x in same), decides))
        return found

    def _explained(self, judged: _Judged) -> list[str]:
        """List the arrays before the first that is left over."""
        names = [row.name for row in judged.left.rows]
        return names if judged.left.first is None else names[: names.index(judged.left.first.name)]

    def _decided(self, judged: _Judged) -> bool:
        """Whether budgets of the faulty model decide of the first array that differs."""
        return all(math.isfinite(r.budget) for r in judged.left.rows if r.name == self.first)

    def _telling(self, explained: list[str]) -> bool:
        """Whether enough numbers that differ from the right ones have been explained."""
        differing = {row.name for row in self.comparison.differing}
        arrays = [self.arrays[name] for name in explained if name in differing]
        return sum(array.size for array in arrays if array.dtype.kind == "f") >= _THIN

    def _needed(self, judged: _Judged, names: list[str]) -> bool:
        """Whether each of several faults changes something that the others do not."""
        allowed = {row.name: row.budget for row in judged.left.rows}
        for fault in judged.faults if len(judged.faults) > 1 else ():
            rest = tuple(other for other in judged.faults if other is not fault)
            others = self._compute(rest, self.arrays)
            if others is not None and not any(
                _distance(judged.computed[name], others[name]) > allowed[name]
                for name in names
                if name in judged.computed and math.isfinite(allowed[name])
            ):
                return False
        return True

    def _same(self, one: _Judged, other: _Judged) -> bool:
        return all(
            _same(one.computed[name], other.computed[name])
            for name in self.arrays
            if name in one.computed
        )

    def _deciding(self, one: _Judged, same: list[_Judged]) -> str | None:
        """Name an array that was not given and tells faults apart that compute the same ones."""
        if not same:
            return None
        everything = self.golden_vectors.arrays
        alternatives = [self._compute(each.faults, everything) for each in (one, *same)]
        mine, *others = (arrays for arrays in alternatives if arrays is not None)
        for name in self.golden_vectors.order(mine):
            size = 1e3 * EPSILON[self.comparison.precision] * measure.largest(mine[name])
            if any(_distance(mine[name], arrays[name]) > size for arrays in others):
                return name
        return None


def _under(together: Together, compute: Callable[[], _T]) -> _T | None:
    """Compute something under some faults; None where it cannot be computed."""
    with faults.applied(*together), np.errstate(all="ignore"):
        try:
            return compute()
        except (ArithmeticError, LookupError, TypeError, ValueError):
            # Not finite; or, of two faults, one leaves out or shapes what the other looks for.
            return None


def _of_one_sequence(golden_vectors: Golden, dtype: npt.DTypeLike) -> Stages:
    """Return the forward pass of the second sequence of the batch, half of which is masked.

    It only rules out what is `_NEAR` budgets away, of which float32's rounding is a small part
    where the arrays are no finer.
    """
    batch = {name: array[1:2] for name, array in golden_vectors.batch.items()}
    params = trees.map_leaves(lambda leaf: leaf.astype(dtype), golden_vectors.params)
    stages = golden.stages(golden_vectors.model, params, batch)
    return {"activations/": stages["activations/"]}


def _entangled(together: Together) -> bool:
    """Whether faults change one function, so that their order matters."""
    seams = [seam for fault in together for seam in {patch.seam for patch in fault.patches}]
    return len(set(seams)) < len(seams)


def can_change(fault: Fault, stage: str | tuple[str, ...]) -> bool:
    """Whether a fault can change what a stage of `golden.stages` computes."""
    sections = _SECTIONS.get(_STAGE_OF[fault])
    prefixes = (stage,) if isinstance(stage, str) else stage
    return sections is None or any(prefix.startswith(sections) for prefix in prefixes)


def _row(name: str, yours: Array, expected: Array, budget: float) -> Row:
    """Compare as `comparison.row_of`, but that NaN is no difference to NaN."""
    if yours.shape != expected.shape:
        return Row(name, yours.shape, math.inf, math.inf, budget)
    return row_of(name, *measure.without_common_nan(yours, expected), budget)


def _distance(actual: Array, expected: Array) -> float:
    """Return the largest difference; NaN is no difference to NaN."""
    return measure.difference(*measure.without_common_nan(actual, expected))


def _same(actual: Array, expected: Array) -> bool:
    return _distance(actual, expected) <= _SAME * measure.largest(expected[~np.isnan(expected)])
