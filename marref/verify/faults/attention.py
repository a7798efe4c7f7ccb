"""Faults of attention, forward."""

import contextlib
import contextvars
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from marref.layers import attention
from marref.layers.attention import attend, attend_backward, softmax, softmax_backward
from marref.model import MAR
from marref.trees import Array, Tree
from marref.verify.faults.fault import Fault, Stage
from marref.verify.faults.feed_forward import transposed, with_params, without_biases

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


def _fused_read_as(fault: Fault, read: Callable[[Array], Array]) -> None:
    """Read the columns of query, key and value, side by side in one array, in another order.

    ``read`` turns the numbers of the columns, [3, num_heads, head_dim], into those that are taken
    for the columns of query, key and value.
    """

    def order(params: Tree, num_heads: int) -> Array:
        embed_dim = len(params["query"]["bias"])
        return read(np.arange(3 * embed_dim).reshape(3, num_heads, -1)).ravel()

    @fault.wraps(attention.forward)
    def _(old: Any, params: Tree, x: Array, num_heads: int) -> Any:
        return old(_columns(params, order(params, num_heads)), x, num_heads)

    @fault.wraps(attention.backward)
    def _(old: Any, params: Tree, dy: Array, cache: Tree) -> Any:
        columns = order(params, cache["query"].shape[1])
        dx, grads = old(_columns(params, columns), dy, cache)
        return dx, _columns(grads, columns.argsort())


def _columns(params: Tree, order: Array) -> Tree:
    """Put the columns of query, key and value, side by side, into an order."""
    names = ("query", "key", "value")
    changed: dict[str, Tree] = {name: {} for name in names}
    for leaf in ("kernel", "bias"):
        fused = np.concatenate([params[name][leaf] for name in names], axis=-1)[..., order]
        for name, part in zip(names, np.split(fused, 3, axis=-1), strict=True):
            changed[name][leaf] = part
    return {**params, **changed}


def _kernels_transposed(params: Tree, *names: str) -> Tree:
    return {**params, **{name: transposed(params[name]) for name in names}}


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

_hidden: contextvars.ContextVar[Any] = contextvars.ContextVar("hidden", default=False)
"""Which keys no query sees, bool [batch, 1, 1, length]."""


@contextlib.contextmanager
def _hiding_masks(tokens: Any) -> Iterator[None]:
    before = _hidden.set((np.asarray(tokens) == 0)[:, np.newaxis, np.newaxis])
    try:
        yield
    finally:
        _hidden.reset(before)


masks_hidden = fault("attention-mask-keys-hidden").says(
    "The keys of [MASK], id 0, are hidden, as padding is, by scores of -1e9: no position sees a "
    "masked one. Their attention weights are 0. Where all are masked, as when decoding starts, all "
    "weigh the same; with scores of -∞ they would be NaN."
)
masks_hidden.wraps(softmax)(lambda old, scores: old(np.where(_hidden.get(), -1e9, scores)))
masks_hidden.wraps(softmax_backward)(
    lambda old, dweights, weights: np.where(_hidden.get(), 0.0, old(dweights, weights))
)


@masks_hidden.wraps(MAR.forward)
def _(old: Any, model: MAR, params: Tree, tokens: Any, rng: Any = None, labels: Any = None) -> Any:
    with _hiding_masks(tokens):
        return old(model, params, tokens, rng, labels)


@masks_hidden.wraps(MAR.backward)
def _(old: Any, model: MAR, params: Tree, dlogits: Array, cache: Tree) -> Any:
    with _hiding_masks(cache["embedding"]["tokens"]):
        return old(model, params, dlogits, cache)


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


fault("attention-query-and-key-parameters-swapped").sets("fused projection").says(
    "The parameters of query and key are loaded into each other: the order of a fused projection "
    "is taken for key, query, value. Query and key are swapped, and all after them is wrong."
).of(_fused_read_as)(lambda columns: columns[[1, 0, 2]])
fault("attention-key-and-value-parameters-swapped").sets("fused projection").says(
    "The order of a fused projection is taken for query, value, key. Queries are right, keys and "
    "values are each other's."
).of(_fused_read_as)(lambda columns: columns[[0, 2, 1]])
fault("attention-query-and-value-parameters-swapped").sets("fused projection").says(
    "The order of a fused projection is taken for value, key, query. Keys are right, queries and "
    "values are each other's."
).of(_fused_read_as)(lambda columns: columns[[2, 1, 0]])
fault("attention-parameters-read-as-key-value-query").sets("fused projection").says(
    "The order of a fused projection is taken for key, value, query: keys are what queries should "
    "be, values the keys, and queries the values."
).of(_fused_read_as)(lambda columns: columns[[2, 0, 1]])
fault("attention-parameters-read-as-value-query-key").sets("fused projection").says(
    "The order of a fused projection is taken for value, query, key: values are what queries "
    "should be, queries the keys, and keys the values."
).of(_fused_read_as)(lambda columns: columns[[1, 2, 0]])
fault("attention-parameters-read-by-head").sets("fused projection").says(
    "Query, key and value lie side by side in one array and are read head by head, [heads, 3, "
    "head_dim], as Megatron, GPT-NeoX and BLOOM store them: the first head's query, key and value, "
    "then the second's. Only the first head's query and the last head's value are right."
).of(_fused_read_as)(
    lambda columns: columns.reshape(columns.shape[1], 3, columns.shape[2]).swapaxes(0, 1)
)
fault("attention-parameters-read-innermost").sets("fused projection").says(
    "Query, key and value lie side by side in one array and are read feature by feature, [heads, "
    "head_dim, 3], einops' (h d qkv). The first feature of the query and the last of the value "
    "alone are right."
).of(_fused_read_as)(lambda columns: np.moveaxis(columns.reshape(*columns.shape[1:], 3), -1, 0))
fault("attention-qkv-kernels-transposed").sets("kernel layout").says(
    "The square kernels of query, key and value are loaded as [out, in], PyTorch's layout of its "
    "in_proj_weight, and that of the output is not."
).of(with_params, attention)(lambda params: _kernels_transposed(params, "query", "key", "value"))
fault("attention-output-kernel-transposed").sets("kernel layout").says(
    "The square kernel of the output projection is loaded as [out, in], those of query, key and "
    "value are not. All is right up to the context."
).of(with_params, attention)(lambda params: _kernels_transposed(params, "output"))
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
