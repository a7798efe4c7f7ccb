"""Faults of the backward pass only: the forward pass is right."""

import math
from typing import Any

import numpy as np

from marref import loss
from marref.layers import attention, embedding, gelu, layer_norm, linear
from marref.trees import Array, Index, Tree
from marref.verify.faults.attention import backward_with
from marref.verify.faults.block import residuals
from marref.verify.faults.fault import Fault, Patch, replace, wrap


def _layer_norm(*, mean: bool = True, correlation: bool = True, scale: bool = True) -> tuple[Patch]:
    """Compute dx = s (dx̂ [- mean(dx̂)] [- x̂ mean(dx̂ ⊙ x̂)]),  dx̂ = [γ ⊙] dy, what is kept."""

    def backward(params: Tree, dy: Array, cache: Tree) -> tuple[Array, Tree]:
        normalised = cache["normalised"]
        dnormalised = dy * params["scale"] if scale else dy
        dx = dnormalised
        if mean:
            dx = dx - dnormalised.mean(axis=-1, keepdims=True)
        if correlation:
            dx = dx - normalised * (dnormalised * normalised).mean(axis=-1, keepdims=True)
        axes = tuple(range(dy.ndim - 1))
        grads = {"scale": (dy * normalised).sum(axis=axes), "bias": dy.sum(axis=axes)}
        return cache["inverse_std"] * dx, grads

    return (replace(layer_norm, "backward", backward),)


def _unscaled_attention(old: Any) -> Any:
    """Compute dQ = dS K, dK = dSᵀ Q, without 1/√d."""

    def backward(params: Tree, dy: Array, cache: Tree, *rows: Index) -> tuple[Array, Tree]:
        root = math.sqrt(cache["query"].shape[-1])
        scaled = {**cache, "query": cache["query"] * root, "key": cache["key"] * root}
        result: tuple[Array, Tree] = old(params, dy, scaled, *rows)
        return result

    return backward


def _assigned(params: Tree, dx: Array, cache: Array) -> Tree:
    """dtable[tokens] = dx: of several places with one token, the last one wins."""
    dtable = np.zeros_like(params["table"])
    dtable[cache.ravel()] = dx.reshape(-1, dx.shape[-1])
    return {"table": dtable}


def _padding(old: Any) -> Any:
    """dtable[0] = 0."""

    def backward(params: Tree, dx: Array, cache: Array) -> Tree:
        table = old(params, dx, cache)["table"].copy()
        table[0] = 0.0
        return {"table": table}

    return backward


def _averaged_biases(old: Any) -> Any:
    """Compute db = mean over the rows of dy."""

    def backward(params: Tree, dy: Array, cache: Array) -> tuple[Array, Tree]:
        dx, grads = old(params, dy, cache)
        rows = dy.size // max(dy.shape[-1], 1)
        return dx, {**grads, "bias": grads["bias"] / max(rows, 1)}

    return backward


def _kernel_as_it_is(old: Any) -> Any:
    """Compute dx = dy W where W is square, instead of dy Wᵀ."""

    def backward(params: Tree, dy: Array, cache: Array) -> tuple[Array, Tree]:
        dx, grads = old(params, dy, cache)
        kernel = params["kernel"]
        return (dy @ kernel if kernel.shape[0] == kernel.shape[1] else dx), grads

    return backward


def _not_averaged(old: Any) -> Any:
    """dz_i = softmax(z_i) - onehot(y_i), without 1/|M|."""

    def backward(cache: Tree) -> Array:
        dlogits: Array = old(cache) * max(len(cache["targets"]), 1)
        return dlogits

    return backward


def _without_target(cache: Tree) -> Array:
    """dz_i = softmax(z_i) / |M|, without - onehot(y_i)."""
    mask, log_probabilities = cache["mask"], cache["log_probabilities"]
    dlogits = np.zeros((*mask.shape, log_probabilities.shape[-1]), log_probabilities.dtype)
    dlogits[mask] = np.exp(log_probabilities) / max(len(log_probabilities), 1)
    return dlogits


def _constant_gate(old: Any) -> Any:
    """Compute dx = dy gate(x), without x gate′(x)."""

    def gate_and_slope(x: Array, kind: str) -> tuple[Array, Array]:
        gate, slope = old(x, kind)
        return gate, np.zeros_like(slope)

    return gate_and_slope


