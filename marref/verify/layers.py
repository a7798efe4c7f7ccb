"""Diagnosis of one layer: which mistake computes exactly these numbers.

`marref.verify.diagnose` looks at a whole model; here it is one function of the definition, such as
`marref.layers.layer_norm.backward`, and what another function returned for the same arguments.
The mistakes are those of the catalogue that change this function, and such as the caller adds.
Page: docs/exercises.md.
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from marref import trees
from marref.trees import Array
from marref.verify.faults import CATALOGUE
from marref.verify.faults.continuous import CATALOGUE as CONTINUOUS

TOLERANCE = 1e-12
"""By default, relative to the largest entry of an array, and to 1 where all are smaller."""

Function = Callable[..., Any]
Arrays = Mapping[str, Array]


class Candidate(NamedTuple):
    """A mistake, and what it computes."""

    name: str
    said: str
    outputs: list[Arrays]
    """At every point."""
    num_patches: int
    """How many functions of marref it changes; 0 if it is none of the catalogue."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found of some outputs that are wrong.

    Parameters
    ----------
    outputs : tuple of str
        Their names.
    mistakes : tuple of str
        Mistakes that compute exactly these numbers, of those that do the ones that explain most and
        change least; none where no known one does.
    sentence : str
    """

    outputs: tuple[str, ...]
    mistakes: tuple[str, ...]
    sentence: str


@dataclasses.dataclass(frozen=True)
class LayerDiagnosis:
    """What was found of the outputs of a function.

    Parameters
    ----------
    errors : dict of str to float
        The largest error of each output, relative to its largest entry (or to 1).
    findings : tuple of Finding
        Of the outputs that are wrong, in their order; empty if all are right.
    """

    errors: dict[str, float]
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether all outputs are right."""
        return not self.findings

    def __str__(self) -> str:
        """Say it in sentences, or that all outputs are right."""
        if self.passed:
            return f"right: the largest error is {max(self.errors.values()):.1e}"
        return "\n".join(finding.sentence for finding in self.findings)


def diagnose_layer(
    reference: Function,
    inputs: Mapping[str, Any],
    outputs: Any,
    names: tuple[str | None, ...],
    *,
    mistakes: Mapping[str, Function] | None = None,
    tolerance: float = TOLERANCE,
) -> LayerDiagnosis:
    """Find the mistake that computes exactly the numbers of another implementation of a layer.

    Parameters
    ----------
    reference : callable
        A function of marref's definition: `marref.layers.attention.attend_backward`.
    inputs : dict
        Its arguments, by their names.
    outputs : array, or tuple of arrays and trees
        What the other implementation returned for these arguments.
    names : tuple of str or None
        What to call the outputs, one name each; ``None``: this one is not compared.
    mistakes : dict of str to callable, optional
        More mistakes than the catalogue's: what computes them instead of ``reference``, by what is
        said of them.
    tolerance : float
        The largest error of an output that is right, relative to its largest entry, or to 1 where
        all are smaller: 1e-12 in float64; 1e-5 will do for float32.

    Returns
    -------
    LayerDiagnosis

    Raises
    ------
    ValueError
        Outputs are missing, have other shapes or hold no numbers; the message says which.

    Examples
    --------
    >>> from marref.layers import attention
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.normal(size=(3, 1, 2, 4, 3))
    >>> context, cache = attention.attend(query, key, value)
    >>> dcontext = rng.normal(size=context.shape)
    >>> dquery, dkey, dvalue = attention.attend_backward(dcontext, cache)
    >>> found = diagnose_layer(
    ...     attention.attend_backward,
    ...     {"dcontext": dcontext, "cache": cache},
    ...     (dquery * 3**0.5, dkey * 3**0.5, dvalue),
    ...     ("dquery", "dkey", "dvalue"),
    ... )
    >>> found.findings[0].mistakes
    ('attention-gradient-unscaled',)
    """
    expected, given = (named(each, names) for each in (reference(**inputs), outputs))
    check_fit(given, expected, tolerance)
    return diagnose_points(
        [expected],
        [given],
        lambda: candidates(reference, [inputs], names, mistakes or {}),
        tolerance,
    )


