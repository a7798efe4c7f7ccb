"""Inverted dropout (Srivastava et al. 2014): y = x ⊙ m,  m_i = 0 or 1/(1 - p).

Every feature is dropped with probability p and the others are scaled up, so that the mean of y
is x and nothing needs to change when dropout is off.  What is dropped is drawn before the forward
pass and handed to it, like any other input.  Page: docs/feed-forward-and-block.md.
"""

import numpy as np

from marref.trees import Array


def draw(rng: np.random.Generator | None, shape: tuple[int, ...], rate: float) -> Array | None:
    """Draw which features are kept, each with probability 1 - p.

    The uniform numbers have one dtype, whatever that of the features, so one seed drops the same
    features in float32 and in float64.

    Parameters
    ----------
    rng : numpy.random.Generator or None
        ``None`` turns dropout off.
    shape : tuple of int
    rate : float
        The probability p of dropping a feature, in [0, 1).

    Returns
    -------
    bool array of the shape, or None
        ``None`` where nothing is dropped: without an ``rng``, or at rate 0.
    """
    if rng is None or rate == 0.0:
        return None
    keep: Array = rng.random(shape, np.float32) >= rate
    return keep


def forward(x: Array, keep: Array | None, rate: float) -> tuple[Array, Array | None]:
    """Drop the features that are not kept.

    Parameters
    ----------
    x : array
    keep : bool array of the shape of ``x``, or None
        From `draw`.
    rate : float
        The p that it was drawn with.

    Returns
    -------
    y : array
        Of the shape of ``x``.
    cache : array or None
        The mask m, or ``None`` where nothing is dropped.
    """
    if keep is None:
        return x, None
    mask = keep.astype(x.dtype) / (1.0 - rate)
    return x * mask, mask


def backward(dy: Array, cache: Array | None) -> Array:
    """Push ``dy`` back through y = x ⊙ m: ∂y_i/∂x_i = m_i, so dx = dy ⊙ m."""
    return dy if cache is None else dy * cache
