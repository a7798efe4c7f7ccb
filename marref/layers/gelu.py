"""GELU, the Gaussian error linear unit (Hendrycks and Gimpel 2016, arXiv 1606.08415).

    "erf":   y = x Φ(x),        Φ(x) = (1 + erf(x/√2)) / 2,  the normal distribution function
    "tanh":  y = x σ(2 u(x)),   u(x) = √(2/π) (x + 0.044715 x³),   σ(z) = 1/(1 + exp(-z))

The second is the paper's approximation 0.5 x (1 + tanh u), since (1 + tanh u)/2 = σ(2u).  Both
are x times a gate.  The gate is evaluated without ever forming 1 - (almost 1), which costs the
textbook formulas all their digits for x below -5 in float32.
"""

import math

import numpy as np

from marref import normal
from marref.trees import Array, Tree

KINDS = ("erf", "tanh")

_SLOPE = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def forward(x: Array, kind: str) -> tuple[Array, Tree]:
    """Compute y = x · gate(x) and, beside it, the slope y′ = gate + x gate′ (the product rule).

    The two share most of their work:

        "erf":   gate′ = Φ′(x) = φ(x) = exp(-x²/2)/√(2π), the normal density
        "tanh":  gate′ = σ′(2u) 2u′ = gate (1 - gate) 2 √(2/π) (1 + 3·0.044715 x²)

    Parameters
    ----------
    x : array
    kind : {"erf", "tanh"}

    Returns
    -------
    y : array
        Of the shape of ``x``.
    cache : dict
        ``slope`` y′, of the shape of ``x``.
    """
    gate, slope = _gate(x, kind)  # The slope is gate′, and becomes y′ in place.
    slope *= x
    slope += gate
    return x * gate, {"slope": slope}


def backward(dy: Array, cache: Tree, kind: str) -> Array:
    """Push ``dy`` back through y(x), entry by entry: dx = dy ⊙ y′.

    Parameters
    ----------
    dy : array
    cache : dict
        From `forward`.
    kind : {"erf", "tanh"}
        As in `forward`.  What depends on it is in the cache.

    Returns
    -------
    array
        dx, of the shape of ``dy``.
    """
    dx: Array = dy * cache["slope"]
    return dx


def _gate(x: Array, kind: str) -> tuple[Array, Array]:
    """Compute gate and gate′."""
    if kind == "erf":
        return normal.distribution_and_density(x)
    square = x * x
    gate = _sigmoid(2 * _SLOPE * (x + _CUBIC * (x * square)))
    return gate, gate * (1.0 - gate) * (2 * _SLOPE * (1.0 + 3 * _CUBIC * square))


def _sigmoid(z: Array) -> Array:
    """1/(1 + exp(-z)), for real and complex z, with exp of nothing positive."""
    positive = z.real > 0
    decay = np.exp(np.where(positive, -z, z))
    gate: Array = np.where(positive, 1.0, decay) / (1.0 + decay)
    return gate
