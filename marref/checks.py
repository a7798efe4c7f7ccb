"""Checks of arguments at the public boundary.

Each function raises a TypeError or ValueError that names the argument, what was received and
what was expected; what it returns is safe to compute with.
"""

import difflib
import itertools
import math
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from marref.trees import Array


class NotFinite(ValueError):
    """An array holds NaN or an infinity."""


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
    try:
        number = float(value)
    except OverflowError:  # an int beyond the largest float64
        number = math.inf
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below and math.isfinite(number)):
        raise ValueError(f"{argument}: received {value}, expected a number in {interval}")
    return number


def even(argument: str, value: Any) -> int:
    """Return ``value`` as an even, positive int."""
    number = integer(argument, value, 1)
    if number % 2:
        raise ValueError(f"{argument}: received {number}, expected an even number")
    return number


def function(argument: str, value: Any) -> None:
    """Raise unless ``value`` can be called."""
    if not callable(value):
        raise TypeError(f"{argument}: received {type(value).__name__}, expected a function")


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


def array(argument: str, value: Any) -> Array:
    """Return ``value`` as an array; arrays, of subclasses too, as they are.

    Not masked ones: what is masked passes for good in every comparison, and is computed with.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{argument}: received a masked array, expected one without a mask")
    try:
        return np.asanyarray(value)
    except ValueError as error:
        raise ValueError(f"{argument}: cannot be made an array ({error})") from error


def shape(argument: str, array: Array, expected: tuple[int, ...]) -> None:
    """Raise unless an array has the expected shape."""
    if array.shape != expected:
        raise ValueError(f"{argument}: shape {list(array.shape)}, expected {list(expected)}")


def finite(argument: str, array: Array) -> None:
    """Raise, with the place of the first, if an array holds NaN or an infinity."""
    bad = ~np.isfinite(array)
    if bad.any():
        place = _first(bad)
        raise NotFinite(f"{argument}: {array[place]} at {_written(place)}, expected finite numbers")


def token_ids(
    argument: str, value: npt.ArrayLike, vocab_size: int, *, batched: bool = True
) -> Array:
    """Return ``value`` as integers in [0, vocab_size), [batch, length] or of any shape."""
    tokens = array(argument, value)
    if tokens.dtype.kind not in "iu":
        raise TypeError(f"{argument}: dtype {tokens.dtype}, expected integers")
    if batched and tokens.ndim != 2:
        raise ValueError(f"{argument}: shape {list(tokens.shape)}, expected [batch, length]")
    bad = (tokens < 0) | (tokens >= vocab_size)
    if bad.any():
        place = _first(bad)
        raise ValueError(
            f"{argument}: id {tokens[place]} at {_written(place)} is not in [0, {vocab_size})"
        )
    return tokens


def labels(argument: str, value: npt.ArrayLike, num_classes: int) -> Array:
    """Return ``value`` as classes in [0, num_classes], [batch]; the last is "no class"."""
    classes = array(argument, value)
    if classes.dtype.kind not in "iu":
        raise TypeError(f"{argument}: dtype {classes.dtype}, expected integers")
    if classes.ndim != 1 or len(classes) == 0:
        raise ValueError(
            f"{argument}: shape {list(classes.shape)}, expected [batch] with batch >= 1"
        )
    bad = (classes < 0) | (classes > num_classes)
    if bad.any():
        place = _first(bad)
        raise ValueError(
            f"{argument}: class {classes[place]} at {_written(place)} is not in "
            f"[0, {num_classes}], the last of which is no class"
        )
    return classes


def no_mask_token(argument: str, tokens: Array, mask_token_id: int) -> None:
    """Raise, with the place of the first, if data hold the id that hides tokens."""
    bad = tokens == mask_token_id
    if bad.any():
        raise ValueError(
            f"{argument}: id {mask_token_id}, [MASK], at {_written(_first(bad))}: data must not "
            "hold it"
        )


def binary_mask(argument: str, value: npt.ArrayLike, expected: tuple[int, ...]) -> Array:
    """Return ``value``, of booleans or of 0 and 1, as booleans of the expected shape."""
    mask = array(argument, value)
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


def unknown_name(name: str, known: Collection[str]) -> str:
    """Say that a name is unknown, and which known names are nearest."""
    found = nearest(name, known)
    return f"{name!r} is unknown" + (f"; nearest: {found}" if found else "")


def listed(names: Collection[str], most: int = 20) -> str:
    """List names, no more than so many, and how many more there are."""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(itertools.islice(names, most)) + more


def nearest(name: str, known: Collection[str]) -> str:
    """List up to three known names that are near to a name; empty if none is."""
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.5))


def _first(bad: Array) -> tuple[int, ...]:
    return tuple(int(index) for index in np.argwhere(bad)[0])


def _written(place: tuple[int, ...]) -> str:
    return str(list(place)) if place else "the scalar"
