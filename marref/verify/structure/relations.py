"""What an array is to the golden one, whatever it stands for: times, plus, permuted, another."""

import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np

from marref.trees import Array
from marref.verify import measure
from marref.verify.structure import evidence
from marref.verify.structure.evidence import Case, Finding, Hint, named, number

_MOST_SLICES = 512


def zero(case: Case) -> Finding | None:
    """Yours is 0."""
    return case.fitting([("is 0", np.zeros_like(case.golden))])


def factor(case: Case) -> Finding | None:
    """Yours is a number times the golden array."""
    size = float((case.golden * case.golden).sum())
    if size == 0.0:
        return None
    value = float((case.golden * case.yours).sum()) / size
    residual = case.residual(value * case.golden, fitted=1)
    if residual is None:
        return None
    uncertainty = case.tolerance(value * case.golden) / measure.largest(case.golden)
    return Finding(f"is the golden array times {named(case, value, uncertainty)}", residual)


def offset(case: Case) -> Finding | None:
    """Yours is the golden array plus a number."""
    value = float((case.yours - case.golden).mean())
    residual = case.residual(case.golden + value, fitted=1)
    if residual is None:
        return None
    return Finding(f"is the golden array plus {number(value)} in every entry", residual)


def dropped(case: Case) -> Finding | None:
    """Yours is 0 in some entries and the golden array times 1/(1 - p) in the others."""
    kept = np.abs(case.yours) > case.budget
    weight = float((case.golden[kept] ** 2).sum())
    if kept.all() or weight == 0.0:
        return None
    value = float((case.golden[kept] * case.yours[kept]).sum()) / weight
    # Which entries are kept is one bit each.
    residual = case.residual(np.where(kept, value * case.golden, 0.0), fitted=1)
    bits = evidence.bits(case.yours, case.golden, case.budget, case.budget).sum()
    if residual is None or bits < kept.size + evidence.BITS:
        return None
    count, rate = int((~kept).sum()), 1.0 - 1.0 / value if value > 1.0 else 0.0
    if rate < 0.01:
        return None
    return Finding(
        f"is 0 in {count} of {kept.size} entries and the golden array times {number(value)} in "
        f"the others, as dropout with p = {rate:.2g} makes it",
        residual,
    )


def another(case: Case) -> Finding | None:
    """Yours is another golden array, or its negative."""
    candidates = [(f"is golden {name}", array) for name, array in case.others.items()]
    candidates += [(f"is minus golden {name}", -array) for name, array in case.others.items()]
    return case.fitting(candidates)


def addend(case: Case) -> Finding | None:
    """Yours lacks something that is added up in the golden array, or has more of it."""
    tried = 2 * (len(case.addends) + len(case.others))
    known = {**case.addends, **{f"golden {name}": array for name, array in case.others.items()}}
    candidates = [
        (f"is the golden array {word} {name}", case.golden + sign * array)
        for name, array in known.items()
        for word, sign in (("less", -1), ("plus", 1))
    ]
    found = case.fitting(candidates, tried)
    if found is not None:
        return found
    difference = case.yours - case.golden
    for name, array in known.items():
        size = float((array * array).sum())
        value = float((array * difference).sum()) / size if size > 0.0 else 0.0
        residual = case.residual(case.golden + value * array, fitted=1, tried=tried)
        if residual is not None:
            word = "plus" if value > 0.0 else "less"
            return Finding(
                f"is the golden array {word} {number(abs(value))} times {name}", residual
            )
    return None


# What needs axes.


def by_axis(case: Case) -> Finding | None:
    """Yours is the golden array times, or plus, a number for each head, position, feature, …."""
    return _by(case, itertools.combinations(range(case.golden.ndim), 1))


def by_axes(case: Case) -> Finding | None:
    """Yours is that times, or plus, a number for each head and position, …."""
    counts = range(2, case.golden.ndim)
    return _by(
        case, (axes for n in counts for axes in itertools.combinations(range(case.golden.ndim), n))
    )


def _by(case: Case, choices: Iterable[tuple[int, ...]]) -> Finding | None:
    difference = case.yours - case.golden
    for kept in choices:
        fitted = math.prod(case.golden.shape[axis] for axis in kept)
        if fitted * 3 > case.golden.size:
            continue
        summed = tuple(axis for axis in range(case.golden.ndim) if axis not in kept)
        words = " and ".join(axes(case)[axis] for axis in kept)
        size = (case.golden**2).sum(axis=summed, keepdims=True)
        value = (case.golden * case.yours).sum(axis=summed, keepdims=True)
        value = value / np.where(size > 0.0, size, 1.0)
        residual = case.residual(value * case.golden, fitted=fitted)
        if residual is not None:
            shown = _listed(value.ravel())
            return Finding(f"is the golden array times a number for each {words}{shown}", residual)
        value = difference.mean(axis=summed, keepdims=True)
        residual = case.residual(case.golden + value, fitted=fitted)
        if residual is not None:
            shown = _listed(value.ravel())
            return Finding(f"is the golden array plus a number for each {words}{shown}", residual)
    return None


def _listed(values: Array) -> str:
    return ": " + ", ".join(map(number, values)) if values.size <= 8 else ""


def rearranged(case: Case) -> Finding | None:
    """Yours is the golden array with its axes transposed, or read in another order."""
    return case.fitting(_rearrangements(case))


def _rearrangements(case: Case) -> Iterator[tuple[str, Array]]:
    golden, words = case.golden, axes(case)
    for order in itertools.permutations(range(golden.ndim)):
        if order == tuple(range(golden.ndim)):
            continue
        moved = golden.transpose(order)
        shown = ", ".join(words[axis] for axis in order)
        if moved.shape == golden.shape:
            yield f"is the golden array with axes in the order [{shown}]", moved
            continue
        yield (
            f"is the golden array written in the order [{shown}] and read as [{', '.join(words)}]",
            moved.reshape(golden.shape),
        )
        inverse = np.argsort(order)
        yield (
            f"is the golden array read as [{shown}], and its axes then moved",
            golden.reshape(moved.shape).transpose(inverse),
        )


