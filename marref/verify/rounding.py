"""Arithmetic in another precision: what marref computes if every operation is rounded.

NumPy computes in float32 and float64.  For bfloat16 and float16 `Rounded` computes in float32 and
rounds the result of every operation, as the units of today's accelerators do; a sum or a matrix
product counts as one operation, since those units add in float32.

Many programs round in their matrix products only.  With ``"tf32"`` (NVIDIA's TensorFloat-32, the
default of many GPU programs) products take inputs of 10 explicit bits and add in float32; with
``"bf16-mixed"`` and ``"fp16-mixed"`` (autocast) inputs and results of products are bfloat16 or
float16.  Everything else is float32.

Golden vectors are float64, so that marref in float64 makes no error to be measured by.  `Jittered`
moves what every operation returns, and what sums and products take, at random (Monte Carlo
arithmetic, Parker 1997, UCLA CSD-970002), which shows what is left where large numbers cancel.  It
moves them by up to a unit: half for the rounding of a program, half for that of the golden array.
"""

from typing import Any

import numpy as np

from marref.trees import Array

MIXED = ("tf32", "fp16-mixed", "bf16-mixed")
"""Precisions in which matrix products round their inputs, and the rest is float32."""

PRECISIONS = ("float64", "float32", "float16", "bfloat16", *MIXED)

_UNIT = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
EPSILON = {**_UNIT, **dict.fromkeys(MIXED, _UNIT["float32"])}
"""The distance from 1 to the next number, by precision."""

PRODUCT_EPSILON = {
    **_UNIT,
    "tf32": 2.0**-10,
    "fp16-mixed": _UNIT["float16"],
    "bf16-mixed": _UNIT["bfloat16"],
}
"""The same for the inputs of matrix products."""

_OF_PRODUCTS = {"fp16-mixed": "float16", "bf16-mixed": "bfloat16"}


def round_to(x: Array, precision: str) -> Array:
    """Round numbers to a precision, and keep their dtype.

    Parameters
    ----------
    x : float32 or float64 array
    precision : {"float64", "float32", "float16", "bfloat16", "tf32"}

    Returns
    -------
    array
    """
    if precision in ("bfloat16", "tf32"):
        return _without_last_bits(x, {"bfloat16": 16, "tf32": 13}[precision])
    with np.errstate(over="ignore"):
        return x.astype(precision).astype(x.dtype)


def _without_last_bits(x: Array, count: int) -> Array:
    """Round to the nearest float32 whose last bits are 0, halves to even.

    A bfloat16 is a float32 without its last 16 bits, TF32 one without the last 13.  Adding half of
    the last place that stays, less one where that place is even, carries into it exactly where
    rounding up is right.
    """
    bits = np.asarray(x, np.float32).view(np.uint32)
    half = np.uint32((1 << (count - 1)) - 1)
    rounded = (bits + (((bits >> count) & 1) + half)) & ~np.uint32((1 << count) - 1)
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
    narrow = x.astype(np.float32)
    rounded = (narrow if precision in MIXED else round_to(narrow, precision)).view(Rounded)
    rounded.precision = precision
    return rounded


class Rounded(np.ndarray[Any, Any]):
    """A float32 array; NumPy's operations on it round as its precision says."""

    precision: str = "float32"

    def __array_finalize__(self, origin: Any) -> None:
        self.precision = getattr(origin, "precision", "float32")

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **options: Any
    ) -> Any:
        arrays = [self._taken(ufunc, method, _plain(x)) for x in inputs]
        result = getattr(ufunc, method)(*arrays, **options)
        if method == "at":
            inputs[0][...] = self._returned(ufunc, _plain(inputs[0]))
            return None
        if not isinstance(result, np.ndarray | np.generic) or result.dtype.kind != "f":
            return result
        rounded = self._returned(ufunc, np.asarray(result))
        if out is not None:
            out[0][...] = rounded
            return out[0]
        if rounded.ndim == 0:
            return rounded[()]
        wrapped = rounded.view(type(self))
        wrapped.__array_finalize__(self)
        return wrapped

    def _taken(self, ufunc: np.ufunc, method: str, x: Any) -> Any:
        """Give what an operation takes in place of an input."""
        if ufunc is np.matmul and self.precision in MIXED:
            return round_to(x, _OF_PRODUCTS.get(self.precision, "tf32"))
        return x

    def _returned(self, ufunc: np.ufunc, x: Array) -> Array:
        """Give what an operation returns in place of its result."""
        if self.precision not in MIXED:
            return round_to(x, self.precision)
        if ufunc is np.matmul and self.precision in _OF_PRODUCTS:
            return round_to(x, _OF_PRODUCTS[self.precision])
        return x


class Jittered(Rounded):
    """A float64 array whose operations err by up to a unit at random."""

    rng: np.random.Generator | None = None

    def __array_finalize__(self, origin: Any) -> None:
        self.rng = getattr(origin, "rng", None)

    def _taken(self, ufunc: np.ufunc, method: str, x: Any) -> Any:
        return self._moved(x) if ufunc is np.matmul or method == "reduce" else x

    def _returned(self, ufunc: np.ufunc, x: Array) -> Array:
        return self._moved(x)

    def _moved(self, x: Array) -> Array:
        if self.rng is None or x.dtype != np.float64:
            return x
        return x * (1.0 + EPSILON["float64"] * self.rng.uniform(-1.0, 1.0, x.shape))


def jittered(x: Array, rng: np.random.Generator) -> Jittered:
    """Turn float64 numbers into an array that computes with random errors."""
    array = x.view(Jittered)
    array.rng = rng
    return array


def _plain(x: Any) -> Any:
    return x.view(np.ndarray) if isinstance(x, Rounded) else x
