"""Classes of sequences: from a file with one a line, sub-folders' names, or an array."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from marref.data import text
from marref.trees import Array

MAX_CLASS = 2**31 - 1


def of_names(where: str, names: list[str]) -> npt.NDArray[np.int64]:
    """Make class numbers of names: the numbers that all of them are, or their places when sorted.

    Parameters
    ----------
    where : str
        For messages.
    names : list of str

    Returns
    -------
    int64 array [len(names)]
    """
    if all(name.isdecimal() for name in names):
        numbers = [int(name) for name in names]
        if max(numbers) <= MAX_CLASS:
            return np.array(numbers, np.int64)
        raise ValueError(f"{where}: class {max(numbers)}, expected at most {MAX_CLASS}")
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def of_file(path: Path, count: int) -> npt.NDArray[np.int64]:
    """Read the classes of ``count`` sequences from a text file, one a line."""
    lines = text.decoded(path).rstrip("\n").split("\n")
    names = [line.strip() for line in lines]
    if len(names) != count:
        raise ValueError(f"{path}: {len(names)} lines, expected {count}, one for each sequence")
    if "" in names:
        raise ValueError(f"{path}: line {names.index('') + 1} is empty, expected a class")
    return of_names(str(path), names)


def checked(where: str, labels: Array) -> npt.NDArray[np.int64]:
    """Return an array of integers as classes."""
    if labels.ndim != 1:
        raise ValueError(f"{where}: shape {list(labels.shape)}, expected [n]")
    bad = (labels < 0) | (labels > MAX_CLASS)
    if bad.any():
        place = int(bad.argmax())
        raise ValueError(f"{where}: class {labels[place]} at [{place}] is not in [0, {MAX_CLASS}]")
    return labels.astype(np.int64)
