"""Exercises on attention."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from marref.layers import attention, linear
from marref.teach.exercise import Exercise, Part, Point, Rng, after_forward, drawn, row_mean
from marref.trees import Array, Tree


def _softmax_points(rng: Rng) -> Sequence[Point]:
    return [
        {"scores": rng.normal(0.0, 1.5, (2, 3, 4))},
        {"scores": rng.normal(0.0, 1.5, (3, 5)) + np.array([[-900.0], [0.0], [900.0]])},
    ]


def _softmax_backward_points(rng: Rng) -> Sequence[Point]:
    weights = [attention.softmax(point["scores"]) for point in _softmax_points(rng)]
    return [{"dweights": rng.normal(size=each.shape), "weights": each} for each in weights]


def _softmax_less(largest: Any) -> Any:
    def softmax(scores: Array) -> Array:
        exponentials = np.exp(scores - largest(scores))
        weights: Array = exponentials / exponentials.sum(axis=-1, keepdims=True)
        return weights

    return softmax


def _softmax_over(axis: int) -> Any:
    def softmax(scores: Array) -> Array:
        weights = attention.softmax(np.moveaxis(scores, axis, -1))
        return np.moveaxis(weights, -1, axis)

    return softmax


def _log_softmax(scores: Array) -> Array:
    logarithms: Array = np.log(attention.softmax(scores))
    return logarithms


def _backward_over(axis: int) -> Any:
    return lambda dweights, weights: (
        weights * (dweights - (weights * dweights).sum(axis=axis, keepdims=True))
    )


def _plain_mean(dweights: Array, weights: Array) -> Any:
    return weights * (dweights - row_mean(dweights))


def _mean_of_products(dweights: Array, weights: Array) -> Any:
    return weights * (dweights - row_mean(weights * dweights))


def _mean_added(dweights: Array, weights: Array) -> Any:
    return weights * (dweights + (weights * dweights).sum(axis=-1, keepdims=True))


def _without_weights(dweights: Array, weights: Array) -> Any:
    return dweights - (weights * dweights).sum(axis=-1, keepdims=True)


def _diagonal(dweights: Array, weights: Array) -> Any:
    return weights * (1 - weights) * dweights


def _sums_over_all(scores: Array) -> Array:
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights: Array = exponentials / exponentials.sum()
    return weights


SOFTMAX = Exercise(
    "softmax",
    "softmax that cannot overflow, and the product with its Jacobian",
    "attention.md",
    (
        Part(
            "softmax",
            attention.softmax,
            ("weights",),
            _softmax_points,
            {"weights": "a_j = exp(s_j - m)/Σ_k exp(s_k - m), m the largest of the row"},
            {
                "exp overflows: the maximum of each row is not taken off first": _softmax_less(
                    lambda scores: 0.0
                ),
                "the maximum of the whole array is taken off instead of each row's: far below it "
                "exp underflows, to 0/0": _softmax_less(lambda scores: scores.max()),
                "the sum is over the whole array instead of each row": _sums_over_all,
                "exp is divided by its largest entry, not by its sum": lambda scores: np.exp(
                    scores - scores.max(axis=-1, keepdims=True)
                ),
                "softmax is over axis 0, another axis than the last": _softmax_over(0),
                "softmax is over axis 1, another axis than the last as soon as there are three": (
                    _softmax_over(1)
                ),
                "the logarithm of the weights: exp of it is missing": _log_softmax,
            },
        ),
        Part(
            "softmax_backward",
            attention.softmax_backward,
            ("dscores",),
            _softmax_backward_points,
            {"dscores": "ds_i = Σ_j da_j ∂a_j/∂s_i with ∂a_j/∂s_i = a_j ([i = j] - a_i)"},
            {
                "the plain mean of da is taken off instead of its mean under a": (_plain_mean),
                "the plain sum of da is taken off instead of the sum of a ⊙ da": (
                    lambda dweights, weights: (
                        weights * (dweights - dweights.sum(axis=-1, keepdims=True))
                    )
                ),
                "a_i² Σ da stands where a_i Σ a da belongs": lambda dweights, weights: (
                    weights * (dweights - weights * dweights.sum(axis=-1, keepdims=True))
                ),
                "the mean of a ⊙ da is taken off, where its sum belongs": (_mean_of_products),
                "Σ a da is over axis 0, another axis than the last": _backward_over(0),
                "Σ a da is over axis 1, another axis than the last as soon as there are three": (
                    _backward_over(1)
                ),
                "softmax is taken of the weights, which are softmax's result already": (
                    lambda dweights, weights: attention.softmax_backward(
                        dweights, attention.softmax(weights)
                    )
                ),
                "the factor a_i before the bracket is missing": _without_weights,
                "the diagonal of the Jacobian alone, da a (1 - a): each a_j depends on all s_i": (
                    _diagonal
                ),
                "the sign of the mean is wrong: it is taken off, not added": (_mean_added),
            },
        ),
    ),
    (
        "Nothing changes if a number is taken off all scores of a row. Which number is safe?",
        "∂ log a_j/∂s_i = [i = j] - a_i, and ∂a_j = a_j ∂ log a_j.",
        "ds_i = a_i (da_i - Σ_j a_j da_j): the mean of da under a is taken off, row by row.",
    ),
)


def _attend_points(rng: Rng) -> Sequence[Point]:
    shapes = ((1, 1, 3, 4), (2, 3, 4, 5))
    return [
        dict(zip(("query", "key", "value"), rng.normal(size=(3, *shape)), strict=True))
        for shape in shapes
    ]


def _attend_scaled(factor: Any, *, after_softmax: bool = False) -> Any:
    """Compute with another factor than 1/√d, before softmax or after it."""

    def attend(query: Array, key: Array, value: Array) -> Any:
        scores = query @ key.mT
        if after_softmax:
            weights = attention.softmax(scores) * factor(query)
        else:
            weights = attention.softmax(scores * factor(query))
        return weights @ value, {"query": query, "key": key, "value": value, "weights": weights}

    return attend


def _context_of_queries(query: Array, key: Array, value: Array) -> Any:
    _, cache = attention.attend(query, key, value)
    return cache["weights"].mT @ value, cache


def _softmax_step(step: Any) -> Any:
    """Compute with another step for softmax, a function of dA and A."""

    def backward(dcontext: Array, cache: Tree) -> Any:
        query, key, value, weights = (cache[name] for name in ("query", "key", "value", "weights"))
        dscores = step(dcontext @ value.mT, weights) / math.sqrt(query.shape[-1])
        return dscores @ key, dscores.mT @ query, weights.mT @ dcontext

    return backward


def _backward_with(change: Any) -> Any:
    def backward(dcontext: Array, cache: Tree) -> Any:
        dweights = dcontext @ cache["value"].mT
        dscores = attention.softmax_backward(dweights, cache["weights"])
        gradients = dict(
            zip(
                ("dquery", "dkey", "dvalue"),
                attention.attend_backward(dcontext, cache),
                strict=True,
            )
        )
        root = math.sqrt(cache["query"].shape[-1])
        return tuple({**gradients, **change(dcontext, cache, dscores / root)}.values())

    return backward


ATTENTION = Exercise(
    "attention",
    "the core of attention: C = softmax(Q Kᵀ/√d) V, and dQ, dK, dV",
    "attention.md",
    (
        Part(
            "attend",
            attention.attend,
            ("context", "cache"),
            _attend_points,
            {
                "context": "C = A V",
                "context cache.weights": "A = softmax(Q Kᵀ/√d), over the keys, which stand last",
                "cache.weights": "A = softmax(Q Kᵀ/√d), over the keys, which stand last",
            },
            {
                "the length stands where head_dim belongs: d is the last axis of Q": _attend_scaled(
                    lambda query: query.shape[-2] ** -0.5
                ),
                "the number of heads stands where head_dim belongs: d is the last axis of Q": (
                    _attend_scaled(lambda query: query.shape[1] ** -0.5)
                ),
                "the scores are multiplied by √d, not divided": _attend_scaled(
                    lambda query: query.shape[-1] ** 0.5
                ),
                "the weights are divided by √d after softmax; it is the scores that are divided": (
                    _attend_scaled(lambda query: query.shape[-1] ** -0.5, after_softmax=True)
                ),
                "C = Aᵀ V: A must not be transposed there": _context_of_queries,
            },
        ),
        Part(
            "attend_backward",
            attention.attend_backward,
            ("dquery", "dkey", "dvalue"),
            after_forward(attention.attend, _attend_points, "dcontext"),
            {
                "dquery dkey": "both come from dS, and dV does not: dA = dC Vᵀ, or softmax's step",
                "dquery": "dQ = dS K/√d",
                "dkey": "dK = dSᵀ Q/√d",
                "dvalue": "dV = Aᵀ dC",
            },
            {
                "dV = A dC: the transpose of A is missing": _backward_with(
                    lambda dcontext, cache, dscores: {"dvalue": cache["weights"] @ dcontext}
                ),
                "dS is A ⊙ (1 - A) ⊙ dA, the diagonal of the Jacobian alone: each weight of a row "
                "depends on all its scores": _softmax_step(_diagonal),
                "dS lacks the factor A before the bracket": _softmax_step(_without_weights),
                "in dS the plain mean of dA is taken off instead of its mean under A": (
                    _softmax_step(_plain_mean)
                ),
                "in dS the mean of dA under A is added, where it is to be taken off": _softmax_step(
                    _mean_added
                ),
                "in dS the sum Σ A dA is over the queries; it belongs to the keys, axis -1": (
                    _softmax_step(_backward_over(-2))
                ),
                "softmax is passed over on the way back: dS = dA": _softmax_step(
                    lambda dweights, weights: dweights
                ),
                "dS = A ⊙ (dA - mean(A ⊙ dA)): the sum stands there, not the mean": _softmax_step(
                    _mean_of_products
                ),
                "dQ lacks the factor 1/√d": _backward_with(
                    lambda dcontext, cache, dscores: {
                        "dquery": dscores @ cache["key"] * math.sqrt(cache["key"].shape[-1])
                    }
                ),
                "dK lacks the factor 1/√d": _backward_with(
                    lambda dcontext, cache, dscores: {
                        "dkey": dscores.mT @ cache["query"] * math.sqrt(cache["key"].shape[-1])
                    }
                ),
                "dK = dS Q/√d: the transpose of dS is missing": _backward_with(
                    lambda dcontext, cache, dscores: {"dkey": dscores @ cache["query"]}
                ),
                "dQ = dSᵀ K/√d: dS must not be transposed there": _backward_with(
                    lambda dcontext, cache, dscores: {"dquery": dscores.mT @ cache["key"]}
                ),
            },
        ),
    ),
    (
        "Three steps, last first: C = A V, A = softmax(S), S = Q Kᵀ/√d. Two are products, and a "
        "product is linear in each factor.",
        "From C_ic = Σ_j A_ij V_jc: dA = dC Vᵀ and dV = Aᵀ dC. Softmax's step is that of the "
        "exercise softmax.",
        "dS_ij = A_ij (dA_ij - Σ_k A_ik dA_ik); then dQ = dS K/√d and dK = dSᵀ Q/√d. x.mT swaps "
        "the last two axes.",
    ),
)


def _heads_points(rng: Rng) -> Sequence[Point]:
    return [
        {
            "params": drawn(attention.init(rng, features, 1.0, 1.0), rng),
            "x": rng.normal(size=(batch, length, features)),
            "num_heads": heads,
        }
        for batch, length, features, heads in ((1, 3, 4, 2), (2, 4, 6, 3))
    ]


_NAMES = ("query", "key", "value")


def _forward_with(
    *, names: Sequence[str] = _NAMES, merge: Any = attention.merge_heads, project: bool = True
) -> Any:
    """Compute with other projections, merged otherwise, or not projected at the end."""

    def forward(params: Tree, x: Array, num_heads: int) -> Any:
        heads = (
            attention.split_heads(linear.forward(params[name], x)[0], num_heads) for name in names
        )
        context = merge(attention.attend(*heads)[0])
        return linear.forward(params["output"], context)[0] if project else context, None

    return forward


def _with_x_added(params: Tree, x: Array, num_heads: int) -> Any:
    return x + attention.forward(params, x, num_heads)[0], None


def _side_by_side(x: Array) -> Array:
    """Merge the heads, but leave out that their axis moves."""
    batch, num_heads, length, head_dim = x.shape
    return x.reshape(batch, length, num_heads * head_dim)


def _heads_backward_with(
    *,
    split: Any = attention.split_heads,
    merge: Any = attention.merge_heads,
    dx_of: Sequence[str] = _NAMES,
    skip: bool = False,
) -> Any:
    """Compute with heads split or merged otherwise, dx of some projections alone, or a skip."""

    def backward(params: Tree, dy: Array, cache: Tree) -> Any:
        grads = {}
        dcontext, grads["output"] = linear.backward(params["output"], dy, cache["context"])
        dheads = attention.attend_backward(split(dcontext, cache["query"].shape[1]), cache)
        dx = dy * skip
        for name, dhead in zip(_NAMES, dheads, strict=True):
            dinput, grads[name] = linear.backward(params[name], merge(dhead), cache["input"])
            dx += dinput * (name in dx_of)
        return dx, grads

    return backward


def _split_without_moving(x: Array, num_heads: int) -> Array:
    batch, length, embed_dim = x.shape
    return x.reshape(batch, num_heads, length, embed_dim // num_heads)


def _output_kernel_of_input(params: Tree, dy: Array, cache: Tree) -> Any:
    dx, grads = attention.backward(params, dy, cache)
    _, output = linear.backward(params["output"], dy, cache["input"])
    return dx, {**grads, "output": output}


def _output_projection_skipped(params: Tree, dy: Array, cache: Tree) -> Any:
    _, grads = attention.backward(params, dy, cache)
    identity = {**params["output"], "kernel": np.eye(dy.shape[-1])}
    dx, wrong = attention.backward({**params, "output": identity}, dy, cache)
    return dx, {**wrong, "output": grads["output"]}


HEADS = Exercise(
    "heads",
    "multi-head attention around attend: projections, heads, and all their gradients",
    "attention.md",
    (
        Part(
            "forward",
            attention.forward,
            ("y", None),
            _heads_points,
            {"y": "project, split into heads, attend, merge, project"},
            {
                "the heads are split right, and merged without moving the axis of the heads back": (
                    _forward_with(merge=_side_by_side)
                ),
                "the output projection is left out": _forward_with(project=False),
                "keys have the projection of the queries": _forward_with(
                    names=("query", "query", "value")
                ),
                "values have the projection of the queries": _forward_with(
                    names=("query", "key", "query")
                ),
                "values have the projection of the keys": _forward_with(
                    names=("query", "key", "key")
                ),
                "all three have the projection of the queries": _forward_with(
                    names=("query", "query", "query")
                ),
                "x is added; the residual sum is the block's": _with_x_added,
            },
        ),
        Part(
            "backward",
            attention.backward,
            ("dx", "grads"),
            after_forward(attention.forward, _heads_points),
            {"dx": "x feeds three projections: their gradients add"},
            {
                "dx is that through the queries alone: keys and values depend on x too": (
                    _heads_backward_with(dx_of=("query",))
                ),
                "dx is that through the keys alone: queries and values depend on x too": (
                    _heads_backward_with(dx_of=("key",))
                ),
                "dx is that through the values alone: queries and keys depend on x too": (
                    _heads_backward_with(dx_of=("value",))
                ),
                "dx starts at dy, as if the layer had a skip; that is the block's": (
                    _heads_backward_with(skip=True)
                ),
                "the heads' gradients are merged without moving the axis of the heads back": (
                    _heads_backward_with(merge=_side_by_side)
                ),
                "dcontext is split without moving the axis of the heads": _heads_backward_with(
                    split=_split_without_moving
                ),
                "dcontext is split, and the heads' gradients merged, without moving the axis of "
                "the heads": _heads_backward_with(split=_split_without_moving, merge=_side_by_side),
                "the output projection's kernel gradient takes the layer's input; its own is the "
                "context": _output_kernel_of_input,
                "dy goes to the heads without passing back through the output projection": (
                    _output_projection_skipped
                ),
            },
        ),
    ),
    (
        "forward: three linear layers, split into heads, attend, merge, one linear layer. "
        "backward reads the same from bottom to top.",
        "Splitting and merging move numbers and compute nothing: the backward of a merge is a "
        "split, and the other way round. x feeds three projections: three gradients add up in dx.",
        "dcontext, grads['output'] = linear.backward(params['output'], dy, cache['context']); "
        "split it, attend_backward, merge each of the three, and pass it through its projection "
        "with cache['input'].",
    ),
    is_long=True,
)
