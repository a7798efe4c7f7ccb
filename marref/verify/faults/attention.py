"""Faults of attention, forward."""

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from marref.layers import attention
from marref.layers.attention import attend, attend_backward, softmax, softmax_backward
from marref.trees import Array, Tree
from marref.verify.faults.fault import Fault, Stage
from marref.verify.faults.feed_forward import with_params, without_biases

fault = Stage()


def _scores_times(fault: Fault, factor: Callable[[int, int], float]) -> None:
    """Compute S = f Q Kᵀ/√d with f = factor(head_dim, num_heads);  dQ and dK times f."""

    @fault.wraps(attend)
    def _(old: Any, query: Array, key: Array, value: Array) -> Any:
        context, cache = old(factor(query.shape[-1], query.shape[1]) * query, key, value)
        return context, {**cache, "query": query}

    dscores_times(fault, factor)


def dscores_times(fault: Fault, factor: Callable[[int, int], float]) -> None:
    """Compute dQ and dK times factor(head_dim, num_heads)."""

    @fault.wraps(attend_backward)
    def _(old: Any, dcontext: Array, cache: Tree) -> Any:
        f = factor(dcontext.shape[-1], dcontext.shape[1])
        dquery, dkey, dvalue = old(dcontext, cache)
        return f * dquery, f * dkey, dvalue


def _swapped(tree: Tree) -> Tree:
    """Put query for key and key for query."""
    return {**tree, "query": tree["key"], "key": tree["query"]}


def _softmax_with(scores: Array, extra: float) -> Array:
    """Compute a_j = exp(s_j - max) / (Σ exp(s - max) + extra).

    The maximum counts as a constant, so that ∂a_j/∂s_i = a_j ([i = j] - a_i), as without the extra.
    """
    exponentials = np.exp(scores - scores.real.max(axis=-1, keepdims=True))
    weights: Array = exponentials / (exponentials.sum(axis=-1, keepdims=True) + extra)
    return weights


fault("attention-unscaled").sets("attention scale").says(
    "Scores are Q Kᵀ, without 1/√head_dim. Attention weights are too sharp, and the more so the "
    "wider the heads; query, key and value are right."
).of(_scores_times)(lambda head_dim, num_heads: math.sqrt(head_dim))
fault("attention-scaled-by-embed-dim").sets("attention scale").says(
    "Scores are divided by √embed_dim instead of √head_dim: attention weights are too even. A "
    "model with one head hides it."
).of(_scores_times)(lambda head_dim, num_heads: 1 / math.sqrt(num_heads))
fault("attention-scaled-without-root").sets("attention scale").says(
    "Scores are divided by head_dim instead of its root: attention weights are too even."
).of(_scores_times)(lambda head_dim, num_heads: 1 / math.sqrt(head_dim))

over_queries = fault("attention-softmax-over-queries").says(
    "Softmax runs over the queries: columns of the attention weights add up to 1, rows do not."
)
over_queries.wraps(softmax)(lambda old, scores: old(scores.mT).mT)
over_queries.wraps(softmax_backward)(lambda old, dweights, weights: old(dweights.mT, weights.mT).mT)


fault("attention-causal").says(
    "A position sees itself and what lies to its left, a habit from language models; MAR's "
    "attention sees everything. Weights above the diagonal are 0, only the last row is right."
).wraps(softmax)(lambda old, scores: old(np.where(np.tri(scores.shape[-1]) > 0, scores, -np.inf)))

inner = fault("attention-heads-innermost").says(
    "Features are split as [head_dim, heads], so that head h has every heads-th feature instead of "
    "a run of head_dim. A fresh model trains as well; loaded parameters are read wrongly. Query, "
    "key and value hold the right numbers at the wrong places."
)
inner.replaces(attention.split_heads)(
    lambda x, num_heads: x.reshape(*x.shape[:2], -1, num_heads).transpose(0, 3, 1, 2)
)
inner.replaces(attention.merge_heads)(
    lambda x: x.transpose(0, 2, 3, 1).reshape(len(x), x.shape[2], -1)
)

reshaped = fault("attention-heads-reshaped").says(
    "[batch, length, embed_dim] is reshaped to [batch, heads, length, head_dim] without the "
    "transposition between: a head mixes features and positions. A model with one head hides it."
)
reshaped.replaces(attention.split_heads)(
    lambda x, num_heads: x.reshape(len(x), num_heads, x.shape[1], -1)
)
reshaped.replaces(attention.merge_heads)(lambda x: x.reshape(len(x), x.shape[2], -1))


swapped = fault("attention-query-and-key-swapped").says(
    "Scores are K Qᵀ: each position weighs the others by how they would weigh it. Query and key "
    "are right, the scores are transposed."
)
swapped.wraps(attend_backward)(
    lambda old, dcontext, cache: operator.itemgetter(1, 0, 2)(old(dcontext, _swapped(cache)))
)


@swapped.wraps(attend)
def _(old: Any, query: Array, key: Array, value: Array) -> Any:
    context, cache = old(key, query, value)
    return context, _swapped(cache)


fault("attention-query-and-key-parameters-swapped").says(
    "The parameters of query and key are loaded into each other: the order of a fused projection "
    "is taken for key, query, value. Query and key are swapped, and all after them is wrong."
).of(with_params, attention)(_swapped)
fault("attention-softmax-sum-plus-1e-8").says(
    "1e-8 is added to the sum of the softmax, as Edifice does, against a division by 0 that cannot "
    "happen: the largest term is 1. Rows of weights add up to 1 - 1e-8 or a little more: nothing "
    "in float32, a difference in float64."
).replaces(softmax)(lambda scores: _softmax_with(scores, 1e-8))
fault("attention-softmax-sum-plus-1e-5").says(
    "1e-5 is added to the sum of the softmax, a guard that is large enough to be seen in float32. "
    "Rows of weights add up to a little less than 1."
).replaces(softmax)(lambda scores: _softmax_with(scores, 1e-5))

# One more score, of 0; the others have the same gradient as without it.
fault("attention-softmax-plus-one").says(
    "The softmax is exp(s_j)/(1 + Σ exp(s)), which lets a head attend to nothing; a key and value "
    "of zeros beside the others do the same. Rows of weights add up to less than 1."
).wraps(softmax)(lambda old, scores: old(np.pad(scores, [(0, 0)] * 3 + [(0, 1)]))[..., :-1])
fault("attention-without-qkv-biases").says(
    "Query, key and value are projected without biases (qkv_bias=False). Fresh parameters hide it. "
    "Of the three the key's bias alone makes no difference to what follows, since softmax ignores "
    "it."
).of(with_params, attention)(lambda params: without_biases(params, "query", "key", "value"))
fault("attention-without-output-bias").says(
    "The output projection of attention has no bias: its result is off by the same vector at every "
    "position."
).of(with_params, attention)(lambda params: without_biases(params, "output"))
