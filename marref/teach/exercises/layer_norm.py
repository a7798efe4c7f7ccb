"""Exercises on layer norm."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from marref.layers import layer_norm
from marref.teach.exercise import Exercise, Part, Point, Rng, after_forward, drawn, row_mean
from marref.trees import Array, Tree


def _norm_points(rng: Rng) -> Sequence[Point]:
    return [
        {
            "params": drawn(layer_norm.init(features), rng),
            "x": rng.normal(mean, 0.7, (*rows, features)),
            "epsilon": epsilon,
        }
        for rows, features, epsilon, mean in (
            ((3,), 4, 0.3, 1.5),
            ((2, 3), 6, 1e-5, 1.5),
            ((2,), 5, 0.1, 1000.0),  # Where mean(x²) - μ² loses its digits.
        )
    ]


def _norm_of(centred: Array, variance: Array, params: Tree, epsilon: float) -> Any:
    inverse_std = 1.0 / np.sqrt(variance + epsilon)
    normalised = centred * inverse_std
    y = params["scale"] * normalised + params["bias"]
    return y, {"normalised": normalised, "inverse_std": inverse_std}


def _norm_over(axis: int) -> Any:
    def forward(params: Tree, x: Array, epsilon: float) -> Any:
        centred = x - x.mean(axis=axis, keepdims=True)
        return _norm_of(centred, (centred**2).mean(axis=axis, keepdims=True), params, epsilon)

    return forward


def _norm_over_all(params: Tree, x: Array, epsilon: float) -> Any:
    centred = x - x.mean()
    variance = np.full((*x.shape[:-1], 1), (centred**2).mean())
    return _norm_of(centred, variance, params, epsilon)


def _norm_with_centre_and_variance(of: Any) -> Any:
    def forward(params: Tree, x: Array, epsilon: float) -> Any:
        mean = x.mean(axis=-1, keepdims=True)
        centred, variance = of(x, mean, x.var(axis=-1, keepdims=True), epsilon)
        return _norm_of(centred, variance, params, epsilon)

    return forward


def _bias_before_scale(params: Tree, x: Array, epsilon: float) -> Any:
    _, cache = layer_norm.forward(params, x, epsilon)
    return params["scale"] * (cache["normalised"] + params["bias"]), cache


def _std_kept(params: Tree, x: Array, epsilon: float) -> Any:
    y, cache = layer_norm.forward(params, x, epsilon)
    return y, {**cache, "inverse_std": 1.0 / cache["inverse_std"]}


def _norm_without_root(params: Tree, x: Array, epsilon: float) -> Any:
    _, cache = layer_norm.forward(params, x, epsilon)
    squared = cache["inverse_std"] ** 2
    normalised = (x - x.mean(axis=-1, keepdims=True)) * squared
    return params["scale"] * normalised + params["bias"], {
        "normalised": normalised,
        "inverse_std": squared,
    }


LAYER_NORM = Exercise(
    "layer-norm",
    "normalise every position over its features",
    "layer-norm.md",
    (
        Part(
            "forward",
            layer_norm.forward,
            ("y", "cache"),
            _norm_points,
            {
                "y": "y = γ ⊙ x̂ + β",
                "y cache.normalised": "x̂ = (x - μ) s; with it y is wrong, too",
                "y cache.normalised cache.inverse_std": "μ and σ², the means of x and (x - μ)² "
                "over the features, and s = 1/√(σ² + ε)",
                "cache.inverse_std": "s = 1/√(σ² + ε), of the shape [..., 1]",
            },
            {
                "mean and variance are taken over the positions, axis -2, not over the features of "
                "each": _norm_over(-2),
                "mean and variance are taken over axis 0, as in batch norm, not over the features "
                "of each position": _norm_over(0),
                "mean and variance are taken over the whole array, not for each position": (
                    _norm_over_all
                ),
                "the root is missing: x̂ = (x - μ)/(σ² + ε)": _norm_without_root,
                "ε is left out: x̂ = (x - μ)/σ": _norm_with_centre_and_variance(
                    lambda x, mean, variance, epsilon: (x - mean, variance - epsilon)
                ),
                "the variance lacks its 1/n: Σ (x - μ)² stands where the mean belongs": (
                    _norm_with_centre_and_variance(
                        lambda x, mean, variance, epsilon: (x - mean, variance * x.shape[-1])
                    )
                ),
                "the mean is not taken off: x̂ = x s": _norm_with_centre_and_variance(
                    lambda x, mean, variance, epsilon: (x, variance)
                ),
                "the variance is mean(x²) - μ², whose digits cancel where μ is large beside σ; the "
                "mean of (x - μ)² keeps them": _norm_with_centre_and_variance(
                    lambda x, mean, variance, epsilon: (
                        x - mean,
                        (x * x).mean(axis=-1, keepdims=True) - mean * mean,
                    )
                ),
                "β is added before γ multiplies: γ (x̂ + β)": _bias_before_scale,
                "√(σ² + ε) is kept as inverse_std, where its inverse is asked for": _std_kept,
            },
        ),
    ),
    (
        "Mean and variance of which numbers? Each position stands for itself.",
        "The variance is the mean of (x - μ)², with 1/n; ε is added to it before the root.",
        "Take mean and variance over axis -1 with keepdims=True, keep s = 1/√(σ² + ε) and "
        "x̂ = (x - μ) s, and return γ x̂ + β with both.",
    ),
)


def _norm_backward_with(terms: Any) -> Any:
    def backward(params: Tree, dy: Array, cache: Tree) -> Any:
        dnormalised, normalised = params["scale"] * dy, cache["normalised"]
        dx = cache["inverse_std"] * terms(dnormalised, normalised)
        return dx, layer_norm.backward(params, dy, cache)[1]

    return backward


def _norm_backward_by_variance(params: Tree, dy: Array, cache: Tree) -> Any:
    """Compute dx as by the gradient of σ², with x̂ taken for x - μ."""
    dnormalised, s = params["scale"] * dy, cache["inverse_std"]
    third = s**2 * cache["normalised"] * row_mean(dnormalised * cache["normalised"])
    dx = s * (dnormalised - row_mean(dnormalised) - third)
    return dx, layer_norm.backward(params, dy, cache)[1]


def _norm_backward_unscaled_means(params: Tree, dy: Array, cache: Tree) -> Any:
    normalised = cache["normalised"]
    dx = cache["inverse_std"] * (
        params["scale"] * dy - row_mean(dy) - normalised * row_mean(dy * normalised)
    )
    return dx, layer_norm.backward(params, dy, cache)[1]


def _norm_backward_scaled_twice(params: Tree, dy: Array, cache: Tree) -> Any:
    dx, grads = layer_norm.backward(params, dy, cache)
    return dx * params["scale"], grads


def _parameter_gradients_averaged(params: Tree, dy: Array, cache: Tree) -> Any:
    dx, grads = layer_norm.backward(params, dy, cache)
    return dx, {name: grad / dy[..., 0].size for name, grad in grads.items()}


def _norm_backward_without_std(params: Tree, dy: Array, cache: Tree) -> Any:
    dx, grads = layer_norm.backward(params, dy, cache)
    return dx / cache["inverse_std"], grads


def _scale_gradient_scaled(params: Tree, dy: Array, cache: Tree) -> Any:
    dx, grads = layer_norm.backward(params, dy, cache)
    return dx, {**grads, "scale": grads["scale"] * params["scale"]}


def _bias_gradient_scaled(params: Tree, dy: Array, cache: Tree) -> Any:
    dx, grads = layer_norm.backward(params, dy, cache)
    return dx, {**grads, "bias": grads["bias"] * params["scale"]}


def _scale_gradient_without_normalised(params: Tree, dy: Array, cache: Tree) -> Any:
    dx, grads = layer_norm.backward(params, dy, cache)
    return dx, {**grads, "scale": grads["bias"]}


LAYER_NORM_BACKWARD = Exercise(
    "layer-norm-backward",
    "the three terms of layer norm's gradient",
    "layer-norm.md",
    (
        Part(
            "backward",
            layer_norm.backward,
            ("dx", "grads"),
            after_forward(layer_norm.forward, _norm_points),
            {
                "dx": "x_i acts on x̂_j in three ways: directly, through μ, and through s",
                "grads.scale": "dγ = Σ_positions dy ⊙ x̂",
                "grads.bias": "dβ = Σ_positions dy",
            },
            {
                "sums stand where means belong: 1/n is missing in both": _norm_backward_with(
                    lambda dn, n: (
                        dn
                        - dn.sum(axis=-1, keepdims=True)
                        - n * (dn * n).sum(axis=-1, keepdims=True)
                    )
                ),
                "the 1/n before the bracket is missing: n dx̂ - Σ dx̂ - x̂ Σ dx̂ ⊙ x̂ is n times "
                "the bracket": _norm_backward_with(
                    lambda dn, n: n.shape[-1] * (dn - row_mean(dn) - n * row_mean(dn * n))
                ),
                "the means are taken over axis 0, where those over the features belong": (
                    _norm_backward_with(
                        lambda dn, n: (
                            dn
                            - dn.mean(axis=0, keepdims=True)
                            - n * (dn * n).mean(axis=0, keepdims=True)
                        )
                    )
                ),
                "γ is missing from the means: they are of dy and dy ⊙ x̂, where dx̂ = γ ⊙ dy "
                "belongs": _norm_backward_unscaled_means,
                "x̂ stands for x - μ in the gradient of the variance: with x - μ = x̂/s, the third "
                "term loses a factor s²": _norm_backward_by_variance,
                "the second term has the wrong sign: + mean(dx̂)": _norm_backward_with(
                    lambda dn, n: dn + row_mean(dn) - n * row_mean(dn * n)
                ),
                "the second term lacks its 1/n: Σ dx̂ stands where the mean belongs": (
                    _norm_backward_with(
                        lambda dn, n: dn - dn.sum(axis=-1, keepdims=True) - n * row_mean(dn * n)
                    )
                ),
                "the third term lacks its 1/n: Σ dx̂ ⊙ x̂ stands where the mean belongs": (
                    _norm_backward_with(
                        lambda dn, n: dn - row_mean(dn) - n * (dn * n).sum(axis=-1, keepdims=True)
                    )
                ),
                "γ multiplies twice: it is in dx̂ = γ ⊙ dy already": _norm_backward_scaled_twice,
                "the third term has the wrong sign: + x̂ mean(dx̂ ⊙ x̂)": _norm_backward_with(
                    lambda dn, n: dn - row_mean(dn) + n * row_mean(dn * n)
                ),
                "the third term lacks its factor x̂: mean(dx̂ ⊙ x̂) alone": _norm_backward_with(
                    lambda dn, n: dn - row_mean(dn) - row_mean(dn * n)
                ),
                "the factor s = 1/√(σ² + ε) before the bracket is missing": (
                    _norm_backward_without_std
                ),
                "dγ and dβ are means over the positions; the positions' gradients add up": (
                    _parameter_gradients_averaged
                ),
                "dγ is summed over dx̂ ⊙ x̂ where dy ⊙ x̂ belongs: γ is in it": _scale_gradient_scaled,
                "dβ is summed over dx̂ where dy belongs: γ is in it": _bias_gradient_scaled,
                "dγ lacks the factor x̂: it is dβ": _scale_gradient_without_normalised,
            },
        ),
    ),
    (
        "y_j = γ_j x̂_j + β_j: what reaches x̂? And in how many ways does one x_i act on x̂_j?",
        "∂μ/∂x_i = 1/n and ∂s/∂x_i = -(s²/n) x̂_i, so ∂x̂_j/∂x_i = s ([i = j] - 1/n - x̂_i x̂_j/n).",
        "With dx̂ = γ ⊙ dy: dx = s (dx̂ - mean(dx̂) - x̂ mean(dx̂ ⊙ x̂)), means over the features; "
        "dγ and dβ are sums over all positions of dy ⊙ x̂ and dy.",
    ),
)
