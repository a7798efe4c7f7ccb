"""Faults of attention, forward."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from marref.layers import attention, linear
from marref.trees import Array, Index, Tree
from marref.verify.faults.fault import Fault, Patch, replace, wrap
from marref.verify.faults.feed_forward import ATTENTION_BIASES


def _scaled(factor_of: Callable[[int, int], float]) -> tuple[Patch, Patch]:
    """Compute S = f Q Kᵀ/√d with f = factor_of(head_dim, num_heads): f Q is projected instead of Q.

    dQ = f dS K/√d and dK = f dSᵀ Q/√d: the backward with f K and f Q.
    """

    def forward(old: Any) -> Any:
        def scaled(params: Tree, x: Array, num_heads: int, *rows: Index) -> tuple[Array, Tree]:
            factor = factor_of(x.shape[-1] // num_heads, num_heads)
            query = {name: leaf * factor for name, leaf in params["query"].items()}
            y, cache = old({**params, "query": query}, x, num_heads, *rows)
            return y, {**cache, "query": cache["query"] / factor}

        return scaled

    def backward(old: Any) -> Any:
        def scaled(params: Tree, dy: Array, cache: Tree, *rows: Index) -> tuple[Array, Tree]:
            factor = factor_of(cache["query"].shape[-1], cache["query"].shape[1])
            query, key = cache["query"] * factor, cache["key"] * factor
            result: tuple[Array, Tree] = old(
                params, dy, {**cache, "query": query, "key": key}, *rows
            )
            return result

        return scaled

    return wrap(attention, "forward", forward), wrap(attention, "backward", backward)


def _softmax_with(extra: float) -> Callable[[Array], Array]:
    """a_j = exp(s_j - max) / (Σ exp(s - max) + extra).

    The maximum counts as a constant, so that ∂a_j/∂s_i = a_j (δ_ij - a_i), as without the extra.
    """

    def softmax(scores: Array) -> Array:
        weights: Array = np.exp(scores - scores.real.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True) + extra
        return weights

    return softmax


def _softmax_one(scores: Array) -> Array:
    """a_j = exp(s_j) / (1 + Σ exp(s)), which has the same gradient a_j (δ_ij - a_i)."""
    largest = np.maximum(scores.real.max(axis=-1, keepdims=True), 0.0)
    weights: Array = np.exp(scores - largest)
    weights /= weights.sum(axis=-1, keepdims=True) + np.exp(-largest)
    return weights


def _causal(old: Any) -> Any:
    """Compute S_ij = -inf for j > i."""

    def softmax(scores: Array) -> Array:
        seen = np.tri(scores.shape[-1], dtype=bool)
        weights: Array = old(np.where(seen, scores, -np.inf))
        return weights

    return softmax


def _softmax_over_queries(scores: Array) -> Array:
    """a_ij = exp(s_ij) / Σ_i exp(s_ij)."""
    weights: Array = np.exp(scores - scores.real.max(axis=-2, keepdims=True))
    weights /= weights.sum(axis=-2, keepdims=True)
    return weights


def softmax_gradient(weights: Array, dweights: Array, axis: int = -1) -> Array:
    """ds_i = a_i (da_i - Σ_j a_j da_j), j running over the axis."""
    mean = (weights * dweights).sum(axis=axis, keepdims=True)
    dscores: Array = weights * (dweights - mean)
    return dscores


def backward_with(
    dscores_of: Callable[[Array, Array], Array] = softmax_gradient, *, swapped: bool = False
) -> Callable[[Tree, Array, Tree], tuple[Array, Tree]]:
    """Make an attention backward with another dS = dscores_of(A, dA), or with dQ, dK swapped."""

    def backward(params: Tree, dy: Array, cache: Tree, *_: Index) -> tuple[Array, Tree]:
        query, key, value, weights = (cache[name] for name in ("query", "key", "value", "weights"))
        num_heads, head_dim = query.shape[1], query.shape[-1]
        dcontext, doutput = linear.backward(params["output"], dy, cache["context"])
        dcontext = attention._split_heads(dcontext, num_heads)
        dscores = dscores_of(weights, dcontext @ value.mT) / math.sqrt(head_dim)
        dquery, dkey, dvalue = dscores @ key, dscores.mT @ query, weights.mT @ dcontext
        if swapped:
            dquery, dkey = dkey, dquery
        dx = np.zeros_like(cache["input"])
        grads = {}
        for name, dheads in (("query", dquery), ("key", dkey), ("value", dvalue)):
            dheads = attention._merge_heads(dheads)
            dinput, grads[name] = linear.backward(params[name], dheads, cache["input"])
            dx += dinput
        return dx, {**grads, "output": doutput}

    return backward


def _swapped(tree: Tree) -> Tree:
    """Query for key and key for query."""
    return {**tree, "query": tree["key"], "key": tree["query"]}


def _product_swapped_forward(old: Any) -> Any:
    """Compute S = K Qᵀ/√d; the cache keeps the names."""

    def forward(params: Tree, x: Array, num_heads: int, *rows: Index) -> tuple[Array, Tree]:
        y, cache = old(_swapped(params), x, num_heads, *rows)
        return y, _swapped(cache)

    return forward


def _product_swapped_backward(old: Any) -> Any:
    def backward(params: Tree, dy: Array, cache: Tree, *rows: Index) -> tuple[Array, Tree]:
        dx, grads = old(_swapped(params), dy, _swapped(cache), *rows)
        return dx, _swapped(grads)

    return backward


def _weights_swapped_forward(old: Any) -> Any:
    """Compute Q = x W_K + b_K, K = x W_Q + b_Q."""
    return lambda params, *rest: old(_swapped(params), *rest)


def _weights_swapped_backward(old: Any) -> Any:
    def backward(params: Tree, dy: Array, cache: Tree, *rows: Index) -> tuple[Array, Tree]:
        dx, grads = old(_swapped(params), dy, cache, *rows)
        return dx, _swapped(grads)

    return backward


def _split_features_first(x: Array, num_heads: int) -> Array:
    """[batch, length, head_dim·heads] -> [batch, heads, length, head_dim], heads innermost."""
    batch, length, embed_dim = x.shape
    return x.reshape(batch, length, embed_dim // num_heads, num_heads).transpose(0, 3, 1, 2)


def _merge_features_first(x: Array) -> Array:
    """Undo `_split_features_first`."""
    batch, num_heads, length, head_dim = x.shape
    return x.transpose(0, 2, 3, 1).reshape(batch, length, num_heads * head_dim)


def _split_by_reshape(x: Array, num_heads: int) -> Array:
    """Take the numbers of [batch, length, embed_dim] for [batch, heads, length, head_dim]."""
    batch, length, embed_dim = x.shape
    return x.reshape(batch, num_heads, length, embed_dim // num_heads)


def _merge_by_reshape(x: Array) -> Array:
    """Undo `_split_by_reshape`."""
    batch, num_heads, length, head_dim = x.shape
    return x.reshape(batch, length, num_heads * head_dim)


FAULTS = (
    Fault(
        "attention-unscaled",
        "Scores are Q Kᵀ, without 1/√head_dim. Attention weights are too sharp, and the more so "
        "the wider the heads; query, key and value are right.",
        _scaled(lambda head_dim, num_heads: math.sqrt(head_dim)),
    ),
    Fault(
        "attention-scaled-by-embed-dim",
        "Scores are divided by √embed_dim instead of √head_dim: attention weights are too even. "
        "A model with one head hides it.",
        _scaled(lambda head_dim, num_heads: 1 / math.sqrt(num_heads)),
    ),
    Fault(
        "attention-scaled-without-root",
        "Scores are divided by head_dim instead of its root: attention weights are too even.",
        _scaled(lambda head_dim, num_heads: 1 / math.sqrt(head_dim)),
    ),
    Fault(
        "attention-softmax-over-queries",
        "Softmax runs over the queries: columns of the attention weights add up to 1, rows do not.",
        (
            replace(attention, "_softmax", _softmax_over_queries),
            replace(
                attention,
                "backward",
                backward_with(lambda weights, dweights: softmax_gradient(weights, dweights, -2)),
            ),
        ),
    ),
    Fault(
        "attention-causal",
        "A position sees itself and what lies to its left, a habit from language models; MAR's "
        "attention sees everything. Weights above the diagonal are 0, only the last row is "
        "right.",
        (wrap(attention, "_softmax", _causal),),
    ),
    Fault(
        "attention-heads-innermost",
        "Features are split as [head_dim, heads], so that head h has every heads-th feature "
        "instead of a run of head_dim. A fresh model trains as well; loaded parameters are read "
        "wrongly. Query, key and value hold the right numbers at the wrong places.",
        (
            replace(attention, "_split_heads", _split_features_first),
            replace(attention, "_merge_heads", _merge_features_first),
        ),
    ),
    Fault(
        "attention-heads-reshaped",
        "[batch, length, embed_dim] is reshaped to [batch, heads, length, head_dim] without the "
        "transposition between: a head mixes features and positions. A model with one head "
        "hides it.",
        (
            replace(attention, "_split_heads", _split_by_reshape),
            replace(attention, "_merge_heads", _merge_by_reshape),
        ),
    ),
    Fault(
        "attention-query-and-key-swapped",
        "Scores are K Qᵀ: each position weighs the others by how they would weigh it. Query and "
        "key are right, the scores are transposed.",
        (
            wrap(attention, "forward", _product_swapped_forward),
            wrap(attention, "backward", _product_swapped_backward),
        ),
    ),
    Fault(
        "attention-query-and-key-parameters-swapped",
        "The parameters of query and key are loaded into each other: the order of a fused "
        "projection is taken for key, query, value. Query and key are swapped, and all after "
        "them is wrong.",
        (
            wrap(attention, "forward", _weights_swapped_forward),
            wrap(attention, "backward", _weights_swapped_backward),
        ),
    ),
    Fault(
        "attention-softmax-sum-plus-1e-8",
        "1e-8 is added to the sum of the softmax, as Edifice does, against a division by 0 that "
        "cannot happen: the largest term is 1. Rows of weights add up to 1 - 1e-8 or a little "
        "more: nothing in float32, a difference in float64.",
        (replace(attention, "_softmax", _softmax_with(1e-8)),),
    ),
    Fault(
        "attention-softmax-sum-plus-1e-5",
        "1e-5 is added to the sum of the softmax, a guard that is large enough to be seen in "
        "float32. Rows of weights add up to a little less than 1.",
        (replace(attention, "_softmax", _softmax_with(1e-5)),),
    ),
    Fault(
        "attention-softmax-plus-one",
        "The softmax is exp(s_j)/(1 + Σ exp(s)), which lets a head attend to nothing; a key and "
        "value of zeros beside the others do the same. Rows of weights add up to less than 1.",
        (replace(attention, "_softmax", _softmax_one),),
    ),
    *ATTENTION_BIASES,
)
