"""The error measure of every check: how far arrays are from what is expected.

    difference = max |actual - expected|             relative = difference / max |expected|

Relative to the largest entry, not entry by entry: where terms cancel, a small entry has the
rounding of the large terms that it came from.
"""

import math

import numpy as np

from marref.trees import Array


def difference(actual: Array, expected: Array) -> float:
    """Return the largest |actual - expected|; infinite where one of them is not finite.

    -inf, the score of what cannot be chosen, is no difference to -inf.
    """
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.abs(actual - expected)
    distance = np.where(np.isneginf(actual) & np.isneginf(expected), 0.0, distance)
    return float(np.where(np.isfinite(distance), distance, np.inf).max(initial=0.0))


def without_common_nan(one: Array, other: Array) -> tuple[Array, Array]:
    """Put 0 where both arrays are NaN: what is NaN by the same mistake does not differ."""
    both = np.isnan(one) & np.isnan(other)
    return np.where(both, 0.0, one), np.where(both, 0.0, other)


def largest(*arrays: Array) -> float:
    """Return the largest |entry| of all the arrays but -inf; 0 if they have none."""
    wide = (array.astype(np.float64) for array in arrays)
    sizes = (np.abs(array[~np.isneginf(array)]).max(initial=0.0) for array in wide)
    return float(max(sizes, default=0.0))


def relative(distance: float, size: float) -> float:
    """Divide a difference by the largest expected entry, unless that is 0 or not finite."""
    return distance / size if 0 < size < math.inf else distance
