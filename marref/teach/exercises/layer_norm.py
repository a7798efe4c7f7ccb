"""Exercises on layer norm."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from marref.layers import layer_norm
from marref.teach.exercise import Exercise, Part, Point, drawn
from marref.trees import Array, Tree

Rng = np.random.Generator


def _norm_points(rng: Rng) -> Sequence[Point]:
    return [
        {
            "params": drawn(layer_norm.init(features), rng),
            "x": rng.normal(1.5, 0.7, (*rows, features)),
            "epsilon": epsilon,
        }
        for rows, features, epsilon in (((3,), 4, 0.3), ((2, 3), 6, 1e-5))
    ]


def _norm_of(centred: Array, variance: Array, params: Tree, epsilon: float) -> Any:
    inverse_std = 1.0 / np.sqrt(variance + epsilon)
    normalised = centred * inverse_std
    y = params["scale"] * normalised + params["bias"]
    return y, {"normalised": normalised, "inverse_std": inverse_std}


def _norm_over_positions(params: Tree, x: Array, epsilon: float) -> Any:
    centred = x - x.mean(axis=-2, keepdims=True)
    return _norm_of(centred, (centred**2).mean(axis=-2, keepdims=True), params, epsilon)


def _norm_over_all(params: Tree, x: Array, epsilon: float) -> Any:
    centred = x - x.mean()
    return _norm_of(centred, (centred**2).mean(keepdims=True), params, epsilon)


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
                "cache.inverse_std": "s = 1/√(σ² + ε), of the shape [..., 1]",
            },
            {
                "mean and variance are taken over the positions, not over the features of each": (
                    _norm_over_positions
                ),
                "mean and variance are taken over the whole array, not for each position": (
                    _norm_over_all
                ),
                "the root is missing: x̂ = (x - μ)/(σ² + ε)": _norm_without_root,
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


def _norm_backward_points(rng: Rng) -> Sequence[Point]:
    points = []
    for point in _norm_points(rng):
        y, cache = layer_norm.forward(**point)
        points.append({"params": point["params"], "dy": rng.normal(size=y.shape), "cache": cache})
    return points


def _norm_backward_with(terms: Any) -> Any:
    def backward(params: Tree, dy: Array, cache: Tree) -> Any:
        dnormalised, normalised = params["scale"] * dy, cache["normalised"]
        dx = cache["inverse_std"] * terms(dnormalised, normalised)
        return dx, layer_norm.backward(params, dy, cache)[1]

    return backward


def _mean(x: Array) -> Array:
    mean: Array = x.mean(axis=-1, keepdims=True)
    return mean


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
            _norm_backward_points,
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
                "the third term has the wrong sign: + x̂ mean(dx̂ ⊙ x̂)": _norm_backward_with(
                    lambda dn, n: dn - _mean(dn) + n * _mean(dn * n)
                ),
                "the third term lacks its factor x̂: mean(dx̂ ⊙ x̂) alone": _norm_backward_with(
                    lambda dn, n: dn - _mean(dn) - _mean(dn * n)
                ),
                "the factor s = 1/√(σ² + ε) before the bracket is missing": (
                    _norm_backward_without_std
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
