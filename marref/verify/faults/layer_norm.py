"""Faults of layer norm."""

from collections.abc import Callable
from typing import Any

import numpy as np

from marref import model
from marref.layers import layer_norm, linear
from marref.trees import Array, Tree
from marref.verify.faults.fault import Fault, Patch, replace, wrap


def _epsilon(value: float) -> tuple[Patch]:
    """σ² + value, whatever epsilon the model asks for."""
    return (
        wrap(layer_norm, "forward", lambda old: lambda params, x, epsilon: old(params, x, value)),
    )


def _fixed(name: str, value: float) -> tuple[Patch, Patch]:
    """γ = 1 or β = 0, whatever the parameter says; it has no gradient."""

    def fix(params: Tree) -> Tree:
        return {**params, name: np.full_like(params[name], value)}

    def backward(old: Any) -> Any:
        def fixed_backward(params: Tree, dy: Array, cache: Tree) -> tuple[Array, Tree]:
            dx, grads = old(fix(params), dy, cache)
            return dx, {**grads, name: np.zeros_like(params[name])}

        return fixed_backward

    return (
        wrap(
            layer_norm,
            "forward",
            lambda old: lambda params, x, epsilon: old(fix(params), x, epsilon),
        ),
        wrap(layer_norm, "backward", backward),
    )


def _normalisation(
    factors: Callable[[Array, float, int], tuple[Array, Array]], *, centre: bool = True
) -> tuple[Patch, Patch]:
    """x̂ = s (x - μ), s any function of the variance σ² of the n features.

    With s and k = -n s′(x_i)/(s² (x_i - μ)), both from ``factors(variance, epsilon, n)``,

        dx = s (dx̂ - mean(dx̂)) - k x̂ mean(dx̂ ⊙ x̂)

    which is layer norm's gradient for s = 1/√(σ² + ε), k = s.  Without ``centre``, μ = 0 and
    the mean of dx̂ is not taken away.
    """

    def forward(params: Tree, x: Array, epsilon: float) -> tuple[Array, Tree]:
        centred = x - x.mean(axis=-1, keepdims=True) if centre else x
        variance = (centred * centred).mean(axis=-1, keepdims=True)
        inverse_std, pull = factors(variance, epsilon, x.shape[-1])
        normalised = centred * inverse_std
        y = normalised * params["scale"] + params["bias"]
        return y, {"normalised": normalised, "inverse_std": inverse_std, "pull": pull}

    def backward(params: Tree, dy: Array, cache: Tree) -> tuple[Array, Tree]:
        normalised = cache["normalised"]
        dnormalised = dy * params["scale"]
        correlation = (dnormalised * normalised).mean(axis=-1, keepdims=True)
        dcentred = cache["inverse_std"] * dnormalised - cache["pull"] * normalised * correlation
        dx = dcentred - dcentred.mean(axis=-1, keepdims=True) if centre else dcentred
        axes = tuple(range(dy.ndim - 1))
        return dx, {"scale": (dy * normalised).sum(axis=axes), "bias": dy.sum(axis=axes)}

    return replace(layer_norm, "forward", forward), replace(layer_norm, "backward", backward)


def _plain(variance: Array, epsilon: float, features: int) -> tuple[Array, Array]:
    """Compute s = 1/√(σ² + ε), k = s."""
    inverse_std = 1.0 / np.sqrt(variance + epsilon)
    return inverse_std, inverse_std


def _outside_the_root(variance: Array, epsilon: float, features: int) -> tuple[Array, Array]:
    """Compute s = 1/(σ + ε), k = 1/σ."""
    std = np.sqrt(variance)
    return 1.0 / (std + epsilon), 1.0 / std


def _unbiased(variance: Array, epsilon: float, features: int) -> tuple[Array, Array]:
    """Compute s = 1/√(σ² n/(n - 1) + ε), k = s n/(n - 1)."""
    bessel = features / (features - 1)
    inverse_std = 1.0 / np.sqrt(variance * bessel + epsilon)
    return inverse_std, inverse_std * bessel


