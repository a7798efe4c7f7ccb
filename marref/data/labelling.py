"""Classes of sequences: from a file with one a line, sub-folders' names, or an array."""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from marref import checks
from marref.data import text
from marref.trees import Array

# Each class is a row of a table, up to the largest number.
MAX_CLASS = 2**20 - 1


class Labels(NamedTuple):
    """The class of every sequence.

    Parameters
    ----------
    numbers : int64 array [n]
    names : tuple of str, or None
        By number; ``None`` where classes have no names but their numbers.
    """

    numbers: npt.NDArray[np.int64]
    names: tuple[str, ...] | None = None


class Classes(NamedTuple):
    """The classes of a dataset.

    Parameters
    ----------
    counts : tuple of int
        How many sequences each has, by number.
    names : tuple of str, or None
        By number; ``None`` where classes have no names but their numbers.
    """

    counts: tuple[int, ...]
    names: tuple[str, ...] | None = None

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """What share of the sequences each class has."""
        counts = np.array(self.counts, np.float64)
        shares: npt.NDArray[np.float64] = counts / max(counts.sum(), 1.0)
        return shares

    def numbers(self, names: Collection[str]) -> list[int]:
        """Find the numbers of classes by name or, where classes have none, by number."""
        known = map(str, range(len(self.counts))) if self.names is None else self.names
        places = {name: number for number, name in enumerate(known)}
        for name in names:
            if name not in places:
                found = checks.nearest(name, places)
                expected = f"; nearest: {found}" if found else f", expected {checks.listed(places)}"
                raise ValueError(f"class {name!r} is unknown{expected}")
        return [places[name] for name in names]


def of_names(where: str, names: list[str]) -> Labels:
    """Make class numbers of names: the numbers that all of them are, or their places when sorted.

    Parameters
    ----------
    where : str
        For messages.
    names : list of str

    Returns
    -------
    Labels
    """
    if all(name.isdecimal() for name in names):
        numbers = [int(name) for name in names]
        if max(numbers) <= MAX_CLASS:
            return Labels(np.array(numbers, np.int64))
        raise ValueError(f"{where}: class {max(numbers)}, expected at most {MAX_CLASS}")
    found, numbers_of = np.unique(names, return_inverse=True)
    return Labels(numbers_of.astype(np.int64), tuple(found.tolist()))


def of_file(path: Path, count: int) -> Labels:
    """Read the classes of ``count`` sequences from a text file, one a line."""
    lines = text.decoded(path).rstrip("\n").split("\n")
    names = [line.strip() for line in lines]
    if len(names) != count:
        raise ValueError(f"{path}: {len(names)} lines, expected {count}, one for each sequence")
    if "" in names:
        raise ValueError(f"{path}: line {names.index('') + 1} is empty, expected a class")
    return of_names(str(path), names)


def checked(where: str, labels: Array) -> Labels:
    """Return an array of integers as classes."""
    if labels.dtype.kind not in "iu":
        raise TypeError(f"{where}: dtype {labels.dtype}, expected integers")
    if labels.ndim != 1:
        raise ValueError(f"{where}: shape {list(labels.shape)}, expected [n]")
    bad = (labels < 0) | (labels > MAX_CLASS)
    if bad.any():
        place = int(bad.argmax())
        raise ValueError(f"{where}: class {labels[place]} at [{place}] is not in [0, {MAX_CLASS}]")
    return Labels(labels.astype(np.int64))
