"""GELU, the Gaussian error linear unit (Hendrycks and Gimpel 2016, arXiv 1606.08415).

    y = x gate(x)

    "erf":   gate(x) = Φ(x) = (1 + erf(x/√2)) / 2,  the normal distribution function
    "tanh":  gate(x) = σ(2 u(x)),   u(x) = √(2/π) (x + 0.044715 x³),   σ(z) = 1/(1 + exp(-z))

The second is the paper's approximation 0.5 x (1 + tanh u), since (1 + tanh u)/2 = σ(2u).  Where x
is far below 0 the gate is taken as it is, and not as 1 - (almost 1), which costs the textbook
formulas all their digits for x below -5 in float32.  Page: docs/gelu.md.
"""

import math

import numpy as np
from scipy.special import ndtr

from marref.trees import Array, Tree

KINDS = ("erf", "tanh")

_ROOT = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def forward(x: Array, gelu: str) -> tuple[Array, Tree]:
    """Compute y = x gate(x).

    Parameters
    ----------
    x : array
    gelu : {"erf", "tanh"}

    Returns
    -------
    y : array
        Of the shape of ``x``.
    cache : dict
        ``slope``, of the shape of ``x``: y′ = gate + x gate′ (the product rule), taken here
        because gate and gate′ share most of their work.
    """
    value, derivative = gate(x, gelu)
    return x * value, {"slope": value + x * derivative}


def backward(dy: Array, cache: Tree) -> Array:
    """Push ``dy`` back through y(x), entry by entry: dx = dy ⊙ y′, of the shape of ``dy``."""
    dx: Array = dy * cache["slope"]
    return dx


def gate(x: Array, gelu: str) -> tuple[Array, Array]:
    """Compute the gate and its derivative.

        "erf":   gate′ = Φ′(x) = exp(-x²/2)/√(2π), the normal density
        "tanh":  gate′ = σ′(2u) 2u′ = gate (1 - gate) 2 √(2/π) (1 + 3·0.044715 x²)

    Returns
    -------
    gate, derivative : arrays
        Of the shape of ``x``.
    """
    if gelu == "erf":
        return ndtr(x), np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    value = sigmoid(2 * _ROOT * (x + _CUBIC * x * x * x))
    return value, value * (1.0 - value) * (2 * _ROOT * (1.0 + 3 * _CUBIC * x * x))


def sigmoid(z: Array) -> Array:
    """Compute σ(z) = 1/(1 + exp(-z)), with exp of nothing positive."""
    positive = z.real > 0
    decay = np.exp(np.where(positive, -z, z))
    value: Array = np.where(positive, 1.0, decay) / (1.0 + decay)
    return value
