"""Arithmetic in another precision: what marref computes if every operation is rounded.

NumPy computes in float32 and float64.  For bfloat16 and float16 `Rounded` computes in float32 and
rounds the result of every operation, as the units of today's accelerators do; a sum or a matrix
product counts as one operation, since those units add in float32.
"""

from typing import Any

import numpy as np

from marref.trees import Array

PRECISIONS = ("float64", "float32", "float16", "bfloat16")

EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""The distance from 1 to the next number, by precision."""


def round_to(x: Array, precision: str) -> Array:
    """Round numbers to a precision, and keep their dtype.

    Parameters
    ----------
    x : float32 or float64 array
    precision : {"float64", "float32", "float16", "bfloat16"}

    Returns
    -------
    array
    """
    if precision == "bfloat16":
        return _round_to_bfloat16(x)
    with np.errstate(over="ignore"):
        return x.astype(precision).astype(x.dtype)


def _round_to_bfloat16(x: Array) -> Array:
    """Round to the nearest bfloat16, halves to even.

    A bfloat16 is a float32 without its last 16 bits.  Adding half of the last place that stays,
    less one where that place is even, carries into it exactly where rounding up is right.
    """
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32).astype(x.dtype)


def in_precision(x: Array, precision: str) -> Array:
    """Turn numbers into an array that computes in a precision.

    Returns
    -------
    array
        float64 or float32, or a float32 `Rounded`.
    """
    if precision in ("float64", "float32"):
        return x.astype(precision)
    rounded = round_to(x.astype(np.float32), precision).view(Rounded)
    rounded.precision = precision
    return rounded


class Rounded(np.ndarray[Any, Any]):
    """A float32 array; the result of every NumPy operation on it is rounded to its precision."""

    precision: str = "float32"

    def __array_finalize__(self, origin: Any) -> None:
        self.precision = getattr(origin, "precision", "float32")

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **options: Any
    ) -> Any:
        result = getattr(ufunc, method)(*map(_plain, inputs), **options)
        if method == "at":
            target = inputs[0]
            target[...] = round_to(_plain(target), target.precision)
            return None
        if not isinstance(result, np.ndarray | np.generic) or result.dtype.kind != "f":
            return result
        rounded = round_to(np.asarray(result), self.precision)
        if out is not None:
            out[0][...] = rounded
            return out[0]
        if rounded.ndim == 0:
            return rounded[()]
        wrapped = rounded.view(Rounded)
        wrapped.precision = self.precision
        return wrapped


def _plain(x: Any) -> Any:
    return x.view(np.ndarray) if isinstance(x, Rounded) else x
