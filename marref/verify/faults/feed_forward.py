"""Faults of linear layers, GELU and the feed-forward layer."""

from collections.abc import Callable
from typing import Any

import numpy as np

from marref import model
from marref.layers import attention, feed_forward, gelu, linear
from marref.trees import Array, Tree
from marref.verify import trace
from marref.verify.faults.fault import Fault, Patch, replace, wrap


def _kind(wanted: str) -> tuple[Patch, ...]:
    """Take the GELU of that kind, whatever the model asks for."""
    return (wrap(gelu, "_gate", lambda old: lambda x, kind: old(x, wanted)),)


def _gated(
    gate_of: Callable[[Array], Array], slope_of: Callable[[Array], Array]
) -> tuple[Patch, ...]:
    """Compute y = x gate(x) with another gate, and gate′ as a function of the gate."""

    def gate_and_slope(x: Array, kind: str) -> tuple[Array, Array]:
        gate = gate_of(x)
        return gate, slope_of(gate)

    return (replace(gelu, "_gate", gate_and_slope),)


def without_biases(*names: str) -> Callable[[Tree], Tree]:
    """Make a function that sets the biases of the named linear layers of a tree to 0."""

    def change(params: Tree) -> Tree:
        zero = {
            name: {**params[name], "bias": np.zeros_like(params[name]["bias"])} for name in names
        }
        return {**params, **zero}

    return change


def layer_without_biases(layer: Any, part: str, *names: str) -> tuple[Patch, ...]:
    """Compute y = x W in the named linear layers of a part of the block."""
    change = without_biases(*names)

    def activations(old: Any) -> Any:
        def changed(mar: model.MAR, params: Tree, tokens: Array) -> dict[str, Array]:
            blocks = [{**block, part: change(block[part])} for block in params["blocks"]]
            named: dict[str, Array] = old(mar, {**params, "blocks": blocks}, tokens)
            return named

        return changed

    def backward(old: Any) -> Any:
        def changed(params: Tree, *args: Any) -> tuple[Array, Tree]:
            dx, grads = old(change(params), *args)
            return dx, change(grads)

        return changed

    return (
        wrap(layer, "forward", lambda old: lambda params, *args: old(change(params), *args)),
        wrap(layer, "backward", backward),
        wrap(trace, "activations", activations),
    )


_HEAD_WITHOUT_BIAS = without_biases("head")


def _head_backward(old: Any) -> Any:
    def backward(params: Tree, dlogits: Array, cache: Tree) -> tuple[Array, Tree]:
        dx, grads = old(params, dlogits, cache)
        return dx, _HEAD_WITHOUT_BIAS(grads)

    return backward


def _no_bias(params: Tree) -> Tree:
    """Compute b = 0."""
    return {**params, "bias": np.zeros_like(params["bias"])}


def _no_bias_backward(old: Any) -> Any:
    def backward(params: Tree, dy: Array, cache: Array) -> tuple[Array, Tree]:
        dx, grads = old(params, dy, cache)
        return dx, _no_bias(grads)

    return backward


def _transposed(params: Tree) -> Tree:
    """Wᵀ for a square W; its own inverse and its own gradient."""
    kernel = params["kernel"]
    return {**params, "kernel": kernel.T} if kernel.shape[0] == kernel.shape[1] else params


def _transposed_backward(old: Any) -> Any:
    def backward(params: Tree, dy: Array, cache: Array) -> tuple[Array, Tree]:
        dx, grads = old(_transposed(params), dy, cache)
        return dx, _transposed(grads)

    return backward


LINEAR = (
    Fault(
        "linear-square-kernels-transposed",
        "Square kernels are loaded as [out, in], PyTorch's layout, and nobody notices, because "
        "the shape fits; kernels that are not square would have raised an error. Query, key, "
        "value and attention output differ, the feed-forward layer by itself is right.",
        (
            wrap(linear, "forward", lambda old: lambda params, x: old(_transposed(params), x)),
            wrap(linear, "backward", _transposed_backward),
        ),
    ),
    Fault(
        "linear-without-biases",
        "No linear layer has a bias, as in Muse and Halton-MaskGIT. Fresh parameters, where "
        "biases are 0, hide it.",
        (
            wrap(linear, "forward", lambda old: lambda params, x: old(_no_bias(params), x)),
            wrap(linear, "backward", _no_bias_backward),
        ),
    ),
    Fault(
        "head-without-bias",
        "The logits lack the head's bias: off by the same vector at every position.",
        (
            wrap(
                model,
                "head_forward",
                lambda old: lambda mar, params, x: old(mar, _HEAD_WITHOUT_BIAS(params), x),
            ),
            wrap(model, "head_backward", _head_backward),
        ),
    ),
)

FAULTS = (
    Fault(
        "gelu-tanh",
        "GELU by the tanh approximation where the model says erf: the default of jax.nn.gelu, "
        "and in MaskGIT. Activations are off by up to 5e-4, most near |x| = 2.7: too much for "
        "rounding, too little to notice in training.",
        _kind("tanh"),
    ),
    Fault(
        "gelu-erf",
        "The exact GELU where the model says tanh: the default of torch.nn.GELU, and in MAR and "
        "Edifice. Activations are off by up to 5e-4.",
        _kind("erf"),
    ),
    Fault(
        "gelu-sigmoid",
        "GELU approximated by x σ(1.702 x) (Hendrycks and Gimpel 2016, also called quick GELU). "
        "Activations are off by up to 2e-2.",
        _gated(
            lambda x: gelu._sigmoid(1.702 * x),
            lambda gate: 1.702 * gate * (1.0 - gate),
        ),
    ),
    Fault(
        "gelu-relu",
        "ReLU in the place of GELU, as in the first transformer. No activation is negative.",
        _gated(lambda x: (x.real > 0).astype(x.dtype), np.zeros_like),
    ),
    Fault(
        "gelu-silu",
        "SiLU, x σ(x), in the place of GELU: the activation of SwiGLU layers. Activations are "
        "off by up to 0.2.",
        _gated(gelu._sigmoid, lambda gate: gate * (1.0 - gate)),
    ),
    Fault(
        "gelu-missing",
        "No activation between the two linear layers, which are then one: activation and input "
        "of the GELU are equal.",
        _gated(np.ones_like, np.zeros_like),
    ),
    Fault(
        "feed-forward-without-biases",
        "The two linear layers of the feed-forward layer have no biases. Fresh parameters hide it.",
        layer_without_biases(feed_forward, "feed_forward", "up", "down"),
    ),
)

ATTENTION_BIASES = (
    Fault(
        "attention-without-qkv-biases",
        "Query, key and value are projected without biases (qkv_bias=False). Fresh parameters "
        "hide it. Of the three the key's bias alone makes no difference to what follows, since "
        "softmax ignores it.",
        layer_without_biases(attention, "attention", "query", "key", "value"),
    ),
    Fault(
        "attention-without-output-bias",
        "The output projection of attention has no bias: its result is off by the same vector "
        "at every position.",
        layer_without_biases(attention, "attention", "output"),
    ),
)
