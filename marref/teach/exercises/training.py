"""Exercises on training: loss, Adam, mask ratios, the any-order bound."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from marref import loss, masking, optim
from marref.teach.exercise import Exercise, Part, Point, Rng
from marref.trees import Array, Tree


def _loss_points(rng: Rng) -> Sequence[Point]:
    logits = rng.normal(0.0, 2.0, (2, 4, 5))
    targets = np.array([[1, 4, 2, 2], [3, 1, 4, 1]])
    # Three, where there are 2 sequences, 4 positions, 5 ids: no other count can stand for |M|.
    mask = np.array([[True, False, True, False], [False, True, False, False]])
    # Beyond exp's range above and below, and so far apart that probabilities underflow.
    large = 300.0 * logits + np.array([900.0, -900.0])[:, np.newaxis, np.newaxis]
    return [
        {"logits": logits, "targets": targets, "mask": mask},
        {"logits": large, "targets": targets, "mask": mask},
        {"logits": logits, "targets": targets, "mask": mask & [[True], [False]]},
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


def _log_of_softmax(change: Any) -> Any:
    """Compute the logarithm of softmax in two steps, with the probabilities changed between."""
    return lambda logits: np.log(change(np.exp(loss.log_softmax(logits))))


def _loss_over_length(logits: Array, targets: Array, mask: Array) -> Any:
    value, cache = loss.forward(logits, targets, mask)
    return value * mask.sum() / mask.shape[1], cache


def _loss_of_entropy(logits: Array, targets: Array, mask: Array) -> Any:
    _, cache = loss.forward(logits, targets, mask)
    logarithms = cache["log_probabilities"]
    return -(np.exp(logarithms) * logarithms).sum() / max(len(logarithms), 1), cache


def _sum(logits: Array) -> Array:
    """Compute Σ_j exp(z_j - m) of each row."""
    largest = logits.max(axis=-1, keepdims=True)
    total: Array = np.exp(logits - largest).sum(axis=-1, keepdims=True)
    return total


def _guarded() -> dict[str, Any]:
    """Make the mistakes of those who keep the logarithm from 0 by a small number."""
    small = (1e-15, 1e-12, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5)
    added = {
        f"{number:g} is added to p before its logarithm; z - m - log Σ exp(z - m) is finite "
        "without": _log_of_softmax(lambda p, number=number: p + number)
        for number in small
    }
    clipped = {
        f"p is raised to {number:g} before its logarithm, where it is smaller; "
        "z - m - log Σ exp(z - m) is finite without": _log_of_softmax(
            lambda p, number=number: np.maximum(p, number)
        )
        for number in small
    }
    return {text: _loss_of_log_softmax(f) for text, f in (added | clipped).items()}


def _loss_of_nothing(logits: Array, targets: Array, mask: Array) -> Any:
    value, cache = loss.forward(logits, targets, mask)
    return value if mask.any() else np.float64(np.nan), cache


def _loss_positive(logits: Array, targets: Array, mask: Array) -> Any:
    value, cache = loss.forward(logits, targets, mask)
    return -value, cache


def _gradient_with(change: Any, of_logarithms: Any = np.exp) -> Any:
    def backward(cache: Tree) -> Array:
        dlogits = loss.backward(cache)
        count = max(len(cache["targets"]), 1)
        onehot = np.zeros_like(cache["log_probabilities"])
        onehot[np.arange(len(onehot)), cache["targets"]] = 1.0
        dlogits[cache["mask"]] = change(of_logarithms(cache["log_probabilities"]), onehot) / count
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
                **dict.fromkeys(
                    ("cache.log_probabilities", "loss cache.log_probabilities"),
                    "log p_k = (z_k - m) - log Σ_j exp(z_j - m), of the masked positions only",
                ),
                "loss": "L = -(1/|M|) Σ_{i in M} log p_i[y_i]",
            },
            {
                "exp overflows or log is taken of 0: the maximum of each row is not taken off "
                "first": _loss_of_log_softmax(_naive_log_softmax),
                "log is taken of a probability that underflowed to 0: log softmax is z - m less "
                "log Σ exp(z - m), without probabilities between": _loss_of_log_softmax(
                    _log_of_softmax(lambda p: p)
                ),
                **_guarded(),
                "the entropy of p, -Σ p log p: the targets are not used": _loss_of_entropy,
                "the sum of exp is taken off, where its logarithm belongs": _loss_of_log_softmax(
                    lambda logits: loss.log_softmax(logits) + np.log(_sum(logits)) - _sum(logits)
                ),
                "divided by the length, the number of positions, where |M| belongs": (
                    _loss_over_length
                ),
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
                "log p stands where p belongs: the cache has logarithms": _gradient_with(
                    lambda logarithms, onehot: logarithms - onehot, lambda logarithms: logarithms
                ),
                "the sign is wrong: onehot - softmax": _gradient_with(lambda p, onehot: onehot - p),
                "only the target's entry has a gradient; p_k of the others is missing": (
                    _gradient_with(lambda p, onehot: (p - onehot) * onehot)
                ),
                "the target's entry is -1/p, the derivative by the probability, not by the logit": (
                    _gradient_with(lambda p, onehot: np.where(onehot > 0, -1.0 / p, 0.0))
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
    return _applied(point, m, v), m, v


def _without_root(**point: Any) -> Any:
    _, m, v = optim.update(**point)
    return _applied(point, m, v, lambda x: x), m, v


def _applied(point: Any, m: Array, v: Array, root: Any = np.sqrt) -> Array:
    """Take the step of m and v, corrected, with another root."""
    beta1, beta2, t = (point[name] for name in ("beta1", "beta2", "t"))
    return _stepped(point, _unbiased(beta1, t, m), root(_unbiased(beta2, t, v)))


def _stepped(point: Any, corrected_m: Array, root: Array) -> Array:
    direction = corrected_m / (root + point["epsilon"])
    decay = point["weight_decay"] * point["param"]
    param: Array = point["param"] - point["learning_rate"] * (direction + decay)
    return param


def _corrected_by(change: Any) -> Any:
    """Take the step with m̂, v̂ otherwise, made of the point and the new m and v."""

    def update(**point: Any) -> Any:
        _, m, v = optim.update(**point)
        corrected_m, corrected_v = change(point, m, v)
        return _stepped(point, corrected_m, np.sqrt(corrected_v)), m, v

    return update


def _unbiased(beta: float, t: int, moment: Array) -> Any:
    return moment / (1 - beta**t)


def _weights_swapped(**point: Any) -> Any:
    grad, beta1, beta2 = (point[name] for name in ("grad", "beta1", "beta2"))
    m = (1 - beta1) * point["m"] + beta1 * grad
    v = (1 - beta2) * point["v"] + beta2 * grad**2
    return _applied(point, m, v), m, v


def _decay_after_step(**point: Any) -> Any:
    stepped, m, v = optim.update(**{**point, "weight_decay": 0.0})
    return stepped * (1 - point["learning_rate"] * point["weight_decay"]), m, v


def _gradient_not_averaged(**point: Any) -> Any:
    m = point["beta1"] * point["m"] + point["grad"]
    _, _, v = optim.update(**point)
    return _applied(point, m, v), m, v


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
                "β t stands where βᵗ belongs": _corrected_by(
                    lambda point, m, v: (
                        m / (1 - point["beta1"] * point["t"]),
                        v / (1 - point["beta2"] * point["t"]),
                    )
                ),
                "m̂ alone is corrected, v is used as it is": _corrected_by(
                    lambda point, m, v: (_unbiased(point["beta1"], point["t"], m), v)
                ),
                "v̂ alone is corrected, m is used as it is": _corrected_by(
                    lambda point, m, v: (m, _unbiased(point["beta2"], point["t"], v))
                ),
                "the gradient itself stands where its mean m̂ belongs": _corrected_by(
                    lambda point, m, v: (
                        point["grad"],
                        _unbiased(point["beta2"], point["t"], v),
                    )
                ),
                "β and 1 - β are in each other's place": _weights_swapped,
                "weight decay is taken off the step, where it is added to it": _adam_with(
                    weight_decay=lambda point: -point["weight_decay"]
                ),
                "θ decays after the step: what decays is the θ from before it": _decay_after_step,
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
                "1 - cos u: π/2 is missing, the integral of the density over [0, 1] is to be 1": (
                    lambda u: 1.0 - np.cos(u)
                ),
                "sin²(πu/2), with the density 1/(π√(r(1 - r))), as large near 1 as near 0": (
                    lambda u: np.sin(math.pi / 2 * u) ** 2
                ),
                "the angle is in degrees: cos takes radians, π/2 for 90°": lambda u: (
                    1.0 - np.cos(90.0 * u)
                ),
                "(2/π) arccos(u), another schedule, which favours large ratios": lambda u: (
                    2 / math.pi * np.arccos(u)
                ),
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


def _over_unmasked(log_probabilities: Array) -> float:
    places = np.arange(log_probabilities.shape[1])
    without = np.arange(len(log_probabilities))[:, np.newaxis] & ~(1 << places)
    return any_order_bound(log_probabilities[without, places])


def _bits_reversed(log_probabilities: Array) -> float:
    length = log_probabilities.shape[1]
    sets = np.arange(2**length)
    reversed_bits = sum((sets >> i & 1) << (length - 1 - i) for i in range(length))
    return any_order_bound(log_probabilities[reversed_bits])


def _of_all_orders(log_probabilities: Array) -> list[float]:
    return [
        _one_order(lambda _, order=order: order)(log_probabilities)
        for order in itertools.permutations(range(log_probabilities.shape[1]))
    ]


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
                "entries are read where position j is not masked: its bit is cleared before "
                "instead of after, or bits stand for what is known": _over_unmasked,
                "the logarithm of the mean of p(x) over all orders, where the mean of log p(x) is "
                "asked for": lambda log_probabilities: math.log(
                    np.mean(np.exp(_of_all_orders(log_probabilities)))
                ),
                "the largest log p(x) of all orders, where their mean is asked for": (
                    lambda log_probabilities: max(_of_all_orders(log_probabilities))
                ),
                "bits are counted from the left: bit i says whether position i is masked, and bit "
                "0 is the last of s": _bits_reversed,
                "in bits, where nats are asked for": lambda log_probabilities: (
                    any_order_bound(log_probabilities) / math.log(2)
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