def diagnose_points(
    expected: Sequence[Arrays],
    given: Sequence[Arrays],
    known: Callable[[], Iterable[Candidate]],
    tolerance: float = TOLERANCE,
) -> LayerDiagnosis:
    """Diagnose as `diagnose_layer` does, at several points: a mistake must fit at all of them.

    Parameters
    ----------
    expected, given : sequences of dict of str to array
        What each call should return and returned, as `named` names it and `check_fit` lets pass.
    known : callable
        Returns the `candidates`; asked only where something is wrong.
    tolerance : float
        As of `diagnose_layer`.

    Returns
    -------
    LayerDiagnosis
    """
    errors = {
        name: max(map(error, (each[name] for each in given), (each[name] for each in expected)))
        for name in expected[0]
    }
    wrong = [name for name, largest in errors.items() if not largest <= tolerance]
    # What is cached comes before the result: a mistake shows there first.
    wrong.sort(key=lambda name: not name.startswith("cache"))
    mistakes = list(known()) if wrong else []
    findings = []
    while wrong:
        outputs, texts = _best(mistakes, given, wrong, set(errors) - set(wrong), tolerance)
        pairs = [
            pair
            for pair in zip(given, expected, strict=True)
            if not error(pair[0][wrong[0]], pair[1][wrong[0]]) <= tolerance
        ]
        sentence = _first_wrong(wrong[0], *pairs[0], tolerance)
        if texts:
            said = "\nOr: ".join(texts.values())
            sentence += f"\n{', '.join(outputs)}: exactly the numbers of this mistake: {said}"
        else:
            sentence += _relation(wrong[0], pairs, tolerance)
        findings.append(Finding(outputs, tuple(texts), sentence))
        wrong = [name for name in wrong if name not in outputs]
    return LayerDiagnosis(errors, tuple(findings))


def named(outputs: Any, names: tuple[str | None, ...]) -> dict[str, Array]:
    """Give every array that a function returned a dotted name.

    Raises
    ------
    ValueError
        There are more or fewer outputs than names, or one is neither array, number nor tree.
    """
    parts = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = ", ".join(name or "…" for name in names)
    if len(parts) != len(names):
        what = f"a tuple of {len(outputs)}" if isinstance(outputs, tuple) else _kind(outputs)
        raise ValueError(f"returned {what}, expected {wanted}")
    found: dict[str, Array] = {}
    for name, part in zip(names, parts, strict=True):
        if name is None:
            continue
        if isinstance(part, tuple):
            raise ValueError(f"{name}: received a tuple of {len(part)}")
        leaves = part if isinstance(part, dict | list) else np.asarray(part)
        try:
            arrays = trees.flatten(leaves)
        except (TypeError, ValueError) as problem:
            raise ValueError(f"{name}: {problem}") from None
        for leaf, array in arrays.items():
            if array.dtype.kind not in "biufc":
                raise ValueError(f"{name}: received {_kind(part)}, expected an array of numbers")
            found[f"{name}.{leaf}" if leaf else name] = array
    return found


def check_fit(given: Arrays, expected: Arrays, tolerance: float = TOLERANCE) -> None:
    """Raise ValueError unless all expected outputs are there, in their shapes."""
    for name, right in expected.items():
        if name not in given:
            tree, _, leaf = name.partition(".")
            if leaf and tree in given:
                raise ValueError(f"{tree}: received an array, expected a dict with {leaf}")
            there = ", ".join(given) or "nothing"
            raise ValueError(f"{name}: missing, received {there}")
        found = given[name]
        if found.shape == right.shape:
            continue
        message = f"{name}: shape {list(found.shape)}, expected {list(right.shape)}"
        if found.size == right.size and error(found.reshape(right.shape), right) <= tolerance:
            message += "; the numbers are right"
        elif right.ndim > 1 and found.shape == right.mT.shape:
            is_right = error(found.mT, right) <= tolerance
            message += "; it is the right one transposed" if is_right else "; transposed?"
        raise ValueError(message)


def error(found: Array, right: Array) -> float:
    """Compute the largest error, relative to the largest entry or, if all are smaller, to 1."""
    if right.size == 0:
        return 0.0
    largest = float(_distance(found, right).max()) / max(float(abs(right).max()), 1.0)
    return math.inf if math.isnan(largest) else largest


def _distance(found: Array, right: Array) -> Array:
    with np.errstate(all="ignore"):
        distance: Array = abs(found - right.astype(np.result_type(right, np.float64)))
    return distance


def candidates(
    reference: Function,
    points: Sequence[Mapping[str, Any]],
    names: tuple[str | None, ...],
    mistakes: Mapping[str, Function],
) -> Iterator[Candidate]:
    """Compute with every mistake of the catalogue, and some more; arguments as above."""
    for text, function in mistakes.items():
        outputs = [_computed(functools.partial(function, **each), names) for each in points]
        yield Candidate(text, text, outputs, 0)
    # Faults take the arguments as marref passes them: by position, where that can be.
    bound = [inspect.signature(reference).bind(**point) for point in points]
    calls = [functools.partial(reference, *each.args, **each.kwargs) for each in bound]
    for fault in itertools.chain(CATALOGUE.values(), CONTINUOUS.values()):
        with fault.applied():
            outputs = [_computed(call, names) for call in calls]
        said = f"{fault.name}. {fault.summary}"
        yield Candidate(fault.name, said, outputs, len(fault.patches))


