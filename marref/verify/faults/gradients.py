"""Faults of the backward pass only: the forward pass is right."""

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from marref import loss
from marref.layers import attention, embedding, gelu, layer_norm, linear
from marref.trees import Array, Tree
from marref.verify.faults.attention import dscores_times
from marref.verify.faults.block import backward_of, chain
from marref.verify.faults.embedding import mask_row_zero
from marref.verify.faults.fault import Fault, Stage
from marref.verify.faults.feed_forward import filled, transposed

fault = Stage()


def _norm_with(fault: Fault, terms: Callable[[Array, Array], Array]) -> None:
    """Compute dx = s terms(dx̂, x̂)."""

    @fault.wraps(layer_norm.backward)
    def _(old: Any, params: Tree, dy: Array, cache: Tree) -> Any:
        dx = cache["inverse_std"] * terms(params["scale"] * dy, cache["normalised"])
        return dx, old(params, dy, cache)[1]


fault("loss-gradient-not-averaged").says(
    "dlogits lack the 1/|M| of the mean: every gradient is larger by the number of masked "
    "positions. Adam hides it but for its epsilon and clipping."
).wraps(loss.backward)(lambda old, cache: old(cache) * max(len(cache["targets"]), 1))


@fault("loss-gradient-without-target").wraps(loss.backward)
def _(old: Any, cache: Tree) -> Any:
    """dlogits are softmax/|M|, without the 1 taken off at the target. No entry is negative, and
    training pushes all logits down."""
    dlogits, probabilities = old(cache), np.exp(cache["log_probabilities"])
    dlogits[cache["mask"]] = probabilities / max(len(probabilities), 1)
    return dlogits


@fault("linear-gradient-biases-averaged").wraps(linear.backward)
def _(old: Any, params: Tree, dy: Array, cache: Array) -> Any:
    """Bias gradients are means over the rows instead of sums: smaller by batch·length, while those
    of the kernels are right."""
    dx, grads = old(params, dy, cache)
    return dx, {**grads, "bias": grads["bias"] / max(dy[..., 0].size, 1)}


fault("linear-gradient-kernel-not-transposed").says(
    "dx = dy W instead of dy Wᵀ, which raises no error where W is square. Gradients of the output "
    "projection are right; those below it are not."
).wraps(linear.backward)(lambda old, params, dy, cache: old(transposed(params), dy, cache))
fault("layer-norm-gradient-without-mean").says(
    "The second term of the layer-norm gradient is missing, -mean(dx̂): the mean μ is taken for a "
    "constant. The features of dx do not add up to 0."
).of(_norm_with)(lambda dn, n: dn - n * (dn * n).mean(axis=-1, keepdims=True))
fault("layer-norm-gradient-without-correlation").says(
    "The third term of the layer-norm gradient is missing, -x̂ mean(dx̂ ⊙ x̂): the variance is "
    "taken for a constant."
).of(_norm_with)(lambda dn, n: dn - dn.mean(axis=-1, keepdims=True))
fault("layer-norm-gradient-first-term-only").says(
    "dx = dx̂/√(σ² + ε): mean and variance are both taken for constants, or detached from the graph."
).of(_norm_with)(lambda dn, n: dn)
fault("layer-norm-gradient-without-scale").says(
    "dx̂ = dy instead of γ ⊙ dy. Fresh parameters, where γ = 1, hide it."
).wraps(layer_norm.backward)(
    lambda old, params, dy, cache: old(filled(params, "scale", 1.0), dy, cache)
)
fault("residual-gradient-dropped").says(
    "At x + f(x) only fᵀ(dy) is passed on, not dy itself. The last block's feed-forward layer has "
    "right gradients, and all before it fade from block to block."
).of(backward_of)(chain)
fault("gelu-gradient-without-density").says(
    "dx = dy Φ(x), without x Φ′(x): the gate is taken for a constant. Gradients of the up "
    "projection and of all before it are off."
).wraps(gelu.gate)(lambda old, x, gelu: (old(x, gelu)[0], np.zeros_like(x)))
fault("attention-gradient-softmax-without-sum").says(
    "ds = a ⊙ da, without - a Σ a da: softmax is differentiated as if its entries did not share a "
    "sum. Gradients of query and key are off, those of value are right, and the key bias has a "
    "gradient other than 0."
).replaces(attention.softmax_backward)(lambda dweights, weights: weights * dweights)
fault("attention-gradient-query-and-key-swapped").says(
    "dQ and dK are exchanged. Gradients of the value and output projections are right."
).wraps(attention.attend_backward)(
    lambda old, dcontext, cache: operator.itemgetter(1, 0, 2)(old(dcontext, cache))
)
fault("attention-gradient-unscaled").says(
    "dQ and dK lack the factor 1/√head_dim of the scores: both are larger by √head_dim, those of "
    "value are right."
).of(dscores_times)(lambda head_dim, num_heads: math.sqrt(head_dim))
fault("attention-gradient-through-values-only").says(
    "Attention weights are taken for constants, or detached from the graph: query and key have no "
    "gradients."
).replaces(attention.softmax_backward)(lambda dweights, weights: np.zeros_like(dweights))


@fault("embedding-gradient-assigned").replaces(embedding.backward)
def _(params: Tree, dx: Array, cache: Tree) -> Tree:
    """dtable[tokens] = dx assigns where it should add, so that of all places with one token the
    last one wins. Only rows of tokens that occur more than once differ; [MASK] always does."""
    dtable = np.zeros_like(params["table"])
    dtable[cache["tokens"].ravel()] = dx.reshape(-1, dx.shape[-1])
    return {"table": dtable}


fault("embedding-gradient-padding").says(
    "The row of id 0, [MASK], has no gradient, id 0 being taken for padding (padding_idx=0). One "
    "row of one gradient differs."
).wraps(embedding.backward)(lambda old, params, dx, cache: mask_row_zero(old(params, dx, cache)))
