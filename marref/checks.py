"""Checks of arguments at the public boundary.

Each function raises a TypeError or ValueError that names the argument, what was received and
what was expected; what it returns is safe to compute with.
"""

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from marref.trees import Array


def integer(argument: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """Return ``value`` as an int in [minimum, maximum]."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{argument}: received {value!r}, expected an integer")
    if value < minimum or (maximum is not None and value > maximum):
        bounds = f">= {minimum}" if maximum is None else f"in [{minimum}, {maximum}]"
        raise ValueError(f"{argument}: received {value}, expected an integer {bounds}")
    return int(value)


def real(argument: str, value: Any, interval: str) -> float:
    """Return ``value`` as a finite float in an interval written as usual: ``"[0, 1)"``."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{argument}: received {value!r}, expected a real number")
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if not (math.isfinite(value) and above and below):
        raise ValueError(f"{argument}: received {value}, expected a number in {interval}")
    return float(value)


def choice(argument: str, value: Any, known: Collection[str]) -> str:
    """Return ``value`` if it is one of the known names."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{argument}: received {value!r}, expected one of {', '.join(known)}")
    return value


def generator(argument: str, value: Any) -> np.random.Generator:
    """Return ``value`` if it is a numpy.random.Generator."""
    if not isinstance(value, np.random.Generator):
        raise TypeError(
            f"{argument}: received {type(value).__name__}, expected a numpy.random.Generator, "
            "for instance numpy.random.default_rng(0)"
        )
    return value


def shape(argument: str, array: Array, expected: tuple[int, ...]) -> None:
    """Raise unless an array has the expected shape."""
    if array.shape != expected:
        raise ValueError(f"{argument}: shape {list(array.shape)}, expected {list(expected)}")


def finite(argument: str, array: Array) -> None:
    """Raise, with the place of the first, if an array holds NaN or an infinity."""
    bad = ~np.isfinite(array)
    if bad.any():
        place = _first(bad)
        raise ValueError(
            f"{argument}: {array[place]} at {_written(place)}, expected finite numbers"
        )


def token_ids(
    argument: str, value: npt.ArrayLike, vocab_size: int, ndim: int | None = None
) -> Array:
    """Return ``value`` as an array of integers in [0, vocab_size), of rank ``ndim`` if given."""
    tokens = np.asarray(value)
    if tokens.dtype.kind not in "iu":
        raise TypeError(f"{argument}: dtype {tokens.dtype}, expected integers")
    if ndim is not None and tokens.ndim != ndim:
        axes = ["length", "batch, length"][ndim - 1]
        raise ValueError(f"{argument}: shape {list(tokens.shape)}, expected [{axes}]")
    bad = (tokens < 0) | (tokens >= vocab_size)
    if bad.any():
        place = _first(bad)
        raise ValueError(
            f"{argument}: id {tokens[place]} at {_written(place)} is not in [0, {vocab_size})"
        )
    return tokens


def binary_mask(argument: str, value: npt.ArrayLike, expected: tuple[int, ...]) -> Array:
    """Return ``value``, of booleans or of 0 and 1, as booleans of the expected shape."""
    mask = np.asarray(value)
    shape(argument, mask, expected)
    if mask.dtype == bool:
        return mask
    if mask.dtype.kind not in "iuf":
        raise TypeError(f"{argument}: dtype {mask.dtype}, expected booleans, or 0 and 1")
    bad = (mask != 0) & (mask != 1)
    if bad.any():
        place = _first(bad)
        raise ValueError(f"{argument}: {mask[place]} at {_written(place)}, expected 0 or 1")
    return mask.astype(bool)


def _first(bad: Array) -> tuple[int, ...]:
    return tuple(int(index) for index in np.argwhere(bad)[0])


def _written(place: tuple[int, ...]) -> str:
    return str(list(place)) if place else "the scalar"
