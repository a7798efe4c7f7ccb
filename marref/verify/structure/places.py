"""Where an array differs: in which heads, positions, sequences, features or rows only."""

import math
from collections.abc import Iterator

import numpy as np

from marref.trees import Array
from marref.verify.structure import relations
from marref.verify.structure.evidence import Case, Finding, first

_CONTRAST = 5.0
"""What differs does so by so many times more than what does not."""


def not_finite(case: Case) -> Finding | None:
    """Say where yours is NaN or infinite, and whether the rest is right."""
    wrong = ~np.isfinite(case.yours)
    if not wrong.any():
        return None
    kinds = [
        kind
        for kind, has in (("NaN", np.isnan(case.yours)), ("infinite", np.isinf(case.yours)))
        if has.any()
    ]
    rest = np.abs(case.yours[~wrong] - case.golden[~wrong])
    agree = "; the others agree" if rest.size and (rest <= case.budget).all() else ""
    if wrong.all():
        return Finding(f"is {' or '.join(kinds)} in every entry")
    place = _described(case, wrong)
    count = f"{wrong.sum()} of {wrong.size} entries"
    return Finding(f"is {' or '.join(kinds)} in {count}{place and f', all {place}'}{agree}")


def parts(case: Case) -> Finding | None:
    """Say where yours differs and, if it can be told, what it is there."""
    wrong = _distinct(case)
    if wrong is None:
        return None
    if wrong.sum() == 1:
        return _single(case, wrong)
    place, region = _region(case, wrong)
    if region is None:
        return None
    there = first(relations.OF_A_PART, case.part(region))
    moved = _moved(case, region) if there is None else None
    if there is not None:
        return Finding(f"differs only {place}; there it {there.clause}", there.residual)
    return moved or Finding(f"differs only {place}; everything else agrees")


def _distinct(case: Case) -> Array | None:
    """Mark what differs, if that stands out."""
    distance = np.abs(case.yours - case.golden)
    wrong = distance > case.budget
    if not wrong.any() or wrong.all():
        return None
    # Of a slice that differs some entries may agree by chance: slices are told apart, not entries.
    return np.asarray(wrong)


def _single(case: Case, wrong: Array) -> Finding | None:
    distance = np.sort(np.abs(case.yours - case.golden), axis=None)
    if distance[-1] < _CONTRAST * max(distance[-2], case.budget):
        return None
    index = [int(i) for i in np.argwhere(wrong)[0]]
    return Finding(
        f"differs in one entry only, {index}: {case.yours[tuple(index)]:.4g} "
        f"where {case.golden[tuple(index)]:.4g} is expected"
    )


def _region(case: Case, wrong: Array) -> tuple[str, Array | None]:
    """Describe where it differs, and mark the whole of that."""
    for place, region in _regions(case):
        if _is_region(case, region):
            return place, region
    region = np.ones(wrong.shape, bool)
    places = []
    for axis, word in enumerate(relations.axes(case)):
        chosen = _slices(case, axis)
        if chosen is None:
            continue
        shape = [1] * wrong.ndim
        shape[axis] = -1
        region &= np.isin(np.arange(wrong.shape[axis]), chosen).reshape(shape)
        places.append(f"in {_numbered(word, chosen, wrong.shape[axis])}")
    return (" ".join(places), region) if places and _is_region(case, region) else ("", None)


def _is_region(case: Case, region: Array) -> bool:
    """Whether all that differs is in a region, and stands out from what is not."""
    distance = np.abs(case.yours - case.golden)
    if not region.any() or region.all():
        return False
    outside, inside = distance[~region].max(), distance[region].max()
    # Every slice of a region must differ, or the region would be too large a word.
    return bool(outside <= case.budget and inside > _CONTRAST * max(outside, case.budget))


def _slices(case: Case, axis: int) -> list[int] | None:
    """Return which slices along an axis differ, if some clearly do and the others do not."""
    distance = np.moveaxis(np.abs(case.yours - case.golden), axis, 0)
    largest = distance.reshape(len(distance), -1).max(axis=1)
    wrong = largest > case.budget
    if wrong.all() or not wrong.any():
        return None
    if largest[wrong].min() < _CONTRAST * largest[~wrong].max():
        return None
    return [int(index) for index in np.flatnonzero(wrong)]


def _numbered(word: str, chosen: list[int], count: int) -> str:
    if len(chosen) == 1:
        last = " (the last)" if chosen[0] == count - 1 and count > 2 else ""
        mask = " ([MASK])" if word == "id" and chosen[0] == 0 else ""
        return f"{word} {chosen[0]}{last}{mask}"
    first, last_one = chosen[0], chosen[-1]
    if len(chosen) > 2 and last_one - first + 1 == len(chosen):
        return f"{word}s {first} to {last_one} of {count}"
    shown = ", ".join(map(str, chosen[:6])) + (", …" if len(chosen) > 6 else "")
    return f"{word}s {shown} of {count}"


