"""Arithmetic in another precision: what marref computes if every operation is rounded.

NumPy computes in float32 and float64.  For bfloat16 and float16 `Rounded` computes in float32 and
rounds the result of every operation, as the units of today's accelerators do; a sum or a matrix
product counts as one operation, since those units add in float32.

Many programs round in their matrix products only.  With ``"tf32"`` (NVIDIA's TensorFloat-32, the
default of many GPU programs) products take inputs of 10 explicit bits and add in float32; with
``"bf16-mixed"`` and ``"fp16-mixed"`` (autocast) inputs and results of products are bfloat16 or
float16.  Everything else is float32.
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
        arrays, mixed = [_plain(x) for x in inputs], self.precision in MIXED
        if mixed and ufunc is np.matmul:
            arrays = [round_to(x, _OF_PRODUCTS.get(self.precision, "tf32")) for x in arrays]
        result = getattr(ufunc, method)(*arrays, **options)
        if method == "at":
            target = inputs[0]
            if not mixed:
                target[...] = round_to(_plain(target), self.precision)
            return None
        if not isinstance(result, np.ndarray | np.generic) or result.dtype.kind != "f":
            return result
        rounded = np.asarray(result)
        if not mixed or (ufunc is np.matmul and self.precision in _OF_PRODUCTS):
            rounded = round_to(rounded, _OF_PRODUCTS.get(self.precision, self.precision))
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
