"""Inverted dropout (Srivastava et al. 2014): y = x ⊙ m,  m_i = 0 or 1/(1 - p).

Every feature is dropped with probability p and the others are scaled up, so that the mean of y
is x and nothing needs to change when dropout is off.
"""

from typing import Any, Protocol

import numpy as np

from marref.trees import Array


class Uniforms(Protocol):
    """What dropout draws from: a numpy.random.Generator, or what hands out a part of its draws."""

    def random(self, size: Any, dtype: Any) -> Any:
        """Draw numbers uniform in [0, 1)."""


def forward(x: Array, rate: float, rng: Uniforms | None) -> tuple[Array, Array | None]:
    """Drop features at random; without an ``rng``, or at rate 0, do nothing.

    The uniform numbers are float32 in every precision, so one seed drops the same features in
    float32 and in float64.

    Parameters
    ----------
    x : array
    rate : float
        The probability p of dropping a feature, in [0, 1).
    rng : numpy.random.Generator, or another source of `Uniforms`, or None

    Returns
    -------
    y : array
        Of the shape of ``x``.
    cache : array or None
        The mask m, or ``None`` where nothing is dropped.
    """
    if rng is None or rate == 0.0:
        return x, None
    keep = rng.random(x.shape, np.float32) >= rate
    mask = keep.astype(x.dtype) / (1.0 - rate)
    return x * mask, mask


def backward(dy: Array, cache: Array | None) -> Array:
    """Push ``dy`` back through y = x ⊙ m: ∂y_i/∂x_i = m_i, so dx = dy ⊙ m."""
    return dy if cache is None else dy * cache
