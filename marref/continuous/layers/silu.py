"""SiLU, the sigmoid linear unit (Elfwing et al. 2017, arXiv 1702.03118): y = x σ(x).

σ(x) = 1/(1 + exp(-x)).  Page: docs/continuous.md.
"""

from marref.layers.gelu import sigmoid
from marref.trees import Array


def forward(x: Array) -> tuple[Array, Array]:
    """Compute y = x σ(x).

    Returns
    -------
    y : array
        Of the shape of ``x``.
    cache : array
        The slope y′ = σ + x σ (1 - σ) = σ (1 + x (1 - σ)), since σ′ = σ (1 - σ).
    """
    gate = sigmoid(x)
    return x * gate, gate * (1.0 + x * (1.0 - gate))


def backward(dy: Array, cache: Array) -> Array:
    """Push ``dy`` back, entry by entry: dx = dy ⊙ y′."""
    dx: Array = dy * cache
    return dx