def permuted(case: Case) -> Finding | None:
    """Yours has the golden slices along an axis, in another order or some in place of others."""
    for axis, word in enumerate(axes(case)):
        count = case.golden.shape[axis]
        if not 2 <= count <= _MOST_SLICES or case.golden.size < 2 * count:
            continue
        source = _sources(case, axis)
        if source is None:
            continue
        residual = case.residual(np.take(case.golden, source, axis=axis))
        orders = 2 ** math.ceil(count * math.log2(count))
        if residual is None or not case.proves(residual * case.budget, tried=orders):
            continue
        return Finding(_said_of(source, word, case), residual)
    return None


def _sources(case: Case, axis: int) -> Array | None:
    """For each slice of yours along an axis, find the golden slice that it is, if all are one."""
    yours = np.moveaxis(case.yours, axis, 0).reshape(case.yours.shape[axis], -1)
    golden = np.moveaxis(case.golden, axis, 0).reshape(yours.shape)
    tolerance = case.tolerance(case.golden)
    source = np.arange(len(yours))
    for index, slice_ in enumerate(yours):
        distances = np.abs(golden - slice_).max(axis=1)
        if not distances[index] <= tolerance:
            source[index] = int(distances.argmin())
        if not distances[source[index]] <= tolerance:
            return None
    return source


def _said_of(source: Array, word: str, case: Case) -> str:
    count = len(source)
    order = np.arange(count)
    heads = case.vectors.model.num_heads
    if sorted(source) != order.tolist():
        shown = [f"{to} is golden {of}" for to, of in enumerate(source) if to != of]
        more = ", …" if len(shown) > 4 else ""
        return f"has golden {word}s in place of others: {word} {', '.join(shown[:4])}{more}"
    if (source == order[::-1]).all():
        return f"is the golden array with its {word}s reversed"
    if (source == (source[0] + order) % count).all():
        other = f"{word} 0 of yours is golden {word} {source[0]}"
        return f"is the golden array with its {word}s rolled ({other})"
    for groups, name in ((heads, "heads"), (2, "halves")):
        if groups > 1 and count % groups == 0:
            blocks = order.reshape(groups, -1)
            if (source == blocks.T.ravel()).all():
                return f"is the golden array with its {word}s interleaved, {name} innermost"
            if (source == order.reshape(-1, groups).T.ravel()).all():
                return (
                    f"is the golden array with its {word}s taken apart as if {name} were innermost"
                )
            starts = source.reshape(groups, -1)[:, 0] // (count // groups)
            if (source == blocks[starts].ravel()).all():
                listed = ", ".join(map(str, starts))
                return f"is the golden array with the {name} of its {word}s in the order {listed}"
    listed = ", ".join(map(str, source)) if count <= 12 else f"{source[0]}, {source[1]}, …"
    return f"is the golden array with its {word}s permuted: yours are golden {listed}"


def same_numbers(case: Case) -> Finding | None:
    """Yours holds the golden numbers in another order."""
    yours, golden = np.sort(case.yours, axis=None), np.sort(case.golden, axis=None)
    tolerance = case.tolerance(golden)
    gaps = np.diff(golden) > 4.0 * tolerance
    if yours.size < 12 or gaps.sum() < 0.9 * gaps.size:
        return None
    distance = measure.difference(yours, golden)
    if distance > tolerance or not case.proves(distance):
        return None
    return Finding("holds the golden numbers in another order", distance / case.budget)


SIMPLE: tuple[Hint, ...] = (zero, factor)
"""What is said before it is asked what a layer would make."""

RELATIONS: tuple[Hint, ...] = (
    offset,
    another,
    rearranged,
    permuted,
    addend,
    dropped,
    by_axis,
    same_numbers,
)
"""What an array may be to the golden one, most telling first."""

OF_A_PART: tuple[Hint, ...] = (zero, factor, offset, another, addend)
"""What needs no axes."""


def axes(case: Case) -> tuple[str, ...]:
    """Name the axes of an array."""
    name, count = case.name, case.golden.ndim
    if case.vectors.is_continuous:
        return _axes_of_continuous(name, count)
    if name.startswith(("activations/", "activation_gradients/")):
        if count == 4:
            last = ("query", "key") if name.endswith("weights") else ("position", "feature")
            return ("sequence", "head", *last)
        if count == 2:
            return ("sequence", "feature")
        return ("sequence", "position", "id" if name.endswith("logits") else "feature")
    feature = "id" if "head." in name else "feature"
    if name.endswith("table"):
        return ("class" if "class_embedding" in name else "id", "feature")
    return ("input", feature)[2 - count :]


def _axes_of_continuous(name: str, count: int) -> tuple[str, ...]:
    section = name.split("/")[0]
    if name.endswith("/images"):
        return ("image", "channel", "row", "column")
    if section == "sampling":
        of_row = ("row",) if name.endswith("chain") else ("image", "token")
        return ("step", *of_row, "feature")[:count] if "/steps/" in name else (*of_row, "feature")
    if section in ("activations", "activation_gradients"):
        if count == 4:
            last = ("query", "key") if name.endswith("weights") else ("place", "feature")
            return ("image", "head", *last)
        return ("row", "feature") if count == 2 else ("image", "place", "feature")
    if section in ("loss", "noise_schedule", "masking"):
        return ("row" if section == "loss" else "entry", "token")[:count]
    return ("row" if name.endswith("table") else "input", "feature")[2 - count :]