def _clipped(variance: Array, epsilon: float, features: int) -> tuple[Array, Array]:
    """Where σ² >= ε, as it should be; elsewhere s = 1/√ε, k = 0."""
    inverse_std = 1.0 / np.sqrt(variance + epsilon)
    enough = variance.real >= epsilon
    return np.where(enough, inverse_std, epsilon**-0.5), np.where(enough, inverse_std, 0.0)


def _no_final_norm_forward(mar: model.MAR, params: Tree, x: Array) -> tuple[Array, Tree]:
    """Compute logits = x W + b."""
    logits, cache = linear.forward(params["head"], x)
    return logits, {"head": cache}


def _no_final_norm_backward(params: Tree, dlogits: Array, cache: Tree) -> tuple[Array, Tree]:
    """Compute dx = dlogits Wᵀ; nothing for the norm."""
    dx, dhead = linear.backward(params["head"], dlogits, cache["head"])
    dnorm = {name: np.zeros_like(leaf) for name, leaf in params["final_norm"].items()}
    return dx, {"final_norm": dnorm, "head": dhead}


FAULTS = (
    Fault(
        "layer-norm-epsilon-1e-6",
        "Epsilon is 1e-6 where the model says otherwise: Flax's default, and that of the "
        "published MAR models. A relative difference of about 5e-6 / variance in every norm: "
        "small where the variance is near 1, plain where it is small.",
        _epsilon(1e-6),
    ),
    Fault(
        "layer-norm-epsilon-1e-12",
        "Epsilon is 1e-12, as in BERT and MaskGIT. It shows like 1e-6, a little stronger, and "
        "most where a variance is small.",
        _epsilon(1e-12),
    ),
    Fault(
        "layer-norm-epsilon-1e-5",
        "Epsilon is 1e-5, the default of PyTorch and Axon, where the model says otherwise, for "
        "instance 1e-6 after the published MAR models. It shows in every norm, most where a "
        "variance is small.",
        _epsilon(1e-5),
    ),
    Fault(
        "layer-norm-epsilon-outside-root",
        "y = γ (x - μ)/(σ + ε) + β: epsilon is added to the standard deviation instead of the "
        "variance. With a variance near 1 the difference is 5e-6; where the variance is as "
        "small as epsilon, it is large.",
        _normalisation(_outside_the_root),
    ),
    Fault(
        "layer-norm-unbiased-variance",
        "The variance is divided by n - 1 instead of n: the default of torch.var and of R. "
        "Normalised features shrink by √(1 - 1/n), by the same factor everywhere.",
        _normalisation(_unbiased),
    ),
    Fault(
        "layer-norm-clipped-variance",
        "Where the variance is below epsilon, the factor is 1/√ε instead of 1/√(σ² + ε): Axon, "
        "and so Edifice. Only positions whose features are almost equal differ, by up to 41%, "
        "and their gradient lacks its third term.",
        _normalisation(_clipped),
    ),
    Fault(
        "layer-norm-uncentred",
        "y = γ x/√(mean(x²) + ε) + β: RMS norm (Zhang and Sennrich 2019), which "
        "Halton-MaskGIT uses. The mean stays in, so that the first norm differs wherever "
        "features have one.",
        _normalisation(_plain, centre=False),
    ),
    Fault(
        "layer-norm-without-scale",
        "The scale γ is not applied, or was not loaded. Fresh parameters, where γ = 1, hide it.",
        _fixed("scale", 1.0),
    ),
    Fault(
        "layer-norm-without-bias",
        "The bias β is not applied, as in Muse, or was not loaded. Fresh parameters, where "
        "β = 0, hide it.",
        _fixed("bias", 0.0),
    ),
    Fault(
        "final-norm-missing",
        "The head reads the residual stream without a final norm: a habit from post-norm "
        "transformers. All blocks are right; the logits are larger by the size of the stream.",
        (
            replace(model, "head_forward", _no_final_norm_forward),
            replace(model, "head_backward", _no_final_norm_backward),
        ),
    ),
)
