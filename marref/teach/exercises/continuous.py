"""Exercise on the continuous model: the diffusion loss."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from marref.continuous import diffusion
from marref.teach.exercise import Exercise, Part, Point, Rng
from marref.trees import Array, Tree


def _points(rng: Rng) -> Sequence[Point]:
    points = []
    for schedule, times in (("cosine", [1, 300, 700]), ("linear", [2, 40, 500, 999])):
        shape = (len(times), 4)
        points.append(
            {
                "steps": diffusion.process(schedule),
                "output": rng.normal(0.0, 0.6, (len(times), 8)),
                "clean": rng.normal(size=shape),
                "index": np.array(times),
                "noise": rng.normal(size=shape),
            }
        )
    return points


def _backward_points(rng: Rng) -> Sequence[Point]:
    points = []
    for point in _points(rng):
        *_, cache = diffusion.loss_forward(**point)
        points.append({"cache": cache, "drows": rng.random(len(point["index"]))})
    return points


def _noise_gradient(factor: Any) -> Any:
    def backward(cache: Tree, drows: Array) -> Array:
        doutput = diffusion.loss_backward(cache, drows)
        size = cache["error"].shape[1]
        doutput[:, :size] *= factor(size)
        return doutput

    return backward


def _variance_untrained(cache: Tree, drows: Array) -> Array:
    doutput = diffusion.loss_backward(cache, drows)
    doutput[:, cache["error"].shape[1] :] = 0.0
    return doutput


def _swapped(cache: Tree, drows: Array) -> Array:
    return np.roll(diffusion.loss_backward(cache, drows), cache["error"].shape[1], axis=1)


def _with_dv(factor: float) -> Any:
    def forward(**point: Any) -> Any:
        error, bound, cache = diffusion.loss_forward(**point)
        return error, bound, {**cache, "dv": cache["dv"] * factor}

    return forward


def _divergence(low: Array, log_variance: Array, square: Any) -> Any:
    """Compute an entry of the bound in nats and its derivative by l, with any number for d²."""
    narrow, wide = np.exp(low - log_variance), square * np.exp(-log_variance)
    return 0.5 * (log_variance - low - 1 + narrow + wide), 0.5 * (1 - narrow - wide)


def _exchanged(low: Array, log_variance: Array, distance: Array) -> Any:
    entry, _ = _divergence(log_variance, low, distance**2)
    return entry, 0.5 * (np.exp(log_variance - low) - 1)


def _with_entries(entries: Any) -> Any:
    """Compute with other entries of the bound, a function of log ṽ, l, d and e - ε."""

    def forward(**point: Any) -> Any:
        squared_error, _, cache = diffusion.loss_forward(**point)
        steps, rows = point["steps"], (point["index"], np.newaxis)
        low, high = steps.low[rows], steps.high[rows]
        v = point["output"][:, cache["error"].shape[1] :]
        distance = (steps.mean_of_clean * steps.to_clean)[rows] * cache["error"]
        log_variance = diffusion.log_variance_of(v, low, high)
        entry, dlog_variance = entries(low, log_variance, distance, cache["error"])
        dv = dlog_variance * 0.5 * (high - low) / np.log(2.0)
        return squared_error, entry.mean(axis=1) / np.log(2.0), {**cache, "dv": dv}

    return forward


def _without_one(low: Array, log_variance: Array, distance: Array) -> Any:
    entry, derivative = _divergence(low, log_variance, distance**2)
    return entry + 0.5, derivative


def _bound_summed(**point: Any) -> Any:
    squared_error, bound, cache = diffusion.loss_forward(**point)
    return squared_error, bound * point["noise"].shape[1], cache


def _chain_cut(**point: Any) -> Any:
    squared_error, bound, cache = diffusion.loss_forward(**point)
    rows = (point["index"], np.newaxis)
    slope = 0.5 * (point["steps"].high - point["steps"].low)[rows]
    return squared_error, bound, {**cache, "dv": cache["dv"] / slope}


def _variance_gradient_summed(cache: Tree, drows: Array) -> Array:
    doutput = diffusion.loss_backward(cache, drows)
    size = cache["error"].shape[1]
    doutput[:, size:] *= size
    return doutput


DIFFUSION_LOSS = Exercise(
    "diffusion-loss",
    "the two parts of the diffusion loss for t >= 1, and their gradient",
    "continuous.md",
    (
        Part(
            "loss_forward",
            diffusion.loss_forward,
            ("squared_error", "bound", "cache"),
            _points,
            {
                "squared_error": "(1/C) Σ (e - ε)², row by row",
                "cache.error": "e - ε, with its sign",
                "bound": "(1/C) Σ ½ (l - log ṽ - 1 + exp(log ṽ - l) + d² exp(-l))/log 2",
                "cache.dv": "∂/∂v of an entry of the bound, without 1/C: ∂/∂l ½ (log β - log ṽ)",
            },
            {
                "∂l/∂v lacks its ½": _with_dv(2.0),
                "dv has the 1/C of the mean, which loss_backward divides by": lambda **point: (
                    _with_dv(1 / point["noise"].shape[1])(**point)
                ),
                "the bound is summed over a token's numbers, where their mean belongs": (
                    _bound_summed
                ),
                "the -1 is missing from the bound": _with_entries(
                    lambda low, log_variance, d, error: _without_one(low, log_variance, d)
                ),
                "dv has the wrong sign": _with_dv(-1.0),
                "dv is in nats: the bound is divided by log 2, and so is its gradient": _with_dv(
                    float(np.log(2.0))
                ),
                "d, the distance of the two means, is missing from the bound": _with_entries(
                    lambda low, log_variance, d, error: _divergence(low, log_variance, 0.0)
                ),
                "d is not squared in the bound": _with_entries(
                    lambda low, log_variance, d, error: _divergence(low, log_variance, d)
                ),
                "d is e - ε in the bound, without the factor c₁ √(1/ᾱ - 1)": _with_entries(
                    lambda low, log_variance, d, error: _divergence(low, log_variance, error**2)
                ),
                "the two variances are in each other's place: the bound has exp(log ṽ - l), and d² "
                "over the variance exp(l)": _with_entries(
                    lambda low, log_variance, d, error: _exchanged(low, log_variance, d)
                ),
                "dv is ∂/∂l: the factor ∂l/∂v = ½ (log β - log ṽ) is missing": _chain_cut,
            },
        ),
        Part(
            "loss_backward",
            diffusion.loss_backward,
            ("doutput",),
            _backward_points,
            {"doutput": "[2 (e - ε)/C, dv/C], each row times drows"},
            {
                "the 2 of the square's derivative is missing": _noise_gradient(lambda size: 0.5),
                "the gradient of e lacks the 1/C of the mean": _noise_gradient(lambda size: size),
                "the gradient of e has the wrong sign: it is 2 (e - ε)": _noise_gradient(
                    lambda size: -1.0
                ),
                "v has no gradient, as if there were no bound": _variance_untrained,
                "the gradients of e and v are in each other's place": _swapped,
                "drows is not used": lambda cache, drows: diffusion.loss_backward(
                    cache, np.ones_like(drows)
                ),
                "the gradient of v lacks the 1/C of the mean": _variance_gradient_summed,
                "divided by the number of rows: their mean, where it is taken, is in drows": (
                    lambda cache, drows: diffusion.loss_backward(cache, drows / len(drows))
                ),
                "neither part has the 1/C of the mean": lambda cache, drows: (
                    diffusion.loss_backward(cache, drows * cache["error"].shape[1])
                ),
            },
        ),
    ),
    (
        "The squared error trains e alone; the bound, in which e is a constant, trains v alone.",
        "With f = (v + 1)/2 and l = f log β + (1 - f) log ṽ: ∂l/∂v = ½ (log β - log ṽ), and "
        "∂/∂l of the bound is ½ (1 - exp(log ṽ - l) - d² exp(-l)).",
        "d = steps.mean_of_clean[t] steps.to_clean[t] (e - ε); cache error = e - ε and "
        "dv = ∂/∂l ∂l/∂v / log 2; doutput = [2 error, dv]/C, each row times drows.",
    ),
)
