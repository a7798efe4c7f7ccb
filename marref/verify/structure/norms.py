"""What a layer norm makes with another epsilon, scale, bias, mean, or of another input."""

import math

import numpy as np

from marref.trees import Array
from marref.verify.structure.evidence import Candidates, Case, Finding
from marref.verify.structure.sources import (
    after_attention,
    input_of,
    normalise,
    streams,
)

_EPSILONS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12, 0.0)


def candidates(case: Case, block: str, part: str) -> Candidates:
    """List what a layer norm makes with another epsilon, scale, bias, mean or input."""
    name, x, source = _reads(case, block, part)
    leaves, epsilon = case.parameters, case.vectors.model.layer_norm_epsilon
    scale, bias = leaves[f"{name}.scale"], leaves[f"{name}.bias"]
    n = x.shape[-1]
    right = normalise(x, epsilon)
    yield f"is {source} itself: {name} is missing", x
    yield f"is {source} normalised, without scale and bias", right
    yield "is normalised right, but without the scale", right + bias
    yield "is normalised right, but without the bias", right * scale
    yield "is normalised right, but scaled by 1 + scale", right * (1 + scale) + bias
    yield "is normalised right, but bias added before the scale", (right + bias) * scale
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    squares = (x**2).mean(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        plain = {
            "by the root mean square, the mean not taken off": x / np.sqrt(squares + epsilon),
            "by the deviation, the mean not taken off": x / np.sqrt(variance + epsilon),
            "by n - 1 in place of n": centred / np.sqrt(variance * n / (n - 1) + epsilon),
            "with epsilon outside the root": centred / (np.sqrt(variance) + epsilon),
            "by n - 1 in place of n, epsilon outside the root": centred
            / (np.sqrt(variance * n / (n - 1)) + epsilon),
            "by the variance, without the root": centred / (variance + epsilon),
            "over the positions in place of the features": normalise(x, epsilon, axis=1),
            "over positions and features together": normalise(x, epsilon, axis=(1, 2)),
            "over the batch in place of the features": normalise(x, epsilon, axis=0),
            "over batch and positions in place of the features": normalise(x, epsilon, axis=(0, 1)),
            "by taking off the mean, without a division": centred,
        }
        for other in _EPSILONS:
            plain[f"with epsilon {other:g}"] = normalise(x, other)
        for other in _EPSILONS:
            if other != epsilon:
                text = f"with epsilon {other:g} outside the root"
                plain[text] = centred / (np.sqrt(variance) + other)
    for words, normalised in plain.items():
        if np.isfinite(normalised).all():
            yield f"is normalised {words}", normalised * scale + bias
    yield from _other_norms(case, name, right, block, epsilon)


def _other_norms(case: Case, name: str, right: Array, block: str, epsilon: float) -> Candidates:
    leaves = case.parameters
    scale, bias = leaves[f"{name}.scale"], leaves[f"{name}.bias"]
    norms = [other.removesuffix(".scale") for other in leaves if other.endswith(".scale")]
    for other in norms:
        theirs = leaves[f"{other}.scale"], leaves[f"{other}.bias"]
        if other != name:
            yield f"is normalised with scale and bias of {other}", right * theirs[0] + theirs[1]
            yield f"is normalised with the scale of {other}", right * theirs[0] + bias
            yield f"is normalised with the bias of {other}", right * scale + theirs[1]
    yield "is normalised with scale and bias in each other's place", right * bias + scale
    inputs = {of: x for of, x in streams(case).items() if x.shape == right.shape}
    if block and name.endswith("feed_forward_norm"):
        x, branch = input_of(case, block), case.activations[f"{block}.attention.output"]
        normed = case.activations[f"{block}.attention_norm"]
        inputs |= {
            "the input of the block and twice attention.output": x + 2 * branch,
            "twice the input of the block and attention.output": 2 * x + branch,
            "the input of the block less attention.output": x - branch,
            "attention.output added to the normalised input": normed + branch,
            "the input of the block and half of attention.output": x + branch / 2,
            "the mean of the input of the block and attention.output / sqrt(2)": (x + branch)
            / math.sqrt(2.0),
            "the input of the block and attention.context, not projected": x
            + case.activations[f"{block}.attention.context"],
        }
    for words, x in inputs.items():
        yield f"is the norm of {words}", normalise(x, epsilon) * scale + bias


def _reads(case: Case, block: str, part: str) -> tuple[str, Array, str]:
    """Return the name of the norm, what it reads, and what that is called."""
    if part == "final_norm":
        source = f"blocks.{case.vectors.model.num_layers - 1}.output"
        return part, case.activations[source], source
    if part == "attention_norm":
        return f"{block}.{part}", input_of(case, block), "the input of the block"
    return f"{block}.{part}", after_attention(case, block), "the stream after attention"


def epsilon(case: Case, block: str, part: str) -> Finding | None:
    """Solve for the epsilon that yours implies."""
    name, x, _ = _reads(case, block, part)
    leaves = case.parameters
    scale, bias = leaves[f"{name}.scale"], leaves[f"{name}.bias"]
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        normalised = (case.yours - bias) / scale
        slope = (normalised * centred).sum(axis=-1) / (centred**2).sum(axis=-1)
        implied = 1.0 / slope**2 - variance
        # The row of the smallest variance says most of it.
        value = float(implied.ravel()[variance.argmin()])
    if not (math.isfinite(value) and value > 0.0):
        return None
    candidate = normalise(x, value) * scale + bias
    residual = case.residual(candidate, fitted=1)
    if residual is None:
        return None
    return Finding(f"is normalised with epsilon {value:.3g}, which every row implies", residual)
