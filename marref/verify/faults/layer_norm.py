"""Faults of layer norm."""

from collections.abc import Callable
from typing import Any

import numpy as np

from marref.layers import layer_norm, linear
from marref.model import head_backward, head_forward
from marref.trees import Array, Tree
from marref.verify.faults.fault import Fault, Stage
from marref.verify.faults.feed_forward import filled, with_params

fault = Stage()


def _normalising(fault: Fault, factors: Callable[..., Any], *, centre: bool = True) -> None:
    """Compute x̂ = s (x - μ), s any function of the variance σ² of the n features.

    With s and r = -n s′(x_i)/(s³ (x_i - μ)), both from ``factors(variance, epsilon, n)``,

        dx = s (dx̂ - mean(dx̂) - r x̂ mean(dx̂ ⊙ x̂))

    which is layer norm's gradient for s = 1/√(σ² + ε), r = 1.  Without ``centre``, μ = 0 and
    the mean of dx̂ is not taken away.
    """

    @fault.replaces(layer_norm.forward)
    def _(params: Tree, x: Array, epsilon: float) -> tuple[Array, Tree]:
        centred = x - x.mean(axis=-1, keepdims=True) if centre else x
        variance = (centred * centred).mean(axis=-1, keepdims=True)
        inverse_std, pull = factors(variance, epsilon, x.shape[-1])
        normalised = centred * inverse_std
        y = params["scale"] * normalised + params["bias"]
        return y, {"normalised": normalised, "inverse_std": inverse_std, "pull": pull}

    @fault.wraps(layer_norm.backward)
    def _(old: Any, params: Tree, dy: Array, cache: Tree) -> tuple[Array, Tree]:
        normalised, dnormalised = cache["normalised"], params["scale"] * dy
        pull = cache["pull"] * (dnormalised * normalised).mean(axis=-1, keepdims=True)
        dcentred = cache["inverse_std"] * (dnormalised - normalised * pull)
        dx = dcentred - dcentred.mean(axis=-1, keepdims=True) if centre else dcentred
        return dx, old(params, dy, cache)[1]


fault("layer-norm-epsilon-1e-6").sets("layer-norm epsilon").says(
    "Epsilon is 1e-6 where the model says otherwise: Flax's default, and that of the published MAR "
    "models. A relative difference of about 5e-6 / variance in every norm: small where the "
    "variance is near 1, plain where it is small."
).wraps(layer_norm.forward)(lambda old, params, x, epsilon: old(params, x, 1e-6))
fault("layer-norm-epsilon-1e-12").sets("layer-norm epsilon").says(
    "Epsilon is 1e-12, as in BERT and MaskGIT. It shows like 1e-6, a little stronger, and most "
    "where a variance is small."
).wraps(layer_norm.forward)(lambda old, params, x, epsilon: old(params, x, 1e-12))
fault("layer-norm-epsilon-1e-5").sets("layer-norm epsilon").says(
    "Epsilon is 1e-5, the default of PyTorch and Axon, where the model says otherwise, for "
    "instance 1e-6 after the published MAR models. It shows in every norm, most where a variance "
    "is small."
).wraps(layer_norm.forward)(lambda old, params, x, epsilon: old(params, x, 1e-5))
fault("layer-norm-epsilon-1e-3").sets("layer-norm epsilon").says(
    "Epsilon is 1e-3, the default of Keras. A relative difference of about 5e-4 / variance in "
    "every norm."
).wraps(layer_norm.forward)(lambda old, params, x, epsilon: old(params, x, 1e-3))
fault("layer-norm-epsilon-outside-root").says(
    "y = γ (x - μ)/(σ + ε) + β: epsilon is added to the standard deviation instead of the "
    "variance. With a variance near 1 the difference is 5e-6; where the variance is as small as "
    "epsilon, it is large."
).of(_normalising)(lambda v, e, n: (1 / (np.sqrt(v) + e), 1 + e / np.sqrt(v)))
fault("layer-norm-unbiased-variance").says(
    "The variance is divided by n - 1 instead of n: the default of torch.var and of R. Normalised "
    "features shrink by √(1 - 1/n), by the same factor everywhere."
).of(_normalising)(lambda v, e, n: ((v * n / (n - 1) + e) ** -0.5, n / (n - 1)))
fault("layer-norm-unbiased-epsilon-outside-root").says(
    "y = γ (x - μ)/(σ + ε) + β with n - 1 under the root of σ: (x - x.mean()) / (x.std() + eps), "
    "as one writes it in PyTorch, and as the Annotated Transformer has it. Both mistakes of the "
    "two entries before at once."
).of(_normalising)(
    lambda v, e, n: (
        1 / (np.sqrt(v * n / (n - 1)) + e),
        n / (n - 1) * (1 + e / np.sqrt(v * n / (n - 1))),
    )
)
fault("layer-norm-clipped-variance").says(
    "Where the variance is below epsilon, the factor is 1/√ε instead of 1/√(σ² + ε): Axon, and so "
    "Edifice. Only positions whose features are almost equal differ, by up to 41%, and their "
    "gradient lacks its third term."
).of(_normalising)(lambda v, e, n: (np.where(v.real < e, e, v + e) ** -0.5, v.real >= e))
fault("layer-norm-uncentred").says(
    "y = γ x/√(mean(x²) + ε) + β: RMS norm (Zhang and Sennrich 2019), which Halton-MaskGIT uses. "
    "The mean stays in, so that the first norm differs wherever features have one."
).of(_normalising, centre=False)(lambda v, e, n: ((v + e) ** -0.5, 1.0))
fault("layer-norm-without-scale").says(
    "The scale γ is not applied, or was not loaded. Fresh parameters, where γ = 1, hide it."
).of(with_params, layer_norm, constant="scale")(lambda params: filled(params, "scale", 1.0))
fault("layer-norm-without-bias").says(
    "The bias β is not applied, as in Muse, or was not loaded. Fresh parameters, where β = 0, hide "
    "it."
).of(with_params, layer_norm)(lambda params: filled(params, "bias", 0.0))

no_final_norm = fault("final-norm-missing").says(
    "The head reads the residual stream without a final norm: a habit from post-norm transformers. "
    "All blocks are right; the logits are larger by the size of the stream."
)
no_final_norm.replaces(head_forward)(
    lambda params, x, epsilon: (linear.forward(params["head"], x)[0], {"head": x})
)


@no_final_norm.replaces(head_backward)
def _(params: Tree, dlogits: Array, cache: Tree) -> tuple[Array, Tree]:
    dx, dhead = linear.backward(params["head"], dlogits, cache["head"])
    dnorm = {name: np.zeros_like(leaf) for name, leaf in params["final_norm"].items()}
    return dx, {"final_norm": dnorm, "head": dhead}
