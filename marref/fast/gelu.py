"""GELU in passes over arrays, with its slope or without; see `marref.layers.gelu`.

SciPy works out Φ number by number, in double precision.  For float32 arrays there is a second way
here that is several times as fast.  log(Φ(x)/Φ(-x)) is x times a smooth function of x², so that

    Φ(x) = 1/(1 + exp(-x R(x²)))

with R a polynomial of degree 6, found by tools/fit_gelu.py for x² <= 30; beyond, R stays as it is,
and what Φ(-|x|) is off by is below 1e-8.  The error of x Φ(x) is below 1.6·2⁻²³ max(1, |x|), and
that of the slope below 2·2⁻²³.
"""

import math

import numpy as np
from scipy.special import ndtr

from marref.trees import Array

# Of -R, the highest power of x² first, and the x² beyond which R is constant.
_R = (
    -3.6112306e-09,
    2.66892717e-07,
    -7.93821722e-06,
    0.000110480304,
    6.62600304e-05,
    -0.0726685671,
    -1.59576843,
)
_END = 30.0

_SLOPE = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715

# Numbers at a time: what the passes over them work on stays in the processor's cache.
_CHUNK = 2**15


def value(x: Array, gelu: str) -> Array:
    """Compute GELU(x), over ``x`` itself.

    Parameters
    ----------
    x : array
        C-contiguous.
    gelu : {"erf", "tanh"}

    Returns
    -------
    array
        ``x``.
    """
    scratch = np.empty(min(x.size, _CHUNK), x.dtype)
    with np.errstate(over="ignore"):
        for (part,) in _chunks(x):
            _value(part, gelu, scratch[: part.size])
    return x


def value_and_slope(x: Array, gelu: str) -> tuple[Array, Array]:
    """Compute GELU(x) and its derivative, over ``x`` itself.

    Parameters
    ----------
    x : array
        C-contiguous; becomes the value.
    gelu : {"erf", "tanh"}

    Returns
    -------
    y, slope : arrays
        Of the shape and dtype of ``x``.
    """
    slope = np.empty_like(x)
    with np.errstate(over="ignore"):
        for source, target in _chunks(x, slope):
            _value_and_slope(source, gelu, target)
    return x, slope


def _chunks(*arrays: Array) -> list[tuple[Array, ...]]:
    """Cut contiguous arrays of one shape into flat views of the same parts."""
    flat = [array.reshape(-1) for array in arrays]
    return [
        tuple(part[start : start + _CHUNK] for part in flat)
        for start in range(0, flat[0].size, _CHUNK)
    ]


def _value(x: Array, gelu: str, scratch: Array) -> None:
    if gelu == "erf" and x.dtype != np.float32:
        x *= ndtr(x, out=scratch)
        return
    square = np.multiply(x, x, out=scratch)
    x /= _odds_of_erf(x, square) if gelu == "erf" else _odds_of_tanh(x, square)


def _value_and_slope(x: Array, gelu: str, slope: Array) -> None:
    square = x * x
    if gelu == "tanh":
        gate = _odds_of_tanh(x, square.copy())
        np.divide(1.0, gate, out=gate)
        # x gate′ = gate (1 - gate) x (1 + 3·0.044715 x²) 2√(2/π)
        np.subtract(1.0, gate, out=slope)
        slope *= gate
        square *= 3 * _SLOPE * _CUBIC
        square += _SLOPE
        slope *= square
    else:
        if x.dtype == np.float32:
            gate = _odds_of_erf(x, square.copy())
            np.divide(1.0, gate, out=gate)
        else:
            gate = ndtr(x)
        square *= -0.5
        np.exp(square, out=slope)
        slope *= 1.0 / math.sqrt(2 * math.pi)
    slope *= x
    slope += gate
    x *= gate


def _odds_of_erf(x: Array, square: Array) -> Array:
    """Compute 1/Φ(x) = 1 + exp(-x R(x²)), over x²."""
    np.minimum(square, _END, out=square)
    odds = square * _R[0]
    for coefficient in _R[1:-1]:
        odds += coefficient
        odds *= square
    odds += _R[-1]
    odds *= x
    np.exp(odds, out=odds)
    odds += 1.0
    return odds


def _odds_of_tanh(x: Array, square: Array) -> Array:
    """Compute 1/σ(2u) = 1 + exp(-2u), over x²."""
    odds = square
    odds *= -_SLOPE * _CUBIC
    odds -= _SLOPE
    odds *= x
    np.exp(odds, out=odds)
    odds += 1.0
    return odds