FAULTS = (
    Fault(
        "loss-gradient-not-averaged",
        "dlogits lack the 1/|M| of the mean: every gradient is larger by the number of masked "
        "positions. Adam hides it but for its epsilon and clipping.",
        (wrap(loss, "backward", _not_averaged),),
    ),
    Fault(
        "loss-gradient-without-target",
        "dlogits are softmax/|M|, without the 1 taken off at the target. No entry is negative, "
        "and training pushes all logits down.",
        (replace(loss, "backward", _without_target),),
    ),
    Fault(
        "linear-gradient-biases-averaged",
        "Bias gradients are means over the rows instead of sums: smaller by batch·length, while "
        "those of the kernels are right.",
        (wrap(linear, "backward", _averaged_biases),),
    ),
    Fault(
        "linear-gradient-kernel-not-transposed",
        "dx = dy W instead of dy Wᵀ, which raises no error where W is square. Gradients of the "
        "output projection are right; those below it are not.",
        (wrap(linear, "backward", _kernel_as_it_is),),
    ),
    Fault(
        "layer-norm-gradient-without-mean",
        "The second term of the layer-norm gradient is missing, -mean(dx̂): the mean μ is taken "
        "for a constant. The features of dx do not add up to 0.",
        _layer_norm(mean=False),
    ),
    Fault(
        "layer-norm-gradient-without-correlation",
        "The third term of the layer-norm gradient is missing, -x̂ mean(dx̂ ⊙ x̂): the variance "
        "is taken for a constant.",
        _layer_norm(correlation=False),
    ),
    Fault(
        "layer-norm-gradient-first-term-only",
        "dx = dx̂/√(σ² + ε): mean and variance are both taken for constants, or detached from "
        "the graph.",
        _layer_norm(mean=False, correlation=False),
    ),
    Fault(
        "layer-norm-gradient-without-scale",
        "dx̂ = dy instead of γ ⊙ dy. Fresh parameters, where γ = 1, hide it.",
        _layer_norm(scale=False),
    ),
    Fault(
        "residual-gradient-dropped",
        "At x + f(x) only fᵀ(dy) is passed on, not dy itself. The last block's feed-forward "
        "layer has right gradients, and all before it fade from block to block.",
        residuals(first=False, second=False, gradients=True),
    ),
    Fault(
        "gelu-gradient-without-density",
        "dx = dy Φ(x), without x Φ′(x): the gate is taken for a constant. Gradients of the up "
        "projection and of all before it are off.",
        (wrap(gelu, "_gate", _constant_gate),),
    ),
    Fault(
        "attention-gradient-softmax-without-sum",
        "ds = a ⊙ da, without - a Σ a da: softmax is differentiated as if its entries did not "
        "share a sum. Gradients of query and key are off, those of value are right, and the key "
        "bias has a gradient other than 0.",
        (
            replace(
                attention, "backward", backward_with(lambda weights, dweights: weights * dweights)
            ),
        ),
    ),
    Fault(
        "attention-gradient-query-and-key-swapped",
        "dQ and dK are exchanged. Gradients of the value and output projections are right.",
        (replace(attention, "backward", backward_with(swapped=True)),),
    ),
    Fault(
        "attention-gradient-unscaled",
        "dQ and dK lack the factor 1/√head_dim of the scores: both are larger by √head_dim, "
        "those of value are right.",
        (wrap(attention, "backward", _unscaled_attention),),
    ),
    Fault(
        "attention-gradient-through-values-only",
        "Attention weights are taken for constants, or detached from the graph: query and key "
        "have no gradients.",
        (
            replace(
                attention,
                "backward",
                backward_with(lambda weights, dweights: np.zeros_like(dweights)),
            ),
        ),
    ),
    Fault(
        "embedding-gradient-assigned",
        "dtable[tokens] = dx assigns where it should add, so that of all places with one token "
        "the last one wins. Only rows of tokens that occur more than once differ; [MASK] always "
        "does.",
        (replace(embedding, "backward", _assigned),),
    ),
    Fault(
        "embedding-gradient-padding",
        "The row of id 0, [MASK], has no gradient, id 0 being taken for padding "
        "(padding_idx=0). One row of one gradient differs.",
        (wrap(embedding, "backward", _padding),),
    ),
)
