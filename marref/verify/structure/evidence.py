"""When it may be said that an array is something: where it could not be by chance.

A candidate is an array that yours might be.  It is accepted if *every* entry is within
tolerance, and if that is no luck.  If yours comes to within d of the candidate, an entry that is
r d from the golden one would have done so with a chance of about 1/r, which is log2(r) bits of
evidence.  The bits of all entries, less those that a choice among candidates or a fitted number
uses up, must be at least `BITS`.  So a single entry proves little, and neither does an array that
differs by not much more than it is off.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from marref import trees
from marref.trees import Array
from marref.verify import measure, trace
from marref.verify.comparison import Comparison, Golden
from marref.verify.rounding import EPSILON

BITS = 20.0
"""A wrong sentence in a million."""

_SLACK = 2.0
"""Tolerance over budget: the budget is that of the golden array, which was computed otherwise."""

Candidates = Iterable[tuple[str, Array]]
"""What is said of yours if it is the array ("is …"), and the array."""


class Finding(NamedTuple):
    """What is said of an array, and how far that is off in budgets, where it is a number."""

    clause: str
    residual: float | None = None

    def sentence(self, subject: str) -> str:
        """Write it as a sentence about a subject."""
        evidence = "" if self.residual is None else f", to within {self.residual:.2g} of the budget"
        return f"{subject} {self.clause}{evidence}"


@dataclasses.dataclass(frozen=True)
class Case:
    """An array that differs, and what it may be held to.

    Parameters
    ----------
    name : str
    yours, golden : float64 arrays of one shape
        Or the same part of both.
    budget : float
    vectors : Golden
    arrays : dict of str to array
        All arrays that were given.
    comparison : Comparison
    others : dict of str to array
        Other golden arrays of the same shape, by what they are called.
    addends : dict of str to array
        What may have been added or left out, of the same shape.
    """

    name: str
    yours: Array
    golden: Array
    budget: float
    vectors: Golden
    arrays: Mapping[str, Array]
    comparison: Comparison
    others: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    addends: Mapping[str, Array] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def parameters(self) -> dict[str, Array]:
        """The golden parameters by name."""
        return trees.flatten(self.vectors.params)

    @functools.cached_property
    def activations(self) -> dict[str, Array]:
        """All golden activations by name, float64, in the order of computation."""
        vectors = self.vectors
        inputs = vectors.batch["tokens"], vectors.batch.get("labels")
        return trace.activations(vectors.model, vectors.params, *inputs)

    def tolerance(self, candidate: Array) -> float:
        """How far yours may be from a candidate: a larger array has larger errors."""
        return _tolerance(self.golden, self.budget, candidate)

    def residual(self, candidate: Array, *, fitted: int = 0, tried: int = 1) -> float | None:
        """Accept or refuse a candidate.

        Parameters
        ----------
        candidate : array
        fitted : int
            How many numbers of it were fitted to yours.
        tried : int
            Among how many candidates it was chosen.

        Returns
        -------
        float or None
            The largest |yours - candidate| in budgets, if it is accepted.
        """
        if candidate.shape != self.yours.shape:
            return None
        distance = measure.difference(self.yours, candidate)
        if not distance <= self.tolerance(candidate) or not self.proves(distance, fitted, tried):
            return None
        return distance / self.budget

    def proves(self, distance: float, fitted: int = 0, tried: int = 1) -> bool:
        """Whether it is no luck that yours comes so near to a candidate."""
        found = bits(self.yours, self.golden, distance, self.budget)
        spent = fitted * float(found.max(initial=0.0)) + math.log2(tried)
        return float(found.sum()) - spent >= BITS

    def fitting(self, candidates: Candidates, tried: int | None = None) -> Finding | None:
        """Say which candidates yours is: all that cannot be told apart, simplest first."""
        listed = list(candidates)
        found = [
            (clause, residual)
            for clause, candidate in listed
            if (residual := self.residual(candidate, tried=tried or len(listed))) is not None
        ]
        if not found:
            return None
        clauses = list(dict.fromkeys(clause for clause, _ in found))
        return Finding(either(clauses), min(residual for _, residual in found))

    def all_are(self, expected: Mapping[str, Array], *, fitted: int = 0, tried: int = 1) -> bool:
        """Whether several arrays are together what is expected of them, by name."""
        rows = {row.name: row for row in self.comparison.rows}
        total, most = 0.0, 0.0
        for name, candidate in expected.items():
            budget, golden = rows[name].budget, np.asarray(self.vectors.arrays[name], np.float64)
            if not math.isfinite(budget):
                continue
            budget = floor(golden, budget, self.comparison.precision_of(name))
            distance = measure.difference(self.arrays[name], candidate)
            if not distance <= _tolerance(golden, budget, candidate):
                return False
            found = bits(np.asarray(self.arrays[name], np.float64), golden, distance, budget)
            total, most = total + float(found.sum()), max(most, float(found.max(initial=0.0)))
        return total - fitted * most - math.log2(tried) >= BITS

    def part(self, where: Array) -> "Case":
        """Keep only some of the entries, in a row."""

        def cut(named: Mapping[str, Array]) -> dict[str, Array]:
            return {name: array[where] for name, array in named.items()}

        return dataclasses.replace(
            self,
            yours=self.yours[where],
            golden=self.golden[where],
            others=cut(self.others),
            addends=cut(self.addends),
        )


def _tolerance(golden: Array, budget: float, candidate: Array) -> float:
    size = measure.largest(golden)
    growth = measure.largest(candidate) / size if size > 0 else 1.0
    return _SLACK * budget * max(1.0, growth)


def bits(yours: Array, golden: Array, distance: float, budget: float) -> Array:
    """Count the evidence in every entry of yours being within a distance of a candidate."""
    near = max(2.0 * distance, budget / 64.0)
    return np.asarray(np.log2(np.maximum(np.abs(yours - golden) / near, 1.0)))


def either(clauses: list[str]) -> str:
    """Join what cannot be told apart: "is A, or B"."""
    first_, *rest = clauses[:3]
    more = [f"{len(clauses) - 3} others like these"] if len(clauses) > 3 else []
    return ", or ".join([first_, *(clause.removeprefix("is ") for clause in rest), *more])


Hint = Callable[[Case], Finding | None]


def first(hints: Iterable[Hint], case: Case) -> Finding | None:
    """Return the first thing that can be said."""
    return next(filter(None, (hint(case) for hint in hints)), None)


def floor(golden: Array, budget: float, precision: str) -> float:
    """Return a budget that is never below rounding: what is given has none of its own."""
    return max(budget, EPSILON[precision] * measure.largest(golden), np.finfo(float).tiny)


def number(value: float) -> str:
    """Write a number with four digits."""
    return f"{value:.4g}"


def constants(case: Case) -> Iterator[tuple[str, float]]:
    """List the numbers that a factor may be, simplest first, each with its inverse."""
    known = _of_continuous if case.vectors.is_continuous else _of_discrete
    yield "-1", -1.0
    for name, value in known(case).items():
        if value > 0.0 and value != 1.0:
            yield name, value
            yield f"1/({name.split(',')[0]})", 1.0 / value


def _of_continuous(case: Case) -> dict[str, float]:
    model, num_masked = case.vectors.model, int(case.vectors.batch["num_masked"])
    return {
        "2": 2.0,
        "1000": 1000.0,
        "log 2": math.log(2.0),
        "the masked share of the tokens": num_masked / model.length,
        "the batch": float(len(case.vectors.batch["images"])),
        "the length": float(model.length),
        "token_dim": float(model.token_dim),
        "diffusion_batch_mul": float(model.diffusion_batch_mul),
        "buffer_size": float(model.buffer_size),
        "the number of heads": float(model.num_heads),
        "sqrt(encoder_dim)": math.sqrt(model.encoder_dim),
        "sqrt(decoder_dim)": math.sqrt(model.decoder_dim),
        "sqrt(2)": math.sqrt(2.0),
        "1/(1 - p) of dropout with p = 0.1": 1.0 / 0.9,
    }


def _of_discrete(case: Case) -> dict[str, float]:
    model, mask = case.vectors.model, case.vectors.batch["mask"]
    batch, length = mask.shape
    head_dim = model.embed_dim // model.num_heads
    return {
        "2": 2.0,
        "|M|, the number of masked positions": float(mask.sum()),
        "the batch": float(batch),
        "the length": float(length),
        "batch times length": float(batch * length),
        "the number of layers": float(model.num_layers),
        "the number of heads": float(model.num_heads),
        "sqrt(head_dim)": math.sqrt(head_dim),
        "head_dim": float(head_dim),
        "sqrt(embed_dim)": math.sqrt(model.embed_dim),
        "embed_dim": float(model.embed_dim),
        "vocab_size": float(model.vocab_size),
        "log 2": math.log(2.0),
        "sqrt(2)": math.sqrt(2.0),
        "sqrt(number of heads)": math.sqrt(model.num_heads),
        "sqrt(2 number of layers)": math.sqrt(2.0 * model.num_layers),
        "|M| over batch times length": float(mask.sum()) / (batch * length),
        "|M| over batch": float(mask.sum()) / batch,
        "n/(n - 1) for n = embed_dim": model.embed_dim / (model.embed_dim - 1.0),
        "sqrt(n/(n - 1)) for n = embed_dim": math.sqrt(model.embed_dim / (model.embed_dim - 1.0)),
        "1/(1 - p) of dropout with p = 0.1": 1.0 / 0.9,
    }


def named(case: Case, value: float, uncertainty: float) -> str:
    """Write a factor, and what it may be."""
    if uncertainty > 1e-3 * abs(value):
        return number(value)
    close = max(uncertainty, 1e-12 * abs(value))
    names = [name for name, known in constants(case) if abs(value - known) <= close]
    written = number(value)
    names = [name for name in names if name != written]
    return f"{written} ({' or '.join(names[:3])})" if names else written
