"""Faults of linear layers, GELU and the feed-forward layer."""

from collections.abc import Callable
from typing import Any

import numpy as np

from marref import model
from marref.layers import feed_forward, gelu, linear
from marref.trees import Array, Tree
from marref.verify.faults.fault import Fault, Stage

linear_fault, fault = Stage(), Stage()


def with_params(
    fault: Fault,
    layer: Any,
    change: Callable[[Tree], Tree],
    *,
    back: Callable[[Tree], Tree] | None = None,
    constant: str = "",
    prefix: str = "",
) -> None:
    """Make a layer compute with ``change(params)``, a linear map of its parameters.

    Its transpose, ``back``, takes gradients of the parameters that are computed with to those of
    the parameters that are given; without it the map is symmetric.  A leaf that is ``constant``
    instead has the gradient 0.
    """
    back = back or change

    @fault.wraps(getattr(layer, f"{prefix}forward"))
    def _(old: Any, params: Tree, *args: Any, **options: Any) -> Any:
        return old(change(params), *args, **options)

    @fault.wraps(getattr(layer, f"{prefix}backward"))
    def _(old: Any, params: Tree, *args: Any, **options: Any) -> Any:
        result = old(change(params), *args, **options)
        *dx, grads = result if isinstance(result, tuple) else (result,)
        grads = filled(grads, constant, 0.0) if constant else back(grads)
        return (*dx, grads) if dx else grads


def filled(params: Tree, name: str, value: float) -> Tree:
    """Put one number in all entries of the leaf of that name."""
    return {**params, name: np.full_like(params[name], value)}


def without_biases(params: Tree, *names: str) -> Tree:
    """Set the biases of the linear layers of these names to 0."""
    return {**params, **{name: filled(params[name], "bias", 0.0) for name in names}}


def _sigmoid(x: Array, scale: float) -> tuple[Array, Array]:
    """Compute the gate σ(scale x) and its derivative."""
    gate = gelu.sigmoid(scale * x)
    return gate, scale * gate * (1.0 - gate)


def transposed(params: Tree) -> Tree:
    """Transpose the kernel of a linear layer if it is square."""
    kernel = params["kernel"]
    return {**params, "kernel": kernel.T} if kernel.shape[0] == kernel.shape[1] else params


def _reshaped(params: Tree) -> Tree:
    """Read the numbers of the transposed kernel, row by row, as a kernel."""
    kernel = params["kernel"]
    return {**params, "kernel": kernel.T.reshape(kernel.shape)}


def _reshaped_back(grads: Tree) -> Tree:
    kernel = grads["kernel"]
    return {**grads, "kernel": kernel.reshape(kernel.T.shape).T}


linear_fault("linear-square-kernels-transposed").sets("kernel layout").says(
    "Square kernels are loaded as [out, in], PyTorch's layout, and nobody notices, because the "
    "shape fits; kernels that are not square would have raised an error. Query, key, value and "
    "attention output differ, the feed-forward layer by itself is right."
).of(with_params, linear)(transposed)
linear_fault("linear-kernels-reshaped").sets("kernel layout").says(
    "Kernels as PyTorch stores them, [out, in], are reshaped to [in, out] instead of transposed: a "
    "program in C reads the bytes and checks their number only. Square kernels come out "
    "transposed, the others are scrambled."
).of(with_params, linear, back=_reshaped_back)(_reshaped)
linear_fault("linear-without-biases").says(
    "No linear layer has a bias, as in Muse and Halton-MaskGIT. Fresh parameters, where biases are "
    "0, hide it."
).of(with_params, linear)(lambda params: filled(params, "bias", 0.0))
linear_fault("head-without-bias").says(
    "The logits lack the head's bias: off by the same vector at every position."
).of(with_params, model, prefix="head_")(lambda params: without_biases(params, "head"))
fault("gelu-tanh").sets("gelu").says(
    "GELU by the tanh approximation where the model says erf: the default of jax.nn.gelu, and in "
    "MaskGIT. Activations are off by up to 5e-4, most near |x| = 2.7: too much for rounding, too "
    "little to notice in training."
).wraps(gelu.gate)(lambda old, x, gelu: old(x, "tanh"))
fault("gelu-erf").sets("gelu").says(
    "The exact GELU where the model says tanh: the default of torch.nn.GELU, and in MAR and "
    "Edifice. Activations are off by up to 5e-4."
).wraps(gelu.gate)(lambda old, x, gelu: old(x, "erf"))
fault("gelu-sigmoid").sets("gelu").says(
    "GELU approximated by x σ(1.702 x) (Hendrycks and Gimpel 2016, also called quick GELU). "
    "Activations are off by up to 2e-2."
).replaces(gelu.gate)(lambda x, gelu: _sigmoid(x, 1.702))
fault("gelu-relu").sets("gelu").says(
    "ReLU in the place of GELU, as in the first transformer. No activation is negative."
).replaces(gelu.gate)(lambda x, gelu: ((x.real > 0).astype(x.dtype), np.zeros_like(x)))
fault("gelu-leaky-relu").sets("gelu").says(
    "Leaky ReLU in the place of GELU: activations below 0 are a hundredth of what came in."
).replaces(gelu.gate)(
    lambda x, gelu: (np.where(x.real > 0, 1.0, 0.01).astype(x.dtype), np.zeros_like(x))
)
fault("gelu-silu").sets("gelu").says(
    "SiLU, x σ(x), in the place of GELU: the activation of SwiGLU layers. Activations are off by "
    "up to 0.2."
).replaces(gelu.gate)(lambda x, gelu: _sigmoid(x, 1.0))
fault("gelu-missing").sets("gelu").says(
    "No activation between the two linear layers, which are then one: activation and input of the "
    "GELU are equal."
).replaces(gelu.gate)(lambda x, gelu: (np.ones_like(x), np.zeros_like(x)))
fault("feed-forward-without-biases").says(
    "The two linear layers of the feed-forward layer have no biases. Fresh parameters hide it."
).of(with_params, feed_forward)(lambda params: without_biases(params, "up", "down"))