def _regions(case: Case) -> Iterator[tuple[str, Array]]:
    """Name the regions that have a meaning: those where every slice differs, and no other."""
    shape = case.golden.shape
    distance = np.abs(case.yours - case.golden)
    words = relations.axes(case)
    if words[:1] == ("sequence",):
        axis = 2 if len(shape) == 4 else 1
        across = tuple(i for i in range(len(shape)) if i not in (0, axis))
        found = distance.max(axis=across) > case.budget
        for name, chosen in _positions(case, axis == 2 and words[2] == "query"):
            if (found == chosen).all():
                widened = np.expand_dims(chosen, across)
                yield f"{name}", np.broadcast_to(widened, shape)
    if words == ("sequence", "head", "query", "key"):
        keys = distance.max(axis=(1, 2)) > case.budget
        masked = case.vectors.batch["tokens"] == 0
        if (keys == masked).all():
            yield "at keys that are [MASK]", np.broadcast_to(masked[:, None, None, :], shape)
        upper = np.triu(np.ones(shape[-2:], bool), 1)
        for name, half in (
            ("where the key comes after the query", upper),
            ("where the key comes before the query", upper.T),
            ("on the diagonal", np.eye(shape[-1], dtype=bool)),
            ("off the diagonal", ~np.eye(shape[-1], dtype=bool)),
        ):
            if ((distance.max(axis=(0, 1)) > case.budget) == half).all():
                yield name, np.broadcast_to(half, shape)
    if words[0] == "id" and len(shape) == 2:
        found = distance.max(axis=1) > case.budget
        for name, chosen in _ids(case):
            if (found == chosen).all():
                yield name, np.broadcast_to(chosen[:, None], shape)


def _positions(case: Case, queries: bool) -> Iterator[tuple[str, Array]]:
    """Name sets of positions, [batch, length]."""
    tokens, mask = case.vectors.batch["tokens"], case.vectors.batch["mask"] == 1
    index = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    word = "queries" if queries else "positions"
    counts = (tokens[:, :, None] == tokens[:, None, :]).sum(axis=2)
    empty = np.broadcast_to(~mask.any(axis=1, keepdims=True), mask.shape)
    yield f"at masked {word}", mask
    yield f"at {word} that are not masked", ~mask
    yield f"at {word} 0", index == 0
    yield f"at {word} other than 0", index > 0
    yield f"at the last of the {word}", index == tokens.shape[1] - 1
    yield f"at all but the last of the {word}", index < tokens.shape[1] - 1
    yield f"at {word} whose token occurs more than once in the sequence", counts > 1
    yield f"at {word} whose token occurs once in the sequence", counts == 1
    yield "in sequences without a masked position", empty
    yield "in sequences with a masked position", ~empty


def _ids(case: Case) -> Iterator[tuple[str, Array]]:
    """Name sets of ids."""
    tokens, targets = case.vectors.batch["tokens"], case.vectors.batch["targets"]
    ids = np.arange(case.vectors.model.vocab_size)
    counts = np.bincount(tokens.ravel(), minlength=len(ids))
    yield "in row 0, that of [MASK]", ids == 0
    yield "in all rows but row 0, that of [MASK]", ids > 0
    yield "in rows of tokens that occur in the batch", counts > 0
    yield "in rows of tokens that occur more than once in the batch", counts > 1
    yield "in rows of tokens that occur once in the batch", counts == 1
    yield "in rows of tokens that do not occur in the batch", counts == 0
    yield "in rows of ids that are targets", np.isin(ids, targets)


def _moved(case: Case, region: Array) -> Finding | None:
    """Say that a part of yours is another part of the golden array."""
    for axis, word in enumerate(relations.axes(case)):
        chosen = _slices(case, axis)
        count = case.golden.shape[axis]
        if chosen is None or len(chosen) > 1 or case.golden.size == count:
            continue
        yours = np.take(case.yours, chosen[0], axis=axis)
        for other in range(count):
            golden = np.take(case.golden, other, axis=axis)
            tolerance = case.tolerance(case.golden)
            distance = float(np.abs(yours - golden).max())
            if distance <= tolerance and case.proves(distance, tried=count):
                return Finding(
                    f"differs only in {word} {chosen[0]}, which is golden {word} {other}",
                    distance / case.budget,
                )
    return None


def _described(case: Case, wrong: Array) -> str:
    """Say in which slices marked entries are."""
    for axis, word in enumerate(relations.axes(case)):
        across = tuple(i for i in range(wrong.ndim) if i != axis)
        chosen = np.asarray(wrong.any(axis=across))
        if not chosen.all():
            found = [int(index) for index in np.flatnonzero(chosen)]
            return f"in {_numbered(word, found, len(chosen))}"
    return ""


def jump(case: Case) -> Finding | None:
    """Say whether differences jump at an array, or grow towards it as rounding does."""
    before = []
    for row in case.comparison.rows:
        if row.name == case.name:
            break
        if row.name.split("/")[0] == case.name.split("/")[0] and 0.0 < row.budget < math.inf:
            before.append((row.difference / row.budget, row.name))
    own = next(row for row in case.comparison.rows if row.name == case.name)
    if len(before) < 3 or own.budget == 0.0:
        return None
    largest, name = max(before)
    here = own.difference / own.budget
    if here > 30.0 * max(largest, 0.1):
        return Finding(
            f"is off by {here:.3g} budgets, the {len(before)} arrays before it by {largest:.2g} at "
            "most: a jump, as a mistake makes it"
        )
    if largest > 0.3 and here < 5.0 and _rises([ratio for ratio, _ in before]):
        return Finding(
            f"is off by {here:.2g} budgets, after {name} with {largest:.2g}: differences grow "
            "along the network, as those of a coarser precision do"
        )
    return None


def _rises(ratios: list[float]) -> bool:
    """Whether the second half of the differences is larger than the first, without a jump."""
    half = len(ratios) // 2
    return half >= 3 and float(np.median(ratios[half:])) > float(np.median(ratios[:half])) > 0.05
