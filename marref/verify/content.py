"""Matching by content: which of your arrays hold which of marref's parameters.

Whoever loaded parameters into a model of their own can save them again, and random numbers are
their own name.  Two arrays hold the same numbers, in whatever order, if the sums of a hash of
their entries are equal; and the sums over the slices of an array, along a grid

    [lead, before, count, after] -> [lead, count]

tell what it was fused from: query, key and value side by side (count 3, before 1 or embed_dim),
interleaved by head (before num_heads), stacked over the blocks (lead num_layers).  The same sums
over slices of marref's arrays tell what was split.  Then the order of the axes is found by trying,
and the steps that undo it; a match is one only if they give marref's arrays exactly.

Constant arrays (biases that are all 0) have no content to be told by; they are matched by what
lies beside them under the same name, or not at all.
"""

import dataclasses
import functools
import itertools
import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from marref.interop import maps
from marref.interop.maps import Entry, Step
from marref.trees import Array
from marref.verify.rounding import round_to

_KIND = re.compile(r"(?<![a-z])(weights?|w|kernel|scale|gamma|bias|b|beta)_?(?=(:0)?$|[^./]*$)")
_HEADS_LAST = ("query.kernel", "key.kernel", "value.kernel", "query.bias", "key.bias", "value.bias")


@dataclasses.dataclass(frozen=True)
class _Grid:
    """How an array of yours is cut: [lead, before, count, after] -> lead * count pieces."""

    lead: int
    before: int
    count: int


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A part of one of marref's parameters: the index-th of so many along an axis."""

    name: str
    parts: int = 1
    axis: int = 0
    index: int = 0


_Index: TypeAlias = dict[int, dict[int, list[_Piece]]]
"""Pieces by size and hash."""


@dataclasses.dataclass(frozen=True)
class _Found:
    """One of your arrays, and what its pieces are."""

    name: str
    grid: _Grid
    pieces: tuple[_Piece, ...]


def match(
    ours: Mapping[str, Array], yours: Mapping[str, Array], num_heads: int
) -> tuple[list[Entry], list[str]]:
    """Find which of your arrays hold which of marref's, and how.

    Parameters
    ----------
    ours : dict of str to array
        marref's parameters by dotted names.
    yours : dict of str to array
        The same numbers, each rounded to the precision of the array that holds it, under your own
        names, transposed, reshaped, fused, split, stacked over blocks, or some of them left out.
    num_heads : int

    Returns
    -------
    entries : list of Entry
        In marref's order.  An array that is two of marref's (tied) has two entries.
    unmatched : list of str
        Names of yours.
    """
    matcher = _Matcher(ours, yours, num_heads)
    matcher.match_whole()
    matcher.match_parts()
    matcher.match_tied()
    matcher.match_constants()
    order = {name: place for place, name in enumerate(ours)}
    entries = sorted(matcher.entries, key=lambda entry: order[entry.ours[0]])
    used = {name for entry in entries for name in entry.yours}
    return entries, [name for name in yours if name not in used]


