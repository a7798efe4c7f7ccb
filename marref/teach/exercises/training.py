"""Exercises on training: loss, Adam, mask ratios, the any-order bound."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from marref import loss, masking, optim
from marref.teach.exercise import Exercise, Part, Point
from marref.trees import Array, Tree

Rng = np.random.Generator


def _loss_points(rng: Rng) -> Sequence[Point]:
    logits = rng.normal(0.0, 2.0, (2, 4, 5))
    targets = np.array([[1, 4, 2, 2], [3, 1, 4, 1]])
    mask = np.array([[True, False, True, True], [False, True, False, False]])
    large = logits + np.array([900.0, -900.0])[:, np.newaxis, np.newaxis]
    return [
        {"logits": logits, "targets": targets, "mask": mask},
        {"logits": large, "targets": targets, "mask": mask},
        {"logits": logits, "targets": targets, "mask": np.zeros_like(mask)},
    ]


def _loss_backward_points(rng: Rng) -> Sequence[Point]:
    return [{"cache": loss.forward(**point)[1]} for point in _loss_points(rng)]


def _loss_of_log_softmax(log_softmax: Any) -> Any:
    def forward(logits: Array, targets: Array, mask: Array) -> Any:
        log_probabilities, ids = log_softmax(logits[mask]), targets[mask]
        total = -log_probabilities[np.arange(len(ids)), ids].sum()
        cache = {"mask": mask, "targets": ids, "log_probabilities": log_probabilities}
        return total / max(len(ids), 1), cache

    return forward


def _naive_log_softmax(logits: Array) -> Array:
    exponentials = np.exp(logits)
    logarithm: Array = np.log(exponentials / exponentials.sum(axis=-1, keepdims=True))
    return logarithm


def _loss_of_nothing(logits: Array, targets: Array, mask: Array) -> Any:
    value, cache = loss.forward(logits, targets, mask)
    return value if mask.any() else np.float64(np.nan), cache


def _loss_positive(logits: Array, targets: Array, mask: Array) -> Any:
    value, cache = loss.forward(logits, targets, mask)
    return -value, cache


def _gradient_with(change: Any) -> Any:
    def backward(cache: Tree) -> Array:
        dlogits = loss.backward(cache)
        count = max(len(cache["targets"]), 1)
        onehot = np.zeros_like(cache["log_probabilities"])
        onehot[np.arange(len(onehot)), cache["targets"]] = 1.0
        probabilities = np.exp(cache["log_probabilities"])
        dlogits[cache["mask"]] = change(probabilities, onehot) / count
        return dlogits

    return backward


LOSS = Exercise(
    "loss",
    "the mean cross-entropy at masked positions, and its gradient",
    "loss.md",
    (
        Part(
            "forward",
            loss.forward,
            ("loss", "cache"),
            _loss_points,
            {
                "cache.log_probabilities": "log p_k = (z_k - m) - log Σ_j exp(z_j - m), of the "
                "masked positions only",
                "loss": "L = -(1/|M|) Σ_{i in M} log p_i[y_i]",
            },
            {
                "exp overflows or log is taken of 0: the maximum of each row is not taken off "
                "first": _loss_of_log_softmax(_naive_log_softmax),
                "with nothing masked the loss is 0/0, where 0 is asked for": _loss_of_nothing,
                "the sign is missing: the loss is the mean of -log p": _loss_positive,
            },
        ),
        Part(
            "backward",
            loss.backward,
            ("dlogits",),
            _loss_backward_points,
            {"dlogits": "dz_i = (softmax(z_i) - onehot(y_i))/|M|, and 0 where i is not masked"},
            {
                "the sign is wrong: onehot - softmax": _gradient_with(lambda p, onehot: onehot - p),
                "only the target's entry has a gradient; p_k of the others is missing": (
                    _gradient_with(lambda p, onehot: (p - onehot) * onehot)
                ),
                "the target's entry is -1/p, the derivative by the probability, not by the logit": (
                    _gradient_with(lambda p, onehot: -onehot / p)
                ),
            },
        ),
    ),
    (
        "For one masked position L = log Σ_j exp z_j - z_y. Differentiate by z_k, for k = y and "
        "for another k.",
        "∂/∂z_k = p_k - [k = y]; the mean over the masked positions divides by |M|.",
        "log p = z - m - log Σ exp(z - m) with m the row's maximum; dlogits is zero but for "
        "(exp(log p) - onehot)/|M| at the masked positions; max(|M|, 1) saves the empty batch.",
    ),
)


def _adam_points(rng: Rng) -> Sequence[Point]:
    numbers = {"learning_rate": 0.03, "beta1": 0.8, "beta2": 0.9, "epsilon": 0.01}
    points = []
    for t, decay in ((1, 0.0), (3, 0.2)):
        m, param, grad = rng.normal(size=(3, 2, 3))
        v = rng.random((2, 3))
        started = {"m": m * (t > 1), "v": v * (t > 1)}
        points.append(
            {"param": param, "grad": grad, **started, "t": t, **numbers, "weight_decay": decay}
        )
    return points


def _adam_with(**changes: Any) -> Any:
    def update(**point: Any) -> Any:
        return optim.update(**{**point, **{name: f(point) for name, f in changes.items()}})

    return update


def _ascent(param: Array, **point: Any) -> Any:
    new, m, v = optim.update(param, **point)
    return 2 * param - new, m, v


def _second_moment_unsquared(**point: Any) -> Any:
    grad, beta2 = point["grad"], point["beta2"]
    _, m, _ = optim.update(**point)
    v = beta2 * point["v"] + (1.0 - beta2) * grad
    return _applied(point, m, v, np.sqrt), m, v


def _without_root(**point: Any) -> Any:
    _, m, v = optim.update(**point)
    return _applied(point, m, v, lambda x: x), m, v


def _applied(point: Any, m: Array, v: Array, root: Any) -> Array:
    corrected_m = m / (1.0 - point["beta1"] ** point["t"])
    corrected_v = v / (1.0 - point["beta2"] ** point["t"])
    direction = corrected_m / (root(corrected_v) + point["epsilon"])
    param: Array = point["param"] - point["learning_rate"] * (
        direction + point["weight_decay"] * point["param"]
    )
    return param


def _gradient_not_averaged(**point: Any) -> Any:
    m = point["beta1"] * point["m"] + point["grad"]
    _, _, v = optim.update(**point)
    return _applied(point, m, v, np.sqrt), m, v


def _corrected_moments_kept(**point: Any) -> Any:
    param, m, v = optim.update(**point)
    return param, m / (1 - point["beta1"] ** point["t"]), v / (1 - point["beta2"] ** point["t"])


ADAM = Exercise(
    "adam",
    "one step of Adam on one array, with decoupled weight decay",
    "adam.md",
    (
        Part(
            "update",
            optim.update,
            ("param", "m", "v"),
            _adam_points,
            {
                "m": "m ← β₁ m + (1 - β₁) g",
                "v": "v ← β₂ v + (1 - β₂) g²",
                "param": "θ ← θ - η (m̂/(√v̂ + ε) + λ θ), with m̂ = m/(1 - β₁ᵗ), v̂ = v/(1 - β₂ᵗ)",
            },
            {
                "the step goes up the gradient: it must be taken off": _ascent,
                "v is the mean of g, where that of g² belongs": _second_moment_unsquared,
                "the root of v̂ is missing": _without_root,
                "m lacks the factor 1 - β₁ before g": _gradient_not_averaged,
                "the corrected m̂ and v̂ are returned; m and v are what the next step needs": (
                    _corrected_moments_kept
                ),
                "weight decay is left out": _adam_with(weight_decay=lambda point: 0.0),
                "beta1 and beta2 are swapped": _adam_with(
                    beta1=lambda point: point["beta2"], beta2=lambda point: point["beta1"]
                ),
            },
        ),
    ),
    (
        "m and v are running means that start at 0, so they are too small at first.",
        "m̂ = m/(1 - β₁ᵗ), v̂ = v/(1 - β₂ᵗ); ε is added to the root, not under it.",
        "θ - η (m̂/(√v̂ + ε) + λ θ): decay is multiplied by η and never enters m or v. Return θ, "
        "m, v, with m and v uncorrected.",
    ),
)


def _ratio_points(rng: Rng) -> Sequence[Point]:
    return [{"u": np.sort(rng.random(6))}, {"u": np.array([0.0, 0.25, 0.9])}]


MASK_RATIO = Exercise(
    "mask-ratio",
    "draw a mask ratio by inverse transform, from its density (2/π)/√(r(2 - r))",
    "masking.md",
    (
        Part(
            "one_minus_cosine",
            masking.one_minus_cosine,
            ("ratio",),
            _ratio_points,
            {"ratio": "solve P(r) = u for r, P being the integral of the density from 0"},
            {
                "u itself: every ratio equally likely": lambda u: u,
                "the distribution function P(u), where its inverse belongs": lambda u: (
                    2 / math.pi * np.arccos(1 - u)
                ),
                "sin(πu/2), with the density (2/π)/√(1 - r²), which favours large ratios": (
                    lambda u: np.sin(math.pi / 2 * u)
                ),
                "the density at u, where the inverse of the distribution belongs": lambda u: (
                    (2 / math.pi) / np.sqrt(u * (2 - u))
                ),
                "the argument of the cosine lacks the factor ½: u = 1 gives 2": lambda u: (
                    1.0 - np.cos(math.pi * u)
                ),
                "the inverse of 1 - P: right in distribution, but it falls with u": lambda u: (
                    1.0 - np.sin(math.pi / 2 * u)
                ),
            },
        ),
    ),
    (
        "If u is uniform and P the distribution function, which r has P(r) = u?",
        "Substitute r = 1 - cos θ: √(r(2 - r)) = sin θ, and dr = sin θ dθ.",
        "P(r) = (2/π) arccos(1 - r), so r = 1 - cos(πu/2), which is 2 sin²(πu/4).",
    ),
)


def any_order_bound(log_probabilities: Array) -> float:
    """Compute the mean over all orders of log p(x), in nats, from its definition.

    Parameters
    ----------
    log_probabilities : array [2**length, length]
        Entry [s, j] is log p(x_j | what is not masked), bit i of s saying that position i is.
        Defined where j itself is masked.

    Returns
    -------
    float
        E_o Σ_i log p(x_{o_i} | x_{o_<i}).
    """
    length = log_probabilities.shape[1]
    total = 0.0
    for order in itertools.permutations(range(length)):
        masked = 2**length - 1
        for position in order:
            total += log_probabilities[masked, position]
            masked -= 2**position
    return total / math.factorial(length)


def _bound_points(rng: Rng) -> Sequence[Point]:
    return [
        {"log_probabilities": -rng.gamma(1.5, size=(2**length, length))} for length in (2, 3, 4)
    ]


def _over_sets(weight: Any) -> Any:
    def bound(log_probabilities: Array) -> float:
        length = log_probabilities.shape[1]
        total = 0.0
        for masked in range(1, 2**length):
            places = [j for j in range(length) if masked >> j & 1]
            size = len(places)
            total += weight(length, size) * sum(log_probabilities[masked, j] for j in places)
        return total

    return bound


def _one_order(positions: Any) -> Any:
    def bound(log_probabilities: Array) -> float:
        length = log_probabilities.shape[1]
        masked, total = 2**length - 1, 0.0
        for position in positions(range(length)):
            total += log_probabilities[masked, position]
            masked -= 2**position
        return total

    return bound


BOUND = Exercise(
    "bound",
    "the any-order bound on the likelihood of a short sequence, exactly",
    "likelihood.md",
    (
        Part(
            "any_order_bound",
            any_order_bound,
            ("bound",),
            _bound_points,
            {"bound": "L · E_t E_S (1/t) Σ_{j in S} log p(x_j | x outside S), t uniform in 1..L"},
            {
                "one order alone, from left to right: the bound is the mean over all": _one_order(
                    iter
                ),
                "one order alone, from right to left: the bound is the mean over all": _one_order(
                    reversed
                ),
                "all sets S have the same weight: it is the sizes t that are equally likely": (
                    _over_sets(lambda n, t: n / t / (2**n - 1))
                ),
                "the 1/t is missing: of the t masked positions one comes next": _over_sets(
                    lambda n, t: 1 / math.comb(n, t)
                ),
                "the factor L is missing: the bound is of the whole sequence": _over_sets(
                    lambda n, t: 1 / (n * t * math.comb(n, t))
                ),
                "everything is predicted at once, from all [MASK]": lambda log_probabilities: float(
                    log_probabilities[-1].sum()
                ),
                "the sign is that of a cost: the bound is on log p(x), which is negative": (
                    lambda log_probabilities: -any_order_bound(log_probabilities)
                ),
                "the sum over all orders lacks its division by L!": lambda log_probabilities: (
                    any_order_bound(log_probabilities) * math.factorial(log_probabilities.shape[1])
                ),
            },
        ),
    ),
    (
        "In one order, positions are predicted one after the other; what is masked before each?",
        "Average over all L! orders; or note that before place i a random set S of size "
        "t = L - i + 1 is masked, and the next position is any of S.",
        "Start with all bits of s set; for each position of an order add entry [s, position] and "
        "clear its bit. Mean over itertools.permutations.",
    ),
)
