"""Adaptive layer norm (Peebles and Xie 2023, DiT, arXiv 2212.09748): a norm steered from outside.

    y = x̂ (1 + scale) + shift

x̂ is x after layer norm; shift and scale come, row by row, from a condition.  With both 0 nothing
happens.  Page: docs/continuous.md.
"""

from marref.trees import Array


def forward(normalised: Array, shift: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    """Compute y = x̂ (1 + scale) + shift; all arrays [rows, features]."""
    return normalised * (1.0 + scale) + shift, (normalised, scale)


def backward(dy: Array, cache: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    """Push ``dy`` back.

    ∂y/∂x̂ = 1 + scale, ∂y/∂shift = 1, ∂y/∂scale = x̂, entry by entry.

    Returns
    -------
    dnormalised, dshift, dscale : arrays [rows, features]
    """
    normalised, scale = cache
    return dy * (1.0 + scale), dy, dy * normalised
