"""Layer norm over the features (Ba, Kiros and Hinton 2016, arXiv 1607.06450, eq. 4).

    y = γ ⊙ (x - μ) / sqrt(σ² + ε) + β,     μ = mean(x),   σ² = mean((x - μ)²)

Mean and (biased) variance are taken over the last axis, for every position by itself.  Page:
docs/layer-norm.md.
"""

import numpy as np
import numpy.typing as npt

from marref.trees import Array, Tree


def init(features: int, dtype: npt.DTypeLike = np.float64) -> Tree:
    """Start as the plain normalisation: scale γ = 1, bias β = 0 (Ba et al. 2016, section 6).

    Returns
    -------
    dict
        ``scale`` [features], ``bias`` [features].
    """
    return {"scale": np.ones(features, dtype), "bias": np.zeros(features, dtype)}


def forward(params: Tree, x: Array, epsilon: float) -> tuple[Array, Tree]:
    """Normalise every position over its features.

    Parameters
    ----------
    params : dict
        ``scale`` γ, ``bias`` β.
    x : array [..., features]
    epsilon : float
        Added to the variance, inside the root.

    Returns
    -------
    y : array [..., features]
    cache : dict
        ``normalised`` x̂ = (x - μ)/sqrt(σ² + ε) [..., features] and
        ``inverse_std`` 1/sqrt(σ² + ε) [..., 1].
    """
    # Two passes: mean(x²) - μ² is off by 10% in float32 at mean 1000, standard deviation 1.
    centred = x - x.mean(axis=-1, keepdims=True)
    # What rounding left of the mean is taken off too: features that are equal become exactly 0.
    centred = centred - centred.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    inverse_std = 1.0 / np.sqrt(variance + epsilon)
    normalised = centred * inverse_std
    y = params["scale"] * normalised + params["bias"]
    return y, {"normalised": normalised, "inverse_std": inverse_std}


def backward(params: Tree, dy: Array, cache: Tree) -> tuple[Array, Tree]:
    """Push ``dy`` back through the normalisation.

    With y_j = γ_j x̂_j + β_j the gradient that reaches x̂ is dx̂ = γ ⊙ dy.  Write
    s = 1/sqrt(σ² + ε) and x̂_j = (x_j - μ) s.  An x_i acts on x̂_j directly, through the mean
    (∂μ/∂x_i = 1/n) and through the variance:

        ∂s/∂x_i   = -(s³/2) ∂σ²/∂x_i = -(s³/2) (2/n)(x_i - μ) = -(s²/n) x̂_i
        ∂x̂_j/∂x_i = s ([i = j] - 1/n) - (x_j - μ)(s²/n) x̂_i = s ([i = j] - 1/n - x̂_i x̂_j / n)

    (∂σ²/∂μ = 0, because Σ(x - μ) = 0; (x_j - μ) s² = s x̂_j.)  Summed against dx̂_j:

        dx = s (dx̂ - mean(dx̂) - x̂ mean(dx̂ ⊙ x̂))

    and, over all positions, dγ = Σ dy ⊙ x̂, dβ = Σ dy.

    Parameters
    ----------
    params : dict
    dy : array [..., features]
    cache : dict
        From `forward`.

    Returns
    -------
    dx : array [..., features]
    grads : dict
        Like ``params``.
    """
    normalised, inverse_std = cache["normalised"], cache["inverse_std"]
    dnormalised = params["scale"] * dy
    mean = dnormalised.mean(axis=-1, keepdims=True)
    correlation = (dnormalised * normalised).mean(axis=-1, keepdims=True)
    dx = inverse_std * (dnormalised - mean - normalised * correlation)
    leading = tuple(range(dy.ndim - 1))
    return dx, {"scale": (dy * normalised).sum(axis=leading), "bias": dy.sum(axis=leading)}
