"""The order in which the Halton sequence visits the cells of a grid.

Besnier et al. 2025 (Halton-MaskGIT, arXiv 2503.17076) reveal images so: what is revealed together
is far apart.
"""

import functools
import math

import numpy as np

from marref.trees import Array


@functools.cache
def halton(length: int) -> Array:
    """Order the cells of a square grid as the Halton sequence visits them first.

    Point i = 1, 2, … is (φ₂(i), φ₃(i)), with φ_b(i) the digits of i in base b behind the point, in
    reverse: φ₂(6) = 0.011₂ = 3/8.  Of a grid with n rows and columns it visits cell
    (floor(n φ₂), floor(n φ₃)), exactly, in integers.

    Parameters
    ----------
    length : int
        n².

    Returns
    -------
    int64 array [length]
        Positions, row by row, in the order of their first visit.

    Raises
    ------
    ValueError
        ``length`` is no square.

    Examples
    --------
    >>> halton(4)
    array([2, 1, 0, 3])
    """
    side = math.isqrt(length)
    if side * side != length:
        raise ValueError(
            f'order: received "halton" for length {length}, expected a square grid, as 64 = 8 * 8'
        )
    visited: dict[int, None] = {}
    index = 0
    while len(visited) < length:
        index += 1
        row, column = (_digits_reversed(index, base, side) for base in (2, 3))
        visited.setdefault(row * side + column)
    order = np.array(list(visited))
    order.flags.writeable = False  # the cache gives all callers the same array
    return order


def _digits_reversed(index: int, base: int, scale: int) -> int:
    """Compute floor(scale φ_base(index))."""
    numerator, denominator = 0, 1
    while index:
        index, digit = divmod(index, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return scale * numerator // denominator