def mistakes_in_shape(
    mistakes: Iterable[Candidate],
    given: Sequence[Arrays],
    expected: Sequence[Arrays],
) -> list[str]:
    """Say which mistakes compute exactly the outputs given, of which some have wrong shapes."""
    names = expected[0].keys()
    if not all(names <= arrays.keys() for arrays in given):
        return []
    return [each.said for each in mistakes if _fits(each.outputs, given, names, TOLERANCE)]


def _computed(call: Callable[[], Any], names: tuple[str | None, ...]) -> Arrays:
    # A mistake may fail on these arguments, in whatever way: then it computes nothing.
    with contextlib.suppress(Exception), np.errstate(all="ignore"):
        outputs = call()
        parts = outputs if isinstance(outputs, tuple) else (outputs,)
        return named(tuple(map(_pruned, parts)), names)
    return {}


def _pruned(part: Any) -> Any:
    """Leave out of a cache what is no array: what a fault keeps for its own backward."""
    if not isinstance(part, dict):
        return part
    return {
        name: _pruned(each)
        for name, each in part.items()
        if isinstance(each, dict | list | np.ndarray | np.generic)
    }


def _best(
    mistakes: Iterable[Candidate],
    given: Sequence[Arrays],
    wrong: list[str],
    right: set[str],
    tolerance: float,
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Choose the mistakes that compute the first wrong output and the most of the others.

    Of those that compute as many, those that leave the right outputs right come first, and then
    those that change the least: in a backward that is a mistake of the gradient, not one of the
    forward that changes the gradient too.  The others of the same numbers are not named.
    """
    best: dict[str, str] = {}
    rank: tuple[float, ...] = (0, False, -math.inf)
    outputs: tuple[str, ...] = (wrong[0],)
    for mistake in mistakes:
        computed = mistake.outputs
        if not _fits(computed, given, wrong[:1], tolerance):
            continue
        fitting = tuple(each for each in wrong if _fits(computed, given, [each], tolerance))
        leaves_right = _fits(computed, given, right, tolerance)
        rank_of = (len(fitting), leaves_right, -mistake.num_patches)
        if rank_of > rank:
            best, rank, outputs = {}, rank_of, fitting
        if rank_of == rank:
            best[mistake.name] = mistake.said
    return outputs, best


def _fits(
    arrays: Sequence[Arrays], given: Sequence[Arrays], names: Iterable[str], tolerance: float
) -> bool:
    return all(
        name in computed
        and computed[name].shape == found[name].shape
        and _same(computed[name], found[name], tolerance)
        for computed, found in zip(arrays, given, strict=True)
        for name in names
    )


def _same(array: Array, other: Array, tolerance: float) -> bool:
    finite = np.isfinite(array)
    same_there = bool((finite == np.isfinite(other)).all())
    return same_there and error(other[finite], array[finite]) <= tolerance


def _first_wrong(name: str, given: Arrays, expected: Arrays, tolerance: float) -> str:
    """Say where an output is wrong first."""
    found, right = np.asarray(given[name]), np.asarray(expected[name])
    off = ~(_distance(found, right) <= tolerance * max(float(abs(right).max()), 1.0))
    index = tuple(map(int, np.argwhere(off)[0]))
    count = "" if off.all() else f" in {int(off.sum())} of {off.size} entries"
    where = f", first at {list(index)}" if index else ""
    numbers = ", right is ".join(_apart(found[index], right[index]))
    return f"{name} is wrong{count}{where}: {numbers}."


def _relation(name: str, pairs: Sequence[tuple[Arrays, Arrays]], tolerance: float) -> str:
    """Say what an array is beside the right ones, where that is simple; else nothing.

    It is that of the first point at which it is wrong.  A single number is always so many times
    another: there all points at which it is wrong tell the factor.
    """
    found, expected = pairs[0][0][name], pairs[0][1]
    for other, array in expected.items():
        if other != name and array.shape == found.shape and error(found, array) <= tolerance:
            return f" It is the right {other}."
    right = expected[name]
    for axes in itertools.permutations(range(right.ndim)):
        moved = right.transpose(axes)
        if moved.shape == found.shape and error(found, moved) <= tolerance:
            return f" It is the right one with its axes in the order {list(axes)}."
    if right.size == 1:
        found, right = np.array([[each[name].item() for each in pair] for pair in pairs]).T
    if right.size > 1 and right.dtype.kind in "iufc" and np.isfinite(found).all() and right.any():
        factor = float((found * right).sum().real / (right * right).sum().real)
        if error(found, factor * right) <= tolerance:
            return f" It is {_apart(factor, 1.0)[0]} times the right one."
    return ""


def _apart(value: Any, other: Any) -> tuple[str, str]:
    """Write two numbers with as many digits as it takes to tell them apart, six at least."""
    if np.result_type(value, other).kind not in "fc":
        return str(value), str(other)
    texts = f"{value:.6g}", f"{other:.6g}"
    return texts if texts[0] != texts[1] else (f"{value:.17g}", f"{other:.17g}")


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