class _Matcher:
    """Entries found so far, and what is left."""

    def __init__(
        self, ours: Mapping[str, Array], yours: Mapping[str, Array], num_heads: int
    ) -> None:
        self.num_heads = num_heads
        self.all_ours = dict(ours)
        self.all_yours = {name: a for name, a in yours.items() if a.dtype.kind == "f" and a.size}
        self.left_ours = {name for name, a in self.all_ours.items() if not is_constant(a)}
        self.left_yours = [name for name, a in self.all_yours.items() if not is_constant(a)]
        self.entries: list[Entry] = []
        self.rounded = functools.cache(self._rounded)
        self.whole = functools.cache(lambda precision: _by_hash(self.rounded(precision), 1))

    def match_whole(self) -> None:
        """Match arrays that hold one or several whole parameters."""
        for name in list(self.left_yours):
            self._settle_first(name, len(self.all_ours))

    def match_tied(self) -> None:
        """Match what is left of the parameters to arrays that have been matched already."""
        for name, array in self.all_yours.items():
            if self.left_ours and name not in self.left_yours and not is_constant(array):
                self._settle_first(name, 1)

    def match_parts(self) -> None:
        """Match several arrays that hold one or several parameters together."""
        families: dict[tuple[Any, ...], dict[int, _Found]] = {}
        index = functools.cache(self._index_of_parts)
        for name in self.left_yours:
            for precision in _precisions(self.all_yours[name]):
                for found in self._cuts(name, index(precision)):
                    kinds = {(piece.parts, piece.axis, piece.index) for piece in found.pieces}
                    parts, axis, place = kinds.pop()
                    if not kinds and parts > 1:
                        names = tuple(piece.name for piece in found.pieces)
                        kind = (precision, names, found.grid, parts, axis)
                        families.setdefault(kind, {})[place] = found
        for (precision, _, _, parts, _), family in families.items():
            if len(family) == parts:
                self._settle([family[place] for place in range(parts)], precision)

    def match_constants(self) -> None:
        """Match constant biases and scales by what has been matched beside them."""
        left = {name: a for name, a in self.all_ours.items() if is_constant(a)}
        for name, array in self.all_yours.items():
            for beside in self.entries if is_constant(array) else ():
                wanted = tuple(_sibling(other) for other in beside.ours)
                same_layer = [_stem(other) for other in beside.yours] == [_stem(name)]
                if same_layer and left.keys() >= set(wanted):
                    values = np.concatenate([left[other] for other in wanted])
                    steps = self._steps_of_constant(name, wanted, beside)
                    if steps is not None and (values == array.flat[0]).all():
                        self.entries.append(Entry((name,), wanted, steps))
                        left = {other: a for other, a in left.items() if other not in wanted}
                        break

    def _settle_first(self, name: str, most_pieces: int) -> None:
        """Keep the first match of an array alone."""
        for precision in _precisions(self.all_yours[name]):
            for found in self._cuts(name, self.whole(precision)):
                if len(found.pieces) <= most_pieces and self._settle([found], precision):
                    return

    def _index_of_parts(self, precision: str) -> _Index:
        left = {name: self.rounded(precision)[name] for name in self.left_ours}
        return _by_hash(left, len(self.left_yours))

    def _rounded(self, precision: str) -> dict[str, Array]:
        if precision == "bfloat16":
            return {name: round_to(array, precision) for name, array in self.all_ours.items()}
        with np.errstate(over="ignore"):
            return {name: array.astype(precision) for name, array in self.all_ours.items()}

    def _steps_of_constant(
        self, name: str, wanted: tuple[str, ...], beside: Entry
    ) -> tuple[Step, ...] | None:
        """Lay a constant bias out as the outputs of the kernel beside it are, if they say it."""
        array, neighbour = self.all_yours[name], self.all_yours[beside.yours[0]]
        shape = self.all_ours[wanted[0]].shape
        if array.size != len(wanted) * math.prod(shape):
            return None
        if array.shape == neighbour.shape:
            return beside.steps
        labels = np.arange(array.size)
        expected = {wanted[0]: labels} if len(wanted) == 1 else {}
        for axis in range(neighbour.ndim):
            without = (*neighbour.shape[:axis], 1, *neighbour.shape[axis + 1 :])
            if math.prod(without) == array.size:
                spread = np.broadcast_to(labels.reshape(without), neighbour.shape)
                kernels = list(maps.lay_out(beside, [spread]).values())
                if all((kernel == kernel[:1]).all() for kernel in kernels):
                    expected = {n: k[0] for n, k in zip(wanted, kernels, strict=True)}
        pieces = tuple(_Piece(other) for other in wanted)
        for grid in self._grids(array, math.prod(shape)) if expected else ():
            for steps in self._steps([_Found(name, grid, pieces)]):
                if _gives(Entry((name,), wanted, steps), [labels.reshape(array.shape)], expected):
                    return steps
        return None

    def _cuts(self, name: str, index: _Index) -> Iterator[_Found]:
        """Yield the grids by which an array falls into known pieces, the simplest first."""
        array = self.all_yours[name]
        mixed = _mixed(array).reshape(-1)
        grids = {grid for size in index for grid in self._grids(array, size)}
        for grid in sorted(grids, key=lambda grid: (grid.lead * grid.count, grid.before)):
            sums = mixed.reshape(grid.lead, grid.before, grid.count, -1).sum(axis=(1, 3))
            pieces = index[array.size // sums.size]
            known = [
                [piece for piece in pieces.get(int(value), ()) if piece.name in self.left_ours]
                for value in sums.reshape(-1)
            ]
            if all(known):
                yield _Found(name, grid, _choose(name, known))

    def _grids(self, array: Array, size: int) -> Iterator[_Grid]:
        """Propose ways to cut an array into pieces of a size."""
        for lead in dict.fromkeys((1, array.shape[0] if array.ndim > 1 else 1)):
            count, rest = divmod(array.size, lead * size)
            if rest or count == 0 or lead * count > len(self.all_ours):
                continue
            reached = 1
            for length in array.shape if lead == 1 else array.shape[1:]:
                for step in (1, self.num_heads, length // count, length // self.num_heads // count):
                    if step and length % (step * count) == 0:
                        yield _Grid(lead, reached * step, count)
                reached *= length
            if count == 1:
                yield _Grid(lead, 1, 1)

    def _settle(self, found: Sequence[_Found], precision: str) -> bool:
        """Keep a match if there are steps that give marref's arrays exactly."""
        names = tuple(piece.name for piece in found[0].pieces)
        if len(set(names)) < len(names) or not self.left_ours.issuperset(names):
            return False
        arrays = [self.all_yours[one.name] for one in found]
        expected = {name: self.rounded(precision)[name] for name in names}
        for steps in self._steps(found):
            entry = Entry(tuple(one.name for one in found), names, steps)
            if _gives(entry, arrays, expected):
                self.entries.append(entry)
                self.left_ours.difference_update(names)
                self.left_yours = [name for name in self.left_yours if name not in entry.yours]
                return True
        return False

    def _steps(self, found: Sequence[_Found]) -> Iterator[tuple[Step, ...]]:
        """Propose steps from yours to marref's arrays, the simplest first."""
        first = found[0]
        array, piece = self.all_yours[first.name], first.pieces[0]
        shape = self.all_ours[piece.name].shape
        yield from _simple_steps(array, len(found), len(first.pieces), shape)
        axes = self._fine_axes(piece)
        for order in itertools.permutations(range(len(axes))):
            lengths = [axes[axis] for axis in order]
            reached = [1, *itertools.accumulate(lengths, operator.mul)]
            if first.grid.before in reached:
                place = reached.index(first.grid.before)
                steps = _general_steps(first, len(found), shape, axes, order, place)
                yield steps[1:] if steps[:1] == (("reshape", array.shape),) else steps

    def _fine_axes(self, piece: _Piece) -> tuple[int, ...]:
        """Return the axes of a piece, with heads and head_dim apart."""
        shape = list(self.all_ours[piece.name].shape)
        shape[piece.axis] //= piece.parts
        if ".attention." not in piece.name or piece.name.endswith("output.bias"):
            return tuple(shape)
        split = len(shape) - 1 if piece.name.endswith(_HEADS_LAST) else 0
        if piece.parts > 1 and piece.axis == split:
            return tuple(shape)
        heads = (self.num_heads, shape[split] // self.num_heads)
        return (*shape[:split], *heads, *shape[split + 1 :])


def _simple_steps(
    array: Array, num_yours: int, num_ours: int, shape: tuple[int, ...]
) -> Iterator[tuple[Step, ...]]:
    """Propose the layouts that most models have, in steps that are easily read."""
    transpose: Step = ("transpose", True)
    reshape: Step = ("reshape", shape)
    if num_yours == num_ours == 1:
        yield from ((), (transpose,), (reshape,), (transpose, reshape))
    elif num_yours == 1:
        for axis in range(array.ndim):
            if array.shape[axis] % num_ours == 0:
                split: Step = ("split", axis)
                yield from ((split,), (split, transpose), (split, reshape))
                yield (split, ("reshape", shape[::-1]), transpose)
    elif num_ours == 1:
        for axis in range(array.ndim):
            join: Step = ("concatenate", axis)
            yield from ((join,), (join, transpose), (join, reshape))


def _general_steps(
    found: _Found,
    num_yours: int,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    order: tuple[int, ...],
    place: int,
) -> tuple[Step, ...]:
    """Reshape to the finest grid, transpose it, join the pieces of several, split, reshape.

    The axes of a piece are in your order in the grid, its count stands before the one at a place.
    """
    piece, grid = found.pieces[0], found.grid
    lengths = {"lead": grid.lead, "count": grid.count, **{str(i): n for i, n in enumerate(axes)}}
    yours = ["lead", *map(str, order[:place]), "count", *map(str, order[place:])]
    yours = [name for name in yours if name.isdecimal() or lengths[name] > 1]
    turned = tuple(yours.index(name) for name in lengths if name in yours)
    fine = tuple(lengths[name] for name in yours)
    num_pieces = len(found.pieces)
    steps: list[Step] = [("reshape", fine), ("transpose", turned)]
    if num_yours > 1:
        before = math.prod(shape[: piece.axis])
        steps += [("reshape", (num_pieces, before, -1)), ("concatenate", 2)]
    elif num_pieces > 1:
        steps += [("reshape", (num_pieces, *shape))]
    if num_pieces > 1:
        steps += [("split", 0)]
    return _without_idle([*steps, ("reshape", shape)])


def _without_idle(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Leave out what does nothing, and all but the last of reshapes that follow each other."""
    kept: list[Step] = []
    for name, argument in steps:
        if name == "transpose" and argument == tuple(range(len(argument))):
            continue
        if name == "reshape" and kept and kept[-1][0] == "reshape":
            kept.pop()
        kept.append((name, argument))
    return tuple(kept)


def _gives(entry: Entry, arrays: Sequence[Array], expected: Mapping[str, Array]) -> bool:
    try:
        made = maps.lay_out(entry, arrays)
    except ValueError:
        return False
    return all(np.array_equal(made[name], array) for name, array in expected.items())


def _choose(name: str, known: Sequence[Sequence[_Piece]]) -> tuple[_Piece, ...]:
    """Among parameters that hold the same numbers, take those whose names are most alike."""
    chosen: list[_Piece] = []
    for candidates in known:
        free = [piece for piece in candidates if piece not in chosen] or list(candidates)
        chosen.append(max(free, key=lambda piece: _likeness(name, piece.name)))
    return tuple(chosen)


def _likeness(yours: str, ours: str) -> int:
    words = set(re.split("[./_]", yours))
    return sum(word in words for word in re.split("[._]", ours))


def _by_hash(ours: Mapping[str, Array], most: int) -> _Index:
    """Index parameters, and their parts up to a number."""
    index: _Index = {}
    for name, array in ours.items():
        mixed = _mixed(array)
        for axis, length in enumerate(array.shape):
            for parts in [n for n in range(1, most + 1) if length % n == 0]:
                if (parts == 1 and axis > 0) or array.size == parts:
                    continue
                before = math.prod(array.shape[:axis])
                sums = mixed.reshape(before, parts, -1).sum(axis=(0, 2))
                pieces = index.setdefault(array.size // parts, {})
                for place, value in enumerate(sums):
                    pieces.setdefault(int(value), []).append(_Piece(name, parts, axis, place))
    return index


def _mixed(array: Array) -> npt.NDArray[np.uint64]:
    """Hash every entry (the finaliser of splitmix64), so that sums tell multisets apart."""
    bits = (np.ascontiguousarray(array, np.float64) + 0.0).view(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(31))


def _precisions(array: Array) -> list[str]:
    """In which precisions an array may hold rounded parameters: its own, and its numbers'."""
    narrower = [one for one in ("float32", "bfloat16") if _holds(array, one)]
    return list(dict.fromkeys([array.dtype.name, *narrower]))


def _holds(array: Array, precision: str) -> bool:
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float32)
    narrow = round_to(narrow, precision) if precision == "bfloat16" else narrow
    return np.array_equal(narrow.astype(array.dtype), array)


def is_constant(array: Array) -> bool:
    """Whether all entries are equal, so that there is nothing to be told by."""
    return bool((array == array.flat[0]).all()) if array.size else True


def _stem(name: str) -> str:
    """Return a name without the word for what it is of its layer."""
    return _KIND.sub("", name)


def _sibling(name: str) -> str:
    """Name the other parameter of a layer."""
    layer, _, kind = name.rpartition(".")
    other = {"kernel": "bias", "scale": "bias"}.get(kind)
    return f"{layer}.{other or ('scale' if 'norm' in layer else 'kernel')}"
